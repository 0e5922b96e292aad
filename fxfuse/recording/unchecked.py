"""Operations of torch whose kernels trust the sizes they are given: with sizes that do not fit they write into foreign memory.

Comes in: a call that is about to be recorded, maybe with other sizes than its author ever saw. Goes out: nothing, or the ``RuntimeError``
that torch raises for other operations in such a case, so that these sizes are known not to go together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> None:
    """One length for each row. The kernel for the first and the last dim (aten, WeightNorm.cpp, torch 2.13) writes as many as ``v`` has."""
    if v.dim() and dim in (0, v.dim() - 1) and g.numel() != v.shape[dim]:
        raise RuntimeError(f"_weight_norm: {g.numel()} lengths for {v.shape[dim]} rows")


UNCHECKED: dict[str, Callable[..., Any]] = {"_weight_norm": _weight_norm, "_weight_norm_interface": _weight_norm}
"""By the name of the function: called with its arguments, raises where they do not fit."""
