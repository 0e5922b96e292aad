"""Registered buffers that forward assigns: ``self.center = self.center * 0.9 + 0.1 * x.mean(0).detach()``.

Comes in: the buffers of a module that an earlier recording saw set to other tensors. Goes out: ``WatchedBuffers``, which stands for the
module's own dict of them during a run and tells of every assignment; and on the trace, in order, each ``Assignment``.

In the original the name stands for another tensor afterwards. Here the assigned tensor is a value of the graph like any other, which later
reads of the name give, and its numbers are written into the registered tensor at the end (``passes.assigning``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .attributes import inside
from .trace import Assignment, Frame, Trace


class WatchedBuffers(dict[str, Any]):
    """The buffers of a module; ``tell(name, before, value)`` is called where one that is a tensor is set to another tensor.

    >>> import torch
    >>> told = []
    >>> held = WatchedBuffers({"steps": torch.tensor(0)}, lambda name, before, value: told.append((name, int(before), int(value))))
    >>> held["steps"] = held["steps"] + 1
    >>> held["steps"] = held["steps"] + 1
    >>> told, held.unexplained()
    ([('steps', 0, 1), ('steps', 0, 2)], '')
    >>> held["more"] = torch.tensor(1)
    >>> held.unexplained()
    'more'
    """

    def __init__(self, buffers: dict[str, Any], tell: Callable[[str, Tensor, Tensor], None]) -> None:
        super().__init__(buffers)
        self.before, self.tell = dict(buffers), tell
        self.told = dict(buffers)

    def __setitem__(self, name: str, value: Any) -> None:
        before = self.before.get(name)
        if value is not self.get(name) and isinstance(before, Tensor) and isinstance(value, Tensor):
            self.told[name] = value
            self.tell(name, before, value)
        super().__setitem__(name, value)

    def unexplained(self) -> str:
        """The first name that stands for something that was not told of, or is new, or gone; empty where there is none."""
        names = dict.fromkeys((*self.before, *self))
        return next((name for name in names if self.get(name, self) is not self.told.get(name, self.told)), "")


def assigned_names(buffers: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """The names of tensors that stand for another tensor than before."""
    return [
        name
        for name, value in buffers.items()
        if isinstance(value, Tensor) and isinstance(before.get(name), Tensor) and value is not before[name]
    ]


def assigned_in(trace: Trace, frame: Frame) -> list[Assignment]:
    """The assignments made in a call, and in calls inside it."""
    return [each for each in trace.assigned if inside(trace, each.frame, frame.index)]
