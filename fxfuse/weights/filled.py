"""Packs of members of unequal sizes that stay Parameters: each as it lay, one behind the other, and filled up at every call.

Comes in: a recipe that fills up its members, and at every call the members. Goes out: the packed tensor, gathered in one launch from the
buffer in which the members lie; its gradient is gathered in one launch, too, and reaches each member as its part. As parts of the packed
tensor itself the members would not be contiguous, and optimizers and tools flatten Parameters by ``view(-1)``; filled up one by one they
would take a launch each.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from fxfuse.graph import Recipe

from .recipes import pack
from .shared import Bound, SharedPack

# Elements of a packed tensor, of which the index takes four bytes each, twice; and of one member, where a launch each does not show.
LARGEST, LARGEST_MEMBER = 1 << 23, 1 << 16


def can_be_gathered(recipe: Recipe) -> bool:
    """Is an index of the pack small beside what it saves?"""
    sizes = [prod(recipe.member_shape(index)) for index in range(len(recipe.members))]
    return len(sizes) * max(sizes) <= LARGEST and sum(sizes) <= LARGEST_MEMBER * len(sizes)


class FilledPack(SharedPack):
    """One such pack. The buffer has a zero behind the members, which everything that is filled up reads."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.shapes = [recipe.member_shape(index) for index in range(len(recipe.members))]
        self.sizes = [*map(prod, self.shapes)]
        self.index: tuple[Tensor, Tensor, torch.Size] | None = None  # from the buffer to the pack, and back; the pack's shape

    def geometry(self) -> Any:
        return "filled", tuple(self.shapes)

    def joined(self, members: Sequence[Tensor]) -> Tensor:
        return torch.cat([*(member.reshape(-1) for member in members), members[0].new_zeros(1)])

    def place(self, buffer: Tensor, index: int) -> Tensor:
        start = sum(self.sizes[:index])
        return buffer[start : start + self.sizes[index]].view(self.shapes[index])

    def of(self, bound: Bound, members: Sequence[Tensor]) -> Tensor:
        if torch.is_grad_enabled():
            bound.writes.note(members)
            made: Tensor = _Gathered.apply(self, bound.buffer, *members)  # type: ignore[no-untyped-call]
            return made
        return self.gathered(bound.buffer)

    def gathered(self, buffer: Tensor) -> Tensor:
        """The packed tensor of what lies in the buffer."""
        there, _, shape = self._index_on(buffer.device)
        return buffer.index_select(0, there).view(shape)

    def parts(self, gradient: Tensor) -> list[Tensor]:
        """Of a gradient of the packed tensor, each member's."""
        _, back, _ = self._index_on(gradient.device)
        flat = gradient.reshape(-1).index_select(0, back)
        return [part.view(shape) for part, shape in zip(flat.split(self.sizes), self.shapes, strict=True)]  # type: ignore[no-untyped-call]

    def _index_on(self, device: torch.device) -> tuple[Tensor, Tensor, torch.Size]:
        known = self.index
        if known is None or known[0].device != device:
            with torch.inference_mode(False), torch.no_grad():
                known = self._made_index(device)
            if type(known[0]) is Tensor:  # a fake one is good for this call alone
                self.index = known
        return known

    def _made_index(self, device: torch.device) -> tuple[Tensor, Tensor, torch.Size]:
        total = sum(self.sizes)
        numbers = torch.arange(1, total + 1, device="cpu").split(self.sizes)  # type: ignore[no-untyped-call]
        packed = pack(self.recipe, [part.view(shape) for part, shape in zip(numbers, self.shapes, strict=True)])
        flat = packed.reshape(-1)
        real = flat.nonzero().view(-1)
        back = torch.empty(total, dtype=torch.int32, device="cpu")
        back[flat[real] - 1] = real.int()
        there = torch.where(flat == 0, total, flat - 1).int()
        return there.to(device), back.to(device), packed.shape


class _Gathered(torch.autograd.Function):
    """The packed tensor as a function of the members, which lie in the buffer."""

    @staticmethod
    def forward(ctx: Any, filled: FilledPack, buffer: Tensor, *members: Tensor) -> Tensor:
        ctx.filled = filled
        return filled.gathered(buffer)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *ctx.filled.parts(gradients[0]))
