"""Tensors made from numbers (``torch.zeros(x.shape[0], 5)``): the same in every lane, so one for all of them."""

from __future__ import annotations

from ..bundle import Bundle
from ..emit import Emitter, Packed
from .base import rule
from .shape import numbers


@rule("zeros", "ones", "full", "arange", "eye", lowering="one for all lanes")
def _factory(emitter: Emitter, bundle: Bundle) -> Packed:
    op = bundle.op
    assert op is not None
    return Packed(emitter.respell(op, tuple(numbers(emitter.operand(bundle, name)) for name in op.names)), None)
