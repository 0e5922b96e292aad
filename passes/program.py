"""Finish the programs of a region: what they assume, and which weights they share.

Comes in: a ``Lifted`` frame and its rewritten graph. Goes out: a ``Program`` with its guard. ``resolve_packed`` makes every program of the
region read a weight that any of them has packed from the pack.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx

from fxfuse.functional import slice_along
from fxfuse.graph import Guard, Program, Recipe, SizeCheck, TensorGuard
from fxfuse.private.pytree import tree_flatten
from fxfuse.recording.sizes import SizeOf, SizeOp
from fxfuse.recording.trace import Frame, Ref, Trace
from fxfuse.running.guards import order_of
from fxfuse.weights.recipes import packed_shape

from .free_sizes import recorded_number
from .lifted import Lifted
from .packs import Packs


def make_program(trace: Trace, lifted: Lifted, graph: torch.fx.Graph) -> Program:
    """The program of one frame in one mode."""
    frame = lifted.frame
    free = {} if lifted.specialised else lifted.dynamic
    leaves: list[object] = []
    same: list[int] = []
    seen: dict[int, int] = {}
    one_size: list[list[tuple[int, int]]] = [[] for _ in lifted.sizes]
    for index, leaf in enumerate(frame.leaves):
        if not isinstance(leaf, Ref):
            fixed = isinstance(leaf, SizeOf | SizeOp)  # a size that the caller passes on as a number
            leaves.append(("constant", recorded_number(trace, leaf) if fixed else leaf))
            same.append(index)
            continue
        value = trace.values[leaf.value]
        dynamic = free.get(leaf.value, frozenset())
        shape = tuple(None if dim in dynamic else size for dim, size in enumerate(value.shape))
        layout = lifted.layouts.get(index, "")
        order = order_of(value.tensor) if layout in ("in rows", "in order") else ()
        leaves.append(TensorGuard(shape, value.tensor.dtype, value.tensor.device, layout=layout, order=order))
        same.append(seen.setdefault(leaf.value, index))
        if same[-1] == index:
            for dims, places in zip(lifted.sizes, one_size, strict=True):
                places.extend((index, dim) for dim in sorted(dims.get(leaf.value, frozenset()) & dynamic))
    # Sizes that were varied together are one size until a run shows otherwise.
    equal = tuple((places[0], other) for places in one_size for other in places[1:])
    generic = not (lifted.factories or trace.reads_dtype or trace.casts or _spells_dtype(graph)) and _one_dtype(leaves, graph)
    rows = _some_rows(leaves) if any(node.meta.get("some_rows") for node in graph.nodes) else []
    checks, anywhere = _strongest([*lifted.size_checks, *rows]), not (lifted.factories or trace.moves or trace.casts)
    in_rows = bool(trace.strides) and any(_inside(trace, index, frame.index) for index in trace.strides)
    tracking = lifted.tracking
    dtype, needed = torch.get_default_dtype(), tracking.kind == "needed"
    guard = Guard(tuple(leaves), tuple(same), checks, equal, dtype, generic, anywhere, trace.autocast, in_rows, needed)
    stores, on = tuple(lifted.stores), tracking.kind == "on"
    return Program(graph, guard, frame.in_spec, frame.out_spec, stores, on, tracking.outside, tracking.viewed)


def _inside(trace: Trace, at: int, outer: int) -> bool:
    while at >= 0 and at != outer:
        at = trace.frames[at].parent
    return at == outer


def _some_rows(leaves: list[object]) -> list[SizeCheck]:
    """No free size is 0."""
    tensors = [(index, leaf.shape) for index, leaf in enumerate(leaves) if isinstance(leaf, TensorGuard)]
    return [SizeCheck(index, dim, ">=", 1) for index, shape in tensors for dim, size in enumerate(shape) if size is None]


def _strongest(checks: list[SizeCheck]) -> tuple[SizeCheck, ...]:
    """Each check once; of those that a size be at least so large, the largest alone."""
    bounds: dict[tuple[int, int], int] = {}
    for check in checks:
        if check.op == ">=":
            bounds[check.input, check.dim] = max(check.bound, bounds.get((check.input, check.dim), check.bound))
    return tuple(c for c in dict.fromkeys(checks) if c.op != ">=" or c.bound == bounds[c.input, c.dim])


def fits(case: tuple[Any, Any], frame: Frame, lifted: Lifted) -> bool:
    """True where a call has the fixed sizes that ``frame`` was recorded with."""
    leaves, spec = tree_flatten(case)
    if spec != frame.in_spec:
        return False
    free = {} if lifted.specialised else lifted.dynamic
    for given, recorded in zip(leaves, frame.leaves, strict=True):
        if isinstance(recorded, Ref):
            dynamic = free.get(recorded.value, frozenset())
            shape = lifted.shapes[recorded.value]
            if len(given.shape) != len(shape) or any(d not in dynamic and given.shape[d] != size for d, size in enumerate(shape)):
                return False
    return True


def _one_dtype(leaves: list[object], graph: torch.fx.Graph) -> bool:
    """Do the floating inputs and weights share one dtype? Angles in float32 beside words in bfloat16 are as they were recorded."""
    given = [leaf.dtype for leaf in leaves if isinstance(leaf, TensorGuard)]
    held = [node.meta["val"].dtype for node in graph.nodes if node.op == "get_attr" and "val" in node.meta]
    return len({dtype for dtype in (*given, *held) if dtype.is_floating_point}) <= 1


def _spells_dtype(graph: torch.fx.Graph) -> bool:
    found: list[object] = []

    def look(item: Any) -> Any:
        if isinstance(item, torch.dtype):
            found.append(item)
        return item

    for node in graph.nodes:
        torch.fx.node.map_aggregate((node.args, node.kwargs), look)
    return bool(found)


def resolve_packed(graph: torch.fx.Graph, packs: Packs) -> None:
    """Replace reads of packed members by their slice of the pack, in place."""
    reads: dict[str, list[tuple[torch.fx.Node, Recipe, int]]] = {}
    for node in graph.nodes:
        if node.op == "get_attr" and str(node.target) in packs.where:
            recipe, lane = packs.where[str(node.target)]
            reads.setdefault(recipe.name, []).append((node, recipe, lane))
    for name, found in reads.items():
        with graph.inserting_before(found[0][0]):
            # create_node: get_attr() looks for it in a module that a trial run has left behind
            packed = graph.create_node("get_attr", name)
            held = found[0][0].meta.get("val")
            if held is not None:
                packed.meta["val"] = torch.empty(packed_shape(found[0][1]), dtype=held.dtype, device="meta")
            parts = _all_members(graph, packed, found[0][1]) if len(found) > 1 else None
        for node, recipe, lane in found:
            with graph.inserting_before(node):
                if parts is None:
                    member = member_of(graph, packed, recipe, lane)
                else:
                    member = _finished(graph, graph.call_function(operator.getitem, (parts, lane)), recipe, lane)
            node.replace_all_uses_with(member)
            graph.erase_node(node)


def _all_members(graph: torch.fx.Graph, packed: torch.fx.Node, recipe: Recipe) -> torch.fx.Node | None:
    """All members by one ``unbind``, whose backward is one ``stack``: that of each ``select`` fills a tensor of the size of the pack."""
    if recipe.style == "rows":
        return None
    order = tuple(recipe.order.index(d) for d in range(len(recipe.order)))
    whole = graph.call_function(torch.unflatten, (packed, 0, (len(recipe.members), -1))) if recipe.style == "cat" else packed
    if order != tuple(range(len(order))):
        whole = graph.call_function(torch.permute, (whole, (0, *(1 + d for d in order))))
    return graph.call_function(torch.unbind, (whole, 0))


def member_of(graph: torch.fx.Graph, made: torch.fx.Node, recipe: Recipe, lane: int) -> torch.fx.Node:
    """Member ``lane`` of the packed tensor ``made``, as a view in the original's shape."""
    if recipe.style == "rows":
        start, stop = recipe.row_starts()[lane : lane + 2]
        return _narrowed(graph, graph.call_function(slice_along, (made, 0, start, stop, 1)), recipe, lane, 1)
    if recipe.style == "cat":
        made = graph.call_function(torch.unflatten, (made, 0, (len(recipe.members), -1)))
    made = graph.call_function(torch.select, (made, 0, lane))
    inverse = tuple(recipe.order.index(d) for d in range(len(recipe.order)))
    if inverse != tuple(range(len(inverse))):
        made = graph.call_function(torch.permute, (made, inverse))
    return _finished(graph, made, recipe, lane)


def _finished(graph: torch.fx.Graph, made: torch.fx.Node, recipe: Recipe, lane: int) -> torch.fx.Node:
    """A member of a pack in the original's own shape."""
    if recipe.style == "padded":
        return _narrowed(graph, made, recipe, lane, 0)
    return made if recipe.own_shapes is None else graph.call_function(torch.reshape, (made, recipe.own_shapes[lane]))


def _narrowed(graph: torch.fx.Graph, made: torch.fx.Node, recipe: Recipe, lane: int, first: int) -> torch.fx.Node:
    """A member without the zeros that fill it up, from its dim ``first`` on."""
    for dim, size in list(enumerate(recipe.member_shape(lane)))[first:]:
        made = made if size == recipe.shape[dim] else graph.call_function(slice_along, (made, dim, 0, size, 1))
    return made
