"""Where lanes come together: one spelling for every way to write it.

Comes in: a functional graph from ``lift``. Goes out: the same graph, in which a growing ``z = cat([z, y])`` is one ``cat``, a chain of
slice writes into a buffer is one ``stack`` or ``cat``, and a chain of additions is one ``sum_of``. Contract: the values that leave the
graph are the same; a node that something else reads between two steps of a chain ends the chain there.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx

from .functional import as_slot, drop_unused, index_write, op_of, slice_along, sum_of
from .ops import Op, canonical

CAT = canonical(torch.cat, ([torch.empty(0)], 0), {})[0]
STACK = canonical(torch.stack, ([torch.empty(0)], 0), {})[0]
SELECT = canonical(torch.select, (torch.empty(0), 0, 0), {})[0]
UNSQUEEZE = canonical(torch.unsqueeze, (torch.empty(0), 0), {})[0]
SUM_OF = op_of(sum_of)
SLICE = op_of(slice_along)
WRITE = op_of(index_write)
SLOT = op_of(as_slot)

Node = torch.fx.Node


def is_op(node: Any, name: str) -> bool:
    """True where ``node`` calls the canonical op of that name."""
    return isinstance(node, Node) and isinstance(node.target, Op) and node.target.name == name


def argument(node: Node, name: str) -> Any:
    """An argument of a canonical call by its name."""
    assert isinstance(node.target, Op)
    return node.args[node.target.names.index(name)]


def normalize_joins(graph: torch.fx.Graph) -> None:
    """Collapse chains of joins, in place. Near-linear: each chain is walked once, from its end."""
    for node in reversed(list(graph.nodes)):
        if node.op != "call_function" or not node.users:
            continue
        if is_op(node, "cat"):
            _flatten_cat(graph, node)
        elif is_op(node, "index_write"):
            _collect_writes(graph, node)
        elif is_op(node, "add"):
            _collect_sum(graph, node)
    drop_unused(graph)


def _copy_meta(new: Node, old: Node) -> None:
    new.meta.update(old.meta)


def _only_user(node: Any, user: Node) -> bool:
    return isinstance(node, Node) and len(node.users) == 1 and user in node.users


# -- growing cat ------------------------------------------------------------------------------------------------------------------


def _flatten_cat(graph: torch.fx.Graph, node: Node) -> None:
    dim = argument(node, "dim")
    pieces: list[Any] = []
    grown = False
    stack: list[tuple[Any, Node]] = [(piece, node) for piece in reversed(_list(argument(node, "tensors")))]
    while stack:
        piece, user = stack.pop()
        same = is_op(piece, "cat") and argument(piece, "dim") == dim and piece.meta["dtype"] is node.meta["dtype"]
        if same and _only_user(piece, user):
            grown = True
            stack.extend((p, piece) for p in reversed(_list(argument(piece, "tensors"))))
        else:
            pieces.append(piece)
    if grown:
        _replace(graph, node, CAT, (pieces, dim))


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _replace(graph: torch.fx.Graph, node: Node, op: Op, args: tuple[Any, ...]) -> Node:
    with graph.inserting_before(node):
        new = graph.call_function(op, args)
    _copy_meta(new, node)
    node.replace_all_uses_with(new)
    return new


# -- sums -------------------------------------------------------------------------------------------------------------------------


def is_plain_add(node: Any) -> bool:
    """An addition of two tensors of the result's own shape and dtype, without ``alpha``."""
    if not is_op(node, "add"):
        return False
    values = dict(zip(node.target.names, node.args, strict=True))
    left, right = values.get("input"), values.get("other")
    return (
        values.get("alpha", 1) == 1
        and isinstance(left, Node)
        and isinstance(right, Node)
        and all(
            all(part.meta.get(fact) == node.meta[fact] for fact in ("shape", "dyn", "dtype"))
            for part in (left, right)
        )
    )


def _collect_sum(graph: torch.fx.Graph, node: Node) -> None:
    if not is_plain_add(node) or any(is_plain_add(user) and len(node.users) == 1 for user in node.users):
        return
    terms: list[Node] = []
    stack: list[tuple[Any, Node]] = [(argument(node, "other"), node), (argument(node, "input"), node)]
    while stack:
        term, user = stack.pop()
        if is_plain_add(term) and _only_user(term, user):
            stack.append((argument(term, "other"), term))
            stack.append((argument(term, "input"), term))
        else:
            terms.append(term)
    kept = [term for term in terms if not _is_zeros(term)]
    if len(terms) > 2 or len(kept) < len(terms):
        if len(kept) >= 2:
            _replace(graph, node, SUM_OF, (kept,))
        elif len(terms) > 2:
            _replace(graph, node, SUM_OF, (terms,))


def _is_zeros(node: Any) -> bool:
    return isinstance(node, Node) and isinstance(node.target, Op) and node.target.name in ("zeros", "new_zeros", "zeros_like")


# -- slice writes -----------------------------------------------------------------------------------------------------------------


