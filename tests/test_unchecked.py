"""Kernels that trust the sizes they are given are never run with sizes that do not fit: torch would write into foreign memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fxfuse
from checks import assert_equal_models, model_of, randn
from fxfuse.recording.unchecked import UNCHECKED


class Sizes(TorchDispatchMode):
    """Rows and lengths of every ``_weight_norm`` that is run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._weight_norm_interface.default:
            v, g, dim = (*args, 0)[:3]
            self.seen.append((v.shape[dim], g.numel()))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dim", [0, 1])
def test_weight_norm_of_inputs(dim: int) -> None:
    """The rows of ``v`` alone are never another number, whatever sizes fxfuse tries; both together may be."""
    def forward(self: nn.Module, v: Tensor, g: Tensor) -> Tensor:
        return torch.stack([net(torch._weight_norm(v[i], g[i], dim)) for i, net in enumerate(self.nets)])

    model = model_of(forward, nets=nn.ModuleList(nn.Linear(4, 2) for _ in range(3))).double()
    v, g = randn(3, 5, 4), randn(3, 5, 1) if dim == 0 else randn(3, 1, 4)
    with Sizes() as sizes:
        fused = fxfuse.optimize(model, (v, g), objective="launches")
    assert sizes.seen
    assert all(rows == lengths for rows, lengths in sizes.seen)
    assert_equal_models(model, fused, [((v, g), {}), ((randn(3, 5, 4), g), {})])


@pytest.mark.parametrize(("v", "g", "dim"), [((3, 4), (2, 1), 0), ((3, 4), (1, 3), 1), ((3, 4), (1,), 0)])
def test_what_does_not_fit_raises(v: tuple[int, ...], g: tuple[int, ...], dim: int) -> None:
    with pytest.raises(RuntimeError, match="lengths for"):
        UNCHECKED["_weight_norm"](randn(*v), randn(*g), dim)


def test_norms_over_everything_have_one_length() -> None:
    """Neither the first nor the last dim: torch multiplies there, and checks the sizes by that."""
    UNCHECKED["_weight_norm"](randn(3, 4), randn(1)[0], -1)
    UNCHECKED["_weight_norm"](randn(3, 4, 2), randn(1, 4, 1), 1)
