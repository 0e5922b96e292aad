"""Products, minima and maxima of lanes: each model with the heavy launches and the launches of all kinds that one forward may make.

Nothing is validated by fxfuse itself here, so that a wrong rewrite shows as wrong numbers.
"""

from __future__ import annotations

import functools
import math
import operator

import pytest
import torch
from joined_nets import Nets
from torch import nn

import fxfuse
from checks import QUICK, Cases, assert_case, assert_equal_models, mlp, randn, randomized

CASES = Cases()
case = CASES.case


@case(heavy=2, total=5)
class Product(Nets):
    def forward(self, x):
        out = 1
        for i, net in enumerate(self.nets):
            out = out * net(x[:, i : i + 1])
        return out


@case(heavy=2, total=5)
class ProductOnes(Nets):
    def forward(self, x):
        out = torch.ones(x.shape[0], 1, dtype=x.dtype)
        for i, net in enumerate(self.nets):
            out = out * net(x[:, i : i + 1])
        return out


@case(heavy=2, total=5)
class MathProd(Nets):
    def forward(self, x):
        return math.prod(net(x[:, i : i + 1]) for i, net in enumerate(self.nets))


@case(heavy=2, total=5)
class ReduceMul(Nets):
    def forward(self, x):
        return functools.reduce(operator.mul, [net(c) for net, c in zip(self.nets, x.split(1, dim=1))])


@case((randn(5, 3), randn(5, 2, seed=2)), heavy=2, total=5)
class TwinQ(nn.Module):
    """TD3: the smaller of two critics."""

    def __init__(self):
        super().__init__()
        self.q1, self.q2 = mlp(5), mlp(5)

    def forward(self, state, action):
        sa = torch.cat([state, action], 1)
        q1, q2 = self.q1(sa), self.q2(sa)
        return torch.min(q1, q2)


@case(randn(5, 3), heavy=2, total=6)
class MinimumChain(Nets):
    def __init__(self):
        super().__init__(3, 1)

    def forward(self, x):
        q = self.nets[0](x)
        for net in self.nets[1:]:
            q = torch.minimum(q, net(x))
        return q


@case(randn(5, 3), heavy=2, total=6)
class GatesInSeries(Nets):
    """The input is gated by one network after the other."""

    def __init__(self):
        super().__init__(3, 3)

    def forward(self, x):
        for gate in [torch.sigmoid(net(x)) for net in self.nets]:
            x = x * gate
        return x


@case(randn(5, 3), heavy=2, total=4)
class MinOverStack(Nets):
    """REDQ: the smallest of many critics."""

    def __init__(self):
        super().__init__(3, 1)

    def forward(self, x):
        return torch.min(torch.stack([net(x) for net in self.nets]), dim=0).values


@case(randn(5, 3), heavy=2, total=4)
class MaxOverCat(Nets):
    def __init__(self):
        super().__init__(3, 1)

    def forward(self, x):
        values, indices = torch.cat([net(x) for net in self.nets], dim=1).max(dim=1, keepdim=True)
        return values, indices


@case(randn(5, 3), heavy=2, total=6)
class ReduceMax(Nets):
    """Maxout."""

    def __init__(self):
        super().__init__(3, 2)

    def forward(self, x):
        return functools.reduce(torch.max, (net(x) for net in self.nets))


@pytest.mark.parametrize("name", CASES)
def test_join(name):
    assert_case(CASES[name])


@pytest.mark.parametrize(("name", "lanes"), [("MinimumChain", 4), ("MinimumChain", 3), ("ReduceMax", 4)])
def test_more_than_two_that_tie(name, lanes):
    """Copies of one network tie everywhere; the chain shares the gradient two at a time, and not evenly."""
    entry = CASES[name]
    model = randomized(entry.model())
    del model.nets[lanes:]
    for net in model.nets:
        net.load_state_dict(model.nets[0].state_dict())
    fused = fxfuse.optimize(model, entry.x, objective="launches", **QUICK)
    assert fxfuse.report(fused).fused
    assert_equal_models(model, fused, [(entry.x, {})])


def test_two_critics_that_tie():
    """Copies of one critic tie everywhere; the gradient is halved, as torch.min does it."""
    entry = CASES["TwinQ"]
    model = randomized(entry.model())
    model.q2.load_state_dict(model.q1.state_dict())
    fused = fxfuse.optimize(model, entry.x, objective="launches", **QUICK)
    assert fxfuse.report(fused).fused
    assert_equal_models(model, fused, [(entry.x, {})])
