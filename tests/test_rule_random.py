"""Dropout and random tensors inside lanes: every lane its own numbers, from the distribution that the loop draws from; nothing in eval."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checks
import fxfuse

LANES, P = 6, 0.3


class Dropping(nn.Module):
    """Lanes that scale their input by weights of their own and drop out of it."""

    def __init__(self, drop: Callable[[], nn.Module], shared: bool, lanes: int = LANES) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.full((1,), i + 1.0)) for i in range(lanes))
        self.drops = nn.ModuleList(drop() for _ in range(lanes))
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        if self.shared:  # out of one tensor, each its own part
            return torch.stack([drop(x) * w for drop, w in zip(self.drops, self.weights, strict=True)])
        return torch.stack([drop(x * w) / w for drop, w in zip(self.drops, self.weights, strict=True)])


class Functional(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, P, training=self.training)


class Always(nn.Module):
    """Monte Carlo dropout: in eval too."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, P, training=True)


DROPS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {  # shape of a lane; how many dims a mask has of its own
    "Dropout": (lambda: nn.Dropout(P), (40, 50), 2),
    "functional": (Functional, (40, 50), 2),
    "Dropout 4d": (lambda: nn.Dropout(P), (20, 10, 3, 3), 4),
    "Dropout1d": (lambda: nn.Dropout1d(P), (40, 50, 3), 2),
    "Dropout1d unbatched": (lambda: nn.Dropout1d(P), (2000, 3), 1),
    "Dropout2d": (lambda: nn.Dropout2d(P), (40, 50, 2, 2), 2),
    "Dropout3d": (lambda: nn.Dropout3d(P), (40, 50, 2, 1, 2), 2),
    "Dropout3d unbatched": (lambda: nn.Dropout3d(P), (2000, 2, 1, 2), 1),
    "Dropout2d of 3 dims": (lambda: nn.Dropout2d(P), (40, 50, 3), 2),
}


@pytest.mark.filterwarnings("ignore:dropout2d")
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", DROPS)
def test_every_lane_has_masks_of_its_own(name: str, shared: bool) -> None:
    drop, shape, own = DROPS[name]
    model = Dropping(drop, shared).double()
    x = checks.randn(*shape).abs() + 0.5
    fused = fxfuse.optimize(model, x, objective="launches", strict=True, **checks.QUICK)
    assert not fxfuse.report(fused).refused, str(fxfuse.report(fused))
    assert "draw other numbers than the loop did" in " ".join(str(fxfuse.report(fused)).split())
    torch.manual_seed(3)
    out, again = fused(x).detach(), fused(x).detach()
    kept = out != 0
    scale = torch.stack([w.detach() for w in model.weights]).view(-1, *[1] * len(shape)) if shared else 1.0
    assert torch.allclose(out, torch.where(kept, x / (1 - P) * scale, torch.zeros(())), rtol=1e-12, atol=0)
    channels = kept.reshape(LANES, math.prod(shape[:own]), -1)
    assert torch.equal(channels.all(-1), channels.any(-1)), "a channel is kept or dropped as a whole"
    masks = channels[..., 0].double()
    entries = masks.shape[1]
    assert ((masks.mean(1) - (1 - P)).abs() < 5 * (P * (1 - P) / entries) ** 0.5).all(), masks.mean(1)
    correlation = torch.corrcoef(masks) - torch.eye(LANES, dtype=masks.dtype)
    assert correlation.abs().max() < 5 / entries**0.5, "lanes share their masks"
    assert not torch.equal(out, again), "two calls draw the same numbers"
    model.eval()
    fused.eval()
    assert torch.equal(fused(x), model(x))


