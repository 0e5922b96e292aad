"""Whether a packed form is worth it once Inductor has compiled it: what is timed, what is taken off, and what is chosen for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from checks import mlp, model_of, randn, randomized
from fxfuse.dynamo import worth
from fxfuse.dynamo.checked import rewritten_or_refused
from fxfuse.dynamo.rewrite import Rewritten
from fxfuse.dynamo.settings import Settings
from fxfuse.graph import Refusal

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def _one_input(self, x):
    return torch.stack([net(x) for net in self.nets], 1)


def _tables(self, x):
    return torch.cat([table(x[:, i]) for i, table in enumerate(self.nets)], 1)


def critics(count: int = 5) -> nn.Module:
    nets = (nn.Sequential(nn.Linear(23, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 25)) for _ in range(count))
    return randomized(model_of(_one_input, nets=nn.ModuleList(nets)))


def tables(count: int, columns: int = 16) -> nn.Module:
    return randomized(model_of(_tables, nets=nn.ModuleList(nn.Embedding(50, columns) for _ in range(count))))


def rewritten(model: nn.Module, x: torch.Tensor, **settings: Any) -> Rewritten | Refusal:
    """What the backend makes of the model's graph for Inductor, which is not called."""
    found = []

    def backend(graph, inputs):
        made = rewritten_or_refused(graph.graph, inputs, Settings(**settings))
        assert graph.graph.owning_module is graph
        found.append(made if isinstance(made, Refusal) else made[1])
        return graph.forward

    torch.compile(model, backend=backend)(x)
    (made,) = found
    return made


def timed(monkeypatch: pytest.MonkeyPatch, loop: float, packed: float) -> None:
    """Both forms take these seconds."""
    monkeypatch.setattr(worth, "medians", lambda functions, **_: [loop, packed][: len(functions)])
    monkeypatch.setattr(worth, "_price", lambda: 1.0)
    monkeypatch.setattr(worth, "_VIEW", 0.0)
    monkeypatch.setattr(worth, "FAR_AHEAD", 1e9)
    monkeypatch.setattr(worth, "SLOWER", 1.25)


def test_the_price_of_launches_is_taken_off(monkeypatch):
    x = torch.randint(50, (32, 6))
    with torch.no_grad():
        timed(monkeypatch, 17.0, 15.0)  # seven launches and six: 10 seconds of work, and 9
        assert isinstance(rewritten(tables(6), x), Rewritten)
        timed(monkeypatch, 17.0, 16.5)  # and 10.5
        made = rewritten(tables(6), x)
        assert isinstance(made, Refusal)
        assert made.reason == "left as a loop: packed runs 0.95x, as far as can be told before it is compiled"
        assert "test_backend_worth.py" in str(made.place)
        assert isinstance(rewritten(tables(6), x, inner="eager"), Rewritten)  # op by op
        timed(monkeypatch, 17.0, 21.5)
        assert isinstance(rewritten(tables(6), x, inner="eager"), Refusal)


@pytest.mark.parametrize("columns", [16, 24, 32])
def test_rows_that_are_no_vectors_are_looked_up_number_by_number(monkeypatch, columns):
    x = torch.randint(50, (32, 6))
    monkeypatch.setattr(worth, "_looked_after", lambda shared, train: 0.0)
    monkeypatch.setattr(worth, "LOOKED_UP", 0.6 / (32 * 6 * 24))
    with torch.no_grad():
        timed(monkeypatch, 17.0, 15.0)  # 10 seconds of work, and 9
        assert isinstance(rewritten(tables(6, columns), x), Refusal if columns == 24 else Rewritten)
        timed(monkeypatch, 17.0, 14.0)  # and 8
        assert isinstance(rewritten(tables(6, columns), x), Rewritten)


def test_so_is_that_of_views(monkeypatch):
    x, w = randn(6, 4), randn(4, 4)
    monkeypatch.setattr(worth, "_price", lambda: 1.0)
    monkeypatch.setattr(worth, "_VIEW", 0.5)
    assert worth._compiled(10.0, lambda: torch.relu(x[1:].t())) == 10.0 - 1.0 - 2 * 0.5
    assert worth._compiled(10.0, lambda: x @ w.t()) == 10.0 - 0.5


@pytest.mark.parametrize(("grad", "seconds"), [(False, 7.0 + 2 * 1.0 + 24 * 0.01), (True, 7.0 + 2 * 5.0 + 24 * (0.1 + 0.02))])
def test_shared_packs_are_looked_after_at_every_call(monkeypatch, grad, seconds):
    model, x = randomized(model_of(_one_input, nets=nn.ModuleList(nn.Linear(23, 4) for _ in range(12)))), randn(16, 23)
    prices = {"CALL": 7.0, "PACK": 1.0, "PACK_IN_TRAINING": 5.0, "MEMBER": 0.01, "MEMBER_IN_TRAINING": 0.02, "HANDED_OVER": 0.1}
    for name, value in prices.items():
        monkeypatch.setattr(worth, name, value)
    monkeypatch.setattr(worth, "_compiled", lambda seconds, function: seconds)
    monkeypatch.setattr(worth, "LEAST_GAIN", 1.0)
    monkeypatch.setattr(worth, "LEAST_GAIN_IN_TRAINING", 1.0)
    with torch.set_grad_enabled(grad):
        timed(monkeypatch, seconds + 1.01, 1.0)
        assert isinstance(rewritten(model, x), Rewritten)
        timed(monkeypatch, seconds + 0.99, 1.0)
        assert isinstance(rewritten(model, x), Refusal)


