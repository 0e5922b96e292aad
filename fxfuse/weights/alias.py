"""Packs that share memory with the original Parameters, for optimizers that were built before fusing.

Comes in: a recipe and the places of its members, which stay registered Parameters. Goes out: ``AliasPack.tensor``, the packed
tensor, whose gradient reaches each Parameter as its slice. The members' data are views of one buffer, so that in-place
updates are seen without a copy; before every use it is checked that they still are, and where not, they are packed anew.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxfuse.errors import FxfuseError
from fxfuse.graph import Recipe
from fxfuse.models.unregistered import Held
from fxfuse.private.storages import own_memory

from .recipes import lane_view, lane_views, pack

_binding = threading.RLock()


class StaleAlias(FxfuseError):
    """The members of a pack no longer agree in shape, dtype or device; the region answers through its loop."""


def _lie(members: Sequence[Tensor]) -> list[Any]:
    """Where and how the members lie in memory: ``p.data = p.data.t()`` of a square weight, or ``.conj()``, stays at its address."""
    lazy = map(Tensor.is_conj, members) if members[0].is_complex() else ()
    return [*map(Tensor.data_ptr, members), *map(Tensor.stride, members), *lazy]


class Alias(torch.autograd.Function):
    """The buffer as a function of the Parameters that are views of it: no copy forward, slices backward."""

    @staticmethod
    def forward(ctx: Any, buffer: Tensor, recipe: Recipe, *members: Tensor) -> Tensor:
        ctx.recipe = recipe
        return buffer.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *lane_views(ctx.recipe, grads[0]))


def in_own_parts(packed: Tensor) -> Tensor:
    """The pack, whose gradient becomes its members' in parts: these keep the memory, which must be nobody else's. Two packs that are added
    have one gradient, and a pack that is returned has its caller's.
    """
    if packed.requires_grad:
        packed.register_hook(own_memory)  # type: ignore[no-untyped-call]
    return packed


def with_own_gradient(packed: Tensor) -> Tensor:
    """The same where it is traced: times one, whose backward makes a tensor of its own. Inductor takes out what is known as a copy, also
    where two of its results are one then.

    >>> first, second = (torch.zeros(2, requires_grad=True) for _ in range(2))
    >>> sum(with_own_gradient(torch.stack([one])) for one in (first, second)).sum().backward()
    >>> first.grad.data_ptr() == second.grad.data_ptr()
    False
    """
    return packed * 1


@dataclass(eq=False)
class AliasPack:
    """One packed tensor whose members stay Parameters (or buffers) of their modules."""

    recipe: Recipe
    places: list[tuple[nn.Module, str]]  # the owner and the name of each member
    # The buffer, and where the members lay in memory when they were packed: one value, which other threads read whole.
    bound: tuple[Tensor, list[Any]] | None = None
    written: bool = False  # a program updates it: running statistics
    held: Held | None = None  # the plain lists and dicts in which owners are

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "bound": None}  # a copy's members lie apart: packed at its first call

    def members(self) -> list[Tensor]:
        """The members as they are registered now."""
        store = "_parameters" if self.recipe.kind == "parameter" else "_buffers"
        return [getattr(owner, store)[name] for owner, name in self.places]

    @property
    def tensor(self) -> Tensor:
        """The packed tensor, of the current values. Raises ``StaleAlias`` where the members do not fit together."""
        if self.held is not None and self.held.changed():
            raise StaleAlias(f"a module was replaced, added or removed in the plain {next(iter(self.held.attributes))}")
        members = self.members()
        if torch.compiler.is_compiling():  # a traced graph cannot look at addresses: it packs at every call
            if self.written:
                raise StaleAlias(f"{self.recipe.name} is updated, and a traced call would update a copy of it")
            return with_own_gradient(pack(self.recipe, members)) if self.recipe.kind == "parameter" else pack(self.recipe, members)
        bound = self.bound
        if bound is None or _lie(members) != bound[1]:
            with _binding:
                members, bound = self.members(), self.bound
                if bound is None or _lie(members) != bound[1]:  # no other thread has done it meanwhile
                    bound = self.bind(members)
        buffer = bound[0]
        if torch.is_grad_enabled() and self.recipe.kind == "parameter":
            return in_own_parts(Alias.apply(buffer, self.recipe, *members))  # type: ignore[no-untyped-call]
        return buffer

    def lies_in(self, buffer: Tensor) -> None:
        """The members' data are views of ``buffer``, each at its place."""
        self.bound = buffer, _lie(self.members())

    def bind(self, members: Sequence[Tensor]) -> tuple[Tensor, list[Any]]:
        """Pack the members' current values and make their data views of the pack."""
        first = members[0]
        for index, (name, member) in enumerate(zip(self.recipe.members, members, strict=True)):
            if tuple(member.shape) != self.recipe.member_shape(index):
                raise StaleAlias(f"{name} has shape {tuple(member.shape)}, packed as {self.recipe.member_shape(index)}")
            if member.dtype is not first.dtype:
                raise StaleAlias(f"{name} has dtype {member.dtype}, {self.recipe.members[0]} has {first.dtype}")
            if member.device != first.device:
                raise StaleAlias(f"{name} is on {member.device}, {self.recipe.members[0]} on {first.device}")
        if len(set(map(id, members))) < len(members):
            raise StaleAlias(f"two members of {self.recipe.name} are one tensor now")
        with torch.no_grad():
            buffer = pack(self.recipe, [member.detach() for member in members])
            for index, member in enumerate(members):
                member.data = lane_view(self.recipe, buffer, index)
        self.bound = buffer, _lie(members)
        return self.bound
