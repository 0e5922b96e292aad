"""DeepONet, 6 independent outputs: a branch and a trunk net each, einsum, `+= b[i]` of a scalar Parameter, concat."""

import torch

from zoo.imports import silent, without

PACKAGE = "DeepXDE==1.15.0"
ROWS = 512
HEAVY = 4


def model():
    with without("skopt"), silent():
        from deepxde.nn.pytorch.deeponet import DeepONet

    return DeepONet([100, 40, 40], [2, 40, 40], "tanh", "Glorot normal", num_outputs=6, multi_output_strategy="independent")


def inputs(rows):
    return ((torch.randn(rows, 100), torch.randn(rows, 2)),), {}
