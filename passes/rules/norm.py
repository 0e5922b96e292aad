"""Normalisation inside lanes. LayerNorm: over the lanes' last dims, own weights applied after."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..bundle import Bundle
from ..emit import Emitter, Packed
from .base import rank, rule
from .elementwise import aligned


@rule("layer_norm", heavy=True, lowering="layer_norm")
def _layer_norm(emitter: Emitter, bundle: Bundle) -> Packed:
    value = emitter.operand(bundle, "input")
    weight, bias = emitter.operand(bundle, "weight"), emitter.operand(bundle, "bias")
    shape, eps = emitter.operand(bundle, "normalized_shape"), emitter.operand(bundle, "eps")
    lane_rank = rank(bundle.members[0].args[0])
    affine = [v for v in (weight, bias) if isinstance(v, Packed)]
    shared = all(v.dim is None for v in affine)
    if value.dim is not None and value.dim > lane_rank - len(shape):
        value = Packed(emitter.at(value, 0), 0)
    if shared:
        weight_node, bias_node = (v.node if isinstance(v, Packed) else None for v in (weight, bias))
        return Packed(emitter.call(F.layer_norm, value.node, shape, weight_node, bias_node, eps), value.dim)
    out = Packed(emitter.call(F.layer_norm, value.node, shape, None, None, eps), value.dim)
    operands = [(out, lane_rank)] + [(v, len(shape)) for v in (weight, bias) if isinstance(v, Packed)]
    nodes, lane = aligned(emitter, operands, lane_rank)
    iterator = iter(nodes[1:])
    node = nodes[0]
    if isinstance(weight, Packed) and isinstance(bias, Packed):
        scale, shift = next(iterator), next(iterator)
        return Packed(emitter.call(torch.addcmul, shift, node, scale), lane)
    if isinstance(weight, Packed):
        return Packed(emitter.call(torch.mul, node, next(iterator)), lane)
    return Packed(emitter.call(torch.add, node, next(iterator)), lane)
