"""Forwards that switch gradient tracking on: energies whose gradient is part of the result, also where the caller asks for none.

Comes in: a recorded call and the calls in it that stay closed. Goes out: ``Tracking``. Where the caller tracks no gradients (``no_grad``),
what forward computes inside of ``enable_grad`` has a history and the rest has none. A program has no such switches: it runs with
tracking on from its first op to its last, and what the original computes outside is detached where it leaves the region. That is the same
if nothing inside reads a history that is not there; otherwise calls without tracking run the original forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fxfuse.ops import MAY_COPY, op_name
from fxfuse.private.torch_function import DisableTorchFunction
from fxfuse.recording.trace import Event, Frame, Ref, Trace, refs_in


@dataclass(frozen=True)
class Tracking:
    """What a program needs: nothing (""), a caller who tracks gradients ("needed"), or to switch tracking on itself ("on").

    ``outside``: the results, by their place, that are detached where the caller tracks none; ``viewed``: those that are views of an input
    or a weight, which say that they need a gradient where that does.
    """

    kind: Literal["", "needed", "on"] = ""
    outside: tuple[int, ...] = ()
    viewed: tuple[int, ...] = ()


def switched_on(trace: Trace, frame: Frame, opaque: frozenset[int]) -> Tracking:
    """How tracking is switched on in ``frame``, other than in calls that stay closed: those do so themselves."""
    spans = [(start, end) for at, start, end in trace.switched_on if _opened(trace, at, frame.index, opaque)]
    return _Walk(trace, frame, opaque, spans).found() if spans else Tracking()


def _opened(trace: Trace, at: int, outer: int, opaque: frozenset[int]) -> bool:
    """Is the call ``at`` the call ``outer``, or one in it that the graph holds?"""
    while at >= 0 and at != outer and at not in opaque:
        at = trace.frames[at].parent
    return at == outer


class _Walk:
    def __init__(self, trace: Trace, frame: Frame, opaque: frozenset[int], spans: list[tuple[int, int]]) -> None:
        self.trace, self.frame, self.opaque, self.spans = trace, frame, opaque, spans
        self.outside: set[int] = set()  # values whose history is the caller's choice
        self.own: set[int] = set()  # the memory of these
        self.inside: set[int] = set()
        self.tracked: set[int] = set()  # the memory of these
        self.views: set[int] = set()  # values from outside that are views of what has a history, and say so: they need a gradient
        self.mixed: set[int] = set()  # values made inside, of some from outside: their history is not known until it is cut

    def found(self) -> Tracking:
        """Walk the events once."""
        for index in range(self.frame.start, self.frame.end):
            event = self.trace.events[index]
            on = any(start <= index < end for start, end in self.spans)
            if not (self._inside(event) if on or op_name(event.func) == "grad" else self._outside(event)):
                return Tracking("needed")
        if any(touch.write for touch in self.trace.touches):  # what lies in attributes goes on to another call
            return Tracking("needed")
        out = self.frame.out
        if any(isinstance(leaf, Ref) and leaf.value in self.mixed for leaf in out):
            return Tracking("needed")
        values = self.trace.values
        outside = {i: leaf.value for i, leaf in enumerate(out) if isinstance(leaf, Ref) and leaf.value in self.outside}
        if any(value in self.views for value in outside.values()):
            return Tracking("needed")
        given = {values[leaf.value].storage for leaf in self.frame.leaves if isinstance(leaf, Ref)}
        given.update(value.storage for value in values if value.origin == "attribute")
        viewed = tuple(i for i, value in outside.items() if values[value].storage in given)
        return Tracking("on", tuple(i for i in outside if i not in viewed), viewed)

    def _inside(self, event: Event) -> bool:
        name, made = op_name(event.func), refs_in(event.out)
        read = {*refs_in(event.args), *refs_in(event.kwargs)}
        unknown = (value for value in read if value in self.outside or value in self.mixed)
        if name != "detach" and any(map(self._inexact, unknown)):
            if event.mutated or name in ("grad", "requires_grad_"):
                return False
            self.mixed.update(made)
        self.inside.update(made)
        self.tracked.update(self.trace.values[value].storage for value in made)
        return True

    def _outside(self, event: Event) -> bool:
        if not _opened(self.trace, event.frame, self.frame.index, self.opaque) or event.kwargs.get("requires_grad"):
            return False
        values, name = self.trace.values, op_name(event.func)
        if event.mutated and not event.untracked:
            written = {values[value].storage for value in event.mutated}
            if not written <= self.own or written & self.tracked:
                return False
        made = refs_in(event.out)
        if name == "requires_grad_":  # a leaf is one for every caller
            with DisableTorchFunction():
                leaf = all(values[value].tensor.is_leaf for value in made)
            self.outside.difference_update(made)
            self.inside.update(made)
            self.tracked.update(values[value].storage for value in made)
            return leaf
        given = {*refs_in(event.args), *refs_in(event.kwargs)}
        fresh = [value for value in made if value not in self.inside and value not in given]
        self.outside.update(fresh)
        showing = {value for value in given if value in self.views or (value in self.inside and self._with_history(value))}
        shown = {values[value].storage for value in showing}
        self.views.update(value for value in fresh if name != "detach" and values[value].storage in shown)
        if showing and name in MAY_COPY:  # at other sizes, a view where this is a copy, or a copy where this is one
            self.views.update(made)
            self.outside.update(made)
        self.own.update(values[value].storage for value in fresh)
        return True

    def _with_history(self, value: int) -> bool:
        with DisableTorchFunction():
            return self.trace.values[value].tensor.requires_grad

    def _inexact(self, value: int) -> bool:
        dtype = self.trace.values[value].tensor.dtype
        return dtype.is_floating_point or dtype.is_complex
