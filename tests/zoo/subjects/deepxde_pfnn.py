"""PFNN: layer by layer, a list of branch activations through a ModuleList of ModuleLists; concatenated."""

import torch

from zoo.imports import silent, without

PACKAGE = "DeepXDE==1.15.0"
ROWS = 4096
HEAVY = 5


def model():
    with without("skopt"), silent():
        from deepxde.nn.pytorch.fnn import PFNN

    return PFNN([3, [50] * 4, [50] * 4, [50] * 4, [50] * 4, 4], "tanh", "Glorot uniform")


def inputs(rows):
    return (torch.randn(rows, 3),), {}
