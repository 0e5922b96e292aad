"""Linear layers. Lowerings, by which operands carry a lane axis:

- own inputs, own weights: ``baddbmm`` (weights stored ``[G, K, M]``); for K = 1 ``addcmul`` (an outer product), for M = 1 a product and
  a sum (``dot``) or the product ``from_left``; ``bmm_transposed`` (weights stored ``[G, M, K]``); ``grouped_conv``,
  the literal rewrite of the forum threads, batch on the length axis. For K = 1 and M = 1 also with the lanes behind the batch,
  ``[N, G, ...]``: ``addcmul_behind`` and ``dot_behind``, where what comes in or goes out is laid out so.
- one shared input: one wide Linear, ``[N, K] x [K, G * M]``.
- one shared weight: the same Linear on the packed input, which folds the lanes into its batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..bundle import Bundle, Node
from ..emit import Emitter
from ..writer import Packed
from .base import rank, rule


def bias_of(emitter: Emitter, bundle: Bundle) -> Packed | None:
    """The bias of a linear or convolution bundle, lane axis in front (``[G, M]``) where lanes have their own."""
    bias = emitter.operand(bundle, "bias")
    return bias if isinstance(bias, Packed) else None


@rule("linear", heavy=True)
def _linear(emitter: Emitter, bundle: Bundle) -> tuple[Packed, str]:
    x = emitter.operand(bundle, "input")
    weight_nodes = emitter.nodes(bundle, "weight")
    assert weight_nodes is not None
    own_weights = any(node is not weight_nodes[0] for node in weight_nodes)
    if not own_weights:
        bias = bias_of(emitter, bundle)
        weight = emitter.operand(bundle, "weight")
        if weight.dim is None and (bias is None or bias.dim is None):
            bias_node = None if bias is None else bias.node
            return _shared_weight(emitter, x, weight.node, bias_node, rank(bundle.members[0].args[0])), "one linear"
    if x.dim is None and rank(bundle.members[0].args[0]) >= 1 and emitter.choose(bundle, ("wide_linear", "baddbmm")) == "wide_linear":
        wide = _wide(emitter, bundle, x, weight_nodes)
        if wide is not None:
            return wide, "wide_linear"
    return _own(emitter, bundle, x, weight_nodes)


def _shared_weight(emitter: Emitter, x: Packed, weight: Node, bias: Node | None, lane_rank: int) -> Packed:
    if x.dim is not None and x.dim == lane_rank:  # the lane axis must not be the one that is contracted
        x = Packed(emitter.at(x, 0), 0)
    return Packed(emitter.call(F.linear, x.node, weight, bias), x.dim)


def _wide(emitter: Emitter, bundle: Bundle, x: Packed, weight_nodes: list[Node]) -> Packed | None:
    weight = emitter.weights(weight_nodes, (0, 1), "cat")
    if weight is None:
        stacked = emitter.operand(bundle, "weight")
        if stacked.dim is None:
            return None
        weight = Packed(emitter.call(torch.flatten, emitter.at(stacked, 0), 0, 1), 0)
    lanes = len(bundle.members)
    bias = bias_of(emitter, bundle)
    flat = None
    if bias is not None:
        flat = emitter.call(torch.flatten, emitter.front(bias, lanes), 0, 1)
    out = emitter.call(F.linear, x.node, weight.node, flat)
    last = len(out.meta["val"].shape) - 1
    return Packed(emitter.call(torch.unflatten, out, last, (lanes, -1)), last)


def _own(emitter: Emitter, bundle: Bundle, x: Packed, weight_nodes: list[Node]) -> tuple[Packed, str]:
    lanes = len(bundle.members)
    out_features, in_features = bundle.members[0].args[1].meta["shape"]  # type: ignore[union-attr]
    options = ["baddbmm", "bmm_transposed", "grouped_conv"]
    if out_features == 1:
        options.insert(0, "dot")
        options.append("from_left")
    if in_features == 1:
        options.insert(0, "addcmul")
    distinct = _shared_by_calls(emitter, bundle, weight_nodes)
    if x.dim is not None and distinct is None and 1 in (out_features, in_features):
        options.extend(name for name, width in (("addcmul_behind", in_features), ("dot_behind", out_features)) if width == 1)
    lowering = emitter.choose(bundle, tuple(options))
    bias = bias_of(emitter, bundle)
    if lowering.endswith("_behind"):
        return _behind(emitter, bundle, x, weight_nodes, bias, lowering), lowering
    x_front = emitter.front(x, lanes)  # [G, ..., K]
    bias_front = None if bias is None else emitter.front(bias, lanes)  # [G, M]

    def product(rows: Node) -> Node:
        if distinct is None:
            return _LOWERINGS[lowering](emitter, bundle, rows, weight_nodes, bias_front)
        # several calls of each network: more rows for its weight
        calls = lanes // len(distinct)
        rows = emitter.call(torch.flatten, emitter.call(torch.unflatten, rows, 0, (len(distinct), calls)), 1, 2)
        bias_nodes = emitter.nodes(bundle, "bias")
        own_bias = None if bias_nodes is None else emitter.front(emitter.fetch(bias_nodes[::calls]), len(distinct))
        out = _LOWERINGS[lowering](emitter, bundle, rows, distinct, own_bias)
        return emitter.call(torch.flatten, emitter.call(torch.unflatten, out, 1, (calls, -1)), 0, 1)

    return Packed(by_rows(emitter, bundle, x_front, product), 0), lowering


def _behind(emitter: Emitter, bundle: Bundle, x: Packed, weights: list[Node], bias: Packed | None, lowering: str) -> Packed:
    """Lanes behind all other dims but the last: weights and biases broadcast over what is in front, ``[..., G, K] -> [..., G, M]``."""
    dim = rank(bundle.members[0].args[0]) - 1
    rows = emitter.at(x, dim)
    bias_front = None if bias is None else emitter.front(bias, len(weights))  # [G, M]
    if lowering == "addcmul_behind":
        weight = emitter.call(torch.squeeze, _weight(emitter, bundle, weights, (1, 0)), 1)  # [G, M]
        made = emitter.call(torch.mul, rows, weight) if bias_front is None else emitter.call(torch.addcmul, bias_front, rows, weight)
        return Packed(made, dim)
    weight = emitter.call(torch.squeeze, _weight(emitter, bundle, weights, (0, 1)), 1)  # [G, K]
    total = emitter.call(torch.sum, emitter.call(torch.mul, rows, weight), -1, True)
    return Packed(total if bias_front is None else emitter.call(torch.add, total, bias_front), dim)


def by_rows(emitter: Emitter, bundle: Bundle, x: Node, product: Callable[[Node], Node]) -> Node:
    """``[G, ..., K] -> [G, ..., M]`` by a product of ``[G, N, K]``."""
    x_rank = len(x.meta["val"].shape)
    if x_rank == 2:
        return emitter.call(torch.squeeze, product(emitter.call(torch.unsqueeze, x, 1)), 1)
    if x_rank == 3:
        return product(x)
    out = product(emitter.call(torch.flatten, x, 1, x_rank - 2))
    sizes = [_size(emitter, bundle, x, d) for d in range(1, x_rank - 1)]
    return emitter.call(torch.unflatten, out, 1, tuple(sizes))


def _shared_by_calls(emitter: Emitter, bundle: Bundle, weight_nodes: list[Node]) -> list[Node] | None:
    """The networks' own weights, where lane for lane each serves several calls in a row, its bias too; else None."""
    distinct = list(dict.fromkeys(weight_nodes))
    calls = len(weight_nodes) // len(distinct)
    if calls < 2 or len(distinct) < 2 or weight_nodes != [node for node in distinct for _ in range(calls)]:
        return None
    biases = emitter.nodes(bundle, "bias")
    if biases is not None and biases != [node for node in biases[::calls] for _ in range(calls)]:
        return None
    return distinct if all(node.op == "get_attr" for node in distinct) else None


