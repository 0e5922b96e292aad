"""DAC: codebook lookup and pointwise convolution per quantizer, `+=` into a sum that starts at 0.0, latents concatenated."""

import torch
from torch import nn

PACKAGE = "transformers==5.23.0"
ROWS = 4
HEAVY = 2


def model():
    from transformers import DacConfig
    from transformers.models.dac.modeling_dac import DacResidualVectorQuantizer

    class Decode(nn.Module):
        """`from_codes`, the way that decoding takes."""

        def __init__(self, quantizer):
            super().__init__()
            self.quantizer = quantizer

        def forward(self, codes):
            return self.quantizer.from_codes(codes)

    return Decode(DacResidualVectorQuantizer(DacConfig(
        n_codebooks=9, codebook_size=256, codebook_dim=8, encoder_hidden_size=16, downsampling_ratios=[2, 2], hidden_size=64,
    )))


def inputs(rows):
    return (torch.randint(0, 256, (rows, 9, 50)),), {}
