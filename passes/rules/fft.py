"""Fourier transforms along the lanes' own dims: the same transform of the packed tensor, its dims counted past the lane axis."""

from __future__ import annotations

from typing import Any

from ..bundle import Bundle
from ..emit import Emitter
from ..writer import CannotVectorize, Packed
from .along import counted
from .base import rank, rule, tensors, unpacked

_ONE = tuple(f"fft_{name}" for name in "fft ifft rfft irfft hfft ihfft".split())
_MANY = tuple(f"fft_{name}" for name in "fft2 ifft2 rfft2 irfft2 hfft2 ihfft2 fftn ifftn rfftn irfftn hfftn ihfftn".split())


@rule(*_ONE, *_MANY, "fft_fftshift", "fft_ifftshift", lowering="along a dim")
def _fft(emitter: Emitter, bundle: Bundle) -> Packed:
    op = bundle.op
    assert op is not None
    args: dict[str, Any] = tensors(emitter, bundle)
    value: Packed = args["input"]
    lane_rank = rank(bundle.members[0].args[0])
    if value.dim is None:
        return Packed(emitter.respell(op, unpacked(args)), None)
    if lane_rank == 0:
        raise CannotVectorize(f"{bundle.name} of a single number")
    dims = args["dim"]
    if dims is None:  # all dims, or the last ones where sizes are given
        sizes = args.get("s")
        dims = tuple(range(lane_rank - len(sizes), lane_rank)) if sizes is not None else tuple(range(lane_rank))
    args["dim"] = counted(dims, lane_rank, value.dim)
    return Packed(emitter.respell(op, unpacked(args)), value.dim)
