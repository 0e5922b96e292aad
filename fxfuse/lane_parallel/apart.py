"""Are two runs of one call the same but for rounding?

Comes in: what the unsharded and the sharded model answered. Goes out: a sentence on what differs, or nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxfuse.checking.difference import distances
from fxfuse.checking.runs import Run

_EXACT = 1e-10  # of float64: the largest relative difference of a tensor, in the norm
_KINDS = ("outputs", "input_gradients", "parameter_gradients", "buffers")


def apart(one: Run, other: Run) -> str:
    """What differs most, in a sentence; empty where nothing does but rounding.

    A tensor passes whose distance, in the Euclidean norm, is at most ``1e-10`` of its norm in float64, the root of the eps in a narrower
    dtype; or that fraction of the mean norm of its kind, for tensors that are zero but for rounding.

    >>> apart(Run(outputs={"y": torch.ones(2)}), Run(outputs={"y": torch.tensor([1.0, 2.0])}))
    'output y differs by 0.71 of its norm'
    """
    for kind in _KINDS:
        said = _of_kind(kind[:-1].replace("_", " "), getattr(one, kind), getattr(other, kind), other)
        if said:
            return said
    for name, flag in one.flags.items():
        if other.flags.get(name) is not flag:
            return f"output {name} has requires_grad={other.flags.get(name)}, unsharded {flag}"
    return ""


def _of_kind(kind: str, ours: dict[str, Any], theirs: dict[str, Any], other: Run) -> str:
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for name in dict.fromkeys([*ours, *theirs]):
        a, b = ours.get(name), theirs.get(name)
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
            if isinstance(a, Tensor) or isinstance(b, Tensor) or (name in ours) is not (name in theirs) or a != b:
                return f"{kind} {name} is {_brief(b)}, unsharded {_brief(a)}"
            continue
        if a.dtype is not b.dtype or a.shape != b.shape:
            return f"{kind} {name} is {_brief(b)}, unsharded {_brief(a)}"
        if kind == "output" and any(s != t for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True) if n > 1):
            return f"{kind} {name} has strides {b.stride()}, unsharded {a.stride()}"
        pairs[name] = a, b
    gaps = dict(zip(pairs, distances(list(pairs.values())), strict=True))
    floor = (sum(gap.norm for gap in gaps.values()) / max(len(gaps), 1)) ** 0.5
    for name, gap in gaps.items():
        dtype = pairs[name][0].dtype
        if gap.note:
            return f"{kind} {name}: {gap.note}"
        if not (dtype.is_floating_point or dtype.is_complex):
            if gap.max_abs:
                return f"{kind} {name} differs in integers"
            continue
        narrowest = max([torch.finfo(dtype).eps, *(torch.finfo(d).eps for d in other.precisions)])
        bound = _EXACT if narrowest < 1e-15 else narrowest**0.5
        distance, norm = gap.squares**0.5, gap.norm**0.5
        if not distance <= bound * max(norm, floor):
            return f"{kind} {name} differs by {distance / max(norm, 1e-300):.2g} of its norm"
    return ""


def _brief(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)[:60]
