"""A progress bar on standard error while candidates are timed, where somebody looks and it takes a while.

Comes in: how many candidates are expected, and what was timed. Goes out: a line in a terminal, gone when planning ends: rich's bar where
rich is installed (the extra ``report``), else plain text; nothing where standard error is no terminal, and nothing in the first second.
"""

from __future__ import annotations

import contextlib
import sys
import time
from types import TracebackType
from typing import Any

PATIENCE = 1.0  # seconds without a bar
WHAT = "fxfuse: timing"


class Progress:
    """Counts candidates; to be used as a context, whose end takes the line away. ``shown=False``: silent."""

    def __init__(self, shown: bool) -> None:
        self.shown = shown
        self.done = self.total = 0
        self.start: float | None = None
        self.bar: Any = None  # rich's
        self.width = 0  # of the plain line on the screen

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def expect(self, count: int) -> None:
        """So many candidates more."""
        self.start = time.perf_counter() if self.start is None else self.start
        self.total += count

    def step(self, what: str) -> None:
        """One candidate was timed."""
        self.done += 1
        self.total = max(self.total, self.done)
        if self.shown and self.start is not None and time.perf_counter() - self.start > PATIENCE:
            try:
                self._draw(what)
            except Exception:  # a terminal that cannot be written to: nobody misses a bar so much
                self.shown = False

    def close(self) -> None:
        """Take the line away; another may begin afterwards."""
        with contextlib.suppress(Exception):
            if self.bar is not None:
                self.bar.stop()
            elif self.width:
                sys.stderr.write("\r" + " " * self.width + "\r")
                sys.stderr.flush()
        self.bar, self.width, self.start = None, 0, None
        self.done = self.total = 0

    def _draw(self, what: str) -> None:
        if sys.stderr is None or not sys.stderr.isatty():
            self.shown = False
            return
        if self.bar is None and not self.width:
            self.bar = _rich_bar(self.total)
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=self.done, total=self.total, what=what[:40])
            return
        line = f"{WHAT} {self.done}/{self.total} {what}"[:78]
        sys.stderr.write("\r" + line.ljust(self.width))
        sys.stderr.flush()
        self.width = len(line)


def _rich_bar(total: int) -> Any:
    """A running bar of rich's with one task; None without rich."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar
    except ImportError:
        return None
    columns = (TextColumn(WHAT), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[what]}", markup=False))
    bar = Bar(*columns, console=Console(stderr=True), transient=True)
    bar.add_task("", total=total, what="")
    bar.start()
    return bar
