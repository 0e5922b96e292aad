"""Tensors made from numbers (``torch.zeros(x.shape[0], 5)``): the same in every lane, so one for all of them.

They count as launching nothing: a free size, which each lane may read elsewhere, is not to be given up for the sake of one fill.
"""

from __future__ import annotations

from ..bundle import Bundle
from ..emit import Emitter, Packed
from .base import rule
from .shape import numbers


@rule("zeros", "ones", "full", "arange", "eye", view=True)
def _factory(emitter: Emitter, bundle: Bundle) -> Packed:
    op = bundle.op
    assert op is not None
    node, first = emitter.spell(op, tuple(numbers(emitter.operand(bundle, name)) for name in op.names)), bundle.members[0].meta
    node.meta["val"] = emitter.stand_in(first["shape"], first["stride"], first["dtype"])  # called, it would be on the device it names
    return Packed(emitter._placed(node), None)
