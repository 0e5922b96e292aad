"""Random programs over one buffer: views of it, reads, writes of every kind, by lanes; whatever becomes of them, numbers stay the same."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

import fxfuse
from checks import QUICK, assert_equal_models, randn, randomized


class Program(nn.Module):
    """What it does is drawn from its seed; each network's value is written somewhere, often over another one."""

    def __init__(self, seed: int):
        super().__init__()
        self.seed = seed
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)) for _ in range(6))

    def index(self, draw: random.Random, view: torch.Tensor) -> tuple:
        dim = draw.randrange(1, view.dim())
        size = view.shape[dim]
        start = draw.randrange(size)
        step = draw.randrange(1, 4)
        stop = min(size, start + draw.randrange(1, 4))
        one = draw.choice([start, slice(start, stop), slice(min(start, step - 1), None, step), slice(None)])
        if draw.random() < 0.2:
            return (slice(None), *(draw.randrange(s) for s in view.shape[1:]))
        return (*[slice(None)] * dim, one)

    def forward(self, x):
        draw = random.Random(self.seed)
        rows = x.shape[0]
        shape = draw.choice([(6, 2), (12,), (2, 6), (3, 4), (2, 3, 2)])
        buffer = draw.choice(
            [x.new_zeros(rows, *shape), torch.ones(rows, *shape, dtype=x.dtype), x[..., :2].reshape(rows, 12).view(rows, *shape).clone()]
        )
        views = [buffer, buffer.view(rows, 12)]
        if len(shape) == 2:
            views.append(buffer.transpose(1, 2))
        seen = []
        for i in draw.sample(range(6), draw.randrange(2, 7)):
            value = self.nets[i](x[:, i])[:, draw.randrange(2)]
            view = draw.choice(views)
            if view.dim() == 3 and draw.random() < 0.3:
                view = view[:, draw.randrange(view.shape[1])]
            index = self.index(draw, view)
            value = value.reshape(rows, *([1] * (view[index].dim() - 1)))
            kind = draw.randrange(6)
            if kind == 0:
                view[index] = value
            elif kind == 1:
                view[index] += value
            elif kind == 2:
                view[index] = view[index].clone() * value
            elif kind == 3:
                view[index].copy_(value.expand_as(view[index]))
            elif kind == 4:
                view[index] = view[index] * 0.5 + value
            else:
                view[index].add_(value)
            if draw.random() < 0.3:
                seen.append(draw.choice(views).sum(-1))
        return [buffer, *seen]


@pytest.mark.parametrize("seed", range(24))
def test_random_writes(seed):
    model, x = randomized(Program(seed), seed), randn(5, 6, 3, seed=seed)
    fused = fxfuse.optimize(model, x, objective="launches", **QUICK)
    assert not any("please report" in str(refusal) for refusal in fxfuse.report(fused).refused), str(fxfuse.report(fused))
    assert_equal_models(model, fused, [(x, {}), (randn(3, 6, 3, seed=seed + 1), {}), (randn(1, 6, 3, seed=seed + 2), {})])


def test_most_random_programs_fuse():
    fused = 0
    for seed in range(24, 64, 4):
        model = fxfuse.optimize(randomized(Program(seed), seed), randn(5, 6, 3, seed=seed), objective="launches", **QUICK)
        fused += bool(fxfuse.report(model).fused)
    assert fused >= 8
