"""A part of what was joined is the part: ``stack([a, b])[0]``, ``cat([a, b], -1)[..., :width_of_a]``.

Comes in: an emitted graph with meta tensors. Goes out: the same graph, in place, where such a part is read from where it came from, so that
the join goes if nobody else reads it. (The final states of both directions of a recurrence are joined by its rule, and taken apart by the
model.) What leaves the graph as a view stays: results must not come to share memory.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
import torch.fx

from fxfuse.functional import slice_along
from fxfuse.private.storages import storage_key

from .recurrent import OVER_TIME

Node = torch.fx.Node
# These return what they were given where it lies as they want it.
_MAYBE_VIEWS = frozenset({"contiguous", "reshape", "to", torch.reshape, torch.flatten})


def read_parts(graph: torch.fx.Graph) -> None:
    """Read parts of ``stack`` and ``cat`` where they came from, in place."""
    for node in list(graph.nodes):
        part = _part(node)
        if part is not None and not leaves_as_view(node):
            node.replace_all_uses_with(part)


def leaves_as_view(node: Node) -> bool:
    """Whether a result of the graph may lie in the memory of ``node``."""
    seen, pending = {node}, [node]
    while pending:
        at = pending.pop()
        for user in at.users:
            if user.op == "output":
                return True
            if user not in seen and (user.target in _MAYBE_VIEWS or _share(at, user)):
                seen.add(user)
                pending.append(user)
    return False


def _share(one: Node, other: Node) -> bool:
    """Whether two values lie in one memory; True where that is not known."""
    memory = [set(_storages(node.meta.get("val"))) for node in (one, other)]
    return not all(memory) or bool(memory[0] & memory[1])


def _storages(value: Any) -> Iterable[int]:
    if isinstance(value, torch.Tensor):
        yield storage_key(value.untyped_storage())
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _storages(each)
    elif isinstance(value, int):
        yield -id(value) - 1  # a size is in nobody's memory


def _part(node: Node) -> Node | None:
    if node.op != "call_function" or node.kwargs or not node.args or not isinstance(node.args[0], Node):
        return None
    joined: Any = node.args[0]
    if joined.op != "call_function" or joined.kwargs or joined.target not in (torch.stack, torch.cat) or "val" not in joined.meta:
        return None
    parts, rank = list(joined.args[0]), joined.meta["val"].dim()
    along = (joined.args[1] if len(joined.args) > 1 else 0) % rank
    if len({part.meta["val"].dtype for part in parts}) > 1:
        return None
    dim: Any = node.args[1] if len(node.args) > 1 else None
    if type(dim) is not int or dim % rank != along:
        return None
    if node.target is torch.select and joined.target is torch.stack and type(node.args[2]) is int:
        return parts[node.args[2]]  # type: ignore[no-any-return]
    if node.target is slice_along and joined.target is torch.cat and node.args[4:] == (1,):
        if along != rank - 1 or not all(_is_state(part) for part in parts):
            return None
        begin = 0
        for part in parts:
            width = part.meta["val"].shape[along]
            if node.args[2:4] == (begin, begin + width):
                return part  # type: ignore[no-any-return]
            begin += width
    return None


def _is_state(node: Node) -> bool:
    """Whether these are states of a recurrence: their last size is that of its weights, whatever the sizes of the inputs."""
    while node.op == "call_function" and node.target in (torch.select, operator.getitem):
        node = node.args[0]  # type: ignore[assignment]
    return node.op == "call_function" and node.target in OVER_TIME
