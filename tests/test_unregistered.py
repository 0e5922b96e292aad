"""Lanes in plain lists and dicts, which no module registers: they fuse, and their Parameters stay what their owner trains."""

from __future__ import annotations

import copy
import importlib
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from checks import QUICK, assert_close, assert_heavy, mlp, randn, randomized
from fxfuse import launches
from fxfuse.planning import plan


def net() -> nn.Module:
    return mlp(4, 5, 2).double()


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.nets = [net() for _ in range(3)]

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([net(x) for net in self.nets])


class Keyed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.by_name = {name: net() for name in "abc"}

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([net(x) for net in self.by_name.values()])


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.towers = [[nn.Linear(4, 5).double(), nn.Linear(5, 2).double()] for _ in range(3)]

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([second(first(x).relu()) for first, second in self.towers])


class Inside(nn.Module):
    """The list belongs to a submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Listed()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x)
        return found.tanh() if float(found.sum()) > 1e9 else found


def lanes(model: Any) -> list[nn.Module]:
    held = model.inner.nets if isinstance(model, Inside) else next(v for v in vars(model).values() if isinstance(v, (list, dict)) and v)
    items = list(held.values()) if isinstance(held, dict) else held
    return [part for item in items for part in (item if isinstance(item, list) else [item])]


def parameters(model: Any) -> list[nn.Parameter]:
    return [parameter for lane in lanes(model) for parameter in lane.parameters()]


@pytest.mark.parametrize("make", [Listed, Keyed, Nested, Inside])
def test_an_optimizer_over_the_lists_trains_both_alike(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = make()
    x = randn(5, 4)
    fused = fxfuse.optimize(model, x, objective="launches")
    assert fxfuse.report(fused).fused, fxfuse.report(fused)
    assert_heavy(fused, x, 2)
    assert list(fused.parameters()) == []
    assert list(fused.state_dict()) == []
    assert len(parameters(fused)) == len(parameters(model)) == 12
    steps = [torch.optim.Adam(parameters(each), lr=0.1) for each in (model, fused)]
    for seed in range(3):
        given = [randn(6, 4, seed=seed).requires_grad_() for _ in range(2)]
        for each, step, rows in zip((model, fused), steps, given, strict=True):
            step.zero_grad()
            each(rows).square().sum().backward()
            step.step()
        assert_close(given[1].grad, given[0].grad, "input gradient")
        for ours, theirs in zip(parameters(fused), parameters(model), strict=True):
            assert_close(ours.grad, theirs.grad, "gradient")
            assert_close(ours, theirs, "weight after a step")
    assert_close(fused(x), model(x), "output")
    assert not fxfuse.report(fused).fallbacks


def test_registered_layers_beside_them_keep_to_themselves() -> None:
    class Gated(Listed):
        """The gate reads what the first layers read, and trains elsewhere."""

        def __init__(self) -> None:
            super().__init__()
            self.gates = nn.ModuleList(nn.Linear(4, 5) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            gates = torch.stack([gate(x).softmax(-1)[:, :2] for gate in self.gates])
            return super().forward(x) * gates

    model, x = randomized(Gated()), randn(5, 4)
    fused = fxfuse.optimize(model, x, objective="launches")
    assert_heavy(fused, x, 3)
    assert_close(fused(x), model(x), "output")
    assert len(list(fused.state_dict())) == 6
    assert [name for name in fxfuse.original_state_dict(fused)] == list(model.state_dict())
    for each in (model, fused):
        each(x).square().sum().backward()
    for ours, theirs in zip(parameters(fused), parameters(model), strict=True):
        assert_close(ours.grad, theirs.grad, "gradient")


def test_verification_sees_their_gradients() -> None:
    """Not only outputs: a lane whose weights do not train would pass those."""
    torch.manual_seed(0)
    model = Listed()
    fused = fxfuse.optimize(model, randn(5, 4), objective="launches", **QUICK)
    names = {d.name for d in fxfuse.verify(model, fused, randn(5, 4)).differences}
    assert any("nets.2.0.weight" in name for name in names), names
    other = copy.deepcopy(model)
    other.nets[1][0].weight.requires_grad_(False)
    assert not fxfuse.verify(other, fused, randn(5, 4)).ok


def replace_one(model: Any, other: nn.Module) -> None:
    model.nets[1] = other


def replace_part(model: Any, other: Any) -> None:
    model.nets[1][2] = other[2]


def append(model: Any, other: nn.Module) -> None:
    model.nets.append(other)


def another_list(model: Any, other: nn.Module) -> None:
    model.nets = [*model.nets[:2], other]


def hook(model: Any, other: nn.Module) -> None:
    model.nets[2].register_forward_hook(lambda module, args, out: out * 2)


@pytest.mark.parametrize("change", [replace_one, replace_part, append, another_list, hook])
@pytest.mark.parametrize("copied", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_what_is_done_to_the_lists_afterwards_is_followed(change: Any, copied: Any) -> None:
    torch.manual_seed(0)
    model, other, x = Listed(), net(), randn(5, 4)
    fused = copied(fxfuse.optimize(model, x, objective="launches", **QUICK))
    assert_close(fused(x), model(x), "before")
    assert launches.count(lambda: fused(x)).heavy == 2
    for each in (model, fused):
        change(each, other)
    assert_close(fused(x), model(x), "after")


def test_a_lane_with_a_hook_stays_a_loop() -> None:
    model, x = Listed(), randn(5, 4)
    model.nets[1].register_forward_hook(lambda module, args, out: out * 2)
    fused = fxfuse.optimize(model, x, objective="launches", **QUICK)
    assert not fxfuse.report(fused).fused
    assert_close(fused(x), model(x), "output")


class Plain(nn.Module):
    """Lanes without Parameters, in a list that nobody registers."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = [nn.Identity() for _ in range(3)]

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([0.5**i * net(x) for i, net in enumerate(self.nets)])


