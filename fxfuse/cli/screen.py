"""What a command shows: results on stdout, progress on stderr.

Comes in: text, tables, data. Goes out: rich tables and a progress bar in a terminal, plain text where stdout or stderr is a file or a
pipe, one JSON object and nothing else where ``--json`` was given.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

from .packages import sentence

Stage = Callable[[str], None]


class Screen:
    """Where a command writes. ``json``: only ``data`` is shown."""

    def __init__(self, stdout: TextIO, stderr: TextIO) -> None:
        self.stdout, self.stderr = stdout, stderr
        self.json = False
        self._rich = not sentence("", "rich")

    @property
    def terminal(self) -> bool:
        """Does a person look at stdout, and can rich draw?"""
        return self._rich and self.stdout.isatty()

    def text(self, text: str = "") -> None:
        """Lines for a person."""
        if not self.json:
            self.stdout.write(text + "\n")

    def data(self, value: dict[str, Any]) -> None:
        """The command's whole result, for ``--json``."""
        self.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")

    def result(self, value: dict[str, Any]) -> None:
        """``data`` where ``--json`` was given."""
        if self.json:
            self.data(value)

    def flush(self) -> None:
        """Write what is buffered, so that a full disk or a reader that went away shows now."""
        self.stdout.flush()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Within, only this screen reaches stdout: whoever else writes to its file descriptor (C code, processes that a model starts)
        reaches stderr."""
        if _descriptor(self.stdout) != 1 or _descriptor(self.stderr) != 2:
            yield
            return
        self.stdout.flush()
        before, kept = self.stdout, os.dup(1)
        self.stdout = own = os.fdopen(kept, "w", encoding=before.encoding, errors=before.errors)
        os.dup2(2, 1)
        try:
            yield
            own.flush()
        finally:
            self.stdout = before
            os.dup2(kept, 1)
            with contextlib.suppress(OSError):
                own.close()

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
        """A table; every column but the first is aligned to the right where all its cells are numbers."""
        if self.json:
            return
        right = [all(_is_number(row[c]) for row in rows) and c > 0 for c in range(len(columns))]
        if self.terminal:
            from rich import box
            from rich.console import Console
            from rich.table import Table

            table = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left")
            for name, numbers in zip(columns, right, strict=True):
                table.add_column(name, justify="right" if numbers else "left", overflow="fold")
            for row in rows:
                table.add_row(*[_plain(cell) for cell in row])
            Console(file=self.stdout).print(table)
            return
        if title:
            self.text(title)
        for line in plain_table(columns, rows, right):
            self.text(line)

    @contextlib.contextmanager
    def progress(self, total: int) -> Iterator[Stage]:
        """A bar of ``total`` stages on stderr: call what is given with the name of each stage as it begins. Nothing in a pipe."""
        if not (self._rich and self.stderr.isatty()):
            yield lambda name: None
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=Console(file=self.stderr), transient=True, redirect_stdout=False, redirect_stderr=False) as bar:
            task = bar.add_task("", total=total)
            begun = 0

            def stage(name: str) -> None:
                nonlocal begun
                bar.update(task, description=_plain(name), completed=min(begun, total))
                begun += 1

            yield stage


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[bool]) -> list[str]:
    """A table as lines of text.

    >>> plain_table(["who", "ms"], [["loop", "12"], ["fused", "3"]], [False, True])
    ['who    ms', 'loop   12', 'fused   3']
    """
    cells = [list(columns), *map(list, rows)]
    widths = [max(len(row[c]) for row in cells) for c in range(len(columns))]
    lines = []
    for row in cells:
        parts = [cell.rjust(width) if number else cell.ljust(width) for cell, width, number in zip(row, widths, right, strict=True)]
        lines.append("  ".join(parts).rstrip())
    return lines


def _descriptor(file: TextIO) -> int | None:
    """The file descriptor that it writes to; None where that is nothing of the system's."""
    try:
        number = file.fileno()
        os.fstat(number)
    except (OSError, ValueError, AttributeError):
        return None
    return number


def _is_number(cell: str) -> bool:
    return not cell or cell[0].isdigit() or cell in ("-", "same")


def _plain(text: str) -> str:
    """Text that rich shall show as it is: brackets are no markup."""
    from rich.markup import escape

    return escape(text)
