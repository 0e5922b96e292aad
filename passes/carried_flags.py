"""Results that may need a gradient, by what they say, and have none to give: they were made from a view that was made under ``no_grad``.

Comes in: a recorded call. Goes out: nothing, or ``Refused`` with the place of such a view. torch gives a view that is made under
``no_grad`` the flag of its base, ``requires_grad``, and no history; what is computed from it afterwards says that it needs a gradient,
too. A graph holds the view detached, which says that it needs none. That shows as soon as nothing else that the result is made of needs
a gradient, and what does is the caller's to change: inputs come with and without, weights are frozen after fusing. So it is asked from
which tensors a result can have its flag in the original, and from which in a graph, and not what needed a gradient in the recording.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from torch import Tensor, nn

from fxfuse.graph import Place
from fxfuse.ops import op_name
from fxfuse.private.torch_function import DisableTorchFunction
from fxfuse.recording.trace import Event, Frame, Ref, Trace, refs_in

from .lifted import Refused

# What reads of its other tensors no more than shape, dtype or device: their flags are not the result's.
_FIRST_ALONE = frozenset("view_as reshape_as expand_as type_as to".split())


def refuse_flags_without_history(trace: Trace, frame: Frame) -> None:
    """Refuse where a view under ``no_grad`` alone can give its flag to a result of ``frame``."""
    if not trace.untracked_views:
        return
    flags = _Flags(trace)
    for event in trace.events[frame.start : frame.end]:
        flags.after(event)
    # A view that leaves as it is, is made from its base at every call, flag and all.
    for leaf in frame.out:
        if isinstance(leaf, Ref) and leaf.value not in trace.untracked_views and flags.differ(leaf.value):
            raise Refused("a result can need a gradient for a view under no_grad alone, and has none to give", flags.places.get(leaf.value))


class _Flags:
    """From which tensors each value can have its flag, event by event, as sets of bits: ``said`` in the original, ``held`` in a graph.

    A tensor that comes in, and a leaf that ``requires_grad_`` makes, is a bit of its own.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.said: dict[int, int] = {}
        self.held: dict[int, int] = {}
        self.places: dict[int, Place | None] = {}  # of the views under ``no_grad`` in whose memory, or from which, a value is made
        self.bits = 0
        self.in_memory: dict[int, list[int]] = defaultdict(list)  # the values that lie in the same memory
        for value, seen in enumerate(trace.values):
            self.in_memory[seen.storage].append(value)

    def differ(self, value: int) -> bool:
        """Can the flag be set in the original and not in a graph?"""
        return bool(self.said.get(value, 0) & ~self.held.get(value, 0))

    def after(self, event: Event) -> None:
        name = op_name(event.func)
        given, made = [*refs_in(event.args), *refs_in(event.kwargs)], refs_in(event.out)
        if name in _FIRST_ALONE:
            given = given[:1]
        said, held = self._all(given)
        place = next((self.places[value] for value in given if value in self.places), None)
        if event.func is Tensor.detach and self.trace.untracked_views.intersection(made):
            held, place = 0, event.place
        elif name == "detach" or name.endswith("_like") or name.startswith("new_"):
            said = held = 0
        elif name == "requires_grad_":
            said = held = self._new()
        elif not any(self._inexact(value) for value in given):
            said = held = 0
        elif event.untracked and event.mutated:
            return  # what is written under ``no_grad`` keeps its flag
        elif event.mutated:
            for value in {each for written in event.mutated for each in self.in_memory[self.trace.values[written].storage]}:
                if value in self.said:  # of older views of that memory it is not asked what their history is then
                    self._set(value, self.said[value] | said, self.held[value], place)
            made = [*made, *event.mutated]
        for value in made:
            self._set(value, said, held, place)

    def _set(self, value: int, said: int, held: int, place: Place | None) -> None:
        self.said[value], self.held[value] = (said, held) if self._inexact(value) else (0, 0)
        if place is not None:
            self.places[value] = place

    def _all(self, values: Iterable[int]) -> tuple[int, int]:
        said = held = 0
        for value in values:
            if value not in self.said:
                self.said[value] = self.held[value] = self._new() if self._can(value) else 0
            said, held = said | self.said[value], held | self.held[value]
        return said, held

    def _can(self, value: int) -> bool:
        """Can a tensor that comes in need a gradient? A buffer, or another tensor that the model holds, only if it does."""
        if not self._inexact(value):
            return False
        seen = self.trace.values[value]
        with DisableTorchFunction():
            return seen.origin in ("input", "made") or isinstance(seen.tensor, nn.Parameter) or seen.tensor.requires_grad

    def _new(self) -> int:
        self.bits += 1
        return 1 << self.bits

    def _inexact(self, value: int) -> bool:
        dtype = self.trace.values[value].tensor.dtype
        return dtype.is_floating_point or dtype.is_complex