def test_a_backward_hook_of_a_lane_without_parameters_is_kept() -> None:
    """Nothing in front of it showed that the lane is one: its gradient came back without what the hook does to it."""
    model, x = Plain(), randn(5, 4)
    model.nets[2].register_full_backward_hook(lambda module, inner, outer: tuple(g * 3 for g in inner))
    fused = fxfuse.optimize(model, x, objective="launches", **QUICK)
    assert any("nets.2, which has hooks and is registered nowhere" in str(refusal) for refusal in fxfuse.report(fused).refused)
    each = [(m, x.clone().requires_grad_()) for m in (model, fused)]
    for m, leaf in each:
        m(leaf).sum().backward()
    assert_close(each[1][1].grad, each[0][1].grad, "input's gradient")
    assert not model.nets[2]._forward_pre_hooks


class Tracked(Listed):
    """An energy of lanes that nobody registers: tracked whatever the caller does."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            return torch.stack([net(x.detach()) for net in self.nets])


def test_what_forward_tracks_has_the_weights_gradients_under_no_grad() -> None:
    torch.manual_seed(0)
    model, x = Tracked(), randn(5, 4)
    fused = fxfuse.optimize(model, x, objective="launches", **QUICK)
    assert fxfuse.report(fused).fused
    each = []
    for m in (model, fused):
        with torch.no_grad():
            out = m(x)
        assert out.requires_grad
        out.square().sum().backward()
        each.append([p.grad for net in m.nets for p in net.parameters()])
    for want, got in zip(*each, strict=True):
        assert want is not None
        assert_close(got, want, "a weight's gradient")


def test_in_place_the_optimizer_from_before_goes_on() -> None:
    torch.manual_seed(0)
    model, x = randomized(Listed()), randn(5, 4)
    step = torch.optim.SGD(parameters(model), lr=0.1)
    before = copy.deepcopy(model)
    fused = fxfuse.optimize(model, x, objective="launches", inplace=True, **QUICK)
    assert fused is model
    for each in (before, fused):
        each(x).square().sum().backward()
    step.step()
    torch.optim.SGD(parameters(before), lr=0.1).step()
    assert_close(fused(x), before(x), "after a step")
    assert launches.count(lambda: fused(x)).heavy == 2


@pytest.mark.parametrize(("gain", "fuses"), [(0.9, False), (3.0, True)])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("mode", ["train", "infer"])
def test_what_is_slower_as_views_of_the_pack_stays_a_loop(monkeypatch: Any, gain: float, fuses: bool, inplace: bool, mode: Any) -> None:
    """However fast it would be packed."""
    pipeline = importlib.import_module("fxfuse.pipeline")
    real, asked = pipeline.times_faster, []

    def measured(*args: Any) -> float:
        asked.append(real(*args, budget=0.01))
        return gain

    monkeypatch.setattr(pipeline, "times_faster", measured)
    monkeypatch.setattr(pipeline, "least_gain", lambda staying: 1.02)
    monkeypatch.setattr(plan, "LEAST_GAIN", 0.0)
    torch.manual_seed(0)
    model, x = Listed(), randn(5, 4)
    want = model(x)
    fused = fxfuse.optimize(model, x, mode=mode, inplace=inplace)
    report = fxfuse.report(fused)
    assert bool(report.fused) is fuses, report
    assert len(asked) == 1
    assert asked[0] > 0
    assert [str(refusal)[:39] for refusal in report.refused] == ([] if fuses else ["left as a loop: 0.90x with Parameters t"])
    assert_close(fused(x), want, "output")
    assert (launches.count(lambda: fused(x)).heavy == 2) is fuses