RATES = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
OWN: dict[str, tuple[Callable[[float], nn.Module], tuple[int, ...], int]] = {
    "Dropout": (nn.Dropout, (60, 50), 2), "Dropout 3d": (nn.Dropout, (30, 10, 10), 3), "Dropout1d": (nn.Dropout1d, (60, 50, 3), 2),
    "Dropout1d unbatched": (nn.Dropout1d, (3000, 3), 1), "Dropout2d": (nn.Dropout2d, (60, 50, 2, 2), 2),
    "Dropout3d": (nn.Dropout3d, (60, 50, 2, 1, 2), 2), "Dropout3d unbatched": (nn.Dropout3d, (3000, 2, 1, 2), 1),
}  # fmt: skip


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", OWN)
def test_every_lane_has_a_rate_of_its_own(name: str, shared: bool) -> None:
    make, shape, own = OWN[name]
    rates = iter(RATES)
    model = Dropping(lambda: make(next(rates)), shared).double()
    x = checks.randn(*shape).abs() + 0.5
    fused = fxfuse.optimize(model, x, objective="launches", strict=True, **{**checks.QUICK, "validate": name == "Dropout"})
    report = fxfuse.report(fused)
    assert not report.refused, str(report)
    assert [(op.lanes) for op in report.fused[0].ops if "dropout" in op.op] == [LANES]
    torch.manual_seed(3)
    x.requires_grad_()
    out, again = fused(x), fused(x)
    kept = out.detach() != 0
    weights = torch.stack([w.detach() for w in model.weights]).view(-1, *[1] * len(shape)) if shared else 1.0
    keep = 1 - torch.tensor(RATES, dtype=torch.float64)
    scale = torch.where(keep > 0, 1 / keep, 0.0).view(-1, *[1] * len(shape))
    assert torch.allclose(out.detach(), torch.where(kept, x.detach() * scale * weights, 0.0), rtol=1e-12, atol=0)
    channels = kept.reshape(LANES, math.prod(shape[:own]), -1)
    assert torch.equal(channels.all(-1), channels.any(-1)), "a channel is kept or dropped as a whole"
    masks = channels[..., 0].double()
    spread = (keep * (1 - keep) / masks.shape[1]) ** 0.5
    assert ((masks.mean(1) - keep).abs() <= 5 * spread).all(), masks.mean(1)
    correlation = torch.corrcoef(masks[:-1]) - torch.eye(LANES - 1, dtype=masks.dtype)
    assert correlation.abs().max() < 5 / masks.shape[1] ** 0.5, "lanes share their masks"
    assert not torch.equal(out, again), "two calls draw the same numbers"
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert torch.allclose(gradient, torch.where(kept, scale * weights, 0.0).sum(0), rtol=1e-12)
    model.eval()
    fused.eval()
    assert torch.equal(fused(x), model(x))


def test_rates_of_functional_dropouts() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return torch.cat([F.dropout(net(x), rate, self.training) for net, rate in zip(self.nets, (0.1, 0.5, 0.9), strict=True)], 1)

    model = checks.randomized(checks.model_of(forward, nets=nn.ModuleList(nn.Linear(4, 500) for _ in range(3))))
    fused = checks.assert_fused_equals(model, checks.randn(8, 4), heavy=1, random_in_train=True)
    rates = (fused(checks.randn(20, 4)) == 0).double().view(20, 3, 500).mean((0, 2))
    assert ((rates - torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).abs() < 0.05).all()


def test_a_rate_that_is_wrong_for_a_lane_is_noticed() -> None:
    """fxfuse's own comparison sees the rate by the scale of what is kept."""
    from fxfuse.functional import dropout_each
    from fxfuse.models.determinism import Derandomized

    x, keep = checks.randn(3, 4), torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    with Derandomized():
        assert torch.allclose(dropout_each(x, keep, 1 / keep, 2), torch.stack([F.dropout(x[i], 1 - float(keep[i])) for i in range(3)]))
        assert not torch.allclose(dropout_each(x, keep, 1 / keep.flip(0), 2), torch.stack([F.dropout(x[i], 0.5) for i in range(3)]))


def test_dropout_in_eval_stays() -> None:
    model = Dropping(Always, False).double().eval()
    x = checks.randn(30, 40).abs() + 0.5
    fused = fxfuse.optimize(model, x, objective="launches", **checks.QUICK)
    fused.eval()
    rate = (fused(x) == 0).double().flatten(1).mean(1)
    assert ((rate - P).abs() < 0.08).all(), rate
    assert rate.std() > 0


