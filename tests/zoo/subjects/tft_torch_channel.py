"""InputChannelEmbedding: a Linear per column by list index `x[:, [i]]`, an embedding per column, concatenated."""

import torch

from zoo.imports import bare, without

PACKAGE = "tft-torch==0.0.6"
ROWS = 64
HEAVY = 2
SIZES = [10, 10, 10, 25, 4]


def model():
    bare("tft_torch")
    with without("omegaconf"):
        from tft_torch.tft import InputChannelEmbedding

    return InputChannelEmbedding(state_size=16, num_numeric=6, num_categorical=5, categorical_cardinalities=SIZES, time_distribute=True)


def inputs(rows):
    ids = torch.stack([torch.randint(0, size, (rows, 12)) for size in SIZES], 2)
    return (torch.randn(rows, 12, 6), ids), {}
