"""Lanes merged with the channels, ``[N, G * C, ...]``: the layout of normalization with one scale per channel."""

from __future__ import annotations

import torch

from ..bundle import Bundle, Node
from ..emit import Emitter
from ..writer import Packed


def merged(emitter: Emitter, value: Packed, lanes: int) -> Node:
    """``[N, C, ...]`` of all lanes as ``[N, G * C, ...]``; a shared value is repeated."""
    if value.dim is None:
        node = emitter.call(torch.unsqueeze, value.node, 1)
        rest = len(node.meta["val"].shape) - 2
        node = emitter.call("expand", node, -1, lanes, *([-1] * rest))
    else:
        node = emitter.at(value, 1)
    return emitter.call(torch.flatten, node, 1, 2)


def parted(emitter: Emitter, node: Node, lanes: int) -> Packed:
    """The lanes taken out of the channels again: the inverse of ``merged``."""
    return Packed(emitter.call(torch.unflatten, node, 1, (lanes, -1)), 1)


def per_channel(emitter: Emitter, bundle: Bundle, name: str) -> Node | None:
    """The lanes' ``[C]`` as one ``[G * C]``; None where the argument is left out."""
    nodes = emitter.nodes(bundle, name)
    if nodes is None:
        return None
    packed = emitter.weights(nodes, None, "cat")
    if packed is not None:
        return packed.node
    return emitter.call(torch.flatten, emitter.front(emitter.operand(bundle, name), len(bundle.members)), 0, 1)


def all_shared(bundle: Bundle, *names: str) -> bool:
    """True where each of these arguments is one tensor for all lanes, or left out."""
    assert bundle.op is not None
    columns = [bundle.op.names.index(name) for name in names]
    return all(member.args[c] is bundle.members[0].args[c] for c in columns for member in bundle.members)
