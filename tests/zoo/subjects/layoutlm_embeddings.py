"""LayoutLM: six 2-D position embeddings, two of the tables used twice, all summed."""

import torch

PACKAGE = "transformers==5.23.0"
ROWS = 8
HEAVY = 3


def model():
    from transformers import LayoutLMConfig
    from transformers.models.layoutlm.modeling_layoutlm import LayoutLMEmbeddings

    return LayoutLMEmbeddings(LayoutLMConfig(vocab_size=500, hidden_size=64))


def inputs(rows):
    corner, size = torch.randint(0, 500, (rows, 40, 2)), torch.randint(0, 500, (rows, 40, 2))
    return (), {"input_ids": torch.randint(0, 500, (rows, 40)), "bbox": torch.cat([corner, corner + size], 2)}
