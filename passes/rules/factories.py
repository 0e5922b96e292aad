"""Tensors made from numbers (``torch.zeros(x.shape[0], 5)``): the same in every lane, so one for all of them.

They count as launching nothing: a free size, which each lane may read elsewhere, is not to be given up for the sake of one fill.
"""

from __future__ import annotations

from ..bundle import Bundle
from ..emit import Emitter
from ..writer import CannotVectorize, Packed
from .base import rule, tensors, unpacked


@rule("zeros", "ones", "full", "arange", "eye", "new_zeros", "new_ones", "new_full", view=True)
def _factory(emitter: Emitter, bundle: Bundle) -> Packed:
    assert bundle.op is not None
    args = tensors(emitter, bundle)
    if any(isinstance(value, Packed) for name, value in args.items() if name != "input"):
        raise CannotVectorize(f"{bundle.name} takes its numbers from a tensor")
    node, first = emitter.spell(bundle.op, unpacked(args)), bundle.members[0].meta
    node.meta["val"] = emitter.stand_in(first["shape"], first["stride"], first["dtype"])  # called, it would be on the device it names
    return Packed(emitter._placed(node), None)
