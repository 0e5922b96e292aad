"""Packs that share memory with the original Parameters, for optimizers that were built before fusing.

Comes in: a recipe and the places of its members, which stay registered Parameters. Goes out: ``AliasPack.tensor``, the packed
tensor, whose gradient reaches each Parameter as its slice. The members' data are views of one buffer, each in its own order, so that
in-place updates are seen without a copy; before every use it is checked that they still are, and where not, they are packed anew. Members
that somebody else holds the memory of (a state dict, a flat vector, another process), or that lie in another order, stay where they are,
and are packed at every call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from fxfuse.errors import FxfuseError
from fxfuse.graph import Recipe
from fxfuse.models.undo import Undo
from fxfuse.models.unregistered import Held
from fxfuse.private.tensor_guards import alike
from fxfuse.private.transforms import in_dual_level, of_a_transform, transforming

from .filled import FilledPack, can_be_gathered
from .large import Moved
from .late_writes import Writes
from .own_gradients import in_own_parts, in_rows, with_own_gradient
from .recipes import pack
from .shared import Bound, SharedPack, lie_in_rows, memory_form, why_fixed


class StaleAlias(FxfuseError):
    """The members of a pack no longer agree in shape, dtype or device; the region answers through its loop."""


@dataclass(eq=False)
class _Lying:
    """Where and how members lay when they were last looked at, and the packed tensor, as programs read it."""

    bound: Bound
    packed: Tensor | None  # None where it is made at every call
    asks: list[Callable[..., bool]]  # do they lie so still? Each knows of one mode of torch, and who requires gradients

    def still(self, members: Sequence[Tensor]) -> bool:
        """Are these members where they were? ``p.data = p.data.t()``, ``p.data[:2]`` and ``.conj()`` begin there, too."""
        return self.bound.begin(members) and (self.asks[-1](*members) or self._otherwise(members))

    def _otherwise(self, members: Sequence[Tensor]) -> bool:
        if not any(ask(*members) for ask in self.asks):
            if not self.bound.holds(members):
                return False
            self.asks = [*self.asks[-3:], alike(members, strides=True)]
        return True


@dataclass(eq=False)
class AliasPack:
    """One packed tensor whose members stay Parameters (or buffers) of their modules."""

    recipe: Recipe
    places: list[tuple[nn.Module, str]]  # the owner and the name of each member
    written: bool = False  # a program updates it: running statistics
    held: Held | None = None  # the plain lists and dicts in which owners are
    shared: SharedPack = field(init=False)  # in which the members lie
    whole: bool = field(init=False)  # each as it lay
    lying: _Lying | None = None
    readers: WeakSet[Callable[[bool], None]] = field(default_factory=WeakSet)  # each keeps views of the pack, or (False) lets go of them

    def __post_init__(self) -> None:
        form = memory_form(self.recipe)
        whole = lie_in_rows(form) or self.recipe.kind == "buffer"  # nobody flattens buffers
        self.shared = FilledPack(self.recipe) if not whole and can_be_gathered(self.recipe) else SharedPack(form)
        self.whole = whole or isinstance(self.shared, FilledPack)

    def __getstate__(self) -> dict[str, Any]:
        # A copy's members lie apart: packed at its first call.
        return {**self.__dict__, "shared": None, "lying": None, "readers": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, readers=WeakSet())
        self.__post_init__()

    def members(self) -> list[Tensor]:
        """The members as they are registered now."""
        store = "_parameters" if self.recipe.kind == "parameter" else "_buffers"
        try:
            return [getattr(owner, store)[name] for owner, name in self.places]
        except KeyError as gone:
            raise StaleAlias(f"{gone} of a lane is no {self.recipe.kind} any more") from None

    def settle(self, undo: Undo, moved: Moved | None, path: str) -> None:
        """Let the members lie in one buffer from now on, if they may. ``moved``: the packs into which large models move, by region."""
        members = self.members()
        self._fit(members)
        free = self.whole and why_fixed(members) is None  # asked first: ``undo`` holds their memory
        undo.keep_data(members)
        if moved is not None and self.recipe.kind == "parameter":
            self.shared.adopt(moved.pack(path, self.shared.recipe, members), members)
        elif free:
            self.shared.move(members)

    def settle_at_next_call(self) -> None:
        """Ask again then whether the members may move: who held their memory may be gone."""
        self.shared.refused = 0

    def let_go(self) -> None:
        """Hold the members' memory no longer; it is found again at the next call."""
        self.lying = None
        self.shared.known.clear()
        for hold in [*self.readers]:
            hold(False)

    @property
    def tensor(self) -> Tensor:
        """The packed tensor, of the current values. Raises ``StaleAlias`` where the members do not fit together."""
        if self.held is not None and self.held.changed():
            raise StaleAlias(f"a module was replaced, added or removed in the plain {next(iter(self.held.attributes))}")
        members = self.members()
        # A traced graph cannot look at addresses: it packs at every call.
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
            return self._packed_as_traced(members)
        if (transforming() or in_dual_level()) and (self.recipe.kind == "parameter" or any(map(of_a_transform, members))):
            return self._packed_as_traced(members)  # what autograd records is not all that is recorded
        if transforming() and not (self.lying is not None and self.lying.still(members)):
            return self._packed_as_traced(members)  # within a transform nobody can tell who holds their memory
        lying = self._where(members)
        if lying is None:
            return in_rows(in_own_parts(pack(self.recipe, members)))
        if lying.packed is None:
            return self.shared.of(lying.bound, members)
        if torch.is_grad_enabled() and self.recipe.kind == "parameter":
            return self._in_order(in_rows(self.shared.of(lying.bound, members)))
        return lying.packed

    def watched(self) -> list[tuple[Writes, list[Tensor]]]:
        """What a backward from the pack has to ask of, to know what was written to the members since: nothing, or one pair."""
        lying = self.lying  # another thread may be looking, too
        return [] if lying is None or transforming() or in_dual_level() else [(lying.bound.writes, self.members())]

    def _where(self, members: list[Tensor]) -> _Lying | None:
        """Where the members lie, moved there if need be; None where they may not."""
        last = self.lying
        with suppress(TypeError):  # of None
            if last is not None and last.still(members):
                return last
        self._fit(members)
        self.lying = None
        for hold in [*self.readers]:  # views that are kept for later calls
            hold(False)
        bound = self.shared.bind(members) if self.whole else None
        if bound is None and self.written:
            why = why_fixed(members) or "some lie apart"
            raise StaleAlias(f"{self.recipe.name} is updated, and its members must stay where they are: {why}")
        if bound is None:
            return None
        packed = None if isinstance(self.shared, FilledPack) else self._in_order(bound.buffer)
        lying = self.lying = _Lying(bound, packed, [alike(members, strides=True)])
        return lying

    def _packed_as_traced(self, members: list[Tensor]) -> Tensor:
        if self.written:
            raise StaleAlias(f"{self.recipe.name} is updated, and a traced call would update a copy of it")
        self._fit(members)
        packed = pack(self.recipe, members)
        return with_own_gradient(packed) if self.recipe.kind == "parameter" else packed

    def _in_order(self, memory: Tensor) -> Tensor:
        """The tensor that programs read, of the one whose memory the members share."""
        order = self.recipe.order
        if order != self.shared.recipe.order:
            memory = memory.permute(0, *(1 + dim for dim in order))
        return memory.flatten(0, 1) if self.recipe.style == "cat" else memory

    def _fit(self, members: Sequence[Tensor]) -> None:
        first = members[0]
        for index, (name, member) in enumerate(zip(self.recipe.members, members, strict=True)):
            if not isinstance(member, Tensor):
                raise StaleAlias(f"{name} is {member} now")
            if tuple(member.shape) != self.recipe.member_shape(index):
                raise StaleAlias(f"{name} has shape {tuple(member.shape)}, packed as {self.recipe.member_shape(index)}")
            if member.dtype is not first.dtype:
                raise StaleAlias(f"{name} has dtype {member.dtype}, {self.recipe.members[0]} has {first.dtype}")
            if member.device != first.device:
                raise StaleAlias(f"{name} is on {member.device}, {self.recipe.members[0]} on {first.device}")
        if len(set(map(id, members))) < len(members):
            raise StaleAlias(f"two members of {self.recipe.name} are one tensor now")
