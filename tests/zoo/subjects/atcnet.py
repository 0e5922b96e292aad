"""ATCNet: overlapping windows of time, each through its own attention block and dilated convolutions, stacked, mean."""

import torch

from zoo.imports import bare, without

PACKAGE = "braindecode==1.8.1"
ROWS = 8
HEAVY = 20


def model():
    bare("braindecode", "braindecode.models")
    with without("torchaudio", "torchinfo", "h5py"):
        from braindecode.models.atcnet import ATCNet

    return ATCNet(n_chans=22, n_outputs=4, input_window_seconds=4.5, sfreq=250)


def inputs(rows):
    return (torch.randn(rows, 22, 1125),), {}
