"""Forwards that switch gradient tracking on, whoever calls: energies and forces, scores, Hamiltonian nets (Greydanus et al., 2019)."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import checks
import fxfuse
from checks import QUICK, randn, randomized
from fxfuse.weights.packing import original_gradients

X = randn(5, 6)


class Energies(nn.Module):
    """Four energies and a map in front of them; ``forward`` is the test's."""

    def __init__(self, forward: Callable[[Energies, Tensor], Any]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)) for _ in range(4))
        self.map = nn.Linear(6, 6)
        self.own = forward
        self.register_buffer("last", torch.zeros(6))

    def energy(self, x: Tensor) -> Tensor:
        return torch.stack([net(x).sum(-1) for net in self.nets]).sum(0)

    def forward(self, x: Tensor) -> Any:
        return self.own(self, x)


def force(self: Energies, x: Tensor) -> Any:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        energy = self.energy(x)
        (gradient,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
    return energy, -gradient, energy * 2


def only_in_training(self: Energies, x: Tensor) -> Any:
    with torch.set_grad_enabled(True):
        x = x.detach().clone().requires_grad_(True)
        energy = self.energy(x)
        return torch.autograd.grad([energy.sum()], [x], create_graph=self.training)[0]


@torch.enable_grad()
def decorated(self: Energies, x: Tensor) -> Any:
    x.requires_grad_()
    energy = self.energy(x)
    first, second = torch.autograd.grad(energy, x, torch.ones_like(energy), create_graph=True)[0].chunk(2, -1)
    return torch.cat([second, -first], -1)


def from_a_map(self: Energies, x: Tensor) -> Any:
    h = self.map(x).tanh()
    with torch.enable_grad():
        z = h.detach().requires_grad_()
        energy = self.energy(z)
        (gradient,) = torch.autograd.grad(energy.sum(), z, create_graph=True)
    return h, energy, self.map(gradient)


def curvature(self: Energies, x: Tensor) -> Any:
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)
        with torch.no_grad():
            size = self.energy(x).relu_()
        trace = sum((torch.autograd.grad(gradient[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2)), gradient[:, 0])
    return gradient, trace, size


def penalty(self: Energies, x: Tensor) -> Any:
    """The gradient of critics between samples (Gulrajani et al., 2017)."""
    made = self.map(x).tanh()
    with torch.enable_grad():
        between = (0.3 * x + 0.7 * made).detach().requires_grad_()
        values = torch.cat([net(between) for net in self.nets], 1)
        gradient = torch.autograd.grad(values, between, torch.ones_like(values), create_graph=True)[0]
        size = (gradient.norm(dim=1) - 1).square()
    return size.mean(), self.energy(made)


def two_gradients(self: Energies, x: Tensor) -> Any:
    """By two leaves, whose gradients are parts of one; they lie in rows, as where autograd adds them up lane by lane."""
    with torch.enable_grad():
        first, second = (part.detach().clone().requires_grad_() for part in (x[:, :5], x[:, 5:]))
        energy = torch.stack([net(torch.cat([first, second], 1)) for net in self.nets]).sum((0, 2))
        force, strain = torch.autograd.grad(energy, [first, second], [torch.ones_like(energy)], create_graph=True)
    return energy, -force, strain


def own_leaves(self: Energies, x: Tensor) -> Any:
    """Every lane takes a derivative by a leaf of its own, of the same numbers; nothing keeps the graph."""
    h = self.map(x).tanh()
    found = []
    for net in self.nets:
        with torch.enable_grad():
            z = h.detach().requires_grad_()
            gradient = torch.autograd.grad((z.exp() * net(z)).sum(), z)[0]
        found.append(net(h) + gradient.sum(1, keepdim=True))
    return torch.cat(found, 1)


def leaves_of_one_sum(self: Energies, x: Tensor) -> Any:
    with torch.enable_grad():
        first, second = x.detach().requires_grad_(), x.detach().requires_grad_()
        energy = self.energy(first).sum() + (self.energy(second) * 2).sum()
        return torch.autograd.grad(energy, first, create_graph=True)[0], self.energy(x.detach())


def parts_of_it(self: Energies, x: Tensor) -> Any:
    """Switches in switches, one after the other."""
    with torch.no_grad():
        start = self.map(x).relu_()
        with torch.enable_grad():
            z = start.detach().requires_grad_()
            first = torch.autograd.grad(self.energy(z).sum(), z, create_graph=True)[0]
            with torch.no_grad():
                size = first.norm(dim=1)
            second = first * 2
        after = second + 1
    with torch.set_grad_enabled(True):
        third = second.tanh()
    return first, size, second, after, third


def no_energy(self: Energies, x: Tensor) -> Any:
    """What is computed inside has a history, what comes after has one where the caller asks for it."""
    with torch.enable_grad():
        energy = self.energy(x)
    return energy, energy.tanh()


def parts_of_the_input(self: Energies, x: Tensor) -> Any:
    """Views of what has a history say that they need a gradient, also where the caller tracks none."""
    with torch.enable_grad():
        z = x.detach().requires_grad_()
        gradient = torch.autograd.grad(self.energy(z).sum(), z)[0]
    return x[..., :1], self.energy(gradient), gradient[:, :2], self.map.weight[:2]


FUSED = {
    f.__name__: f
    for f in (force, only_in_training, decorated, from_a_map, curvature, penalty, two_gradients, own_leaves,
              leaves_of_one_sum, parts_of_it, no_energy, parts_of_the_input)
}  # fmt: skip


def history_from_outside(self: Energies, x: Tensor) -> Any:
    h = self.map(x)
    with torch.enable_grad():
        return self.energy(h)


def gradient_by_what_is_outside(self: Energies, x: Tensor) -> Any:
    h = self.map(x.detach().requires_grad_())
    with torch.enable_grad():
        energy = self.energy(h)
        return energy.detach(), torch.autograd.grad(energy.sum(), self.map.weight, create_graph=True)[0]


def written_outside(self: Energies, x: Tensor) -> Any:
    with torch.enable_grad():
        energy = self.energy(x)
    energy += 1.0
    return energy


def written_through_a_view(self: Energies, x: Tensor) -> Any:
    with torch.enable_grad():
        energy = self.energy(x)
    energy.view(-1).add_(1.0)
    return energy


def view_outside(self: Energies, x: Tensor) -> Any:
    with torch.enable_grad():
        energy = self.energy(x)
    return energy.unsqueeze(1), energy * 2


def copy_of_a_view_outside(self: Energies, x: Tensor) -> Any:
    """Of one row, a view."""
    with torch.enable_grad():
        energies = torch.stack([net(x).sum(-1) for net in self.nets], 1)
    return energies, energies[:, :2].contiguous()


def buffer_outside(self: Energies, x: Tensor) -> Any:
    with torch.enable_grad():
        energy = self.energy(x)
    self.last.copy_(x.detach().mean(0) + energy.detach().mean())
    return energy


NEEDED = {
    f.__name__: f
    for f in (history_from_outside, gradient_by_what_is_outside, written_outside, written_through_a_view, view_outside,
              copy_of_a_view_outside, buffer_outside)
}  # fmt: skip
CONTEXTS = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


def answer(model: nn.Module, x: Tensor, context: Any, requires_grad: bool) -> Any:
    """Results and their flags, and gradients where the results have a history; or the exception's type."""
    x = x.clone().requires_grad_(requires_grad)
    model.zero_grad()
    try:
        with context():
            out = model(x)
    except RuntimeError as error:
        return type(error)
    leaves = list(out) if isinstance(out, tuple) else [out]
    flags = [(leaf.requires_grad, leaf.is_leaf, leaf.is_inference(), leaf.stride()) for leaf in leaves]
    ends = [leaf for leaf in leaves if leaf.requires_grad]
    if ends and context is torch.enable_grad:
        sum(leaf.square().sum() for leaf in ends).backward()
    gradients = original_gradients(model) if hasattr(model, "_fxfuse_base") else checks.own_gradients(model)
    return [leaf.detach().clone() for leaf in leaves], (flags, x.requires_grad), x.grad, gradients


def assert_same(fused: nn.Module, model: nn.Module, where: str, context: Any, train: bool) -> None:
    for requires_grad in (False, True):
        for rows in (5, 3):
            model.train(train)
            fused.train(train)
            got, want = (answer(each, randn(rows, 6, seed=rows), context, requires_grad) for each in (fused, model))
            if isinstance(want, type):
                assert got is want, where
                continue
            assert got[1] == want[1], f"{where}: flags"
            for one, other in zip(got[0], want[0], strict=True):
                checks.assert_close(one, other, f"{where}: output")
            checks.assert_close(got[2], want[2], f"{where}: gradient of the input")
            for name, gradient in want[3].items():
                if gradient is not None or got[3][name] is None or got[3][name].count_nonzero():
                    checks.assert_close(got[3][name], gradient, f"{where}: gradient of {name}")


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", FUSED)
def test_fused_whoever_calls(name: str, context: str, train: bool) -> None:
    model = randomized(Energies(FUSED[name]))
    fused = fxfuse.optimize(model, X, objective="launches", **QUICK)
    assert fxfuse.report(fused).fused, fxfuse.report(fused)
    assert_same(fused, model, f"{name}, {context}", CONTEXTS[context], train)
    assert not fxfuse.report(fused).fallbacks


@pytest.mark.parametrize("name", NEEDED)
def test_the_loop_where_the_caller_tracks_nothing(name: str) -> None:
    model = randomized(Energies(NEEDED[name]))
    fused = fxfuse.optimize(model, X, objective="launches", **QUICK)
    assert fxfuse.report(fused).fused
    assert_same(fused, model, name, torch.enable_grad, True)
    assert not fxfuse.report(fused).fallbacks
    for context in (torch.no_grad, torch.inference_mode):
        assert_same(fused, model, name, context, False)
    reasons = [reason for reason in fxfuse.report(fused).fallbacks if "inference" not in reason]
    assert reasons == ["the caller tracks no gradients, and forward does for a part of what it computes"]
    checks.assert_same_buffers(fused, model, "afterwards")


def test_tracking_that_stays_on_is_left_alone() -> None:
    def forward(self: Energies, x: Tensor) -> Any:
        torch.set_grad_enabled(True)
        return self.energy(x)

    model = randomized(Energies(forward))
    fused = fxfuse.optimize(model, X, objective="launches", **QUICK)
    assert "switches gradient tracking on for whoever called it" in str(fxfuse.report(fused)).replace("\n    ", " ")
    with torch.no_grad():
        assert fused(X).requires_grad
        assert torch.is_grad_enabled()


def test_a_saved_energy_model_switches_on_too(tmp_path: Any) -> None:
    model = randomized(Energies(force))
    fused = pickle.loads(pickle.dumps(fxfuse.optimize(model, X, objective="launches", **QUICK)))
    for context in CONTEXTS.values():
        assert_same(fused, model, "saved", context, True)
    assert not fxfuse.report(fused).fallbacks


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_energies_are_timed_and_validated(mode: str) -> None:
    model = randomized(Energies(force))
    fused = fxfuse.optimize(model, X, mode=mode, objective="time", cache=False)
    report = fxfuse.report(fused)
    assert report.fused or "left as a loop: packed runs" in str(report).replace("\n    ", " "), report
    for context in CONTEXTS.values():
        assert_same(fused, model, mode, context, False)


class ByClone(nn.Module):
    """Derivatives by the inputs, of copies that keep the caller's history."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)) for _ in range(3))

    def forward(self, x: Tensor, t: Tensor) -> Any:
        x, t = x.clone().requires_grad_(), t.clone().requires_grad_()
        values = torch.cat([net(torch.cat([x, t], 1)) for net in self.nets], 1)
        return values, torch.autograd.grad(values.sum(), x, create_graph=True)[0]


@pytest.mark.parametrize("asked", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("recorded", [False, True])
def test_a_copy_keeps_the_history_of_the_callers_input(recorded: bool, asked: tuple[bool, bool]) -> None:
    model = randomized(ByClone())
    inputs = [randn(5, 1, seed=seed).requires_grad_(recorded) for seed in (1, 2)]
    fused = fxfuse.optimize(model, tuple(inputs), objective="launches", tune=False)
    assert fxfuse.report(fused).fused, fxfuse.report(fused)
    grads = []
    for each in (model, fused):
        given = [randn(6, 1, seed=seed).requires_grad_(need) for seed, need in zip((3, 4), asked)]
        values, slope = each(*given)
        (values.square().sum() + slope.square().sum()).backward()
        grads.append([g.grad for g in given] + [p.grad for _, p in fxfuse.named_original_parameters(each)])
    for got, want in zip(grads[1], grads[0]):
        assert (got is None) == (want is None)
        if want is not None:
            checks.assert_close(got, want, "gradient")
    assert not fxfuse.report(fused).fallbacks
