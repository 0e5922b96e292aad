"""What the tests of assigned buffers share: modules around a loop and in it, forwards that assign, and the comparison step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checks
import fxfuse
from checks import randn

X = randn(5, 4)


def assert_same_state(fused: nn.Module, model: nn.Module, where: str) -> None:
    """Every buffer of the original, saved or not, as it is found in both; and nothing with a history."""
    checks.assert_same_buffers(fused, model, where)
    saved = fxfuse.original_state_dict(fused)
    assert [*saved] == [*model.state_dict()]
    for name, want in model.named_buffers():
        path, _, own = name.rpartition(".")
        got = getattr(fused.get_submodule(path), own)
        assert (got.shape, got.dtype, got.requires_grad) == (want.shape, want.dtype, want.requires_grad), name
        checks.assert_close(got.double(), want.double(), f"{where}: {name}")
    assert not any(buffer.requires_grad for buffer in fused.buffers())


def assert_same_steps(model: nn.Module, fused: nn.Module, *, lr: float = 1e-3) -> None:
    """Training, evaluation, two forwards before one backward, and training again: outputs, gradients, buffers."""
    for each in (model, fused):
        each.train()
    optimizers = [torch.optim.SGD(each.parameters(), lr) for each in (model, fused)]
    for step in range(6):
        xs = [randn(3 + step, 4, seed=10 * step + n) for n in range(2 if step in (2, 5) else 1)]
        if step == 3:
            for each in (model, fused):
                each.eval()
            with torch.no_grad():
                checks.assert_close(fused(xs[0]), model(xs[0]), "output in eval mode")
            assert_same_state(fused, model, "after eval mode")
            for each in (model, fused):
                each.train()
        outs = []
        for each, optimizer in zip((model, fused), optimizers, strict=True):
            optimizer.zero_grad()
            given = [x.clone().requires_grad_() for x in xs]
            out = [each(x) for x in given]
            sum(one.square().mean() for one in out).backward()  # type: ignore[union-attr]
            optimizer.step()
            outs.append([*(one.detach() for one in out), *(x.grad for x in given)])
        for number, (want, got) in enumerate(zip(*outs, strict=True)):
            checks.assert_close(got, want, f"step {step}: result {number}", 1e-9)
        assert_same_state(fused, model, f"step {step}")
    weights = fxfuse.original_state_dict(fused)
    for name, parameter in model.named_parameters():
        checks.assert_close(weights[name], parameter.detach(), name, 1e-9)
    assert not fxfuse.report(fused).fallbacks


class Around(nn.Module):
    """Four networks, and buffers of the module around them; ``forward`` is the test's."""

    def __init__(self, forward: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)) for _ in range(4))
        self.own = forward
        self.register_buffer("center", torch.zeros(4, 3))
        self.register_buffer("other", torch.zeros(4, 3), persistent=False)
        self.register_buffer("square", torch.zeros(3, 3))
        self.register_buffer("other_square", torch.zeros(3, 3))
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("seen", torch.tensor(0))

    def forward(self, x: Tensor) -> Any:
        return self.own(self, x)


def hidden(self: Any, x: Tensor) -> Tensor:
    return torch.stack([net(x) for net in self.nets], 1)


def detached(self: Any, x: Tensor) -> Tensor:
    h = hidden(self, x)
    self.center = self.center * 0.9 + 0.1 * h.mean(0).detach()
    return h - self.center


def untracked(self: Any, x: Tensor) -> Tensor:
    h = hidden(self, x)
    with torch.no_grad():
        self.center = torch.lerp(self.center, h.mean(0), 0.1)
        self.steps = self.steps + 1
        self.seen = self.seen + x.shape[0]
    return h * self.center / self.steps


def read_before(self: Any, x: Tensor) -> Tensor:
    """Its values are saved for a backward that comes after they are overwritten."""
    h = hidden(self, x)
    out = torch.tanh(h) * self.center / (1 + self.center.exp().sum())
    self.center = h.detach().mean(0)
    return out


def while_training(self: Any, x: Tensor) -> Tensor:
    """The center of DINO (Caron et al., 2021)."""
    h = hidden(self, x)
    out = F.log_softmax((h - self.center) / 0.3, -1)
    if self.training:
        self.center = self.center * 0.9 + h.detach().mean(0) * 0.1
    return out


def several(self: Any, x: Tensor) -> Tensor:
    h = hidden(self, x)
    self.steps = self.steps + 1
    self.other = 0.9 * self.other + 0.1 * h.detach().std(0)
    self.center = self.center + (h.detach().mean(0) - self.center) / self.steps
    self.square = 0.5 * self.square + h.detach().flatten(0, 1).t() @ h.detach().flatten(0, 1)
    return (h - self.center) / (self.other + 1) @ self.square


def handed_on(self: Any, x: Tensor) -> Tensor:
    """One buffer gets the tensor that the other has held."""
    h = hidden(self, x)
    self.other = self.center
    self.center = h.detach().mean(0)
    return h * self.other + self.center


def handed_on_at_last(self: Any, x: Tensor) -> Tensor:
    h = hidden(self, x)
    before = self.center
    self.center = h.detach().mean(0)
    self.other = before
    return h * self.other + self.center


class Lane(nn.Module):
    """A layer with statistics of its own; ``forward`` is the test's."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.own = forward
        self.register_buffer("center", torch.zeros(3))
        self.register_buffer("table", torch.zeros(2, 3), persistent=False)
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.own(self, x)


class Lanes(nn.Module):
    def __init__(self, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(Lane(forward) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([net(x) for net in self.nets], 1)


def lane_average(self: Any, x: Tensor) -> Tensor:
    h = self.layer(x)
    out = h * self.center
    with torch.no_grad():
        self.center = torch.lerp(self.center, h.mean(0), 0.1)
        self.steps = self.steps + 1
    return out + h


def lane_handed_on(self: Any, x: Tensor) -> Tensor:
    h = self.layer(x)
    self.table = torch.cat([self.center.unsqueeze(0), self.table[:1]])
    self.center = h.detach().mean(0)
    return h + self.table.mean(0) * self.center
