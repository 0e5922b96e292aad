"""Loops in many spellings: how a loop is written, loops in loops and over the batch, each with its number of launches.

Nothing is validated by fxfuse itself here, so that a wrong rewrite shows as wrong numbers.
"""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from loop_cases import Loops, Nets, X, assert_loop, mlp
from torch import nn

from checks import assert_fused_equals, randn, randomized

CASES = Loops()
case = CASES.case


# -- how the loop is written -----------------------------------------------------------------------------------------------------------


@case()
class Map(Nets):
    def one(self, i, x):
        return self.nets[i](x[:, i : i + 1])

    def forward(self, x):
        return torch.hstack(list(map(lambda i: self.one(i, x), range(4))))


@case()
class GeneratorMethod(Nets):
    def parts(self, x):
        for column, net in zip(x.T, self.nets):
            yield net(column[:, None])

    def forward(self, x):
        return torch.cat(tuple(self.parts(x)), dim=-1) + self.bias


@case()
class LayerByLayer(Nets):
    def forward(self, x):
        outs = []
        for i, net in enumerate(self.nets):
            h = x[:, [i]]
            for layer in net:
                h = layer(h)
            outs.append(h)
        return torch.concat(outs, dim=1)


@case(heavy=4)
class AttributesByName(nn.Module):
    def __init__(self):
        super().__init__()
        for i in range(4):
            setattr(self, f"net_{i}", mlp())
            self.add_module(f"skip_{i}", nn.Linear(1, 1))

    def forward(self, x):
        return torch.cat([getattr(self, f"net_{i}")(x[:, i : i + 1]) + getattr(self, f"skip_{i}")(x[:, i : i + 1]) for i in range(4)], 1)


@case()
class PlainDict(nn.Module):
    def __init__(self):
        super().__init__()
        self.by_name = {f"f{i}": mlp() for i in range(4)}
        self.registered = nn.ModuleList(self.by_name.values())

    def forward(self, x):
        return {name: net(x[:, i : i + 1]) for i, (name, net) in enumerate(self.by_name.items())}


@case(({name: randn(5, 1, seed=i) for i, name in enumerate("abcd")},))
class DictInDictOut(nn.Module):
    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleDict({name: mlp() for name in "abcd"})

    def forward(self, features):
        outs = {name: self.nets[name](value) for name, value in features.items()}
        return outs | {"sum": sum(outs.values())}


@case(tuple(randn(5, 1, seed=i) for i in range(4)))
class StarArguments(Nets):
    def forward(self, *columns):
        return torch.cat([net(column) for net, column in zip(self.nets, columns)], 1)


@case((), kwargs={"features": X, "scale": randn(5, 1, seed=9)})
class KeywordInputs(Nets):
    def forward(self, features, scale=None, parts=True):
        out = torch.cat([net(features[..., i, None]) for i, net in enumerate(self.nets)], -1)
        return out * scale, {"parts": out if parts else None}


Output = namedtuple("Output", "logits parts")


@case()
class NamedTupleOutput(Nets):
    def forward(self, x):
        parts = [net(column) for net, column in zip(self.nets, x.split(1, 1))]
        return Output(torch.cat(parts, 1).sum(1) + self.bias, tuple(parts))


@case(heavy=2)
class TwoLoops(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.ModuleList(nn.Linear(1, 3) for _ in range(4))
        self.heads = nn.ModuleList(nn.Linear(12, 2) for _ in range(3))

    def forward(self, x):
        h = torch.cat([torch.relu(f(x[:, i : i + 1])) for i, f in enumerate(self.features)], 1)
        return [head(h) for head in self.heads]


# -- loops in loops --------------------------------------------------------------------------------------------------------------------


@case()
class EnsembleOfNets(nn.Module):
    def __init__(self):
        super().__init__()
        self.members = nn.ModuleList(nn.ModuleList(mlp() for _ in range(4)) for _ in range(3))
        self.biases = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        outs = []
        for e, nets in enumerate(self.members):
            outs.append(torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(nets)], -1).sum(-1) + self.biases[e])
        return torch.stack(outs, 1).mean(1)


@case()
class EnsembleOfModels(nn.Module):
    def __init__(self):
        super().__init__()
        self.members = nn.ModuleList(NamedTupleOutput() for _ in range(3))

    def forward(self, x):
        predictions = torch.stack([member(x)[0] for member in self.members])
        return {"mean": predictions.mean(0), "std": predictions.std(0)}


@case((randn(3, 6, 4),))
class LoopOverTime(Nets):
    def forward(self, x):
        steps = []
        for t in range(x.size(1)):
            steps.append(torch.cat([net(x[:, t, i : i + 1]) for i, net in enumerate(self.nets)], -1))
        return torch.stack(steps, 1)


@case((X, randn(5, 4, seed=3)))
class TwoTensors(Nets):
    def forward(self, a, b):
        return torch.cat([net(t[:, i : i + 1]) for t in (a, b) for i, net in enumerate(self.nets)], 1)


@case(heavy=3, x=randn(3, 12))
class Tree(nn.Module):
    def __init__(self):
        super().__init__()
        self.leaves = nn.ModuleList(nn.Linear(3, 4) for _ in range(4))
        self.inner = nn.ModuleList(nn.Linear(8, 4) for _ in range(2))
        self.root = nn.Linear(8, 1)

    def forward(self, x):
        h = [torch.relu(leaf(x[:, 3 * i : 3 * i + 3])) for i, leaf in enumerate(self.leaves)]
        h = [torch.relu(node(torch.cat(h[2 * i : 2 * i + 2], 1))) for i, node in enumerate(self.inner)]
        return self.root(torch.cat(h, -1))


@pytest.mark.parametrize("name", CASES)
def test_loop(name):
    assert_loop(*CASES[name])


# -- loops over the batch: one program for the recorded size, the loop for others ------------------------------------------------------


class KernelPerSample(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator = nn.Linear(6, 54)

    def forward(self, x, code):
        w = self.generator(code).view(-1, 2, 3, 3, 3)
        return torch.cat([F.conv2d(x[b : b + 1], w[b], padding=1) for b in range(x.size(0))], 0)


class NetsPerRow(Nets):
    def forward(self, x):
        rows = [torch.cat([net(x[b, i : i + 1]) for i, net in enumerate(self.nets)]) for b in range(x.shape[0])]
        return torch.stack(rows)


@pytest.mark.parametrize(
    ("cls", "x", "heavy"), [(KernelPerSample, (randn(3, 3, 6, 6), randn(3, 6)), 2), (NetsPerRow, (randn(5, 4),), 3)]
)
def test_loop_over_the_batch(cls, x, heavy):
    assert_fused_equals(randomized(cls()), x, heavy=heavy, batches=(1, 2, 7), specialised=True, validate=False, tune=False)
