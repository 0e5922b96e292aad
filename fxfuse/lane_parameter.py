"""A lane's weight by itself, with its gradient.

Comes in: where the weight lies in a pack. Goes out: a view of it whose ``grad`` is a view of the pack's gradient, looked up at each read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxfuse.distributed.packs import whole
from fxfuse.errors import FxfuseError
from fxfuse.lane import Slot, divided
from fxfuse.private.torch_function import DisableTorchFunction
from fxfuse.recipes import lane_view
from fxfuse.sharded import is_sharded


class LaneParameter(Tensor):
    """A differentiable view of a pack. What is computed from it is a plain tensor."""

    _fxfuse_slot: Slot

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with DisableTorchFunction():
            return func(*args, **(kwargs or {}))

    @property
    def grad(self) -> Tensor | None:
        """The lane's share of the pack's gradient, None without one."""
        slot = self._fxfuse_slot
        grad = slot.packed().grad
        return None if grad is None else lane_view(slot.recipe, whole(grad), slot.index)

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        slot = self._fxfuse_slot
        packed = slot.packed()
        if is_sharded(packed):
            raise FxfuseError("the gradient of a lane that is divided among processes cannot be set")
        if packed.grad is None and value is not None:
            packed.grad = torch.zeros_like(packed)
        if packed.grad is not None:
            share = lane_view(slot.recipe, packed.grad, slot.index)
            _ = share.zero_() if value is None else share.copy_(value)


def lane_parameter(slot: Slot) -> Tensor:
    """The parameter of a lane: of lanes that ``shard_lanes`` divided, gathered. Raises ``FxfuseError`` where FSDP2 cuts through them."""
    if is_sharded(slot.packed()) and not divided(slot.owner):
        name = slot.recipe.members[slot.index]
        raise FxfuseError(f"{name} is a lane of a pack that is sharded over processes, and has no view there: see original_state_dict")
    view = slot.view().as_subclass(LaneParameter)
    view._fxfuse_slot = slot
    return view
