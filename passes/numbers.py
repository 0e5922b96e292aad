"""Python numbers that differ from lane to lane: ``y * self.scales[i]``, ``y / (i + 1)``, ``y ** self.powers[i]``.

Comes in: the nodes of a graph. Goes out: which of them differ in nothing but numbers where the op takes a tensor as well; these are one
class, and the numbers become a small tensor. Only calls of one source line are taken together, and only where they are lanes: each on
data of its own, or each of at least three numbers once. ``y * 2 + y * 3`` is no loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.fx

from fxfuse.ops import Op

Node = torch.fx.Node

# Arguments that may be a number or a tensor, and mean the same as either; or of which the op's rule takes one for each lane.
_OTHER = ("other",)
TENSOR_TOO: dict[str, tuple[str, ...]] = {
    **dict.fromkeys("add sub mul div rsub __rdiv__ __rpow__ remainder fmod floor_divide eq ne lt le gt ge".split(), _OTHER),
    "pow": ("input", "exponent"), "float_power": ("exponent",), "lerp": ("weight",), "clamp": ("min", "max"), "clamp_min": ("min",),
    "clamp_max": ("max",), "where": ("input", "other"), "masked_fill": ("value",),
    **dict.fromkeys("dropout dropout1d dropout2d dropout3d feature_dropout".split(), ("p",)),
}  # fmt: skip


def numbers_of(node: Node) -> tuple[str, ...]:
    """The arguments of ``node`` that are numbers and may be tensors; empty where a tensor would not give the same result.

    A number takes part in type promotion only by its kind, a tensor of the operands' dtype not at all: these agree where the result has
    that dtype (or is a comparison).
    """
    op = node.target
    if not isinstance(op, Op) or op.name not in TENSOR_TOO:
        return ()
    given = dict(zip(op.names, node.args, strict=True))
    names = tuple(name for name in TENSOR_TOO[op.name] if type(given.get(name)) in (int, float))
    tensors = [n for n in node.all_input_nodes if n.meta.get("shape") is not None and n.meta.get("dtype") is not torch.bool]
    if not names or not tensors or len(node.all_input_nodes) != len({*tensors, *_masks(node)}):
        return ()
    dtypes = {n.meta["dtype"] for n in tensors}
    if len(dtypes) > 1 or node.meta.get("dtype") not in (*dtypes, torch.bool):
        return ()
    (dtype,) = dtypes
    if dtype in (torch.float32, torch.float64):
        return names
    integers = dtype is torch.int64 and op.name != "pow" and all(type(given[name]) is int and abs(given[name]) < 2**62 for name in names)  # type: ignore[arg-type, operator]
    return names if integers else ()


def _masks(node: Node) -> list[Node]:
    return [n for n in node.all_input_nodes if n.meta.get("dtype") is torch.bool]


def loosened(nodes: Iterable[Node], of: dict[Node, int], loose: set[Node], key: Callable[[Node], Any]) -> set[Node]:
    """Nodes that would be one class but for their numbers. ``key``: a node's key with its numbers erased; ``of``: the classes so far."""
    groups: dict[Any, list[Node]] = {}
    for node in nodes:
        if node not in loose and node.op == "call_function" and node.meta.get("place") is not None and numbers_of(node):
            groups.setdefault(key(node), []).append(node)
    candidates: list[list[Node]] = []
    for members in groups.values():
        classes = len({of[member] for member in members})
        own = len({tuple(member.all_input_nodes) for member in members}) == len(members)
        if classes > 1 and (own or (classes == len(members) and classes > 2)):
            candidates.append(members)
    # What reads them is looked at again when they are one class: only then can be seen which of it are lanes.
    later: set[Node] = {member for members in candidates for member in members} if candidates else set()
    above: set[Node] = set()
    for node in nodes if candidates else ():
        if any(n in above or n in later for n in node.all_input_nodes):
            above.add(node)
    return {member for members in candidates if not any(m in above for m in members) for member in members}
