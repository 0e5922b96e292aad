"""Another VariableSelectionNetwork: slices `x[..., i*d:(i+1)*d]` of one flat embedding, a gated residual net each."""

import torch

from zoo.imports import bare, without

PACKAGE = "tft-torch==0.0.6"
ROWS = 128
HEAVY = 9


def model():
    bare("tft_torch")
    with without("omegaconf"):
        from tft_torch.tft import VariableSelectionNetwork

    return VariableSelectionNetwork(input_dim=16, num_inputs=10, hidden_dim=24, dropout=0.1)


def inputs(rows):
    return (torch.randn(rows, 160),), {}
