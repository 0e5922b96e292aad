"""GroupNorm: lanes merged with the channels, as many groups per lane as before; with one scale for all lanes, folded into the batch."""

from __future__ import annotations

import torch.nn.functional as F

from ..bundle import Bundle
from ..emit import Emitter
from ..writer import Packed
from .base import rule
from .channels import all_shared, merged, parted, per_channel
from .fold import fold, unfold


@rule("group_norm", heavy=True)
def _group_norm(emitter: Emitter, bundle: Bundle) -> tuple[Packed, str]:
    x, lanes = emitter.operand(bundle, "input"), len(bundle.members)
    groups, eps = emitter.operand(bundle, "num_groups"), emitter.operand(bundle, "eps")
    if all_shared(bundle, "weight", "bias"):
        weight, bias = (None if emitter.nodes(bundle, n) is None else emitter.operand(bundle, n).node for n in ("weight", "bias"))
        if x.dim is None:
            return Packed(emitter.call(F.group_norm, x.node, groups, weight, bias, eps), None), "shared"
        node, place = fold(emitter, x)
        return unfold(emitter, emitter.call(F.group_norm, node, groups, weight, bias, eps), place, lanes), "fold into batch"
    weight, bias = per_channel(emitter, bundle, "weight"), per_channel(emitter, bundle, "bias")
    out = emitter.call(F.group_norm, merged(emitter, x, lanes), groups * lanes, weight, bias, eps)
    return parted(emitter, out, lanes), "group_norm"
