"""The manifest: how packed weights came from the original's checkpoint, as data.

Comes in: a fused model. Goes out: a dict that JSON takes (``manifest_of``); with packed tensors by name, the original's checkpoint again,
bit for bit (``original_of``). Per name of the original, in its order: a tensor of the fused model, and which lane of it. Per path of a
module that has one, its version, by which ``load_state_dict`` knows old checkpoints.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxfuse.errors import ConvertError, FxfuseError
from fxfuse.fused import regions
from fxfuse.private.state_dicts import set_versions, versions_of
from fxfuse.weights.lane import Pack, by_original_name, lane_info
from fxfuse.weights.recipe_data import recipe_from_data, recipe_to_data
from fxfuse.weights.recipes import lane_view, packed_shape

VERSION = 1


def manifest_of(model: nn.Module) -> dict[str, Any]:
    """The manifest of a model, fused or not. Raises ``ConvertError`` where its checkpoint holds more than tensors."""
    packs: dict[str, tuple[str, int]] = {}  # by the original's name: the pack's name, and the lane
    paths = {module: path for path, module in model.named_modules()}
    for path, module in model.named_modules(remove_duplicate=False):
        info = lane_info(module)
        for name, slot in info.slots.items() if info is not None else ():
            packs[_joined(path, name)] = (_joined(paths.get(slot.owner, ""), slot.name), slot.index)
    saved = model.state_dict()
    with by_original_name():
        original = model.state_dict()
    for name, value in (*saved.items(), *original.items()):
        if not isinstance(value, Tensor):
            raise ConvertError(f"{name} of the checkpoint is a {type(value).__name__}, and only tensors are written: write a .pt2 instead")
    recipes = {}
    for path, state in regions(model).items():
        for recipe in state.plan.recipes:
            name = _joined(path, recipe.name)
            if name in saved:
                recipes[name] = recipe_to_data(recipe)
    names: dict[str, Any] = {}
    for name, value in original.items():
        if name in packs and packs[name][0] in recipes:
            pack, index = packs[name]
            recipe = recipe_from_data(recipes[pack])
            if not _same(lane_view(recipe, saved[pack], index), value):
                raise ConvertError(f"{name} is not where the recipe of {pack} says: this is a bug of fxfuse, please report it")
            names[name] = [pack, index]
        elif name in saved:
            names[name] = [name]
        else:
            raise ConvertError(f"{name} of the original's checkpoint is no tensor of the fused model: the model renames its state dict")
    return {
        "fxfuse": VERSION, "model": type(model).__name__, "recipes": recipes, "original": names, "same": _aliases(saved),
        "versions": _versions(original, nodes={path for path, module in model.named_modules() if isinstance(module, Pack)}),
    }  # fmt: skip


def original_of(manifest: Any, tensors: Mapping[str, Tensor], *, copied: bool = False) -> OrderedDict[str, Tensor]:
    """The original's checkpoint: views of ``tensors`` by the original's names, in order, with the versions of its modules. ``ConvertError``
    where they do not fit.

    Each of ``tensors`` is asked for once and, with ``copied``, let go of before the next: what comes back are dense copies.
    """
    if not isinstance(manifest, dict) or manifest.get("fxfuse") != VERSION:
        raise ConvertError(f"there are no recipes that this version of fxfuse knows (it writes version {VERSION})")
    try:
        recipes = {name: recipe_from_data(data) for name, data in manifest["recipes"].items()}
        found = dict(_unpacked(manifest, recipes, tensors, copied))
        state = OrderedDict((name, found[name]) for name in manifest["original"])
        if "versions" in manifest:
            set_versions(state, OrderedDict((path, {"version": int(number)}) for path, number in manifest["versions"].items()))
        return state
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, FxfuseError) as error:
        if isinstance(error, ConvertError):
            raise
        raise ConvertError(f"the recipes are corrupt ({error}): write the folder again") from error


def stored_as(manifest: Any, name: str, tensors: Container[str]) -> str:
    """The name under which a tensor of the fused model is in a file, which holds once what has several names: under any one of them."""
    same = manifest.get("same") if isinstance(manifest, dict) else None
    if name in tensors or not isinstance(same, dict):
        return name
    first = str(same.get(name, name))
    others = (other for other, of in same.items() if of == first and other in tensors)
    return first if first in tensors else next(others, first)


def _versions(state: Mapping[str, Any], nodes: set[str]) -> dict[str, int]:
    """Of the original's modules: ``nodes`` are those that hold packs."""
    found = versions_of(state) or {}
    return {path: each["version"] for path, each in found.items() if path not in nodes and isinstance(each.get("version"), int)}


def _unpacked(
    manifest: Mapping[str, Any], recipes: Mapping[str, Any], tensors: Mapping[str, Tensor], copied: bool
) -> Iterator[tuple[str, Tensor]]:
    members: dict[str, list[tuple[str, str, list[Any]]]] = {}
    for name, (source, *lane) in manifest["original"].items():
        members.setdefault(stored_as(manifest, source, tensors), []).append((name, source, lane))
    for stored, each in members.items():
        if stored not in tensors:
            raise ConvertError(f"the weights lack {each[0][1]}, which holds {each[0][0]} of the original")
        tensor = tensors[stored]
        copies: dict[Any, Tensor] = {}  # a tied tensor is one again
        for name, source, lane in each:
            view = _lane(source, lane, recipes, tensor)
            if copied:
                key = tuple(lane)
                if key not in copies:
                    copies[key] = view.clone(memory_format=torch.contiguous_format)
                view = copies[key]
            yield name, view
        del tensor, view


def _lane(source: str, lane: list[Any], recipes: Mapping[str, Any], tensor: Tensor) -> Tensor:
    if not lane:
        return tensor
    recipe = recipes[source]
    if tuple(tensor.shape) != packed_shape(recipe):
        raise ConvertError(f"{source} has shape {tuple(tensor.shape)}, its recipe says {packed_shape(recipe)}")
    if type(lane[0]) is not int or not 0 <= lane[0] < len(recipe.members):
        raise ConvertError(f"the recipes are corrupt: {source} has no lane {lane[0]}")
    return lane_view(recipe, tensor, lane[0])


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


def _aliases(saved: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of tensors that are another one's: they are stored once."""
    first: dict[Any, str] = {}
    same: dict[str, str] = {}
    for name, value in saved.items():
        key = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride(), value.device) if value.numel() else name
        if first.setdefault(key, name) != name:
            same[name] = first[key]
    return same


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
