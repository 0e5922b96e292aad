"""The model of ``fxfuse demo``: a small network for each feature."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FeatureNetworks(nn.Module):
    """One network per feature, each reading its own column of ``x [batch, features]`` and writing its own column of the result.

    >>> FeatureNetworks(3, 4)(torch.zeros(2, 3)).shape
    torch.Size([2, 3])
    """

    def __init__(self, features: int = 128, hidden: int = 32) -> None:
        super().__init__()
        self.feature_networks = nn.ModuleList()
        for _ in range(features):
            self.feature_networks.append(
                nn.Sequential(nn.Linear(1, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1))
            )

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, features]`` in and out, written as people write it."""
        output = torch.zeros(x.shape[0], len(self.feature_networks))
        for i, network in enumerate(self.feature_networks):
            output[:, i] = network(x[:, i : i + 1]).squeeze(-1)
        return output
