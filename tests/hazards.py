"""What the tests of hazards share: a loop over networks, and the two outcomes that are right, ``handled`` and ``refused``.

fxfuse does not validate its result here (``validate=False``), so that a wrong rewrite shows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import fxfuse
from checks import assert_equal_models, fresh, randn, untouched
from fxfuse.launches import count

X = randn(5, 4)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(1, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 1))


class Nets(nn.Module):
    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleList(mlp() for _ in range(4))

    def forward(self, x):
        return torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1)


def fuse(model: nn.Module, x: Any = X, **options: Any) -> nn.Module:
    with untouched(model):
        return fxfuse.optimize(model, x, **{"objective": "launches", "validate": False, "tune": False, **options})


def drawn(x: Any, rows: Sequence[int]) -> list[tuple[Any, dict[str, Any]]]:
    """Other data, other batch sizes."""
    if isinstance(x, torch.Tensor) and x.is_floating_point():
        return [(randn(n, *x.shape[1:], seed=n), {}) for n in rows]
    return [(fresh(x, n, seed=n), {}) for n in rows]


def handled(model: nn.Module, heavy: int, x: Any = X, *, fallbacks: bool = False, rows: Sequence[int] = (5, 2, 7)) -> nn.Module:
    """Fused to that many heavy launches, and equal to the original on other data and batch sizes."""
    fused = fuse(model, x)
    report = fxfuse.report(fused)
    assert report.fused, report
    assert_equal_models(model, fused, drawn(x, rows))
    assert fallbacks or not report.fallbacks
    args = x if isinstance(x, tuple) else (x,)
    assert count(lambda: fused(*args)).heavy <= heavy
    return fused


def refused(
    model: nn.Module, reason: str, x: Any = X, *, line: bool = True, alone: bool = True, rows: Sequence[int] = (3,)
) -> nn.Module:
    """The report says why, and where, in a test file; the result is the original's. ``alone``: nothing else fused either."""
    fused = fuse(model, x)
    report = fxfuse.report(fused)
    assert not alone or not report.fused
    texts = [str(refusal) for refusal in report.refused]
    assert any(reason in text for text in texts), texts
    assert not line or any(reason in text and re.search(r"\((test_)?hazards\w*\.py:\d+\)$", text) for text in texts), texts
    assert_equal_models(model, fused, drawn(x, rows))
    return fused
