"""Convolutions, 1d to 3d and transposed.

- own inputs, own weights: one grouped convolution, lanes merged with the channels (``[N, G * C, ...]``, ``groups * G``); for kernels of
  size 1 also ``bmm``, the same map as a Linear; for others, of one group, ``unfold``: windows and one batched product.
- one shared weight: the same convolution, lanes folded into the batch.
- one shared input: with ``groups == 1`` one convolution with the output channels of all lanes; with more groups the output
  channels of the lanes would interleave, so the input is repeated per lane and the groups multiplied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..bundle import Bundle, Node
from ..emit import Emitter
from ..writer import CannotVectorize, Packed
from .base import rank, rule
from .fold import fold, unfold
from .linear import bias_of
from .windows import geometry, windows

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "conv1d": torch.conv1d, "conv2d": torch.conv2d, "conv3d": torch.conv3d,
    "conv_transpose1d": torch.conv_transpose1d, "conv_transpose2d": torch.conv_transpose2d, "conv_transpose3d": torch.conv_transpose3d,
}  # fmt: skip


@rule("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", heavy=True)
def _conv(emitter: Emitter, bundle: Bundle) -> tuple[Packed, str]:
    spatial = int(bundle.name[-2])
    x, weight_nodes, bias = emitter.operand(bundle, "input"), emitter.nodes(bundle, "weight"), bias_of(emitter, bundle)
    assert weight_nodes is not None
    batched = rank(bundle.members[0].args[0]) == spatial + 2
    if not batched:  # [C, ...] -> [1, C, ...]
        x = Packed(emitter.call(torch.unsqueeze, x.node, 0), None if x.dim is None else x.dim + 1)
    own_weights = any(node is not weight_nodes[0] for node in weight_nodes)
    if not own_weights:
        value, lowering = _shared_weight(emitter, bundle, x, bias), "fold into batch"
    elif _is_pointwise(bundle) and emitter.choose(bundle, _options(bundle, x)) == "bmm":
        value, lowering = _matrix(emitter, bundle, x, weight_nodes, bias), "bmm"
    elif _as_windows(emitter, bundle, x):
        value, lowering = _matrix(emitter, bundle, x, weight_nodes, bias, geometry(bundle)), "unfold"
    else:
        value, lowering = _own_weights(emitter, bundle, x, weight_nodes, bias), "grouped_conv" if x.dim is not None else "wide_conv"
    if not batched:
        at = 0 if value.dim is None or value.dim > 0 else 1
        lane = None if value.dim is None else value.dim - (at < value.dim)
        value = Packed(emitter.call(torch.squeeze, value.node, at), lane)
    return value, lowering


def _as_windows(emitter: Emitter, bundle: Bundle, x: Packed) -> bool:
    if x.dim is None or _is_pointwise(bundle) or geometry(bundle) is None:
        return False
    return emitter.choose(bundle, ("grouped_conv", "unfold")) == "unfold"


def _options(bundle: Bundle, x: Packed) -> tuple[str, ...]:
    return ("grouped_conv", "bmm") if x.dim is not None else ("wide_conv", "bmm")


def _call(emitter: Emitter, bundle: Bundle, x: Node, weight: Node, bias: Node | None, groups: int) -> Node:
    assert bundle.op is not None
    rest = {name: emitter.operand(bundle, name) for name in bundle.op.names if name not in ("input", "weight", "bias", "groups")}
    if bundle.name.startswith("conv_transpose"):
        return emitter.call(
            _FUNCTIONS[bundle.name], x, weight, bias, rest["stride"], rest["padding"], rest["output_padding"], groups, rest["dilation"]
        )
    return emitter.call(_FUNCTIONS[bundle.name], x, weight, bias, rest["stride"], rest["padding"], rest["dilation"], groups)


def _groups(emitter: Emitter, bundle: Bundle) -> int:
    return int(emitter.operand(bundle, "groups"))


def _shared_weight(emitter: Emitter, bundle: Bundle, x: Packed, bias: Packed | None) -> Packed:
    if bias is not None and bias.dim is not None:
        raise CannotVectorize(f"{bundle.name}: lanes share the weight but not the bias")
    weight = emitter.operand(bundle, "weight").node
    bias_node = None if bias is None else bias.node
    if x.dim is None:
        return Packed(_call(emitter, bundle, x.node, weight, bias_node, _groups(emitter, bundle)), None)
    node, place = fold(emitter, x)
    return unfold(emitter, _call(emitter, bundle, node, weight, bias_node, _groups(emitter, bundle)), place, len(bundle.members))


def _flat(emitter: Emitter, value: Packed, lanes: int) -> Node:
    return emitter.call(torch.flatten, emitter.front(value, lanes), 0, 1)


def _own_weights(emitter: Emitter, bundle: Bundle, x: Packed, weight_nodes: list[Node], bias: Packed | None) -> Packed:
    lanes, groups = len(bundle.members), _groups(emitter, bundle)
    weight = emitter.weights(weight_nodes, None, "cat") or Packed(_flat(emitter, emitter.operand(bundle, "weight"), lanes), 0)
    bias_node = None if bias is None else _flat(emitter, bias, lanes)
    # Output channels of a transposed convolution are the weight's dim 1: they cannot be concatenated along dim 0.
    if x.dim is None and groups == 1 and not bundle.name.startswith("conv_transpose"):
        out = _call(emitter, bundle, x.node, weight.node, bias_node, 1)
    else:
        if x.dim is None:
            x = Packed(emitter.front(x, lanes), 0)
        merged = emitter.call(torch.flatten, emitter.at(x, 1), 1, 2)
        out = _call(emitter, bundle, merged, weight.node, bias_node, groups * lanes)
    return Packed(emitter.call(torch.unflatten, out, 1, (lanes, -1)), 1)


def _is_pointwise(bundle: Bundle) -> bool:
    """Kernel size 1, stride 1, no padding, one group: a Linear over the channels."""
    if bundle.name.startswith("conv_transpose"):
        return False
    assert bundle.op is not None
    given = dict(zip(bundle.op.names, bundle.members[0].args, strict=True))
    kernel: tuple[int, ...] = given["weight"].meta["shape"][2:]  # type: ignore[union-attr]
    return bool(
        all(k == 1 for k in kernel)
        and given["groups"] == 1
        and _all(given["stride"], 1)
        and (given["padding"] in ("same", "valid") or _all(given["padding"], 0))
    )


def _all(value: Any, number: int) -> bool:
    return all(v == number for v in value) if isinstance(value, (tuple, list)) else value == number


def _matrix(
    emitter: Emitter, bundle: Bundle, x: Packed, weight_nodes: list[Node], bias: Packed | None,
    dims: list[tuple[int, int, int, int, int]] | None = None,
) -> Packed:  # fmt: skip
    """``[G, N, C, *S]`` as rows ``[G, N * S, C]`` times ``[G, C, M]``; with ``dims``, each row a window."""
    lanes = len(bundle.members)
    front = emitter.front(x, lanes)
    spatial = len(front.meta["val"].shape) - 3
    moved = emitter.call(torch.movedim, front, 2, -1) if dims is None else windows(emitter, front, dims)  # [G, N, *S, C]
    rows = emitter.call(torch.flatten, moved, 1, spatial + 1)
    stored = emitter.weights(weight_nodes, None, "cat")  # as a convolution stores it: the recipe keeps the member's own dims
    if stored is None:
        stored = Packed(_flat(emitter, emitter.operand(bundle, "weight"), lanes), 0)
    weight = emitter.call(torch.unflatten, emitter.call(torch.flatten, stored.node, 1, -1), 0, (lanes, -1))  # [G, M, C]
    matrix = emitter.call(torch.transpose, weight, 1, 2)
    if bias is None:
        out = emitter.call(torch.bmm, rows, matrix)
    else:
        out = emitter.call(torch.baddbmm, emitter.call(torch.unsqueeze, emitter.front(bias, lanes), 1), rows, matrix)
    free = bundle.members[0].args[0].meta["dyn"]  # type: ignore[union-attr]
    own_batch = rank(bundle.members[0].args[0]) == spatial + 2
    # dim d of [G, N, *S, C] is the lanes' own dim: N is 0, S follows C at 1 (one less where the lanes have no batch dim).
    own = [0 if own_batch else None, *(d if own_batch else d - 1 for d in range(2, spatial + 2))]
    sizes = [emitter.call("size", moved, d) if o in free else int(moved.meta["val"].shape[d]) for d, o in enumerate(own, start=1)]
    out = emitter.call(torch.unflatten, out, 1, tuple(sizes))
    return Packed(emitter.call(torch.movedim, out, -1, 2), 0)
