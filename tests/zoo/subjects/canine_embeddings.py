"""CANINE: 8 embedding tables found by getattr, each on its own hash of the characters, concatenated."""

import torch

PACKAGE = "transformers==5.23.0"
ROWS = 8
HEAVY = 4


def model():
    from transformers import CanineConfig
    from transformers.models.canine.modeling_canine import CanineEmbeddings

    return CanineEmbeddings(CanineConfig(hidden_size=192))


def inputs(rows):
    return (torch.randint(0, 0x3000, (rows, 128)),), {}
