"""Pooling, resizing, padding, patches, transforms along dims: lanes in the batch; with a batch of their own and without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_ops import LAYOUTS, Ops, assert_ops_fuse
from torch import Tensor, nn

import checks
import fxfuse


def _of_dim(d: int) -> Ops:
    """What exists for one, two and three spatial dims."""
    make: Callable[[str], Any] = lambda name: getattr(nn, f"{name}{d}d")  # noqa: E731
    call: Callable[[str], Any] = lambda name: getattr(F, f"{name}{d}d")  # noqa: E731
    linear = {1: "linear", 2: "bilinear", 3: "trilinear"}[d]
    return {
        "max": make("MaxPool")(2),
        "max overlapping": make("MaxPool")(3, 1, 1, ceil_mode=True),
        "max dilated": make("MaxPool")(2, dilation=2),
        "max F": lambda x: call("max_pool")(x, kernel_size=2, stride=1),
        "max pair": lambda x: call("max_pool")(x, 2, return_indices=True),
        "unpool": lambda x: call("max_unpool")(*call("max_pool")(x, 2, return_indices=True), 2),
        "avg": make("AvgPool")(2),
        "avg padded": make("AvgPool")(3, 2, 1, count_include_pad=False),
        "avg F": lambda x: call("avg_pool")(x, 2, ceil_mode=True),
        "adaptive avg": make("AdaptiveAvgPool")(3),
        "adaptive max": make("AdaptiveMaxPool")(2),
        "global": lambda x: call("adaptive_avg_pool")(x, 1).flatten(1),
        "adaptive pair": lambda x: call("adaptive_max_pool")(x, 2, return_indices=True),
        "lp": make("LPPool")(2, 2),
        "reflect": make("ReflectionPad")(1),
        "replicate": make("ReplicationPad")(1),
        "zero": make("ZeroPad")(1),
        "constant": make("ConstantPad")(2, 2.5),
        "circular": make("CircularPad")(1),
        "F.pad": lambda x: F.pad(x, (1, 0)),
        "nearest": nn.Upsample(scale_factor=2),
        "size": nn.Upsample(size=(7,) * d),
        linear: nn.Upsample(scale_factor=1.5, mode=linear, align_corners=True),
        "to its own size": lambda x: F.interpolate(call("avg_pool")(x, 2), size=x.shape[2:], mode=linear),
        "area": lambda x: F.interpolate(x, size=3, mode="area"),
        "exact": lambda x: F.interpolate(x, scale_factor=0.5, mode="nearest-exact"),
        "shuffled": lambda x: F.channel_shuffle(x, 2),
    }


PLANES: Ops = {
    "bicubic": nn.Upsample(scale_factor=1.5, mode="bicubic"),
    "antialias": lambda x: F.interpolate(x, size=(3, 5), mode="bilinear", antialias=True),
    "UpsamplingBilinear2d": nn.UpsamplingBilinear2d(scale_factor=2),
    "UpsamplingNearest2d": nn.UpsamplingNearest2d(size=(5, 9)),
    "PixelShuffle": nn.PixelShuffle(2),
    "PixelUnshuffle": nn.PixelUnshuffle(2),
    "ChannelShuffle": nn.ChannelShuffle(2),
    "Unfold": nn.Unfold(3, padding=1),
    "unfold": lambda x: F.unfold(x, (2, 3), stride=2),
    "Fold": lambda x: F.fold(F.unfold(x, 3), (6, 6), 3),
    "Softmax2d": nn.Softmax2d(),
    "grid_sample": lambda x: F.grid_sample(x, x[:, :2].permute(0, 2, 3, 1), align_corners=False),
    "pad both": lambda x: F.pad(x, (1, 2, 0, 1), mode="reflect"),
    "crop": lambda x: F.pad(x, (-1, -1, -1, 0)),
    "pad channels": lambda x: F.pad(x, (0, 0, 0, 0, 1, 1), value=0.5),
    "blur": lambda x: F.avg_pool2d(x, (1, 3), 1, (0, 1)),
    "squeeze excite": lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(),
    "max over space": lambda x: x.amax((2, 3)),
    "flattened": lambda x: F.max_pool2d(x, 2).flatten(1),
    "multiscale": lambda x: torch.cat([F.adaptive_max_pool2d(x, k).flatten(1) for k in (1, 2, 3)], 1),
}
TRANSFORMS: Ops = {
    "rfft": lambda x: torch.fft.rfft(x).abs(),
    "rfft 1": lambda x: torch.fft.rfft(x, dim=1).real,
    "ortho": lambda x: torch.fft.rfft(x, n=4, dim=-1, norm="ortho").imag,
    "irfft": lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=-1) * 2, n=6, dim=-1),
    "longer": lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=1), dim=1, n=8),
    "fft": lambda x: torch.fft.fft(x).real,
    "ifft": lambda x: torch.fft.ifft(x, dim=1).real,
    "fft2": lambda x: torch.fft.fft2(x).abs(),
    "rfftn all": lambda x: torch.fft.rfftn(x.sum(0)).abs(),
    "ifft2": lambda x: torch.fft.ifft2(torch.fft.fft2(x)).real,
    "irfft2": lambda x: torch.fft.irfft2(torch.fft.rfft2(x)),
    "rfftn": lambda x: torch.fft.rfftn(x, dim=(1, 2)).abs(),
    "fftn": lambda x: torch.fft.fftn(x, dim=(-2, -1)).real,
    "sizes": lambda x: torch.fft.fftn(x, s=(3, 4)).imag,
    "shift": lambda x: torch.fft.fftshift(x, dim=-1),
    "shift two": lambda x: torch.fft.fftshift(x, dim=(1, 2)),
    "unshift": lambda x: torch.fft.ifftshift(x, dim=1),
    "hfft": lambda x: torch.fft.hfft(x, n=6),
    "as real": lambda x: torch.view_as_real(torch.fft.rfft(x)),
    "as complex": lambda x: torch.view_as_complex(x.reshape(-1, 4, 3, 2)).abs(),
    "complex": lambda x: torch.complex(x, x * 2).abs(),
    "polar": lambda x: torch.polar(x.abs(), x).imag,
    "conj": lambda x: (torch.fft.rfft(x) * torch.fft.rfft(x).conj()).real,
    "real": lambda x: torch.real(torch.fft.fft(x)),
    "imag": lambda x: torch.imag(torch.fft.fft(x)),
    "autocorrelation": lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=1) * torch.fft.rfft(x, dim=1).conj(), dim=1),
    "low pass": lambda x: torch.fft.irfft(F.pad(torch.fft.rfft(x, dim=2)[:, :, :3], (0, 4)), dim=2),
    "mixed": lambda x: torch.fft.fft(torch.fft.fft(x, dim=-1), dim=-2).real,
    "product": lambda x: torch.einsum("bij,bkj->bik", torch.fft.rfft(x), torch.fft.rfft(x)).real,
    "mask": lambda x: (torch.fft.rfft(x) * (torch.fft.rfft(x).abs() > 1)).abs(),
    "rotary": lambda x: torch.view_as_real(
        torch.view_as_complex(x.reshape(-1, 4, 3, 2)) * torch.polar(torch.ones(3, dtype=x.dtype), torch.arange(3.0, dtype=x.dtype))
    ).flatten(2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_pooling_padding_resizing(spatial: int, layout: str) -> None:
    assert_ops_fuse(_of_dim(spatial), (4, *((6,) if spatial == 1 else (6, 6) if spatial == 2 else (4, 4, 4))), layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_planes(layout: str) -> None:
    assert_ops_fuse(PLANES, (4, 6, 6), layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_transforms(layout: str) -> None:
    assert_ops_fuse(TRANSFORMS, (4, 6), layout)


class Unbatched(nn.Module):
    """Lanes that take images without a batch dim, ``[C, H, W]``, each through convolutions of its own."""

    def __init__(self, op: Callable[[Tensor], Tensor], lanes: int = 4) -> None:
        super().__init__()
        self.first = nn.ModuleList(nn.Conv2d(3, 4, 1) for _ in range(lanes))
        self.op = op

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.op(torch.tanh(conv(image))) for conv, image in zip(self.first, x, strict=True)])


UNBATCHED: Ops = {
    "max": nn.MaxPool2d(2),
    "avg": nn.AvgPool2d(2),
    "adaptive": nn.AdaptiveAvgPool2d(1),
    "lp": nn.LPPool2d(2, 2),
    "reflect": nn.ReflectionPad2d(1),
    "unpool": lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2),
    "shuffle": nn.PixelShuffle(2),
    "unfold": nn.Unfold(2),
    "fold": lambda x: F.fold(F.unfold(x, 3), (6, 6), 3),
    "circular": nn.CircularPad2d(1),
    "softmax": nn.Softmax(dim=0),
}


@pytest.mark.parametrize("name", UNBATCHED)
def test_unbatched(name: str) -> None:
    model = checks.randomized(Unbatched(UNBATCHED[name]))
    checks.assert_fused_equals(model, checks.randn(4, 3, 6, 6), batches=(), most_heavy=1, **checks.QUICK)


class ConvNets(nn.Module):
    """A small image network per lane: convolution, pooling, dropout of channels, a pooled vector, a head."""

    def __init__(self, lanes: int = 3) -> None:
        super().__init__()
        self.nets = nn.ModuleList(
            nn.Sequential(
                nn.ReflectionPad2d(1),
                nn.Conv2d(2, 4, 3),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Dropout2d(0.2),
                nn.Upsample(scale_factor=2, mode="bilinear"),
                nn.Conv2d(4, 8, 3, padding=1),
                nn.AvgPool2d(2),
                nn.PixelShuffle(2),
                nn.AdaptiveAvgPool2d((2, 2)),
                nn.Flatten(),
                nn.Linear(8, 3),
            )
            for _ in range(lanes)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([net(x) for net in self.nets]).mean(0)


def test_image_networks_of_one_input() -> None:
    checks.assert_fused_equals(checks.randomized(ConvNets()), checks.randn(5, 2, 8, 8), most_heavy=3, random_in_train=True)


class FrequencyLinear(nn.Module):
    """FITS (individual): a complex Linear per channel on the low frequencies, written back into a longer spectrum."""

    def __init__(self, channels: int = 5, length: int = 12, kept: int = 4, longer: int = 18) -> None:
        super().__init__()
        self.kept, self.longer = kept, longer
        self.upsamplers = nn.ModuleList(nn.Linear(kept, kept + 2).to(torch.complex128) for _ in range(channels))

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x, dim=1)[:, : self.kept]
        wide = torch.zeros([x.size(0), self.kept + 2, x.size(2)], dtype=spectrum.dtype)
        for i, linear in enumerate(self.upsamplers):
            wide[:, :, i] = linear(spectrum[:, :, i])
        return torch.fft.irfft(F.pad(wide, (0, 0, 0, self.longer // 2 + 1 - wide.shape[1])), n=self.longer, dim=1)


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_complex_linear_per_channel() -> None:
    torch.manual_seed(0)
    model = FrequencyLinear()
    checks.assert_fused_equals(model, checks.randn(5, 12, 5), most_heavy=2, **checks.QUICK)


def test_fractional_pooling_is_refused() -> None:
    nets = nn.ModuleList(nn.Sequential(nn.Conv2d(2, 2, 1), nn.FractionalMaxPool2d(2, output_size=2), nn.Conv2d(2, 1, 1)) for _ in range(3))

    class Fractional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nets = nets

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([net(x) for net in self.nets], 1)

    fused = fxfuse.optimize(checks.randomized(Fractional()), checks.randn(2, 2, 4, 4), objective="launches", **checks.QUICK)
    reasons = [refusal.reason for refusal in fxfuse.report(fused).refused]
    assert "fractional_max_pool2d draws its own windows for every sample of the batch" in "\n".join(reasons).replace("_with_indices", "")
