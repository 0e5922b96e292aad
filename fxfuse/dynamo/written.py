"""The rewritten graph as one that an inner backend takes in the place of dynamo's.

Comes in: ``Captured`` and what ``rewrite`` made of it. Goes out: ``Written``: a graph whose inputs are those of dynamo's graph that are
still read, then packs that are made outside of it, then constants. Packs that are made inside are stacked of the weights at every call.

A pack that is made outside keeps every member in its own layout, ``[lanes, *member]``, so that members can be views of it with the strides
that dynamo's guards have seen; the graph reads it in the order that its ops want.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor

from fxfuse.graph import Recipe
from fxfuse.passes.program import member_of
from fxfuse.private.dynamo import keep_source

from .captured import Captured
from .rewrite import Rewritten

Node = torch.fx.Node


@dataclass
class Written:
    """``kept``: the numbers of dynamo's inputs that the graph takes, first; then ``outside``, then ``constants``."""

    graph: torch.fx.Graph
    kept: list[int]
    outside: list[Recipe]
    constants: list[str]
    writes: bool = False  # packs of buffers are updated in place: running statistics


def write(captured: Captured, rewritten: Rewritten, outside: Collection[str], every: bool = False) -> Written:
    """The graph, with the packs named in ``outside`` as inputs. ``every``: also the inputs of dynamo's that nothing reads."""
    source = rewritten.program.graph
    recipes = {recipe.name: recipe for recipe in rewritten.recipes}
    read = {str(node.target) for node in source.nodes if node.op == "get_attr"}
    inside = [recipe for recipe in rewritten.recipes if recipe.name not in outside]
    read.update(member for recipe in inside for member in recipe.members)
    inputs = [node for node in source.nodes if node.op == "placeholder"]
    graph = torch.fx.Graph()
    known: dict[Node, Node] = {}
    held: dict[str, Node] = {}
    kept: list[int] = []
    for number, slot in enumerate(captured.slots):
        used = slot.weight in read if slot.weight else slot.input >= 0 or bool(captured.symbols)
        if not (used or every):
            continue
        made = graph.node_copy(slot.node)
        keep_source(made, slot.node)
        kept.append(number)
        if slot.weight:
            held[slot.weight] = made
        elif slot.input >= 0:
            known[inputs[slot.input]] = made
    packs = [recipe for recipe in rewritten.recipes if recipe.name in outside]
    for recipe in packs:
        held[recipe.name] = _placeholder(graph, recipe.name)
    constants = [name for name in rewritten.constants if name in read]
    for name in constants:
        held[name] = _placeholder(graph, name)
    for recipe in packs:
        held[recipe.name] = _in_order(graph, _gradient_in_rows(graph, held[recipe.name], recipe), recipe)
    for recipe in inside:
        held[recipe.name] = _with_own_gradient(graph, _packed(graph, recipe, [held[member] for member in recipe.members]), recipe)
    writes = any(node.meta.get("update") for node in source.nodes)
    for node in source.nodes:
        if node.op == "get_attr":
            known[node] = held[str(node.target)]
        elif node.op == "output":
            for recipe in inside if writes else ():
                if recipe.kind == "buffer":
                    _write_back(graph, recipe, held)
            (result,) = node.args
            graph.output(tuple(torch.fx.map_arg(result, known.__getitem__)))
        elif node.op != "placeholder":
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), known.__getitem__)
            known[node] = graph.create_node(node.op, node.target, args, kwargs)
            known[node].meta = {name: node.meta[name] for name in ("stack_trace", "val") if name in node.meta}
    assert recipes.keys() >= set(outside)
    return Written(graph, kept, packs, constants, writes)


def _placeholder(graph: torch.fx.Graph, name: str) -> Node:
    made = graph.placeholder("".join(c if c.isalnum() else "_" for c in name))
    keep_source(made, None)
    return made


def _in_order(graph: torch.fx.Graph, made: Node, recipe: Recipe) -> Node:
    """A pack that keeps its members as they are, as the rewritten graph reads it."""
    if recipe.order != tuple(range(len(recipe.order))):
        made = graph.call_function(torch.permute, (made, (0, *(dim + 1 for dim in recipe.order))))
    return graph.call_function(torch.flatten, (made, 0, 1)) if recipe.style == "cat" else made


def _gradient_in_rows(graph: torch.fx.Graph, made: Node, recipe: Recipe) -> Node:
    """A pack that is read in another order, by a view that puts its gradient in the members' own order: autograd keeps each member's
    part of it as it is then, and copies those in another order one by one (0.4 of 5.7 ms for 768)."""
    if recipe.kind != "parameter" or recipe.own_shapes is not None or recipe.order == tuple(range(len(recipe.order))):
        return made
    flat = graph.call_function(torch.flatten, (made,))
    return graph.call_function(torch.unflatten, (flat, 0, (len(recipe.members), *recipe.shape)))


def _packed(graph: torch.fx.Graph, recipe: Recipe, members: list[Node]) -> Node:
    """What ``recipes.pack`` does, as nodes."""
    if recipe.style in ("rows", "padded"):
        members = [_filled(graph, member, recipe, index) for index, member in enumerate(members)]
    elif recipe.own_shapes is not None:
        members = [graph.call_method("reshape", (member, recipe.shape)) for member in members]
    if recipe.style == "rows" or (recipe.style == "cat" and recipe.order == tuple(range(len(recipe.order)))):
        return graph.call_function(torch.cat, (members,))
    stacked = graph.call_function(torch.stack, (members,))
    return _in_order(graph, stacked, recipe)


def _with_own_gradient(graph: torch.fx.Graph, made: Node, recipe: Recipe) -> Node:
    """``weights.own_gradients.with_own_gradient``, as a node."""
    if recipe.kind != "parameter" or not recipe.requires_grad:
        return made
    return graph.call_function(torch.mul, (made, 1))


def _filled(graph: torch.fx.Graph, member: Node, recipe: Recipe, index: int) -> Node:
    """The member with zeros behind it, up to the shape that all have in the pack; rows keep their own number."""
    own = recipe.member_shape(index)
    shape = (own[0], *recipe.shape[1:]) if recipe.style == "rows" else recipe.shape
    missing = [amount for size, most in zip(own[::-1], shape[::-1], strict=True) for amount in (0, most - size)]
    return graph.call_function(F.pad, (member, missing)) if any(missing) else member


def _write_back(graph: torch.fx.Graph, recipe: Recipe, held: dict[str, Node]) -> None:
    """Running statistics were updated in a copy: write them where they belong."""
    for lane, member in enumerate(recipe.members):
        graph.call_method("copy_", (held[member], member_of(graph, held[recipe.name], recipe, lane)))


def constants_of(rewritten: Rewritten, written: Written) -> list[Tensor]:
    """The values of the constants that the graph takes."""
    return [rewritten.constants[name] for name in written.constants]
