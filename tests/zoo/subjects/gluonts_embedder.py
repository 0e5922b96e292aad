"""FeatureEmbedder: chunks of one tensor, tables of unequal sizes and widths, concatenated."""

import torch

from zoo.imports import bare

PACKAGE = "gluonts==0.17.0"
ROWS = 32
HEAVY = 6
SIZES = [50, 50, 7, 20, 7, 3]


def model():
    bare("gluonts", "gluonts.torch", "gluonts.torch.modules")
    from gluonts.torch.modules.feature import FeatureEmbedder

    return FeatureEmbedder(SIZES, [16, 16, 8, 16, 8, 4])


def inputs(rows):
    return (torch.stack([torch.randint(0, size, (rows, 12)) for size in SIZES], 2),), {}
