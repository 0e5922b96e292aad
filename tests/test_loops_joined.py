"""Where the lanes of a loop come together: grown, written into a tensor, summed, stacked, each with its number of launches.

Nothing is validated by fxfuse itself here, so that a wrong rewrite shows as wrong numbers.
"""

from __future__ import annotations

import functools

import pytest
import torch
from loop_cases import Loops, Nets, assert_loop
from torch import nn

CASES = Loops()
case = CASES.case


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


@pytest.mark.parametrize("name", CASES)
def test_loop(name):
    assert_loop(*CASES[name])
