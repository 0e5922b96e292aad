"""``len(x)`` of a tensor as a tracked size, and ``range(n)`` of one as a comparison.

Comes in: a model about to be recorded. Goes out: a context in which ``len`` of a tensor, in the files that the model's forwards come
from, is ``x.shape[0]``. Python's own ``len`` turns any result into a plain ``int``, so that ``torch.zeros(len(x), 3)`` would hold for
the recorded batch size only; and ``range`` reads a size unseen: ``range(0, n, 32)`` has one step at every small ``n``. The names are
put into the globals of those files, and taken out again; for anything but a tensor, or a size, they are Python's own.
"""

from __future__ import annotations

import builtins
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fxfuse.models.module_tree import all_modules

from .sizes import TracedInt, fixed

_lock = threading.Lock()
_here = threading.local()  # .recording: how many recordings this thread is in; for other threads ``len`` is what it was
_users: dict[int, int] = {}  # id of a globals dict -> recordings under way that need it


def _len(value: Any) -> int:
    if getattr(_here, "recording", 0) and isinstance(value, torch.Tensor) and value.dim():
        size: int = value.shape[0]
        return size
    return builtins.len(value)


class _Ranges(type):
    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, builtins.range)


class _Range(metaclass=_Ranges):
    def __new__(cls, *args: Any) -> Any:
        return builtins.range(*(fixed(arg) if isinstance(arg, TracedInt) else arg for arg in args))


_NAMES: dict[str, Any] = {"len": _len, "range": _Range}


@contextmanager
def tracked_len(model: nn.Module) -> Iterator[None]:
    """``len(tensor)`` is a tracked size while a recording runs, in the source files of the model's modules."""
    found: dict[int, dict[str, Any]] = {}
    for module in all_modules(model):
        for owner in type(module).__mro__:
            forward = vars(owner).get("forward")
            names = getattr(forward, "__globals__", None)
            if isinstance(names, dict) and not str(names.get("__name__", "torch")).startswith(("torch.", "fxfuse")):
                found[id(names)] = names
    with _lock:
        for key, names in found.items():
            if key in _users or not names.keys() & _NAMES.keys():
                _users[key] = _users.get(key, 0) + 1
                names.update(_NAMES)
    _here.recording = getattr(_here, "recording", 0) + 1
    try:
        yield
    finally:
        _here.recording -= 1
        with _lock:
            for key, names in found.items():
                if all(names.get(name) is ours for name, ours in _NAMES.items()):
                    _users[key] -= 1
                    if _users[key] == 0:
                        del _users[key]
                        for name in _NAMES:
                            del names[name]
