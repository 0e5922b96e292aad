"""Shape 4: a convolution of its own for every row: any dimension, any option, any slice axis, any join axis (seeds/003)."""

import pytest
import torch
from torch import nn

from checks import QUICK, assert_fused_equals, randn, randomized


class RowwiseConv(nn.Module):
    """The question's own code: X [B, C, H, W], layers[h] on X[:, :, h, :]."""

    def __init__(self, C=3, H=4, out=None, **conv):
        super().__init__()
        layers = []
        for _ in range(H):
            layers.append(nn.Conv1d(C, out or C, **{"kernel_size": 3, **conv}))
        self.layers = nn.ModuleList(layers)

    def forward(self, X):
        outputs = []
        for h in range(X.shape[2]):
            outputs.append(self.layers[h](X[:, :, h, :]).unsqueeze(2))
        return torch.cat(outputs, dim=2)


@pytest.mark.parametrize("conv", [
    {}, {"bias": False}, {"stride": 2}, {"padding": 1}, {"padding": 2, "stride": 3}, {"dilation": 2}, {"padding": "same"},
    {"padding": "same", "dilation": 2}, {"padding": "same", "kernel_size": 4}, {"padding": "valid"}, {"kernel_size": 1}, {"kernel_size": 5},
    {"padding": 1, "padding_mode": "reflect"}, {"padding": 2, "padding_mode": "replicate"}, {"padding": 1, "padding_mode": "circular"},
    {"padding": "same", "padding_mode": "reflect"}, {"padding": 1, "padding_mode": "circular", "bias": False, "stride": 2},
], ids=str)
@pytest.mark.parametrize(("C", "H", "out"), [(3, 4, None), (1, 2, 5), (2, 7, 1)])
def test_1d(C, H, out, conv):
    assert_fused_equals(randomized(RowwiseConv(C, H, out, **conv)), randn(4, C, H, 9), heavy=1, **QUICK)


@pytest.mark.parametrize("conv", [{"groups": 2}, {"groups": 4}, {"groups": 2, "bias": False, "stride": 2, "padding": 1}, {
    "groups": 4, "padding": 1, "padding_mode": "replicate"}], ids=str)
def test_1d_with_groups_of_its_own(conv):
    assert_fused_equals(randomized(RowwiseConv(4, 3, 8, **conv)), randn(4, 4, 3, 9), heavy=1)


class PerLane(nn.Module):
    """x [N, lanes, C, ...]: any convolution."""

    def __init__(self, conv, lanes=3, **options):
        super().__init__()
        self.layers = nn.ModuleList(conv(**options) for _ in range(lanes))

    def forward(self, x):
        return torch.stack([layer(x[:, i]) for i, layer in enumerate(self.layers)], dim=1)


def options(*variants, **base):
    return [{**base, **variant} for variant in variants]


PLAIN = options(
    {}, {"bias": False}, {"stride": 2}, {"padding": 1}, {"padding": "same"}, {"padding": "same", "kernel_size": 2, "dilation": 3},
    {"dilation": 2, "padding": 2}, {"groups": 2}, {"padding": 1, "padding_mode": "replicate"},
    {"padding": 1, "padding_mode": "circular", "stride": 2}, in_channels=2, out_channels=4, kernel_size=3)
TRANSPOSED = options(
    {}, {"bias": False}, {"stride": 2}, {"stride": 2, "output_padding": 1}, {"padding": 1}, {"dilation": 2, "padding": 1},
    {"groups": 2}, {"groups": 2, "stride": 3, "padding": 1, "output_padding": 2, "bias": False},
    in_channels=2, out_channels=4, kernel_size=3)


@pytest.mark.parametrize("conv", [*PLAIN, {**PLAIN[0], "padding": 1, "padding_mode": "reflect"}], ids=str)
def test_2d(conv):
    assert_fused_equals(randomized(PerLane(nn.Conv2d, **conv)), randn(2, 3, 2, 7, 6), heavy=1, batches=(1, 3))


