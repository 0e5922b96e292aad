"""Ops that look at how a tensor lies in memory, on lanes and joins that lie otherwise once packed: Fourier transforms, pairs as complex
numbers, bits as other numbers. Results have the original's strides, and no form that raises is offered."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from checks import assert_close, assert_same_strides, randn, randomized
from fxfuse.private.pytree import tree_leaves


class Spectra(nn.Module):
    """FITS: a complex Linear for each channel's low frequencies, and back to time."""

    def __init__(self, back: Any, dtype: torch.dtype = torch.complex128) -> None:
        super().__init__()
        self.back = back
        self.nets = nn.ModuleList(nn.Linear(4, 5, dtype=dtype) for _ in range(6))

    def forward(self, x: Tensor) -> Any:
        spectrum = torch.fft.rfft(x, dim=1)
        return self.back([net(spectrum[:, :, i]) for i, net in enumerate(self.nets)], x)


def written(outs: list[Tensor], x: Tensor) -> Tensor:
    whole = torch.zeros(x.shape[0], 5, 6, dtype=outs[0].dtype)
    for i, out in enumerate(outs):
        whole[:, :, i] = out
    return torch.fft.irfft(whole, n=8, dim=1)


BACK = {
    "stacked last": lambda outs, x: torch.fft.irfft(torch.stack(outs, -1), n=8, dim=1),
    "scaled": lambda outs, x: torch.fft.irfft(torch.stack(outs, -1), n=8, dim=1) * 2.0 + x[:, :1].mean(),
    "and the spectrum": lambda outs, x: (lambda o: (torch.fft.irfft(o, n=8, dim=1), o.real, o.abs()))(torch.stack(outs, -1)),
    "written": written,
    "stacked and turned": lambda outs, x: torch.fft.irfft(torch.stack(outs, 1).transpose(1, 2), n=8, dim=1),
    "all dims": lambda outs, x: torch.fft.fftn(torch.stack(outs, -1)).abs(),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("back", BACK)
def test_spectra(back: str, validate: bool) -> None:
    model = randomized(Spectra(BACK[back]))
    fused = fxfuse.optimize(model, randn(3, 6, 6), objective="launches", tune=False, validate=validate)
    assert fxfuse.report(fused).fused, fxfuse.report(fused)
    assert_alike(model, fused, [randn(rows, 6, 6, seed=rows) for rows in (3, 1, 2, 7)])
    assert not fxfuse.report(fused).fallbacks


def assert_alike(model: nn.Module, fused: nn.Module, inputs: list[Tensor]) -> None:
    for x in inputs:
        with torch.no_grad():
            want, got = model(x), fused(x)
        for index, (a, b) in enumerate(zip(tree_leaves(got), tree_leaves(want), strict=True)):
            assert_close(a, b, f"output {index}")
            assert_same_strides(a, b, f"output {index} of {tuple(x.shape)}")


def rotated(q: Tensor) -> Tensor:
    """Rotary embeddings: pairs of features as complex numbers."""
    turned = torch.view_as_complex(q.reshape(*q.shape[:-1], -1, 2)) * torch.polar(torch.ones(3), torch.arange(3.0)).to(torch.complex128)
    return torch.view_as_real(turned).flatten(-2)


class Heads(nn.Module):
    def __init__(self, join: Any) -> None:
        super().__init__()
        self.join = join
        self.nets = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Any:
        return self.join([net(x) for net in self.nets], x)


HEADS = {
    "the first is rotated": lambda qs, x: (qs, rotated(qs[0])),
    "two are": lambda qs, x: (rotated(qs[0]), rotated(qs[1]), qs[2]),
    "all are": lambda qs, x: [rotated(q) for q in qs],
    "scaled": lambda qs, x: (lambda hs: (hs, rotated(hs[0])))([q * x.cos() for q in qs]),
    "in float32": lambda qs, x: (qs, torch.view_as_complex(qs[1].float().reshape(*x.shape[:-1], -1, 2))),
    "of a spectrum": lambda qs, x: (lambda o: torch.view_as_complex(torch.view_as_real(torch.fft.fft(o, dim=1))).real)(torch.stack(qs, -1)),
}  # fmt: skip


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("join", HEADS)
def test_rotary_embeddings(join: str, validate: bool) -> None:
    model = randomized(Heads(HEADS[join]))
    fused = fxfuse.optimize(model, randn(2, 5, 6), objective="launches", validate=validate)  # every form is run
    assert fxfuse.report(fused).fused, fxfuse.report(fused)
    assert_alike(model, fused, [randn(rows, 5, 6, seed=rows) for rows in (2, 1, 7)])


@pytest.mark.parametrize("to", [torch.int32, torch.int64, torch.complex128])
def test_bits_of_lanes(to: torch.dtype) -> None:
    """Of ones and zeros: other bits may differ by rounding."""

    def bits(qs: list[Tensor], x: Tensor) -> Tensor:
        return torch.stack([(q.detach() > 0).double().view(to).real.sum(-1) for q in qs])

    model = randomized(Heads(bits))
    fused = fxfuse.optimize(model, randn(4, 6), objective="launches", validate=False)
    assert fxfuse.report(fused).heavy == (3, 1), fxfuse.report(fused)
    assert_alike(model, fused, [randn(rows, 6, seed=rows) for rows in (4, 1, 7)])


def test_a_form_that_raises_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxfuse.passes.emit._takes_neighbours", lambda node: False)
    model = randomized(Heads(HEADS["the first is rotated"]))
    fused = fxfuse.optimize(model, randn(2, 5, 6), objective="launches")
    (refusal,) = fxfuse.report(fused).refused
    assert str(refusal).startswith("packed, it raises RuntimeError: Tensor must have a last dimension with stride 1 (test_strides_once")
    assert_alike(model, fused, [randn(2, 5, 6)])
