"""FT-Transformer: one embedding per column of unequal cardinalities, stacked."""

import torch

PACKAGE = "rtdl_revisiting_models==0.0.2"
ROWS = 32
HEAVY = 11
SIZES = [3, 17, 5, 40, 8, 8, 100, 2]


def model():
    from rtdl_revisiting_models import FTTransformer

    return FTTransformer(
        n_cont_features=3, cat_cardinalities=SIZES, d_out=1, n_blocks=1, d_block=32, attention_n_heads=4, attention_dropout=0.0,
        ffn_d_hidden_multiplier=2, ffn_dropout=0.0, residual_dropout=0.0,
    )


def inputs(rows):
    return (torch.randn(rows, 3), torch.stack([torch.randint(0, size, (rows,)) for size in SIZES], 1)), {}
