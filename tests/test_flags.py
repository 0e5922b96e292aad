"""What results say of themselves: ``requires_grad``, ``is_leaf``, views; as the original's, whoever calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from checks import assert_equal_models, model_of, randn, randomized
from fxfuse.private.pytree import tree_leaves

X = randn(5, 6)


def hidden(self: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([net(x) for net in self.nets], 1)


def overwritten(self: nn.Module, x: Tensor) -> Any:
    h = hidden(self, x)
    h.copy_(h.detach() * 2)
    return h


def overwritten_lanes(self: nn.Module, x: Tensor) -> Any:
    hs = [net(x) for net in self.nets]
    for h in hs:
        h.copy_(h.detach().flip(1))
    return torch.stack(hs)


def overwritten_by_slices(self: nn.Module, x: Tensor) -> Any:
    hs = [net(x) for net in self.nets]
    for h in hs:
        d = h.detach()
        h[:, 0:2] = d[:, 0:2] * 2
        h[:, 2:] = d[:, :3].tanh()
    return hs


def overwritten_as_a_whole(self: nn.Module, x: Tensor) -> Any:
    hs = [net(x) for net in self.nets]
    for h in hs:
        h[:, 0:5] = h.detach() * 2
    return torch.stack(hs)


def filled(self: nn.Module, x: Tensor) -> Any:
    out = torch.zeros(x.shape[0], 20, dtype=x.dtype)
    for i, net in enumerate(self.nets):
        out[:, 5 * i : 5 * i + 5] = net(x).detach()
    return out


def views_without_grad(self: nn.Module, x: Tensor) -> Any:
    hs = [net(x) for net in self.nets]
    h = torch.cat(hs, 1)
    with torch.no_grad():
        return hs[0][:, :2], h.view(-1), h, [each.clone() for each in hs]


def flagged(self: nn.Module, x: Tensor) -> Any:
    h = hidden(self, x)
    return h.detach().requires_grad_(), h.data


def flagged_and_used(self: nn.Module, x: Tensor) -> Any:
    h = hidden(self, x).detach().clone().requires_grad_()
    return h * 2, h


FORWARDS: dict[str, Callable[..., Any]] = {
    f.__name__: f
    for f in (
        overwritten, overwritten_lanes, overwritten_by_slices, overwritten_as_a_whole, filled, views_without_grad, flagged, flagged_and_used
    )
}  # fmt: skip


@pytest.mark.parametrize("name", FORWARDS)
def test_flags_of_results(name: str) -> None:
    model = randomized(model_of(FORWARDS[name], nets=nn.ModuleList(nn.Linear(6, 5) for _ in range(4))))
    fused = fxfuse.optimize(model, X, objective="launches", tune=False, validate=False)
    assert fxfuse.report(fused).fused
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        for requires_grad in (False, True):
            flags = []
            for each in (model, fused):
                with context():
                    out = tree_leaves(each(X.clone().requires_grad_(requires_grad)))
                flags.append([(leaf.requires_grad, leaf.is_leaf, leaf._is_view()) for leaf in out])
            assert flags[0] == flags[1], (context.__name__, requires_grad)
    if name not in ("flagged", "flagged_and_used"):  # their results are leaves that take gradients themselves
        assert_equal_models(model, fused, [(X, {}), (randn(3, 6), {})])
    assert not fxfuse.report(fused).fallbacks


def test_validation_finds_a_flag_that_only_the_example_as_given_shows() -> None:
    """With inputs that need gradients both results need one."""
    class Other(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.ones((), dtype=x.dtype, requires_grad=True)

    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.ones((), dtype=x.dtype)

    result = fxfuse.verify(Plain(), Other(), X)
    assert not result.ok
    assert "requires_grad is True, in the original False" in result.reason
    assert fxfuse.verify(Plain(), Plain(), X).ok


class SlicedUntracked(nn.Module):
    """Lanes that scale a view made under ``no_grad``, which has its base's flag and no history."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList(nn.Parameter(randn(3, seed=seed)) for seed in range(3))

    def forward(self, x: Tensor) -> Tensor:
        out = []
        for scale in self.scales:
            with torch.no_grad():
                part = x[:, ::2]
            out.append((part * scale).tanh())
        return torch.stack(out)


@pytest.mark.parametrize("needs", [False, True])
@pytest.mark.parametrize("recorded", [False, True])
def test_a_flag_without_a_history_is_refused(recorded: bool, needs: bool) -> None:
    model, x = SlicedUntracked(), randn(5, 6)
    fused = fxfuse.optimize(model, x.clone().requires_grad_(recorded), objective="launches")
    assert fxfuse.report(fused).fused, fxfuse.report(fused)
    x = x.clone().requires_grad_(needs)
    assert fused(x).requires_grad
    model.requires_grad_(False)
    frozen = fxfuse.optimize(model, x.detach().requires_grad_(recorded), objective="launches", validate=False)
    assert not fxfuse.report(frozen).fused
    reasons = [refusal.reason for refusal in fxfuse.report(frozen).refused if "test_flags.py:" in str(refusal.place)]
    assert "a result needs a gradient for a view under no_grad alone, and has none to give" in reasons
    assert frozen(x).requires_grad is model(x).requires_grad is needs
