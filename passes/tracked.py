"""What needs a gradient in the original needs one here, and nothing else does.

Comes in: a lifted graph and the one that was emitted for it. Goes out: for each result, the tensors that its gradient could reach in the
original, where packing made it one of more. Lanes of an op without weights share a pack whether they are trained or frozen, and each
with the inputs of all others: taken out of it, a lane's result would need a gradient for what the others read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.fx

from fxfuse.ops import Op

from .lifted import Lifted
from .packs import Packs

Node = torch.fx.Node
# Inputs and frozen weights that a gradient could reach, should they need one later; None where a trained weight is reached anyway.
Sources = frozenset[Node] | None


def untracked(lifted: Lifted, emitted: torch.fx.Graph, packs: Packs, made: dict[Node, Any]) -> dict[Node, list[Node]]:
    """The results (keys of ``made``) that reach more in ``emitted`` than in the original, each with what it reaches there."""
    recipes = {recipe.name: recipe for recipe in packs.recipes.values()}
    own = {str(node.target): node for node in lifted.graph.nodes if node.op == "get_attr"}

    def is_trained(node: Node) -> bool | None:
        name = str(node.target)
        if name in recipes:
            return recipes[name].requires_grad if recipes[name].kind == "parameter" else None
        trained = name in own and bool(own[name].meta.get("requires_grad"))
        parameter = name in own and name not in lifted.constants and packs.kinds.get(name) != "buffer"
        return trained if trained or parameter else None

    before = _reached(lifted.graph, is_trained)
    loose = {leaf: sources for leaf in made if (sources := before[leaf]) is not None and leaf.op not in ("placeholder", "get_attr")}
    after = _reached(emitted, is_trained) if loose else {}
    found: dict[Node, list[Node]] = {}
    for leaf, sources in loose.items():
        known, now = {_name(node, packs) for node in sources}, after[made[leaf]]
        if now is None or not {_name(node, packs) for node in now} <= known:
            found[leaf] = [node for node in lifted.graph.nodes if node in sources]
    return found


def _name(node: Node, packs: Packs) -> str:
    """Of an input, or of what holds a weight: its pack, where it has one."""
    if node.op == "placeholder":
        return f"input {node.name}"
    name = str(node.target)
    return packs.where[name][0].name if name in packs.where else name


def _reached(graph: torch.fx.Graph, is_trained: Callable[[Node], bool | None]) -> dict[Node, Sources]:
    """Of every node, what a gradient of it could reach. ``is_trained``: of a ``get_attr``; None where it is no parameter."""
    found: dict[Node, Sources] = {}
    for node in graph.nodes:
        if _cuts(node):
            found[node] = frozenset()
        elif node.op == "placeholder":
            found[node] = frozenset((node,))
        elif node.op == "get_attr":
            trained = is_trained(node)
            found[node] = None if trained else frozenset() if trained is None else frozenset((node,))
        elif node.op == "call_module":
            found[node] = None  # whatever it holds
        else:
            found[node] = _union(found[operand] for operand in node.all_input_nodes)
    return found


def _union(parts: Iterable[Sources]) -> Sources:
    whole: frozenset[Node] = frozenset()
    for part in parts:
        if part is None:
            return None
        whole = whole if part <= whole else part if whole <= part else whole | part
    return whole


def _cuts(node: Node) -> bool:
    """Does no gradient go through it?"""
    target: Any = node.target
    name = target.name if isinstance(target, Op) else target if node.op == "call_method" else getattr(target, "__name__", "")
    value = node.meta.get("val")
    dtype = node.meta.get("dtype") or getattr(value, "dtype", None)
    if name == "size" or name.startswith("size_") or isinstance(value, (int, float)):  # a number
        return True
    return name == "detach" or (dtype is not None and not dtype.is_floating_point and not dtype.is_complex)