def test_products_keep_their_price(monkeypatch):
    model, x = critics(), randn(16, 23)
    with torch.no_grad():
        # The loop: 15 products, and 11 other launches; packed: three, and seven (activations, and packs that are made anew).
        timed(monkeypatch, 31.0, 26.0)  # 20 seconds, and 19
        assert isinstance(rewritten(model, x), Rewritten)
        timed(monkeypatch, 31.0, 29.0)  # and 22
        assert isinstance(rewritten(model, x), Refusal)


def test_gradients_that_are_handed_over_count(monkeypatch):
    model, x = randomized(model_of(_one_input, nets=nn.ModuleList(mlp(23) for _ in range(12)))), randn(16, 23)
    monkeypatch.setattr(worth, "LEAST_GAIN_IN_TRAINING", 1.0)
    monkeypatch.setattr(worth, "_compiled", lambda seconds, function: seconds)
    timed(monkeypatch, 2.0, 1.0)
    monkeypatch.setattr(worth, "HANDED_OVER", 0.9 / (12 * 4))
    assert isinstance(rewritten(model, x), Rewritten)
    monkeypatch.setattr(worth, "HANDED_OVER", 1.1 / (12 * 4))
    assert isinstance(rewritten(model, x), Refusal)
    with torch.no_grad():
        assert isinstance(rewritten(model, x), Rewritten)


def test_far_ahead_nothing_is_timed(monkeypatch):
    def asked(*_: Any, **__: Any) -> None:
        raise AssertionError("timed")

    monkeypatch.setattr(worth, "medians", asked)
    monkeypatch.setattr(worth, "FAR_AHEAD", 2.5)
    lanes = randomized(model_of(_one_input, nets=nn.ModuleList(mlp(2) for _ in range(64))))
    assert isinstance(rewritten(lanes, randn(4, 2)), Rewritten)


@pytest.mark.parametrize("grad", [True, False])
def test_what_is_timed(monkeypatch, grad):
    """Both forms, as often as needed; with a backward where the graph has one, and with the packs that are made at every call."""
    counted = []

    def medians(functions, **_):
        if len(functions) == 2:
            counted.extend(worth.count(function, bound=False) for function in functions)
        return [1e-3, 1e-6][: len(functions)]

    monkeypatch.setattr(worth, "medians", medians)
    monkeypatch.setattr(worth, "FAR_AHEAD", 1e9)
    with torch.set_grad_enabled(grad):
        made = rewritten(critics(3), randn(16, 23))
    assert isinstance(made, Rewritten)
    loop, packed = counted
    assert loop.heavy == (9 + 9 + 6 if grad else 9)  # the input needs no gradient
    assert packed.heavy == (3 + 3 + 2 if grad else 3)
    assert packed.total_by_op["stack"] + packed.total_by_op["cat"] == 5  # six packs, the largest of which is shared


@pytest.mark.parametrize(("grad", "first"), [(True, "baddbmm"), (False, "wide_linear")])
def test_a_wide_product_is_for_inference(monkeypatch, grad, first):
    """Its result lies across the lanes' order, through which Inductor's kernels of the backward go element by element."""
    timed(monkeypatch, 1e9, 1.0)
    with torch.set_grad_enabled(grad):
        made = rewritten(critics(), randn(256, 23))
    assert isinstance(made, Rewritten)
    assert [op.lowering.partition(",")[0] for op in made.ops if op.op == "linear"] == [first, "baddbmm", "baddbmm"]


@pytest.mark.parametrize("grad", [True, False])
def test_timing_leaves_no_trace(monkeypatch, grad):
    """Running statistics, random numbers and gradients are as before, though both forms have really run."""
    nets = (nn.Sequential(nn.Linear(23, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 2)) for _ in range(4))
    model, x = randomized(model_of(_one_input, nets=nn.ModuleList(nets))), randn(6, 23).requires_grad_()
    ran = []
    monkeypatch.setattr(worth, "FAR_AHEAD", 1e9)
    monkeypatch.setattr(worth, "_left", lambda planner, times, how: ran.append(times) or Refusal(how))
    monkeypatch.setattr(worth, "LEAST_GAIN", 1e9)
    monkeypatch.setattr(worth, "LEAST_GAIN_IN_TRAINING", 1e9)
    random, states = torch.get_rng_state(), []

    def backend(graph, inputs):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        rewritten_or_refused(graph.graph, inputs, Settings())
        states.extend((before[name], value.clone()) for name, value in model.state_dict().items())
        states.append((random, torch.get_rng_state()))
        return graph.forward

    with torch.set_grad_enabled(grad):
        torch.compile(model, backend=backend)(x)
    assert len(ran) == 1
    assert len(states) == 4 * 9 + 1
    assert all(torch.equal(before, after) for before, after in states)
    assert x.grad is None
    assert all(parameter.grad is None for parameter in model.parameters())
