"""Recurrences of which only the last step is read.

Comes in: an emitted graph with meta tensors. Goes out: the same graph, in place, where ``outputs[:, -1]`` of a recurrence is the state
that it ends with, and a recurrence whose outputs nobody reads stacks none. In training that saves more than the stack: the gradient of
a row of it is a tensor of zeros as large as the stack, cut into steps and added to each.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx

from fxfuse.functional import drop_unused

from .parts_of_joins import leaves_as_view, read_parts
from .recurrent import OVER_TIME

Node = torch.fx.Node
OUTPUTS, STATE = 0, 1  # items of what they return


def read_last_steps(graph: torch.fx.Graph) -> None:
    """Rewrite every recurrence of which no more than the last step is read, in place."""
    recurrences = [node for node in graph.nodes if node.op == "call_function" and node.target in OVER_TIME and not node.kwargs]
    if not recurrences:
        return
    for node in recurrences:
        for outputs in _items(node, OUTPUTS):
            _before_concatenation(graph, outputs)
    read_parts(graph)
    drop_unused(graph)
    for node in recurrences:
        for outputs in _items(node, OUTPUTS):
            _last_as_state(graph, node, outputs)
        if all(not outputs.users for outputs in _items(node, OUTPUTS)):
            node.args = (*node.args, False)
    drop_unused(graph)


def _items(node: Node, number: int) -> list[Node]:
    return [user for user in node.users if user.target is operator.getitem and user.args[1] == number]


def _before_concatenation(graph: torch.fx.Graph, outputs: Node) -> None:
    """One step of both directions side by side: the step of each, side by side."""
    for joined in list(outputs.users):
        steps = list(joined.users)
        if joined.op != "call_function" or joined.target is not torch.cat or len(joined.args) != 2 or joined.kwargs:
            continue
        rank = joined.meta["val"].dim()
        parts: Any = joined.args[0]
        dim: Any = joined.args[1]
        along = dim % rank
        if not all(_is_step(step, rank, along) for step in steps):
            continue
        for step in steps:
            where: Any = step.args[1:]
            with graph.inserting_before(step):
                own = []
                for part in parts:
                    taken = graph.call_function(torch.select, (part, *where))
                    taken.meta.update({**step.meta, "val": torch.select(part.meta["val"], *where)})
                    own.append(taken)
                place = along - (along > where[0] % rank)
                made = graph.call_function(torch.cat, (own, place))
            made.meta.update({**step.meta, "val": torch.cat([each.meta["val"] for each in own], place)})
            step.replace_all_uses_with(made)
            graph.erase_node(step)
        graph.erase_node(joined)


def _is_step(node: Node, rank: int, along: int) -> bool:
    """Whether this selects in another dim than ``along``."""
    if node.op != "call_function" or node.target is not torch.select or node.kwargs:
        return False
    dim, index = node.args[1:]
    return type(dim) is int and type(index) is int and dim % rank != along


def _last_as_state(graph: torch.fx.Graph, node: Node, outputs: Node) -> None:
    backwards, along = node.args[-2:]
    last = 0 if backwards else -1  # the first in time is the last that is computed
    readers = list(outputs.users)
    if not readers or not all(reader.target is torch.select and reader.args[1:] == (along, last) for reader in readers):
        return
    if any(leaves_as_view(reader) for reader in readers):
        return
    with graph.inserting_after(outputs):
        state = graph.call_function(operator.getitem, (node, STATE))
    value = readers[0].meta["val"]
    state.meta.update({**readers[0].meta, "val": value.new_empty(value.shape)})
    for reader in readers:
        reader.replace_all_uses_with(state)
        graph.erase_node(reader)
