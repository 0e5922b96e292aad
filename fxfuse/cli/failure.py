"""What a command says when it cannot go on: one line on stderr that says what to do, and an exit code."""

from __future__ import annotations

import os
import re
import sys
import traceback
from types import TracebackType

from . import codes

_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_OPTIONAL = ("click", "rich", "safetensors", "numpy", "onnx", "onnxscript", "onnxruntime")
_COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_MOST = 300  # characters of somebody else's message


class CommandError(Exception):
    """Ends a command with one line and an exit code."""

    def __init__(self, message: str, code: int = codes.INPUT) -> None:
        super().__init__(message)
        self.code = code


class Interrupted(BaseException):
    """Ctrl-C, in a class of our own: click writes an empty line where it sees a KeyboardInterrupt."""


def one_line(text: object) -> str:
    """Any message as one line of moderate length, without what would move a terminal's cursor or change its colours.

    >>> one_line("a\\n  b \\x1b[31mred"), len(one_line("long " * 1000)) < 400
    ('a b red', True)
    """
    try:
        line = str(text)
    except Exception:  # a class of somebody else's
        line = "without a message"
    line = " ".join("".join(ch if ch.isprintable() else " " for ch in _COLOURS.sub("", line)).split())
    return line if len(line) <= _MOST else line[: _MOST - 3] + "..."


def said(error: BaseException) -> str:
    """An exception of somebody else's code as a phrase: its kind, its message, the last line of theirs that it passed.

    >>> try:
    ...     [][1]
    ... except IndexError as error:
    ...     said(error).startswith("IndexError: list index out of range")
    True
    """
    if isinstance(error, SystemExit):
        text = f"SystemExit({error.code!r})"
    else:
        message = one_line(error)
        text = f"{type(error).__name__}: {message}" if message else type(error).__name__
    place = _place(error.__traceback__)
    return f"{text} ({place})" if place else text


def _torch() -> str:
    """Its folder; torch may not have been imported when something fails."""
    torch = sys.modules.get("torch")
    return os.path.dirname(str(torch.__file__)) + os.sep if torch is not None else "<"


def _place(trace: TracebackType | None) -> str:
    for frame in reversed(traceback.extract_tb(trace)):
        if frame.filename.startswith((_HERE, _torch(), "<")) or f"{os.sep}importlib{os.sep}" in frame.filename:
            continue
        return f"{os.path.basename(frame.filename)}:{frame.lineno}"
    return ""


def explained(error: BaseException) -> tuple[str, int]:
    """``(line, exit code)`` for whatever ended a command."""
    from fxfuse.errors import ConvertError, FxfuseError, MissingPackageError

    if isinstance(error, CommandError):
        return one_line(error), error.code
    if isinstance(error, MissingPackageError):
        return one_line(error), codes.PACKAGE
    missing = (getattr(error, "name", None) or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if missing in _OPTIONAL:  # asked for by another package, or by torch
        return f"this needs {missing}, which is not installed: pip install 'fxfuse[convert]'", codes.PACKAGE
    if isinstance(error, (ConvertError, FxfuseError)):
        return one_line(error), codes.INPUT
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
        return "out of memory: give smaller inputs, or a machine with more", codes.INPUT
    if isinstance(error, KeyboardInterrupt | Interrupted):
        return "interrupted; nothing was written", codes.INTERRUPTED
    if isinstance(error, OSError):
        return one_line(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"), codes.OUTPUT
    if os.environ.get("FXFUSE_TRACEBACK"):
        traceback.print_exception(error, file=sys.stderr)
    return f"a mistake of fxfuse's, please report it ({said(error)}; FXFUSE_TRACEBACK=1 shows where)", codes.INTERNAL
