"""Strips of a buffer in turn, ``out[:, i::n] = nets[i](...)``: one interleaved join, along any dim, and no write stays."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from checks import assert_equal_models, model_of, randn, randomized


@pytest.mark.parametrize("dim", [1, 2, -1])
@pytest.mark.parametrize("lanes", [2, 3])
def test_strips_in_turn_are_interleaved(dim: int, lanes: int) -> None:
    """Each lane's strip is wider than one and no strip is as wide as there are lanes: a strip beside the other is no interleaving."""
    wide = 4

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        shape = [x.shape[0], 5, 5, 5]
        shape[dim] = wide * lanes
        out = x.new_empty(shape)
        for i, net in enumerate(self.nets):
            strip = [slice(None)] * 4
            strip[dim] = slice(i, None, lanes)
            out[tuple(strip)] = net(x[:, i])
        return out

    class Net(nn.Module):
        """A value of the strip's shape, whatever the dim."""

        def __init__(self) -> None:
            super().__init__()
            shape = [5, 5, 5]
            shape[dim - 1 if dim > 0 else dim] = wide
            self.shape = tuple(shape)
            self.linear = nn.Linear(6, wide * 25)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.linear(x)).view(-1, *self.shape)

    model = randomized(model_of(forward, nets=nn.ModuleList(Net() for _ in range(lanes))))
    x = randn(3, lanes, 6)
    fused = fxfuse.optimize(model, x, objective="launches")
    assert fxfuse.report(fused).fused, str(fxfuse.report(fused))
    (program,) = fxfuse.graph(fused).values()
    assert not [node for node in program.graph.nodes if getattr(node.target, "__name__", "") in ("setitem", "index_write", "copy_")]
    assert_equal_models(model, fused, [((x,), {}), ((randn(2, lanes, 6),), {})])
