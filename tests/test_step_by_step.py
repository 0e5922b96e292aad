"""Recording sees the steps of nn.MultiheadAttention, not one call that hides them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxfuse.recording.step_by_step import step_by_step
from fxfuse.recording.tracer import record

X = torch.randn(3, 5, 8)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return out


def names(model: nn.Module, x: Tensor) -> list[str]:
    trace = record(model, (x,), {})
    assert not trace.failure
    return [event.func.__name__ for event in trace.events]


@pytest.mark.parametrize("training", [True, False])
def test_steps_are_recorded(training: bool) -> None:
    found = names(Attention().train(training), X)
    assert "multi_head_attention_forward" not in found
    heavy = [name for name in found if name in ("linear", "scaled_dot_product_attention")]
    assert heavy == ["linear", "scaled_dot_product_attention", "linear"]


def test_a_replaced_part_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def own(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        return torch.softmax(q @ k.transpose(-2, -1), -1) @ v

    monkeypatch.setattr(F, "scaled_dot_product_attention", own)
    assert "scaled_dot_product_attention" not in names(Attention(), X)


class Marked(Tensor):
    """A tensor that has opinions on torch functions."""


def test_tensors_of_a_subclass_are_asked_first() -> None:
    function = F.multi_head_attention_forward
    assert step_by_step(function, (X,), {"key": nn.Parameter(X)}) is not None
    assert step_by_step(function, (X.as_subclass(Marked),), {}) is None
    assert step_by_step(function, (X,), {"key": X.as_subclass(Marked)}) is None
    assert step_by_step(F.linear, (X,), {}) is None


def test_the_arithmetic_is_the_same() -> None:
    model = Attention()
    wanted = model(X)
    assert torch.equal(record(model, (X,), {}).values[-1].tensor, wanted)
