"""Matrix products written by hand: ``x @ w``, ``mm``, ``bmm``, ``mv``, ``addmm``, ``baddbmm``, ``einsum``.

Lanes go in front, ``[G, ...]``; batch dims in between are aligned for broadcasting, as ``torch.matmul`` does it.
"""

from __future__ import annotations

import string
from typing import Any

import torch

from ..bundle import Bundle, Node
from ..emit import Emitter, Packed
from .base import rank, rule
from .fallback import by_vmap


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


@rule("addmm", "baddbmm", "addmv", "addbmm", heavy=True, lowering="matmul")
def _added(emitter: Emitter, bundle: Bundle) -> Packed | tuple[Packed, str]:
    assert bundle.op is not None
    if bundle.name == "addbmm" or emitter.operand(bundle, "beta") != 1 or emitter.operand(bundle, "alpha") != 1:
        return by_vmap(emitter, bundle)
    first, second = bundle.op.names[1:3]
    args = bundle.members[0].args
    out = product(emitter, bundle, emitter.operand(bundle, first), emitter.operand(bundle, second), args[1], args[2])
    from .elementwise import aligned

    out_rank = rank(bundle.members[0])
    nodes, lane = aligned(emitter, [(out, out_rank), (emitter.operand(bundle, "input"), rank(args[0]))], out_rank)
    return Packed(emitter.call(torch.add, *nodes), lane)


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
