"""``module.to(...)`` inside a forward: harmless where the module is there already, and a fact that the guard checks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxfuse
from checks import assert_fused_equals
from fxfuse.recording.tracer import record


class Experts(nn.Module):
    def __init__(self, move) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 3)) for _ in range(4))
        self.register_buffer("dummy", torch.tensor([0]), persistent=False)
        self.move = move

    def forward(self, x):
        for expert in self.experts:
            self.move(self, expert, x)
        return torch.stack([expert(x) for expert in self.experts])


MOVES = {
    "device of a buffer": lambda self, expert, x: expert.to(self.dummy.device),
    "name": lambda self, expert, x: expert.to("cpu"),
    "device of the input": lambda self, expert, x: expert.to(x.device),
    "device and dtype": lambda self, expert, x: expert.to(x.device, x.dtype),
    "dtype": lambda self, expert, x: expert.to(x.dtype),
    "like a tensor": lambda self, expert, x: expert.to(x),
    "keyword": lambda self, expert, x: expert.to(device=x.device, non_blocking=True),
    "all of them": lambda self, expert, x: self.to(x.device),
}


@pytest.mark.parametrize("name", MOVES)
def test_a_move_to_where_it_is(name):
    assert_fused_equals(Experts(MOVES[name]).double(), torch.randn(6, 3, dtype=torch.float64), heavy=3)


def test_the_dtype_that_was_found_is_a_guard():
    model, x = Experts(lambda self, expert, x: expert.to(torch.float64)).double(), torch.randn(6, 3, dtype=torch.float64)
    fused = fxfuse.optimize(model, x, objective="launches", tune=False)
    assert fxfuse.report(fused).fused
    assert not any(program.guard.generic_dtype for program in fxfuse.report(fused).fused[0].all_programs())
    fused(x)
    assert not fxfuse.report(fused).fallbacks


def test_a_real_move_is_recorded_as_ever():
    model = Experts(lambda self, expert, x: expert.to(torch.float64))
    trace = record(model, (torch.randn(6, 3),), {})
    assert any(event.poison for event in trace.events) or trace.failure
    assert all(parameter.dtype is torch.float32 for parameter in model.parameters())


def test_a_module_with_an_apply_of_its_own_is_asked():
    class Mine(nn.Linear):
        def _apply(self, fn, recurse=True):
            self.calls = getattr(self, "calls", 0) + 1
            return super()._apply(fn, recurse)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.nets = nn.ModuleList(Mine(2, 3) for _ in range(3))

        def forward(self, x):
            return torch.cat([net.to(x.device)(x) for net in self.nets], 1)

    model, x = Model(), torch.randn(4, 2)
    fused = fxfuse.optimize(model, x, objective="launches", tune=False)
    assert not fxfuse.report(fused).fused
    torch.testing.assert_close(fused(x), model(x))


def test_to_is_as_it_was_afterwards():
    usual = nn.Module.to
    record(Experts(MOVES["name"]), (torch.randn(6, 3),), {})
    record(Experts(lambda self, expert, x: 1 / 0), (torch.randn(6, 3),), {})
    assert nn.Module.to is usual
