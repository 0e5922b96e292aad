"""Loops as people write them: sixty small models in other spellings than the five shapes, each with its number of launches.

Nothing is validated by fxfuse itself here, so that a wrong rewrite shows as wrong numbers.
"""

from __future__ import annotations

import functools
import itertools
from collections import namedtuple
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxfuse
from checks import assert_equal_models, assert_fused_equals, assert_heavy, randn, randomized

X = randn(5, 4)
CASES: dict[str, tuple[type[nn.Module], Any, int, dict[str, Any]]] = {}


def case(x: Any = X, heavy: int = 3, **options: Any):
    """Register a model with its example, and how many heavy launches its fused forward may make."""
    def register(cls):
        CASES[cls.__name__] = (cls, x, heavy, options)
        return cls

    return register


def mlp(inputs: int = 1, hidden: int = 6, outputs: int = 1, act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), act(), nn.Linear(hidden, hidden), act(), nn.Linear(hidden, outputs))


class Nets(nn.Module):
    def __init__(self, inputs: int = 1, outputs: int = 1):
        super().__init__()
        self.nets = nn.ModuleList(mlp(inputs, outputs=outputs) for _ in range(4))
        self.bias = nn.Parameter(torch.zeros(1))


# -- how the loop is written ------------------------------------------------------------------------------------------------------


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


# -- loops in loops ---------------------------------------------------------------------------------------------------------------


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


# -- where the lanes come together ------------------------------------------------------------------------------------------------


@case()
class GrowFromNone(Nets):
    def forward(self, x):
        z = None
        for i, net in enumerate(self.nets):
            y = net(x[:, i : i + 1])
            z = y if z is None else torch.cat((z, y), dim=1)
        return z


@case()
class GrowFromEmptyVector(Nets):
    def forward(self, x):
        z = torch.tensor([])  # one dim, which torch.cat lets pass
        for i, net in enumerate(self.nets):
            z = torch.cat([z, net(x[:, i : i + 1])], dim=-1)
        return z


@case()
class GrowFromLegacyTensor(Nets):
    def forward(self, x):
        z = torch.Tensor()
        for i, net in enumerate(self.nets):
            z = torch.cat([z, net(x[:, i : i + 1])], dim=1)
        return z


@case()
class WriteIntoEmptyLike(Nets):
    def forward(self, x):
        out = torch.empty_like(x)
        for i in range(x.shape[-1]):
            out[:, i : i + 1] = self.nets[i](x[:, i : i + 1])
        return out.sum(dim=1, keepdim=True) + self.bias


@case()
class WriteFromBehind(Nets):
    def forward(self, x):
        out = torch.zeros_like(x)
        for i, net in enumerate(self.nets):
            out[..., -(i + 1)] = net(x[:, -(i + 1), None]).squeeze(-1)
        return out


@case()
class WriteAPart(Nets):
    def forward(self, x):
        out = torch.full((x.shape[0], 7), -1.0, dtype=x.dtype)
        for i, net in enumerate(self.nets):
            out[:, i + 2] = net(x[:, i : i + 1]).view(-1)
        return out


@case()
class WriteRows(Nets):
    def forward(self, x):
        columns = x.t()
        out = torch.zeros(4, len(x), dtype=x.dtype)
        for i in range(4):
            out[i] = self.nets[i](columns[i].reshape(-1, 1)).flatten()
        return out.T


@case()
class WriteTwice(Nets):
    def forward(self, x):
        out = torch.zeros(x.size(0), 5, dtype=x.dtype)
        for i, net in enumerate(self.nets):
            out[:, i : i + 2] = net(x[:, i : i + 1])
        return out


@case()
class CopyIntoSelect(Nets):
    def forward(self, x):
        out = torch.empty((len(x), 4), dtype=x.dtype)
        for i, net in enumerate(self.nets):
            out.select(1, i).copy_(net(x.select(1, i).unsqueeze(1)).squeeze(1))
        return out


@case()
class WriteAndReadBack(Nets):
    def forward(self, x):
        out = torch.ones(len(x), 4, dtype=x.dtype)
        for i, net in enumerate(self.nets):
            out[:, i] = net(x[:, i : i + 1]).squeeze(1) * out.sum(1)
        return out


@case()
class SumOverN(Nets):
    def forward(self, x):
        outs = [net(column[:, None]) for column, net in zip(x.T, self.nets)]
        return sum(outs) / len(outs)


@case()
class RunningSums(Nets):
    def forward(self, x):
        total, sums = torch.zeros(x.shape[0], 1, dtype=x.dtype), []
        for i, net in enumerate(self.nets):
            total = total + net(x[:, i : i + 1])
            sums.append(total)
        return torch.cat(sums, 1)


