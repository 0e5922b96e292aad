"""Lanes folded into the batch: for ops that treat every row of dim 0 alike and share their weights."""

from __future__ import annotations

import torch

from ..bundle import Node
from ..emit import Emitter
from ..writer import Packed


def fold(emitter: Emitter, value: Packed) -> tuple[Node, int]:
    """``[G, N, ...] -> [G * N, ...]`` or ``[N, G, ...] -> [N * G, ...]``, whichever is a view; and where the lanes were (0 or 1)."""
    assert value.dim is not None
    tensor = value.node.meta["val"]
    for place in ((0, 1) if value.dim == 0 else (1, 0)):
        moved = torch.movedim(tensor, value.dim, place)
        if moved.stride(0) == moved.stride(1) * moved.shape[1]:
            break
    else:
        place = 0 if value.dim == 0 else 1
    return emitter.call(torch.flatten, emitter.at(value, place), 0, 1), place


def unfold(emitter: Emitter, node: Node, place: int, lanes: int) -> Packed:
    """The lanes taken out of the batch again: the inverse of ``fold``."""
    return Packed(emitter.call(torch.unflatten, node, 0, (-1, lanes) if place else (lanes, -1)), place)
