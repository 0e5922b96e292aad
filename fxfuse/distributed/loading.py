"""Packed names of a state dict, for packs that are divided among processes.

Comes in: a state dict whose packs are whole tensors or DTensors. Goes out: the same, in place, with DTensors for these packs. (What comes
by the original's names is packed, and divided, by the region.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from fxfuse.models.sharded import is_sharded, shared_as

if TYPE_CHECKING:
    from fxfuse.running.region import RegionState


def fit_sharded(state: RegionState, state_dict: dict[str, Any], prefix: str) -> None:
    """Divide whole packs as those of the region are. What does not fit in shape stays, and is an error of whoever loads it."""
    packs = {slot.recipe.name: slot.packed() for slot in state.slots()}
    for name, target in packs.items():
        value = state_dict.get(prefix + name)
        if isinstance(value, Tensor) and is_sharded(target) and not is_sharded(value) and value.shape == target.shape:
            state_dict[prefix + name] = shared_as(value, target)
