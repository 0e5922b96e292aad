"""Bark fine acoustics: 8 codebook embeddings of slices, concatenated, summed."""

import torch

PACKAGE = "transformers==5.23.0"
ROWS = 2
HEAVY = 20


def model():
    from transformers import BarkFineModel
    from transformers.models.bark.configuration_bark import BarkFineConfig

    return BarkFineModel(BarkFineConfig(
        num_layers=2, num_heads=4, hidden_size=256, input_vocab_size=1056, output_vocab_size=1056, block_size=256,
    ))


def inputs(rows):
    return (3,), {"input_ids": torch.randint(0, 1056, (rows, 256, 8))}
