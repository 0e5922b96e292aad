"""Field-aware factorization machine: 8 embeddings on one input, products of pairs i < j, stacked."""

import torch

PACKAGE = "torchfm==0.7.0"
ROWS = 64
HEAVY = 2


def model():
    from torchfm.model.ffm import FieldAwareFactorizationMachineModel

    return FieldAwareFactorizationMachineModel([30] * 8, 4)


def inputs(rows):
    return (torch.randint(0, 30, (rows, 8)),), {}
