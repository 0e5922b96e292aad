"""Registered buffers that forward assigns, in every form that it takes (``self.center = 0.9 * self.center + ...``): as in the original."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from assigned_buffers import (
    Around,
    Lanes,
    X,
    assert_same_steps,
    detached,
    handed_on,
    handed_on_at_last,
    hidden,
    lane_average,
    lane_handed_on,
    read_before,
    several,
    untracked,
    while_training,
)
from hazards import fuse, handled
from torch import Tensor, nn

import fxfuse
from checks import randomized
from fxfuse.launches import count

# -- buffers of the module around the loop -------------------------------------------------------------------------------------------------


def while_evaluating(self: Any, x: Tensor) -> Tensor:
    h = hidden(self, x)
    if not self.training:
        self.other = h.detach().amax(0)
    return h * self.other


def twice(self: Any, x: Tensor) -> Tensor:
    h = hidden(self, x)
    self.center = self.center + h.detach().mean(0)
    first = h * self.center
    self.center = self.center / (1 + self.center.abs().sum())
    return first + h * self.center


def exchanged(self: Any, x: Tensor) -> Tensor:
    h = hidden(self, x)
    self.center, self.other = self.other + h.detach().mean(0), self.center * 0.5
    return h + self.center - self.other


def swapped(self: Any, x: Tensor) -> Tensor:
    h = hidden(self, x)
    self.square, self.other_square = self.other_square, self.square
    return h @ self.square


def a_view_of_itself(self: Any, x: Tensor) -> Tensor:
    h = hidden(self, x)
    self.center = self.center.add(h.detach().mean(0)).view(3, 4).view(4, 3)
    self.other = self.other.view(12).view(4, 3)
    return h - self.center.flip(0) * (1 + self.other)


def moved_on(self: Any, x: Tensor) -> Tensor:
    """A queue."""
    h = hidden(self, x)
    self.center = torch.cat([self.center[1:], h.detach().mean((0, 1)).unsqueeze(0)])
    return h - self.center.sum(0)


def written_and_assigned(self: Any, x: Tensor) -> Tensor:
    h = hidden(self, x)
    with torch.no_grad():
        self.center.mul_(0.9)
        self.center = self.center + h.mean(0)
        self.center.clamp_(-0.3, 0.4)
        self.center[0] = 0.25
        self.other = self.other + self.center
        self.other.data.mul_(0.5)
    return h - self.center + self.other


def in_place_alone(self: Any, x: Tensor) -> Tensor:
    """``+=`` sets the name to the very tensor."""
    h = hidden(self, x)
    self.steps += 1
    self.seen += 1
    self.center *= 0.9
    self.center += h.detach().mean(0)
    return h - self.center / self.steps


def assigned_back(self: Any, x: Tensor) -> Tensor:
    h = hidden(self, x)
    kept = self.center
    self.center = h.detach().mean(0)
    out = h * self.center
    self.center = kept
    return out - self.center


def before_it_is_read(self: Any, x: Tensor) -> Tensor:
    h = hidden(self, x)
    self.center = torch.full_like(self.center, 2.0) * h.detach().mean()
    return h * self.center


def never_read(self: Any, x: Tensor) -> Tensor:
    h = hidden(self, x)
    self.center = h.detach().mean(0)
    self.seen = torch.tensor(7)
    return h


def in_other_ways(self: Any, x: Tensor) -> Tensor:
    h = hidden(self, x)
    setattr(self, "center", h.detach().mean(0))  # noqa: B010
    self._buffers["other"] = self.other + 1
    self.register_buffer("steps", self.steps + 2)
    return h - self.center + self.other * self.steps


def as_a_buffer(self: Any, x: Tensor) -> Tensor:
    h = hidden(self, x)
    self.center = nn.Buffer(self.center + h.detach().mean(0))
    return h - self.center


def old_one_returned_inside(self: Any, x: Tensor) -> Tensor:
    """The tensor before goes on as it was."""
    h = hidden(self, x)
    before = self.center
    row = before[1]
    self.center = h.detach().mean(0) + before
    return h * row + before.sum()


ASSIGNED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    f.__name__: f
    for f in (
        detached, untracked, read_before, while_training, while_evaluating, twice, several, handed_on, handed_on_at_last, exchanged,
        swapped, a_view_of_itself, moved_on, written_and_assigned, in_place_alone, assigned_back, before_it_is_read, never_read,
        in_other_ways, as_a_buffer, old_one_returned_inside,
    )
}  # fmt: skip


@pytest.mark.parametrize("name", ASSIGNED)
def test_buffers_of_the_module_around_the_loop(name: str) -> None:
    model = randomized(Around(ASSIGNED[name]))
    fused = handled(model, 2 + 2 * (name == "several") + (name == "swapped"), X)
    assert not any("one after the other" in each.reason for each in fxfuse.report(fused).refused)
    assert_same_steps(model, fuse(model, X))


# -- buffers of every lane -----------------------------------------------------------------------------------------------------------------


def lane_while_training(self: Any, x: Tensor) -> Tensor:
    h = self.layer(x)
    if self.training:
        self.center = self.center * 0.9 + 0.1 * x.mean() + h.detach().mean(0)
        self.table = torch.stack([self.table[1], self.center])
    return torch.tanh(h - self.center) * self.table.sum(0)


def lane_in_place(self: Any, x: Tensor) -> Tensor:
    h = self.layer(x)
    self.steps += 1
    self.center += h.detach().mean(0)
    self.center = self.center / self.steps
    return h - self.center


PER_LANE = {f.__name__: f for f in (lane_average, lane_while_training, lane_handed_on, lane_in_place)}


@pytest.mark.parametrize("name", PER_LANE)
def test_buffers_of_every_lane(name: str) -> None:
    forward = PER_LANE[name]
    if name == "lane_while_training":  # the input would give the center a history

        def forward(self: Any, x: Tensor) -> Tensor:
            h = lane_while_training(self, x.detach())
            return h + self.layer(x)

    model = randomized(Lanes(forward))
    fused = handled(model, 2, X)
    assert count(lambda: fused(X)).total < count(lambda: model(X)).total / 2
    assert_same_steps(model, fuse(model, X))


# -- of other modules ----------------------------------------------------------------------------------------------------------------------


class Twice(nn.Module):
    """A module that is called twice, and a buffer of a submodule that this one assigns."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Around(detached)

    def forward(self, x: Tensor) -> Tensor:
        first = self.inner(x)
        self.inner.other = self.inner.other + first.detach().mean(0)
        return first + self.inner(x * 2) * self.inner.other