def _size(emitter: Emitter, bundle: Bundle, node: Node, dim: int) -> Node | int:
    """A size of a ``[G, ...]`` value: a number where it is fixed, read at run time where it is free."""
    free = bundle.members[0].args[0].meta["dyn"]  # type: ignore[union-attr]
    return emitter.call("size", node, dim) if dim - 1 in free else int(node.meta["val"].shape[dim])


def _weight(emitter: Emitter, bundle: Bundle, nodes: list[Node], order: tuple[int, int]) -> Node:
    """``[G, K, M]`` for order (1, 0), ``[G, M, K]`` for (0, 1); stored that way where the weights are the lanes' own parameters."""
    packed = emitter.weights(nodes, order, "stack")
    if packed is not None:
        return packed.node
    weight = emitter.front(emitter.fetch(nodes), len(nodes))
    return weight if order == (0, 1) else emitter.call(torch.transpose, weight, 1, 2)


def _baddbmm(emitter: Emitter, bundle: Bundle, rows: Node, weights: list[Node], bias: Node | None) -> Node:
    weight = _weight(emitter, bundle, weights, (1, 0))
    if bias is None:
        return emitter.call(torch.bmm, rows, weight)
    return emitter.call(torch.baddbmm, emitter.call(torch.unsqueeze, bias, 1), rows, weight)


