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
