"""How lanes come together, as people write it: each model with the heavy launches and the launches of all kinds that one forward may make.

Nothing is validated by fxfuse itself here, so that a wrong rewrite shows as wrong numbers.
"""

from __future__ import annotations

import functools
import math
import operator
from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxfuse
from checks import QUICK, Cases, assert_case, assert_equal_models, assert_fused_equals, mlp, model_of, randn, randomized

CASES = Cases()
case = CASES.case
X = randn(5, 4)


class Nets(nn.Module):
    def __init__(self, inputs: int = 1, outputs: int = 1, n: int = 4):
        super().__init__()
        self.n = n
        self.nets = nn.ModuleList(mlp(inputs, outputs=outputs) for _ in range(n))


# -- slice writes -----------------------------------------------------------------------------------------------------------------


@case(randn(5, 3, 7), heavy=2, total=5)
class Interleaved(nn.Module):
    """``out[:, i::3] = ...``: polyphase components."""

    def __init__(self):
        super().__init__()
        self.phases = nn.ModuleList(mlp(7, outputs=4) for _ in range(3))

    def forward(self, x):
        out = x.new_zeros(x.shape[0], 12)
        for i, phase in enumerate(self.phases):
            out[:, i::3] = phase(x[:, i])
        return out


@case(randn(5, 7), heavy=2, total=5)
class EvenOdd(nn.Module):
    """Sine and cosine style interleaving of two branches."""

    def __init__(self):
        super().__init__()
        self.even, self.odd = mlp(7, outputs=5), mlp(7, outputs=5)

    def forward(self, x):
        out = torch.empty(x.size(0), 10, dtype=x.dtype)
        out[:, 0::2] = self.even(x)
        out[:, 1::2] = self.odd(x)
        return out


@case(randn(5, 6, 3), heavy=2, total=5)
class Pairs(nn.Module):
    """``out[..., 2*i:2*i+2]``: a width of two each."""

    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleList(mlp(3, outputs=2) for _ in range(4))

    def forward(self, x):
        out = torch.zeros(*x.shape[:-1], 8, dtype=x.dtype)
        for i in range(4):
            out[..., 2 * i : 2 * i + 2] = self.nets[i](x)
        return out


@case(heavy=2, total=5)
class ViewOfView(Nets):
    """Writes through a view of a view of the buffer."""

    def forward(self, x):
        out = torch.zeros(x.shape[0], 2, 2, dtype=x.dtype)
        flat = out.view(x.shape[0], 4)
        for i, net in enumerate(self.nets):
            flat[:, i] = net(x[:, i : i + 1])[:, 0]
        return out


@case(randn(5, 4, 3), heavy=2, total=5)
class ViewOfViewSelect(Nets):
    """``row = out[i]; row[:] = ...`` and a transposed view."""

    def __init__(self):
        super().__init__(3, 2)

    def forward(self, x):
        out = torch.zeros(x.shape[0], 4, 2, dtype=x.dtype)
        view = out.transpose(0, 1)
        for i, net in enumerate(self.nets):
            row = view[i]
            row[:] = net(x[:, i])
        return out


@case(heavy=2, total=6)
class CopyInto(Nets):
    def forward(self, x):
        out = torch.empty(x.shape[0], 4, 1, dtype=x.dtype)
        for i, net in enumerate(self.nets):
            out[:, i].copy_(net(x.narrow(1, i, 1)))
        return out


@case(heavy=2, total=8)
class TwoBuffers(nn.Module):
    """Mean and variance heads fill two buffers in one loop."""

    def __init__(self):
        super().__init__()
        self.mu = nn.ModuleList(mlp() for _ in range(4))
        self.sigma = nn.ModuleList(mlp() for _ in range(4))

    def forward(self, x):
        mu, sigma = torch.zeros_like(x), torch.zeros_like(x)
        for i in range(4):
            mu[:, i : i + 1] = self.mu[i](x[:, i : i + 1])
            sigma[:, i : i + 1] = F.softplus(self.sigma[i](x[:, i : i + 1]))
        return mu, sigma


@case(heavy=2, total=5)
class PlusEqualsSlice(Nets):
    """``out[:, i] += ...`` on a copy of the input: residual."""

    def forward(self, x):
        out = x.clone()
        for i, net in enumerate(self.nets):
            out[:, i] += net(x[:, i : i + 1]).squeeze(-1)
        return out