def _bmm_transposed(emitter: Emitter, bundle: Bundle, rows: Node, weights: list[Node], bias: Node | None) -> Node:
    weight = emitter.call(torch.transpose, _weight(emitter, bundle, weights, (0, 1)), 1, 2)
    if bias is None:
        return emitter.call(torch.bmm, rows, weight)
    return emitter.call(torch.baddbmm, emitter.call(torch.unsqueeze, bias, 1), rows, weight)


def _addcmul(emitter: Emitter, bundle: Bundle, rows: Node, weights: list[Node], bias: Node | None) -> Node:
    weight = _weight(emitter, bundle, weights, (1, 0))  # [G, 1, M]
    if bias is None:
        return emitter.call(torch.mul, rows, weight)
    return emitter.call(torch.addcmul, emitter.call(torch.unsqueeze, bias, 1), rows, weight)


def _dot(emitter: Emitter, bundle: Bundle, rows: Node, weights: list[Node], bias: Node | None) -> Node:
    weight = _weight(emitter, bundle, weights, (0, 1))  # [G, 1, K]
    total = emitter.call(torch.sum, emitter.call(torch.mul, rows, weight), -1, True)
    return total if bias is None else emitter.call(torch.add, total, emitter.call(torch.unsqueeze, bias, 1))


def _from_left(emitter: Emitter, bundle: Bundle, rows: Node, weights: list[Node], bias: Node | None) -> Node:
    """One output per lane as ``[G, 1, K] x [G, K, N]``: reads the rows in the order that the product likes best in inference."""
    weight = _weight(emitter, bundle, weights, (0, 1))  # [G, 1, K]
    columns = emitter.call(torch.transpose, rows, 1, 2)
    if bias is None:
        out = emitter.call(torch.bmm, weight, columns)
    else:
        out = emitter.call(torch.baddbmm, emitter.call(torch.unsqueeze, bias, 1), weight, columns)
    return emitter.call(torch.transpose, out, 1, 2)


def _grouped_conv(emitter: Emitter, bundle: Bundle, rows: Node, weights: list[Node], bias: Node | None) -> Node:
    lanes = len(weights)
    weight = emitter.call(torch.unsqueeze, emitter.call(torch.flatten, _weight(emitter, bundle, weights, (0, 1)), 0, 1), 2)
    channels = emitter.call(torch.flatten, emitter.call(torch.transpose, rows, 1, 2), 0, 1)  # [G * K, N]
    flat = None if bias is None else emitter.call(torch.flatten, bias, 0, 1)
    out = emitter.call(torch.conv1d, emitter.call(torch.unsqueeze, channels, 0), weight, flat, 1, 0, 1, lanes)
    out.meta["some_rows"] = True  # a convolution over no positions raises
    return emitter.call(torch.transpose, emitter.call(torch.unflatten, emitter.call(torch.squeeze, out, 0), 0, (lanes, -1)), 1, 2)


_LOWERINGS = {
    "baddbmm": _baddbmm,
    "bmm_transposed": _bmm_transposed,
    "addcmul": _addcmul,
    "dot": _dot,
    "from_left": _from_left,
    "grouped_conv": _grouped_conv,
}
