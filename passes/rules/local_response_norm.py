"""LocalResponseNorm: over neighbouring channels of one sample, without weights: lanes folded into the batch."""

from __future__ import annotations

import torch.nn.functional as F

from ..bundle import Bundle
from ..emit import Emitter
from ..writer import Packed
from .base import rule
from .fold import fold, unfold


@rule("local_response_norm", lowering="fold into batch")
def _local_response_norm(emitter: Emitter, bundle: Bundle) -> Packed:
    x = emitter.operand(bundle, "input")
    rest = [emitter.operand(bundle, name) for name in ("size", "alpha", "beta", "k")]
    if x.dim is None:
        return Packed(emitter.call(F.local_response_norm, x.node, *rest), None)
    node, place = fold(emitter, x)
    return unfold(emitter, emitter.call(F.local_response_norm, node, *rest), place, len(bundle.members))