@case(heavy=2, total=5)
class PlusEqualsZeros(Nets):
    def forward(self, x):
        out = torch.zeros(x.shape[0], 4, dtype=x.dtype)
        for i, net in enumerate(self.nets):
            out[:, i : i + 1] += net(x[:, i : i + 1])
        return out


@case(randn(5, 4), heavy=2, total=7)
class TimesEqualsSlice(Nets):
    def forward(self, x):
        gated = x.clone()
        for i, net in enumerate(self.nets):
            gated[:, i : i + 1] *= net(x[:, i : i + 1]).sigmoid()
        return gated


@case(randn(5, 6), heavy=2, total=6)
class PartialCover(Nets):
    """Columns 1 to 4 are transformed, the others passed on."""

    def forward(self, x):
        out = x.clone()
        for i, net in enumerate(self.nets):
            out[:, i + 1] = net(x[:, i + 1 : i + 2]).squeeze(1)
        return out


@case(randn(5, 8), heavy=2, total=8)
class PartialStrided(Nets):
    """Every second column is written, the others stay zero."""

    def forward(self, x):
        out = torch.zeros(x.shape[0], 8, dtype=x.dtype)
        for i, net in enumerate(self.nets):
            out[:, 2 * i] = net(x[:, 2 * i : 2 * i + 1])[:, 0]
        return out


@case(randn(5, 4, 3), heavy=2, total=5)
class RowsAndColumns(Nets):
    """A write to one element of a leading dim, batch second."""

    def __init__(self):
        super().__init__(3, 2)

    def forward(self, x):
        out = torch.empty(4, x.shape[0], 2, dtype=x.dtype)
        for i, net in enumerate(self.nets):
            out[i] = net(x[:, i])
        return out.permute(1, 0, 2)


@case(randn(5, 3), heavy=2, total=5)
class Grid(nn.Module):
    """``out[:, i, j]``: two indices in one write."""

    def __init__(self):
        super().__init__()
        self.cells = nn.ModuleList(nn.ModuleList(mlp(3) for _ in range(3)) for _ in range(2))

    def forward(self, x):
        out = torch.zeros(x.shape[0], 2, 3, dtype=x.dtype)
        for i in range(2):
            for j in range(3):
                out[:, i, j] = self.cells[i][j](x).squeeze(-1)
        return out


# -- sums -------------------------------------------------------------------------------------------------------------------------


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


# -- products, minima, maxima -----------------------------------------------------------------------------------------------------


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


# -- cat of cats, other reductions -------------------------------------------------------------------------------------------------


@case(heavy=2, total=5)
class CatOfCats(Nets):
    def forward(self, x):
        left = torch.cat([self.nets[i](x[:, i : i + 1]) for i in (0, 1)], dim=1)
        right = torch.cat([self.nets[i](x[:, i : i + 1]) for i in (2, 3)], dim=1)
        return torch.cat([left, right], dim=1)


@case(heavy=2, total=5)
class CatOfStacks(Nets):
    def forward(self, x):
        left = torch.stack([self.nets[i](x[:, i : i + 1]) for i in (0, 1)], dim=1)
        right = torch.stack([self.nets[i](x[:, i : i + 1]) for i in (2, 3)], dim=1)
        return torch.cat([left, right], dim=1).flatten(1)


@case(heavy=2, total=6)
class GrowingStack(Nets):
    def forward(self, x):
        out = self.nets[0](x[:, :1]).unsqueeze(0)
        for i in range(1, 4):
            out = torch.cat((out, self.nets[i](x[:, i : i + 1]).unsqueeze(0)))
        return out


@case(heavy=2, total=6)
class CatWithInput(Nets):
    """DenseNet style: the input comes along."""

    def forward(self, x):
        return torch.cat([x, *[net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], x * 2], -1)


@case(heavy=2, total=5)
class Reversed(Nets):
    def forward(self, x):
        outs = [net(x[:, i : i + 1]) for i, net in enumerate(self.nets)]
        return torch.cat(outs[::-1], dim=1)


@case(heavy=2, total=6)
class JoinedTwice(Nets):
    """The lanes' values both stacked and summed."""

    def forward(self, x):
        outs = [net(x[:, i : i + 1]) for i, net in enumerate(self.nets)]
        return torch.stack(outs, 1), sum(outs)


# -- containers -------------------------------------------------------------------------------------------------------------------

Pair = namedtuple("Pair", "mean scale")


@dataclass
class Output:
    """A plain dataclass, as Hugging Face style models return."""

    mean: Tensor
    parts: list


