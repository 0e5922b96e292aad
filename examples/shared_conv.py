"""One convolution for all channels: concatenated with a growing `cat`, or summed.

    python examples/shared_conv.py

The question loops over the channels and grows `z` with `torch.cat`, which copies everything so far at every step. Folded into the batch
it is one convolution. Where the branches are summed instead, the thread derives that one may "first add the channels together and then
apply the convolution"; that is done too, with the bias counted once per channel, which the thread leaves out.
"""

import torch
import torch.nn as nn
from both import carry_checkpoint, compare, fuse, train


class SharedConvolution(nn.Module):
    def __init__(self, in_channels=16, scaler=4):
        super().__init__()
        self.conv0 = nn.Conv1d(in_channels=1, out_channels=scaler, kernel_size=5, padding=2)
        self.conv1 = nn.Conv1d(in_channels=in_channels * scaler, out_channels=32, kernel_size=3)

    def forward(self, x):
        z = self.conv0(x[:, 0, :].view(x.shape[0], 1, x.shape[2]))
        for i in range(1, x.shape[1]):
            z = torch.cat([z, self.conv0(x[:, i, :].view(x.shape[0], 1, x.shape[2]))], dim=1)
        return self.conv1(torch.relu(z))


class SummedBranches(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)

    def forward(self, x):
        y = self.conv(x[:, :1, :, :])
        for i in range(1, x.shape[1]):
            y = y + self.conv(x[:, i:i + 1, :, :])
        return y


def build():
    torch.manual_seed(0)
    return SharedConvolution(), (torch.randn(8, 16, 100),)


def build_summed():
    torch.manual_seed(0)
    return SummedBranches(), (torch.randn(4, 3, 10, 10),)


def main():
    for make in (build, build_summed):
        model, inputs = make()
        fused = fuse(model, *inputs)
        compare(model, fused, *inputs)
        train(model, fused, inputs, target=torch.randn_like(model(*inputs)))
        carry_checkpoint(model, fused, *inputs)


if __name__ == "__main__":
    main()
