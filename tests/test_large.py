"""Models whose weights should not be there twice, and models of very many modules, calls and levels.

The threshold is set to nothing here, so that small models take the way of large ones. The real sizes are in ``benchmarks/stress.py`` and
in the tests marked ``stress``.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from everything import assert_unchanged, everything
from small_loops import KINDS
from torch import Tensor, nn

import fxfuse
from checks import assert_equal_models, assert_same_state, mlp, model_of, randn, randomized
from fxfuse.passes.rules import RULES
from fxfuse.passes.writer import Packed
from fxfuse.weights import large

STRESS = Path(__file__).resolve().parents[1] / "benchmarks" / "stress.py"


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large, "LARGE", 0)


def storages(model: nn.Module) -> int:
    return len({p.untyped_storage().data_ptr() for p in model.parameters()})


@pytest.mark.parametrize(("kind", "inplace"), [
    *[("columns", True), ("conv_norm", False), ("experts", True), ("frozen", True)],
    *(pytest.param(kind, inplace, marks=pytest.mark.stress) for kind in KINDS for inplace in (True, False)),
])  # fmt: skip
def test_small_models_on_the_way_of_large_ones(kind: str, inplace: bool) -> None:
    model, inputs = KINDS[kind]()
    given = copy.deepcopy(model)
    before = everything(given)
    fused = fxfuse.optimize(given, inputs(1, 6), objective="launches", inplace=inplace)
    report = fxfuse.report(fused)
    assert report.fused, str(report)
    assert report.validation is not None
    assert report.validation.ok
    assert any("compared in their own dtype, without a float64 copy" in note for note in report.notes)
    assert (fused is given) is inplace
    if not inplace:
        assert_unchanged(before, everything(given), kind)
    assert_same_state(fxfuse.original_state_dict(fused), model.state_dict(), kind)
    assert [p.requires_grad for p in fxfuse.unfuse(fused).parameters()] == [p.requires_grad for p in model.parameters()]
    assert_equal_models(model, fused, [(inputs(2, 6), {}), (inputs(3, 3), {})])
    assert not report.fallbacks


def test_weights_lie_where_the_pack_lies() -> None:
    """One buffer per pack, no copy that lives on: the model's Parameters are views of it from the move on."""
    model, inputs = KINDS["columns"]()
    members = [net[0].weight for net in model.nets]  # type: ignore[union-attr]
    fused = fxfuse.optimize(model, inputs(1, 6), objective="launches", inplace=True)
    addresses = {member.untyped_storage().data_ptr() for member in members}
    assert addresses == {dict(fused.named_parameters())["packed.nets.0.weight"].untyped_storage().data_ptr()}


def test_shared_parameters_of_a_large_model() -> None:
    model, inputs = KINDS["conv_norm"]()
    given = copy.deepcopy(model)
    optimizer = torch.optim.SGD(given.parameters(), 0.1)
    fused = fxfuse.optimize(given, objective="launches", tune=False)
    for each in (model, fused):
        each.eval()(*inputs(1, 6))
    assert fxfuse.report(fused).fused
    assert_equal_models(model, fused, [(inputs(2, 6), {}), (inputs(3, 3), {})])
    fused.zero_grad()
    fused(*inputs(4, 5)).sum().backward()
    expected = torch.optim.SGD(model.parameters(), 0.1)
    model.zero_grad()
    model(*inputs(4, 5)).sum().backward()
    optimizer.step()
    expected.step()
    for name, tensor in model.named_parameters():
        torch.testing.assert_close(dict(given.named_parameters())[name], tensor, rtol=1e-10, atol=1e-12)


