"""Tensors that lie side by side in one piece of memory, as members of a pack of ours do.

Comes in: tensors, or a copy of a model to record on. Goes out: the same, each in memory of its own where they do not overlap. To the
recorder tensors of one memory are views of each other, of which a write to one changes the others.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor, nn

from fxfuse.private.storages import holders, storage_key

from .module_tree import all_modules
from .undo import Undo


def side_by_side(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """The tensors that share memory without one overlapping another, memory by memory.

    >>> memory = torch.zeros(4)
    >>> [len(found) for found in side_by_side([memory[:2], memory[2:], torch.zeros(1)])], side_by_side([memory[:3], memory[2:]])
    ([2], [])
    """
    shared: dict[int, list[Tensor]] = {}
    for tensor in tensors:
        if type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and tensor.is_contiguous():
            shared.setdefault(storage_key(tensor.untyped_storage()), []).append(tensor)
    found: list[list[Tensor]] = []
    for group in shared.values():
        ends = sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in group)
        if len(group) > 1 and all(end <= start for (_, end), (start, _) in pairwise(ends)):
            found.append(group)
    return found


def apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by name, copies in place of those that lie side by side."""
    beside = {id(tensor): tensor for group in side_by_side({id(t): t for t in tensors.values()}.values()) for tensor in group}
    copies = {key: copy.deepcopy(tensor) for key, tensor in beside.items()}
    return {name: copies.get(id(tensor), tensor) for name, tensor in tensors.items()}


def move_buffers_apart(model: nn.Module) -> None:
    """Move buffers that lie side by side, and whose memory nobody else holds, each to memory of its own. Who holds them still does."""
    buffers = {id(tensor): tensor for module in all_modules(model) for tensor in module._buffers.values() if tensor is not None}
    move_apart(buffers.values())


def move_apart(tensors: Iterable[Tensor], undo: Undo | None = None) -> None:
    """The same for these. ``undo`` is given the way back."""
    for group in side_by_side(tensors):
        if holders(group[0]) == len(group) and all(tensor.is_leaf for tensor in group):
            if undo is not None:
                undo.keep_data(group)
            with torch.inference_mode(False), torch.no_grad():
                for tensor in group:
                    tensor.data = tensor.detach().clone()