@case()
class ReduceByFunction(Nets):
    def forward(self, x):
        return functools.reduce(torch.add, [net(x[:, i : i + 1]) for i, net in enumerate(self.nets)])


@case()
class ProductAndMaximum(Nets):
    def forward(self, x):
        product, largest = 1, None
        for i, net in enumerate(self.nets):
            y = net(x[:, i : i + 1])
            product, largest = product * y, y if largest is None else torch.max(largest, y)
        return product, largest


@case()
class WeightedByAParameter(Nets):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(4))

    def forward(self, x):
        total = self.w[0] * self.nets[0](x[:, 0:1])
        for i in range(1, 4):
            total = total + self.w[i] * self.nets[i](x[:, i : i + 1])
        return torch.sigmoid(total).squeeze(-1)


@case()
class EveryStack(Nets):
    def forward(self, x):
        a = torch.vstack([net(c) for net, c in zip(self.nets, x.split(1, -1))])
        b = torch.column_stack([net(c) for net, c in zip(self.nets, x.tensor_split(4, 1))])
        return a, b, torch.dstack([net(c) for net, c in zip(self.nets, x.hsplit(4))])


@case()
class Penalty(Nets):
    def forward(self, x):
        outs, penalty = [], 0.0
        for i, net in enumerate(self.nets):
            outs.append(net(x[:, i : i + 1]))
            penalty = penalty + (net[0].weight ** 2).sum() + net[2].weight.norm()
        return torch.cat(outs, 1), penalty


# -- what a lane is ---------------------------------------------------------------------------------------------------------------


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(1, 5), nn.LayerNorm(5), nn.Linear(5, 1)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x + self.fc2(F.silu(self.norm(self.fc1(x)))) * self.scale


@case()
class ResidualCells(nn.Module):
    def __init__(self):
        super().__init__()
        self.cells = nn.ModuleList(Cell() for _ in range(4))

    def forward(self, x):
        return torch.concat([cell(x[:, i].reshape(-1, 1)) for i, cell in enumerate(self.cells)], dim=1)


@case(heavy=2)
class OtherActivations(nn.Module):
    def __init__(self):
        super().__init__()
        acts = [nn.ReLU(), nn.Tanh(), nn.ReLU(), nn.Sigmoid()]
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(1, 5), act, nn.Linear(5, 2)) for act in acts)

    def forward(self, x):
        return torch.stack([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1)


@case(heavy=2)
class InPlaceActivations(nn.Module):
    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleList(
            nn.Sequential(nn.Linear(1, 5), nn.ReLU(inplace=True), nn.Linear(5, 2), nn.LeakyReLU(0.1, inplace=True)) for _ in range(4)
        )

    def forward(self, x):
        out = x.new_zeros(len(x), 8)
        for i, net in enumerate(self.nets):
            out[:, 2 * i : 2 * i + 2] = net(x[:, i : i + 1])
        return out


@case()
class NumbersPerLane(Nets):
    def forward(self, x):
        return torch.cat([net(x[:, i : i + 1].clamp(-1.0 - i, 1.0 + i) ** (i + 1) / x.shape[0]) for i, net in enumerate(self.nets)], 1)


@case()
class BuffersPerLane(Nets):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("std", torch.ones(4))

    def forward(self, x):
        return torch.cat([net(((x[:, i] - self.mean[i]) / self.std[i]).unsqueeze(-1)) for i, net in enumerate(self.nets)], 1)


@case(randn(5, 4, 3), heavy=2)
class MatmulOfSlices(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.randn(4, 3, 6)), nn.Parameter(torch.randn(4, 6))
        self.w2 = nn.Parameter(torch.randn(4, 6, 2))

    def forward(self, x):
        return torch.stack([torch.relu(x[:, i] @ self.w1[i] + self.b1[i]) @ self.w2[i] for i in range(4)], 1)


@case(randn(5, 4, 3), heavy=2)
class EinsumOfSlices(MatmulOfSlices):
    def forward(self, x):
        outs = []
        for xi, w1, b1, w2 in zip(x.unbind(1), self.w1, self.b1, self.w2):
            h = torch.einsum("bk,kh->bh", xi, w1).add(b1).clamp(min=0)
            outs.append(torch.einsum("bh,ho->bo", h, w2))
        return torch.stack(outs, dim=1)


@case(randn(5, 4, 3), heavy=1)
class LinearOfSlices(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 6, 3)), nn.Parameter(torch.randn(4, 6))

    def forward(self, x):
        return torch.stack([F.linear(x[:, i], self.weight[i], self.bias[i]) for i in range(x.size(1))], 1)


