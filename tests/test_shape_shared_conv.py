"""Shape 5: one convolution for all channels: folded into the batch, or, where the branches are summed, one of the sum (seeds/004)."""

import pytest
import torch
from torch import nn

import fxfuse
from checks import assert_equal_models, assert_fused_equals, randn, randomized


class GrowingCat(nn.Module):
    """The question's own code: the first channel outside the loop, the rest by a growing cat."""

    def __init__(self, scaler=4, conv=None):
        super().__init__()
        self.conv0 = conv or nn.Conv1d(in_channels=1, out_channels=scaler, kernel_size=3)

    def forward(self, x):
        z = self.conv0(x[:, 0, :].view(x.shape[0], 1, x.shape[2]))
        for i in range(1, x.shape[1]):
            z = torch.cat([z, self.conv0(x[:, i, :].view(x.shape[0], 1, x.shape[2]))], dim=1)
        return z


class Stacked(GrowingCat):
    def forward(self, x):
        return torch.stack([self.conv0(x[:, i:i + 1]) for i in range(x.shape[1])], dim=1)


class Listed(GrowingCat):
    def forward(self, x):
        zs = []
        for channel in x.unbind(1):
            zs.append(self.conv0(channel.unsqueeze(1)))
        return zs


class CatOfChunks(GrowingCat):
    def forward(self, x):
        return torch.cat([self.conv0(chunk) for chunk in x.chunk(x.shape[1], dim=1)], 1)


class Written(GrowingCat):
    def forward(self, x):
        first = self.conv0(x[:, :1])
        z = x.new_zeros(x.shape[0], x.shape[1], first.shape[1], first.shape[2])
        z[:, 0] = first
        for i in range(1, x.shape[1]):
            z[:, i] = self.conv0(x[:, i:i + 1])
        return z


class Summed(GrowingCat):
    def forward(self, x):
        return sum(self.conv0(x[:, i:i + 1]) for i in range(x.shape[1]))


class RunningSum(GrowingCat):
    def forward(self, x):
        y = self.conv0(x[:, :1])
        for i in range(1, x.shape[1]):
            y = y + self.conv0(x[:, i:i + 1])
        return y


class SummedInPlace(GrowingCat):
    def forward(self, x):
        y = 0
        for i in range(x.shape[1]):
            y += self.conv0(x[:, i:i + 1])
        return torch.relu(y)


class StackedThenSummed(GrowingCat):
    def forward(self, x):
        return torch.stack([self.conv0(x[:, i:i + 1]) for i in range(x.shape[1])]).sum(0)


class Averaged(GrowingCat):
    def forward(self, x):
        return torch.stack([self.conv0(x[:, i:i + 1]) for i in range(x.shape[1])], dim=1).mean(dim=1)


JOINED = [GrowingCat, Stacked, Listed, CatOfChunks, Written]
SUMMED = [Summed, RunningSum, SummedInPlace, StackedThenSummed, Averaged]


@pytest.mark.parametrize(("channels", "scaler"), [(2, 4), (3, 1), (16, 2)])
@pytest.mark.parametrize("kind", [*JOINED, *SUMMED])
def test_one_launch(kind, channels, scaler):
    assert_fused_equals(randomized(kind(scaler)), randn(5, channels, 9), heavy=1)


@pytest.mark.parametrize("conv", [
    {"bias": False}, {"stride": 2, "padding": 1}, {"dilation": 2}, {"padding": "same"}, {"padding": 2, "padding_mode": "circular"},
    {"padding": 1, "padding_mode": "reflect"}, {"kernel_size": 1},
], ids=str)
@pytest.mark.parametrize("kind", [GrowingCat, Summed])
def test_every_option(kind, conv):
    model = kind(conv=nn.Conv1d(**{"in_channels": 1, "out_channels": 3, "kernel_size": 3, **conv}))
    assert_fused_equals(randomized(model), randn(5, 4, 9), heavy=1)


@pytest.mark.parametrize("conv", [
    lambda: nn.Conv2d(1, 8, 3), lambda: nn.Conv2d(1, 8, 3, bias=False), lambda: nn.Conv2d(1, 3, (1, 3), padding=(0, 1)),
    lambda: nn.ConvTranspose2d(1, 4, 3, stride=2), lambda: nn.ConvTranspose2d(1, 4, 2, bias=False),
])
@pytest.mark.parametrize("kind", [Stacked, Listed, CatOfChunks, Summed, RunningSum])
def test_images(kind, conv):
    assert_fused_equals(randomized(kind(conv=conv())), randn(2, 3, 6, 5), heavy=1, batches=(1, 3))


