"""Parts fused by their own first calls, then the model that holds them: it is fused as a whole, on the same Parameters."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from checks import assert_equal_models, randn, randomized
from fxfuse.launches import count

X = randn(5, 6, 3)


class Lane(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.tanh(self.norm(self.first(x))))
        return out


class Part(nn.Module):
    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(map(Lane, widths))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([net(x[:, i]) for i, net in enumerate(self.nets)], -1)


class Whole(nn.Module):
    """Two parts, each a lane of the whole; the heads read both."""

    def __init__(self, widths: tuple[int, ...], *, looped: bool) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Part(widths) for _ in range(2))
        self.heads = nn.ModuleList(nn.Linear(4 * len(widths), 1) for _ in range(3 if looped else 1))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([part(x) for part in self.parts], -1)
        return torch.cat([head(h) for head in self.heads], -1)


def lazily(model: nn.Module, **options: Any) -> nn.Module:
    return fxfuse.optimize(model, tune=False, objective="launches", inplace=True, **options)


def pair(widths: tuple[int, ...], *, looped: bool = True) -> tuple[nn.Module, nn.Module]:
    """The original, and a model whose parts their first calls have fused."""
    model = randomized(Whole(widths, looped=looped))
    holder = copy.deepcopy(model)
    for part in holder.parts:
        lazily(part)
        with torch.no_grad():
            copied = copy.deepcopy(part.state_dict())
            part(X)
            part.load_state_dict(copied)  # running statistics as before
        assert fxfuse.report(part).fused
    return model, holder


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        model(randn(4, 6, 3, seed=step)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("widths", [(4,) * 6, (4, 5, 4, 6, 4, 5)])
def test_the_whole_on_the_same_parameters(widths: tuple[int, ...]) -> None:
    model, holder = pair(widths)
    optimizer = torch.optim.SGD(holder.parameters(), 0.05, momentum=0.9)
    before = dict(holder.named_parameters())
    whole = lazily(holder)
    train(whole, optimizer)
    assert [plan.path for plan in fxfuse.report(whole).fused] == [""]
    assert "parts.0, parts.1 were fused already: taken apart, and fused anew with the whole model" in str(fxfuse.report(whole))
    assert {name: id(p) for name, p in whole.named_parameters()} == {name: id(p) for name, p in before.items()}
    assert not fxfuse.report(whole).fallbacks
    train(model, torch.optim.SGD(model.parameters(), 0.05, momentum=0.9))
    assert_equal_models(model, whole, [(X, {}), (randn(3, 6, 3, seed=8), {})])
    assert count(lambda: whole(X)).heavy < count(lambda: model(X)).heavy / 3


def test_a_copy_whose_parts_are_fused() -> None:
    model, holder = pair((4,) * 6)
    whole = fxfuse.optimize(holder, tune=False, objective="launches")
    whole.train()
    assert_equal_models(model, whole, [(X, {})])
    assert [plan.path for plan in fxfuse.report(whole).fused] == [""]
    assert [plan.path for plan in fxfuse.report(holder.parts[0]).fused] == [""]
    assert_equal_models(model, holder, [(X, {})])


def test_parts_stay_where_the_whole_has_nothing_to_fuse() -> None:
    model, holder = pair((4,) * 6, looped=False)
    launches = count(lambda: holder.eval()(X)).heavy
    whole = lazily(holder, min_lanes=100)
    assert_equal_models(model, whole, [(X, {})])
    assert "parts.0, parts.1 were fused already, and stay so" in str(fxfuse.report(whole))
    assert not fxfuse.report(holder.parts[0]).fallbacks
    assert count(lambda: whole.eval()(X)).heavy == launches
    whole.train()
    train(whole, torch.optim.SGD(whole.parameters(), 0.05))
    train(model, torch.optim.SGD(model.parameters(), 0.05))
    assert_equal_models(model, whole, [(X, {})])


def test_a_raising_call_leaves_the_parts() -> None:
    _, holder = pair((4,) * 6)
    whole = lazily(holder)
    with pytest.raises(IndexError):
        whole(X[:, :3])
    assert [plan.path for plan in fxfuse.report(holder.parts[0]).fused] == [""]
    whole(X.clone())
    assert [plan.path for plan in fxfuse.report(whole).fused] == [""]


def test_a_packed_part_in_a_whole_that_fuses_at_its_first_call() -> None:
    model = randomized(Whole((4,) * 6, looped=True))
    holder = copy.deepcopy(model)
    holder.parts[0] = fxfuse.optimize(holder.parts[0], X, tune=False, objective="launches")
    whole = lazily(holder)
    before = [id(parameter) for parameter in whole.parameters()]
    assert_equal_models(model, whole, [(X, {})])
    assert [id(parameter) for parameter in whole.parameters()] == before
    assert fxfuse.report(whole).refused
    assert "register_hook" not in str(fxfuse.report(whole))


class Halves(nn.Module):
    """Reads the lanes of its part in two halves, by another bundle each."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Part((4,) * 6)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.cat([self.part.nets[i](x[:, i]) for i in range(3)], -1)
        b = torch.cat([self.part.nets[i](torch.relu(x[:, i]) + a[:, :3]) for i in range(3, 6)], -1)
        return torch.cat([a, b], -1)


@pytest.mark.parametrize("training", [False, True])
def test_a_whole_that_bundles_otherwise(training: bool) -> None:
    model = randomized(Halves()).train(training)
    holder = copy.deepcopy(model)
    lazily(holder.part)
    state = copy.deepcopy(holder.state_dict())
    holder.part(X)
    holder.load_state_dict(state)
    whole = lazily(holder)
    whole(X)
    holder.load_state_dict(state)
    report = fxfuse.report(whole)
    assert [plan.path for plan in report.fused] == [""], report.refused
    for step in range(3):
        x = randn(4, 6, 3, seed=step)
        torch.testing.assert_close(whole(x), model(x), rtol=1e-10, atol=1e-10)
    assert not fxfuse.report(whole).fallbacks
    assert count(lambda: whole(X)).heavy == 6


def test_memory_that_somebody_else_holds_stays() -> None:
    """A view that was taken of a part's weight shows what is written to it, whoever packs it."""
    _, holder = pair((4,) * 6)
    weight = holder.parts[0].nets[0].first.weight
    view = weight.detach()
    whole = lazily(holder)
    for _ in range(3):
        whole(X)
    with torch.no_grad():
        weight.fill_(3.0)
    assert bool((view == 3.0).all())


class Listed(nn.Module):
    """Its parts are in a list that registers nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = [Part((4,) * 6), Part((4,) * 6)]
        self.heads = nn.ModuleList(nn.Linear(24, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([part(x) for part in self.parts], -1)
        return torch.cat([head(h) for head in self.heads], -1)


def test_parts_that_nobody_registers() -> None:
    model = Listed().double().eval()
    for index, part in enumerate(model.parts):
        randomized(part, seed=index).eval()
    holder = copy.deepcopy(model)
    for part in holder.parts:
        lazily(part)
        part(X)
    whole = lazily(holder)
    torch.testing.assert_close(whole(X), model(X), rtol=1e-10, atol=1e-10)
    assert [plan.path for plan in fxfuse.report(whole).fused] == [""], fxfuse.report(whole).refused
    torch.testing.assert_close(whole(X), model(X), rtol=1e-10, atol=1e-10)