@pytest.mark.parametrize("kind", [nn.AlphaDropout, nn.FeatureAlphaDropout])
def test_alpha_dropout(kind: type[nn.Module]) -> None:
    """Mean and variance stay, and every lane has masks of its own; in eval nothing happens."""
    model = Dropping(lambda: kind(P), True).double()
    x = checks.randn(60, 50, 2)
    fused = fxfuse.optimize(model, x, objective="launches", strict=True, **checks.QUICK)
    weights = torch.stack([w.detach() for w in model.weights]).view(-1, 1, 1, 1)
    torch.manual_seed(0)
    out, loop = fused(x).detach() / weights, model(x).detach() / weights
    assert ((out.mean((1, 2, 3)) - loop.mean()).abs() < 0.15).all()
    assert ((out.std((1, 2, 3)) - loop.std()).abs() < 0.15).all()
    dropped = out == out.flatten(1).mode(1).values.view(-1, 1, 1, 1)  # what is dropped has one value
    rate = dropped.double().mean((1, 2, 3))
    assert ((rate - P).abs() < 0.06).all(), rate
    if kind is nn.FeatureAlphaDropout:
        assert torch.equal(dropped.all(-1), dropped.any(-1))
    assert not any(torch.equal(dropped[i], dropped[j]) for i in range(LANES) for j in range(i))
    model.eval()
    fused.eval()
    assert torch.equal(fused(x), model(x))


class Sampled(nn.Module):
    """Variational lanes: ``mean + std * noise``, each noise its own."""

    def __init__(self, noise: Callable[[Tensor], Tensor], lanes: int = LANES) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 2) for _ in range(lanes))
        self.noise = noise

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        means, noises = [], []
        for layer in self.layers:
            mean = layer(x)
            noise = self.noise(mean)
            means.append(mean + noise)
            noises.append(noise)
        return torch.stack(means), torch.stack(noises)


NOISES: dict[str, tuple[Callable[[Tensor], Tensor], float, float]] = {
    "randn_like": (torch.randn_like, 0.0, 1.0),
    "rand_like": (torch.rand_like, 0.5, 12**-0.5),
    "randn": (lambda h: torch.randn(h.shape, dtype=h.dtype), 0.0, 1.0),
    "rand": (lambda h: torch.rand(h.size(0), 2, dtype=h.dtype), 0.5, 12**-0.5),
    "normal": (lambda h: torch.normal(torch.zeros_like(h), 1.5), 0.0, 1.5),
    "normal of two tensors": (lambda h: torch.normal(torch.ones_like(h), torch.full_like(h, 0.5)), 1.0, 0.5),
    "normal of a spread": (lambda h: torch.normal(2.0, torch.full_like(h, 0.5)), 2.0, 0.5),
    "normal of a size": (lambda h: torch.normal(2.0, 0.5, h.shape, dtype=h.dtype), 2.0, 0.5),
    "normal_": (lambda h: torch.empty_like(h).normal_(), 0.0, 1.0),
    "normal_ by name": (lambda h: h.new_empty(h.shape).normal_(mean=1, std=0.5), 1.0, 0.5),
    "uniform_": (lambda h: torch.zeros(h.shape, dtype=h.dtype).uniform_(-1, 1), 0.0, 3**-0.5),
    "exponential_": (lambda h: torch.empty_like(h).exponential_(2.0), 0.5, 0.5),
    "bernoulli_": (lambda h: torch.empty_like(h).bernoulli_(0.3), 0.3, 0.21**0.5),
    "bernoulli_ of nothing given": (lambda h: torch.full_like(h, 0.9).bernoulli_(), 0.5, 0.5),
    "poisson": (lambda h: torch.poisson(torch.full_like(h, 2.0)), 2.0, 2**0.5),
    "randint": (lambda h: torch.randint(0, 3, h.shape).to(h.dtype), 1.0, (2 / 3) ** 0.5),
    "randint_like": (lambda h: torch.randint_like(h, 3), 1.0, (2 / 3) ** 0.5),
    "multinomial": (lambda h: torch.multinomial(torch.ones(h.shape[0], 3), 2, replacement=True).to(h.dtype), 1.0, (2 / 3) ** 0.5),
    "multinomial of one row": (lambda h: torch.multinomial(torch.ones(3), 800, True).view(400, 2).to(h.dtype), 1.0, (2 / 3) ** 0.5),
    "randperm": (lambda h: torch.randperm(800).view(400, 2).to(h.dtype) / 799, 0.5, 12**-0.5),
}


