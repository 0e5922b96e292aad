"""A Linear and a Conv1d with a kernel of one are the same map: a loop that mixes the two is one launch.

    python examples/linear_is_pointwise_conv.py

The question it comes from saw two networks, one with Linear and one with Conv1d(kernel_size=1), give slightly different accuracy. The
answers compare outputs and gradients, and plot the differences. `fxfuse.verify` shows the same: maximum, mean and histogram, in float32
and in float64, where what is rounding disappears and what is a mistake would stay.
"""

import torch
import torch.nn as nn
from both import carry_checkpoint, compare, fuse, train


class Channels(nn.Module):
    """Eight groups of measurements; four are mapped by Linear, four by Conv1d(k=1)."""

    def __init__(self, groups=8, in_features=8, out_features=32):
        super().__init__()
        self.layers = nn.ModuleList()
        for i in range(groups):
            if i % 2:
                self.layers.append(nn.Conv1d(in_features, out_features, 1))
            else:
                self.layers.append(nn.Linear(in_features, out_features))

    def forward(self, tensor):
        outputs = []
        for i, layer in enumerate(self.layers):
            x = tensor[:, i]  # [N, 16, 8]
            if isinstance(layer, nn.Conv1d):
                out_conv = layer(x.permute(0, 2, 1))
                outputs.append(out_conv.permute(0, 2, 1))
            else:
                outputs.append(layer(x))
        return torch.stack(outputs, dim=1)


def build():
    torch.manual_seed(0)
    return Channels(), (torch.randn(32, 8, 16, 8),)


def main():
    model, inputs = build()
    fused = fuse(model, *inputs)
    compare(model, fused, *inputs)
    train(model, fused, inputs, target=torch.randn(32, 8, 16, 32))
    carry_checkpoint(model, fused, *inputs)


if __name__ == "__main__":
    main()