@pytest.mark.parametrize("conv", [
    {"kernel_size": (1, 3)}, {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)},
    {"kernel_size": (3, 5), "padding": (1, 2), "padding_mode": "reflect"}, {"kernel_size": (2, 3), "padding": "same"},
], ids=str)
def test_2d_with_another_option_per_axis(conv):
    model = randomized(PerLane(nn.Conv2d, in_channels=2, out_channels=3, **conv))
    assert_fused_equals(model, randn(2, 3, 2, 7, 6), heavy=1, batches=(1, 3))


@pytest.mark.parametrize("conv", PLAIN, ids=str)
def test_3d(conv):
    assert_fused_equals(randomized(PerLane(nn.Conv3d, lanes=2, **conv)), randn(2, 2, 2, 4, 5, 6), heavy=1, batches=(1, 3))


@pytest.mark.parametrize("conv", TRANSPOSED, ids=str)
@pytest.mark.parametrize(("kind", "size"), [(nn.ConvTranspose1d, (7,)), (nn.ConvTranspose2d, (4, 5)), (nn.ConvTranspose3d, (3, 3, 2))])
def test_transposed(kind, size, conv):
    assert_fused_equals(randomized(PerLane(kind, **conv)), randn(2, 3, 2, *size), heavy=1, batches=(1, 3), **QUICK)


# Slice axis and join axis.


SLICES = {
    "x[:, h]": ((4, 3, 2, 8), lambda x, h: x[:, h]),
    "x[:, :, h]": ((4, 2, 3, 8), lambda x, h: x[:, :, h]),
    "x[:, :, h, :]": ((4, 2, 3, 8), lambda x, h: x[:, :, h, :]),
    "x[..., h]": ((4, 2, 8, 3), lambda x, h: x[..., h]),
    "x[:, :, :, h]": ((4, 2, 8, 3), lambda x, h: x[:, :, :, h]),
    "x.select(2, h)": ((4, 2, 3, 8), lambda x, h: x.select(2, h)),
    "x.select(dim=-1, index=h)": ((4, 2, 8, 3), lambda x, h: x.select(dim=-1, index=h)),
    "x[:, :, h:h+1].squeeze(2)": ((4, 2, 3, 8), lambda x, h: x[:, :, h:h + 1].squeeze(2)),
    "x.narrow(1, 2 * h, 2)": ((4, 6, 8), lambda x, h: x.narrow(1, 2 * h, 2)),
    "x[:, 2*h:2*h+2, :]": ((4, 6, 8), lambda x, h: x[:, 2 * h:2 * h + 2, :]),
    "x.unbind(2)[h]": ((4, 2, 3, 8), lambda x, h: x.unbind(2)[h]),
    "x.chunk(3, 1)[h]": ((4, 6, 8), lambda x, h: x.chunk(3, 1)[h]),
    "x.split(2, dim=1)[h]": ((4, 6, 8), lambda x, h: x.split(2, dim=1)[h]),
    "x[:, h].transpose(1, 2)": ((4, 3, 8, 2), lambda x, h: x[:, h].transpose(1, 2)),
    "x[:, :, h].permute(0, 2, 1)": ((4, 8, 3, 2), lambda x, h: x[:, :, h].permute(0, 2, 1)),
    "x.transpose(1, 2)[:, h]": ((4, 2, 3, 8), lambda x, h: x.transpose(1, 2)[:, h]),
}


def write_rows(outputs):
    first = outputs[0]
    out = torch.zeros(first.shape[0], first.shape[1], len(outputs), first.shape[2], dtype=first.dtype)
    for h, y in enumerate(outputs):
        out[:, :, h, :] = y
    return out


def growing(outputs):
    out = outputs[0].unsqueeze(1)
    for y in outputs[1:]:
        out = torch.cat([out, y.unsqueeze(1)], dim=1)
    return out


