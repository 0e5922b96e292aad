"""Regions planned by hand (tests/hand_built.py) and installed: a model before and after, and the comparison of both in training."""

from __future__ import annotations

import copy

import torch
from hand_built import Model, feature_plan, randomize
from torch import Tensor, nn

from fxfuse import fused
from fxfuse.running import install
from fxfuse.weights import packing

F64 = torch.float64
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def pair(strict: bool = True, packing: str = "packed", cat: bool = False) -> tuple[nn.Module, nn.Module]:
    original = randomize(Model().double())
    return original, install.install(copy.deepcopy(original), [feature_plan(cat=cat)], strict=strict, packing=packing)


def data(n: int = 6) -> Tensor:
    return torch.randn(n, 5, dtype=F64)


def fell_back(model: nn.Module) -> list[str]:
    return [reason for state in fused.regions(model).values() for reason in state.fallbacks]


def assert_same_training(original: nn.Module, model: nn.Module) -> None:
    """Outputs, input gradients and parameter gradients agree, in train and eval mode."""
    for mode in (True, False):
        original.train(mode)
        model.train(mode)
        x = data()
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        for m in (original, model):
            m.zero_grad()
        ya, yb = original(a), model(b)
        torch.testing.assert_close(yb, ya, **CLOSE)
        for y in (ya, yb):  # a sum of squares alone would be constant behind the BatchNorm
            (y * torch.linspace(0.5, 2, y.numel(), dtype=F64).view_as(y)).square().sum().backward()
        assert max(p.grad.abs().max() for p in original.core.parameters()) > 1e-4
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-10, atol=1e-10)
        for name, grad in packing.original_gradients(model).items():
            torch.testing.assert_close(grad, original.get_parameter(name).grad, rtol=1e-10, atol=1e-10, msg=name)
