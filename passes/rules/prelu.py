"""PReLU with a slope per lane: lanes merged with the channels, whose slopes ``F.prelu`` takes one each."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..bundle import Bundle
from ..emit import Emitter
from ..writer import Packed
from .base import rank, rule


@rule("prelu", lowering="prelu")
def _prelu(emitter: Emitter, bundle: Bundle) -> Packed:
    x, weight = emitter.operand(bundle, "input"), emitter.operand(bundle, "weight")
    lanes, lane_rank = len(bundle.members), rank(bundle.members[0].args[0])
    slopes = bundle.members[0].args[1].meta["shape"][0]  # type: ignore[union-attr]
    if weight.dim is None and (x.dim is None or slopes == 1):
        return Packed(emitter.call(F.prelu, x.node, weight.node), x.dim)
    if x.dim is None:
        x = Packed(emitter.front(x, lanes), 0)
    per_lane = emitter.front(weight, lanes)  # [G, slopes]
    if lane_rank < 2:  # [N] or []: a lane is one channel
        node = x.node if lane_rank == 0 else emitter.at(x, 1)
        flat = emitter.call(torch.flatten, per_lane, 0, 1)
        if lane_rank == 0:
            node = emitter.call(torch.unsqueeze, node, 0)
            return Packed(emitter.call(torch.squeeze, emitter.call(F.prelu, node, flat), 0), 0)
        return Packed(emitter.call(F.prelu, node, flat), 1)
    channels = x.node.meta["val"].shape[1 if x.dim > 1 else 2]
    merged = emitter.call(torch.flatten, emitter.at(x, 1), 1, 2)
    wide = per_lane if slopes == channels else emitter.call("expand", per_lane, (-1, channels))
    out = emitter.call(F.prelu, merged, emitter.call(torch.flatten, wide, 0, 1))
    return Packed(emitter.call(torch.unflatten, out, 1, (lanes, -1)), 1)