JOINS = {
    "cat of unsqueeze(1)": lambda outputs: torch.cat([y.unsqueeze(1) for y in outputs], dim=1),
    "cat of unsqueeze(2)": lambda outputs: torch.cat([y.unsqueeze(2) for y in outputs], dim=2),
    "cat of y[..., None]": lambda outputs: torch.cat([y[..., None] for y in outputs], dim=-1),
    "cat(dim=1)": lambda outputs: torch.cat(outputs, dim=1),
    "cat(dim=2)": lambda outputs: torch.cat(outputs, dim=2),
    "cat(dim=0)": lambda outputs: torch.cat(outputs),
    "stack(dim=0)": lambda outputs: torch.stack(outputs),
    "stack(dim=1)": lambda outputs: torch.stack(outputs, dim=1),
    "stack(dim=2)": lambda outputs: torch.stack(outputs, dim=2),
    "stack(dim=-1)": lambda outputs: torch.stack(outputs, dim=-1),
    "out[:, :, h, :] = y": write_rows,
    "growing cat": growing,
    "sum": lambda outputs: sum(outputs),
    "list": lambda outputs: outputs,
}


class AnyAxis(nn.Module):
    def __init__(self, cut, join, lanes=3):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv1d(2, 4, 3, padding=1) for _ in range(lanes))
        self.cut, self.join = cut, join

    def forward(self, x):
        return self.join([layer(self.cut(x, h)) for h, layer in enumerate(self.layers)])


@pytest.mark.parametrize("cut", SLICES)
@pytest.mark.parametrize("join", ["cat of unsqueeze(2)", "stack(dim=1)", "cat(dim=1)"])
def test_every_slice_axis(cut, join):
    shape, function = SLICES[cut]
    assert_fused_equals(randomized(AnyAxis(function, JOINS[join])), randn(*shape), heavy=1, **QUICK)


@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("cut", ["x[:, :, h, :]", "x[:, h]"])
def test_every_join_axis(cut, join):
    shape, function = SLICES[cut]
    assert_fused_equals(randomized(AnyAxis(function, JOINS[join])), randn(*shape), heavy=1, **QUICK)


def test_rows_in_front():
    """x [H, B, C, W], x[h]: the batch is the second dim."""
    model = randomized(AnyAxis(lambda x, h: x[h], JOINS["stack(dim=0)"]))
    assert_fused_equals(model, randn(3, 4, 2, 8), make=lambda rows: randn(3, rows, 2, 8, seed=rows), heavy=1)


def test_without_a_batch():
    """X [C, H, W]: each row is an unbatched [C, W]."""
    model = randomized(AnyAxis(lambda x, h: x[:, h], JOINS["stack(dim=1)"]))
    assert_fused_equals(model, randn(2, 3, 8), batches=(2,), heavy=1)


# More than one convolution.


class RowNetworks(nn.Module):
    """Conv, activation, pool, conv in every row."""

    def __init__(self, C=2, H=4):
        super().__init__()
        self.rows = nn.ModuleList(
            nn.Sequential(nn.Conv1d(C, 5, 3, padding=1), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(5, 3, 3), nn.Tanh()) for _ in range(H))

    def forward(self, x):
        return torch.stack([row(x[:, :, h]) for h, row in enumerate(self.rows)], dim=2)


def test_row_networks():
    assert_fused_equals(randomized(RowNetworks()), randn(4, 2, 4, 12), heavy=2)


class Inception(nn.Module):
    """Every convolution reads the same input: output channels are concatenated, also where a convolution has groups of its own."""

    def __init__(self, n=3, groups=1):
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(4, 6, 3, padding=1, groups=groups) for _ in range(n))

    def forward(self, x):
        return torch.cat([branch(x) for branch in self.branches], dim=1)


@pytest.mark.parametrize("groups", [1, 2])
def test_one_input_for_all(groups):
    assert_fused_equals(randomized(Inception(groups=groups)), randn(3, 4, 5, 6), heavy=1)


class TwoStrides(nn.Module):
    """Rows of two kinds: each kind is one launch."""

    def __init__(self, H=5):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv1d(2, 3, 3, padding=1 + h % 2, dilation=1 + h % 2) for h in range(H))

    def forward(self, x):
        return torch.cat([layer(x[:, :, h]).unsqueeze(2) for h, layer in enumerate(self.layers)], dim=2)


def test_two_kinds_of_rows():
    assert_fused_equals(randomized(TwoStrides()), randn(4, 2, 5, 8), heavy=2)
