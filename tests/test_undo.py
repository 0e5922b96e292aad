"""A rewrite that differs is undone, and only it: a wrong rule is put in place of a right one, and verification has to find it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from fxfuse.passes.rules import RULES
from fxfuse.passes.writer import Packed


class TwoLoops(nn.Module):
    """Two loops over the columns of one input; ``softmax`` is in one of them only."""

    def __init__(self, lanes: int = 5) -> None:
        super().__init__()
        self.plain = nn.ModuleList(nn.Sequential(nn.Linear(2, 3), nn.Tanh()) for _ in range(lanes))
        self.gated = nn.ModuleList(nn.Sequential(nn.Linear(2, 4), nn.Softmax(-1)) for _ in range(lanes))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        plain = torch.stack([net(x[:, i]) for i, net in enumerate(self.plain)], 1)
        gated = torch.stack([net(x[:, i]) for i, net in enumerate(self.gated)], 1)
        return plain, gated


class OneLoop(nn.Module):
    def __init__(self, lanes: int = 5) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(2, 3), nn.Softmax(-1)) for _ in range(lanes))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([net(x[:, i]) for i, net in enumerate(self.nets)], 1)


@pytest.fixture
def wrong_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    right = RULES["softmax"]

    def wrong(emitter: Any, bundle: Any) -> Any:
        value, lowering = right.apply(emitter, bundle)
        return Packed(emitter.call(torch.mul, value.node, 1.0 + 1e-9), value.dim), lowering

    monkeypatch.setitem(RULES, "softmax", dataclasses.replace(right, vectorize=wrong))


@pytest.mark.usefixtures("wrong_softmax")
@pytest.mark.parametrize("inplace", [False, True])
def test_only_the_lane_set_that_differs_is_undone(inplace: bool) -> None:
    model, x = TwoLoops().double(), torch.randn(7, 5, 2, dtype=torch.float64)
    expected = model(x)
    fused = fxfuse.optimize(model, x, objective="launches", inplace=inplace)
    report = fxfuse.report(fused)
    assert {op.op for plan in report.fused for op in plan.ops} == {"linear", "tanh"}
    assert [op.lanes for plan in report.fused for op in plan.ops if op.op == "linear"] == [5]
    (refusal,) = report.refused
    assert str(refusal).startswith("undone: the rewritten form differs: ")
    assert refusal.place is not None
    assert report.validation is not None
    assert report.validation.ok
    for got, wanted in zip(fused(x), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    assert not report.fallbacks


@pytest.mark.usefixtures("wrong_softmax")
def test_a_region_that_differs_in_its_only_lane_set_is_undone() -> None:
    model, x = OneLoop(), torch.randn(7, 5, 2)
    fused = fxfuse.optimize(model, x, objective="launches")
    assert not fxfuse.report(fused).fused
    (refusal,) = fxfuse.report(fused).refused
    assert str(refusal).startswith("undone: the rewritten form differs: ")
    assert torch.equal(fused(x), model(x))


@pytest.mark.usefixtures("wrong_softmax")
def test_a_region_next_to_one_that_differs_stays_fused() -> None:
    model, x = nn.Sequential(OneLoop(), nn.Flatten(1), nn.Unflatten(1, (5, 3)), TwoLoopsOfThree()), torch.randn(7, 5, 2)
    fused = fxfuse.optimize(model, x, objective="launches")
    assert [plan.path for plan in fxfuse.report(fused).fused] == ["3"]
    torch.testing.assert_close(fused(x), model(x), rtol=1e-5, atol=1e-6)


class TwoLoopsOfThree(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Linear(3, 2) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([net(x[:, i]) for i, net in enumerate(self.nets)], 1)


class Drawing(nn.Module):
    """Recurrent lanes, whose rules are tried on random numbers, beside lanes with the wrong rule."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.GRU(2, 3, batch_first=True) for _ in range(3))
        self.gates = nn.ModuleList(nn.Sequential(nn.Linear(2, 4), nn.Softmax(-1), nn.Dropout(0.5)) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        states = torch.stack([torch.nn.functional.dropout(net(x)[0], 0.5, self.training) for net in self.nets])
        return states, torch.stack([net(x[:, i]) for i, net in enumerate(self.gates)], 1)


@pytest.mark.usefixtures("wrong_softmax")
def test_undoing_draws_no_random_numbers_of_the_caller() -> None:
    model, x = Drawing().double(), torch.randn(4, 3, 2, dtype=torch.float64)
    before = torch.get_rng_state()
    fused = fxfuse.optimize(model, x, objective="launches")
    assert torch.equal(before, torch.get_rng_state())
    assert [str(refusal).partition(":")[0] for refusal in fxfuse.report(fused).refused] == ["undone"]
    # Without the lanes with the wrong rule in every mode, also in the one in which they have one op more.
    (plan,) = fxfuse.report(fused).fused
    assert {op.op for op in plan.ops} >= {"gru"}
    assert not {op.op for op in plan.ops} & {"linear", "softmax"}
    fxfuse.verify(model, fused, x, raises=True)
