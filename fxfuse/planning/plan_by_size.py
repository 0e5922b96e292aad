"""Plans for ranges of sizes: where ``tune_for`` lists several and no one plan is about the fastest at all of them.

Comes in: what the planner found to be fastest over all sizes together. Goes out: the same ``Choice``, or one whose ``sizes`` say what
serves which range: lanes in chunks for the large batches, other products for the small ones, or the loop, on views of the packed weights.
All of them read one pack, stored as the common plan wants it: what is timed here reads it so too.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from fxfuse.ops import Op
from fxfuse.passes.packs import Packs
from fxfuse.passes.program import resolve_packed
from fxfuse.passes.vectorize import Prepared, Vectorized, vectorize
from fxfuse.private.pytree import tree_flatten
from fxfuse.recording.trace import Ref

from .choice import Choice, SizeChoice
from .plan import LEAST_GAIN, Planner
from .timing import medians

# A plan of its own has to be so much faster than the common one.
MUCH = 1.1
# The loop on views of the pack may take so much longer than the loop that was written: below that it is noise.
NO_SLOWER = 1.05


def the_loop(prepared: Prepared, packs: Packs, prefer: str = "") -> Vectorized | None:
    """The lanes one by one, on views of the weights that ``packs`` hold."""
    made = vectorize(prepared.cut(1).without(frozenset(prepared.lane_sets())), packs, {}, prefer, alone=True)
    if made is not None:
        resolve_packed(made.graph, made.packs)
    return made


def _has_sparse_gradients(graph: torch.fx.Graph) -> bool:
    """Whether a look-up gives its table a sparse gradient, which a view of a pack, as the loop would read it, cannot take."""
    for node in graph.nodes:
        if isinstance(node.target, Op) and "sparse" in node.target.names and node.args[node.target.names.index("sparse")] is True:
            return True
    return False


@dataclass
class _Point:
    """One size, and which cases have it."""

    size: int
    cases: list[int]
    written: float = 0.0  # seconds of the loop
    packed: float = 0.0  # of the best packed form
    seconds: float = 0.0  # of what is chosen
    lowering: dict[Any, str] | None = None  # None: the loop
    chunks: int = 1

    @property
    def plan(self) -> Any:
        return self.lowering, self.chunks


class PlannerBySize(Planner):
    """A planner that may keep several plans."""

    def _fastest(self, forms: list[Prepared]) -> Choice:
        told = None if self.prepared.single or self.options.max_memory is not None else self._points()
        if told is None:
            return super()._fastest(forms)
        told_by, points = told
        every, middle = self.benches, points[(len(points) - 1) // 2]
        self.benches = [every[case] for case in middle.cases]
        self.larger = self.times_larger()
        common = super()._fastest(forms)
        self.benches, common.refusal = every, None
        if common.vectorized is None:
            return replace(common, refusal=self.refusal("nothing is left to fuse"))
        loop = the_loop(self.prepared, common.vectorized.packs, self.prefer)
        for point in points:
            self._settle(point, common, loop, search=point is not middle)
            if point.seconds > NO_SLOWER * point.written:
                return self._left(common, point)
        if all(point.lowering is None for point in points):
            return self._left(common, points[0])
        common.seconds = (points[0].written, points[0].seconds)
        if any(point.plan != (common.lowering, common.chunks) for point in points):
            common.sizes, common.told_by = tuple(_ranges(points)), told_by
        return common

    def _left(self, choice: Choice, point: _Point) -> Choice:
        at = f"at size {point.size} on {self.benches[0].device} ({self._timed_what()})"
        choice.refusal = self.refusal(f"left as a loop: packed runs {point.written / point.packed:.2f}x {at}")
        choice.seconds = (point.written, point.packed)
        return choice

    def _points(self) -> tuple[tuple[int, int], list[_Point]] | None:
        """The free size of an input by which the cases can be told apart, as (leaf, dim), and the sizes in order."""
        lifted = self.prepared.lifted
        if len(self.benches) < 2 or lifted.specialised or _has_sparse_gradients(lifted.graph):
            return None
        rows = [tree_flatten(bench.case)[0] for bench in self.benches]
        for index, leaf in enumerate(lifted.frame.leaves):
            for dim in sorted(lifted.dynamic.get(leaf.value, ())) if isinstance(leaf, Ref) else ():
                points: dict[int, _Point] = {}
                for case, leaves in enumerate(rows):
                    tensor = leaves[index]
                    assert isinstance(tensor, torch.Tensor)
                    points.setdefault(int(tensor.shape[dim]), _Point(int(tensor.shape[dim]), [])).cases.append(case)
                if len(points) > 1:
                    return (index, dim), [points[size] for size in sorted(points)]
        return None

    def _settle(self, point: _Point, common: Choice, loop: Vectorized | None, search: bool) -> None:
        """Find what serves this size best."""
        assert common.vectorized is not None
        here = copy.copy(self)
        here.benches, here.packs = [self.benches[case] for case in point.cases], common.vectorized.packs
        here.larger, here.far = here.times_larger(), set(self.far)
        options = [[bench.loop() for bench in here.benches], here.steps(common)]
        own = here._start_of(common) if search else common
        if search:
            options.append(here._descended(own))
            common.tried.extend((f"at size {point.size}: {name}", seconds) for name, seconds in own.tried)
        if loop is not None:
            options.append([bench.step(loop) for bench in here.benches])
        rounds = [medians(list(each), budget=0.6) for each in zip(*options, strict=True)]
        means = [math.exp(sum(map(math.log, each)) / len(each)) for each in zip(*rounds, strict=True)]
        point.written, by_common = means[:2]
        by_own = means[2] if search else by_common
        by_loop = means[-1] if loop is not None else math.inf
        point.packed = min(by_common, by_own)
        point.lowering, point.chunks, point.seconds = common.lowering, common.chunks, by_common
        if by_own * MUCH < by_common or (by_own < by_common and by_common * LEAST_GAIN > point.written):
            point.lowering, point.chunks, point.seconds = own.lowering, own.chunks, by_own
        if point.seconds * LEAST_GAIN > point.written and by_loop < point.seconds:
            point.lowering, point.chunks, point.seconds = None, 1, by_loop

    def _start_of(self, common: Choice) -> Choice:
        """The common plan over its own packs, in chunks that fit the cache at the sizes that are timed."""
        chunks = self.fitting()
        made = self.emit(common.lowering, chunks) or self.emit(common.lowering)
        assert made is not None
        return replace(common, vectorized=made, chunks=chunks, tried=[])


def _ranges(points: list[_Point]) -> list[SizeChoice]:
    """Neighbours with one plan are one range; between two of them the bound is the geometric mean of their sizes."""
    found: list[SizeChoice] = []
    for before, point in zip([None, *points], points, strict=False):
        measured = (point.size, point.written, point.seconds)
        if before is not None and before.plan == point.plan:
            last = found.pop()
            found.append(replace(last, measured=(*last.measured, measured), cases=(*last.cases, *point.cases)))
            continue
        above = 0 if before is None else math.isqrt(before.size * point.size)
        found.append(SizeChoice(above, point.lowering or {}, point.chunks, point.lowering is None, (measured,), tuple(point.cases)))
    return found
