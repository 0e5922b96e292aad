"""Bilinear layers, ``x1 @ W[o] @ x2`` for every output ``o``. Lowerings for lanes with their own weights ``[G, O, I, J]``:

- ``outer``: the products of all features, ``[G, N, I * J]``, times the weights as a matrix: one multiplication and one ``baddbmm``.
- ``project``: ``x1`` through the weights, ``[G, N, O, J]``, times ``x2``: less memory where outputs are fewer than features.

Lanes that share the weight fold into the batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..bundle import Bundle, Node
from ..emit import Emitter
from ..writer import Packed
from .base import physical, rank, rule
from .linear import bias_of


@rule("bilinear", heavy=True)
def _bilinear(emitter: Emitter, bundle: Bundle) -> tuple[Packed, str]:
    left, right = emitter.operand(bundle, "input1"), emitter.operand(bundle, "input2")
    weight_nodes, bias, lanes = emitter.nodes(bundle, "weight"), bias_of(emitter, bundle), len(bundle.members)
    assert weight_nodes is not None
    weight = emitter.operand(bundle, "weight")
    if weight.dim is None and (bias is None or bias.dim is None):
        bias_node = None if bias is None else bias.node
        if left.dim is None and right.dim is None:
            return Packed(emitter.call(F.bilinear, left.node, right.node, weight.node, bias_node), None), "one bilinear"
        fronts = [emitter.front(value, lanes) for value in (left, right)]
        return Packed(emitter.call(F.bilinear, *fronts, weight.node, bias_node), 0), "fold into batch"
    outputs, features, _ = weight_nodes[0].meta["shape"]
    options = ("outer", "project") if outputs >= features else ("project", "outer")
    lowering = emitter.choose(bundle, options)
    lane_rank = rank(bundle.members[0].args[0])
    shape = emitter.front(left if left.dim is not None else right, lanes)
    rows = [_rows(emitter, emitter.front(value, lanes), lane_rank) for value in (left, right)]  # [G, N, I], [G, N, J]
    stacked = emitter.front(weight, lanes)  # [G, O, I, J]
    bias_row = None if bias is None else emitter.call(torch.unsqueeze, emitter.front(bias, lanes), 1)  # [G, 1, O]
    out = (_outer if lowering == "outer" else _project)(emitter, rows, stacked, bias_row)
    return Packed(_unrolled(emitter, bundle, out, shape, lane_rank), 0), lowering


def _rows(emitter: Emitter, front: Node, lane_rank: int) -> Node:
    if lane_rank == 1:
        return emitter.call(torch.unsqueeze, front, 1)
    return front if lane_rank == 2 else emitter.call(torch.flatten, front, 1, lane_rank - 1)


def _unrolled(emitter: Emitter, bundle: Bundle, out: Node, front: Node, lane_rank: int) -> Node:
    """The rows of ``out`` as the batch dims that they were."""
    if lane_rank == 1:
        return emitter.call(torch.squeeze, out, 1)
    if lane_rank == 2:
        return out
    free, shape = bundle.members[0].meta["dyn"], front.meta["val"].shape
    sizes = [emitter.call("size", front, physical(d, 0)) if d in free else int(shape[d + 1]) for d in range(lane_rank - 1)]
    return emitter.call(torch.unflatten, out, 1, tuple(sizes))


def _outer(emitter: Emitter, rows: list[Node], weight: Node, bias: Node | None) -> Node:
    columns = emitter.call(torch.unsqueeze, rows[0], 3)  # [G, N, I, 1] x [G, N, 1, J]
    products = emitter.call(torch.flatten, emitter.call(torch.mul, columns, emitter.call(torch.unsqueeze, rows[1], 2)), 2, 3)
    matrix = emitter.call(torch.transpose, emitter.call(torch.flatten, weight, 2, 3), 1, 2)  # [G, I * J, O]
    return emitter.call(torch.bmm, products, matrix) if bias is None else emitter.call(torch.baddbmm, bias, products, matrix)


def _project(emitter: Emitter, rows: list[Node], weight: Node, bias: Node | None) -> Node:
    outputs, _, features = weight.meta["val"].shape[1:]
    matrix = emitter.call(torch.flatten, emitter.call(torch.movedim, weight, 2, 1), 2, 3)  # [G, I, O * J]
    through = emitter.call(torch.unflatten, emitter.call(torch.bmm, rows[0], matrix), 2, (int(outputs), int(features)))
    out = emitter.call(torch.sum, emitter.call(torch.mul, through, emitter.call(torch.unsqueeze, rows[1], 2)), 3)
    return out if bias is None else emitter.call(torch.add, out, bias)
