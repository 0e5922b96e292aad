"""A Conv1d of its own for every row of the input.

    python examples/conv_per_row.py

Ten groups of fifteen correlated time series, batches of shape [B, C, H, W]; `layers[h]` is applied to row h and the results are
concatenated. The question asks how to run it "such that the time to compute remains approximately the same as before"; the answer is
a grouped Conv1d over H * C channels, with the weights copied in the right order. That is the rewrite that is made here.
"""

import torch
from both import carry_checkpoint, compare, fuse, train
from torch import nn


class RowConvolutions(nn.Module):
    def __init__(self, C=15, H=10, k=3):
        super().__init__()
        layers = []
        for _ in range(H):
            layers.append(nn.Conv1d(C, C, kernel_size=k))
        self.layers = nn.ModuleList(layers)

    def forward(self, X):
        outputs = []
        for h in range(X.shape[2]):
            outputs.append(self.layers[h](X[:, :, h, :]).unsqueeze(2))
        return torch.cat(outputs, dim=2)


def build():
    torch.manual_seed(2022)
    return RowConvolutions(), (torch.randn(4, 15, 10, 100),)


def main():
    model, inputs = build()
    fused = fuse(model, *inputs, lowering="grouped_conv")
    compare(model, fused, *inputs)
    train(model, fused, inputs, target=torch.randn(4, 15, 10, 98))
    carry_checkpoint(model, fused, *inputs)


if __name__ == "__main__":
    main()
