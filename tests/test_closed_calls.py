"""Modules inside a loop whose call stays a call: their hooks run, and what they do at another call than the recorded one counts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fxfuse
from checks import assert_close, randn, randomized

X = randn(4, 2)


class Back(nn.Module):
    def forward(self, h):
        return h


class BackInEval(nn.Module):
    def forward(self, h):
        return h * 2 if self.training else h


class Lanes(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.nets = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))
        self.probes = nn.ModuleList(make() for _ in range(4))

    def forward(self, x):
        return torch.stack([probe(net(x)) for net, probe in zip(self.nets, self.probes)], 1)


def optimized(model, validate=True):
    return fxfuse.optimize(model, X, objective="launches", tune=False, validate=validate)


def backward(model, x=X):
    x = x.clone().requires_grad_()
    model.zero_grad()
    out = model(x)
    out.square().sum().backward()
    return out.detach(), x.grad


calls = []


def watching(module, args, out):
    calls.append("forward")


def doubling(module, args, out):
    calls.append("forward")
    return out * 2


def before(module, args):
    calls.append("before")


def tripling(module, grad_input, grad_output):
    calls.append("backward")
    return tuple(None if g is None else g * 3 for g in grad_input)


REGISTER = {
    watching: nn.Module.register_forward_hook, doubling: nn.Module.register_forward_hook,
    before: nn.Module.register_forward_pre_hook, tripling: nn.Module.register_full_backward_hook,
}  # fmt: skip


@pytest.mark.parametrize("validate", [False, True])
@pytest.mark.parametrize("hook", REGISTER)
@pytest.mark.parametrize("make", [nn.Identity, Back, BackInEval, lambda: nn.Dropout(0.2)])
def test_hooks_of_modules_that_hand_back_their_input(make, hook, validate):
    model = randomized(Lanes(make)).eval()
    for probe in model.probes[1:3]:
        REGISTER[hook](probe, hook)
    fused = optimized(model, validate).eval()
    assert fxfuse.report(fused).fused
    calls.clear()
    want, want_grad = backward(model)
    counted = calls.copy()
    calls.clear()
    got, got_grad = backward(fused)
    assert calls == counted != []
    assert_close(got, want, "output")
    assert_close(got_grad, want_grad, "gradient")


class Branch(nn.Module):
    """Seldom anything but its input."""

    def forward(self, h):
        return h * 2 if h.max() > 100 else h


@pytest.mark.parametrize("validate", [False, True])
def test_a_branch_that_mostly_hands_back_its_input(validate):
    model = randomized(Lanes(Branch))
    fused = optimized(model, validate)
    assert fxfuse.report(fused).fused
    for x in (X, X * 1e4):
        assert_close(fused(x), model(x), "output")


class Large(nn.Module):
    def forward(self, h):
        return bool((h.detach() > 100).any())


class Halved(nn.Module):
    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))
        self.large = Large()

    def forward(self, x):
        return torch.stack([h * 0.5 if self.large(h) else h for h in [net(x) for net in self.nets]])


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, h):
        self.calls += 1
        return h if self.calls < 3 else h * 2


class Zeroing(nn.Module):
    def forward(self, h):
        if h.max() > 1e9:
            return h
        h[:, 0].zero_()
        return h * 2


class Passing(nn.Module):
    """Writes into a view that a module with a hook has made, or into what it is a view of."""

    def __init__(self, first):
        super().__init__()
        self.first = first
        self.nets = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))
        self.flat = nn.Flatten(0)
        self.flat.register_forward_hook(watching)

    def forward(self, x):
        outs = []
        for net in self.nets:
            h = net(x) * 1.0
            flat = self.flat(h)
            (h if self.first else flat).mul_(3)
            outs.append(h.sum(1).tanh() + flat.view(h.shape)[:, 0])
        return torch.stack(outs, 1)


@pytest.mark.parametrize("validate", [False, True])
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Halved, "large, a call of its own, gives a number that Python goes on with"),
        (lambda: Lanes(Counting), "probes.0, a call of its own, runs no torch call that would say when"),
        (lambda: Lanes(Zeroing), "probes.0 writes into a tensor that it was given"),
        (lambda: Passing(True), "mul_ writes into memory that flat, a call of its own, passed on"),
        (lambda: Passing(False), "mul_ writes into memory that flat, a call of its own, passed on"),
    ],
)
def test_what_the_graph_would_have_to_know_beforehand(make, reason, validate):
    model = randomized(make())
    fused, original = optimized(model, validate), copy.deepcopy(model)
    found = {refusal.reason: refusal for refusal in fxfuse.report(fused).refused}
    assert reason in found
    assert found[reason].place is not None
    for x in (X, X * 1e4, -X, X):
        assert_close(fused(x), original(x), "output")
