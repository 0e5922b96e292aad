"""GradientBoostingRegressor: eight networks on one input, `out += rate * each`."""

import torch
from torch import nn

from zoo.imports import without

PACKAGE = "torchensemble==0.2.0"
ROWS = 64
HEAVY = 4


class Net(nn.Sequential):
    """A small regressor."""

    def __init__(self):
        super().__init__(nn.Linear(12, 32), nn.LayerNorm(32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 1))


def model():
    with without("torchvision"):
        from torchensemble import GradientBoostingRegressor

    ensemble = GradientBoostingRegressor(estimator=Net, n_estimators=8, shrinkage_rate=0.3, cuda=False)
    ensemble.estimators_.extend(ensemble._make_estimator() for _ in range(8))
    return ensemble


def inputs(rows):
    return (torch.randn(rows, 12),), {}
