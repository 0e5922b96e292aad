"""Where the size of a computed tensor comes from: ``x.view(n * heads, -1)`` has ``heads`` times as many rows as ``n`` says.

Comes in: a trace, a value of it and one of its dims. Goes out: another value's dim and the number that its size is multiplied by. Follows
reshapes to sizes that forward spelled out, and elementwise ops.
"""

from __future__ import annotations

from typing import Any

from fxfuse.ops import op_name
from fxfuse.recording.sizes import SizeOf, SizeOp
from fxfuse.recording.trace import Event, Ref, Trace


class SizeSources:
    """Answers for one trace, which is walked once."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.made_by: dict[int, Event] = {}
        for event in trace.events:
            if isinstance(event.out, Ref):
                self.made_by.setdefault(event.out.value, event)

    def of(self, value: int, dim: int) -> tuple[int, int, int]:
        """``(other, its dim, factor)``: the size of ``dim`` of ``value`` is ``factor`` times the other's. At worst itself, once."""
        factor = 1
        while value in self.made_by:
            step = _step(self.trace, self.made_by[value], value, dim)
            if step is None:
                break
            value, dim, factor = step[0], step[1], factor * step[2]
        return value, dim, factor


def _step(trace: Trace, event: Event, value: int, dim: int) -> tuple[int, int, int] | None:
    name = op_name(event.func)
    if name in ("view", "reshape"):
        sizes: Any = event.args[1] if len(event.args) == 2 else event.args[1:]
        return _scaled(sizes[dim]) if isinstance(sizes, (tuple, list)) and len(sizes) > dim else None
    if name in ("add", "mul"):
        shape = trace.values[value].shape
        for arg in event.args[:2]:
            if isinstance(arg, Ref) and len(own := trace.values[arg.value].shape) == len(shape) and own[dim] == shape[dim] > 1:
                return arg.value, dim, 1
    return None


def _scaled(size: Any) -> tuple[int, int, int] | None:
    if isinstance(size, SizeOf):
        return size.value, size.dim, 1
    if isinstance(size, SizeOp) and size.op == "mul":
        left, right = size.args
        if isinstance(left, int):
            left, right = right, left
        if isinstance(left, SizeOf) and isinstance(right, int) and right > 0:
            return left.value, left.dim, right
    return None
