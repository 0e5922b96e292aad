"""PatchTST with `share_embedding=False`: a Linear per channel of a 4-D input, stacked."""

import torch

PACKAGE = "transformers==5.23.0"
ROWS = 16
HEAVY = 9


def model():
    from transformers import PatchTSTConfig, PatchTSTForPrediction

    return PatchTSTForPrediction(PatchTSTConfig(
        num_input_channels=21, context_length=336, patch_length=16, patch_stride=8, d_model=128, num_attention_heads=16,
        num_hidden_layers=1, ffn_dim=256, prediction_length=96, share_embedding=False, use_cls_token=False, do_mask_input=False,
    ))


def inputs(rows):
    return (torch.randn(rows, 336, 21),), {}
