"""Cut packs into parts, where their lanes are not trained alike: frozen, in another param group, with other counts of steps.

Comes in: a fused region and the lanes at which new parts begin. Goes out: the same region, in place, where each part is a Parameter of its
own. Its programs join the parts by one ``cat`` at every call, which costs a copy of these weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fxfuse.errors import FxfuseError
from fxfuse.graph import Recipe
from fxfuse.running.guards import Facts
from fxfuse.running.region import RegionState
from fxfuse.weights.lane import Pack, Slot, divided, lane_info
from fxfuse.weights.norm_pack import LayerNormPack
from fxfuse.weights.parts import part_name, reading, whole_of
from fxfuse.weights.recipes import part, part_view


@dataclass
class _Cut:
    """One pack that will be cut: where it lies, and its parts."""

    recipe: Recipe
    slot: Slot
    whole: str
    first: int  # the lane of the whole that its first lane is
    bounds: list[int]  # of its own lanes: where parts begin and end

    @property
    def names(self) -> list[str]:
        return [part_name(self.whole, self.first + a, self.first + b) for a, b in self.spans]

    @property
    def spans(self) -> list[tuple[int, int]]:
        return list(zip(self.bounds, self.bounds[1:], strict=False))


def cut(state: RegionState, starts: Mapping[str, Sequence[int]]) -> None:
    """Cut packed Parameters of a region: ``{packed name: lanes (of that pack) at which new parts begin}``.

    Values, gradients, attributes and ``requires_grad`` stay. Raises ``FxfuseError``, and changes nothing, for a pack that cannot be cut."""
    cuts = [_examined(state, name, lanes) for name, lanes in starts.items() if set(lanes) - {0}]
    if not cuts:
        return
    for each in cuts:
        _divide(state, each)
    plan = state.plan
    recipes: list[Recipe] = []
    wholes = dict(plan.wholes)
    for recipe in plan.recipes:
        done = next((each for each in cuts if each.recipe is recipe), None)
        if done is None:
            recipes.append(recipe)
            continue
        if recipe.name == done.whole:
            wholes[recipe.name] = recipe
        recipes += [part(recipe, name, a, b) for name, (a, b) in zip(done.names, done.spans, strict=True)]
    joined = replace(plan, recipes=recipes, wholes=wholes)
    changed = {each.recipe.name: each.names for each in cuts}
    state.plan = replace(
        joined,
        programs={flags: reading(program, changed) for flags, program in plan.programs.items()},
        methods={
            name: {flags: tuple(reading(program, changed) for program in programs) for flags, programs in modes.items()}
            for name, modes in plan.methods.items()
        },
    )
    state.compiled, state.others = {}, {}
    state.adapted.clear()
    state.unfit.clear()
    state.prepare()


def _examined(state: RegionState, name: str, lanes: Sequence[int]) -> _Cut:
    recipe = next((each for each in state.plan.recipes if each.name == name), None)
    slot = next((s for m in state.members() if (i := lane_info(m)) for s in i.slots.values() if s.recipe.name == name), None)
    if recipe is None or slot is None:
        raise FxfuseError(f"the region has no pack {name}")
    packed = slot.packed()
    if divided(slot.owner):
        raise FxfuseError(f"{name} is divided among processes, and cannot be cut into parts any more: that comes before shard_lanes")
    if type(packed) is not nn.Parameter or recipe.kind != "parameter":
        raise FxfuseError(f"{name} is a {type(packed).__name__}, and only plain Parameters can be cut into parts")
    bounds = sorted({0, *lanes, len(recipe.members)})
    if bounds[0] < 0 or bounds[-1] > len(recipe.members):
        raise FxfuseError(f"{name} has {len(recipe.members)} lanes; it cannot be cut at {sorted(lanes)}")
    place = whole_of(name)
    is_part = place is not None and place[0] in state.plan.wholes
    whole, first = (place[0], place[1]) if is_part and place is not None else (name, 0)
    return _Cut(recipe, slot, whole, first, bounds)


def _divide(state: RegionState, each: _Cut) -> None:
    """Put the parts in the place of the pack, and let the lanes' slots point to them."""
    recipe, owner, store, leaf = each.recipe, each.slot.owner, each.slot.store, each.slot.name
    packed = each.slot.packed()
    tree = _walk(state, each.whole)
    made: list[tuple[nn.Module, Recipe]] = []
    for name, (a, b) in zip(each.names, each.spans, strict=True):
        holder = name.split(".")[-2]
        node = tree._modules.get(holder)
        if node is None:
            tree.add_module(holder, node := LayerNormPack(state, tree) if isinstance(tree, LayerNormPack) else Pack(state))
        with torch.no_grad():
            piece = nn.Parameter(part_view(recipe, packed.detach(), a, b).clone(), packed.requires_grad)
        piece.__dict__.update(packed.__dict__)
        if packed.grad is not None:
            piece.grad = part_view(recipe, packed.grad, a, b).clone()
        if store == "__dict__":  # lanes that the region does not register stay so
            node.__dict__[leaf] = piece
        else:
            node.register_parameter(leaf, piece)
        made.append((node, part(recipe, name, a, b)))
        if recipe.name in state.facts:
            state.facts[name] = replace(state.facts[recipe.name], name=name, shape=tuple(piece.shape))
        else:
            state.facts[name] = Facts.of(name, piece)
    state.facts.pop(recipe.name, None)
    del getattr(owner, store)[leaf]
    for module in state.members():
        info = lane_info(module)
        for slot in info.slots.values() if info is not None else ():
            if slot.recipe.name == recipe.name:
                number = next(i for i, (a, b) in enumerate(each.spans) if a <= slot.index < b)
                slot.index -= each.spans[number][0]
                slot.owner, slot.recipe = made[number]


def _walk(state: RegionState, name: str) -> nn.Module:
    """The node of the container tree in which a pack lies, or lay before it was cut."""
    node: Any = state.region
    for step in name.split(".")[:-1]:
        node = node._modules[step]
    found: nn.Module = node
    return found
