"""Matrix products written by hand: ``x @ w``, ``mm``, ``bmm``, ``mv``, ``addmm``, ``baddbmm``, ``einsum``.

Lanes go in front, ``[G, ...]``; batch dims in between are aligned for broadcasting, as ``torch.matmul`` does it.
"""

from __future__ import annotations

import string
from typing import Any

import torch

from ..bundle import Bundle, Node
from ..emit import Emitter
from ..writer import CannotVectorize, Packed
from .base import rank, rule
from .elementwise import aligned


@rule("matmul", "mm", "bmm", "mv", "dot", heavy=True, lowering="matmul")
def _matmul(emitter: Emitter, bundle: Bundle) -> Packed:
    assert bundle.op is not None
    left_name, right_name = bundle.op.names[:2]
    left, right = emitter.operand(bundle, left_name), emitter.operand(bundle, right_name)
    return product(emitter, bundle, left, right, bundle.members[0].args[0], bundle.members[0].args[1])


def product(emitter: Emitter, bundle: Bundle, left: Packed, right: Packed, left_node: Any, right_node: Any) -> Packed:
    """``torch.matmul`` of two lane values, ranks as the lanes have them."""
    left_rank, right_rank = rank(left_node), rank(right_node)
    lanes = len(bundle.members)
    if left.dim is None and right.dim is None:
        return Packed(emitter.call(torch.matmul, left.node, right.node), None)
    if right.dim is None and right_rank <= 2 and left_rank >= 2:
        # One shared matrix: the lanes are more rows. The lane axis must not be one of the last two dims' contracted one.
        moved = left if left.dim is not None and left.dim < left_rank else Packed(emitter.at(left, 0), 0)
        return Packed(emitter.call(torch.matmul, moved.node, right.node), moved.dim)
    a, b = emitter.front(left, lanes), emitter.front(right, lanes)
    if left_rank == 1:
        a = emitter.call(torch.unsqueeze, a, 1)
    if right_rank == 1:
        b = emitter.call(torch.unsqueeze, b, 2)
    wide = max(left_rank, right_rank, 2)
    for _ in range(wide - max(left_rank, 2)):
        a = emitter.call(torch.unsqueeze, a, 1)
    if max(right_rank, 2) == 2 and wide > 2:
        # [G, ..., N, K] x [G, K, M]: rows of all batch dims together, so that the matrix is not copied per batch entry.
        shape = a.meta["val"].shape
        rows = emitter.call(torch.flatten, a, 1, len(shape) - 2)
        out = emitter.call(torch.matmul, rows, b)
        free = left_node.meta["dyn"]
        sizes = [emitter.call("size", a, d) if d - 1 in free else int(shape[d]) for d in range(1, len(shape) - 1)]
        out = emitter.call(torch.unflatten, out, 1, tuple(sizes))
    else:
        for _ in range(wide - max(right_rank, 2)):
            b = emitter.call(torch.unsqueeze, b, 1)
        out = emitter.call(torch.matmul, a, b)
    if right_rank == 1:
        out = emitter.call(torch.squeeze, out, -1)
    if left_rank == 1:
        out = emitter.call(torch.squeeze, out, -1 if right_rank == 1 else -2)
    return Packed(out, 0)


@rule("vdot", heavy=True, lowering="matmul")
def _vdot(emitter: Emitter, bundle: Bundle) -> Packed:
    assert bundle.op is not None
    left, right = (emitter.operand(bundle, name) for name in bundle.op.names)
    if bundle.members[0].meta["dtype"].is_complex:
        left = Packed(emitter.call(torch.conj, left.node), left.dim)
    return product(emitter, bundle, left, right, *bundle.members[0].args)


@rule("addmm", "baddbmm", "addmv", "addbmm", "addr", heavy=True, lowering="matmul")
def _added(emitter: Emitter, bundle: Bundle) -> Packed:
    """``beta * input + alpha * product``; with ``beta`` 0 the input counts for nothing, whatever it holds."""
    assert bundle.op is not None
    args = bundle.members[0].args
    first, second = (emitter.operand(bundle, name) for name in bundle.op.names[1:3])
    alpha, beta = emitter.operand(bundle, "alpha"), emitter.operand(bundle, "beta")
    if isinstance(alpha, Packed) or isinstance(beta, Packed):
        raise CannotVectorize(f"{bundle.name} with sizes as factors")
    given: Packed = emitter.operand(bundle, "input")
    if bundle.name in ("addmm", "baddbmm") and first.dim is not None and second.dim is not None and beta != 0:
        fused = _in_one(emitter, bundle, given, first, second, beta, alpha)
        if fused is not None:
            return fused
    if bundle.name == "addr":
        out = _outer_product(emitter, bundle, first, second)
    else:
        out = product(emitter, bundle, first, second, args[1], args[2])
    if bundle.name == "addbmm" and out.dim is not None:
        out = Packed(emitter.call(torch.sum, out.node, 1), 0)
    elif bundle.name == "addbmm":
        out = Packed(emitter.call(torch.sum, out.node, 0), None)
    if beta == 0:
        return Packed(emitter.call(torch.mul, out.node, alpha), out.dim)
    out_rank = rank(bundle.members[0])
    if given.dim is None and out.dim is None:
        nodes, lane = [out.node, given.node], None
    else:
        nodes, lane = aligned(emitter, [(out, out_rank), (given, rank(args[0]))], out_rank)
    added = nodes[1] if beta == 1 else emitter.call(torch.mul, nodes[1], beta)
    return Packed(emitter.call(torch.add, added, nodes[0], alpha=alpha) if alpha != 1 else emitter.call(torch.add, *nodes), lane)


