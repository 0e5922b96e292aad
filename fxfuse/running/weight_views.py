"""Views of weights, made once instead of at every call without grad.

Comes in: a program whose tensors are placeholders. Goes out: the same program without its views of weights, which are further placeholders,
and the program that makes them. A view costs 1 to 5 us of Python and dispatch (the more the colder the caches: 3 of them were 16 us of a
forward of 310 us); with grad they must be made anew, since autograd has to see them.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
from torch import Tensor

from fxfuse.functional import slice_along

VIEWS: tuple[Any, ...] = (
    *(torch.permute, torch.transpose, torch.movedim, torch.unsqueeze, torch.squeeze, torch.unflatten, torch.flatten, slice_along),
    *("reshape", "view", "expand"),
)


@dataclass
class WeightViews:
    """``graph`` makes the views of the tensors named ``reads`` (placeholder names), in the order of the placeholders ``names``."""

    graph: torch.fx.Graph
    reads: list[str]
    names: list[str]


def hoist(flat: torch.fx.Graph, tensors: set[str]) -> WeightViews | None:
    """Take the views of the placeholders ``tensors`` out of ``flat``, in place; None where there are none.

    The views become placeholders behind those that are there.
    """
    own = {node for node in flat.nodes if node.op == "placeholder" and node.name in tensors}
    hoisted: list[torch.fx.Node] = []
    for node in flat.nodes:
        if _is_view(node) and own.issuperset(node.all_input_nodes):
            own.add(node)
            hoisted.append(node)
    if not hoisted:
        return None
    made = torch.fx.Graph()
    env: dict[torch.fx.Node, torch.fx.Node] = {}
    reads = [node for node in flat.nodes if node.op == "placeholder" and node in own and any(user in own for user in node.users)]
    for node in (*reads, *hoisted):
        env[node] = made.node_copy(node, env.__getitem__)
    results = [node for node in hoisted if any(user not in own for user in node.users)]
    made.output(tuple(env[node] for node in results))
    last = [node for node in flat.nodes if node.op == "placeholder"][-1]
    names: list[str] = []
    for node in reversed(results):
        with flat.inserting_after(last):
            placeholder = flat.placeholder("view_" + node.name)
        node.replace_all_uses_with(placeholder)
        names.insert(0, placeholder.name)
    for node in reversed(hoisted):
        flat.erase_node(node)
    return WeightViews(made, [node.name for node in reads], names)


def evaluate(graph: torch.fx.Graph, tensors: dict[str, Tensor]) -> torch.fx.Graph:
    """A copy of a graph that reads, by further ``get_attr`` nodes, the views of ``tensors`` that it makes: what timing a call without
    grad takes in place of ``hoist``. The views are added to ``tensors``."""
    flat = torch.fx.Graph()
    env: dict[torch.fx.Node, torch.fx.Node] = {}
    values: dict[torch.fx.Node, Any] = {}  # by nodes of ``graph``
    for node in graph.nodes:
        if node.op == "get_attr" and isinstance(tensors.get(str(node.target)), Tensor):
            values[node] = tensors[str(node.target)]
        elif _is_view(node) and values.keys() >= set(node.all_input_nodes):
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            made = getattr(args[0], node.target)(*args[1:], **kwargs) if isinstance(node.target, str) else node.target(*args, **kwargs)
            if not isinstance(made, Tensor) or are_views((made,), tuple(v for v in tensors.values() if isinstance(v, Tensor))):
                values[node] = made
                if isinstance(made, Tensor):
                    tensors[f"view_{node.name}"] = made
                    env[node] = flat.create_node("get_attr", f"view_{node.name}")
                continue
        env[node] = flat.node_copy(node, env.__getitem__)
    for node in reversed(flat.nodes):
        if node.op == "get_attr" and not node.users:
            flat.erase_node(node)
    return flat


def _is_view(node: torch.fx.Node) -> bool:
    calls = node.op in ("call_function", "call_method") and bool(node.all_input_nodes)
    return calls and (node.target in VIEWS or _takes_apart(node))


def _takes_apart(node: torch.fx.Node) -> bool:
    """All lanes of a pack by one ``unbind``, or one of them."""
    if node.target is operator.getitem:
        return isinstance(node.args[1], int) and getattr(node.args[0], "target", None) is torch.unbind
    return node.target is torch.unbind and all(user.target is operator.getitem and _takes_apart(user) for user in node.users)


def are_views(made: tuple[Tensor, ...], tensors: tuple[Tensor, ...]) -> bool:
    """Does every made tensor share memory with one of ``tensors``? A ``reshape`` may have had to copy."""
    try:
        storages = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        return all(view.untyped_storage().data_ptr() in storages for view in made)
    except (RuntimeError, NotImplementedError):  # wrapped by a transform of torch.func: no memory of its own
        return False
