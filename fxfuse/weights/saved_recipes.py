"""Recipes that travel with a saved state dict, so that the original's can be had from it where the fused model is not.

Comes in: a fused region, or a state dict of packed names. Goes out: a note for the state dict's metadata (beside the versions of modules
that torch keeps there, and saves with it: plain data, which is read weights-only), and the original's state dict again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxfuse.errors import FxfuseError, StateDictError
from fxfuse.graph import RegionPlan
from fxfuse.models.sharded import gathered
from fxfuse.private.state_dicts import set_versions, versions_of

from .lane import Pack, lane_info
from .recipe_data import recipe_from_data, recipe_to_data
from .recipes import lane_view, packed_shape

NOTE = "fxfuse"  # in the metadata of a region
VERSION = 1


def note_of(region: nn.Module, plan: RegionPlan) -> dict[str, Any]:
    """What is saved with a region, all names relative to it: its recipes; by the original's names in their order, pack and lane, or nothing
    for what is no lane; and the nodes that hold packs."""
    names: dict[str, list[Any]] = {}
    nodes: list[str] = []
    for path, module in region.named_modules(remove_duplicate=False):
        info = lane_info(module)
        if isinstance(module, Pack):
            nodes.append(path)
        elif info is not None:
            for name in (*info.parameters, *info.buffers):
                slot = info.slots.get(name)
                names[_joined(path, name)] = [] if slot is None else [slot.recipe.name, slot.index]
    return {"version": VERSION, "recipes": [recipe_to_data(recipe) for recipe in plan.recipes], "names": names, "nodes": nodes}


def noted(state_dict: Any) -> dict[str, Any]:
    """By region path, the notes that a state dict carries."""
    versions = versions_of(state_dict) or {}
    return {path: each[NOTE] for path, each in versions.items() if isinstance(each, dict) and NOTE in each}


def packs_in(note: Any) -> set[str]:
    """The names of the packs that a note tells of."""
    recipes = note.get("recipes", ()) if isinstance(note, dict) else ()
    return {str(data.get("name")) for data in recipes if isinstance(data, dict)}


def unpacked(state_dict: Mapping[str, Any]) -> OrderedDict[str, Any]:
    """The original's state dict from one that a fused model wrote: its names in its order, contiguous copies, bit for bit. Of packs that
    the state dict lacks, the lanes are absent. Raises ``StateDictError`` where its notes are corrupt, or do not fit its tensors."""
    notes = noted(state_dict)
    lanes: dict[str, dict[str, Any]] = {}
    owner: dict[str, str] = {}  # of the keys that belong to a region, its path
    try:
        for path, note in notes.items():
            lanes[path] = dict(_entries(path, note, state_dict))
            owner.update((key, path) for key in (*lanes[path], *(_joined(path, name) for name in packs_in(note))))
        nodes = {_joined(path, name) for path, note in notes.items() for name in note["nodes"]}
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, FxfuseError) as error:
        if isinstance(error, StateDictError):
            raise
        raise StateDictError(f"the recipes that this state dict carries are corrupt ({error})") from error
    saved: OrderedDict[str, Any] = OrderedDict()
    for key, value in state_dict.items():
        if key not in owner:
            saved[key] = _copied(value)
        else:
            saved.update((name, _copied(each)) for name, each in lanes.pop(owner[key], {}).items())
    versions = versions_of(state_dict) or {}
    kept = {path: {k: v for k, v in each.items() if k != NOTE} for path, each in versions.items() if path not in nodes}
    set_versions(saved, OrderedDict(kept))
    return saved


def unpack_region(path: str, note: Any, state_dict: dict[str, Any]) -> None:
    """Replace, in place, the packed names of one region by the original's."""
    try:
        entries = dict(_entries(path, note, state_dict))
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise StateDictError(f"the recipes that this state dict carries are corrupt ({error})") from error
    for name in packs_in(note):
        state_dict.pop(_joined(path, name), None)
    state_dict.update(entries)


def _entries(path: str, note: Any, state_dict: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and values of the original's tensors in a region."""
    if note["version"] != VERSION:
        raise StateDictError(f"the recipes that this state dict carries are of version {note['version']}; this fxfuse knows {VERSION}")
    recipes = {recipe.name: recipe for recipe in map(recipe_from_data, note["recipes"])}
    whole: dict[str, Tensor] = {}
    for name, place in note["names"].items():
        key = _joined(path, name if not place else place[0])
        if key not in state_dict:
            continue
        if not place:
            yield key, state_dict[key]
            continue
        recipe, index = recipes[place[0]], place[1]
        if key not in whole:
            whole[key] = gathered(state_dict[key])
        if tuple(whole[key].shape) != packed_shape(recipe):
            raise StateDictError(f"{key} has shape {tuple(whole[key].shape)}, its recipe says {packed_shape(recipe)}")
        if type(index) is not int or not 0 <= index < len(recipe.members):
            raise StateDictError(f"the recipes that this state dict carries are corrupt: {key} has no lane {index}")
        yield _joined(path, name), lane_view(recipe, whole[key], index)


def _copied(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return value
    return gathered(value).detach().clone(memory_format=torch.contiguous_format)


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
