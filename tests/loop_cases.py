"""What the tests of loops as people write them share: one network per lane, and a table of models, each with its number of launches.

Nothing is validated by fxfuse itself here, so that a wrong rewrite shows as wrong numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from checks import assert_fused_equals, randn, randomized

X = randn(5, 4)


class Loops(dict[str, tuple[type[nn.Module], Any, int, dict[str, Any]]]):
    """A table of models, filled by its decorator ``case``; a test file runs each with ``assert_loop``."""

    def case(self, x: Any = X, heavy: int = 3, **options: Any):
        """Register a model with its example, and how many heavy launches its fused forward may make."""
        def register(cls):
            self[cls.__name__] = (cls, x, heavy, options)
            return cls

        return register


def assert_loop(cls: type[nn.Module], x: Any, heavy: int, options: dict[str, Any]) -> None:
    """The model fuses, is the original in everything (``assert_fused_equals``), and launches as little as the table says."""
    torch.manual_seed(0)
    assert_fused_equals(randomized(cls(), seed=5), x, heavy=heavy, batches=(1, 2, 7), validate=False, tune=False, **options)


def mlp(inputs: int = 1, hidden: int = 6, outputs: int = 1, act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), act(), nn.Linear(hidden, hidden), act(), nn.Linear(hidden, outputs))


class Nets(nn.Module):
    def __init__(self, inputs: int = 1, outputs: int = 1):
        super().__init__()
        self.nets = nn.ModuleList(mlp(inputs, outputs=outputs) for _ in range(4))
        self.bias = nn.Parameter(torch.zeros(1))
