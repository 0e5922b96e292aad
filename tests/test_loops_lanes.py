"""What a lane of a loop is: modules, parameters, slices of one tensor, one op; lanes that agree in part; each with its number of launches.

Nothing is validated by fxfuse itself here, so that a wrong rewrite shows as wrong numbers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loop_cases import Loops, Nets, X, assert_loop, mlp
from torch import nn

import fxfuse
from checks import assert_equal_models, assert_heavy, randn, randomized

CASES = Loops()
case = CASES.case


# -- what a lane is --------------------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("name", CASES)
def test_loop(name):
    assert_loop(*CASES[name])


# -- lanes that agree in part ----------------------------------------------------------------------------------------------------------


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


# -- lanes of one elementwise, reducing or reshaping op each ---------------------------------------------------------------------------


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
