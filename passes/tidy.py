"""Fewer views and less memory: what the rules write step by step, in one step.

Comes in: an emitted graph with meta tensors. Goes out: the same graph, in place, with the fewest views, and with activations and
writes in the memory of what they read.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
import torch.nn.functional as F

from fxfuse.functional import drop_unused, index_write, index_write_

from .last_step import read_last_steps
from .views import shorten_views

# What these return is new memory, and not needed for their backward.
_FRESH = frozenset(
    {torch.addcmul, torch.baddbmm, torch.bmm, torch.addmm, torch.mm, torch.matmul, torch.add, torch.sub, torch.mul, F.linear, torch.conv1d,
     torch.conv2d, torch.conv3d, F.layer_norm, F.batch_norm, "add", "sub", "mul", "matmul", "bmm"}
)  # fmt: skip
# What autograd computes the gradient of from the result alone: the same numbers, written over the argument.
_FROM_RESULT = {
    F.relu: torch.relu_, torch.relu: torch.relu_, torch.tanh: torch.tanh_, F.tanh: torch.tanh_, torch.sigmoid: torch.sigmoid_,
    F.sigmoid: torch.sigmoid_, torch.exp: torch.exp_, "relu": "relu_", "tanh": "tanh_", "sigmoid": "sigmoid_", "exp": "exp_",
}  # fmt: skip
# New memory, too.
_COMPARING = frozenset({torch.clamp, torch.ne, torch.eq})
# What these return is new memory that no backward needs either, and may be written.
_WRITABLE = (torch.zeros, torch.ones, torch.full, torch.empty, index_write, index_write_)
_RESHAPING = (torch.unflatten, torch.flatten, torch.unsqueeze, torch.squeeze, torch.transpose, torch.permute, torch.movedim)
_SPLITTING = (torch.unflatten, torch.unsqueeze, torch.flatten, torch.squeeze)


def tidy(graph: torch.fx.Graph) -> None:
    """Shorten chains of views, and write activations in place."""
    shorten_views(graph)
    read_last_steps(graph)
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
    _activate_before_views(graph)
    _reuse_memory(graph)
    _fill_in_place(graph)
    _write_in_place(graph)
    _write_single_numbers(graph)


def _write_single_numbers(graph: torch.fx.Graph) -> None:
    """``copy_`` into a buffer of no dims goes through a view: AOTAutograd of torch 2.13 loses one that does not, if it is floating."""
    for node in graph.find_nodes(op="call_method", target="copy_"):
        held = node.args[0]
        value = held.meta.get("val") if held.op == "get_attr" else None
        if value is not None and value.dim() == 0:
            with graph.inserting_before(node):
                view = graph.call_method("detach", (held,))
            view.meta.update(held.meta)
            node.args = (view, *node.args[1:])


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
    """ReLU, tanh and the like in the memory of what nothing else reads: autograd keeps their result, and no product keeps its own."""
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method") or node.target not in _FROM_RESULT or node.kwargs or len(node.args) != 1:
            continue
        (source,) = node.args
        if not isinstance(source, torch.fx.Node) or source.op not in ("call_function", "call_method") or len(source.users) != 1:
            continue
        value, result = source.meta.get("val"), node.meta.get("val")
        same = isinstance(value, torch.Tensor) and isinstance(result, torch.Tensor) and value.dtype is result.dtype
        if same and source.target in _FRESH:
            node.target = _FROM_RESULT[node.target]


def _fill_in_place(graph: torch.fx.Graph) -> None:
    """``masked_fill`` of new indices that only comparisons have read before: autograd asks nothing of them."""
    order = {node: number for number, node in enumerate(graph.nodes)}
    for node in graph.find_nodes(op="call_method", target="masked_fill"):
        filled: Any = node.args[0]
        value = filled.meta.get("val")
        if not isinstance(value, torch.Tensor) or value.is_floating_point() or value.is_complex() or filled.target not in _FRESH:
            continue
        if all(user is node or (user.target in _COMPARING and order[user] < order[node]) for user in filled.users):
            node.target = "masked_fill_"


def _activate_before_views(graph: torch.fx.Graph) -> None:
    """ReLU and the like of a view of new memory: of the memory itself, before the view. Written over a view, it would be the view's base
    that autograd sees written, by a copy."""
    for node in list(graph.nodes):
        if node.op not in ("call_function", "call_method") or node.target not in _FROM_RESULT or node.kwargs or len(node.args) != 1:
            continue
        view: Any = node.args[0]
        first, root = None, view
        while root.op == "call_function" and root.target in _RESHAPING and len(root.users) == 1:
            first, root = root, root.args[0]
        value, result = root.meta.get("val"), node.meta.get("val")
        same = isinstance(value, torch.Tensor) and isinstance(result, torch.Tensor) and value.dtype is result.dtype
        fresh = root.op in ("call_function", "call_method") and root.target in _FRESH and len(root.users) == 1
        if first is None or not fresh or not same:
            continue
        with graph.inserting_after(root):
            made = graph.create_node(node.op, node.target, (root,))
        made.meta.update({**node.meta, "val": value})
        first.replace_input_with(root, made)
        node.replace_all_uses_with(view)
        graph.erase_node(node)


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
