"""What the tests of validation share: a loop as a user writes it, the same rewritten by hand, right and wrong, and what of it differs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxfuse.checking.validate import verify

LANES = 4


class Loop(nn.Module):
    """The loop that a user writes: one small network per column, with BatchNorm and dropout inside."""

    def __init__(self, lanes=LANES, hidden=8):
        super().__init__()
        self.nets = nn.ModuleList(
            nn.Sequential(nn.Linear(1, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(0.25), nn.Linear(hidden, 1))
            for _ in range(lanes)
        )

    def forward(self, x):
        return torch.stack([net(x[:, i : i + 1])[:, 0] for i, net in enumerate(self.nets)], 1)


class Packed(Loop):
    """The same by hand: batched matmuls over stacked weights, and one BatchNorm over all channels."""

    dropout = 0.25

    def weights(self, layer, name):
        return torch.stack([getattr(net[layer], name) for net in self.nets])

    def join(self, out):
        return out[..., 0].t().contiguous()

    def normalize(self, h):  # h: [lanes, batch, hidden]
        norms = [net[1] for net in self.nets]
        mean = torch.cat([norm.running_mean for norm in norms])
        var = torch.cat([norm.running_var for norm in norms])
        flat = h.transpose(0, 1).flatten(1)
        out = F.batch_norm(flat, mean, var, self.weights(1, "weight").flatten(), self.weights(1, "bias").flatten(), self.training)
        if self.training:
            self.write_back(norms, mean, var)
        return out.view(h.shape[1], h.shape[0], -1).transpose(0, 1)

    def write_back(self, norms, mean, var):
        for norm, m, v in zip(norms, mean.chunk(len(norms)), var.chunk(len(norms))):
            norm.running_mean.copy_(m)
            norm.running_var.copy_(v)
            norm.num_batches_tracked += 1

    def first(self, x):
        return torch.baddbmm(self.weights(0, "bias").unsqueeze(1), x.t().unsqueeze(-1), self.weights(0, "weight").transpose(1, 2))

    def last(self, h):
        return torch.baddbmm(self.weights(4, "bias").unsqueeze(1), h, self.weights(4, "weight").transpose(1, 2))

    def forward(self, x):
        h = self.normalize(self.first(x)).relu()
        return self.join(self.last(F.dropout(h, self.dropout, self.training)))


@pytest.fixture
def original():
    torch.manual_seed(0)
    return randomized(Loop())


def randomized(model):
    """Every lane its own weights and statistics, so that no mistake can hide behind equal ones."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape))
        for b in model.buffers():
            if b.is_floating_point():
                b.copy_(torch.rand(b.shape) + 0.5)
    return model


def like(original, kind, *args):
    fused = kind(*args)
    fused.load_state_dict(original.state_dict())
    return fused


def data(rows=12, columns=LANES):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))


def failed(result, *, kind=None, mode=None):
    """The names of the tensors that differ."""
    return {d.name for d in result.differences if not d.ok and (kind is None or d.kind == kind) and (mode is None or d.mode == mode)}


class LostBias(Packed):
    def last(self, h):
        return h @ self.weights(4, "weight").transpose(1, 2)


class LostGradient(Packed):
    def weights(self, layer, name):
        parts = list(super().weights(layer, name))
        if (layer, name) == (4, "weight"):
            parts[2] = parts[2].detach()
        return torch.stack(parts)


class Fn(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, *args, **kwargs):
        return self.fn(*args, **kwargs)


def same(f, g, x, **options):
    return verify(Fn(f), Fn(g), x, **options)
