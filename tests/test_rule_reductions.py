"""Reductions inside lanes: over some dims, over all, and with indices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_ops import LAYOUTS, Ops, assert_ops_fuse

ON_DIMS = "sum mean prod amax amin logsumexp var std nansum nanmean argmax argmin count_nonzero".split()
WITH_INDICES = "max min median nanmedian mode cummax cummin sort".split()

REDUCTIONS: Ops = {
    **{f"{name}({dim})": lambda x, name=name, dim=dim: getattr(torch, name)(x, dim=dim) for name in ON_DIMS for dim in (-1, 1)},
    **{f"{name}().keep": lambda x, name=name: getattr(x, name)(dim=1, keepdim=True) for name in ON_DIMS if name != "count_nonzero"},
    "all": lambda x: (x > 0).all(-1),
    "any": lambda x: torch.any(x > 0.8, dim=1),
    "any keep": lambda x: (x > 0.8).any(1, keepdim=True),
}
WHOLE: Ops = {
    **{f"{name}()": lambda x, name=name: getattr(x, name)() for name in "sum mean prod max min amax argmax argmin std var norm".split()},
    "all": lambda x: (x > 0).all(),
    "any": lambda x: torch.any(x > 0.8),
    "nonzero": lambda x: torch.count_nonzero(x > 0),
    "sum of two": lambda x: x.sum((1, 2)),
    "mean keep": lambda x: x.mean((-2, -1), keepdim=True),
    "var of two": lambda x: torch.var(x, (1, 2)),
    "max of ties": lambda x: F.relu(x).max(),
    "amax of ties": lambda x: F.relu(x).amax((1, 2)),
    "logsumexp": lambda x: x.logsumexp((1, 2)),
    "correction": lambda x: x.var(-1, correction=0),
    "unbiased": lambda x: x.var(-1, unbiased=False),
    "positional": lambda x: x.std(-1, False),
    "std": lambda x: torch.std(x, dim=1, unbiased=False, keepdim=True),
    "var_mean": lambda x: torch.var_mean(x, dim=-1),
    "std_mean": lambda x: torch.std_mean(x, -1, keepdim=True),
    "var_mean()": lambda x: torch.var_mean(x),
    "dtype": lambda x: x.sum(-1, dtype=x.dtype),
    "norm": lambda x: x.norm(dim=-1),
    "norm 1": lambda x: x.norm(p=1, dim=-1, keepdim=True),
    "fro": lambda x: torch.norm(x, "fro", dim=-1),
    "norm of two": lambda x: torch.norm(x, dim=(1, 2)),
    "linalg": lambda x: torch.linalg.norm(x, dim=-1),
    "linalg()": lambda x: torch.linalg.norm(x),
    "inf": lambda x: torch.linalg.norm(x, float("inf"), 1),
    "vector": lambda x: torch.linalg.vector_norm(x, dim=-1),
    "vector 1": lambda x: torch.linalg.vector_norm(x, 1, (1, 2), keepdim=True),
    "matrix": lambda x: torch.linalg.matrix_norm(x),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "normalize 1": lambda x: F.normalize(x, p=1, dim=1),
    "trace": lambda x: x.sum(0).trace(),
}
INDICES: Ops = {
    **{f"{name}({dim})": lambda x, name=name, dim=dim: tuple(getattr(torch, name)(x, dim=dim)) for name in WITH_INDICES for dim in (-1, 1)},
    "values": lambda x: x.max(dim=-1).values,
    "indices": lambda x: x.max(-1)[1],
    "keep": lambda x: x.min(1, keepdim=True)[0],
    "topk": lambda x: tuple(x.topk(2, dim=-1)),
    "topk 1": lambda x: torch.topk(x, 2, dim=1, largest=False)[0],
    "topk mask": lambda x: x * (x >= x.topk(2, -1)[0][..., -1:]),
    "kthvalue": lambda x: tuple(x.kthvalue(2, dim=-1)),
    "descending": lambda x: tuple(x.sort(1, descending=True)),
    "sort()": lambda x: x.sort()[0],
    "stable": lambda x: torch.sort(x, stable=True)[0],
    "msort": lambda x: x.msort(),
    "quantile": lambda x: x.quantile(0.3, dim=-1),
    "aminmax": lambda x: tuple(torch.aminmax(x, dim=1)),
    "quantiles": lambda x: torch.quantile(x, torch.tensor([0.1, 0.5], dtype=x.dtype), dim=-1),
    "max of ties": lambda x: F.relu(x).max(1)[1],
}
FAMILIES: dict[str, Any] = {"reductions": REDUCTIONS, "whole": WHOLE, "indices": INDICES}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_reductions(family: str, layout: str) -> None:
    assert_ops_fuse(FAMILIES[family], (4, 6), layout)