@pytest.mark.parametrize("name", NOISES)
def test_random_tensors(name: str) -> None:
    noise, mean, std = NOISES[name]
    model = checks.randomized(Sampled(noise))
    x = checks.randn(400, 3)
    fused = fxfuse.optimize(model, x, objective="launches", strict=True, **checks.QUICK)
    out, drawn = fused(x)
    means = torch.stack([layer(x) for layer in model.layers])
    assert torch.allclose(out - drawn, means, atol=1e-12)
    flat = drawn.detach().flatten(1)
    assert ((flat.mean(1) - mean).abs() < 0.2).all()
    assert ((flat.std(1) - std).abs() < 0.2).all()
    assert (torch.corrcoef(flat) - torch.eye(LANES, dtype=flat.dtype)).abs().max() < 0.2, "lanes share their numbers"
    assert not torch.equal(drawn, fused(x)[1]), "two calls draw the same numbers"
    report = fxfuse.report(fused)
    assert not report.refused, str(report)
    assert {op.lanes for op in report.fused[0].ops} == {LANES}


def test_draws_from_what_lanes_computed() -> None:
    """Rates, probabilities and spreads of each lane's own."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(3, 4) for _ in range(LANES))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            counts, picked, noise, orders = [], [], [], []
            for layer in self.layers:
                h = layer(x)
                counts.append(torch.poisson(h.abs()))
                picked.append(torch.multinomial(h.softmax(-1), 2))
                noise.append(torch.normal(h, h.abs()))
                orders.append(h[:, torch.randperm(4)])
            return torch.stack(counts), torch.stack(picked), torch.stack(noise), torch.stack(orders)

    model = checks.randomized(Model())
    x = checks.randn(1, 3).expand(600, 3).contiguous()
    fused = fxfuse.optimize(model, x, objective="launches", tune=False)
    assert not fxfuse.report(fused).refused, str(fxfuse.report(fused))
    torch.manual_seed(0)
    counts, picked, noise, orders = fused(x)
    for lane, layer in enumerate(model.layers):
        h = layer(x[:1]).detach()[0]
        assert ((counts[lane].mean(0) - h.abs()).abs() < 0.3).all()
        first = torch.bincount(picked[lane][:, 0], minlength=4) / 600
        assert ((first - h.softmax(-1)).abs() < 0.1).all()
        assert (picked[lane][:, 0] != picked[lane][:, 1]).all()
        assert ((noise[lane].mean(0) - h).abs() < 0.3).all()
        assert ((noise[lane].std(0) - h.abs()).abs() < 0.3).all()
        assert torch.allclose(orders[lane][0].sort().values, h.sort().values)


def test_gumbel_softmax_is_drawn_per_lane_and_per_call() -> None:
    class Gates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(3, 4) for _ in range(LANES))

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack(
                [F.gumbel_softmax(h, tau=0.5, hard=True) - F.gumbel_softmax(h, tau=0.5) for h in (layer(x) for layer in self.layers)]
            )

    model = checks.randomized(Gates())
    x = checks.randn(50, 3)
    fused = fxfuse.optimize(model, x, objective="launches", strict=True, **checks.QUICK)
    assert not fxfuse.report(fused).refused
    torch.manual_seed(0)
    out = fused(x)
    assert out.sum(-1).abs().max() < 1e-12
    assert out.abs().max() > 0.5, "both calls drew the same numbers"
    assert len({tuple(row) for row in (out > 0).flatten(1).tolist()}) == LANES
