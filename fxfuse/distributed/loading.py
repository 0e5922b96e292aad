"""State dicts for packs that are divided among processes.

Comes in: a state dict by packed or original names, of whole tensors or DTensors. Goes out: the same, in place, with DTensors for these
packs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fxfuse.lane import lane_info
from fxfuse.recipes import lane_view, pack

from .packs import is_sharded, like, whole

if TYPE_CHECKING:
    from fxfuse.region import RegionState


def fit_sharded(state: RegionState, state_dict: dict[str, Any], prefix: str) -> list[str]:
    """Put what is given by original names into packs; returns the original names that are missing where others of their pack came.

    What does not fit in shape stays, and is an error of whoever loads it.
    """
    places: dict[tuple[str, int], list[str]] = {}
    slots = {}
    for path, module in state.region.named_modules(remove_duplicate=False):
        info = lane_info(module)
        for name, slot in info.slots.items() if info is not None else ():
            places.setdefault((slot.recipe.name, slot.index), []).append(prefix + (f"{path}.{name}" if path else name))
            slots[slot.recipe.name] = slot
    missing: list[str] = []
    # By original names of any pack: the packs that are whole have to come by packed names too, as these decide how all are loaded.
    original = any(key in state_dict for keys in places.values() for key in keys)
    for recipe in state.plan.recipes if original else ():
        keys = [places[(recipe.name, index)] for index in range(len(recipe.members))]
        given = [next((key for key in reversed(each) if key in state_dict), None) for each in keys]
        if not all(_fits(state_dict, key, recipe.member_shape(index)) for index, key in enumerate(given)):
            continue
        slot = slots[recipe.name]
        now = whole(slot.packed().detach()) if None in given else None
        members = []
        for index, key in enumerate(given):
            if key is None:
                assert now is not None
                missing.extend(keys[index])
                members.append(lane_view(recipe, now, index))
            else:
                members.append(state_dict[key].detach().to(slot.packed().device, slot.packed().dtype))
        for each in keys:
            for key in each:
                state_dict.pop(key, None)
        with torch.no_grad():
            state_dict[prefix + recipe.name] = pack(recipe, members)
    for recipe in state.plan.recipes:
        value, target = state_dict.get(prefix + recipe.name), slots[recipe.name].packed()
        if isinstance(value, Tensor) and is_sharded(target) and not is_sharded(value) and value.shape == target.shape:
            state_dict[prefix + recipe.name] = like(target, value.to(target.device))
    return missing


def _fits(state_dict: dict[str, Any], key: str | None, shape: tuple[int, ...]) -> bool:
    """Is nothing there, or a tensor of that shape?"""
    return key is None or (isinstance(state_dict[key], Tensor) and tuple(state_dict[key].shape) == shape)
