"""Sums of linear layers as one product, and lanes kept behind the batch: equal however they are written, and only where nobody looks."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxfuse
from checks import assert_fused_equals, model_of, randn, randomized

ONE = "one product with the sum"


def nets(lanes: int = 5, inputs: int = 1, hidden: int = 6, outputs: int = 1, bias: bool = True) -> nn.ModuleList:
    return nn.ModuleList(
        nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs, bias=bias)) for _ in range(lanes)
    )


def columns(self: Any, x: Tensor) -> list[Tensor]:
    width = self.nets[0][0].in_features
    return [net(x[..., i * width : (i + 1) * width]) for i, net in enumerate(self.nets)]


def grown(lanes: list[Tensor]) -> Tensor:
    total = torch.zeros_like(lanes[0])
    for lane in lanes:
        total = total + lane
    return total


JOINS: dict[str, Any] = {
    "sum": lambda lanes: sum(lanes), "added up": grown, "stack": lambda lanes: torch.stack(lanes).sum(0),
    "stack last": lambda lanes: torch.stack(lanes, -1).sum(-1), "stack kept": lambda lanes: torch.stack(lanes, 1).sum(1, keepdim=True),
    "mean": lambda lanes: torch.stack(lanes).mean(0), "mean kept": lambda lanes: torch.stack(lanes, 1).mean(dim=1, keepdim=True),
    "unsqueezed": lambda lanes: torch.stack([lane.unsqueeze(0) for lane in lanes]).sum(0),
    "turned": lambda lanes: sum(lane.transpose(0, 1) for lane in lanes),
    "flattened": lambda lanes: sum(lane.flatten(0, 1) for lane in lanes),
}  # fmt: skip
OF_ONE: dict[str, Any] = {
    "reshaped": lambda lanes: sum(lane.reshape(-1, 1, 1) for lane in lanes),
    "cat": lambda lanes: torch.cat(lanes, 1).sum(1), "cat kept": lambda lanes: torch.cat(lanes, -1).sum(-1, keepdim=True),
    "cat mean": lambda lanes: torch.cat(lanes, 1).mean(1), "squeezed": lambda lanes: sum(lane.squeeze(-1) for lane in lanes),
    "squeezed stack": lambda lanes: torch.stack([lane.squeeze(-1) for lane in lanes], 1).sum(1),
}  # fmt: skip


@pytest.fixture(params=["folded", "addcmul_behind", "dot_behind"])
def preferred(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return prefer(monkeypatch, request.param)


def prefer(monkeypatch: pytest.MonkeyPatch, name: str) -> str:
    monkeypatch.setattr(import_module("fxfuse.planning.plan"), "_preferred", lambda options: name)
    return name


def lowerings(fused: nn.Module) -> list[str]:
    return [op.lowering for plan in fxfuse.report(fused).fused for op in plan.ops if op.op == "linear"]


@pytest.mark.parametrize("join", [*JOINS, *OF_ONE])
@pytest.mark.parametrize("bias", [True, False])
def test_every_join(preferred, join, bias):
    gather = {**JOINS, **OF_ONE}[join]
    model = randomized(model_of(lambda self, x: gather(columns(self, x)), nets=nets(bias=bias)))
    fused = assert_fused_equals(model, randn(7, 5), tune=False)
    used = {"folded": ONE}.get(preferred, preferred)
    assert used in lowerings(fused), fxfuse.report(fused)


@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("shape", [(6, 15), (4, 3, 15)], ids=["rows", "sequences"])
def test_several_inputs_and_outputs(monkeypatch, join, shape):
    prefer(monkeypatch, "folded")
    model = randomized(model_of(lambda self, x: JOINS[join](columns(self, x)), nets=nets(5, 3, 6, 4)))
    fused = assert_fused_equals(model, randn(*shape), tune=False)
    assert ONE in lowerings(fused)


def test_one_input_for_all(monkeypatch):
    prefer(monkeypatch, "folded")
    layers = nn.ModuleList(nn.Linear(4, 3) for _ in range(5))
    single = randomized(model_of(lambda self, x: sum(layer(x) for layer in self.nets), nets=layers))
    fused = assert_fused_equals(single, randn(6, 4), tune=False)
    assert lowerings(fused) == [ONE]
    deep = randomized(model_of(lambda self, x: torch.stack([net(x) for net in self.nets]).mean(0), nets=nets(4, 3, 6, 2)))
    assert ONE in lowerings(assert_fused_equals(deep, randn(6, 3), tune=False))


def test_vectors_and_scalars(monkeypatch):
    prefer(monkeypatch, "folded")

    def forward(self: Any, x: Tensor) -> Tensor:
        return sum(net(x[0, 3 * i : 3 * i + 3]) for i, net in enumerate(self.nets)) + x.sum()

    model = randomized(model_of(forward, nets=nets(5, 3, 6, 4)))
    assert ONE in lowerings(assert_fused_equals(model, randn(6, 15), tune=False))


def test_weights_that_are_computed(monkeypatch):
    prefer(monkeypatch, "folded")

    def forward(self: Any, x: Tensor) -> Tensor:
        weights = self.maker(x.mean(0)).view(5, 2, 3)
        return sum(F.linear(x[:, 3 * i : 3 * i + 3], weights[i]) for i in range(5))

    model = randomized(model_of(forward, maker=nn.Linear(15, 30)))
    assert ONE in lowerings(assert_fused_equals(model, randn(6, 15), tune=False))


def test_in_chunks(monkeypatch):
    prefer(monkeypatch, "folded")
    model = randomized(model_of(lambda self, x: torch.stack(columns(self, x)).mean(0), nets=nets(13, 2, 8, 3)))
    plan = import_module("fxfuse.planning.plan")
    emit = plan.Planner.emit
    monkeypatch.setattr(plan.Planner, "emit", lambda self, lowering, chunks=1, skipped=frozenset(): emit(self, lowering, 3, skipped))
    fused = assert_fused_equals(model, randn(6, 26), tune=False)
    assert f"{ONE}, 3 chunks" in lowerings(fused)


def test_beside_other_terms(monkeypatch):
    """Lanes of another width, a residual, and one network twice in the sum."""
    prefer(monkeypatch, "folded")

    def forward(self: Any, x: Tensor) -> Tensor:
        return sum(columns(self, x)) + sum(net(x) for net in self.wide) + x[:, :1] + self.nets[0](x[:, :1])

    model = randomized(model_of(forward, nets=nets(5), wide=nets(3, 5, 4)))
    assert_fused_equals(model, randn(6, 5), tune=False)


@pytest.mark.parametrize("forward", [
    lambda self, x: (sum(columns(self, x)), columns(self, x)),  # the lanes leave too
    lambda self, x: (lambda lanes: sum(lanes) + torch.stack(lanes).amax(0))(columns(self, x)),  # or are read again
    lambda self, x: torch.stack(columns(self, x)).sum((0, 1)),  # over rows as well
    lambda self, x: torch.stack(columns(self, x)).sum(0, dtype=torch.float32).double(),
    lambda self, x: torch.stack(columns(self, x), 1).sum(-1),  # not over lanes
    lambda self, x: sum(torch.tanh(lane) for lane in columns(self, x)),
    lambda self, x: sum(columns(self, x)[:-1]) + columns(self, x)[-1].sin(),  # not all of them
    lambda self, x: sum(lane.reshape(lane.shape[0], 1) for lane in columns(self, x)),  # whose size is read
], ids=["leave", "read again", "rows", "dtype", "features", "not linear", "some", "size"])  # fmt: skip
def test_not_where_it_is_no_such_sum(monkeypatch, forward):
    prefer(monkeypatch, "folded")
    model = randomized(model_of(forward, nets=nets()))
    fused = assert_fused_equals(model, randn(7, 5), tune=False, rtol_outputs=1e-6)
    assert ONE not in lowerings(fused), lowerings(fused)


def test_the_planner_tries_forms_behind_the_batch_together(monkeypatch):
    timing = import_module("fxfuse.planning.timing")
    samples = timing._samples
    monkeypatch.setattr(timing, "_samples", lambda functions, *_: samples(functions, 0.0, 3, 3))
    plan = import_module("fxfuse.planning.plan")
    monkeypatch.setattr(plan, "HOPELESS", 1e9)
    monkeypatch.setattr(plan, "LEAST_GAIN", 0.0)
    model = model_of(lambda self, x: sum(columns(self, x)), nets=nets(5))
    report = fxfuse.report(fxfuse.optimize(model, torch.randn(8, 5), validate=False, cache=False))
    names = [name for name, _ in report.fused[0].tried]
    assert any("addcmul_behind" in name and "folded" in name for name in names), names
