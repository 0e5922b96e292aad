"""Calls whose inputs lie in memory in another order than the example: results lie as the original's, by a program made at that call."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from checks import assert_close, assert_same_strides, randn, randomized
from fxfuse.passes.program import make_program
from fxfuse.private.pytree import tree_leaves

ORDERS = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (2, 1, 0), (1, 2, 0)]
BY_RESULTS = "input 0 lies in memory in another order than recorded, and results lie as it does"


def lying(order: tuple[int, ...], *shape: int, seed: int = 0) -> Tensor:
    """Of this shape, its dims in this order in memory."""
    return randn(*(shape[d] for d in order), seed=seed).permute([order.index(d) for d in range(len(shape))])


def added(self: Any, x: Tensor) -> Tensor:
    return x + sum(net(x) for net in self.nets)


def one_after_the_other(self: Any, x: Tensor) -> Tensor:
    h = x
    for net in self.nets:
        h = h + net(x)
    return h


def gated(self: Any, x: Tensor) -> list[Tensor]:
    return [x * torch.sigmoid(net(x)) for net in self.nets]


def made_like(self: Any, x: Tensor) -> Any:
    return [net(x) for net in self.nets], torch.empty_like(x).fill_(2.0), torch.zeros_like(x), x.clone()


def joined(self: Any, x: Tensor) -> Any:
    return torch.cat([net(x) for net in self.nets], -1), x, x.transpose(0, 1)


class Layers(nn.Module):
    def __init__(self, how: Any = None) -> None:
        super().__init__()
        self.how = how
        self.nets = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Any:
        return self.how(self, x)


def assert_lies_alike(model: nn.Module, fused: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        want, got = model(x), fused(x)
    for index, (a, b) in enumerate(zip(tree_leaves(got), tree_leaves(want), strict=True)):
        assert_close(a, b, f"output {index}")
        assert_same_strides(a, b, f"output {index} of strides {x.stride()}")
        assert (a is x) == (b is x)


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("rows", [3, 1])
@pytest.mark.parametrize("recorded", [(0, 1, 2), (0, 2, 1)])
@pytest.mark.parametrize("forward", [added, one_after_the_other, gated, made_like, joined])
def test_strides_follow_the_input(forward: Any, recorded: tuple[int, ...], rows: int, validate: bool) -> None:
    model = randomized(Layers(forward))
    fused = fxfuse.optimize(model, lying(recorded, rows, 5, 6), objective="launches", tune=False, validate=validate)
    assert fxfuse.report(fused).fused, fxfuse.report(fused)
    for number in (3, 1, 7):
        assert_lies_alike(model, fused, lying(recorded, number, 5, 6, seed=number))
    assert not fxfuse.report(fused).fallbacks
    for each in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        for number, order in enumerate(ORDERS):
            assert_lies_alike(model, each, lying(order, number + 2, 5, 6, seed=number))
    assert_lies_alike(model, fused, randn(3, 5, 9)[..., 2:8])  # with gaps
    assert_lies_alike(model, fused, randn(1, 5, 6).expand(3, 5, 6))
    assert not fxfuse.report(fused).fallbacks  # each other order has got a program


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Conv2d(3, 4, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.relu(net(x)) for net in self.nets], 1)


@pytest.mark.parametrize("last", [False, True])
def test_channels_last(last: bool) -> None:
    model = randomized(Images())
    kinds = [torch.contiguous_format, torch.channels_last]
    fused = fxfuse.optimize(model, randn(2, 3, 8, 8).to(memory_format=kinds[last]), objective="launches", tune=False)
    assert fxfuse.report(fused).fused, fxfuse.report(fused)
    for rows in (2, 1, 5):
        assert_lies_alike(model, fused, randn(rows, 3, 8, 8, seed=rows).to(memory_format=kinds[last]))
    assert not fxfuse.report(fused).fallbacks
    for training in (True, False):
        model.train(training), fused.train(training)
        for rows in (2, 1, 5):
            assert_lies_alike(model, fused, randn(rows, 3, 8, 8, seed=rows).to(memory_format=kinds[not last]))
    assert not fxfuse.report(fused).fallbacks


def test_channels_last_after_another_order() -> None:
    """A program made at a call with transposed images is none for channels last."""
    model = randomized(Images())
    x = randn(2, 3, 8, 8)
    fused = fxfuse.optimize(model, x, objective="launches", tune=False)
    assert_lies_alike(model, fused, x.mT.contiguous().mT)
    assert_lies_alike(model, fused, x.to(memory_format=torch.channels_last))
    assert not fxfuse.report(fused).fallbacks


def gradients_of(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    model(x).square().sum().backward()
    assert x.grad is not None
    return {"x": x.grad, **{name: p.grad.clone() for name, p in fxfuse.named_original_parameters(model) if p.grad is not None}}


def test_gradients_of_calls_in_another_order() -> None:
    model = randomized(Images())
    fused = fxfuse.optimize(model, randn(2, 3, 8, 8), objective="launches", tune=False)
    x = randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
    want, got = gradients_of(model, x), gradients_of(fused, x)
    assert len(want) == 7
    assert want.keys() == got.keys()
    for name, gradient in want.items():
        assert_close(got[name], gradient, name)
    assert not fxfuse.report(fused).fallbacks


def test_no_more_programs_than_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxfuse.building.adapt._MOST_CALLS", 1)
    model = randomized(Layers(added))
    fused = fxfuse.optimize(model, randn(3, 5, 6), objective="launches", tune=False)
    assert_lies_alike(model, fused, lying((0, 2, 1), 3, 5, 6))
    assert not fxfuse.report(fused).fallbacks
    assert_lies_alike(model, fused, lying((1, 0, 2), 3, 5, 6))
    assert dict(fxfuse.report(fused).fallbacks) == {BY_RESULTS: 1}


def test_a_mistake_in_a_program_made_at_a_call_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomized(Layers(added))
    fused = fxfuse.optimize(model, randn(3, 5, 6), objective="launches", tune=False)

    def wrong(trace: Any, lifted: Any, graph: torch.fx.Graph) -> Any:
        for node in graph.nodes:
            if "tanh" in str(node.target) or "add" in str(node.target):
                with graph.inserting_after(node):
                    changed = graph.call_function(torch.mul, (node, 1.0 + 1e-6))
                node.replace_all_uses_with(changed, delete_user_cb=lambda user, made=changed: user is not made)
        return make_program(trace, lifted, graph)

    monkeypatch.setattr("fxfuse.building.adapt.make_program", wrong)
    assert_lies_alike(model, fused, lying((0, 2, 1), 3, 5, 6))
    (reason,) = fxfuse.report(fused).fallbacks
    assert reason.startswith(f"{BY_RESULTS}, and the rewritten form differs: ")


class Two(Layers):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y * 2.0 + sum(net(x) for net in self.nets)


def test_of_two_inputs_the_one_that_shows() -> None:
    model = randomized(Two())
    fused = fxfuse.optimize(model, (randn(3, 5, 6), randn(3, 5, 6, seed=1)), objective="launches", tune=False)
    turned = lying((0, 2, 1), 3, 5, 6)
    assert_close(fused(turned, randn(3, 5, 6)), model(turned, randn(3, 5, 6)), "x turned")
    assert not fxfuse.report(fused).fallbacks
    got, want = fused(randn(3, 5, 6), turned), model(randn(3, 5, 6), turned)
    assert got.stride() == want.stride() != randn(3, 5, 6).stride()
    assert not fxfuse.report(fused).fallbacks
    (guard,) = {program.guard.leaves for program in fused.__dict__["_fxfuse"].plan.programs.values()}
    assert [leaf.layout for leaf in guard] == ["", "by results"]


def test_nothing_is_left_of_the_runs_that_look_for_it() -> None:
    """Statistics, random numbers, attributes and hooks are as if nobody had asked."""

    class Counting(Layers):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(5)
            self.seen: list[int] = []

        def forward(self, x: Tensor) -> Tensor:
            return x + nn.functional.dropout(self.norm(x), 0.5, self.training) + sum(net(x) for net in self.nets)

    model = randomized(Counting())
    calls: list[int] = []
    model.nets[0].register_forward_hook(lambda *_: calls.append(1))
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    fused = fxfuse.optimize(model, randn(3, 5, 6), objective="launches", tune=False, validate=False)
    assert torch.equal(random, torch.get_rng_state())
    for name, tensor in fxfuse.original_state_dict(fused).items():
        assert torch.equal(tensor, state[name]), name
    known = len(calls)
    fused.eval()(lying((0, 2, 1), 3, 5, 6))
    assert not fxfuse.report(fused).fallbacks
    assert len(calls) == known + 1
    for name, tensor in fxfuse.original_state_dict(fused).items():
        assert torch.equal(tensor, state[name]), name


def test_under_autocast() -> None:
    model = randomized(Layers(gated)).float()
    fused = fxfuse.optimize(model, randn(3, 5, 6).float(), objective="launches", tune=False)
    for order in ((0, 1, 2), (0, 2, 1), (0, 1, 2)):
        x = lying(order, 3, 5, 6).float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got, want = fused(x), model(x)
        for a, b in zip(got, want, strict=True):
            assert (a.stride(), a.dtype) == (b.stride(), b.dtype)
            torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)
