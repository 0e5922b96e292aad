"""Convolutions as windows and one batched product: the numbers of the grouped convolution, whatever the geometry and the length."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from checks import assert_fused_equals, model_of, randn, randomized

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "1d": (lambda: nn.Conv1d(2, 3, 3), (9,)), "stride": (lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1), (9,)),
    "dilation": (lambda: nn.Conv1d(2, 3, 2, dilation=3, bias=False), (9,)), "all": (lambda: nn.Conv1d(2, 3, 3, 2, 2, 2), (9,)),
    "same": (lambda: nn.Conv1d(2, 3, 4, padding="same"), (9,)),
    "same, dilated": (lambda: nn.Conv1d(2, 3, 2, padding="same", dilation=3), (9,)),
    "valid": (lambda: nn.Conv1d(2, 3, 3, padding="valid"), (9,)), "whole": (lambda: nn.Conv1d(2, 3, 9), (9,)),
    "circular": (lambda: nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"), (9,)),
    "2d": (lambda: nn.Conv2d(2, 3, (3, 2), (2, 1), (1, 0), (1, 2)), (7, 6)),
    "2d, same": (lambda: nn.Conv2d(2, 3, (2, 3), padding="same"), (5, 6)),
    "3d": (lambda: nn.Conv3d(2, 3, (1, 2, 3), (1, 2, 1), (0, 1, 2), (2, 1, 1)), (3, 5, 4)),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("fxfuse.planning.plan"), "_preferred", lambda options: "unfold")


def lowerings(fused: nn.Module) -> set[str]:
    return {op.lowering for plan in fxfuse.report(fused).fused for op in plan.ops if op.op.startswith("conv")}


@pytest.mark.parametrize("layer", LAYERS)
def test_every_geometry(layer):
    make, sizes = LAYERS[layer]

    def forward(self: Any, x: Tensor) -> Tensor:
        return torch.cat([torch.tanh(net(x[:, 2 * i : 2 * i + 2])) for i, net in enumerate(self.nets)], 1)

    model = randomized(model_of(forward, nets=nn.ModuleList(make() for _ in range(4))))
    assert lowerings(assert_fused_equals(model, randn(5, 8, *sizes), tune=False)) == {"unfold"}


def test_two_layers_without_a_batch_and_of_any_length():
    def forward(self: Any, x: Tensor) -> Tensor:
        return torch.stack([second(torch.relu(first(x[i]))) for i, (first, second) in enumerate(zip(self.first, self.second, strict=True))])

    first, second = (nn.ModuleList(nn.Conv1d(*sizes, 3, padding=1) for _ in range(3)) for sizes in ((2, 4), (4, 1)))
    model = randomized(model_of(forward, first=first, second=second))
    x = randn(3, 2, 9)
    fused = assert_fused_equals(model, x, batches=(), tune=False)
    assert lowerings(fused) == {"unfold"}
    for length in (4, 20):
        other = randn(3, 2, length, seed=length)
        torch.testing.assert_close(fused(other), model(other), rtol=1e-10, atol=1e-12)


def test_weights_that_are_computed():
    def forward(self: Any, x: Tensor) -> Tensor:
        kernels = self.maker(x.mean((0, 2))).view(4, 3, 2, 3)
        return torch.cat([torch.conv1d(x[:, 2 * i : 2 * i + 2], kernels[i]) for i in range(4)], 1)

    model = randomized(model_of(forward, maker=nn.Linear(8, 72)))
    assert "unfold" in lowerings(assert_fused_equals(model, randn(5, 8, 9), tune=False))


@pytest.mark.parametrize("make", [
    lambda: nn.Conv1d(2, 4, 3, groups=2), lambda: nn.ConvTranspose1d(2, 3, 3), lambda: nn.Conv1d(2, 3, 1),
], ids=["groups", "transposed", "pointwise"])  # fmt: skip
def test_others_keep_their_form(make):
    def forward(self: Any, x: Tensor) -> Tensor:
        return torch.cat([net(x[:, 2 * i : 2 * i + 2]) for i, net in enumerate(self.nets)], 1)

    model = randomized(model_of(forward, nets=nn.ModuleList(make() for _ in range(4))))
    assert "unfold" not in lowerings(assert_fused_equals(model, randn(5, 8, 9), tune=False))
