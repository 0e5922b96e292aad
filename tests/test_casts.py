"""Casts whose dtype forward spells out, casts that follow a tensor, and both: compared in float64 as they are meant."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxfuse


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class Normed(nn.Module):
    """Computed in float32, given back in the dtype that came."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)
        self.last = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        h = x.to(torch.float32)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.last(self.weight * h.to(dtype))


class Bare(Normed):
    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        return (x.double() * self.weight.double()).sin().to(dtype)


class Twice(Normed):
    """One cast is spelled out, the other follows."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        return ((x.double() * self.weight.double()).sin().to(torch.float32).double() + x.double()).to(dtype)


class Lanes(nn.Module):
    def __init__(self, lane: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(lane(6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([net(x[:, i]) for i, net in enumerate(self.nets)], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lane", [Normed, Bare, Twice])
def test_lanes_with_casts_are_fused(lane: type[nn.Module], dtype: torch.dtype) -> None:
    model, x = Lanes(lane).to(dtype), torch.randn(5, 4, 6).to(dtype)
    fused = fxfuse.optimize(model, x, objective="launches")
    report = fxfuse.report(fused)
    assert report.fused, report
    assert not report.refused, report
    assert fused(x).dtype is dtype
    torch.testing.assert_close(fused(x), model(x))
    # In float64 the recorded dtype is not the model's: the original forward on the packed weights, exactly.
    torch.testing.assert_close(fused.double()(x.double()), model.double()(x.double()), rtol=1e-12, atol=1e-12)


class Both(nn.Module):
    """Results of a dtype that is spelled out, and of one that follows: in float64 no one choice gives both."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Linear(6, 2) for _ in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ys = [net(x[:, i]).double() for i, net in enumerate(self.nets)]
        return torch.stack([y.sin().to(torch.float32) for y in ys], 1), torch.stack([y.cos().to(x.dtype) for y in ys], 1)


@pytest.mark.parametrize(("model", "proved"), [(Lanes(Normed), True), (Lanes(Bare), True), (Both(), False)], ids=["normed", "bare", "both"])
def test_what_float64_proves(model: nn.Module, proved: bool) -> None:
    x = torch.randn(5, 4, 6)
    fused = fxfuse.optimize(model, x, objective="launches")
    validation = fxfuse.report(fused).validation
    assert fxfuse.report(fused).fused, fxfuse.report(fused)
    assert validation is not None
    assert validation.ok
    assert validation.proved is proved
    assert any("some casts follow" in note for note in validation.notes) is not proved
    torch.testing.assert_close(fused(x), model(x))


def test_a_narrow_model_is_compared_at_float32s_rounding() -> None:
    """In bfloat16 the cast that follows is widened, so that what differs by two percent cannot hide in bfloat16's rounding."""
    model, x = Lanes(Normed).to(torch.bfloat16), torch.randn(5, 4, 6, dtype=torch.bfloat16)
    fused = fxfuse.optimize(model, x, objective="launches")
    with torch.no_grad():
        next(p for p in fused.parameters() if p.dim() > 2).mul_(1.02)
    assert not fxfuse.verify(model, fused, x).ok