def _position(index: Any, rank: int) -> tuple[int, Any] | None:
    """(dim, int or slice) of an index that picks along one dim only; None for any other index."""
    items = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(i, Node) or i is None for i in items):
        return None
    if Ellipsis in items:
        at = items.index(Ellipsis)
        items[at : at + 1] = [slice(None)] * (rank - len(items) + 1)
    found = None
    for dim, item in enumerate(items):
        if isinstance(item, slice) and item == slice(None):
            continue
        if found is not None or not (type(item) is int or isinstance(item, slice)):
            return None
        found = (dim, item)
    return found


def _collect_writes(graph: torch.fx.Graph, node: Node) -> None:
    """``node`` is the last of a chain of writes along one dim: make it one ``cat``/``stack`` of the written values."""
    if any(is_op(user, "index_write") and argument(user, "base") is node and len(node.users) == 1 for user in node.users):
        return  # not the last
    rank = len(node.meta["shape"])
    pieces: dict[int, tuple[int, bool, Node | None]] = {}  # start -> (stop, is a single index, value)
    taken: set[int] = set()
    at: Any = node
    dim: int | None = None
    count = 0
    while is_op(at, "index_write"):
        where = _position(argument(at, "index"), rank)
        value = argument(at, "value")
        if where is None or not isinstance(value, Node) or value.meta.get("shape") is None or (dim is not None and where[0] != dim):
            break
        size = node.meta["shape"][where[0]]
        if where[0] in node.meta["dyn"]:
            break
        single = type(where[1]) is int
        if single:
            start = where[1] % size
            span = range(start, start + 1)
        else:
            if any(isinstance(b, Node) for b in (where[1].start, where[1].stop, where[1].step)):
                break
            start, stop, step = where[1].indices(size)
            if step != 1 or stop <= start:
                break
            span = range(start, stop)
        covered = taken.intersection(span)
        if covered and len(covered) < len(span):
            break
        dim = where[0]
        if not covered:  # a later write to the same place has already won
            taken.update(span)
            pieces[span.start] = (span.stop, single, value)
        count += 1
        base = argument(at, "base")
        if not _only_user(base, at):
            at = base
            break
        at = base
    # A single write is a join of its own only where it covers the whole buffer.
    if dim is None or count == 0 or (count == 1 and len(taken) < node.meta["shape"][dim]):
        return
    _assemble(graph, node, at, dim, pieces)


def _assemble(graph: torch.fx.Graph, node: Node, buffer: Node, dim: int, pieces: dict[int, tuple[int, bool, Node | None]]) -> None:
    size = node.meta["shape"][dim]
    full = sum(stop - start for start, (stop, _, _) in pieces.items()) == size
    all_single = full and all(single for _, single, _ in pieces.values())
    parts: list[Node] = []
    at = 0
    with graph.inserting_before(node):
        for start in sorted(pieces):
            stop, single, value = pieces[start]
            assert value is not None
            if start > at:
                parts.append(_slice(graph, node, buffer, dim, at, start))
            fitted = _fit(graph, node, buffer, dim, start, stop, single, value)
            if single and not all_single:
                shape = fitted.meta["shape"]
                unsqueezed = graph.call_function(UNSQUEEZE, (fitted, dim))
                dyn = frozenset(d + (d >= dim) for d in fitted.meta["dyn"])
                unsqueezed.meta.update(fitted.meta, shape=(*shape[:dim], 1, *shape[dim:]), stride=None, dyn=dyn)
                fitted = unsqueezed
            parts.append(fitted)
            at = stop
        if at < size:
            parts.append(_slice(graph, node, buffer, dim, at, size))
        joined = graph.call_function(STACK if all_single else CAT, (parts, dim))
    _copy_meta(joined, node)
    node.replace_all_uses_with(joined)


def _slice(graph: torch.fx.Graph, node: Node, buffer: Node, dim: int, start: int, stop: int) -> Node:
    piece = graph.call_function(SLICE, (buffer, dim, start, stop, 1))
    shape = list(node.meta["shape"])
    shape[dim] = stop - start
    piece.meta.update(node.meta, shape=tuple(shape), stride=None)
    return piece


def _fit(graph: torch.fx.Graph, node: Node, buffer: Node, dim: int, start: int, stop: int, single: bool, value: Node) -> Node:
    """``value`` with the shape and dtype of the place it is written to."""
    shape = list(node.meta["shape"])
    dyn = node.meta["dyn"]
    if single:
        del shape[dim]
        dyn = frozenset(d - (d > dim) for d in dyn)
    else:
        shape[dim] = stop - start
    same_dtype = value.meta["dtype"] is node.meta["dtype"]
    if value.meta["shape"] == tuple(shape) and value.meta["dyn"] == dyn and same_dtype:
        return value
    if value.meta["shape"] == tuple(shape) and value.meta["dyn"] == dyn:
        op, args = canonical(torch.Tensor.to, (value, node.meta["dtype"]), {})
        fitted = graph.call_function(op, args)
    else:
        slot = (
            graph.call_function(SELECT, (buffer, dim, start)) if single else graph.call_function(SLICE, (buffer, dim, start, stop, 1))
        )
        slot.meta.update(node.meta, shape=tuple(shape), dyn=dyn, stride=None)
        fitted = graph.call_function(SLOT, (value, slot))
    fitted.meta.update(node.meta, shape=tuple(shape), dyn=dyn, stride=None, place=value.meta.get("place"), path=value.meta.get("path"))
    return fitted
