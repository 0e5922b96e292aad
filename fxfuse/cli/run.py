"""Run one command line: whatever happens inside, an exit code comes out, and at most one line on stderr.

Comes in: the words of a command line. Goes out: an exit code. stdout is kept for results: what models and torch print while a command
runs goes to stderr, and warnings, which a user of a command can do nothing about, go nowhere.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from types import FrameType
from typing import Any

import click

from . import codes
from .app import app
from .failure import explained, one_line
from .screen import Screen


class _Terminated(BaseException):
    """SIGTERM came: leave through every ``finally``, so that no temporary file stays."""


def run(arguments: list[str]) -> int:
    """Run the words of a command line (without the program's name). Never raises."""
    screen = Screen(sys.stdout or open(os.devnull, "w"), sys.stderr or open(os.devnull, "w"))  # noqa: SIM115  # None: it was closed
    who = "fxfuse"
    try:
        with _terminable(), _silent():
            code = app.main(arguments, prog_name="fxfuse", standalone_mode=False, obj=screen)
        screen.flush()
        return int(code) if isinstance(code, int) else codes.OK
    except click.exceptions.Exit as exit_:
        return exit_.exit_code
    except SystemExit as error:  # click leaves so when it has told the shell what completes a word
        return error.code if isinstance(error.code, int) else codes.OK
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message(), file=sys.stderr)
        return codes.USAGE
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx is not None else who
        message, hint = one_line(error.format_message()).rstrip("."), f"(see {path} --help)"
        return _failed(screen, arguments, f"{path}: {message} {hint}", codes.USAGE)
    except click.Abort:
        return _failed(screen, arguments, f"{who}: interrupted; nothing was written", codes.INTERRUPTED)
    except BrokenPipeError:
        # Python flushes stdout once more at exit, and would complain then.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return codes.BROKEN_PIPE
    except _Terminated:
        return _failed(screen, arguments, f"{who}: terminated; nothing was written", codes.TERMINATED)
    except BaseException as error:
        line, code = explained(error)
        return _failed(screen, arguments, f"{who}: {line}", code)


def _failed(screen: Screen, arguments: list[str], line: str, code: int) -> int:
    with contextlib.suppress(OSError, ValueError):
        if code == codes.INTERRUPTED and sys.stderr.isatty():
            print(file=sys.stderr)  # the terminal has shown ^C
        print(line, file=sys.stderr)
    if "--json" in arguments:
        with contextlib.suppress(OSError, ValueError):
            screen.data({"ok": False, "error": line, "exit_code": code})
    return code


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the command as Ctrl-C does, cleaning up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> Any:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("torch", "onnxscript", "onnx_ir", "onnxruntime")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
