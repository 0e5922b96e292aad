"""Models of several kinds, fused, with an example call: for the tests of ``fxfuse.convert``."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

import fxfuse
from small_loops import KINDS


@functools.cache
def fused(kind: str, mode: str = "eval") -> tuple[nn.Module, nn.Module, Any]:
    """The original, the fused model, and what makes inputs of (seed, batch). Shared: neither may be changed."""
    model, inputs = KINDS[kind]()
    model.train(mode == "train")
    made = fxfuse.optimize(model, inputs(1, 5), objective="launches", tune=False, validate=False)
    assert fxfuse.report(made).fused, fxfuse.report(made)
    return model, made, inputs