class ModelOutput(OrderedDict):
    """Attribute access to an ordered dict, registered with pytree by nobody."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


@case(heavy=2, total=4)
class ListOut(Nets):
    def forward(self, x):
        return [net(x[:, i : i + 1]) for i, net in enumerate(self.nets)]


@case(randn(5, 3), heavy=2, total=4)
class TupleOut(Nets):
    """stable-baselines3: a tuple of critics' values."""

    def __init__(self):
        super().__init__(3, 1)

    def forward(self, x):
        return tuple(net(x) for net in self.nets)


@case(heavy=2, total=4)
class DictOut(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleDict({name: mlp(4, outputs=2) for name in ("center", "dim", "rot")})

    def forward(self, x):
        return {name: head(x) for name, head in self.heads.items()}


@case(heavy=2, total=7)
class NamedTupleOut(Nets):
    def forward(self, x):
        outs = [net(x[:, i : i + 1]) for i, net in enumerate(self.nets)]
        return Pair(mean=torch.cat(outs, 1), scale={"sum": sum(outs), "first": outs[0]})


@case(heavy=2, total=6)
class DataclassOut(Nets):
    def forward(self, x):
        outs = [net(x[:, i : i + 1]) for i, net in enumerate(self.nets)]
        return Output(mean=sum(outs) / len(outs), parts=outs)


@case(heavy=2, total=4)
class OrderedDictOut(Nets):
    def forward(self, x):
        out = ModelOutput()
        for i, net in enumerate(self.nets):
            out[f"head_{i}"] = net(x[:, i : i + 1])
        return out


@case(heavy=2, total=5)
class NothingJoined(Nets):
    """Four heads on four other inputs, a nested structure out."""

    def forward(self, x):
        a, b, c, d = x.chunk(4, dim=1)
        return (self.nets[0](a), [self.nets[1](b), {"c": self.nets[2](c)}]), self.nets[3](d).tanh()


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


def test_what_equals_an_input_is_no_alias_of_it():
    class Scaled(Nets):
        def forward(self, x):
            return sum([x]) * 1, torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1)

    fused = fxfuse.optimize(randomized(Scaled()), X, objective="launches", **QUICK)
    x = X.clone()
    assert fxfuse.report(fused).fused
    fused(x)[0].zero_()
    assert torch.equal(x, X)


@dataclass
class Summarized:
    """A dataclass that computes an attribute beyond its fields, and is given another."""

    parts: list

    def __post_init__(self):
        self.total = sum(self.parts)


def test_dataclasses_with_attributes_beyond_their_fields():
    class Model(Nets):
        def forward(self, x):
            out = Summarized([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)])
            out.rows = x.shape[0]
            return out

    model = randomized(Model())
    fused = fxfuse.optimize(model, randn(5, 4), objective="launches", strict=True, tune=False)
    report = fxfuse.report(fused)
    assert report.heavy[1] == 2, str(report)
    for rows in (5, 3):
        got, want = fused(randn(rows, 4)), model(randn(rows, 4))
        assert type(got) is Summarized
        assert list(vars(got)) == list(vars(want))
        assert got.rows == rows
        torch.testing.assert_close(got.total, want.total, rtol=1e-12, atol=0)
        torch.testing.assert_close(got.parts, want.parts, rtol=1e-12, atol=0)


def test_axis_is_dim():
    class Numpy(nn.Module):
        def __init__(self):
            super().__init__()
            self.nets = nn.ModuleList(nn.Linear(4, 3) for _ in range(3))

        def forward(self, x):
            pair = torch.cat([net(x) for net in self.nets[:2]], axis=1)
            total = torch.stack([net(x) for net in self.nets], axis=1).sum(axis=1, keepdims=True)
            return torch.cat([pair, self.nets[2](x)], axis=-1), total

    torch.manual_seed(0)
    model, x = Numpy().double(), torch.randn(5, 4, dtype=torch.float64)
    fused = fxfuse.optimize(model, x, objective="launches", tune=False)
    assert fxfuse.report(fused).fused
    assert not fxfuse.report(fused).refused
    for got, want in zip(fused(x), model(x)):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["mean", "sum"])
def test_a_sum_that_spells_out_everything(name: str) -> None:
    """``out=None`` is in no overload of the schema: the call is known by its arguments alone."""
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        out = torch.stack([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], -1)
        return getattr(torch, name)(out, dim=-1, out=None)

    model = randomized(model_of(forward, nets=nn.ModuleList(mlp() for _ in range(4))))
    assert_fused_equals(model, randn(5, 4), most_heavy=2, **QUICK)
