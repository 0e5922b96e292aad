"""PFNN: layer by layer, a list of branch activations through a ModuleList of ModuleLists; concatenated."""

import torch

from zoo.imports import without

PACKAGE = "DeepXDE==1.15.0"
ROWS = 4096


def model():
    without("skopt")
    from deepxde.nn.pytorch.fnn import PFNN

    return PFNN([3, [50] * 4, [50] * 4, [50] * 4, [50] * 4, 4], "tanh", "Glorot uniform")


def inputs(rows):
    return (torch.randn(rows, 3),), {}
