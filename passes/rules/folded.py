"""The sum of linear layers as one product: ``sum_g x_g W_g^T + b_g`` is ``[x_1 ... x_G] [W_1 ... W_G]^T + sum_g b_g``.

Comes in: the lanes of a bundle that one sum reads, and nothing else. Goes out: the sum, by one product over lanes and features together, of
which no lane's own result is left; where all lanes read one input, by the sum of their weights. Or None: where it is no linear layer, or
somebody wants the lanes' own results. Ops on the shape alone may stand between layer and sum.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from fxfuse.ops import Op

from ..bundle import Bundle, Node
from ..emit import Emitter
from .base import rank
from .linear import bias_of

_SHAPE_OPS = frozenset({"squeeze", "unsqueeze", "reshape", "flatten", "transpose", "permute", "movedim"})


def folded(emitter: Emitter, nodes: list[Node], reader: Node) -> Node | None:
    """The sum of ``nodes``, all lanes of one bundle that ``reader`` alone reads; None where it is not this, or not chosen."""
    layers, shapes = _layers(emitter, nodes, {reader})
    if layers is None:
        return None
    form = tuple(n.meta.get("shape") for n in layers.members[0].all_input_nodes)
    if emitter.choose_by(("sum_of", layers.whole or len(layers.members), form), ("sum", "folded")) != "folded":
        return None
    total = _product(emitter, layers)
    if total is None:
        return None
    for node in reversed(shapes):
        assert isinstance(node.target, Op)
        rest = torch.fx.node.map_arg(node.args[1:], emitter.single)
        total = emitter.respell(node.target, (total, *rest))
    index = emitter.op_of.get(layers.index)
    if index is not None:
        chunks = "" if layers.chunks == 1 else f", {layers.chunks} chunks"
        emitter.ops[index] = replace(emitter.ops[index], lowering=f"one product with the sum{chunks}")
    return total


def _layers(emitter: Emitter, nodes: list[Node], readers: set[Node]) -> tuple[Bundle | None, list[Node]]:
    """The bundle of linear layers behind ``nodes``, and what one lane does to their shape, the last op first."""
    between: list[Node] = []
    while True:
        bundle = emitter.bundles.bundle(nodes[0])
        if bundle is None or bundle.unequal or bundle.index not in emitter.values or len(nodes) != len(bundle.members):
            return None, []
        if set(nodes) != set(bundle.members) or any(user not in readers for node in nodes for user in node.users):
            return None, []
        if bundle.name == "linear":
            return bundle, between
        first = bundle.members[0]
        tensors = [n for n in first.all_input_nodes if n.meta.get("shape") is not None]
        if bundle.name not in _SHAPE_OPS or len(tensors) != 1 or tensors[0] is not first.args[0]:
            return None, []
        if any(not _alike(member.args[1:], first.args[1:], emitter) for member in bundle.members):
            return None, []
        between.append(first)
        readers = set(nodes)
        nodes = [node.args[0] for node in nodes]  # type: ignore[misc]


def _alike(one: object, other: object, emitter: Emitter) -> bool:
    """The same numbers, and sizes of one shape, whose lane has them."""
    if isinstance(one, Node) and isinstance(other, Node):
        return one is other or emitter.bundles.of.get(one) == emitter.bundles.of.get(other)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(_alike(a, b, emitter) for a, b in zip(one, other, strict=True))
    return type(one) is type(other) and one == other


def _product(emitter: Emitter, bundle: Bundle) -> Node | None:
    x = emitter.operand(bundle, "input")
    weight_nodes = emitter.nodes(bundle, "weight")
    assert weight_nodes is not None
    weights = emitter.operand(bundle, "weight")
    lanes, lane_rank = len(bundle.members), rank(bundle.members[0].args[0])
    if weights.dim is None or lane_rank == 0:
        return None
    bias = bias_of(emitter, bundle)
    total = None if bias is None else emitter.call(torch.sum, emitter.front(bias, lanes), 0)
    matrices = emitter.at(weights, 0)  # [G, M, K]
    if x.dim is None:
        return emitter.call(F.linear, x.node, emitter.call(torch.sum, matrices, 0), total)
    rows = emitter.call(torch.flatten, emitter.at(x, lane_rank - 1), lane_rank - 1, lane_rank)  # [..., G * K]
    if matrices.meta["val"].shape[1] == 1:
        return emitter.call(F.linear, rows, emitter.call(torch.unsqueeze, emitter.call(torch.flatten, matrices), 0), total)
    columns = emitter.call(torch.flatten, emitter.call(torch.transpose, matrices, 1, 2), 0, 1)  # [G * K, M]
    return emitter.call(F.linear, rows, emitter.call(torch.transpose, columns, 0, 1), total)
