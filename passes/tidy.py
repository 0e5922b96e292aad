"""Fewer views and less memory: what the rules write step by step, in one step.

Comes in: an emitted graph with meta tensors. Goes out: the same graph, in place, with the fewest views, and with ReLU and writes in the
memory of what they read.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
import torch.nn.functional as F

from .functional import drop_unused, index_write, index_write_
from .views import shorten_views

# What these return is new memory, and not needed for their backward.
_FRESH = (torch.addcmul, torch.baddbmm, torch.bmm, torch.matmul, torch.add, F.linear, torch.conv1d, torch.conv2d, torch.conv3d)
# What these return is new memory that no backward needs either, and may be written.
_WRITABLE = (torch.zeros, torch.ones, torch.full, torch.empty, index_write, index_write_)
_SPLITTING = (torch.unflatten, torch.unsqueeze, torch.flatten, torch.squeeze)


def tidy(graph: torch.fx.Graph) -> None:
    """Shorten chains of views, and write ReLU in place."""
    shorten_views(graph)
    _drop_round_trips(graph)
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in _SPLITTING:
            continue
        root = _root(node)
        if root is node.args[0]:
            continue
        value, source = node.meta.get("val"), root.meta.get("val")
        if value is None or source is None:
            continue
        # The weights' shapes are fixed; a chain that starts at data may have a free size, and stays.
        if root.op == "get_attr" and source.is_contiguous():
            with graph.inserting_before(node):
                made = graph.call_method("reshape", (root, tuple(int(size) for size in value.shape)))
            made.meta.update(node.meta)
            node.replace_all_uses_with(made)
    drop_unused(graph)
    _reuse_memory(graph)
    _write_in_place(graph)


def _drop_round_trips(graph: torch.fx.Graph) -> None:
    """Lanes taken out of a dim by one op, and merged into it again by the next."""
    for node in graph.nodes:
        if node.op != "call_function" or node.target is not torch.flatten or any(user.op == "output" for user in node.users):
            continue
        parts: Any = node.args[0]
        if parts.op != "call_function" or parts.target is not torch.unflatten or len(parts.args[2]) != 2:
            continue
        if node.args[1:] == (parts.args[1], parts.args[1] + 1):
            node.replace_all_uses_with(parts.args[0])


def _reuse_memory(graph: torch.fx.Graph) -> None:
    """ReLU in the memory of a product that nothing else reads: autograd keeps ReLU's result, and no product keeps its own."""
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in (F.relu, torch.relu) or node.kwargs or len(node.args) != 1:
            continue
        (source,) = node.args
        if isinstance(source, torch.fx.Node) and source.op == "call_function" and source.target in _FRESH and len(source.users) == 1:
            node.target = torch.relu_


def _write_in_place(graph: torch.fx.Graph) -> None:
    """A chain of writes into one buffer copies it at the first write at most."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target is index_write:
            base = node.args[0]
            if isinstance(base, torch.fx.Node) and base.op == "call_function" and base.target in _WRITABLE and len(base.users) == 1:
                node.target = index_write_


def _root(node: torch.fx.Node) -> torch.fx.Node:
    at: Any = node
    while isinstance(at, torch.fx.Node) and at.op == "call_function" and at.target in _SPLITTING:
        at = at.args[0]
    assert isinstance(at, torch.fx.Node)
    return at
