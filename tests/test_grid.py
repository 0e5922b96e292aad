"""``benchmarks/grid.py``: its forms by hand compute what the loops do, its goals say what results say, a run that was stopped goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import grid, grid_goals, grid_peers
from benchmarks.grid_cases import FAMILIES, Case, Loop, by_hand, cases, example, sample, short, smallest

CPU = torch.device("cpu")


@pytest.mark.parametrize("case", list(smallest()), ids=lambda case: case.key)
def test_peers_are_equal_to_the_loop(case):
    torch.manual_seed(0)
    model, x = Loop(case).double(), example(case, CPU)
    x = x.double() if x.is_floating_point() else x
    peers: dict[str, nn.Module] = {"by hand": by_hand(case, model)}
    if case.family != "recurrent":  # vmap has no rule for a GRU
        peers["vmap"] = grid_peers.Stacked(case, model)
    expected = model(x)
    weight = torch.randn(expected.shape, dtype=torch.float64)
    (expected * weight).sum().backward()
    squares = sum(p.grad.pow(2).sum() for p in model.parameters() if p.grad is not None)
    for name, peer in peers.items():
        out = peer(x)
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12, msg=name)
        (out * weight).sum().backward()
        own = sum(p.grad.pow(2).sum() for p in peer.parameters() if p.grad is not None)
        torch.testing.assert_close(own, squares, rtol=1e-10, atol=1e-12, msg=name)
        assert sum(p.numel() for p in peer.parameters()) == sum(p.numel() for p in model.parameters())


def test_the_grid_covers_what_it_says():
    found = cases()
    assert len({case.key for case in found}) == len(found)
    for name, values in (("lanes", (2, 512)), ("width", (4, 256)), ("batch", (1, 4096))):
        given = [getattr(case, name) for case in found]
        assert (min(given), max(given)) == values
    assert {case.family for case in found} == {case.family for case in found[:60]} == set(FAMILIES)
    assert {(case.shared, case.join) for case in found} == {(s, j) for s in (False, True) for j in ("cat", "sum")}
    assert Case("mlp", 128, 32, 1024) in short()


def result(case: Case, **seconds: float) -> dict[str, Any]:
    """As if each measure of the case had taken so many microseconds."""
    times = {name.replace("_", " "): value * 1e-6 for name, value in seconds.items()}
    return {
        "case": vars(case), "key": case.key, "seconds": dict.fromkeys(grid_goals.MEASURES, times), "again": {}, "left": False,
        "peak": {"inference": {"loop": 1 << 20, "fused": 2 << 20}, "forward + backward": {"loop": 1 << 20, "fused": 2 << 20}},
    }  # fmt: skip


def said(results: list[dict[str, Any]], passes: float | None = 1.0) -> dict[str, bool | None]:
    return {goal.name: goal.reached for goal in grid_goals.goals(results, passes)}


def test_goals():
    good = result(Case("mlp", 64, 32, 16), loop=4000, fused=300, vmap=900, by_hand=300, compiled_loop=1000)
    found = said([good])
    assert all(reached is not False for reached in found.values()), found
    assert found["(c) MLP lanes, 11.0x the loop, inference"]
    assert found["(e) batch 1024, 128 lanes, width 32: 1.4x"] is None
    bad = result(Case("mlp", 64, 32, 16), loop=100, fused=300, vmap=300, by_hand=200, compiled_loop=300)
    bad["again"] = {measure: [0.3, 0.4] for measure in grid_goals.MEASURES}
    bad["peak"] = {"inference": {"loop": 0, "fused": 65 << 20}, "forward + backward": {"loop": 10, "fused": 23}}
    missed = {name for name, reached in said([bad], 6.0).items() if reached is False}
    assert {name[:3] for name in missed} == {"(a)", "(b)", "(c)", "(d)", "(f)", "(g)"}
    bad["again"] = {measure: [0.3, 0.98] for measure in grid_goals.MEASURES}
    assert said([bad])["(a) never slower than the loop"], "slower means three times"
    near = result(Case("mlp", 8, 4, 1), loop=50, fused=47, by_hand=40)
    assert said([near])["(b) at most 8 us over it, inference"]
    far = result(Case("mlp", 8, 4, 1), loop=50, fused=49, by_hand=40)
    assert said([far])["(b) at most 8 us over it, inference"] is False
    large = result(Case("mlp", 128, 32, 1024), loop=130, fused=100)
    assert said([large])["(e) batch 1024, 128 lanes, width 32: 1.4x"] is False
    assert set(said([], None).values()) == {None}


def test_the_mean_is_geometric():
    assert grid_goals.mean([2, 8]) == pytest.approx(4)
    assert math.isnan(grid_goals.mean([]))


def test_nodes_of_the_goal_for_the_passes():
    assert grid_goals.passes_seconds(3) > 0


def test_a_run_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    case, other = Case("mlp", 3, 4, 5), Case("norm", 2, 4, 3, True, "sum")
    monkeypatch.setattr(grid, "short", lambda: [case, other])
    monkeypatch.setattr(grid, "AGAIN_SECONDS", 0.0)
    monkeypatch.setattr(grid, "passes_seconds", lambda: 1.0)
    threads = str(torch.get_num_threads())
    arguments = ["--seconds", "0", "--threads", threads, "--device", "cpu", "--out", str(tmp_path)]
    assert grid.main([*arguments, "--only", "mlp"]) == 0
    lines = (tmp_path / "grid.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == [case.key]
    with (tmp_path / "grid.jsonl").open("a") as file:
        file.write('{"environment": "another", "key": "mlp"}\n{"cut off')
        file.write("\n")
    capsys.readouterr()
    measured: list[str] = []
    original = grid.measured
    monkeypatch.setattr(grid, "measured", lambda given, *rest: (measured.append(given.key), original(given, *rest))[1])
    grid.main(arguments)
    assert measured == [other.key]
    out = capsys.readouterr().out
    assert "(a) never slower than the loop" in out
    summary = json.loads((tmp_path / "grid.json").read_text())
    assert {entry["key"] for entry in summary["results"]} == {case.key, other.key}
    assert set(summary["results"][0]["seconds"]["inference"]) == {"loop", "vmap", "by hand", "fused"}
    grid.main([*arguments, "--report"])
    assert measured == [other.key]
    grid.main([*arguments, "--out", str(tmp_path / "later"), "--minutes", "-1"])
    assert measured == [other.key], "no case is started after the time is up"


def test_every_beginning_of_a_sample_is_spread():
    whole, first = set(cases()), sample(40)
    assert len(first) == len(set(first)) == 40
    assert set(first) <= whole
    assert {case.family for case in first[:16]} == set(FAMILIES)
    assert sample(12) == first[:12]
    assert set(sample(10**6)) == whole
