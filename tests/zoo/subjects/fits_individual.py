"""FITS: a complex Linear per channel of the spectrum, written into slices of zeros."""

import torch

from zoo.imports import bare

PACKAGE = "pypots==1.5"
ROWS = 32
HEAVY = 1


def model():
    bare("pypots", "pypots.nn", "pypots.nn.modules", "pypots.nn.modules.fits")
    from pypots.nn.modules.fits.backbone import BackboneFITS

    return BackboneFITS(n_steps=336, n_features=21, n_pred_steps=96, cut_freq=80, individual=True)


def inputs(rows):
    return (torch.randn(rows, 336, 21),), {}
