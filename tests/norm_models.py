"""Loops over small networks with a normalization layer inside, as people write them; the layer is given by a function of its width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from checks import randn

Layer = Callable[[int], nn.Module]


class PerColumn(nn.Module):
    """One network per column, joined by cat."""

    def __init__(self, lanes: int, norm: Layer, hidden: int = 4) -> None:
        super().__init__()
        self.nets = nn.ModuleList(
            nn.Sequential(nn.Linear(1, hidden), norm(hidden), nn.ReLU(), nn.Linear(hidden, 2)) for _ in range(lanes)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], dim=1)


class Experts(nn.Module):
    """PLE style: MLP experts on one shared input, stacked, mixed by a gate."""

    def __init__(self, lanes: int, norm: Layer, features: int = 5, hidden: int = 6) -> None:
        super().__init__()
        self.experts = nn.ModuleList()
        for _ in range(lanes):
            layers: list[nn.Module] = []
            for wide, narrow in ((features, hidden), (hidden, 3)):
                layers += [nn.Linear(wide, narrow), norm(narrow), nn.ReLU(), nn.Dropout(0.0)]
            self.experts.append(nn.Sequential(*layers))
        self.gate = nn.Linear(features, lanes)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.stack([expert(x) for expert in self.experts], dim=1)
        return torch.bmm(torch.softmax(self.gate(x), dim=-1).unsqueeze(1), out).squeeze(1)


class Branches(nn.Module):
    """Convolution, norm, ReLU per branch; `source` says where each branch's input comes from."""

    def __init__(self, lanes: int, norm: Layer, dims: int, source: str = "chunk", channels: int = 4) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        self.source = source
        self.branches = nn.ModuleList(
            nn.Sequential(conv(2, channels, 3, padding=1, bias=False), norm(channels), nn.ReLU(), conv(channels, 2, 1))
            for _ in range(lanes)
        )

    def forward(self, x: Tensor) -> Tensor:
        n = len(self.branches)
        if self.source == "chunk":
            parts: Any = x.chunk(n, dim=1)
        elif self.source == "split":
            parts = torch.split(x, 2, dim=1)
        else:
            parts = [x] * n
        return torch.cat([branch(part) for branch, part in zip(self.branches, parts, strict=True)], dim=1)


def images(lanes: int, dims: int, source: str, rows: int = 3) -> Tensor:
    channels = 2 if source == "shared" else 2 * lanes
    return randn(rows, channels, *[4, 3, 2][:dims])


BATCH_NORMS: dict[str, dict[str, Any]] = {
    "usual": {},
    "momentum": {"momentum": 0.3, "eps": 1e-3},
    "cumulative": {"momentum": None},
    "no affine": {"affine": False},
    "no statistics": {"track_running_stats": False},
    "neither": {"affine": False, "track_running_stats": False},
    "cumulative, no affine": {"momentum": None, "affine": False},
}
SOME = ("usual", "cumulative", "neither")
MANY = (2, 9)  # one row has no variance: train mode raises
