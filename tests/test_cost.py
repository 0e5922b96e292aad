"""The static model: it ranks forms as they rank by what they do, chooses for ``tune=False``, may leave the loop, spares hopeless timing."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from checks import assert_fused_equals, randn, randomized
from fxfuse.planning import cost, timing


class Nets(nn.Module):
    """``join``: how lanes come together; ``inputs`` columns each."""

    def __init__(self, lanes: int = 8, inputs: int = 1, hidden: int = 16, outputs: int = 1) -> None:
        super().__init__()
        self.inputs = inputs
        self.nets = nn.ModuleList(
            nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
            for _ in range(lanes)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([net(x[:, i * self.inputs : (i + 1) * self.inputs]) for i, net in enumerate(self.nets)], 1)


def graph(call: Any, *shapes: tuple[int, ...]) -> torch.fx.Graph:
    """A graph of one call on tensors of these shapes."""
    made = torch.fx.Graph()
    nodes = []
    for index, shape in enumerate(shapes):
        nodes.append(made.placeholder(f"x{index}"))
        nodes[-1].meta["val"] = torch.zeros(shape)
    result = made.call_function(call[0], tuple(nodes) + call[1:])
    result.meta["val"] = call[0](*(node.meta["val"] for node in nodes), *call[1:])
    made.output([result])
    return made


def seconds(call: Any, *shapes: tuple[int, ...], train: bool = False) -> float:
    made = graph(call, *shapes)
    needs = {node: True for node in made.nodes if node.op == "placeholder"} if train else None
    return cost.emitted_seconds(made, "cpu", needs)


def test_more_work_costs_more():
    for small, large in (
        ([(8, 16, 16), (8, 16, 16)], [(8, 512, 64), (8, 64, 64)]), ([(4, 8, 8), (4, 8, 8)], [(64, 8, 8), (64, 8, 8)]),
    ):  # fmt: skip
        assert seconds((torch.bmm,), *small) < seconds((torch.bmm,), *large)
        assert seconds((torch.bmm,), *small) < seconds((torch.bmm,), *small, train=True)
    assert seconds((torch.relu,), (10,)) < seconds((torch.relu,), (10**7,))
    assert seconds((torch.relu,), (10**6,)) < seconds((torch.tanh,), (10**6,))


def test_views_cost_less_than_copies():
    assert seconds((torch.transpose, 0, 1), (512, 512)) < seconds((torch.relu,), (512, 512))
    whole = seconds((torch.flatten, 0, 1), (64, 64, 64))
    made = graph((torch.flatten, 0, 1), (64, 64, 64))
    source = next(node for node in made.nodes if node.op == "placeholder")
    source.meta["val"] = torch.zeros(64, 64, 64).transpose(1, 2).transpose(0, 1)
    assert cost.emitted_seconds(made, "cpu", None) > whole, "these strides have to be copied"


def test_special_products_are_told_apart():
    """One column, by a batched product, is far slower than by rows; over one element, an elementwise op wins."""
    column = seconds((torch.bmm,), (128, 64, 32), (128, 32, 1))
    row = seconds((torch.bmm,), (128, 1, 32), (128, 32, 64))
    assert row < column / 2
    outer = seconds((torch.bmm,), (128, 64, 1), (128, 1, 32))
    assert seconds((torch.mul,), (128, 64, 1), (128, 1, 32)) < outer
    grouped = seconds((torch.conv1d, None, 1, 0, 1, 64), (1, 64 * 32, 64), (64 * 32, 32, 1))
    assert seconds((torch.bmm,), (64, 64, 32), (64, 32, 32)) < grouped


def test_short_rows_cost_by_the_row():
    """Of equal bytes, sums, broadcasts and norms over rows of 4 take longer than those over rows of 256."""
    for call in ((torch.sum, -1), (torch.nn.functional.layer_norm,)):
        short, long = ((call[0], (4,)), (call[0], (256,))) if len(call) == 1 else (call, call)
        assert seconds(long, (512, 256)) < seconds(short, (32768, 4)) / 2
    assert seconds((torch.mul,), (512, 256), (512, 1)) < seconds((torch.mul,), (32768, 4), (32768, 1)) / 2
    assert seconds((torch.mul,), (32768, 4), (32768, 4)) < seconds((torch.mul,), (32768, 4), (32768, 1)) / 2
    # Along all of the inner dims: one stretch for each lane.
    assert seconds((torch.mul,), (64, 512, 4), (64, 1, 1)) < seconds((torch.mul,), (64, 512, 4), (64, 512, 1)) / 2


def test_one_output_is_a_product_from_the_left_in_inference():
    """128 lanes x 64 rows x 32: 57 us as columns, 70 us as a product and a sum, 38 us as rows."""
    from_left = seconds((torch.bmm,), (128, 1, 32), (128, 32, 64))
    dot = seconds((torch.mul,), (128, 64, 32), (128, 1, 32)) + seconds((torch.sum, -1), (128, 64, 32))
    assert from_left < 0.9 * dot


def test_the_bandwidth_falls_before_the_cache_is_full():
    """A chain of ops over 8 MB each is slower than the same in eighths of it."""
    whole, parts = seconds((torch.relu,), (1 << 21,)), 8 * seconds((torch.relu,), (1 << 18,))
    assert parts < whole
    assert seconds((torch.relu,), (1 << 20,)) < 8 * seconds((torch.relu,), (1 << 17,))


def test_threads_count(monkeypatch):
    one = seconds((torch.bmm,), (64, 128, 128), (64, 128, 128))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert seconds((torch.bmm,), (64, 128, 128), (64, 128, 128)) < one / 2
    assert seconds((torch.bmm,), (2, 4, 4), (2, 4, 4)) > one / 1000


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_without_tuning_nothing_is_timed_and_the_result_is_right(mode, monkeypatch):
    monkeypatch.setattr(timing, "_samples", lambda *_: pytest.fail("something was timed"))
    for model, x in ((Nets(12), randn(16, 12)), (Nets(6, 3, 8, 2), randn(9, 18))):
        fused = assert_fused_equals(randomized(model), x, objective="time", tune=False, mode=mode)
        lowerings = {op.lowering for op in fxfuse.report(fused).fused[0].ops if op.op == "linear"}
        assert "grouped_conv" not in lowerings


def test_chunks_where_all_at_once_leaves_the_cache():
    model, x = Nets(128, 1, 32), torch.randn(1024, 128)
    report = fxfuse.report(fxfuse.optimize(model, x, tune=False, validate=False, mode="infer"))
    assert all("chunks" in op.lowering for op in report.fused[0].ops if op.op == "linear"), report


def test_the_loop_where_the_model_calls_it_faster(monkeypatch):
    monkeypatch.setattr(import_module("fxfuse.planning.estimate"), "loop_seconds", lambda *_: 1e-9)
    model, x = Nets(4), torch.randn(8, 4)
    report = fxfuse.report(fxfuse.optimize(model, x, tune=False, validate=False))
    assert not report.fused
    (refusal,) = report.refused
    assert "left as a loop: packed is estimated at 0.00x, from its shapes (forward and backward); tune=True measures it" in str(refusal)
    assert fxfuse.report(fxfuse.optimize(model, x, tune=False, validate=False, objective="launches")).fused


def test_large_wide_lanes_are_hardly_a_gain(monkeypatch):
    """Two products of 1,024 x 1,024 on 1,024 rows: dispatch is nothing there, and what is computed is the same."""
    estimates: dict[str, float] = {}

    def keeping(name: str) -> Any:
        original = getattr(cost, name)
        return lambda *given: estimates.setdefault(name, original(*given))

    for name in ("loop_seconds", "emitted_seconds"):
        monkeypatch.setattr(import_module("fxfuse.planning.estimate"), name, keeping(name))
    for model, x, gain in ((Nets(2, 1024, 1024, 1024), torch.randn(1024, 2048), (0.8, 1.25)), (Nets(64), torch.randn(4, 64), (5, 100))):
        estimates.clear()
        fxfuse.optimize(model, x, tune=False, validate=False)
        assert gain[0] < estimates["loop_seconds"] / estimates["emitted_seconds"] < gain[1]


def test_hopeless_candidates_are_not_timed(monkeypatch):
    plan = import_module("fxfuse.planning.plan")
    samples = timing._samples
    monkeypatch.setattr(timing, "_samples", lambda functions, *_: samples(functions, 0.0, 3, 3))
    model, x = Nets(), torch.randn(8, 8)

    def tried() -> list[str]:
        report = fxfuse.report(fxfuse.optimize(model, x, validate=False, cache=False))
        return [name for each in report.fused for name, _ in each.tried]

    monkeypatch.setattr(plan, "LEAST_GAIN", 0.0)
    monkeypatch.setattr(plan, "HOPELESS", 1e9)
    everything = tried()
    assert any("grouped_conv" in name for name in everything)
    monkeypatch.setattr(plan, "HOPELESS", 0.0)
    assert not tried()


def test_the_calibration_measures_every_constant(monkeypatch):
    from dataclasses import fields

    from benchmarks import calibrate

    monkeypatch.setattr(calibrate, "median", lambda function, seconds, device: (function(), 1e-5)[1])
    monkeypatch.setattr(torch, "randn", lambda *shape, **_: torch.zeros(*(min(n, 8) if len(shape) == 1 else n for n in shape)))
    found = calibrate.Calibration(torch.device("cpu"), 0.0).constants()
    assert set(found) == {field.name for field in fields(cost.Rates)} - {"threads"}
    cost.Rates(**found)
