"""``module.to(device)`` inside a forward, of a module that is there already.

Comes in: a trace about to be recorded. Goes out: a context in which such a call does nothing, as it would: ``nn.Module.to`` sets every
Parameter's data to itself, without gradient tracking, which a recording has to take for a change. That the module was on that device, or
had that dtype, is noted on the trace and becomes a guard. A call that really moves something runs as ever.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fxfuse.private.parse_to import parse_to
from fxfuse.private.torch_function import DisableTorchFunction

from .trace import Trace

_lock = threading.Lock()
_usual = nn.Module.to
_recordings = 0  # under way, in all threads
_here = threading.local()  # .trace: the recording of this thread


def _to(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    trace: Trace | None = getattr(_here, "trace", None)
    if trace is None:
        return _usual(self, *args, **kwargs)
    device, dtype, _, layout = parse_to(*args, **kwargs)
    with DisableTorchFunction():
        there = layout is None and _is_there(self, device, dtype)
    if not there:
        return _usual(self, *args, **kwargs)
    trace.moves = trace.moves or device is not None
    trace.reads_dtype = trace.reads_dtype or dtype is not None
    return self


def _is_there(module: nn.Module, device: torch.device | None, dtype: torch.dtype | None) -> bool:
    if any(not type(each)._apply.__module__.startswith("torch.") for each in module.modules()):
        return False  # somebody's own _apply does what it likes
    place = None if device is None else torch.empty(0, device=device).device  # "cuda" is "cuda:0"
    for tensor in (*module.parameters(), *module.buffers()):
        if place is not None and tensor.device != place:
            return False
        if dtype is not None and (tensor.is_floating_point() or tensor.is_complex()) and tensor.dtype is not dtype:
            return False
    return True


@contextmanager
def moves_noted(trace: Trace) -> Iterator[None]:
    """In this thread, moving a module to where it is does nothing but note itself on ``trace``."""
    global _recordings, _usual
    before = getattr(_here, "trace", None)
    with _lock:
        if _recordings == 0:
            _usual = nn.Module.to  # somebody may have put another there since the last recording
        _recordings += 1
        nn.Module.to = _to  # type: ignore[method-assign]
    _here.trace = trace
    try:
        yield
    finally:
        _here.trace = before
        with _lock:
            _recordings -= 1
            if _recordings == 0:
                nn.Module.to = _usual  # type: ignore[method-assign]
