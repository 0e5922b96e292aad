"""Models of several kinds, fused, with an example call: for the tests of ``fxfuse.convert``."""

from __future__ import annotations

import functools
from typing import Any

from small_loops import KINDS
from torch import nn

import fxfuse


@functools.cache
def fused(kind: str, single: bool = False) -> tuple[nn.Module, nn.Module, Any]:
    """The original, the fused model, and what makes inputs of (seed, batch); ``single``: in float32. Shared: neither may be changed."""
    model, inputs64 = KINDS[kind]()
    model.eval()

    def inputs(seed: int, batch: int) -> tuple[Any, ...]:
        made = inputs64(seed, batch)
        return tuple(x.float() if single and x.is_floating_point() else x for x in made)

    if single:
        model.float()
    made = fxfuse.optimize(model, inputs(1, 5), objective="launches", tune=False, validate=False)
    assert fxfuse.report(made).fused, fxfuse.report(made)
    return model, made, inputs
