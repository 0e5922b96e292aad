"""``len(x)`` of a tensor as a tracked size.

Comes in: a model about to be recorded. Goes out: a context in which ``len`` of a tensor, in the files that the model's forwards come
from, is ``x.shape[0]``. Python's own ``len`` turns any result into a plain ``int``, so that ``torch.zeros(len(x), 3)`` would hold for
the recorded batch size only. The name is put into the globals of those files, and taken out again; for anything but a tensor it is ``len``.
"""

from __future__ import annotations

import builtins
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_lock = threading.Lock()
_here = threading.local()  # .recording: how many recordings this thread is in; for other threads ``len`` is what it was
_users: dict[int, int] = {}  # id of a globals dict -> recordings under way that need it


def _len(value: Any) -> int:
    if getattr(_here, "recording", 0) and isinstance(value, torch.Tensor) and value.dim():
        size: int = value.shape[0]
        return size
    return builtins.len(value)


@contextmanager
def tracked_len(model: nn.Module) -> Iterator[None]:
    """``len(tensor)`` is a tracked size while a recording runs, in the source files of the model's modules."""
    found: dict[int, dict[str, Any]] = {}
    for module in model.modules():
        for owner in type(module).__mro__:
            forward = vars(owner).get("forward")
            names = getattr(forward, "__globals__", None)
            if isinstance(names, dict) and not str(names.get("__name__", "torch")).startswith(("torch.", "fxfuse")):
                found[id(names)] = names
    with _lock:
        for key, names in found.items():
            if key in _users or "len" not in names:
                _users[key] = _users.get(key, 0) + 1
                names["len"] = _len
    _here.recording = getattr(_here, "recording", 0) + 1
    try:
        yield
    finally:
        _here.recording -= 1
        with _lock:
            for key, names in found.items():
                if names.get("len") is _len:
                    _users[key] -= 1
                    if _users[key] == 0:
                        del _users[key], names["len"]
