"""Buffers that the original forward writes or assigns while it runs over the pack: each lane's a tensor of its own, as in the original.

Comes in: the reads and assignments of lanes' buffers, within ``own_buffers``. Goes out: to the forward, tensors apart from the pack, where
a write into one lane's is none into another's, an assigned tensor is that very tensor, and the one before stays what a backward may
need. Afterwards their numbers are in the pack, which is a new tensor then, of the dtype that it had, without a history.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxfuse.models.sharded import is_sharded

from .recipes import lane_view

if TYPE_CHECKING:
    from .lane import Slot


@dataclass
class _Call:
    """A call in progress: the packs that it may write, and the tensors that stand for lanes of them: tied lanes have one."""

    packs: frozenset[str]
    own: dict[tuple[int, str, int], tuple[Slot, Tensor]] = field(default_factory=dict)


_thread = threading.local()  # .call


def own_buffer(slot: Slot) -> Tensor | None:
    """What this slot's buffer is in the call in progress; None where that is the pack's."""
    call: _Call | None = getattr(_thread, "call", None)
    if call is None or slot.recipe.kind != "buffer":
        return None
    key = id(slot.owner), slot.name, slot.index
    if key not in call.own:
        if slot.recipe.name not in call.packs or is_sharded(slot.packed()):
            return None
        call.own[key] = slot, lane_view(slot.recipe, slot.packed().detach(), slot.index).clone()
    return call.own[key][1]


def assign_own(slot: Slot, value: Tensor) -> bool:
    """Let ``value`` be this slot's buffer until the call in progress is over. False where there is none, or the pack is divided."""
    call: _Call | None = getattr(_thread, "call", None)
    if call is None or is_sharded(slot.packed()) or torch.compiler.is_compiling():
        return False
    call.own[id(slot.owner), slot.name, slot.index] = slot, value
    return True


@contextmanager
def own_buffers(packs: frozenset[str]) -> Iterator[None]:
    """Within, on this thread, lanes of these packs are read as tensors of their own, and so is what is assigned; then new packs have it."""
    outer: _Call | None = getattr(_thread, "call", None)
    call = _thread.call = _Call(packs)
    try:
        yield
    finally:
        _thread.call = outer
        _into_packs(list(call.own.values()))


def _into_packs(own: list[tuple[Slot, Tensor]]) -> None:
    made: dict[tuple[int, str], Tensor] = {}
    with torch.no_grad():
        for slot, value in own:
            key = id(slot.owner), slot.name
            if key not in made:
                made[key] = slot.packed().detach().clone()
            lane_view(slot.recipe, made[key], slot.index).copy_(value)
    for slot, _ in own:
        key = id(slot.owner), slot.name
        if key in made:
            getattr(slot.owner, slot.store)[slot.name] = made.pop(key)
