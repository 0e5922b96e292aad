"""Forwards that say themselves what autograd keeps: ``save_on_cpu``, ``saved_tensors_hooks``, ``checkpoint``. A graph would drop that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import fxfuse
from checks import assert_equal_models, model_of, randn, randomized

X = randn(5, 6)


def lanes(self: nn.Module, h: Tensor) -> Tensor:
    return torch.stack([net(h) for net in self.nets])


def kept_on_the_cpu(self: nn.Module, x: Tensor) -> Any:
    with save_on_cpu():
        return lanes(self, x)


def hooked(self: nn.Module, x: Tensor) -> Any:
    with saved_tensors_hooks(torch.clone, lambda tensor: tensor):
        hs = [net(x) for net in self.nets]
    return torch.stack(hs)


def checkpointed_lanes(self: nn.Module, x: Tensor) -> Any:
    return torch.stack([checkpoint(net, x, use_reentrant=False) for net in self.nets])


def checkpointed_loop(self: nn.Module, x: Tensor) -> Any:
    return checkpoint(lambda h: lanes(self, h), x, use_reentrant=False)


def hooked_after_the_loop(self: nn.Module, x: Tensor) -> Any:
    y = lanes(self, x)
    with save_on_cpu():
        return y.tanh().exp()


def made(forward: Callable[..., Any]) -> nn.Module:
    return randomized(model_of(forward, nets=nn.ModuleList(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)) for _ in range(4))))


@pytest.mark.parametrize(
    "forward", [kept_on_the_cpu, hooked, checkpointed_lanes, checkpointed_loop, hooked_after_the_loop], ids=lambda f: str(f.__name__)
)
def test_such_a_forward_stays_and_says_so(forward: Callable[..., Any]) -> None:
    model = made(forward)
    fused = fxfuse.optimize(model, X, objective="launches", tune=False)
    report = fxfuse.report(fused)
    assert not report.fused
    (refusal,) = report.refused
    assert refusal.reason == "keeps what backward needs in its own way (saved_tensors_hooks, save_on_cpu or checkpoint)"
    assert refusal.place is not None
    assert refusal.place.file.endswith("test_saved_hooks.py")
    assert_equal_models(model, fused, [(X, {})])


class Outer(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.first = block, nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.block, self.first(x), use_reentrant=False)


def test_a_block_that_is_checkpointed_as_a_whole_is_fused_inside_and_stays_checkpointed() -> None:
    model = randomized(Outer(made(lanes)))
    fused = fxfuse.optimize(model, X, objective="launches", tune=False)
    report = fxfuse.report(fused)
    assert [region.path for region in report.fused] == ["block"]
    calls: list[str] = []
    for each in (model, fused):
        each.block.register_forward_pre_hook(lambda *_: calls.append("again"))
        each(X).sum().backward()
        assert len(calls) == 2  # once forward, once to compute it again
        calls.clear()
        each.block._forward_pre_hooks.clear()
    assert_equal_models(model, fused, [(X, {}), (randn(3, 6), {})])
    assert not report.fallbacks


def test_hooks_of_the_caller_are_the_callers() -> None:
    """Around fusing, and around a call of the fused model."""
    model = made(lanes)
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: (kept.append(tensor), tensor)[1], lambda tensor: tensor):
        fused = fxfuse.optimize(model, X, objective="launches", tune=False)
        assert fxfuse.report(fused).fused
        kept.clear()
        out = fused(X.clone().requires_grad_())
    assert kept
    out.sum().backward()


class Columns(nn.Module):
    """A network per column."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1)) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1)


@pytest.mark.parametrize("casts", [False, True])
def test_checkpoint_around_a_call_that_makes_a_program(casts: bool) -> None:
    """The first call of a model optimized without inputs, and one that makes a program for autocast."""
    model = randomized(Columns()).float()
    x = randn(5, 6).float().requires_grad_()
    fused = fxfuse.optimize(model, x.detach(), objective="launches") if casts else fxfuse.optimize(model, tune=False)
    gradients = []
    for call in (model, fused):
        x.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=casts):
            checkpoint(call, x, use_reentrant=False).float().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=5e-2 if casts else 1e-4, atol=5e-2 if casts else 1e-5)
    report = fxfuse.report(fused)
    assert report.fused
    assert not report.fallbacks
