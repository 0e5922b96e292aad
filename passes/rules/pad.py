"""Padding inside lanes (also what the ``padding_mode`` of convolutions becomes)."""

from __future__ import annotations

import torch.nn.functional as F

from ..bundle import Bundle
from ..emit import Emitter
from ..writer import Packed
from .base import rank, rule
from .fold import fold, unfold


@rule("pad", lowering="pad")
def _pad(emitter: Emitter, bundle: Bundle) -> Packed:
    value = emitter.operand(bundle, "input")
    amounts, mode = emitter.operand(bundle, "pad"), emitter.operand(bundle, "mode")
    fill = emitter.operand(bundle, "value")
    lanes, lane_rank = len(bundle.members), rank(bundle.members[0].args[0])
    if value.dim is None:
        return Packed(emitter.call(F.pad, value.node, amounts, mode, fill), None)
    padded = len(amounts) // 2
    if mode == "constant":
        if value.dim > lane_rank - padded:  # the padded dims must stay the last ones
            value = Packed(emitter.at(value, 0), 0)
        return Packed(emitter.call(F.pad, value.node, amounts, mode, fill), value.dim)
    if lane_rank == padded + 1:  # [C, ...]: the lanes are the batch
        return Packed(emitter.call(F.pad, emitter.at(value, 0), amounts, mode, fill), 0)
    node, place = fold(emitter, value)
    return unfold(emitter, emitter.call(F.pad, node, amounts, mode, fill), place, lanes)
