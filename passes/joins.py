"""Where lanes come together: one spelling for every way to write it.

Comes in: a functional graph after ``buffers``. Goes out: the same graph, in which a growing ``z = cat([z, y])`` is one ``cat``, and a chain
of additions, products, minima or maxima is one ``sum_of``, ``prod_of``, ``min_of``, ``max_of``. Contract: the values that leave the
graph are the same; a node that something else reads between two steps of a chain ends the chain there.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx

from fxfuse.functional import drop_unused, max_of, min_of, op_of, prod_of, sum_of
from fxfuse.ops import Op, canonical

CAT = canonical(torch.cat, ([torch.empty(0)], 0), {})[0]
STACK = canonical(torch.stack, ([torch.empty(0)], 0), {})[0]
UNSQUEEZE = canonical(torch.unsqueeze, (torch.empty(0), 0), {})[0]
SUB = canonical(torch.sub, (torch.empty(0), torch.empty(0)), {})[0]
SUM_OF, PROD_OF, MIN_OF, MAX_OF = op_of(sum_of), op_of(prod_of), op_of(min_of), op_of(max_of)

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
        else:
            _collect(graph, node)
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


# -- chains of one operation ---------------------------------------------------------------------------------------------------------

# An operation on two tensors of one shape, and the op that stands for a chain of it.
CHAINS = {"add": SUM_OF, "sub": SUM_OF, "mul": PROD_OF, "minimum": MIN_OF, "maximum": MAX_OF, "min": MIN_OF, "max": MAX_OF}
_STARTS = {SUM_OF: ("add", 0), PROD_OF: ("mul", 1)}
_NEUTRAL = {SUM_OF: ("zeros", "new_zeros", "zeros_like"), PROD_OF: ("ones", "new_ones", "ones_like")}


def chain_of(node: Any) -> Op | None:
    """What a chain of this operation is, where ``node`` combines two tensors of the result's own shape and dtype, without ``alpha``."""
    if not isinstance(node, Node) or not isinstance(node.target, Op) or node.target.name not in CHAINS or node.meta.get("shape") is None:
        return None
    values = dict(zip(node.target.names, node.args, strict=True))
    operands = (values.get("input"), values.get("other"))
    plain = values.get("alpha", 1) == 1 and all(
        isinstance(part, Node) and all(part.meta.get(fact) == node.meta[fact] for fact in ("shape", "dyn", "dtype")) for part in operands
    )
    return CHAINS[node.target.name] if plain and node.meta["dtype"] is not torch.bool else None


def is_plain_add(node: Any) -> bool:
    """An addition of two tensors of the result's own shape and dtype, without ``alpha``."""
    return is_op(node, "add") and chain_of(node) is not None


def _collect(graph: torch.fx.Graph, node: Node) -> None:
    """``node`` is the last of a chain: ``a + b - c - d`` is the sum of a and b less the sum of c and d."""
    chain = chain_of(node)
    if chain is None or (len(node.users) == 1 and chain_of(next(iter(node.users))) is chain):
        return
    terms, less = _terms(node, chain, True)
    if any(_has_number(term, chain) for term in (*terms, *less)):  # ``y_i + i``: the 0 of the first is a lane's own
        terms, less = _terms(node, chain, False)
    kept = [term for term in terms if not _is_neutral(term, chain)]
    if len(less) == 1 and len(terms) > 1:  # the additions before it are a chain of their own
        return
    if len(terms) + len(less) == 2 and kept == [argument(node, "input"), argument(node, "other")]:
        return
    if "out_stride" in node.meta and len(kept) < 2 and not less:  # a result of its own, laid out in its own way
        return
    with graph.inserting_before(node):
        result = _one(graph, node, chain, kept or terms[:1])
        if less:
            result = graph.call_function(SUB, (result, _one(graph, node, chain, less), 1))
            _copy_meta(result, node)
    node.replace_all_uses_with(result)


def _one(graph: torch.fx.Graph, node: Node, chain: Op, terms: list[Node]) -> Node:
    if len(terms) == 1:
        return terms[0]
    made = graph.call_function(chain, (terms,))
    _copy_meta(made, node)
    return made


def _terms(node: Node, chain: Op, from_start: bool) -> tuple[list[Node], list[Node]]:
    """What the chain that ends at ``node`` combines, and what it takes away. ``from_start``: without the 0 and 1 that chains start from."""
    terms: list[Node] = []
    less: list[Node] = []
    stack: list[tuple[Any, Node, bool]] = []

    def push(user: Node, positive: bool) -> None:
        stack.append((argument(user, "other"), user, positive is not is_op(user, "sub")))
        stack.append((argument(user, "input"), user, positive))

    push(node, True)
    while stack:
        term, user, positive = stack.pop()
        if chain_of(term) is chain and _only_user(term, user):
            push(term, positive)
        elif from_start and _is_start(term, chain) and _only_user(term, user):
            stack.append((argument(term, "input"), term, positive))
        else:
            (terms if positive else less).append(term)
    return terms, less


def _has_number(term: Node, chain: Op) -> bool:
    return is_op(term, _STARTS.get(chain, ("", 0))[0]) and not isinstance(argument(term, "other"), Node)


def _is_start(term: Node, chain: Op) -> bool:
    """``sum`` starts from 0 and ``math.prod`` from 1."""
    if not _has_number(term, chain):
        return False
    given, value = argument(term, "other"), argument(term, "input")
    same = isinstance(value, Node) and all(value.meta.get(fact) == term.meta[fact] for fact in ("shape", "dyn", "dtype"))
    return same and type(given) in (int, float) and given == _STARTS[chain][1]


def _is_neutral(node: Any, chain: Op) -> bool:
    """Zeros in a sum, ones in a product, and parts of such."""
    while any(is_op(node, name) for name in ("select", "slice_along")):
        node = node.args[0]
    return any(is_op(node, name) for name in _NEUTRAL.get(chain, ()))
