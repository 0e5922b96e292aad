"""CalibratedLinear: a piecewise linear calibrator per column, knots in plain attributes, column_stack."""

import torch

from zoo.imports import bare

PACKAGE = "pytorch-lattice==0.2.0"
ROWS = 64
HEAVY = 2


def model():
    bare("pytorch_lattice")
    import numpy as np
    from pytorch_lattice.models.calibrated_linear import CalibratedLinear
    from pytorch_lattice.models.features import NumericalFeature

    draw = np.random.default_rng(0)
    return CalibratedLinear([NumericalFeature(f"f{i}", draw.normal(size=200), num_keypoints=8) for i in range(12)])


def inputs(rows):
    return (torch.randn(rows, 12),), {}
