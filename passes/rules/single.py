"""A single Linear or pointwise convolution, spelled as the other: the same map, for where that measures faster.

The seeds' question "should a Conv1d with kernel size 1 not do the same as a Linear?" has the answer yes, at different speeds. Options are
offered to the planner; without a measurement in their favour the node stays as it is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..emit import Emitter
from ..joins import argument, is_op
from ..pointwise_conv import is_pointwise_conv
from ..writer import Node
from .base import rank

AS_IT_IS = "as it is"


def respelled(emitter: Emitter, node: Node) -> Any:
    """The node in the spelling that the planner chose; None for as it is."""
    if is_pointwise_conv(node):
        chosen = emitter.choose_single(node, (AS_IT_IS, "matmul", "linear"))
        return _conv_as_matmul(emitter, node) if chosen == "matmul" else _conv_as_linear(emitter, node) if chosen == "linear" else None
    if is_op(node, "linear") and rank(argument(node, "input")) == 3 and rank(argument(node, "weight")) == 2:
        chosen = emitter.choose_single(node, (AS_IT_IS, "conv1d"))
        return _linear_as_conv(emitter, node) if chosen == "conv1d" else None
    return None


def _operands(emitter: Emitter, node: Node) -> tuple[Node, Node, Node | None]:
    x, weight, bias = (argument(node, name) for name in ("input", "weight", "bias"))
    return emitter.single(x), emitter.single(weight), emitter.single(bias) if isinstance(bias, Node) else None


def _conv_as_matmul(emitter: Emitter, node: Node) -> Node:
    """``[M, C] x [N, C, L]``: channels stay where they are."""
    x, weight, bias = _operands(emitter, node)
    spatial = rank(argument(node, "input")) - 2
    flat = x if spatial == 1 else emitter.call(torch.flatten, x, 2, -1)
    out = emitter.call(torch.matmul, emitter.call(torch.flatten, weight, 1, -1), flat)
    if bias is not None:
        out = emitter.call(torch.add, out, emitter.call(torch.unsqueeze, bias, 1))
    return out if spatial == 1 else _spatial(emitter, node, out, x)


def _conv_as_linear(emitter: Emitter, node: Node) -> Node:
    """Channels last, one Linear, channels back."""
    x, weight, bias = _operands(emitter, node)
    out = emitter.call(F.linear, emitter.call(torch.movedim, x, 1, -1), emitter.call(torch.flatten, weight, 1, -1), bias)
    return emitter.call("contiguous", emitter.call(torch.movedim, out, -1, 1))


def _linear_as_conv(emitter: Emitter, node: Node) -> Node:
    x, weight, bias = _operands(emitter, node)
    out = emitter.call(torch.conv1d, emitter.call(torch.transpose, x, 1, 2), emitter.call(torch.unsqueeze, weight, 2), bias)
    return emitter.call("contiguous", emitter.call(torch.transpose, out, 1, 2))


def _spatial(emitter: Emitter, node: Node, out: Node, x: Node) -> Node:
    """The spatial dims taken apart again; sizes that are free are read from the input."""
    free, shape = argument(node, "input").meta["dyn"], argument(node, "input").meta["shape"]
    sizes = [emitter.call("size", x, d) if d in free else int(shape[d]) for d in range(2, len(shape))]
    return emitter.call(torch.unflatten, out, 2, tuple(sizes))
