"""State dicts of optimizers in the original's layout: what goes into a checkpoint that a program without fxfuse shall read, and back.

Comes in: an optimizer over the Parameters of a model, fused or not. Goes out: what ``state_dict()`` of the same optimizer over the original
would give, and the optimizer with such a state. Torch's state dicts go by places: a packed one fits no other layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxfuse.errors import ArgumentError, OptimizerError
from fxfuse.models.live_optimizers import unwrapped
from fxfuse.models.sharded import is_sharded

from .migrate import Collected, again, check_optimizer, collect, collect_from, place, put
from .places import Place, places


def original_optimizer_state_dict(optimizer: Any, model: nn.Module) -> dict[str, Any]:
    """The ``state_dict()`` that the optimizer would have over the original of ``model``: copies, by the original's places.

    An optimizer that was migrated keeps the places that the original's Parameters had in their groups; for one that was built from
    ``fused.parameters()`` they are in the original's order, as ``model.parameters()`` gives them. Errors as of ``migrate_optimizer``.

    >>> layer = nn.Linear(2, 3)
    >>> import torch
    >>> original_optimizer_state_dict(torch.optim.SGD(layer.parameters(), 0.1), layer)["param_groups"][0]["params"]
    [0, 1]
    """
    check_optimizer(optimizer)
    stand_in, _ = _over_the_original(unwrapped(optimizer), model, collect(optimizer, model))
    saved: dict[str, Any] = stand_in.state_dict()
    for number, each in saved["state"].items():
        saved["state"][number] = {key: value.contiguous() if isinstance(value, Tensor) else value for key, value in each.items()}
    return saved


def load_original_optimizer_state_dict(optimizer: Any, model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Load the state dict of an optimizer over the original into one over ``model``, as ``optimizer.load_state_dict`` would there.

    Lanes whose states differ in count of steps get packs of their own. Raises ``OptimizerError`` where the groups do not fit, or a state is
    of another shape than its parameter; nothing is changed then.

    >>> layer = nn.Linear(2, 3)
    >>> import torch
    >>> optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    >>> load_original_optimizer_state_dict(optimizer, layer, original_optimizer_state_dict(optimizer, layer))
    """
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        raise ArgumentError("state_dict must be what optimizer.state_dict() gives, with 'state' and 'param_groups'")
    check_optimizer(optimizer)
    ours = unwrapped(optimizer)
    collected = collect(ours, model)
    stand_in, stand_ins = _over_the_original(ours, model, collected)
    try:
        stand_in.load_state_dict(dict(state_dict))
    except ValueError as error:
        raise OptimizerError(f"the state dict is not one of a {type(ours).__name__} over the original of this model: {error}") from error
    loaded = collect_from(stand_in, stand_ins)
    loaded.holders, loaded.others = collected.holders, collected.others
    for name, member in loaded.members.items():
        member.order = collected.members[name].order
    foreign = [p for group in ours.param_groups for p in group["params"] if id(p) in collected.others]
    place(loaded, ours, model)
    for group, options in zip(ours.param_groups, stand_in.param_groups, strict=True):
        group.update({key: value for key, value in options.items() if key not in ("params", "param_names")})
    for parameter in foreign:
        if parameter in stand_in.state:
            ours.state[parameter] = stand_in.state[parameter]
        else:
            ours.state.pop(parameter, None)


def _over_the_original(optimizer: Any, model: nn.Module, collected: Collected) -> tuple[Any, dict[str, Place]]:
    """The same optimizer over stand-ins: Parameters of the original's shapes, which share the memory of the lanes."""
    made = {name: Place(_stand_in(where)) for name, where in places(model).items()}
    result = again(optimizer)
    put(collected, result, made, {id(where.holder): name for name, where in made.items()})
    return result, made


def _stand_in(where: Place) -> nn.Parameter:
    if where.recipe is not None and is_sharded(where.holder):  # it has the shape, which is all that is asked
        made = torch.empty(where.shape, dtype=where.holder.dtype, device=where.holder.device)
        return nn.Parameter(made, requires_grad=where.holder.requires_grad)
    return nn.Parameter(where.of(where.holder.detach()), requires_grad=where.holder.requires_grad)


@dataclass
class Written:
    """What makes an optimizer write and read the original's layout, until it is removed."""

    model: nn.Module
    handles: list[Any]
    busy: bool = False

    @staticmethod
    def by(optimizer: Any, model: nn.Module) -> Written:
        """From here on ``optimizer.state_dict()`` is of the original's layout, and ``load_state_dict`` takes either."""
        ours = unwrapped(optimizer)
        written = Written(model, [])
        written.handles = [
            ours.register_state_dict_post_hook(written.saved),
            ours.register_load_state_dict_pre_hook(written.loaded),
        ]
        return written

    def remove(self) -> None:
        """The optimizer is as it was."""
        for handle in self.handles:
            handle.remove()

    def saved(self, optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any] | None:
        """Torch's hook after ``state_dict()``."""
        return None if self.busy or not self._holds(optimizer) else original_optimizer_state_dict(optimizer, self.model)

    def loaded(self, optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any] | None:
        """Torch's hook before ``load_state_dict()``."""
        if self.busy or not self._holds(optimizer) or _sizes(state_dict) == [len(group["params"]) for group in optimizer.param_groups]:
            return None
        load_original_optimizer_state_dict(optimizer, self.model, state_dict)
        self.busy = True
        try:
            now: dict[str, Any] = optimizer.state_dict()
        finally:
            self.busy = False
        return now

    def _holds(self, optimizer: Any) -> bool:
        """Not any more where the optimizer went over to another model."""
        held = {id(where.holder) for where in places(self.model).values()}
        return any(id(p) in held for group in optimizer.param_groups for p in group["params"])


def _sizes(state_dict: Any) -> list[int]:
    return [len(group["params"]) for group in state_dict["param_groups"]]
