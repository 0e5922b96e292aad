"""BatchNorm and InstanceNorm: every channel of every lane has statistics of its own, so lanes are merged with the channels.

With statistics from the buffers (eval mode) and one module for all lanes, and for InstanceNorm with one scale for all, lanes are folded
into the batch instead. In train mode the packed running statistics are written in place by the one call, as each lane's are by its own.
"""

from __future__ import annotations

import torch.nn.functional as F

from fxfuse.functional import cumulative_batch_norm

from ..bundle import Bundle, Node
from ..emit import Emitter
from ..writer import Packed
from .base import rule
from .channels import all_shared, merged, parted, per_channel
from .fold import fold, unfold
from .state import state, update

_TENSORS = ("running_mean", "running_var", "weight", "bias")


@rule("batch_norm", heavy=True)
def _batch_norm(emitter: Emitter, bundle: Bundle) -> tuple[Packed, str]:
    training, momentum, eps = (emitter.operand(bundle, name) for name in ("training", "momentum", "eps"))
    x, lanes = emitter.operand(bundle, "input"), len(bundle.members)
    if all_shared(bundle, *_TENSORS) and (not training or x.dim is None):
        return _shared(emitter, bundle, x, training, momentum, eps)
    given = {name: per_channel(emitter, bundle, name) for name in _TENSORS}
    keywords = {"training": True} if training else {}
    out = emitter.call(F.batch_norm, merged(emitter, x, lanes), *_trimmed(given), **keywords, eps=eps)
    return parted(emitter, out, lanes), "batch_norm"


@rule("instance_norm", heavy=True)
def _instance_norm(emitter: Emitter, bundle: Bundle) -> tuple[Packed, str]:
    own, momentum, eps = (emitter.operand(bundle, name) for name in ("use_input_stats", "momentum", "eps"))
    x, lanes = emitter.operand(bundle, "input"), len(bundle.members)
    if all_shared(bundle, *_TENSORS):
        return _shared(emitter, bundle, x, own, momentum, eps)
    given = [per_channel(emitter, bundle, name) for name in _TENSORS]
    out = emitter.call(F.instance_norm, merged(emitter, x, lanes), *given, own, momentum, eps)
    return parted(emitter, out, lanes), "instance_norm"


def _trimmed(given: dict[str, Node | None]) -> list[Node | None]:
    """Without the arguments left out at the end."""
    values = list(given.values())
    while len(values) > 2 and values[-1] is None:
        values.pop()
    return values


def _shared(emitter: Emitter, bundle: Bundle, x: Packed, own_statistics: bool, momentum: float, eps: float) -> tuple[Packed, str]:
    given = [None if emitter.nodes(bundle, name) is None else emitter.operand(bundle, name).node for name in _TENSORS]
    function = F.instance_norm if bundle.name == "instance_norm" else F.batch_norm
    if x.dim is None:
        return Packed(emitter.call(function, x.node, *given, own_statistics, momentum, eps), None), "shared"
    node, place = fold(emitter, x)
    out = emitter.call(function, node, *given, own_statistics, momentum, eps)
    return unfold(emitter, out, place, len(bundle.members)), "fold into batch"


@rule("batch_norm_update", "instance_norm_update", heavy=True)
def _with_running_statistics(emitter: Emitter, bundle: Bundle) -> tuple[Packed, str]:
    lanes = len(bundle.members)
    x = merged(emitter, emitter.operand(bundle, "input"), lanes)
    mean, var = state(emitter, bundle, "running_mean"), state(emitter, bundle, "running_var")
    weight, bias = per_channel(emitter, bundle, "weight"), per_channel(emitter, bundle, "bias")
    momentum, eps = emitter.operand(bundle, "momentum"), emitter.operand(bundle, "eps")
    function, name = (F.batch_norm, "batch_norm") if bundle.name == "batch_norm_update" else (F.instance_norm, "instance_norm")
    out = update(emitter, function, x, mean, var, weight, bias, True, momentum, eps)
    return parted(emitter, out, lanes), name


@rule("cumulative_batch_norm", heavy=True)
def _cumulative(emitter: Emitter, bundle: Bundle) -> tuple[Packed, str]:
    lanes = len(bundle.members)
    x = merged(emitter, emitter.operand(bundle, "input"), lanes)
    mean, var = state(emitter, bundle, "running_mean"), state(emitter, bundle, "running_var")
    counter = emitter.front(emitter.operand(bundle, "counter"), lanes)  # counted up before: only read here
    weight, bias = per_channel(emitter, bundle, "weight"), per_channel(emitter, bundle, "bias")
    out = update(emitter, cumulative_batch_norm, x, mean, var, counter, weight, bias, emitter.operand(bundle, "eps"))
    return parted(emitter, out, lanes), "batch_norm"
