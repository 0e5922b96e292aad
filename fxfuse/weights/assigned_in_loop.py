"""Buffers of lanes that the original forward assigns while it runs over the pack.

Comes in: what is assigned to a lane's slot, within ``assigned_apart``. Goes out: as in the original, the name stands for that very tensor
until the call is over, and the memory of the one before stays as it is: a backward pass may need it. Afterwards the numbers are in the
pack, which is a new tensor then, of the dtype that it had, without a history.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxfuse.models.sharded import is_sharded

from .recipes import lane_view

if TYPE_CHECKING:
    from .lane import Slot

_thread = threading.local()  # .assigned: by the slot's id, the slot and the tensor; None outside of such a call


def assigned_to(slot: Slot) -> Tensor | None:
    """What the call in progress has assigned to this slot, if anything."""
    found: dict[int, tuple[Slot, Tensor]] | None = getattr(_thread, "assigned", None)
    return found[id(slot)][1] if found and id(slot) in found else None


def assign_apart(slot: Slot, value: Tensor) -> bool:
    """Keep ``value`` apart from the pack until the call in progress is over. False where there is none, or the pack is divided."""
    found: dict[int, tuple[Slot, Tensor]] | None = getattr(_thread, "assigned", None)
    if found is None or is_sharded(slot.packed()) or torch.compiler.is_compiling():
        return False
    found[id(slot)] = slot, value
    return True


@contextmanager
def assigned_apart() -> Iterator[None]:
    """Within, on this thread, what is assigned to packed buffers is kept apart; afterwards it is in new packs."""
    if getattr(_thread, "assigned", None) is not None:
        yield
        return
    found: dict[int, tuple[Slot, Tensor]] = {}
    _thread.assigned = found
    try:
        yield
    finally:
        _thread.assigned = None
        _into_packs(list(found.values()))


def _into_packs(assigned: list[tuple[Slot, Tensor]]) -> None:
    made: dict[tuple[int, str], Tensor] = {}
    with torch.no_grad():
        for slot, value in assigned:
            key = id(slot.owner), slot.name
            if key not in made:
                made[key] = slot.packed().detach().clone()
            lane_view(slot.recipe, made[key], slot.index).copy_(value)
        for slot, _ in assigned:
            key = id(slot.owner), slot.name
            if key in made:
                getattr(slot.owner, slot.store)[slot.name] = made.pop(key)
