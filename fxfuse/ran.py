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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

import torch

from .graph import Place
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
_SETTINGS_IN_PYTHON = {
    function.__code__: function.__name__ for function in (torch.initial_seed, torch.are_deterministic_algorithms_enabled)
}


def of_library(file: str) -> bool:
    """Is this source of Python's own library, or of numpy's?"""
    known = _libraries.get(file)
    if known is None:
        path = os.path.abspath(file)
        own = path.startswith(_STDLIB) and not path.startswith(_PACKAGES) and f"{os.sep}site-packages{os.sep}" not in path
        known = _libraries[file] = own or f"{os.sep}numpy{os.sep}" in path
    return known


@contextmanager
def code_noted(trace: Trace, stack: list[int], internal: Callable[[str], bool]) -> Iterator[None]:
    """Within, on this thread, what runs is noted on ``trace`` for the innermost frame of ``stack``, but for ``internal`` files."""
    ran = trace.ran

    def users(frame: FrameType | None) -> bool:
        return frame is not None and not internal(file := frame.f_code.co_filename) and not of_library(file)

    def mark(frame: FrameType, reason: str) -> None:
        found = trace.frames[stack[-1]]
        if not found.poison:
            found.poison, found.place = reason, Place(frame.f_code.co_filename, frame.f_lineno)

    def note(frame: FrameType, event: str, arg: Any) -> None:
        if not stack:
            return
        code = frame.f_code
        if event == "call":
            if not internal(code.co_filename):
                ran.setdefault(stack[-1], {})[code] = frame.f_globals
            elif code in _SETTINGS_IN_PYTHON and frame.f_back is not None and users(frame.f_back):
                mark(frame.f_back, f"asks torch for a setting that is not guarded ({_SETTINGS_IN_PYTHON[code]})")
        elif event == "c_call" and users(frame):
            try:
                if arg in _CLOCKS or (arg.__name__ in _OF_DATES and issubclass(arg.__self__, datetime.date)):
                    mark(frame, f"asks for the time ({arg.__name__})")
                elif arg in _SETTINGS:
                    mark(frame, f"asks torch for a setting that is not guarded ({arg.__name__})")
            except (TypeError, AttributeError):  # a builtin that cannot be hashed, or has no name
                return

    before = sys.getprofile()
    if before is not None:  # somebody's profiler: it stays, and what ran is not known
        trace.ran_known = False
        yield
        return
    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(None)


def ran_in(trace: Trace, frame: Frame) -> Ran:
    """What ran in a call, and in the calls inside of it."""
    found: Ran = {}
    pending = [frame.index]
    while pending:
        index = pending.pop()
        found.update(trace.ran.get(index, {}))
        pending.extend(trace.frames[index].children)
    return found
