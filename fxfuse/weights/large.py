"""Models whose weights should not be there twice.

Comes in: a model whose weights take more than ``LARGE`` bytes. Goes out: ``Moved``: packs into which its weights moved one lane at a
time, each lane's tensor a view of the pack from then on; ``twin``: the model's structure once more over the very same weights;
``sample``: which weights are small enough for their gradients to be compared. So a model is rewritten, compared and timed with hardly
more than its own memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fxfuse.errors import FxfuseError
from fxfuse.graph import Recipe
from fxfuse.models.copies import copy_with
from fxfuse.private.pytree import tree_map_only
from fxfuse.recording.trace import Trace

from .lane import Slot
from .packing import each_parameter
from .recipes import lane_view, packed_shape

M = TypeVar("M", bound=nn.Module)

LARGE = 1 << 28
# Of the bytes of all weights, so many may be gradients that are compared, and so many those of one tensor.
COMPARED = 0.05


def weight_bytes(model: nn.Module) -> int:
    """What the Parameters take; one that several modules hold counts once.

    >>> weight_bytes(nn.Linear(3, 2))
    32
    """
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters() if not is_lazy(parameter))


class Moved:
    """The packs of one model, by region and name."""

    def __init__(self) -> None:
        self.packs: dict[tuple[str, str], tuple[Recipe, Tensor]] = {}

    def pack(self, path: str, recipe: Recipe, members: Sequence[Tensor]) -> Tensor:
        """The members' values as one tensor. The first time they move there: their data become views of it, their own memory is freed.

        Raises ``FxfuseError`` before anything moves where the members' places would not tile the pack; what was moved is read back.
        """
        known = self.packs.get((path, recipe.name))
        if known is not None and known[0] == recipe:
            return known[1]
        first = members[0]
        packed = torch.empty(packed_shape(recipe), dtype=first.dtype, device=first.device)
        if not _tile([lane_view(recipe, packed, index) for index in range(len(members))], packed):
            raise FxfuseError(f"the members of {recipe.name} do not tile it")
        sums = [_sum(member) for member in members]
        with torch.no_grad():
            for index, member in enumerate(members):
                place = lane_view(recipe, packed, index)
                place.copy_(member.detach())
                member.data = place
        wrong = [name for name, before, member in zip(recipe.members, sums, members, strict=True) if _sum(member) != before]
        if wrong:
            raise FxfuseError(f"{', '.join(wrong[:3])} lost values while they moved to {recipe.name}")
        self.packs[path, recipe.name] = (recipe, packed)
        return packed


def _tile(places: list[Tensor], packed: Tensor) -> bool:
    """Has each place memory of its own, without gaps, and all of them the whole pack?"""
    end = 0
    for place in sorted(places, key=Tensor.storage_offset):
        extent = 1 + sum((size - 1) * stride for size, stride in zip(place.shape, place.stride(), strict=True))
        if place.storage_offset() != end or (place.numel() and extent != place.numel()):
            return False
        end += place.numel()
    return end == packed.numel()


def _sum(tensor: Tensor) -> int:
    """Of all bytes; a part at a time, since adding them up makes each a number of eight."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return sum(int(data[start : start + (1 << 20)].sum(dtype=torch.int64)) for start in range(0, data.numel(), 1 << 20))


def twin(model: M) -> M:
    """A copy of the model with Parameters of its own over the same memory; buffers and all else as in ``copies.sharing_copy``.

    >>> layer = nn.Linear(2, 2)
    >>> other = twin(layer)
    >>> other.weight is layer.weight, other.weight.data_ptr() == layer.weight.data_ptr()
    (False, True)
    """
    return copy_with(model, {id(p): nn.Parameter(p.data, requires_grad=p.requires_grad) for p in model.parameters()})


def without_history(trace: Trace) -> None:
    """Let go of the autograd graphs of a recorded run: they hold weights, as views, where these lay when it ran."""
    for value in trace.values:
        if value.origin == "made":
            value.tensor = value.tensor.detach()
    for frame in trace.frames:
        frame.raw = tree_map_only(Tensor, Tensor.detach, frame.raw)


def sample(original: nn.Module, fused: nn.Module) -> tuple[int, int]:
    """Of two twins, let only small tensors require gradients, the same ones in both. ``(how many, of how many)`` of the original's."""
    limit = COMPARED * weight_bytes(fused)
    total = 0.0
    for parameter in sorted(fused.parameters(), key=Tensor.numel):
        total += parameter.numel() * parameter.element_size()
        parameter.requires_grad_(parameter.requires_grad and total <= limit)
    names = [(name, value.packed() if isinstance(value, Slot) else value) for name, value in each_parameter(fused)]
    compared = {name for name, tensor in names if tensor.requires_grad}
    trained = 0
    for name, parameter in original.named_parameters():
        trained += parameter.requires_grad
        parameter.requires_grad_(parameter.requires_grad and name in compared)
    return len(compared), trained
