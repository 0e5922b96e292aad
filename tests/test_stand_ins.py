"""Shapes and strides are found on zeros or on meta tensors: the same programs are written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

import fxfuse
from checks import QUICK, assert_equal_models, mlp, randn, randomized
from fxfuse.passes import writer
from fxfuse.passes.writer import SMALL_BESIDE_DYNAMO, _small


class Lanes(nn.Module):
    """Lanes over parts of the input, joined."""

    def __init__(self, make: Callable[[], nn.Module], join: Callable[[list[Any]], Tensor] = torch.stack) -> None:
        super().__init__()
        self.nets = nn.ModuleList(make() for _ in range(4))
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return self.join([net(part) for net, part in zip(self.nets, x.unbind(1))])


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = nn.MultiheadAttention(6, 2, batch_first=True), nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.attention(x, x, x, need_weights=False)[0]).flip(1)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(6, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out, (h, _) = self.rnn(x)
        return torch.cat([out[:, -1], h[0].cumsum(-1)], -1)


class Windows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        found = x.unfold(-1, 3, 1).amax(-1)
        return F.softmax(self.layer(found), -1).topk(3, -1).values


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "mlp": (lambda: Lanes(lambda: mlp(6)), lambda n: randn(n, 4, 6)),
    "sum": (lambda: Lanes(lambda: mlp(6), lambda ys: sum(ys[1:], ys[0])), lambda n: randn(n, 4, 6)),
    "conv": (
        lambda: Lanes(lambda: nn.Sequential(nn.Conv1d(2, 5, 3), nn.BatchNorm1d(5), nn.GELU(), nn.AdaptiveAvgPool1d(2), nn.Flatten())),
        lambda n: randn(n, 4, 2, 9),
    ),
    "embedding": (
        lambda: Lanes(lambda: nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 2))),
        lambda n: torch.arange(n * 12).reshape(n, 4, 3) % 7,
    ),
    "attention": (lambda: Lanes(Attending), lambda n: randn(n, 4, 5, 6)),
    "recurrent": (lambda: Lanes(Recurrent), lambda n: randn(n, 4, 5, 6)),
    "windows": (lambda: Lanes(Windows), lambda n: randn(n, 4, 6)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_meta_tensors_give_the_programs_of_zeros(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    build, inputs = CASES[name]
    model, devices, written = randomized(build()), set(), {}
    stand_in = writer.Writer.stand_in

    def noted(self: Any, *args: Any) -> Tensor:
        made = stand_in(self, *args)
        devices.add(made.device.type)
        return made

    monkeypatch.setattr(writer.Writer, "stand_in", noted)
    for device, limit in (("cpu", 1 << 30), ("meta", 0)):
        monkeypatch.setattr(writer, "SMALL", limit)
        monkeypatch.setattr(writer, "SMALL_BESIDE_DYNAMO", limit)
        devices.clear()
        fused = fxfuse.optimize(model, inputs(6), objective="launches", **QUICK)
        assert devices == {device}
        written[device] = [[(op.op, op.lanes, op.lowering, op.detail) for op in plan.ops] for plan in fxfuse.report(fused).fused]
        assert written[device], fxfuse.report(fused)
        assert_equal_models(model, fused, [(inputs(6), {}), (inputs(3), {})])
    assert written["cpu"] == written["meta"]


@pytest.mark.parametrize("imported", [True, False])
def test_less_is_run_where_dynamo_is_in_use(monkeypatch: pytest.MonkeyPatch, imported: bool) -> None:
    graph = torch.fx.Graph()
    graph.placeholder("x").meta.update(shape=(SMALL_BESIDE_DYNAMO,), dtype=torch.float32)
    monkeypatch.setattr(writer, "dynamo_is_imported", lambda: imported)
    assert _small(graph) is not imported
