"""Validation: rounding passes, however large it is beside what is zero but for it, and hides no mistake; the distances themselves."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from rewritten import data, failed, randomized, same
from torch import nn

import fxfuse
from fxfuse.checking.difference import Spread, distance, distances
from fxfuse.checking.validate import verify

# -- gradients that are zero, or zero but for rounding ----------------------------------------------------------------


def test_no_gradient_and_a_gradient_of_zeros():
    class One(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.used, self.unused, self.scale = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3)), scale

        def forward(self, x):
            return x[:, :3] * self.used + (0 if self.scale is None else self.scale * (self.unused - self.unused.detach()))

    assert verify(One(None), One(0.0), data()).ok
    assert verify(One(0.0), One(None), data()).ok
    assert failed(verify(One(None), One(1e-12), data())) == {"unused"}


def test_a_gradient_of_pure_rounding_passes():
    class Bias(nn.Module):
        """The mean is taken away again: the bias has no influence, its gradient is rounding."""

        def __init__(self, order):
            super().__init__()
            self.bias, self.order = nn.Parameter(torch.randn(4, generator=torch.Generator().manual_seed(0))), order

        def forward(self, x):
            h = (x if self.order else x.flip(0)) + self.bias
            h = h - h.mean(0, keepdim=True)
            return h if self.order else h.flip(0)

    result = verify(Bias(True), Bias(False), data())
    assert result.ok, str(result)
    assert max(d.max_rel for d in result.differences if d.name == "bias" and d.dtype == "float64") > 1e-6
    assert max(d.max_abs for d in result.differences if d.name == "bias" and d.dtype == "float64") < 1e-13


class Signs(nn.Module):
    """A lane's one element over its own size: the gradient of all in front of it is zero but for rounding. ``small`` is a way around."""

    def __init__(self, form, spoil=lambda h, i: h, small=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.nets = nn.ModuleList(nn.Linear(4, 1) for _ in range(3))
        self.form, self.spoil, self.small = form, spoil, small

    def forward(self, x):
        each = [self.spoil(net(x), i) for i, net in enumerate(self.nets)]
        return torch.stack([self.form(h) + self.small * h for h in each], 1)


def centred(h):
    return (h - h.mean(-1, keepdim=True)) * 1000 / 3 + h.sign()


OVER_ONE = {
    "divided": lambda h: F.normalize(h, dim=-1),
    "by the absolute value": lambda h: h / h.abs(),
    "layer norm": lambda h: F.layer_norm(h, (1,)) + h.sign(),
    "centred": centred,
    "exactly zero": lambda h: h.detach().sign() + 0.0 * h,
}


@pytest.mark.parametrize("fused", OVER_ONE)
@pytest.mark.parametrize("original", OVER_ONE)
def test_zero_but_for_either_s_rounding_passes(original, fused):
    """Exact zeros do not move with the last bits, and rounding of few outcomes does not always."""
    for rows in (1, 2):
        result = verify(Signs(OVER_ONE[original]), Signs(OVER_ONE[fused]), data(rows))
        assert result.ok, str(result)
        assert result.proved


class Wrong(torch.autograd.Function):
    """Its forward changes nothing, its backward is off by ``add`` and by a factor."""

    @staticmethod
    def forward(ctx, h, add, factor):
        ctx.by = add, factor
        return h.view_as(h)

    @staticmethod
    def backward(ctx, grad):
        add, factor = ctx.by
        return grad * factor + add, None, None


@pytest.mark.parametrize(("add", "factor", "small"), [
    (1e-3, 1, 0), (1e-9, 1, 0), (1e-12, 1, 0), (0, 1 + 1e-8, 1), (0, 1 + 1e-6, 1e-6), (0, 1.01, 1e-9), (0, 0, 1e-11),
])  # fmt: skip
@pytest.mark.parametrize("original", ["divided", "centred", "exactly zero"])
def test_a_wrong_gradient_is_found_where_the_others_are_rounding(original, add, factor, small):
    form = OVER_ONE[original]

    def spoil(h, i):
        return Wrong.apply(h, add, factor) if i == 1 else h

    for rows in (1, 5):
        result = verify(Signs(form, small=small), Signs(form, spoil, small), data(rows))
        assert {"nets.1.weight", "nets.1.bias"} <= failed(result, kind="parameter gradient"), str(result)


@pytest.mark.parametrize("small", [1.0, 1e-6, 1e-9])
def test_gradients_of_swapped_lanes_are_found_where_the_others_are_rounding(small):
    """Forward is right; backward hands lane 0 what is lane 1's."""

    class Swapped(Signs):
        def forward(self, x):
            a, b, c = (net(x) for net in self.nets)
            outs = [self.form(h) + self.small * (h.detach() + other - other.detach()) for h, other in ((a, b), (b, a), (c, c))]
            return torch.stack(outs, 1)

    form = OVER_ONE["divided"]
    result = verify(Signs(form, small=small), Swapped(form, small=small), data())
    assert {"nets.0.weight", "nets.1.weight"} <= failed(result, kind="parameter gradient"), str(result)


class OneElement(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.first, self.norm = nn.Linear(4, 1), nn.LayerNorm(1) if norm == "layer norm" else None

    def forward(self, x):
        h = self.first(x)
        return F.normalize(h, dim=-1) if self.norm is None else self.norm(h)


@pytest.mark.parametrize("norm", ["normalize", "layer norm"])
def test_lanes_that_normalize_one_element_fuse(norm):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.nets = nn.ModuleList(OneElement(norm) for _ in range(5))

        def forward(self, x):
            return torch.stack([net(x) for net in self.nets])

    for seed, rows in enumerate((1, 3, 5)):
        torch.manual_seed(seed)
        model, x = randomized(Model()).double(), torch.randn(rows, 4, dtype=torch.float64)
        report = fxfuse.report(fxfuse.optimize(model, x, objective="launches", tune=False))
        assert report.fused
        assert not report.refused, str(report)


def test_a_small_true_gradient_is_not_taken_for_rounding():
    class Two(nn.Module):
        def __init__(self, wrong):
            super().__init__()
            self.small, self.large, self.wrong = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4)), wrong

        def forward(self, x):
            return x * self.large + 1e-9 * x * self.small * (1.01 if self.wrong else 1.0)

    assert verify(Two(False), Two(False), data()).ok
    assert "small" in failed(verify(Two(False), Two(True), data()), kind="parameter gradient")


