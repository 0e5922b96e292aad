"""Inputs whose order in memory forward relies on: it calls ``view``, or writes into what ``reshape`` may have copied.

Comes in: the values that were viewed so, and the trace. Goes out: what each input has to be like at another call. A graph has ``reshape``
for ``view``, and a write into a view wherever one was recorded: where another layout makes torch refuse the one, or copy before the
other, the program is not the original, and must not run.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from fxfuse.graph import Layout
from fxfuse.ops import canonical, op_name
from fxfuse.private.torch_function import DisableTorchFunction
from fxfuse.recording.trace import Event, Frame, Ref, Trace, refs_in
from fxfuse.running.guards import in_order, order_of

# What gives a view of its first argument, and new memory in the order of it.
_VIEWS = frozenset(
    "select __getitem__ narrow unsqueeze squeeze transpose t mT T permute movedim flatten unflatten view reshape expand view_as reshape_as "
    "expand_as diagonal unbind ravel split chunk swapaxes detach unfold".split()
)
_COPIES = frozenset("clone dropout flip to double float half bfloat16 zeros_like ones_like full_like empty_like".split())


def needs_no_rows(before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    """Is a view of ``before`` as ``after`` one whatever the strides: are dims only split?

    >>> needs_no_rows((4, 6), (4, 2, 1, 3)), needs_no_rows((4, 6), (24,))
    (True, False)
    """
    if 0 in before:
        return True
    parts = iter([size for size in after if size != 1])
    for size in before:
        made = 1
        while made < size:
            made *= next(parts)
        if made != size:
            return False
    return True


def layouts(trace: Trace, frame: Frame, viewed: Iterable[int], torn: Iterable[int]) -> dict[int, Layout]:
    """What the inputs (by their place among the frame's leaves) have to be like for ``viewed`` to be in the recorded order.

    Only those that were dense in the recording, in whatever order of dims: of another layout nobody can say what it has in common with
    others. The others must not lie in rows where ``torn`` comes from them: values that were copied for how they lay, and of which one was
    written.
    """
    pending: list[tuple[int, Layout]] = [(value, "in rows") for value in viewed]
    for value in torn:  # one of the two is what the input that it comes from was like
        pending += [(value, "in rows"), (value, "not in rows")]
    if not pending:
        return {}
    place: dict[int, int] = {}
    for index, leaf in enumerate(frame.leaves):
        if isinstance(leaf, Ref):
            place.setdefault(leaf.value, index)
    makers: dict[int, Event] = {}
    for event in trace.events[frame.start : frame.end]:
        for value in refs_in(event.out):
            makers.setdefault(value, event)
    found: dict[int, Layout] = {}
    seen: set[tuple[int, Layout]] = set()
    while pending:
        value, layout = pending.pop()
        if (value, layout) in seen:
            continue
        seen.add((value, layout))
        if value in place:
            if layout in _allowed(trace.values[value].tensor) and found.get(place[value]) not in ("in rows", "out of order"):
                found[place[value]] = layout
        elif value in makers:
            pending += _sources(makers[value], layout)
    return found


def _sources(event: Event, layout: Layout) -> list[tuple[int, Layout]]:
    """Whose order the result of a call has. New memory is as dense as can be, so that gaps no longer count."""
    name = op_name(event.func)
    if name in _VIEWS:
        return [(value, layout) for value in refs_in(event.args[:1] or event.kwargs.get("input"))]
    args: Any = event.args
    if name in _COPIES or canonical(event.func, args, event.kwargs)[0].pointwise:
        dense: Layout = "in order" if layout in ("in rows", "in order") else "out of order"
        return [(value, dense) for value in (*refs_in(event.args), *refs_in(event.kwargs))]
    return []


def _allowed(tensor: torch.Tensor) -> tuple[Layout, ...]:
    """What can be asked of the layouts of an input that was recorded so, in the order of its dims."""
    if in_rows(tensor):
        return ("in rows", "in order")
    with DisableTorchFunction():
        if tensor.is_contiguous():
            return ()
        order = order_of(tensor)
        if order and tensor.permute(order).is_contiguous():
            return ("in rows", "in order")
        return ("not in rows",) if in_order(tensor) else ("not in rows", "out of order")


def in_rows(tensor: torch.Tensor) -> bool:
    """Also in dims of size 1, whose strides show what they are cut out of."""
    step = 1
    with DisableTorchFunction():
        for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
            if stride != step:
                return False
            step *= size
    return True
