"""What a packed form may need at its peak where nobody set ``max_memory``: chunks, the loop, or more because it is so much faster."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from fxfuse.planning import plan_memory
from fxfuse.planning.choice import Choice
from fxfuse.planning.memory import peak_bytes
from fxfuse.planning.plan import Planner


class Networks(nn.Module):
    def __init__(self, lanes: int, hidden: int = 16) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(1, hidden), nn.Tanh(), nn.Linear(hidden, 1)) for _ in range(lanes))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1)


MODEL, X = Networks(12).double(), torch.randn(64, 12, dtype=torch.float64)


def peak(model: nn.Module) -> int:
    def run() -> Tensor:
        with torch.no_grad():
            return model(X)

    run()
    return peak_bytes(run)


def packed(monkeypatch: pytest.MonkeyPatch, gain: float, more: int, mode: str = "infer", times: float = 0.0) -> nn.Module:
    """The networks packed by a planner to which every packed form is ``gain`` times as fast as the loop, and the first one fastest: forms
    that are about as fast may differ in what they need, and a planner that measures takes one or the other.
    """

    def decided(self: Planner, choice: Choice) -> Choice:
        choice.seconds = (gain, 1.0)
        return choice

    monkeypatch.setattr(Planner, "decide", decided)
    monkeypatch.setattr(Planner, "_others", lambda self, choice: iter(()))
    monkeypatch.setattr(plan_memory, "MORE_IN_TRAINING" if mode == "train" else "MORE", more)
    monkeypatch.setattr(plan_memory, "TIMES", times)
    return fxfuse.optimize(MODEL, X, mode=mode, cache=False)


def chunks(fused: nn.Module) -> list[str]:
    return [op.lowering for plan in fxfuse.report(fused).fused for op in plan.ops if op.lowering.endswith("chunks")]


def test_more_than_usual_is_cut_into_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, whole = peak(MODEL), peak(packed(monkeypatch, 2.0, 1 << 30))
    more = (whole - loop) // 2
    fused = packed(monkeypatch, 2.0, more)
    assert chunks(fused)
    assert loop < peak(fused) <= loop + more < whole
    (plan,) = fxfuse.report(fused).fused
    assert plan.peak_bytes is not None
    assert plan.peak_bytes[1] <= plan.peak_bytes[0] + more
    torch.testing.assert_close(fused(X), MODEL(X), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["infer", "train"])
def test_what_no_chunks_keep_has_to_be_worth_it(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    fused = packed(monkeypatch, 2.0, -(1 << 30), mode)
    assert fxfuse.report(fused).fused
    assert not chunks(fused)
    left = packed(monkeypatch, 1.1, -(1 << 30), mode)
    (refusal,) = fxfuse.report(left).refused
    assert str(refusal).startswith("left as a loop: packed runs 1.10x, and needs ")
    assert " bytes at its peak, the loop " in str(refusal)
    assert torch.equal(left(X), MODEL(X))


@pytest.mark.parametrize(("slower", "cut"), [(1.0, True), (1.2, False)])
def test_a_few_bytes_more_are_spared_where_that_costs_no_time(monkeypatch: pytest.MonkeyPatch, slower: float, cut: bool) -> None:
    """In training: less than ``MORE_IN_TRAINING`` above the loop, but more than ``TIMES`` what it needs."""
    (whole,) = fxfuse.report(packed(monkeypatch, 2.0, 1 << 30, "train", times=1e9)).fused
    assert whole.peak_bytes is not None
    loop, most = whole.peak_bytes
    assert most > loop
    monkeypatch.setattr(Planner, "compare", lambda self, steps, others: (slower, 1.0))
    fused = packed(monkeypatch, 2.0, 1 << 30, "train", times=(loop + 0.6 * (most - loop)) / loop)
    (plan,) = fxfuse.report(fused).fused
    assert bool(chunks(fused)) is cut
    assert plan.peak_bytes is not None
    assert (plan.peak_bytes[1] < most) is cut
    torch.testing.assert_close(fused(X), MODEL(X), rtol=1e-12, atol=1e-12)
