"""Lanes in ``cat``, ``stack`` and containers: each model with the heavy launches and the launches of all kinds that one forward may make.

Nothing is validated by fxfuse itself here, so that a wrong rewrite shows as wrong numbers.
"""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from joined_nets import Nets
from torch import Tensor, nn

import fxfuse
from checks import QUICK, Cases, assert_case, mlp, randn, randomized

CASES = Cases()
case = CASES.case
X = randn(5, 4)


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


# -- containers --------------------------------------------------------------------------------------------------------------------


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
