"""Results that may need a gradient, by what they say, and have none to give: they were made from a view that was made under ``no_grad``.

Comes in: a recorded call. Goes out: nothing, or ``Refused`` with the place of such a view. torch gives a view that is made under
``no_grad`` the flag of its base, ``requires_grad``, and no history; what is computed from it afterwards says that it needs a gradient,
too. A graph holds the view detached, which says that it needs none. That shows as soon as nothing else that the result is made of needs
a gradient, and what does is the caller's to change: inputs come with and without, weights are frozen after fusing. So it is asked what
can ever need one, not what did in the recording.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from torch import Tensor, nn

from fxfuse.graph import Place
from fxfuse.ops import op_name
from fxfuse.recording.trace import Event, Frame, Ref, Trace, refs_in

from .lifted import Refused


def refuse_flags_without_history(trace: Trace, frame: Frame) -> None:
    """Refuse where a view under ``no_grad`` gives its flag to a result of ``frame``."""
    if not trace.untracked_views:
        return
    flags = _Flags(trace)
    for event in trace.events[frame.start : frame.end]:
        flags.after(event)
    # A view that leaves as it is, is made from its base at every call, flag and all.
    for leaf in frame.out:
        if isinstance(leaf, Ref) and leaf.value in flags.carried and leaf.value not in trace.untracked_views:
            raise Refused("a result can need a gradient for a view under no_grad alone, and has none to give", flags.carried[leaf.value])


class _Flags:
    """What is known of the values' flags, event by event.

    ``never``: values that need no gradient, whatever the caller does. ``carried``: those that have, or may have, their flag from a view
    under ``no_grad``, with its place. A value in neither says what it says in a graph, too.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.in_memory: dict[int, list[int]] = defaultdict(list)  # the values that lie in the same memory
        for value, seen in enumerate(trace.values):
            self.in_memory[seen.storage].append(value)
        self.never: set[int] = set()
        self.carried: dict[int, Place | None] = {}

    def after(self, event: Event) -> None:
        given, made = [*refs_in(event.args), *refs_in(event.kwargs)], refs_in(event.out)
        if event.func is Tensor.detach and self.trace.untracked_views.intersection(made):
            if self._none_can(given):
                self.never.update(made)
            else:
                self.carried.update((value, event.place) for value in made)
        elif op_name(event.func) == "requires_grad_":
            self.never.difference_update(self._sharing(given))
        elif op_name(event.func) == "detach":
            self.never.update(made)
        elif self._none_can(given):
            self.never.update(value for value in made if not self.trace.values[value].tensor.requires_grad)  # a factory may ask for it
        elif not event.untracked:
            written = self._sharing(event.mutated)
            self.never.difference_update(written)
            source = next((value for value in given if value in self.carried), None)
            if source is not None:
                self.carried.update((value, self.carried[source]) for value in {*made, *written} if self._inexact(value))

    def _none_can(self, values: Iterable[int]) -> bool:
        return all(value in self.never or not self._inexact(value) or self._held(value) for value in values)

    def _held(self, value: int) -> bool:
        """Is it a buffer, or another tensor that the model holds, which needs no gradient?"""
        seen = self.trace.values[value]
        return seen.origin in ("attribute", "constant") and not isinstance(seen.tensor, nn.Parameter) and not seen.tensor.requires_grad

    def _sharing(self, values: Iterable[int]) -> set[int]:
        """All values that lie in the memory of one of these."""
        return {each for value in values for each in self.in_memory[self.trace.values[value].storage]}

    def _inexact(self, value: int) -> bool:
        dtype = self.trace.values[value].tensor.dtype
        return dtype.is_floating_point or dtype.is_complex
