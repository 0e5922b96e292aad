"""Packs in parts, as data: names, programs that read parts, state dicts of packs that were cut otherwise.

Comes in: a ``RegionPlan`` some of whose packs were cut (``fxfuse.optimizers.cut`` does that). Goes out: which lanes lie where, and programs
and state dicts that fit. A part is a pack of consecutive lanes with a recipe of its own, whose name says which lanes it holds
(``packed.nets.0.lanes_0_to_2.weight``). All packs lie in lane order along dim 0, so that a ``cat`` of the parts is the whole.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fxfuse.graph import Program, Recipe, RegionPlan

from .recipes import packed_shape, part, part_view

_PART = re.compile(r"lanes?_(\d+)(?:_to_(\d+))?")


def part_name(whole: str, start: int, stop: int) -> str:
    """The name of lanes ``start`` to ``stop`` (excluded) of a pack.

    >>> part_name("packed.nets.0.weight", 0, 3), part_name("packed.nets.0.weight", 3, 4)
    ('packed.nets.0.lanes_0_to_2.weight', 'packed.nets.0.lane_3.weight')
    """
    stem, _, leaf = whole.rpartition(".")
    return f"{stem}.lane_{start}.{leaf}" if stop - start == 1 else f"{stem}.lanes_{start}_to_{stop - 1}.{leaf}"


def whole_of(name: str) -> tuple[str, int, int] | None:
    """The pack and its lanes that a part of this name holds; None for the name of anything else.

    >>> whole_of("packed.nets.0.lanes_0_to_2.weight")
    ('packed.nets.0.weight', 0, 3)
    """
    stem, _, leaf = name.rpartition(".")
    stem, _, lanes = stem.rpartition(".")
    found = _PART.fullmatch(lanes)
    if found is None:
        return None
    first, last = int(found[1]), int(found[2] or found[1])
    return f"{stem}.{leaf}", first, last + 1


def parts_of(plan: RegionPlan, whole: str) -> list[tuple[Recipe, int, int]]:
    """The parts of a pack that was cut, in lane order, each with its lanes."""
    found = []
    for recipe in plan.recipes:
        place = whole_of(recipe.name)
        if place is not None and place[0] == whole:
            found.append((recipe, place[1], place[2]))
    return sorted(found, key=lambda each: each[1])


def reading(program: Program, changed: Mapping[str, Sequence[str]]) -> Program:
    """The program that reads parts where it read the pack."""
    if not any(node.op == "get_attr" and node.target in changed for node in program.graph.nodes):
        return program
    graph = copy.deepcopy(program.graph)
    for node in list(graph.nodes):
        if node.op != "get_attr" or node.target not in changed:
            continue
        with graph.inserting_before(node):
            parts = [graph.create_node("get_attr", name) for name in changed[node.target]]
            whole = graph.call_function(torch.cat, (parts, 0))
        for made in (*parts, whole):
            made.meta.update({key: value for key, value in node.meta.items() if key == "place"})
        node.replace_all_uses_with(whole)
        graph.erase_node(node)
    return replace(program, graph=graph)


def in_parts(program: Program, plan: RegionPlan) -> Program:
    """A program that was made over the packs before they were cut, over their parts."""
    return reading(program, {whole: [recipe.name for recipe, _, _ in parts_of(plan, whole)] for whole in plan.wholes})


def whole_recipes(plan: RegionPlan) -> list[Recipe]:
    """The recipes as they were before any pack was cut."""
    parts = {recipe.name for whole in plan.wholes for recipe, _, _ in parts_of(plan, whole)}
    return [*(recipe for recipe in plan.recipes if recipe.name not in parts), *plan.wholes.values()]


def fit_parts(plan: RegionPlan, state_dict: dict[str, Any], prefix: str) -> None:
    """Replace, in place, packed names of packs that were cut otherwise by those of ``plan``. What does not fit stays."""
    ours = {recipe.name for recipe in plan.recipes}
    given: dict[str, list[tuple[int, int, str]]] = {}
    for key in [key for key in state_dict if key.startswith(prefix) and key[len(prefix) :] not in ours]:
        place = whole_of(key[len(prefix) :])
        if key[len(prefix) :] in plan.wholes:
            place = (key[len(prefix) :], 0, len(plan.wholes[key[len(prefix) :]].members))
        if place is not None:
            given.setdefault(place[0], []).append((place[1], place[2], key))
    for recipe in whole_recipes(plan):
        if recipe.name not in given:
            continue
        pieces = {(a, b): key for a, b, key in given[recipe.name]}
        for own, a, b in parts_of(plan, recipe.name):  # cut alike here and there
            if prefix + own.name in state_dict:
                pieces[(a, b)] = prefix + own.name
        ordered = sorted(pieces)
        lanes = len(recipe.members)
        if [0, *(b for _, b in ordered)] != [*(a for a, _ in ordered), lanes]:
            continue
        tensors = [state_dict[pieces[place]] for place in ordered]
        shapes = [packed_shape(part(recipe, "", a, b)) for a, b in ordered]
        if any(not isinstance(t, Tensor) or tuple(t.shape) != shape for t, shape in zip(tensors, shapes, strict=True)):
            continue
        whole = torch.cat([tensor.detach() for tensor in tensors]) if len(tensors) > 1 else tensors[0]
        for key in pieces.values():
            del state_dict[key]
        targets: Iterable[tuple[Recipe, int, int]] = parts_of(plan, recipe.name) or [(recipe, 0, lanes)]
        for own, a, b in targets:
            view = part_view(recipe, whole, a, b)
            state_dict[prefix + own.name] = view if (a, b) == (0, lanes) else view.clone()
