"""The search for faster forms ends after some seconds, with the best so far, and says so."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from checks import assert_fused_equals, randn, randomized
from fxfuse.planning import patience, timing
from fxfuse.planning.patience import Patience

WHEN_OVER = "the search for faster forms took its 0 s: about"


class Nets(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1)) for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which goes on by itself not at all."""
    now = [100.0]
    monkeypatch.setattr(patience.time, "perf_counter", lambda: now[0])
    return now


def test_time_runs_inside_only(clock: list[float]) -> None:
    search = Patience(10.0)
    assert not search.over
    with search:
        clock[0] += 6.0
        assert not search.over
    clock[0] += 60.0
    assert not search.over
    with search:
        clock[0] += 3.0
        assert not search.over
        clock[0] += 1.0
        assert search.over
    assert search.over


def test_what_is_left_out_is_said() -> None:
    search = Patience(10.0)
    assert search.fact() is None
    search.untimed += 1
    assert search.fact() == "the search for faster forms took its 10 s: about 1 candidate was not timed"
    search.untimed += 13
    assert search.fact() == "the search for faster forms took its 10 s: about 14 candidates were not timed"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little is timed, and the packed form counts as faster, whatever the machine is doing."""
    samples = timing._samples
    monkeypatch.setattr(timing, "_samples", lambda functions, budget, least, most: samples(functions, 0.0, 3, 3))
    monkeypatch.setattr(import_module("fxfuse.planning.plan"), "LEAST_GAIN", 0.0)
    monkeypatch.setattr(import_module("fxfuse.planning.plan_by_size"), "NO_SLOWER", 1e9)


@pytest.mark.parametrize("options", [{}, {"tune_for": [2, 40]}])
@pytest.mark.parametrize("mode", ["train", "infer"])
def test_a_search_that_is_cut_short(monkeypatch: pytest.MonkeyPatch, quick: None, mode: str, options: dict[str, Any]) -> None:
    model, x = randomized(Nets()), randn(5, 8)
    whole = fxfuse.report(fxfuse.optimize(model, x, mode=mode, cache=False, **options))
    assert whole.fused[0].tried
    assert not any(WHEN_OVER in fact for fact in whole.facts)
    monkeypatch.setattr(patience, "SECONDS", 0.0)
    fused = fxfuse.optimize(model, x, mode=mode, cache=False, **options)
    report = fxfuse.report(fused)
    assert report.fused[0].seconds is not None, "what was chosen is still held against the loop"
    assert not report.fused[0].tried
    assert [fact for fact in report.facts if WHEN_OVER in fact]
    assert WHEN_OVER in " ".join(str(report).split())
    assert_fused_equals(model, x, mode=mode, cache=False, **options)


def test_far_behind_or_long_is_not_timed_for_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    budgets: list[float] = []
    took = [0.0]

    def samples(functions: Any, budget: float, least: int, most: int) -> list[list[float]]:
        budgets.append(budget)
        now[0] += took[0]
        return [[1.0] * 7, [slower] * 7]

    now = [0.0]
    monkeypatch.setattr(timing, "_samples", samples)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    for took[0], slower, expected in ((0.1, 1.1, [0.0, 0.25]), (0.1, 2.0, [0.0]), (0.6, 1.1, [0.0])):
        budgets.clear()
        assert timing.ratio(lambda: None, lambda: None, budget=0.25) == (slower, slower)
        assert budgets == expected
