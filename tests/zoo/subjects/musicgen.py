"""MusicGen decoder: sum() of 4 codebook embeddings; 4 heads on one input, stacked."""

import torch

PACKAGE = "transformers==5.23.0"
ROWS = 2
HEAVY = 17


def model():
    from transformers import MusicgenDecoderConfig, MusicgenForCausalLM

    return MusicgenForCausalLM(MusicgenDecoderConfig(
        vocab_size=2048, hidden_size=256, num_hidden_layers=2, ffn_dim=1024, num_attention_heads=4, num_codebooks=4,
        max_position_embeddings=256, dropout=0.0, use_cache=False,
    ))


def inputs(rows):
    return (), {"input_ids": torch.randint(0, 2048, (rows * 4, 64)), "use_cache": False}
