"""Weight normalization, ``v * g / norm(v)`` with a norm for each entry of one dim: lanes in front, the norm over a lane's other dims."""

from __future__ import annotations

import torch

from ..bundle import Bundle
from ..emit import Emitter
from ..writer import Packed
from .base import numbers, physical, rank, rule


@rule("_weight_norm", lowering="weight norm")
def _weight_norm(emitter: Emitter, bundle: Bundle) -> Packed:
    v, g, dim = (emitter.operand(bundle, name) for name in ("v", "g", "dim"))
    along = numbers(dim)
    lane_rank, lanes = rank(bundle.members[0].args[0]), len(bundle.members)
    if v.dim is None and g.dim is None:
        assert bundle.op is not None
        return Packed(emitter.respell(bundle.op, (v.node, g.node, along)), None)
    direction, magnitude = emitter.front(v, lanes), emitter.front(g, lanes)
    kept = -1 if along == -1 else along % lane_rank  # -1 is torch's own spelling of one norm for the whole tensor
    over = [physical(d, 0) for d in range(lane_rank) if d != kept]
    norm = emitter.call(torch.linalg.vector_norm, direction, 2, over, True)
    if along == -1:
        magnitude = emitter.call(torch.reshape, magnitude, (lanes, *(1 for _ in range(lane_rank))))
    return Packed(emitter.call(torch.mul, direction, emitter.call(torch.div, magnitude, norm)), 0)
