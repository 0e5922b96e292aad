"""TAPAS: 7 token type embeddings of unequal tables by getattr, each added to the sum in place."""

import torch

PACKAGE = "transformers==5.23.0"
ROWS = 8
HEAVY = 2


def model():
    from transformers import TapasConfig
    from transformers.models.tapas.modeling_tapas import TapasEmbeddings

    return TapasEmbeddings(TapasConfig(
        vocab_size=500, hidden_size=64, type_vocab_sizes=[3, 256, 256, 2, 256, 256, 10], reset_position_index_per_cell=False,
    ))


def inputs(rows):
    types = torch.stack([torch.randint(0, size, (rows, 48)) for size in (3, 256, 256, 2, 256, 256, 10)], 2)
    return (torch.randint(0, 500, (rows, 48)), types), {}
