"""Results that need a gradient, by what they say, and have none to give: they were made from a view that was made under ``no_grad``.

Comes in: a recorded call. Goes out: nothing, or ``Refused`` with the place of such a view. torch gives a view that is made under
``no_grad`` the flag of its base, ``requires_grad``, and no history; what is computed from it afterwards says that it needs a gradient,
too. A graph holds the view detached, which says that it needs none. Nothing shows of that where a result has a history of its own: the
flag is the same then.
"""

from __future__ import annotations

from torch import Tensor

from fxfuse.graph import Place
from fxfuse.ops import op_name
from fxfuse.private.torch_function import DisableTorchFunction
from fxfuse.recording.trace import Frame, Ref, Trace, refs_in

from .lifted import Refused


def refuse_flags_without_history(trace: Trace, frame: Frame) -> None:
    """Refuse where a view under ``no_grad`` gave its flag to a result of ``frame`` that has no other reason to need a gradient."""
    if not trace.untracked_views:
        return
    carried: dict[int, Place | None] = {}
    for event in trace.events[frame.start : frame.end]:
        made = refs_in(event.out)
        if event.func is Tensor.detach and trace.untracked_views.intersection(made):
            carried.update((value, event.place) for value in made)
            continue
        given = [*refs_in(event.args), *refs_in(event.kwargs)]
        source = next((value for value in given if value in carried), None)
        if source is None or event.untracked or op_name(event.func) == "detach":
            continue
        if not any(value not in carried and _needs_gradient(trace, value) for value in given):
            carried.update((value, carried[source]) for value in made if _inexact(trace, value))
    # What leaves as it is, is made from its base at every call, flag and all.
    for leaf in frame.out:
        if isinstance(leaf, Ref) and leaf.value in carried and leaf.value not in trace.untracked_views:
            raise Refused("a result needs a gradient for a view under no_grad alone, and has none to give", carried[leaf.value])


def _needs_gradient(trace: Trace, value: int) -> bool:
    with DisableTorchFunction():
        return trace.values[value].tensor.requires_grad


def _inexact(trace: Trace, value: int) -> bool:
    dtype = trace.values[value].tensor.dtype
    return dtype.is_floating_point or dtype.is_complex
