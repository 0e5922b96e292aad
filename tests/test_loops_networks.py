"""Loops of networks that people use: pairs, gates, experts, attention heads, critics, time series, images, each with its launches.

Nothing is validated by fxfuse itself here, so that a wrong rewrite shows as wrong numbers.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from loop_cases import Loops, X, assert_loop, mlp
from torch import nn

from checks import randn

CASES = Loops()
case = CASES.case


# -- pairs, gates, experts -------------------------------------------------------------------------------------------------------------


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


# -- time series and images ------------------------------------------------------------------------------------------------------------


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
    assert_loop(*CASES[name])