def _in_one(emitter: Emitter, bundle: Bundle, given: Packed, left: Packed, right: Packed, beta: Any, alpha: Any) -> Packed | None:
    """``baddbmm`` of all lanes; where the lanes are batches already, their batch dims are put together."""
    lanes, own = len(bundle.members), rank(bundle.members[0].args[0])
    added, a, b = (emitter.front(value, lanes) for value in (given, left, right))
    if bundle.name == "baddbmm":
        if own != 3 or bundle.members[0].args[0].meta["shape"][0] != bundle.members[0].meta["shape"][0]:  # type: ignore[union-attr]
            return None
        added, a, b = (emitter.call(torch.flatten, node, 0, 1) for node in (added, a, b))
    for _ in range(2 - own if bundle.name == "addmm" else 0):
        added = emitter.call(torch.unsqueeze, added, 1)
    out = emitter.call(torch.baddbmm, added, a, b, beta=beta, alpha=alpha)
    return Packed(emitter.call(torch.unflatten, out, 0, (lanes, -1)) if bundle.name == "baddbmm" else out, 0)


def _outer_product(emitter: Emitter, bundle: Bundle, left: Packed, right: Packed) -> Packed:
    lanes = len(bundle.members)
    if left.dim is None and right.dim is None:
        return Packed(emitter.call(torch.outer, left.node, right.node), None)
    column = emitter.call(torch.unsqueeze, emitter.front(left, lanes), 2)
    return Packed(emitter.call(torch.mul, column, emitter.call(torch.unsqueeze, emitter.front(right, lanes), 1)), 0)


@rule("outer", "ger", heavy=True, lowering="matmul")
def _outer(emitter: Emitter, bundle: Bundle) -> Packed:
    left, right = (emitter.operand(bundle, name) for name in ("input", "vec2"))
    return _outer_product(emitter, bundle, left, right)


def _contraction(emitter: Emitter, terms: list[str], out: str, values: list[Packed]) -> Packed:
    """The einsum of ``terms``, with a letter for the lanes where an operand has them."""
    letter = next(c for c in string.ascii_letters if all(c not in term for term in (*terms, out)))
    if all(value.dim is None for value in values):
        return Packed(emitter.call(torch.einsum, f"{','.join(terms)}->{out}", *[value.node for value in values]), None)
    nodes = [value.node if value.dim is None else emitter.at(value, 0) for value in values]
    marked = [term if value.dim is None else letter + term for term, value in zip(terms, values, strict=True)]
    return Packed(emitter.call(torch.einsum, f"{','.join(marked)}->{letter}{out}", *nodes), 0)


@rule("tensordot", "inner", heavy=True, lowering="einsum")
def _tensordot(emitter: Emitter, bundle: Bundle) -> Packed:
    assert bundle.op is not None
    left, right = (emitter.operand(bundle, name) for name in bundle.op.names[:2])
    left_rank, right_rank = (rank(node) for node in bundle.members[0].args[:2])
    if bundle.name == "inner":
        if not left_rank or not right_rank:
            raise CannotVectorize("inner of a single number")
        pairs = [(left_rank - 1, right_rank - 1)]
    else:
        dims = emitter.operand(bundle, "dims")
        if isinstance(dims, Packed) or emitter.operand(bundle, "out") is not None:
            raise CannotVectorize("tensordot with a tensor of dims")
        lists = (range(left_rank - dims, left_rank), range(dims)) if isinstance(dims, int) else dims
        first, second = ((d,) if isinstance(d, int) else d for d in lists)
        pairs = [(a % left_rank, b % right_rank) for a, b in zip(first, second, strict=True)]
    letters = iter(string.ascii_lowercase)
    terms = [[next(letters) for _ in range(r)] for r in (left_rank, right_rank)]
    for a, b in pairs:
        terms[1][b] = terms[0][a]
    gone = {terms[0][a] for a, _ in pairs}
    out = "".join(c for c in (*terms[0], *terms[1]) if c not in gone)
    return _contraction(emitter, ["".join(term) for term in terms], out, [left, right])


@rule("einsum", heavy=True, lowering="einsum")
def _einsum(emitter: Emitter, bundle: Bundle) -> Packed:
    equation = str(emitter.operand(bundle, "equation")).replace(" ", "")
    operands: tuple[Packed, ...] = tuple(emitter.operand(bundle, "operands"))
    letter = next(c for c in string.ascii_letters if c not in equation)
    if "->" not in equation:
        left = equation
        right = "".join(sorted(c for c in set(left) if c.isalpha() and left.count(c) == 1))
        right = ("..." if "..." in left else "") + right
    else:
        left, right = equation.split("->")
    if all(value.dim is None for value in operands):
        return Packed(emitter.call(torch.einsum, equation, *[value.node for value in operands]), None)
    terms: list[str] = []
    nodes: list[Node] = []
    for term, value in zip(left.split(","), operands, strict=True):
        terms.append(term if value.dim is None else letter + term)
        nodes.append(value.node if value.dim is None else emitter.at(value, 0))
    return Packed(emitter.call(torch.einsum, f"{','.join(terms)}->{letter}{right}", *nodes), 0)
