"""Which code ran in which call of a module, and whether it asked a clock.

Comes in: a run under watch. Goes out: on its trace, ``ran``: by frame, the code that ran there, torch's and ours aside, with its globals.
A call that asks for the time, or for a setting of torch's that no guard knows, is marked: two recordings may well be given the same answer.
"""

from __future__ import annotations

import datetime
import os
import sys
import sysconfig
import time
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from types import BuiltinFunctionType, CodeType, FrameType
from typing import Any, NamedTuple

import torch
from torch import nn

from fxfuse.graph import Place
from fxfuse.models.collector import paused

from .trace import Frame, Trace

Ran = dict[CodeType, dict[str, Any]]  # and the globals that the code names

_STDLIB = os.path.abspath(sysconfig.get_paths()["stdlib"]) + os.sep
_PACKAGES = tuple({os.path.abspath(sysconfig.get_paths()[kind]) + os.sep for kind in ("purelib", "platlib")})
_libraries: dict[str, bool] = {}

_CLOCKS = frozenset(
    getattr(time, f"{name}{unit}") for name in ("time", "monotonic", "perf_counter", "process_time", "thread_time") for unit in ("", "_ns")
)
_OF_DATES = frozenset(("now", "utcnow", "today"))
_SETTINGS = frozenset({torch.get_num_threads, torch.get_num_interop_threads, torch.is_anomaly_enabled})
_SETTINGS_IN_PYTHON = {each.__code__: each.__name__ for each in (torch.initial_seed, torch.are_deterministic_algorithms_enabled)}
_NAMES = frozenset(function.__name__ for function in _CLOCKS | _SETTINGS) | _OF_DATES


def of_library(file: str) -> bool:
    """Is this source of Python's own library, or of numpy's?"""
    known = _libraries.get(file)
    if known is None:
        path = os.path.abspath(file)
        own = path.startswith(_STDLIB) and not path.startswith(_PACKAGES) and f"{os.sep}site-packages{os.sep}" not in path
        known = _libraries[file] = own or f"{os.sep}numpy{os.sep}" in path
    return known


class Ears:
    """What hears which code runs. Our own work in between is not listened to: each call and return in it costs as one of the model's.

    >>> ears = Ears()
    >>> ears.close()  # nothing listens
    False
    """

    def __init__(self) -> None:
        self._hook: Callable[[Any], None] | None = None
        self._now: Callable[[], Any] = sys.getprofile
        self._note: Any = None

    def start(self, hook: Callable[[Any], None], now: Callable[[], Any], note: Any) -> None:
        """Listen with ``note``, through ``sys.setprofile`` or ``sys.settrace``; ``now`` tells who listens there."""
        self._hook, self._now, self._note = hook, now, note
        hook(note)

    def stop(self) -> None:
        if self._hook is not None:
            self._hook(None)
        self._hook = None

    def close(self) -> bool:
        """Until ``open``, nothing is noted on this thread. Were they open? Whoever put a profiler of its own there meanwhile keeps it."""
        if self._hook is not None and self._now() is self._note:
            self._hook(None)
            return True
        return False

    def open(self) -> None:
        if self._hook is not None and self._now() is None:
            self._hook(self._note)


_TORCH_ONLY = frozenset(
    f"torch.nn.modules.{name}"
    for name in "activation batchnorm conv dropout flatten fold instancenorm linear normalization padding pooling sparse".split()
)


def runs_torch_only(kind: type) -> bool:
    """Does the forward of this very class run torch's code alone, and the forwards of submodules?

    >>> runs_torch_only(nn.Linear), runs_torch_only(nn.Sequential), runs_torch_only(nn.TransformerEncoderLayer)  # it calls what it is given
    (True, True, False)
    """
    return kind.__module__ in _TORCH_ONLY or kind is nn.Sequential


@contextmanager
def code_noted(trace: Trace, stack: list[int], internal: Callable[[str], bool], ears: Ears) -> Iterator[None]:
    """Within, on this thread, what runs is noted on ``trace`` for the innermost frame of ``stack``, but for ``internal`` files."""
    ran, asked = trace.ran, []

    # An exception in here would come out of whatever runs, ``__exit__`` too: nothing is called that might raise.
    def note(frame: FrameType, event: str, arg: Any) -> None:
        if not stack:
            return
        if event == "call":
            code, back = frame.f_code, frame.f_back
            if code not in _SETTINGS_IN_PYTHON:
                ran.setdefault(stack[-1], {})[code] = frame.f_globals
            elif back is not None:
                asked.append(_Asked(stack[-1], back.f_code.co_filename, back.f_lineno, _SETTINGS_IN_PYTHON[code], True))
        elif event == "c_call" and type(arg) is BuiltinFunctionType and arg.__name__ in _NAMES:
            asked.append(_Asked(stack[-1], frame.f_code.co_filename, frame.f_lineno, arg, arg in _SETTINGS))

    # Somebody's profiler stays: a debugger's hook tells of calls as well, but for those to builtins. Both taken: nothing is known.
    hook: Any = sys.setprofile if sys.getprofile() is None else sys.settrace if sys.gettrace() is None else None
    if hook is None:
        trace.ran_known = False
        yield
        return
    with paused():  # whoever listens to the collector (a library that times it) is called in the middle of anything, and is no part of it
        ears.start(hook, sys.getprofile if hook is sys.setprofile else sys.gettrace, note)
        try:
            yield
        finally:
            hook(None)  # before anything of ours that could fail
            ears.stop()
        for codes in ran.values():
            for code in [code for code in codes if internal(code.co_filename)]:
                del codes[code]
        for each in asked:
            _mark(trace, each, internal)


class _Asked(NamedTuple):
    """A call of what may answer otherwise next time: in which frame of the trace, from which line."""

    frame: int
    file: str
    line: int
    what: Any
    setting: bool


def _mark(trace: Trace, asked: _Asked, internal: Callable[[str], bool]) -> None:
    found, name = trace.frames[asked.frame], getattr(asked.what, "__name__", asked.what)
    if name in _OF_DATES and not (isinstance(owner := asked.what.__self__, type) and issubclass(owner, datetime.date)):
        return
    if not found.poison and not internal(asked.file) and not of_library(asked.file):
        found.poison = f"asks torch for a setting that is not guarded ({name})" if asked.setting else f"asks for the time ({name})"
        found.place = Place(asked.file, asked.line)


def ran_in(trace: Trace, frame: Frame, closed: Container[nn.Module] = ()) -> Ran:
    """What ran in a call, and in the calls inside of it, but for those of the modules that are ``closed``: they stay calls."""
    found: Ran = {}
    pending = [frame.index]
    while pending:
        index = pending.pop()
        found.update(trace.ran.get(index, {}))
        pending.extend(child for child in trace.frames[index].children if trace.frames[child].module not in closed)
    return found
