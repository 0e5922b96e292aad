"""DLinear: two Linears per channel, written into two buffers in one loop."""

import torch

from zoo.imports import bare

PACKAGE = "pypots==1.5"
ROWS = 32
HEAVY = 1


def model():
    bare("pypots", "pypots.nn", "pypots.nn.modules", "pypots.nn.modules.dlinear")
    from pypots.nn.modules.dlinear.backbone import BackboneDLinear

    return BackboneDLinear(n_steps=96, n_features=21, individual=True)


def inputs(rows):
    return (torch.randn(rows, 96, 21), torch.randn(rows, 96, 21)), {}
