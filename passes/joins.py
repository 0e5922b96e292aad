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
