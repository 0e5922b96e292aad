"""Sizes and types inside lanes: in lists (as einops and hand-written code pass them), as indices, as factors; at unseen batch sizes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxfuse
from checks import assert_fused_equals

Step = Callable[[torch.Tensor], torch.Tensor]

OPS: dict[str, Step] = {
    "reshape": lambda y: y.reshape([y.shape[0], 2, -1]),
    "view": lambda y: y.view([y.shape[0], 2, 2]),
    "torch.reshape": lambda y: torch.reshape(y, [y.shape[0] * 2, 2]),
    "expand": lambda y: y.unsqueeze(1).expand([y.shape[0], 3, 4]),
    "repeat": lambda y: y.repeat([2, y.shape[1]]),
    "tile": lambda y: torch.tile(y, [1, y.shape[1]]),
    "broadcast_to": lambda y: torch.broadcast_to(y, [2, y.shape[0], 4]),
    "unflatten": lambda y: y.unflatten(1, [2, y.shape[1] // 2]),
    "new_zeros": lambda y: y + y.new_zeros([y.shape[0], 4]),
    "zeros": lambda y: y + torch.zeros([y.shape[0], 4], dtype=y.dtype),
    "layer_norm": lambda y: F.layer_norm(y, [y.shape[1]]),
    "split": lambda y: torch.cat(torch.split(y, [y.shape[1] - 1, 1], 1)[::-1], 1),
    "interpolate": lambda y: F.interpolate(y.unsqueeze(1), size=[y.shape[1] * 2]),
    "the last row": lambda y: y[y.shape[0] - 1],
    "the last entry": lambda y: y[y.shape[0] - 1, y.shape[1] - 2],
    "the last row, a column": lambda y: y[y.size(0) - 1, :3],
    "a row, with the rest": lambda y: y[..., y.shape[0] - y.shape[0], :],
    "a row, a new dim": lambda y: y[None, y.shape[0] - 1],
    "a type by name": lambda y: y.softmax(-1, dtype=torch.float32).type(torch.float64),
    "a type as text": lambda y: y.type("torch.DoubleTensor").exp(),
    "a type of old": lambda y: y.softmax(-1).type(torch.FloatTensor).type(torch.DoubleTensor),
    "the type of another": lambda y: y.float().type(y.dtype) + y.type(y.type()),
    "a factor": lambda y: y * y.shape[0] / y.size(1),
}


class Lanes(nn.Module):
    def __init__(self, step: Step) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Linear(2, 4, dtype=torch.float64) for _ in range(4))
        self.step = step

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.step(net(x[:, i : i + 2])) for i, net in enumerate(self.nets)])


@pytest.mark.parametrize("name", OPS)
def test_sizes(name: str) -> None:
    assert_fused_equals(Lanes(OPS[name]), torch.randn(5, 6, dtype=torch.float64), heavy=2 if name == "layer_norm" else 1)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Linear(2, 4, dtype=torch.float64) for _ in range(4))

    def forward(self, x: torch.Tensor, rows: int, parts: int) -> torch.Tensor:
        return torch.stack([net(x[:, i : i + 2]) * (i + 1) / rows for i, net in enumerate(self.nets)]).chunk(parts, 2)[0]


class PassesSizes(nn.Module):
    """Hands a size to its block as a number, as the aggregations of torch_geometric get ``dim_size``."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Scaled()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x.sin(), x.shape[0], x.shape[1] // 3).cos()


def test_a_size_that_the_caller_passes_on_is_guarded() -> None:
    model, x = PassesSizes(), torch.randn(5, 6, dtype=torch.float64)
    fused = assert_fused_equals(model, x, heavy=1, specialised=True)
    assert [plan.path for plan in fxfuse.report(fused).fused] == ["block"]
    before = sum(fxfuse.report(fused).fallbacks.values())
    for rows, parts, misses in ((5, 2, 0), (7, 2, 1), (5, 1, 2)):  # the numbers are the caller's; those that were recorded run packed
        torch.testing.assert_close(fused.block(x, rows, parts), model.block(x, rows, parts), rtol=1e-12, atol=1e-14)
        assert sum(fxfuse.report(fused).fallbacks.values()) == before + misses