@case(heavy=1)
class ListsOfParameters(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.ParameterList(nn.Parameter(torch.randn(1, 3)) for _ in range(4))
        self.b = nn.ParameterDict({f"b{i}": nn.Parameter(torch.randn(3)) for i in range(4)})

    def forward(self, x):
        return torch.stack([torch.sigmoid(x[:, i : i + 1].matmul(w) + self.b[f"b{i}"]) for i, w in enumerate(self.w)], 1)


# -- pairs, gates, experts --------------------------------------------------------------------------------------------------------


@case(heavy=1)
class Pairs(nn.Module):
    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleDict({f"{i}_{j}": nn.Linear(2, 3) for i, j in itertools.combinations(range(4), 2)})

    def forward(self, x):
        pairs = itertools.combinations(range(4), 2)
        return torch.stack([torch.tanh(self.nets[f"{i}_{j}"](x[:, [i, j]])) for i, j in pairs], 1).sum(1)


@case(randn(5, 4, 3), heavy=1)
class BilinearPairs(nn.Module):
    def __init__(self):
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(3, 3, bias=False) for _ in range(4))

    def forward(self, x):
        rows = torch.split(x, 1, dim=1)
        return torch.cat([torch.mul(self.maps[i](rows[i]), rows[j]) for i, j in itertools.combinations(range(4), 2)], dim=1)


@case(heavy=3)
class SoftmaxGate(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts, self.gate = nn.ModuleList(mlp(4, 6, 3) for _ in range(5)), nn.Linear(4, 5)

    def forward(self, x):
        weights, out = torch.softmax(self.gate(x), -1), 0
        for i, expert in enumerate(self.experts):
            out = out + weights[:, i : i + 1] * expert(x)
        return out


@case(heavy=5)
class GatesAndTowers(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 6), nn.ReLU()) for _ in range(3))
        self.gates = nn.ModuleList(nn.Linear(4, 3, bias=False) for _ in range(2))
        self.towers = nn.ModuleList(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 1)) for _ in range(2))

    def forward(self, x):
        experts = torch.stack([expert(x) for expert in self.experts], 1)
        mixed = [torch.bmm(gate(x).softmax(-1).unsqueeze(1), experts).squeeze(1) for gate in self.gates]
        return tuple(torch.sigmoid(tower(m)) for tower, m in zip(self.towers, mixed))


@case((X, torch.tensor([1, 0, 2, 3, 1])), heavy=2)
class MaskedExperts(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)) for _ in range(4))

    def forward(self, x, route):
        out = 0
        for i, expert in enumerate(self.experts):
            out += expert(x) * (route == i).unsqueeze(1).to(x.dtype)
        return out, torch.stack([expert(x) for expert in self.experts], 1)[torch.arange(x.size(0)), route]


@case(randn(4, 6, 3), heavy=4)
class AttentionHeads(nn.Module):
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.key, self.query, self.value = (nn.Linear(3, 4, bias=False) for _ in range(3))
            self.register_buffer("tril", torch.tril(torch.ones(8, 8)))

        def forward(self, x):
            _, steps, width = x.shape
            weights = self.query(x) @ self.key(x).transpose(-2, -1) * width**-0.5
            weights = weights.masked_fill(self.tril[:steps, :steps] == 0, float("-inf"))
            return F.softmax(weights, -1) @ self.value(x)

    def __init__(self):
        super().__init__()
        self.heads, self.proj = nn.ModuleList(self.Head() for _ in range(3)), nn.Linear(12, 3)

    def forward(self, x):
        return self.proj(torch.cat([head(x) for head in self.heads], dim=-1))


@case((X, randn(5, 2, seed=3)), heavy=2)
class Critics(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_networks = []  # as stable-baselines3: a plain list, registered one by one
        for i in range(3):
            net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))
            self.add_module(f"qf{i}", net)
            self.q_networks.append(net)

    def forward(self, obs, actions):
        x = torch.cat([obs, actions], dim=1)
        values = tuple(q(x) for q in self.q_networks)
        return values, torch.min(torch.cat(values, 1), dim=1, keepdim=True)[0]


# -- time series and images -------------------------------------------------------------------------------------------------------


