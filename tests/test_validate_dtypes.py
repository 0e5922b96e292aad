"""Validation in every dtype: in float64 beside the model's own where both can be had; float32 inside of float64 models."""

from __future__ import annotations

import pytest
import rewritten
import torch
import torch.nn.functional as F
from rewritten import Packed, data, like
from torch import nn

import fxfuse
from fxfuse.checking.validate import validate, verify

original = rewritten.original  # a fixture


class Constant(nn.Module):
    """A tensor that is no buffer keeps float32: the float64 copy cannot run."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.constant, self.weight = torch.eye(4) * factor, nn.Parameter(torch.ones(4))

    def forward(self, x):
        return x @ self.constant * self.weight


def test_a_model_that_cannot_run_in_float64_is_compared_in_its_own_dtype():
    result = verify(Constant(), Constant(), data())
    assert result.ok
    assert not result.proved
    assert {d.dtype for d in result.differences} == {"float32"}
    assert any("float64 left out" in note for note in result.notes)
    assert not verify(Constant(), Constant(1.001), data()).ok


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(original, dtype):
    loop, packed = original.to(dtype), like(original, Packed).to(dtype)
    result = verify(loop, packed, data().to(dtype), gradients=False)
    assert result.ok, str(result)
    assert {d.dtype for d in result.differences} == {"float64", str(dtype).removeprefix("torch.")}


def test_a_float64_model_is_run_once(original):
    result = verify(original.double(), like(original, Packed).double(), data().double())
    assert result.ok
    assert {d.dtype for d in result.differences} == {"float64"}


def test_integer_inputs():
    class Tables(nn.Module):
        def __init__(self, packed, shift=0):
            super().__init__()
            self.tables, self.packed, self.shift = nn.ModuleList(nn.Embedding(5, 2) for _ in range(3)), packed, shift

        def forward(self, i):
            if not self.packed:
                return torch.cat([table(i[:, k]) for k, table in enumerate(self.tables)], 1)
            offsets = torch.arange(3) * 5 + self.shift
            return F.embedding(i + offsets, torch.cat([t.weight for t in self.tables])).flatten(1)

    i = torch.randint(4, (6, 3), generator=torch.Generator().manual_seed(0))
    loop, packed, wrong = Tables(False), Tables(True), Tables(True, 1)
    for model in (packed, wrong):
        model.load_state_dict(loop.state_dict())
    assert verify(loop, packed, i).proved
    assert not verify(loop, wrong, i).ok


# -- models of two dtypes, fused --------------------------------------------------------------------------------------


class Turned(nn.Module):
    """Works in float32 whatever the model's dtype is: with a tensor that forward makes, or one that it is given."""

    def __init__(self, made):
        super().__init__()
        self.q, self.k, self.made = nn.Linear(4, 6), nn.Linear(4, 6), made

    def forward(self, x, angles):
        if self.made:
            ones = torch.ones(6, 3, dtype=torch.float32)
            return self.q(x).float() @ ones, self.k(x).float() @ ones
        return self.q(x) * angles.cos(), self.k(x) * angles.cos()


class Angles(nn.Module):
    """Makes angles in float32, outside of the module that holds the lanes, as many language models do."""

    def __init__(self, made):
        super().__init__()
        self.turned = Turned(made)

    def forward(self, x):
        return self.turned(x, torch.arange(6, dtype=torch.float32) / 7)


@pytest.mark.parametrize("made", [True, False])
def test_a_float64_model_with_float32_inside_fuses_and_is_proved(made):
    torch.manual_seed(0)
    model, x = Angles(made).double(), torch.randn(5, 4, dtype=torch.float64)
    fused = fxfuse.optimize(model, x, objective="launches", tune=False)
    report = fxfuse.report(fused)
    assert report.fused, str(report)
    assert not report.refused, str(report)
    assert report.validation is None or report.validation.proved
    for mode in (True, False):
        for got, want in zip(fused.train(mode)(x), model.train(mode)(x)):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert not fxfuse.report(fused).fallbacks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_inputs_of_two_dtypes_take_the_fast_way(dtype):
    """The region is given float32 beside the model's own dtype, call after call."""
    torch.manual_seed(0)
    model, x = Angles(False).to(dtype), torch.randn(5, 4).to(dtype)
    fused = fxfuse.optimize(model, x, objective="launches", tune=False, strict=True)
    assert fxfuse.report(fused).fused, str(fxfuse.report(fused))
    for rows in (5, 2):
        for got, want in zip(fused(x[:rows]), model(x[:rows])):
            torch.testing.assert_close(got, want)


def test_a_model_of_two_dtypes_fuses():
    """The first half is kept in float32; what comes of it is given to lanes that are not."""
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.turned = nn.Linear(4, 6), Turned(False)

        def forward(self, x):
            return self.turned(x, self.first(x.float()))

    torch.manual_seed(0)
    model, x = Halves().double(), torch.randn(5, 4, dtype=torch.float64)
    model.first.float()
    fused = fxfuse.optimize(model, x, objective="launches", tune=False)
    assert fxfuse.report(fused).fused, str(fxfuse.report(fused))
    for got, want in zip(fused(x), model(x)):
        torch.testing.assert_close(got, want)
    assert not fxfuse.report(fused).fallbacks


class Casting(nn.Module):
    """Lanes that compute in float64 for a while, and go back to the dtype that they were given, or to the one they name."""

    def __init__(self, back: torch.dtype | None) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(4))
        self.back = back

    def forward(self, xs: list[torch.Tensor]) -> torch.Tensor:
        out = []
        for net, x in zip(self.nets, xs, strict=True):
            same = torch.exp(x.double().log()).to(self.back or x.dtype)
            out.append(net(torch.tanh(x - same)))
        return torch.stack(out, 1)


@pytest.mark.parametrize("back", [None, torch.float32])
def test_a_cast_to_a_tensor_s_own_dtype_follows_it_to_float64(back):
    model = Casting(back)
    torch.manual_seed(0)
    xs = [torch.rand(5, 2) + 0.5 for _ in range(4)]
    fused = fxfuse.optimize(model, (xs,), objective="launches", tune=False)
    assert [region.ops for region in fxfuse.report(fused).fused], fxfuse.report(fused)
    result = validate(model, fused, [((xs,), {})])
    assert result.ok
    assert result.proved
    exact = [d for d in result.differences if d.dtype == "float64"]
    assert exact
    if back is None:  # all gradients of the original cancel: what a cast to float32 rounds would be all that there is
        assert max(d.max_abs for d in exact) < 1e-14