def test_timed_and_left_as_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the packed form is slower, the model is what it was, but that its weights lie side by side."""
    monkeypatch.setattr(import_module("fxfuse.pipeline"), "medians", lambda calls, budget: [1.0, 2.0])
    model, inputs = KINDS["columns"]()
    given = copy.deepcopy(model)
    for inplace in (True, False):
        fused = fxfuse.optimize(given, inputs(1, 6), inplace=inplace)
        assert not fxfuse.report(fused).fused
        assert "left as a loop: packed runs 0.50x (inference; weights as large as these" in str(fxfuse.report(fused).refused[-1])
        assert type(fused) is type(model)
        assert_same_state(fused.state_dict(), model.state_dict(), "left as a loop")
        assert_equal_models(model, fused, [(inputs(2, 6), {})])


class TwoLoops(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = model_of(_loop, nets=nn.ModuleList(mlp(2, 3, 2) for _ in range(4)))
        self.two = model_of(_loop, nets=nn.ModuleList(nn.Sequential(nn.Linear(2, 4), nn.Softmax(-1)) for _ in range(4)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.one(x), self.two(x)


def _loop(self: Any, x: Tensor) -> Tensor:
    return torch.stack([net(x[:, i]) for i, net in enumerate(self.nets)], 1)


@pytest.mark.parametrize("factor", [1 + 1e-5, 1 + 1e-12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_wrong_rule_is_found_and_undone_alone(factor: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    right = RULES["softmax"]

    def wrong(emitter: Any, bundle: Any) -> Any:
        value, lowering = right.apply(emitter, bundle)
        return Packed(emitter.call(torch.mul, value.node, factor), value.dim), lowering

    monkeypatch.setitem(RULES, "softmax", dataclasses.replace(right, vectorize=wrong))
    model = randomized(TwoLoops()).to(dtype)
    x = randn(6, 4, 2).to(dtype)
    given = copy.deepcopy(model)
    fused = fxfuse.optimize(given, x, objective="launches", inplace=True)
    ops = {op.op for plan in fxfuse.report(fused).fused for op in plan.ops}
    if factor - 1 < 1e-10:  # rounding
        assert {"linear", "softmax"} <= ops
        return
    assert "linear" in ops
    assert "softmax" not in ops
    assert any("undone: the rewritten form differs" in str(refusal) for refusal in fxfuse.report(fused).refused)
    for got, want in zip(fused(x), model(x)):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    assert_same_state(fxfuse.original_state_dict(fused), model.state_dict(), "undone")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("at", [2, 6, 15])
def test_a_failure_while_weights_move_leaves_their_values(error: type[BaseException], at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = KINDS["columns"]()
    given = copy.deepcopy(model)
    calls, right = [0], large.lane_view

    def failing(*args: Any) -> Tensor:
        calls[0] += 1
        if calls[0] == at:
            raise error("injected")
        return right(*args)

    monkeypatch.setattr(large, "lane_view", failing)
    objects = [id(p) for p in given.parameters()]
    try:
        result = fxfuse.optimize(given, inputs(1, 6), objective="launches", inplace=True)
        assert "fxfuse failed (RuntimeError: injected)" in str(fxfuse.report(result).refused[-1])
    except (KeyboardInterrupt, MemoryError):
        result = given
    assert calls[0] == at
    assert result is given
    assert [id(p) for p in given.parameters()] == objects
    assert_same_state(given.state_dict(), model.state_dict(), "values")
    assert_equal_models(model, given, [(inputs(2, 6), {})])


def test_places_that_overlap_are_seen_before_anything_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = KINDS["columns"]()
    given, right = copy.deepcopy(model), large.lane_view
    monkeypatch.setattr(large, "lane_view", lambda recipe, packed, index: right(recipe, packed, index // 2))
    result = fxfuse.optimize(given, inputs(1, 6), objective="launches", inplace=True)
    assert "do not tile it); please report it" in str(fxfuse.report(result).refused[-1])
    assert_same_state(given.state_dict(), model.state_dict(), "values")
    assert storages(given) == storages(model)


# -- many modules, calls, levels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [200])
def test_deep_nesting(levels: int) -> None:
    inner: nn.Module = model_of(_loop, nets=nn.ModuleList(mlp(2, 3, 2) for _ in range(3)))
    for _ in range(levels):
        inner = nn.Sequential(inner)
    model, limit = randomized(inner), sys.getrecursionlimit()
    fused = fxfuse.optimize(model, randn(5, 3, 2), objective="launches", tune=False)
    report = fxfuse.report(fused)
    assert report.fused, str(report)
    assert report.validation is not None
    assert report.validation.ok
    assert not [note for note in report.validation.notes if "Recursion" in note]
    assert sys.getrecursionlimit() == limit
    assert_equal_models(model, fused, [(randn(4, 3, 2, seed=5), {})])


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_model_on_meta_is_left_with_one_sentence(device: str, inplace: bool) -> None:
    """And fuses once it has weights."""
    model, inputs = KINDS["conv_norm"]()
    empty = copy.deepcopy(model).to("meta")
    before = everything_but_bits(empty)
    (x,) = inputs(1, 6)
    result = fxfuse.optimize(empty, x.to(device), objective="launches", inplace=inplace)
    (refusal,) = fxfuse.report(result).refused
    assert str(refusal).startswith("it has tensors on the meta device, where nothing can be computed or compared: give it weights first")
    assert type(result) is type(empty)
    assert (result is empty) is inplace
    assert everything_but_bits(empty) == before
    result.load_state_dict(model.state_dict(), assign=True)
    fused = fxfuse.optimize(result, x, objective="launches", inplace=inplace)
    assert fxfuse.report(fused).fused
    assert_equal_models(model, fused, [(inputs(2, 6), {})])


def everything_but_bits(model: nn.Module) -> Any:
    return [(name, id(t), t.shape, t.device) for name, t in [*model.named_parameters(), *model.named_buffers()]]


def test_a_model_that_gets_its_weights_before_its_first_call() -> None:
    model, inputs = KINDS["columns"]()
    fused = fxfuse.optimize(copy.deepcopy(model).to("meta"), objective="launches", tune=False)
    fused.load_state_dict(model.state_dict(), assign=True)
    fused(*inputs(1, 6))
    assert fxfuse.report(fused).fused
    assert_equal_models(model, fused, [(inputs(2, 6), {})])


def run_stress(case: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, str(STRESS), *case.split()], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(found)
    return found


@pytest.mark.stress
@pytest.mark.parametrize(("case", "times"), [
    ("large --mib 1024 --inplace", 1.3), ("large --mib 1024 --inplace --objective time", 1.3), ("large --mib 1024", 2.3),
])  # fmt: skip
def test_a_gigabyte_of_weights(case: str, times: float) -> None:
    found = run_stress(case)
    assert found["times_the_model"] < times
    assert found["equal"]
    assert found["error"] < 1e-4
    assert found["fused"] == 1 or "time" in case


@pytest.mark.stress
@pytest.mark.parametrize("case", ["lanes --lanes 2000 --ops 3", "lanes --lanes 2000 --ops 50 --untuned", "chain --ops 100000 --untuned"])
def test_very_many_calls(case: str) -> None:
    found = run_stress(case)
    assert found["fused"] == 1
    assert found["equal"]
    assert found["error"] < 1e-5