def test_calls_of_one_module_and_buffers_of_another() -> None:
    model = randomized(Twice())
    handled(model, 4, X)
    assert_same_steps(model, fuse(model, X))


def test_a_region_below_the_top_that_is_called_once_or_twice() -> None:
    class Above(nn.Module):
        def __init__(self, calls: int) -> None:
            super().__init__()
            self.inner, self.calls = Around(read_before), calls

        def forward(self, x: Tensor) -> Tensor:
            out = self.inner(x)
            for _ in range(1, self.calls):
                out = out + self.inner(x + out.mean())
            return out * (2.0 if out.sum().item() > 1e9 else 3.0)  # the call around reads data: it stays as it is

    for calls in (1, 2):
        model = randomized(Above(calls))
        fused = handled(model, 2 * calls, X)
        assert fxfuse.report(fused).fused[0].path == "inner"
        assert_same_steps(model, fuse(model, X))


def test_validated_as_a_user_gets_it() -> None:
    for model in (Around(several), Around(handed_on), Lanes(lane_average), nn.Sequential(nn.Linear(4, 4), Lanes(lane_handed_on))):
        model = randomized(model)
        fused = fxfuse.optimize(model, X, objective="launches", cache=False)
        assert fxfuse.report(fused).fused, fxfuse.report(fused)
