"""Several places of every lane's own tensor: views where each is read for itself, one pack where one op reads them all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checks
import fxfuse

Read = Callable[[Tensor], Tensor]


class Lanes(nn.Module):
    """``heads[i](read(nets[i](x[i])))``."""

    def __init__(self, read: Read, width: int, lanes: int = 3) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Linear(4, 8) for _ in range(lanes))
        self.heads = nn.ModuleList(nn.Linear(width, 2) for _ in range(lanes))
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        pairs = enumerate(zip(self.nets, self.heads, strict=True))
        return torch.stack([head(self.read(net(x[:, i]))) for i, (net, head) in pairs], 1)


def ends(y: Tensor) -> Tensor:
    return y[:, -1] + y[:, 0]


def halves(y: Tensor) -> Tensor:
    value, gate = y.chunk(2, -1)
    return value * torch.sigmoid(gate)


def corners(y: Tensor) -> Tensor:
    return torch.cat([y[:, -1, :4], y[:, 0, 4:]], -1)


def three(y: Tensor) -> Tensor:
    first, second, third, _ = y.chunk(4, -1)
    return torch.where(first > 0, second, third)


def gates(y: Tensor) -> Tensor:
    i, f, g, o = y.chunk(4, -1)
    return torch.sigmoid(o) * torch.tanh(torch.sigmoid(f) + torch.sigmoid(i) * torch.tanh(g))


def differences(y: Tensor) -> Tensor:
    return y[:, 1:] - y[:, :-1]


def last_two(y: Tensor) -> Tensor:
    return torch.cat([y[:, -2], y[:, -1]], -1)


def calls(fused: nn.Module) -> list[str]:
    """What the fused graph calls."""
    program = next(iter(fxfuse.report(fused).fused[0].programs.values()))
    return [getattr(node.target, "__name__", str(node.target)) for node in program.graph.nodes if node.op.startswith("call")]


APART = [(ends, 8), (halves, 4), (corners, 8), (three, 2), (differences, 8), (last_two, 16)]


@pytest.mark.parametrize(("read", "width"), APART)
def test_places_read_apart_are_views(read: Read, width: int) -> None:
    model = checks.randomized(Lanes(read, width))
    fused = checks.assert_fused_equals(model, checks.randn(5, 3, 6, 4), **checks.QUICK)
    made = calls(fused)
    assert not {"unbind", "index_select", "stack"} & set(made), made
    assert "movedim" not in made[:-2], made


def test_one_call_for_the_gates_of_a_cell() -> None:
    """Three of four places go through one sigmoid: one call of it for all lanes and places."""
    model = checks.randomized(Lanes(gates, 2))
    fused = checks.assert_fused_equals(model, checks.randn(5, 3, 6, 4), **checks.QUICK)
    assert calls(fused).count("sigmoid") + calls(fused).count("sigmoid_") == 1


def test_one_call_for_one_op_on_all_places() -> None:
    """Each lane's network is called on two places: one product of twice the lanes."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nets = nn.ModuleList(nn.Linear(4, 8) for _ in range(3))
            self.heads = nn.ModuleList(nn.Linear(8, 2) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            out = []
            for i, (net, head) in enumerate(zip(self.nets, self.heads, strict=True)):
                y = net(x[:, i])
                out.append(head(y[:, -1]) + head(y[:, 0]))
            return torch.stack(out, 1)

    model = checks.randomized(Twice())
    checks.assert_fused_equals(model, checks.randn(5, 3, 6, 4), heavy=2, **checks.QUICK)


@pytest.mark.parametrize("places", [(-1, 0), (0, -1), (-1, -2), (-3, -1), (1, -1, 0)])
def test_columns_counted_from_the_end(places: tuple[int, ...]) -> None:
    """Columns of one input, some counted from its end, in any order."""

    class Columns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nets = nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)) for _ in places)

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([net(x.select(1, place)) for net, place in zip(self.nets, places, strict=True)], 1)

    model = checks.randomized(Columns())
    fused = checks.assert_fused_equals(model, checks.randn(5, 6, 4), heavy=2, **checks.QUICK)
    assert not fxfuse.report(fused).refused


def test_rows_counted_from_the_end_of_a_free_size() -> None:
    """The first and the last row of a batch, whatever its size."""

    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nets = nn.ModuleList(nn.Linear(4, 8) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([F.elu(net(x[-1])) * net(x[0]) for net in self.nets])

    model = checks.randomized(Rows())
    fused = fxfuse.optimize(model, checks.randn(5, 4), objective="launches", **checks.QUICK)
    for rows in (5, 2, 7):
        x = checks.randn(rows, 4)
        checks.assert_close(fused(x), model(x), "rows")
    assert fxfuse.report(fused).fused
    assert not fxfuse.report(fused).fallbacks
