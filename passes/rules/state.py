"""Buffers that lanes update in place, packed: what the rules of running statistics share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fxfuse.functional import slice_along

from ..bundle import Bundle, Node
from ..emit import Emitter
from ..writer import CannotVectorize, Packed
from .base import rule


def state(emitter: Emitter, bundle: Bundle, name: str, in_front: bool = False, said: str = "") -> Node:
    """The lanes' own buffers as one packed buffer (channels of all lanes in one dim), or a slice of it, that may be written in place.

    ``in_front``: as ``[G, ...]`` instead. ``said``: what is done to them, where that is not "updates its ``name``".
    """
    nodes = emitter.nodes(bundle, name)
    assert nodes is not None
    packed = emitter.weights(nodes, None, "cat" if nodes[0].meta["shape"] and not in_front else "stack")
    if packed is not None and _is_view(packed.node, (torch.unflatten, torch.permute if in_front else torch.flatten)):
        return packed.node
    reasons = [emitter.packs.unpackable[str(n.target)] for n in nodes if str(n.target) in emitter.packs.unpackable]
    why = reasons[0] if reasons else "it is no buffer of its own in each lane"
    owner = nodes[0].meta.get("path") or ("the model" if said else bundle.name)
    raise CannotVectorize(f"{owner} {said or f'updates its {name}'}, which cannot be packed: {why}")


def _is_view(node: Node, views: tuple[Callable[..., Any], ...]) -> bool:
    """Does this read a packed buffer, or a run of lanes of it, without a copy? ``views``: what copies nothing."""
    while node.op != "get_attr":
        if (node.target is slice_along and node.args[4] == 1) or node.target in views:
            assert isinstance(node.args[0], Node)
            node = node.args[0]
        else:
            return False
    return True


def update(emitter: Emitter, func: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> Node:
    """A call that writes buffers: it stays in the graph whether or not its result is read."""
    node = emitter.call(func, *args, **kwargs)
    node.meta["update"] = True
    return node


@rule("add_", view=True)  # as little as a view: counters alone make no loop
def _count(emitter: Emitter, bundle: Bundle) -> Packed:
    if bundle.members[0].meta["shape"] != ():
        raise CannotVectorize("a counter that is no single number")
    return Packed(update(emitter, "add_", state(emitter, bundle, "input"), emitter.operand(bundle, "other")), 0)


@rule("copy_")
def _renewed(emitter: Emitter, bundle: Bundle) -> Packed:
    """The last values of the lanes' own buffers, when all that reads them has run."""
    held = state(emitter, bundle, "input", in_front=True, said="writes a buffer")
    value = emitter.operand(bundle, "src")
    return Packed(update(emitter, "copy_", held, value.node if value.dim is None else emitter.front(value, len(bundle.members))), 0)
