"""A buffer that is filled place by place is one join of what is written to it.

Comes in: a functional graph after ``forwarding``. Goes out: the same graph, in place, in which a chain of writes along one dim is one
``stack`` or ``cat`` of the written values, with slices of the buffer as it was where nothing was written; values that are
interleaved (``out[:, i::4] = ...``) are stacked beside each other and flattened; those in any other order are joined and then picked.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx

from fxfuse.functional import drop_unused, op_of, pick_along
from fxfuse.ops import canonical

from .forwarding import Place, fitted, keeps_history, place_of, taken
from .joins import CAT, STACK, UNSQUEEZE, Node, argument, is_op

FLATTEN = canonical(torch.flatten, (torch.empty(0), 0, 1), {})[0]
PICK = op_of(pick_along)


def join_writes(graph: torch.fx.Graph) -> None:
    """Rewrite in place; each chain is walked once, from its end."""
    for node in reversed(list(graph.nodes)):
        if is_op(node, "index_write") and node.users:
            _collect(graph, node)
    drop_unused(graph)


def _collect(graph: torch.fx.Graph, node: Node) -> None:
    """``node`` is the last of a chain of writes along one dim: make it one join of the written values."""
    if any(is_op(user, "index_write") and argument(user, "base") is node and len(node.users) == 1 for user in node.users):
        return  # not the last
    pieces: list[tuple[Place, Node]] = []
    covered: set[int] = set()
    at: Any = node
    while is_op(at, "index_write"):
        place, value = place_of(argument(at, "index"), node.meta["shape"], node.meta["dyn"]), argument(at, "value")
        if place is None or not isinstance(value, Node) or value.meta.get("shape") is None:
            break
        if pieces and place.dim != pieces[0][0].dim:
            break
        hidden = covered.intersection(place.positions)
        if hidden and len(hidden) < len(place.positions):
            break
        if hidden and len(value.users) == 1:
            break  # computed for nothing: it stays, so that its weights get gradients of zeros, as before
        if not hidden:  # a later write to the same place has already won
            covered.update(place.positions)
            pieces.append((place, value))
        base = argument(at, "base")
        only = len(base.users) == 1
        at = base
        if not only:
            break
    # A single write is a join of its own only where it covers the whole buffer.
    if not pieces or (len(pieces) == 1 and len(covered) < node.meta["shape"][pieces[0][0].dim]):
        return
    if len(covered) == node.meta["shape"][pieces[0][0].dim] and keeps_history(at, [value for _, value in pieces]):
        return
    joined = _Assembly(graph, node, at).join(sorted(pieces, key=lambda piece: piece[0].positions.start))
    joined.meta.update({**node.meta, "stride": None if joined.target == FLATTEN else node.meta.get("stride")})
    node.replace_all_uses_with(joined)
    while is_op(node, "index_write") and not node.users:  # what was written is read by the join alone: an inner chain of writes ends here
        base = argument(node, "base")
        graph.erase_node(node)
        node = base


class _Assembly:
    """Joins pieces into what ``node`` holds; ``buffer`` is what was there before."""

    def __init__(self, graph: torch.fx.Graph, node: Node, buffer: Node) -> None:
        self.graph, self.node, self.buffer = graph, node, buffer

    def join(self, pieces: list[tuple[Place, Node]]) -> Node:
        """``pieces`` by where they start."""
        dim = pieces[0][0].dim
        size = self.node.meta["shape"][dim]
        values = [fitted(self.graph, self.node, value, taken(self.graph, self.node, self.buffer, place)) for place, value in pieces]
        places = [place.positions for place, _ in pieces]
        full = sum(len(positions) for positions in places) == size
        if full and all(place.single for place, _ in pieces):
            return self._call(STACK, (values, dim))
        values = [self._with_dim(value, dim) if place.single else value for value, (place, _) in zip(values, pieces, strict=True)]
        count = len(pieces)
        if count > 1 and full and all(positions == range(lane, size, count) for lane, positions in enumerate(places)):
            stacked = self._call(STACK, (values, dim + 1))
            shape, dyn = values[0].meta["shape"], values[0].meta["dyn"]
            stacked.meta.update(
                {**self.node.meta, "shape": (*shape[: dim + 1], count, *shape[dim + 1 :]), "dyn": frozenset(d + (d > dim) for d in dyn)}
            )
            stacked.meta.update(value=None, stride=None)
            return self._call(FLATTEN, (stacked, dim, dim + 1))
        if all(positions.step == 1 or len(positions) == 1 for positions in places):
            return self._call(CAT, (self._with_gaps(places, values, dim, size), dim))
        return self._picked(places, values, dim, size)

    def _with_gaps(self, places: list[range], values: list[Node], dim: int, size: int) -> list[Node]:
        parts: list[Node] = []
        at = 0
        for positions, value in zip(places, values, strict=True):
            if positions.start > at:
                parts.append(taken(self.graph, self.node, self.buffer, Place(dim, range(at, positions.start), False)))
            parts.append(value)
            at = positions[-1] + 1
        if at < size:
            parts.append(taken(self.graph, self.node, self.buffer, Place(dim, range(at, size), False)))
        return parts

    def _picked(self, places: list[range], values: list[Node], dim: int, size: int) -> Node:
        """All values, and the buffer where something of it is left, one behind the other; then every position from where it is."""
        where = {position: i for i, position in enumerate(p for positions in places for p in positions)}
        if len(where) < size:
            where.update({p: len(where) + p for p in range(size) if p not in where})
            values = [*values, self.buffer]
        joined = self._call(CAT, (values, dim))
        shape = list(self.node.meta["shape"])
        shape[dim] = sum(value.meta["shape"][dim] for value in values)
        joined.meta.update({**self.node.meta, "shape": tuple(shape), "value": None, "stride": None})
        return self._call(PICK, (joined, dim, tuple(where[p] for p in range(size))))

    def _call(self, op: Any, args: tuple[Any, ...]) -> Node:
        with self.graph.inserting_before(self.node):
            return self.graph.call_function(op, args)

    def _with_dim(self, value: Node, dim: int) -> Node:
        made = self._call(UNSQUEEZE, (value, dim))
        shape = value.meta["shape"]
        dyn = frozenset(d + (d >= dim) for d in value.meta["dyn"])
        made.meta.update(value.meta, shape=(*shape[:dim], 1, *shape[dim:]), dyn=dyn, value=None, stride=None)
        return made
