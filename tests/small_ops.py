"""A loop over one small op: own weights before and after it, so that no two lanes are alike.

``assert_ops_fuse(ops, shape, layout)`` builds a model whose lanes call every op of a table, each op on its own, fuses it, and asserts that
the numbers are the original's and that the launches do not grow with the lanes. Layouts: ``own`` (each lane its input and a Linear: lanes
in front), ``shared`` (one input for all, a wide Linear: lanes last), ``slices`` (the op on a slice: lanes in the middle).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import checks
import fxfuse
from fxfuse import launches

LAYOUTS = ("own", "shared", "slices")
Ops = dict[str, Callable[[Tensor], Any]]


class Lane(nn.Module):
    """The ops of a table on one activation, each result scaled by a weight of its own."""

    def __init__(self, ops: Ops, width: int, layout: str) -> None:
        super().__init__()
        self.before = nn.Linear(width, width) if layout != "slices" else nn.Identity()
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(1)) for _ in ops)
        self.ops = ops

    def forward(self, x: Tensor) -> list[Tensor]:
        h = torch.tanh(self.before(x))
        results = []
        for op, scale in zip(self.ops.values(), self.scales, strict=True):
            result = op(h)
            for part in result if isinstance(result, (tuple, list)) else [result]:
                results.append((part if part.is_floating_point() else part.to(h.dtype)) * scale)
        return results


class Lanes(nn.Module):
    """A loop over lanes; every op's results are stacked."""

    def __init__(self, ops: Ops, width: int, lanes: int, layout: str) -> None:
        super().__init__()
        self.lanes = nn.ModuleList(Lane(ops, width, layout) for _ in range(lanes))
        self.shared = layout == "shared"

    def forward(self, x: Tensor) -> list[Tensor]:
        results = [lane(x if self.shared else x[:, i]) for i, lane in enumerate(self.lanes)]
        return [torch.stack(columns, 1) for columns in zip(*results, strict=True)]


def fused_lanes(ops: Ops, shape: tuple[int, ...], lanes: int, layout: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """The model, its fused form and the example input."""
    model = checks.randomized(Lanes(ops, shape[-1], lanes, layout))
    x = checks.randn(5, *(() if layout == "shared" else (lanes,)), *shape)
    fused = fxfuse.optimize(model, x, objective="launches", strict=True, **checks.QUICK)
    return model, fused, x


def assert_ops_fuse(ops: Ops, shape: tuple[int, ...], layout: str, random_in_train: bool = False) -> None:
    """Right, without a refusal, and with as many launches for six lanes as for four."""
    model, fused, x = fused_lanes(ops, shape, 4, layout)
    report = fxfuse.report(fused)
    assert not report.refused, str(report)
    trials = [(checks.fresh(x, 3, 3), {}), (checks.fresh(x, 1, 9), {})]
    checks.assert_equal_models(model, fused, trials, random_in_train=random_in_train)
    assert not fxfuse.report(fused).fallbacks, fxfuse.report(fused).fallbacks
    _, wider, y = fused_lanes(ops, shape, 6, layout)
    counts = [launches.count(lambda m=m, v=v: m(v), bound=False) for m, v in ((fused, x), (wider, y))]
    assert counts[0].total == counts[1].total, f"launches grow with the lanes: {grown(counts[0], counts[1])}"


def grown(four: launches.Launches, six: launches.Launches) -> dict[str, tuple[int, int]]:
    """The ops that are launched more often where there are more lanes."""
    names = sorted({*four.total_by_op, *six.total_by_op})
    pairs = {name: (four.total_by_op.get(name, 0), six.total_by_op.get(name, 0)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
