"""From a lifted graph to its rewritten form: normalize, find lanes, bundle, emit.

Comes in: a ``Lifted`` graph and the packs of its region. Goes out: ``Vectorized``: the rewritten graph, what fused, what not and why.
A bundle whose rule refuses is taken apart again, alone, and the rest is tried anew. Lane sets that would not save a launch are left.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch.fx

from fxfuse.graph import FusedOp, Place, Refusal

from .buffers import join_writes
from .bundle import Bundle, Bundles, Node, find_bundles, widths_apart
from .chunk import in_chunks
from .emit import Emitter
from .factor import factor_shared_maps
from .forwarding import forward_writes
from .joins import normalize_joins
from .lifted import Lifted
from .packs import Packs
from .picks import unify_picks
from .pointwise_conv import unify_pointwise
from .rules import has_rule, is_heavy, is_view, rule_of
from .unequal import Group, uncast
from .writer import CannotVectorize

LaneSet = frozenset[tuple[Any, ...]]  # (op, place, path, lanes) of each of its bundles


@dataclass
class Prepared:
    """A lifted graph after normalization, and its bundles."""

    lifted: Lifted
    bundles: Bundles
    factored: list[tuple[str, int, Any]]
    refusals: list[Refusal] = field(default_factory=list)
    disabled: set[Node] = field(default_factory=set)
    min_lanes: int = 2
    single: bool = False  # one Linear or pointwise convolution, to be spelled as the other where that is faster
    merge: bool = True  # equal heavy ops on inputs of different origin become one bundle
    chunks: int = 1
    whole: Bundles | None = None  # ``bundles`` before they were cut into chunks
    skipped: frozenset[LaneSet] = frozenset()  # lane sets that are to stay as they are
    groups: list[Group] = field(default_factory=list)  # lanes of unequal widths that can be one bundle
    together: bool = False  # they are; otherwise lanes are bundled by width
    all_lanes: bool = False  # also those that save nothing
    idle: list[Refusal] = field(default_factory=list)  # lanes that were found, and save nothing

    def find(self) -> None:
        """Find the bundles anew, without what was disabled and without lane sets that save nothing."""
        self.bundles = find_bundles(
            self.lifted.graph,
            lambda b: has_rule(b) and not any(m in self.disabled for m in b.members),
            is_view,
            self.min_lanes,
            is_heavy if self.merge else None,
            [group for group in self.groups if not any(m in self.disabled for m in group.members)] if self.together else (),
        )
        self.idle = []
        for component in () if self.all_lanes else self.bundles.components():
            saved, cost = launches_saved(self.bundles, component)
            if saved <= cost:
                self._note_idle(component, saved, cost)
                self._leave(component)
        if self.skipped:
            components = [(component, self._lane_set(component)) for component in self.bundles.components(through_forks=False)]
            here = {lanes for _, lanes in components}
            for component, lanes in components:
                if lanes in self.skipped or any(_mostly(lanes, other) for other in self.skipped - here):
                    self._leave(component)
        self.whole = self.bundles
        self.bundles = in_chunks(self.whole, self.chunks)

    def _note_idle(self, component: set[int], saved: int, cost: int) -> None:
        heavy = [self.bundles.classes[i] for i in sorted(component) if is_heavy(self.bundles.classes[i])]
        if heavy:
            first = min(heavy, key=lambda bundle: bundle.number)
            names = " and ".join(dict.fromkeys(bundle.name for bundle in heavy))
            said = f"{names} in {len(first.members)} lanes stays a loop: as one it saves {saved} launch{'' if saved == 1 else 'es'}"
            self.idle.append(Refusal(f"{said} and takes {cost} to join what goes in", first.members[0].meta.get("place")))

    def _leave(self, component: set[int]) -> None:
        self.bundles.active -= component
        for index in component:
            for member in self.bundles.classes[index].members:
                self.bundles.position.pop(member, None)

    def with_widths(self, together: bool) -> Prepared:
        """The same graph, with lanes of unequal widths in one bundle, or bundled by width."""
        if together == self.together or not self.groups:
            return self
        other = replace(self, together=together, disabled=set(), refusals=[])
        other.find()
        return other

    def whatever_it_saves(self) -> Prepared:
        """The same graph, also with lanes that save nothing in this mode: in another they do, and their weights are packed."""
        other = replace(self, all_lanes=True, disabled=set(self.disabled), refusals=[])
        other.find()
        return other

    def cut(self, chunks: int) -> Prepared:
        """The same lanes in so many chunks."""
        assert self.whole is not None
        return replace(self, chunks=chunks, bundles=in_chunks(self.whole, chunks))

    def _lane_set(self, component: set[int]) -> LaneSet:
        bundles = [self.bundles.classes[index] for index in component]
        return frozenset((b.name, str(b.members[0].meta.get("place")), b.members[0].meta.get("path"), len(b.members)) for b in bundles)

    def lane_sets(self) -> dict[LaneSet, Place | None]:
        """What can be undone alone, by where it is in the source, which is the same in every mode of the model."""
        assert self.whole is not None
        whole = replace(self, bundles=self.whole)
        found: dict[LaneSet, Place | None] = {}
        for component in self.whole.components(through_forks=False):
            first = min(component, key=lambda index: self.whole.classes[index].number)  # type: ignore[union-attr]
            found[whole._lane_set(component)] = self.whole.classes[first].members[0].meta.get("place")
        return found

    def without(self, skipped: frozenset[LaneSet]) -> Prepared:
        """The same graph, with these lane sets left as they are."""
        other = replace(self, skipped=self.skipped | skipped, disabled=set(self.disabled), refusals=[])
        other.find()
        return other

    def launches(self) -> int:
        """About how many ops the rewritten graph launches."""
        return sum(
            1 + joining(bundle, self.bundles) if bundle.index in self.bundles.active else len(bundle.members)
            for bundle in self.bundles.classes
            if bundle.op is not None and not is_view(bundle)
        )

    @property
    def worthwhile(self) -> bool:
        return bool(self.bundles.active or self.factored or self.single)


@dataclass
class Vectorized:
    """One program of a region, rewritten."""

    graph: torch.fx.Graph
    packs: Packs
    ops: list[FusedOp]
    choices: dict[Any, tuple[str, ...]]
    notes: list[str] = field(default_factory=list)
    tracked: bool = False  # forward switches gradient tracking on, whoever calls


def _mostly(lanes: LaneSet, other: LaneSet) -> bool:
    """Is it the same lane set in another mode of the model, in which some of its ops (dropout) are not there, or are others?"""
    return 2 * len(lanes & other) > min(len(lanes), len(other))


def prepare(lifted: Lifted, min_lanes: int, merge: bool = False) -> Prepared:
    """Normalize ``lifted`` in place and find its lanes. ``merge``: also those that only join for the sake of fewer launches."""
    forward_writes(lifted.graph)
    join_writes(lifted.graph)
    normalize_joins(lifted.graph)
    unify_picks(lifted.graph)
    factored = factor_shared_maps(lifted.graph)
    unify_pointwise(lifted.graph)
    prepared = Prepared(lifted, Bundles([], {}, set(), {}), factored, min_lanes=min_lanes, merge=merge)
    prepared.find()
    prepared.groups = widths_apart(lifted.graph, min_lanes)
    together = prepared.with_widths(True)
    return together if together.launches() < prepared.launches() else prepared


def vectorize(prepared: Prepared, packs: Packs, lowering: dict[Any, str], prefer: str, alone: bool = False) -> Vectorized | None:
    """Emit the rewritten graph; ``packs`` is extended only where that succeeds. None where nothing is left to fuse, unless ``alone``."""
    while prepared.worthwhile or alone:
        attempt = copy.copy(packs)
        attempt.recipes, attempt.where, attempt.constants = dict(packs.recipes), dict(packs.where), dict(packs.constants)
        _take_constants(prepared.lifted, attempt)
        emitter = Emitter(prepared.lifted, prepared.bundles, attempt, _rule, lowering, prefer, prepared.single)
        try:
            graph = emitter.run()
        except CannotVectorize as refusal:
            bundle = refusal.bundle
            assert bundle is not None
            place: Place | None = bundle.members[0].meta.get("place")
            if not bundle.unequal:  # else they are bundled by width
                prepared.refusals.append(Refusal(str(refusal), place, prepared.lifted.frame.path))
            prepared.disabled.update(bundle.members)
            prepared.find()
            continue
        factored = [FusedOp(op, count, "one map of the summed input", place) for op, count, place in prepared.factored]
        tracked = prepared.lifted.tracking.kind != ""
        return Vectorized(graph, attempt, factored + emitter.ops, emitter.choices, list(dict.fromkeys(emitter.notes)), tracked)
    return None


def _take_constants(lifted: Lifted, packs: Packs) -> None:
    """Tensors that the graph reads and no module holds, under names that no other program of the region has for another tensor."""
    for name, tensor in list(lifted.constants.items()):
        free = name
        while packs.constants.get(free, tensor) is not tensor:
            free += "_"
        if free != name:
            lifted.constants[free] = lifted.constants.pop(name)
            for node in lifted.graph.nodes:
                if node.op == "get_attr" and node.target == name:
                    node.target = free
        packs.constants[free] = tensor


def _rule(bundle: Bundle) -> Any:
    found = rule_of(bundle)
    if found is None:
        raise CannotVectorize(f"no rule for {bundle.name}")
    return found


def launches_saved(bundles: Bundles, component: set[int]) -> tuple[int, int]:
    """Launches that computing a lane set as one saves, and those that joining its operands costs."""
    saved = cost = 0
    for index in component:
        bundle = bundles.classes[index]
        lanes = len(bundle.members)
        if not is_view(bundle):
            saved += lanes - 1
        if bundle.name in ("select", "slice_along", "size"):
            continue
        cost += joining(bundle, bundles)
        for column in _columns(bundle) if not bundle.unequal else ():
            if all(n is column[0] for n in column) or all(n.op == "get_attr" for n in column):
                continue
            inner = bundles.bundle(column[0])
            if (inner is not None and all(bundles.of[n] == inner.index for n in column)) or bundles.stretch(column) is not None:
                continue
            cost += 1
    return saved, cost


def joining(bundle: Bundle, bundles: Bundles) -> int:
    """Launches that lanes of unequal widths cost besides the op itself: what brings their inputs to one width, and their results apart."""
    if not bundle.unequal or not is_heavy(bundle):
        return 0
    if bundle.name == "embedding":  # leaves out what filled the rows up
        return 1
    inputs = [uncast(member.args[0]) for member in bundle.members]
    if all(x is inputs[0] for x in inputs):
        return 0
    shapes = {x.meta["shape"] for x in inputs}
    source = bundles.end_to_end(inputs[0])
    apart = source is not None and all(bundles.of[x] == source.index for x in inputs)
    fill = 2 + (0 if apart else 1) if len(shapes) > 1 else (0 if apart else 1)
    return fill + (0 if bundle.apart is None else 2)


def _columns(bundle: Bundle) -> list[list[Node]]:
    rows: list[list[Node]] = []
    for member in bundle.members:
        row: list[Node] = []
        torch.fx.node.map_arg(member.args, lambda n, row=row: row.append(n))  # type: ignore[misc]
        rows.append(row)
    return [list(column) for column in zip(*rows, strict=True)]
