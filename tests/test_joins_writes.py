"""Lanes written into slices of one tensor: each model with the heavy launches and the launches of all kinds that one forward may make.

Nothing is validated by fxfuse itself here, so that a wrong rewrite shows as wrong numbers.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from joined_nets import Nets
from torch import nn

from checks import Cases, assert_case, mlp, randn

CASES = Cases()
case = CASES.case


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


@pytest.mark.parametrize("name", CASES)
def test_join(name):
    assert_case(CASES[name])
