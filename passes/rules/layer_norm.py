"""LayerNorm and RMSNorm: over the lanes' last dims. Where lanes have their own scale and shift, those are applied after."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..bundle import Bundle
from ..emit import Emitter
from ..writer import Packed
from .base import rank, rule
from .elementwise import aligned


@rule("layer_norm", "rms_norm", heavy=True)
def _over_last_dims(emitter: Emitter, bundle: Bundle) -> tuple[Packed, str]:
    value = emitter.operand(bundle, "input")
    names = ("weight", "bias") if bundle.name == "layer_norm" else ("weight",)
    given = {name: emitter.operand(bundle, name) for name in names}
    affine = {name: v for name, v in given.items() if isinstance(v, Packed)}
    shape, eps = emitter.operand(bundle, "normalized_shape"), emitter.operand(bundle, "eps")
    function: Any = F.layer_norm if bundle.name == "layer_norm" else F.rms_norm
    lane_rank = rank(bundle.members[0].args[0])
    if value.dim is not None and value.dim > lane_rank - len(shape):
        value = Packed(emitter.at(value, 0), 0)
    if all(v.dim is None for v in affine.values()):
        nodes = [v.node if isinstance(v, Packed) else None for v in given.values()]
        return Packed(emitter.call(function, value.node, shape, *nodes, eps), value.dim), bundle.name
    # bfloat16 in, float32 weights (autocast): computed in float32 and rounded once, as one kernel does it.
    given_as, weight = value.node, next(iter(affine.values())).node
    mixed = given_as.meta["val"].dtype is not weight.meta["val"].dtype
    if mixed:
        value = Packed(emitter.call("type_as", given_as, weight), value.dim)
    out = Packed(emitter.call(function, value.node, shape, *([None] * len(names)), eps), value.dim)
    nodes, lane = aligned(emitter, [(out, lane_rank), *((v, len(shape)) for v in affine.values())], lane_rank)
    # A launch less; but the backward of addcmul holds, and writes, one more tensor of all lanes: that decides where time does not.
    options = ("addcmul", "mul_add") if emitter.prefer else ("mul_add", "addcmul")
    if len(affine) == 2 and emitter.choose(bundle, options) == "mul_add":
        node = emitter.call(torch.add, emitter.call(torch.mul, nodes[0], nodes[1]), nodes[2])
    elif len(affine) == 2:
        node = emitter.call(torch.addcmul, nodes[2], nodes[0], nodes[1])
    else:
        node = emitter.call(torch.mul if "weight" in affine else torch.add, nodes[0], nodes[1])
    return Packed(emitter.call("type_as", node, given_as) if mixed else node, lane), bundle.name
