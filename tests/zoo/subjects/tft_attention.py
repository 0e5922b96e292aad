"""InterpretableMultiHeadAttention: q and k per head, v shared, heads stacked, mean."""

import torch

from zoo.imports import bare

PACKAGE = "pytorch-forecasting==1.8.0"
ROWS = 64
HEAVY = 4


def model():
    bare("pytorch_forecasting", "pytorch_forecasting.models", "pytorch_forecasting.models.temporal_fusion_transformer")
    from pytorch_forecasting.models.temporal_fusion_transformer.sub_modules import InterpretableMultiHeadAttention

    return InterpretableMultiHeadAttention(n_head=4, d_model=64, dropout=0.1)


def inputs(rows):
    x = torch.randn(rows, 48, 64)
    return (x, x, x, torch.triu(torch.ones(48, 48, dtype=torch.bool), 1).expand(rows, 48, 48)), {}
