"""Programs for ranges of sizes, over one pack.

Comes in: a ``Choice`` whose ``sizes`` say what serves which range, and a region's prepared graph. Goes out: a program for each range, whose
guard says which sizes it is for, and the same in words. All of them are right at any size; the checks only send a call where it is faster.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from fxfuse.graph import Program, SizeCheck, SizePlan, TensorGuard
from fxfuse.passes.vectorize import Prepared, Vectorized, vectorize
from fxfuse.planning.choice import Choice, SizeChoice
from fxfuse.planning.choice import in_words as lowerings_in_words
from fxfuse.planning.plan_by_size import the_loop


@dataclass(frozen=True)
class Serves:
    """The sizes ``above < size <= last`` of one dim of an input. ``first``: the program for calls in which that size is fixed."""

    leaf: int
    dim: int
    above: int
    last: int | None
    first: bool

    def only(self, program: Program) -> tuple[Program, bool]:
        """The program for these sizes alone, and whether it is needed: where the size is fixed, one is enough."""
        leaves = program.guard.leaves
        guard = leaves[self.leaf] if self.leaf < len(leaves) else None
        free = isinstance(guard, TensorGuard) and self.dim < len(guard.shape) and guard.shape[self.dim] is None
        if not free:
            return program, self.first
        lower = [SizeCheck(self.leaf, self.dim, ">", self.above, chosen=True)] if self.above else []
        upper = [SizeCheck(self.leaf, self.dim, "<=", self.last, chosen=True)] if self.last is not None else []
        return replace(program, guard=replace(program.guard, sizes=(*program.guard.sizes, *lower, *upper))), True


def ranges(choice: Choice) -> list[tuple[SizeChoice, int | None]]:
    """The choices, each with the largest size that it serves (None: there is none)."""
    bounds = [each.above for each in choice.sizes[1:]]
    return list(zip(choice.sizes, [*bounds, None], strict=True)) if choice.sizes else []


def programs(choice: Choice, prepared: Prepared, made: Vectorized, prefer: str) -> Iterator[tuple[Serves, Vectorized]]:
    """A rewritten graph for each range, the one first that has most of the common plan. ``made``: what that gives for ``prepared``."""

    def is_common(each: SizeChoice) -> bool:
        return not each.loop and (each.lowering, each.chunks) == (choice.lowering, choice.chunks)

    order = sorted(ranges(choice), key=lambda found: (found[0].loop, not is_common(found[0])))
    packs = made.packs
    for number, (each, last) in enumerate(order):
        if is_common(each):
            own: Vectorized | None = made
        elif each.loop:
            own = the_loop(prepared, packs, prefer)
        else:
            own = vectorize(prepared.cut(each.chunks), packs, each.lowering, prefer, alone=True)
        own = made if own is None else own
        packs = packs if own is made else own.packs
        yield Serves(*choice.told_by, each.above, last, number == 0), own


def in_words(choice: Choice) -> list[SizePlan]:
    """For the report."""
    return [
        SizePlan(each.above + 1, last, "the loop" if each.loop else lowerings_in_words(each.lowering, each.chunks), each.measured)
        for each, last in ranges(choice)
    ]
