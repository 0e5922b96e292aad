"""VariableSelectionNetwork: a dict of 20 inputs, a prescaler and a gated residual net each, stacked and concatenated."""

import torch

from zoo.imports import bare

PACKAGE = "pytorch-forecasting==1.8.0"
ROWS = 64
HEAVY = 11


def model():
    bare("pytorch_forecasting", "pytorch_forecasting.models", "pytorch_forecasting.models.temporal_fusion_transformer")
    from pytorch_forecasting.models.temporal_fusion_transformer.sub_modules import VariableSelectionNetwork

    return VariableSelectionNetwork({f"v{i}": 16 for i in range(20)}, 64, {}, dropout=0.1)


def inputs(rows):
    return ({f"v{i}": torch.randn(rows, 48, 1) for i in range(20)},), {}
