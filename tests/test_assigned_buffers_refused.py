"""Assignments of buffers that have no form are refused, with a line; and validation finds one that is lost, or made too early."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from assigned_buffers import (
    Around,
    Lanes,
    X,
    assert_same_steps,
    detached,
    handed_on_at_last,
    hidden,
    lane_average,
    read_before,
)
from hazards import fuse, handled, refused
from torch import Tensor, nn

import fxfuse
from checks import randomized

# -- what is refused -----------------------------------------------------------------------------------------------------------------------


def assigning(change: Callable[[Any, Tensor, Tensor], Any], self: Any, x: Tensor) -> Any:
    h = hidden(self, x)
    out = change(self, x, h)
    return h if out is None else out


def another_shape(self: Any, x: Tensor, h: Tensor) -> None:
    self.center = self.center.sum(0) + h.detach().mean()


def another_dtype(self: Any, x: Tensor, h: Tensor) -> None:
    self.seen = self.seen + h.detach().abs().mean().float() * 0


def other_strides(self: Any, x: Tensor, h: Tensor) -> None:
    self.square = (self.square + h.detach().mean()).t()


def with_history(self: Any, x: Tensor, h: Tensor) -> Tensor:
    before = self.center.detach()
    self.center = before * 0.9 + 0.1 * h.mean(0)
    return h - self.center


def history_of_the_input(self: Any, x: Tensor, h: Tensor) -> None:
    self.steps = self.steps + x.mean()


def an_input(self: Any, x: Tensor, h: Tensor) -> None:
    self.steps = x.detach()[0, 0]


def a_weight(self: Any, x: Tensor, h: Tensor) -> None:
    self.square = self.nets[0][2].weight.detach().view(18)[:9].view(3, 3)


def one_for_two(self: Any, x: Tensor, h: Tensor) -> None:
    self.center = self.other = self.center + h.detach().mean(0)


def a_view_for_another(self: Any, x: Tensor, h: Tensor) -> None:
    self.center = h.detach().mean(0)
    self.other = self.center.view(12).view(4, 3)


def no_longer_saved(self: Any, x: Tensor, h: Tensor) -> None:
    self.center = nn.Buffer(self.center + h.detach().mean(0), persistent=False)


def handed_out(self: Any, x: Tensor, h: Tensor) -> Any:
    self.center = self.center + h.detach().mean(0)
    return h, self.center


def kept_elsewhere(self: Any, x: Tensor, h: Tensor) -> None:
    self.center = self.last = self.center + h.detach().mean(0)


def set_to_none(self: Any, x: Tensor, h: Tensor) -> Tensor:
    self.seen = None
    return h


SIZED = "forward assigns self.sized a tensor whose size follows the input's"
REFUSED = {
    "another_shape": (another_shape, "forward assigns self.center a tensor of shape [3], which was [4, 3]"),
    "another_dtype": (another_dtype, "forward assigns self.seen a tensor of dtype torch.float32, which was torch.int64"),
    "other_strides": (other_strides, "forward assigns self.square a tensor of strides (1, 3), which had (3, 1)"),
    "with_history": (with_history, "forward assigns self.center a tensor with a gradient history; with detach()"),
    "history_of_the_input": (history_of_the_input, "forward assigns self.steps a tensor with a gradient history where the input"),
    "an_input": (an_input, "forward assigns self.steps an input, or a view of one"),
    "a_weight": (a_weight, "forward assigns self.square what shares its memory with nets.0.2.weight"),
    "one_for_two": (one_for_two, "a tensor that another buffer is assigned, too, or a view of it"),
    "a_view_for_another": (a_view_for_another, "a tensor that another buffer is assigned, too, or a view of it"),
    "no_longer_saved": (no_longer_saved, "forward changes self._non_persistent_buffers_set"),
    "handed_out": (handed_out, "forward assigns self.center a tensor that it hands out, too"),
    "kept_elsewhere": (kept_elsewhere, "forward assigns self.center a tensor that it hands out, too"),
    "set_to_none": (set_to_none, "forward changes self.seen"),
}  # fmt: skip


def said_with_a_line(fused: nn.Module, reason: str) -> bool:
    texts = [str(each) for each in fxfuse.report(fused).refused]
    return any(reason in text and re.search(r"\((test_)?assigned_buffers\w*\.py:\d", text) for text in texts)


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_form_is_refused(name: str) -> None:
    change, reason = REFUSED[name]
    model = randomized(Around(partial(assigning, change)))
    fused = refused(model, reason, X, line=False)
    assert said_with_a_line(fused, reason) or reason.startswith("forward changes"), fxfuse.report(fused)


def test_a_buffer_as_large_as_the_batch_is_refused() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        h = hidden(self, x)
        self.sized = h.detach().sum((1, 2))
        return h

    model = Around(forward)
    model.register_buffer("sized", torch.zeros(5))
    fused = refused(randomized(model), SIZED, X, line=False, rows=(3, 5, 7))
    assert said_with_a_line(fused, SIZED)


def test_a_buffer_under_two_names_is_refused() -> None:
    model = randomized(Around(detached))
    model.register_buffer("second", model.center.view(12))
    reason = "forward assigns self.center another tensor, and the one before shares its memory with second"
    fused = refused(model, reason, X, line=False)
    assert said_with_a_line(fused, "shares its memory with second")


def test_a_call_with_hooks_that_reads_it() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.around = Around(detached)
            self.state = Held(self.around)
            self.state.register_forward_hook(lambda module, args, out: None)

        def forward(self, x: Tensor) -> Tensor:
            return self.state(self.around(x))

    class Held(nn.Module):
        def __init__(self, held: nn.Module) -> None:
            super().__init__()
            self.held = (held,)

        def forward(self, x: Tensor) -> Tensor:
            return x - self.held[0].center

    reason = "forward assigns self.around.center, whose very tensor state reads or hands on"
    model = randomized(Reads())
    fused = fuse(model, X)
    assert said_with_a_line(fused, reason), fxfuse.report(fused)
    assert_same_steps(model, fused)


def test_a_module_whose_assignment_has_no_form_stays_a_call() -> None:
    class Mixes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("held", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            before = self.held
            self.held = x.detach().mean((0, 1)).float().double()[:3].clone() if x.sum() > -1e9 else self.held
            return x - before * self.held

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nets = nn.ModuleList(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)) for _ in range(4))
            self.mix = Mixes()

        def forward(self, x: Tensor) -> Tensor:
            return self.mix(hidden(self, x))

    model = randomized(Model())
    fused = handled(model, 2, X)
    assert "mix stays a call of its own" in str(fxfuse.report(fused))
    assert_same_steps(model, fuse(model, X))


# -- checked against the original ----------------------------------------------------------------------------------------------------------


def test_validation_finds_a_lost_assignment(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxfuse.passes.assigning import Assigning
    from fxfuse.passes.updating import Updating

    monkeypatch.setattr(Assigning, "_renew_buffers", Updating._renew_buffers)
    for model in (Around(detached), Lanes(lane_average)):
        fused = fxfuse.optimize(randomized(model), X, objective="launches", tune=False)
        assert not fxfuse.report(fused).fused
        assert re.search("buffer.*center", str(fxfuse.report(fused)), re.DOTALL)


@pytest.mark.parametrize("forward", [read_before, handed_on_at_last])
def test_validation_finds_a_tensor_that_is_overwritten_too_early(forward: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from fxfuse.passes.assigning import Assigning

    monkeypatch.setattr(Assigning, "_looked_at", lambda self: set())
    fused = fxfuse.optimize(randomized(Around(forward)), X, objective="launches", tune=False)
    assert not fxfuse.report(fused).fused, fxfuse.report(fused)