@pytest.mark.parametrize("kind", [CatOfChunks, Summed])
def test_volumes(kind):
    assert_fused_equals(randomized(kind(conv=nn.Conv3d(1, 2, 2))), randn(2, 3, 4, 3, 5), heavy=1, batches=(1, 3))


class SharedLinear(nn.Module):
    """PatchTST and TSMixer share a Linear over the channels in the same way."""

    def __init__(self, summed):
        super().__init__()
        self.linear, self.summed = nn.Linear(8, 3), summed

    def forward(self, x):
        outs = [self.linear(x[:, i]) for i in range(x.shape[1])]
        return sum(outs) if self.summed else torch.stack(outs, dim=1)


@pytest.mark.parametrize("summed", [False, True])
def test_shared_linear(summed):
    assert_fused_equals(randomized(SharedLinear(summed)), randn(5, 4, 8), heavy=1)


class SharedNetwork(nn.Module):
    """More than one layer is shared; behind an activation, a sum of branches is no longer a convolution of the sum."""

    def __init__(self, summed):
        super().__init__()
        self.net = nn.Sequential(nn.Conv1d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv1d(4, 2, 3, padding=1))
        self.summed = summed

    def forward(self, x):
        outs = [self.net(x[:, i:i + 1]) for i in range(x.shape[1])]
        return sum(outs) if self.summed else torch.cat(outs, dim=1)


@pytest.mark.parametrize("summed", [False, True])
def test_shared_network(summed):
    assert_fused_equals(randomized(SharedNetwork(summed)), randn(5, 4, 8), heavy=2)


class ActivatedSum(GrowingCat):
    """relu inside the sum: summing the inputs first would be wrong."""

    def forward(self, x):
        return sum(torch.relu(self.conv0(x[:, i:i + 1])) for i in range(x.shape[1]))


class WeightedSum(GrowingCat):
    """Branches with factors of their own."""

    def __init__(self, scaler=4, channels=4):
        super().__init__(scaler)
        self.alpha = nn.Parameter(torch.ones(channels))

    def forward(self, x):
        return sum(self.alpha[i] * self.conv0(x[:, i:i + 1]) for i in range(x.shape[1]))


class SumAndParts(GrowingCat):
    """The parts are returned too, so that the sum cannot take their place."""

    def forward(self, x):
        parts = [self.conv0(x[:, i:i + 1]) for i in range(x.shape[1])]
        return sum(parts), parts


@pytest.mark.parametrize("kind", [ActivatedSum, WeightedSum, SumAndParts])
def test_sums_that_are_no_convolution_of_the_sum(kind):
    assert_fused_equals(randomized(kind()), randn(5, 4, 9), heavy=1)


def test_the_bias_is_counted_once_per_branch():
    """With a zero weight the sum is n times the bias, and its gradient n times that of one branch."""
    model = randomized(Summed(3))
    with torch.no_grad():
        model.conv0.weight.zero_()
    x = randn(5, 6, 9)
    fused = fxfuse.optimize(model, x, objective="launches", strict=True)
    assert fxfuse.report(fused).fused
    with torch.no_grad():
        torch.testing.assert_close(fused(x), (6 * model.conv0.bias).view(1, 3, 1).expand(5, 3, 7), rtol=1e-12, atol=0)
    assert_equal_models(model, fused, [(x, {})])


class RowsShareAConv(nn.Module):
    """A for-loop over the rows of an image with one Conv1d."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 3, padding=1)

    def forward(self, x):
        return torch.cat([self.conv(x[:, :, h]).unsqueeze(2) for h in range(x.shape[2])], dim=2)


def test_rows_share_a_conv():
    assert_fused_equals(randomized(RowsShareAConv()), randn(2, 3, 5, 7), heavy=1)


def test_peak_bytes_are_reported():
    """The document complains of memory: the report tells what a forward needs before and after, per region."""
    model = GrowingCat(8)
    fused = fxfuse.optimize(model, torch.randn(4, 16, 32), objective="launches", mode="infer")
    (plan,) = fxfuse.report(fused).to_dict()["fused"]
    before, after = plan["peak_bytes"]
    joined = 4 * 16 * 8 * 30 * 4  # bytes of the result, which the loop's growing cat holds nearly twice at its end
    assert before > 1.8 * joined
    assert joined <= after <= 3 * joined  # the result, the folded input, and no more than one copy of the result
