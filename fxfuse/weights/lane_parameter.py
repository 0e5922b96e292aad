"""A lane's weight by itself, with its gradient.

Comes in: where the weight lies in a pack. Goes out: a view of it whose ``grad`` is a view of the pack's gradient, looked up at each read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxfuse.distributed.packs import whole
from fxfuse.errors import FxfuseError
from fxfuse.models.sharded import is_sharded
from fxfuse.private.torch_function import DisableTorchFunction

from .lane import Slot, divided
from .recipes import lane_view

# Methods that fill a tensor with random numbers.
_DRAWS = frozenset("normal_ uniform_ bernoulli_ exponential_ cauchy_ log_normal_ geometric_ random_".split())
_HOOKS = ("register_hook", "register_post_accumulate_grad_hook")


class LaneParameter(Tensor):
    """A differentiable view of a pack. What is computed from it is a plain tensor."""

    _fxfuse_slot: Slot

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        target = args[0] if args else kwargs.get("tensor")
        if isinstance(target, LaneParameter):
            if name == "requires_grad_" or (name == "__set__" and func.__self__.__name__ == "requires_grad"):
                with DisableTorchFunction():
                    as_it_is = (args[1] if len(args) > 1 else kwargs.get("requires_grad", True)) is target.requires_grad
                if as_it_is:
                    return target
                raise _alone(target)
            if name == "__set__" and func.__self__.__name__ == "data":
                return _data(target, args[1])
            if name in _HOOKS:
                return _hooked(target, name, *args[1:], *kwargs.values())
            init = getattr(func, "__module__", "") == "torch.nn.init"
            if (init or name in _DRAWS) and not target.is_contiguous() and (init or not torch.is_grad_enabled()):
                return _in_rows(target, func, args, kwargs)
        with DisableTorchFunction():
            return func(*args, **kwargs)

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


def _alone(lane: LaneParameter) -> FxfuseError:
    slot = lane._fxfuse_slot
    name = slot.recipe.members[slot.index]
    others = len(slot.recipe.members) - 1
    return FxfuseError(
        f"{name} is packed with {others} other lanes, and requires_grad of it alone cannot be set:"
        f" fxfuse.freeze(model, {name!r}) and fxfuse.unfreeze do that (with the name that it has in the whole model)"
    )


def _data(lane: LaneParameter, value: Any) -> None:
    """``lane.data = value``: a view cannot be pointed elsewhere, so the pack takes the numbers."""
    slot = lane._fxfuse_slot
    with DisableTorchFunction():
        if not isinstance(value, Tensor) or (value.shape, value.dtype, value.device) != (lane.shape, lane.dtype, lane.device):
            name = slot.recipe.members[slot.index]
            kind = f"{value.dtype} {list(value.shape)} on {value.device}" if isinstance(value, Tensor) else type(value).__name__
            said = f"{name} is packed with other lanes: its data stays {lane.dtype} {list(lane.shape)} on {lane.device}"
            raise FxfuseError(f"{said}, {kind} came; fxfuse.unfuse first")
        slot.view().detach().copy_(value.detach())


def _hooked(lane: LaneParameter, name: str, hook: Any) -> Any:
    """A hook of a weight becomes one of its pack, which shows it the lane's share."""
    slot = lane._fxfuse_slot
    packed = slot.packed()
    if is_sharded(packed):
        raise FxfuseError("a lane that is divided among processes takes no hooks")
    if name != "register_hook":
        return packed.register_post_accumulate_grad_hook(lambda _: hook(lane_parameter(slot)))  # type: ignore[no-untyped-call]

    def on_the_pack(gradient: Tensor) -> Tensor | None:
        returned = hook(lane_view(slot.recipe, gradient, slot.index))
        if returned is None:
            return None
        changed = gradient.clone()
        lane_view(slot.recipe, changed, slot.index).copy_(returned)
        return changed

    return packed.register_hook(on_the_pack)  # type: ignore[no-untyped-call]


def _in_rows(lane: LaneParameter, func: Any, args: Any, kwargs: Any) -> Any:
    """A call that fills a lane, as on the original's own tensor: random numbers are drawn in the order in which a tensor lies in memory."""
    own = lane.detach().clone(memory_format=torch.contiguous_format).requires_grad_(lane.requires_grad)
    args = tuple(own if arg is lane else arg for arg in args)
    func(*args, **{key: own if value is lane else value for key, value in kwargs.items()})
    with torch.no_grad():
        lane.copy_(own)
    return lane


def lane_parameter(slot: Slot) -> Tensor:
    """The parameter of a lane: of lanes that ``shard_lanes`` divided, gathered. Raises ``FxfuseError`` where FSDP2 cuts through them."""
    if is_sharded(slot.packed()) and not divided(slot.owner):
        name = slot.recipe.members[slot.index]
        raise FxfuseError(f"{name} is a lane of a pack that is sharded over processes, and has no view there: see original_state_dict")
    view = slot.view().as_subclass(LaneParameter)
    view._fxfuse_slot = slot
    return view
