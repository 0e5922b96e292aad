"""Lanes added up or averaged: each model with the heavy launches and the launches of all kinds that one forward may make.

Nothing is validated by fxfuse itself here, so that a wrong rewrite shows as wrong numbers.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from joined_nets import Nets
from torch import Tensor, nn

from checks import QUICK, Cases, assert_case, assert_fused_equals, mlp, model_of, randn, randomized

CASES = Cases()
case = CASES.case


class Experts(nn.Module):
    def __init__(self, n: int = 4, inputs: int = 6, outputs: int = 3):
        super().__init__()
        self.n = n
        self.experts = nn.ModuleList(mlp(inputs, outputs=outputs) for _ in range(n))
        self.gate = nn.Linear(inputs, n)


@case(randn(5, 6), heavy=3, total=9)
class MixtureStack(Experts):
    def forward(self, x):
        weights = torch.softmax(self.gate(x), dim=-1)
        outs = torch.stack([expert(x) for expert in self.experts], dim=1)
        return (weights.unsqueeze(-1) * outs).sum(dim=1)


@case(randn(5, 6), heavy=3, total=8)
class MixtureSum(Experts):
    """``sum(g[:, i:i+1] * e_i(x))``."""

    def forward(self, x):
        g = F.softmax(self.gate(x), dim=1)
        return sum(g[:, i : i + 1] * expert(x) for i, expert in enumerate(self.experts))


@case(randn(5, 6), heavy=3, total=8)
class MixtureAccumulated(Experts):
    def forward(self, x):
        g = F.softmax(self.gate(x), dim=1)
        out = torch.zeros(x.shape[0], 3, dtype=x.dtype)
        for i in range(self.n):
            out += g[:, i].unsqueeze(1) * self.experts[i](x)
        return out


@case(randn(5, 6), heavy=6, total=13)
class MMoE(Experts):
    """A gate and a tower per task."""

    def __init__(self):
        super().__init__()
        self.gates = nn.ModuleList(nn.Linear(6, 4, bias=False) for _ in range(3))
        self.towers = nn.ModuleList(mlp(3) for _ in range(3))

    def forward(self, x):
        outs = torch.stack([expert(x) for expert in self.experts], 1)
        results = []
        for gate, tower in zip(self.gates, self.towers):
            w = gate(x).softmax(dim=-1)
            results.append(tower((outs * w.unsqueeze(2)).sum(1)))
        return torch.cat(results, -1) + self.gate(x)[:, :3]


@case(randn(5, 6), heavy=4, total=6)
class MixtureMatmul(Experts):
    def forward(self, x):
        outs = torch.stack([e(x) for e in self.experts], 2)
        return torch.bmm(outs, self.gate(x).softmax(1).unsqueeze(-1)).squeeze(-1)


@case(heavy=2, total=5)
class Mean(Nets):
    def forward(self, x):
        total = 0
        for i, net in enumerate(self.nets):
            total = total + net(x[:, i : i + 1])
        return total / len(self.nets)


@case(randn(5, 3), heavy=2, total=4)
class MeanOfStack(Experts):
    def __init__(self):
        super().__init__(inputs=3)
        del self.gate

    def forward(self, x):
        return torch.stack([e(x) for e in self.experts]).mean(0)


@case(randn(5, 3), heavy=2, total=10)
class FixedWeights(Nets):
    """A sum with one number per lane."""

    def __init__(self):
        super().__init__(3, 2)
        self.weights = [0.5, 1.5, -2.0, 0.25]

    def forward(self, x):
        return sum(w * net(x) for w, net in zip(self.weights, self.nets))


@case(randn(5, 3), heavy=2, total=5)
class ScalarParameters(Nets):
    """A sum with one learned number per lane."""

    def __init__(self):
        super().__init__(3, 2)
        self.alpha = nn.ParameterList(nn.Parameter(torch.ones(1)) for _ in range(4))

    def forward(self, x):
        out = 0.0
        for alpha, net in zip(self.alpha, self.nets):
            out = out + alpha * net(x)
        return out


@case(randn(5, 3), heavy=2, total=7)
class BiasAndSkip(Nets):
    """The chain of additions starts and ends with other terms."""

    def __init__(self):
        super().__init__(3, 3)
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        h = x + self.bias
        for net in self.nets:
            h = h + net(x)
        return h + x


@case(randn(5, 3), heavy=2, total=6)
class Differences(Nets):
    """Subtracted lanes."""

    def __init__(self):
        super().__init__(3, 3)

    def forward(self, x):
        for net, y in [(net, x) for net in self.nets]:
            x = x - net(y)
        return x


@case(randn(5, 3), heavy=2, total=6)
class WeightsIterated(Nets):
    """A learned weight per lane, from iterating over a softmax."""

    def __init__(self):
        super().__init__(3, 2)
        self.w = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return sum(w * net(x) for w, net in zip(self.w.softmax(0), self.nets))


@case(randn(5, 3), heavy=2, total=5)
class Boosting(Nets):
    def __init__(self):
        super().__init__(3, 1)
        self.rate = 0.1

    def forward(self, x):
        prediction = torch.zeros(x.shape[0], 1, dtype=x.dtype)
        for net in self.nets:
            prediction = prediction + self.rate * net(x)
        return prediction


@case(randn(5, 3), heavy=2, total=5)
class MeanAndVariance(Nets):
    """A deep ensemble."""

    def __init__(self):
        super().__init__(3, 2)

    def forward(self, x):
        outs = torch.stack([net(x) for net in self.nets])
        return outs.mean(0), outs.var(dim=0)


@case(randn(5, 3), heavy=2, total=4)
class CatAlongBatch(Nets):
    def __init__(self):
        super().__init__(3, 2)

    def forward(self, x):
        return torch.cat([net(x) for net in self.nets], dim=0).view(4, x.shape[0], 2).logsumexp(0)


@case(heavy=2, total=5)
class Buckets(Nets):
    """Several lanes are added into one place."""

    def forward(self, x):
        out = torch.zeros(x.shape[0], 2, dtype=x.dtype)
        for i, net in enumerate(self.nets):
            out[:, i % 2] += net(x[:, i : i + 1])[:, 0]
        return out


@case(heavy=2, total=4)
class NegativeIndices(Nets):
    def forward(self, x):
        out = torch.empty(x.shape[0], 4, dtype=x.dtype)
        for i, net in enumerate(self.nets):
            out[:, -1 - i] = net(x[:, -1 - i].unsqueeze(-1)).squeeze(-1)
        return out


@pytest.mark.parametrize("name", CASES)
def test_join(name):
    assert_case(CASES[name])


@pytest.mark.parametrize("name", ["mean", "sum"])
def test_a_sum_that_spells_out_everything(name: str) -> None:
    """``out=None`` is in no overload of the schema: the call is known by its arguments alone."""
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        out = torch.stack([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], -1)
        return getattr(torch, name)(out, dim=-1, out=None)

    model = randomized(model_of(forward, nets=nn.ModuleList(mlp() for _ in range(4))))
    assert_fused_equals(model, randn(5, 4), most_heavy=2, **QUICK)