@case(randn(3, 6, 8), heavy=1)
class DLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.seasonal, self.trend = (nn.ModuleList(nn.Linear(6, 5) for _ in range(8)) for _ in range(2))

    def forward(self, x):
        x = x.permute(0, 2, 1)
        trend = F.avg_pool1d(F.pad(x, (1, 1), mode="replicate"), 3, 1)
        rest = x - trend
        a = torch.zeros([rest.size(0), rest.size(1), 5], dtype=rest.dtype).to(rest.device)
        b = torch.zeros([trend.size(0), trend.size(1), 5], dtype=trend.dtype).to(trend.device)
        for i in range(8):
            a[:, i, :] = self.seasonal[i](rest[:, i, :])
            b[:, i, :] = self.trend[i](trend[:, i, :])
        return (a + b).permute(0, 2, 1)


@case(randn(3, 3, 8, 8), heavy=1)
class SharedConvPerChannel(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)

    def forward(self, x):
        return torch.cat([F.relu(self.conv(channel)) for channel in torch.split(x, 1, dim=1)], dim=1).mean((2, 3))


@case(randn(3, 4, 5, 7), heavy=1)
class Conv2dPerRow(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 6, (1, 3), padding=(0, 1)) for _ in range(5))

    def forward(self, x):
        return torch.cat([conv(x[:, :, i : i + 1, :]) for i, conv in enumerate(self.convs)], 2)


@case(randn(2, 6, 9, 9), heavy=2)
class ConvThenLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(2, 2, 3, stride=2, bias=False) for _ in range(3))
        self.linears = nn.ModuleList(nn.Linear(2 * 16, 3) for _ in range(3))

    def forward(self, x):
        parts = zip(self.convs, self.linears, torch.chunk(x, 3, dim=1))
        return torch.stack([linear(torch.flatten(F.elu(conv(part)), 1)) for conv, linear, part in parts], dim=-1).prod(-1)


@case(randn(3, 4, 5), heavy=1)
class TransposedPerChannel(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.ConvTranspose1d(1, 2, 3, stride=2, output_padding=1) for _ in range(4))

    def forward(self, x):
        return torch.cat([conv(x[:, i : i + 1]) for i, conv in enumerate(self.convs)], 1)


@case(randn(5, 8), heavy=1)
class Windows(nn.Module):
    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleList(nn.Linear(5, 3) for _ in range(4))

    def forward(self, x):
        return torch.cat([net(x[:, i : i + 5]) for i, net in enumerate(self.nets)], 1)


@case(randn(5, 8), heavy=1)
class AllButOne(nn.Module):
    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleList(nn.Linear(7, 1) for _ in range(8))

    def forward(self, x):
        return torch.cat([net(torch.cat([x[:, :i], x[:, i + 1 :]], 1)) for i, net in enumerate(self.nets)], 1)


