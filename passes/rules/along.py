"""Ops along dims that they name: softmax, scans, sorts, rolls. Every other dim is batch for them, and so are the lanes, wherever they are.

The lane axis stays in its place; the dims are counted past it. Where an op without a dim means all elements in a row (``roll(1)``), the
lanes go in front and each lane is one row.
"""

from __future__ import annotations

import operator
from typing import Any

import torch

from ..bundle import Bundle
from ..emit import Emitter
from ..writer import CannotVectorize, Packed
from .base import physical, rank, rule, sizes_of, tensors, unpacked

DIMS = ("dim", "dims", "dimension", "axis")


def dim_argument(args: dict[str, Any]) -> str:
    """The argument by which the op names its dims."""
    return next(name for name in DIMS if name in args)


def counted(dims: Any, lane_rank: int, lane: int | None) -> Any:
    """The lanes' own dims (a number or several) as dims of the packed value."""
    if isinstance(dims, (tuple, list)):
        return tuple(physical(d % lane_rank, lane) for d in dims)
    return physical(dims % lane_rank, lane)


_ALONG = rule(
    "softmax", "log_softmax", "softmin", "gumbel_softmax", "cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "sort", "argsort",
    "topk", "msort", "normalize", "glu", "diff", "flip", "roll", "repeat_interleave",
    lowering="along a dim",
)  # fmt: skip


def along(emitter: Emitter, bundle: Bundle) -> Packed:
    """The op itself, its dims counted past the lane axis."""
    op = bundle.op
    assert op is not None
    args = tensors(emitter, bundle)
    value = args["logits"] if bundle.name == "gumbel_softmax" else args["input"]
    if not isinstance(value, Packed) or any(isinstance(v, Packed) and v is not value for v in args.values()):
        raise CannotVectorize(f"{bundle.name} with a second tensor")
    lane_rank = rank(bundle.members[0].args[0])
    if value.dim is None:
        if op.random:
            value = Packed(emitter.front(value, len(bundle.members)), 0)
        else:
            return Packed(emitter.respell(op, unpacked(args)), None)
    if lane_rank == 0:
        raise CannotVectorize(f"{bundle.name} of a single number")
    first = next(iter(args))
    if bundle.name == "msort":
        values = emitter.call(operator.getitem, emitter.call(torch.sort, value.node, physical(0, value.dim)), 0)
        return Packed(values, value.dim)
    at = dim_argument(args)
    dims = args[at]
    if dims is None and bundle.name.endswith(("softmax", "softmin")):  # F.softmax without a dim: 0 for ranks 0, 1 and 3, else 1
        dims = 0 if lane_rank in (0, 1, 3) else 1
    if dims is None or dims == ():
        return _as_rows(emitter, bundle, value, args)
    args[first], args[at] = value.node, counted(dims, lane_rank, value.dim)
    return Packed(emitter.respell(op, unpacked(args)), value.dim)


_ALONG(along)


def _as_rows(emitter: Emitter, bundle: Bundle, value: Packed, args: dict[str, Any]) -> Packed:
    """``roll`` and ``repeat_interleave`` of all elements in a row."""
    assert bundle.op is not None
    lanes = len(bundle.members)
    rows = emitter.call("reshape", emitter.front(value, lanes), (lanes, -1))
    if bundle.name == "roll":
        rolled = emitter.call(torch.roll, rows, args["shifts"], 1)
        return Packed(emitter.call("reshape", rolled, (lanes, *sizes_of(emitter, value, bundle.members[0].args[0]))), 0)  # type: ignore[arg-type]
    if bundle.name == "repeat_interleave":
        return Packed(emitter.call(torch.repeat_interleave, rows, args["repeats"], 1), 0)
    raise CannotVectorize(f"{bundle.name} without a dim")


@rule("unfold", lowering="windows")
def _unfold(emitter: Emitter, bundle: Bundle) -> Packed:
    """``Tensor.unfold`` (windows along a dim), or ``F.unfold`` (patches as columns)."""
    from .batch import in_batch

    return along(emitter, bundle) if "dimension" in bundle.op.names else in_batch(emitter, bundle, 3)  # type: ignore[union-attr]
