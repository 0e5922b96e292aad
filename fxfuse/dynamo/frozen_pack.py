"""Packs for ``freeze=True``: made once of the weights as they are at the first call.

Comes in: a recipe, and at every call the Parameters. Goes out: the packed tensor of the first call with them. No reference to a member is
held, not even a weak one: ``torch.utils.swap_tensors`` takes none.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import ref

import torch
from torch import Tensor

from fxfuse.graph import Recipe
from fxfuse.weights.recipes import pack
from fxfuse.weights.shared import Bound


class FrozenPack:
    """A pack that is made once of each model's weights, for inference with weights that do not change any more."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.made: dict[tuple[int, ...], _Frozen] = {}  # by where the members begin

    def packed(self, members: Sequence[Tensor]) -> Tensor:
        """The packed tensor of the values at the first call."""
        addresses = tuple(map(Tensor.data_ptr, members))
        known = self.made.get(addresses)
        if known is None or not known.valid:
            with torch.inference_mode(False), torch.no_grad():
                made = pack(self.recipe, [member.detach() for member in members])
            self.made = {at: each for at, each in list(self.made.items()) if each.valid}
            known = self.made[addresses] = _Frozen(made, members)
        return known.packed

    def bound(self, members: Sequence[Tensor]) -> Bound | None:
        """None: writes to the members are not looked at."""
        return None

    def write_back(self, members: Sequence[Tensor], packed: Tensor) -> None:
        """Only Parameters are frozen, which no graph writes."""


class _Frozen:
    """A pack, and whether the memory that it was made of is still there: another model's may begin at the same addresses later."""

    def __init__(self, packed: Tensor, members: Sequence[Tensor]) -> None:
        self.packed, self.valid = packed, True
        mine = ref(self)

        def gone(_: object) -> None:
            if (frozen := mine()) is not None:
                frozen.valid = False

        # Of the memory, not of the members: see above. It stays the same object for as long as any tensor lies in it.
        self.storages = [ref(storage, gone) for storage in {id(s): s for s in map(Tensor.untyped_storage, members)}.values()]