# -- outputs ----------------------------------------------------------------------------------------------------------


def test_elements_on_an_edge_may_jump_in_float32_only():
    """Rounding puts one element on the other side of a step: allowed in float32 where float64 shows that the maps are equal."""
    x = torch.cat([data(400, 8), torch.full((1, 8), 1 / 3)])

    def f(x):
        return x + ((x * 3).sum(1, keepdim=True) > 8.0 - 1e-9).to(x.dtype) * 1e-3

    def g(x):
        return x + ((x.sum(1, keepdim=True) * 3) > 8.0 - 1e-9).to(x.dtype) * 1e-3

    result = same(f, g, x, other_batches=False)
    assert result.ok, str(result)


class FixedDtype(nn.Module):
    """Computes in float32 inside, whatever comes in."""

    def __init__(self, packed, scale=1.0):
        super().__init__()
        self.weight, self.packed, self.scale = nn.Parameter(torch.randn(3, 4, 4)), packed, scale

    def forward(self, x):
        h, w = x.float(), self.weight.float()
        out = (h @ w).sum(0) if self.packed else h @ w[0] + h @ w[1] + h @ w[2]
        return out.to(x.dtype) * self.scale


def test_a_fixed_dtype_inside_is_measured_by_its_own_rounding():
    torch.manual_seed(0)
    loop, packed, wrong = FixedDtype(False), FixedDtype(True), FixedDtype(True, 1 + 1e-3)
    for model in (packed, wrong):
        model.load_state_dict(loop.state_dict())
    result = verify(loop, packed, data())
    assert result.ok, str(result)
    assert max(d.max_rel for d in result.differences if d.dtype == "float64") > 1e-10
    assert not verify(loop, wrong, data()).ok


# -- the arithmetic ---------------------------------------------------------------------------------------------------


def test_distance():
    a, b = torch.tensor([1.0, -4.0]), torch.tensor([1.5, -4.0])
    gap = distance(a, b)
    assert (gap.count, gap.max_abs, gap.mean_abs, gap.squares, gap.scale, gap.norm, gap.max_rel) == (2, 0.5, 0.25, 0.25, 4, 17, 0.125)
    assert gap.histogram == [(-math.inf, 1), (-1.0, 1)]
    assert distance(torch.zeros(2), torch.zeros(2)).max_rel == 0
    assert distance(torch.zeros(2), torch.full((2,), 1e-30)).max_rel > 1
    assert distance(torch.zeros(0), torch.zeros(0)).max_rel == 0
    assert distance(torch.tensor([2**62]), torch.tensor([2**62 + 1])).max_abs >= 1
    assert distance(torch.tensor([True]), torch.tensor([False])).max_abs == 1
    assert distance(torch.tensor([1j]), torch.tensor([1.0 + 0j])).max_abs == 1
    assert distance(torch.tensor([torch.inf]), torch.tensor([torch.inf])).max_abs == 0
    assert distance(torch.tensor([torch.inf, 2.0]), torch.tensor([torch.inf, 2.5])).max_rel == 0.25
    assert "in 1 places" in distance(torch.tensor([torch.inf]), torch.tensor([-torch.inf])).note
    assert "in 2 places" in distance(torch.tensor([torch.nan, 1.0]), torch.tensor([1.0, torch.nan])).note
    assert distance(torch.zeros(2), torch.zeros(3)).note == "shape [3], the original has [2]"


def test_many_distances_are_those_of_each(monkeypatch):
    random = torch.Generator().manual_seed(0)
    shapes = [(3,), (0,), (2, 5), (), (7,), (4, 4)]
    pairs = [(torch.randn(s, generator=random), torch.randn(s, generator=random) * 1e-3) for s in shapes]
    pairs += [(torch.arange(3), torch.arange(3)), (torch.randn(2, dtype=torch.complex64), torch.zeros(2, dtype=torch.complex64))]
    pairs += [(torch.zeros(1), torch.tensor([torch.nan])), (torch.ones(2), torch.ones(3))]
    together = distances(pairs)
    assert together == [distance(a, b) for a, b in pairs]
    for (a, b), gap in zip(pairs[:6], together):
        delta = (a.double() - b.double()).abs()
        assert gap.count == a.numel() == sum(n for _, n in gap.histogram)
        assert gap.max_abs == (delta.max() if a.numel() else 0)
        assert math.isclose(gap.total, float(delta.sum()), rel_tol=1e-12)
        assert all((delta >= 10**e).sum() - (delta >= 10 ** (e + 1)).sum() == n for e, n in gap.histogram if e > -math.inf)
    monkeypatch.setattr("fxfuse.checking.difference._LARGE", 4)
    assert distances(pairs) == together, "in portions"


def test_spreads():
    spread = Spread()
    for other in ([0.0, 0.5], [0.25]):
        b = torch.tensor(other)
        spread.add(distance(torch.zeros_like(b), b))
    assert (spread.count, spread.max, spread.mean) == (3, 0.5, 0.25)
    assert spread.histogram == [(-math.inf, 1), (-1.0, 2)]
    assert Spread().mean == 0