@case((randn(4, 3, 6), randn(4, 5, seed=3)), heavy=2)
class Hypernetworks(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.ModuleList(nn.Linear(5, 18) for _ in range(3))
        self.biases = nn.ModuleList(nn.Linear(5, 2) for _ in range(3))

    def forward(self, x, code):
        code = code.mean(0)
        outs = [F.conv1d(x, w(code).view(2, 3, 3), b(code), padding=1) for w, b in zip(self.weights, self.biases)]
        return torch.cat(outs, 1)


@pytest.mark.parametrize("name", CASES)
def test_loop(name):
    cls, x, heavy, options = CASES[name]
    torch.manual_seed(0)
    assert_fused_equals(randomized(cls(), seed=5), x, heavy=heavy, batches=(1, 2, 7), validate=False, tune=False, **options)


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


# -- lanes that agree in part -----------------------------------------------------------------------------------------------------


class OddLane(nn.Module):
    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleList(mlp(hidden=8 if i == 2 else 5) for i in range(4))

    def forward(self, x):
        out = torch.zeros(x.shape[0], 4, dtype=x.dtype)
        for i in range(4):
            out[:, i] = self.nets[i](x[:, i].view(-1, 1)).squeeze(-1)
        return out


class OneLaneLess(Nets):
    def forward(self, x):
        return torch.cat([net(x[:, i : i + 1]) if i != 2 else x[:, i : i + 1] * 0 for i, net in enumerate(self.nets)], 1)


class TwoWidths(nn.Module):
    def __init__(self):
        super().__init__()
        self.sizes = [1, 3, 1, 3]
        self.nets = nn.ModuleList(nn.Linear(size, 3) for size in self.sizes)

    def forward(self, x):
        return torch.stack([net(part) for net, part in zip(self.nets, x.split(self.sizes, dim=1))], 1)


@pytest.mark.parametrize(("cls", "columns", "heavy"), [(OddLane, 4, 6), (OneLaneLess, 4, 3), (TwoWidths, 8, 2)])
def test_lanes_agree_in_part(cls, columns, heavy):
    model, x = randomized(cls()), randn(5, columns)
    fused = fxfuse.optimize(model, x, objective="launches", validate=False, tune=False)
    assert fxfuse.report(fused).fused
    assert_equal_models(model, fused, [(randn(rows, columns, seed=rows), {}) for rows in (1, 2, 5, 7)])
    assert_heavy(fused, x, heavy)


# -- lanes of one elementwise, reducing or reshaping op each -------------------------------------------------------------------------

OPS: dict[str, Any] = {
    "rsub": lambda h: 1 - h,
    "rdiv": lambda h: 2 / (h**2 + 1),
    "rpow": lambda h: 1.5**h,
    "pow": lambda h: h**2,
    "powers": lambda h: h.abs() ** h,
    "mod": lambda h: h % 2,
    "abs": abs,
    "where": lambda h: torch.where(h > 0, h, 0.1 * h),
    "gelu": lambda h: F.gelu(h, approximate="tanh"),
    "glu": lambda h: F.glu(h, dim=-1),
    "chunks": lambda h: torch.mul(*h.chunk(2, 1)),
    "softmax": lambda h: h.softmax(-1),
    "standard": lambda h: (h - h.mean(1, keepdim=True)) / (h.std(1, keepdim=True) + 1e-3),
    "var": lambda h: h * torch.var(h, 1, keepdim=True),
    "amax": lambda h: h - h.amax(-1, keepdim=True),
    "max": lambda h: h - h.max(1, keepdim=True)[0],
    "sum of all": lambda h: h / h.sum(),
    "cumsum": lambda h: h.cumsum(1),
    "over the batch": lambda h: torch.cumsum(h, dim=0),
    "sort": lambda h: h.sort(1)[0],
    "flip": lambda h: h.flip(1),
    "roll": lambda h: torch.roll(h, 1, 1),
    "layer_norm": lambda h: (h - h.mean(-1, keepdim=True)) * torch.rsqrt(h.var(-1, keepdim=True, unbiased=False) + 1e-5),
    "normalize": lambda h: F.normalize(h, dim=-1),
    "view": lambda h: h.view(h.size(0), 3, 2).transpose(1, 2).flatten(1),
    "repeat": lambda h: h.reshape(-1, 2, 3).sum(-1).repeat(1, 3),
    "tile": lambda h: h.tile(1, 2),
    "tile batch": lambda h: h.tile((1, 2)),
    "diag_embed": lambda h: torch.diag_embed(h).sum(1),
    "outer": lambda h: (h.unsqueeze(2) * h.unsqueeze(1)).sum(2),
    "pad": lambda h: F.pad(h, (1, 1)),
    "size": lambda h: h / h.shape[0],
    "numel": lambda h: h / h.numel(),
    "arange": lambda h: h * torch.arange(h.size(0), dtype=h.dtype).unsqueeze(1),
    "new_zeros": lambda h: torch.cat([h, h.new_zeros(h.size(0), 2)], 1),
    "index": lambda h: h[:, torch.tensor([5, 1, 0])],
    "in place": lambda h: h.mul(2).clamp_(max=1.0),
    "alpha": lambda h: torch.add(h, h, alpha=3),
    "similarity": lambda h: h * F.cosine_similarity(h, h * h + 1, dim=1).unsqueeze(1),
    "windows": lambda h: h.unfold(1, 3, 1).mean(-1),
    "dtypes": lambda h: h.float().double(),
}


class OneOp(nn.Module):
    def __init__(self, op):
        super().__init__()
        self.op = op
        self.first = nn.ModuleList(nn.Linear(2, 6) for _ in range(4))
        width = op(torch.rand(3, 6, dtype=torch.float64)).shape[-1]
        self.last = nn.ModuleList(nn.Linear(width, 2) for _ in range(4))

    def forward(self, x):
        return torch.cat([last(self.op(first(x[:, [i, i]]))) for i, (first, last) in enumerate(zip(self.first, self.last))], 1)


@pytest.mark.parametrize("name", OPS)
def test_lanes_of_one_op(name):
    model = randomized(OneOp(OPS[name]))
    fused = fxfuse.optimize(model, X, objective="launches", validate=False, tune=False)
    report = fxfuse.report(fused)
    assert report.fused, report
    assert not [refusal for refusal in report.refused if "fxfuse failed" in str(refusal)]
    assert_equal_models(model, fused, [(randn(rows, 4, seed=rows), {}) for rows in (5, 2, 7)])
    assert not report.fallbacks
    assert_heavy(fused, X, 2)
