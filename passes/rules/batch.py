"""Ops whose dim 0 is a batch that they leave alone: pooling, resizing, patches. Lanes are folded into that batch.

Where the lanes have no batch of their own (``[C, H, W]``), the lanes are the batch.
"""

from __future__ import annotations

import operator
from typing import Any

import torch

from ..bundle import Bundle
from ..emit import Emitter
from ..writer import CannotVectorize, Packed
from .base import rank, rule, shared, tensors, unpacked
from .fold import fold, unfold


def in_batch(emitter: Emitter, bundle: Bundle, unbatched: int | None) -> Packed:
    """The op with the lanes in its batch. ``unbatched``: the rank of an operand without a batch; None where it always has one."""
    op = bundle.op
    assert op is not None
    args = tensors(emitter, bundle)
    packed = {name: value for name, value in args.items() if isinstance(value, Packed)}
    lanes = len(bundle.members)
    if shared(*packed.values()) and not op.random:
        return Packed(emitter.respell(op, unpacked(args)), None)
    lane_rank = rank(bundle.members[0].args[0])
    if lane_rank == unbatched:
        args.update((name, emitter.front(value, lanes)) for name, value in packed.items())
        return Packed(emitter.respell(op, unpacked(args)), 0)
    if unbatched is not None and lane_rank != unbatched + 1:
        raise CannotVectorize(f"{bundle.name} of a tensor with {lane_rank} dims")
    place = 0
    if len(packed) == 1:
        ((name, value),) = packed.items()
        args[name], place = fold(emitter, Packed(emitter.front(value, lanes), 0) if value.dim is None else value)
    else:
        args.update((name, emitter.call(torch.flatten, emitter.front(value, lanes), 0, 1)) for name, value in packed.items())
    return unfolded(emitter, emitter.respell(op, unpacked(args)), place, lanes)


def unfolded(emitter: Emitter, node: Any, place: int, lanes: int) -> Packed:
    """The lanes taken out of the batch, of one tensor or of each of several."""
    several = node.meta["val"]
    if isinstance(several, torch.Tensor):
        return unfold(emitter, node, place, lanes)
    pieces = [unfold(emitter, emitter.call(operator.getitem, node, index), place, lanes).node for index in range(len(several))]
    return Packed(emitter.call(tuple, pieces), place)


def _spatial(kinds: str, end: str = "") -> tuple[str, ...]:
    return tuple(f"{kind}_pool{d}d{end}" for kind in kinds.split() for d in (1, 2, 3))


@rule(*_spatial("max avg lp adaptive_max adaptive_avg"), *_spatial("max adaptive_max", "_with_indices"), lowering="fold into batch")
def _pool(emitter: Emitter, bundle: Bundle) -> Packed:
    return in_batch(emitter, bundle, int(bundle.name.split("pool")[1][0]) + 1)


@rule("max_unpool1d", "max_unpool2d", "max_unpool3d", lowering="fold into batch")
def _max_unpool(emitter: Emitter, bundle: Bundle) -> Packed:
    return in_batch(emitter, bundle, int(bundle.name[-2]) + 1)


@rule("fractional_max_pool2d", "fractional_max_pool3d", "fractional_max_pool2d_with_indices", "fractional_max_pool3d_with_indices")
def _fractional_pool(emitter: Emitter, bundle: Bundle) -> Packed:
    raise CannotVectorize(f"{bundle.name} draws its own windows for every sample of the batch")


@rule("interpolate", "channel_shuffle", lowering="fold into batch")
def _resize(emitter: Emitter, bundle: Bundle) -> Packed:
    return in_batch(emitter, bundle, None)


@rule("grid_sample", lowering="fold into batch")
def _grid_sample(emitter: Emitter, bundle: Bundle) -> Packed:
    return in_batch(emitter, bundle, None)


@rule("affine_grid", lowering="fold into batch")
def _affine_grid(emitter: Emitter, bundle: Bundle) -> Packed:
    op, lanes = bundle.op, len(bundle.members)
    assert op is not None
    args = tensors(emitter, bundle)
    if args["theta"].dim is None:
        return Packed(emitter.respell(op, unpacked(args)), None)
    node, place = fold(emitter, args["theta"])
    own: Any = bundle.members[0].args[0]
    batch = emitter.call("size", node, 0) if 0 in own.meta["dyn"] else node.meta["val"].shape[0]  # the op takes it as a number
    args.update(theta=node, size=(batch, *args["size"][1:]))
    return unfolded(emitter, emitter.respell(op, unpacked(args)), place, lanes)


@rule("fold", lowering="fold into batch")
def _fold(emitter: Emitter, bundle: Bundle) -> Packed:
    return in_batch(emitter, bundle, 2)
