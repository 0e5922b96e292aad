"""Where every parameter of the original lies: by its name, the Parameter that holds it.

Comes in: a model, fused or not. Goes out: ``{original name: Place}``, in the original's order; a tied parameter once, by its first name.
Those of modules in plain lists and dicts, which no module registers, come last, by the way to them (``nets.0.weight``).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from fxfuse.graph import Recipe
from fxfuse.models.unregistered import hidden_parameters, unregistered
from fxfuse.running.region import RegionState
from fxfuse.weights.lane import LaneInfo, Slot, lane_info
from fxfuse.weights.packing import each_parameter
from fxfuse.weights.recipes import lane_view


@dataclass(frozen=True)
class Place:
    """A parameter of the original: all of ``holder``, or lane ``index`` of it."""

    holder: Tensor
    recipe: Recipe | None = None
    index: int = 0
    state: RegionState | None = None  # of the region whose pack it is

    def of(self, tensor: Tensor) -> Tensor:
        """This parameter's share of a tensor that is shaped as the holder: a view."""
        return tensor if self.recipe is None else lane_view(self.recipe, tensor, self.index)

    @property
    def shape(self) -> tuple[int, ...]:
        """As the original has it."""
        return tuple(self.holder.shape) if self.recipe is None else self.recipe.member_shape(self.index)


def places(model: nn.Module) -> dict[str, Place]:
    """Every parameter of the original.

    >>> [place.shape for place in places(nn.Linear(2, 3)).values()]
    [(3, 2), (3,)]
    """
    states: dict[int, RegionState] = {}
    for module in model.modules():
        info: LaneInfo | None = lane_info(module)
        for slot in info.slots.values() if info is not None else ():
            if isinstance(info, LaneInfo) and isinstance(info.watch, RegionState):
                states[id(slot)] = info.watch
    found: dict[str, Place] = {}
    for name, value in each_parameter(model):
        if not isinstance(value, Slot):
            found[name] = Place(value)
        elif value.recipe.kind == "parameter":
            found[name] = Place(value.packed(), value.recipe, value.index, states[id(value)])
    # These are never packed: a fused model keeps them, as views of one buffer.
    for name, value in hidden_parameters(model, unregistered(model)).items():
        found.setdefault(name, Place(value))
    return found
