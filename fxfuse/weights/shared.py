"""Packs whose members stay the Parameters of the user's modules: no copy forward, views of one gradient backward.

Comes in: a recipe, and at every call the Parameters (or buffers) as they are then. Goes out: the packed tensor. The members' data become
views of one buffer where nobody else holds their memory; before every use it is checked that they still lie there. Where they do not
(moved, ``.data =``, ``load_state_dict(assign=True)``, another model of the class), or must stay where they are, they are packed anew.
No reference to a member is held, not even a weak one: ``torch.utils.swap_tensors`` takes none. Who holds the buffer is counted instead.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from fxfuse.graph import Recipe
from fxfuse.private.known_result import joined
from fxfuse.private.ordinary import without_numbers
from fxfuse.private.storages import holders, storage_key

from .late_writes import Writes
from .own_gradients import in_own_parts
from .recipes import lane_view, lane_views, pack

_binding = threading.RLock()
MOST_MODELS = 16  # of one class that are called in turn through one compiled graph; further ones are packed at every call


class Bound:
    """Members that lie in one buffer, as they lay when they were put there."""

    def __init__(self, recipe: Recipe, buffer: Tensor, members: Sequence[Tensor]) -> None:
        self.recipe, self.buffer = recipe, buffer
        self.addresses = [*map(Tensor.data_ptr, members)]
        self.lie = _lie(members)
        self.writes = Writes(buffer, members)

    def holds(self, members: Sequence[Tensor]) -> bool:
        """Do the members lie in the buffer, each at its place, of the size and in the order that it had there?"""
        return self.begin(members) and _lie(members) == self.lie

    def begin(self, members: Sequence[Tensor]) -> bool:
        """Does each member begin where it did? All that has to be asked of a graph's inputs, once they were seen to lie there: dtypes,
        sizes and strides are dynamo's to guard, and looking at them again takes longer than this (0.1 us each)."""
        return [*map(Tensor.data_ptr, members)] == self.addresses

    def lives(self) -> bool:
        """Does anything but this lie in the buffer's memory?"""
        return holders(self.buffer) > 1


def _lie(members: Sequence[Tensor]) -> list[Any]:
    return [(type(m), m.dtype, m.device, m.shape, m.stride(), m.is_conj(), m.is_neg()) for m in members]


_bound: WeakValueDictionary[Any, Bound] = WeakValueDictionary()  # of all graphs, by what they pack and where it begins
_buffers: WeakValueDictionary[int, Bound] = WeakValueDictionary()  # the same by the buffer's storage


def memory_form(recipe: Recipe) -> Recipe:
    """The recipe of the same members, each in its own order."""
    style: Literal["stack", "rows", "padded"] = "stack" if recipe.style == "cat" else recipe.style
    return replace(recipe, order=tuple(range(len(recipe.shape))), style=style)


def lie_in_rows(form: Recipe) -> bool:
    """Would every member, as a view of the pack, be contiguous? Optimizers and tools flatten Parameters by ``view(-1)``. Not so between
    the zeros that fill up smaller ones."""
    return form.own_shapes is None or form.style == "stack" or all(own[1:] == form.shape[1:] for own in form.own_shapes)


def _geometry(recipe: Recipe) -> Any:
    return recipe.shape, recipe.own_shapes, recipe.style, len(recipe.members)


def may_share(recipe: Recipe, members: Sequence[Tensor]) -> bool:
    """Do the members lie in a pack like this already, or may they move into one?"""
    bound = _bound.get((members[0].data_ptr(), _geometry(recipe)))
    return (bound is not None and bound.holds(members)) or why_fixed(members) is None


class SharedPack:
    """One pack of one compiled graph."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.known: dict[int, Bound] = {}  # by the address of the first member
        self.refused = self.calls = 0

    def packed(self, members: Sequence[Tensor]) -> Tensor:
        """The packed tensor of the members' current values; its gradient reaches each of them."""
        bound = self.known.get(members[0].data_ptr())
        if bound is None or not bound.begin(members):
            bound = self.bind(members)
            if bound is None:
                return in_own_parts(pack(self.recipe, members))
        return self.of(bound, members)

    def of(self, bound: Bound, members: Sequence[Tensor]) -> Tensor:
        """The packed tensor where it is known that the members lie in ``bound``."""
        if torch.is_grad_enabled():
            bound.writes.note(members)
            if any(map(_requires_grad, members)):
                return in_own_parts(_aliased(bound.buffer, self.recipe, members))
        return bound.buffer

    def bound(self, members: Sequence[Tensor]) -> Bound | None:
        """The buffer in which ``packed`` found the members; None where it stacked them."""
        return self.known.get(members[0].data_ptr())

    def bind(self, members: Sequence[Tensor]) -> Bound | None:
        """Where the members lie now, moved there if they may be; None where they may not, or were not asked this time."""
        if without_numbers():  # nor would the buffer
            return None
        self.calls += 1
        if self.refused and self.calls < 2 * self.refused:  # it takes a while to ask: less and less often
            return None
        with _binding:
            bound = _bound.get((members[0].data_ptr(), self.geometry()))
            if bound is None or not bound.holds(members):
                self.known = {at: each for at, each in self.known.items() if each.lives()}
                if len(self.known) >= MOST_MODELS or why_fixed(members) is not None:
                    self.refused = self.calls
                    return None
                return self.move(members)
            self.refused = 0
            self.known[members[0].data_ptr()] = bound
            return bound

    def move(self, members: Sequence[Tensor]) -> Bound:
        """Move the members into one buffer, of which their data are views then; whoever calls this knows that they may be moved."""
        with torch.inference_mode(False), torch.no_grad():
            buffer = self.joined([member.detach() for member in members])
            for index, member in enumerate(members):
                member.data = self.place(buffer, index)
        return self.adopt(buffer, members)

    def adopt(self, buffer: Tensor, members: Sequence[Tensor]) -> Bound:
        """The members lie in ``buffer``, each at its place."""
        bound = Bound(self.recipe, buffer, members)
        with _binding:
            _bound[members[0].data_ptr(), self.geometry()] = bound
            _buffers[storage_key(buffer.untyped_storage())] = bound
            self.refused = 0
            self.known[members[0].data_ptr()] = bound
        return bound

    def geometry(self) -> Any:
        """How members lie in a buffer of this pack; other packs of the same members may lie so, too."""
        return _geometry(self.recipe)

    def joined(self, members: Sequence[Tensor]) -> Tensor:
        """A buffer for the members, with their values."""
        return pack(self.recipe, members)

    def place(self, buffer: Tensor, index: int) -> Tensor:
        """Where a member lies in it."""
        return lane_view(self.recipe, buffer, index)

    def write_back(self, members: Sequence[Tensor], packed: Tensor) -> None:
        """Running statistics that were updated in a copy go where they belong."""
        if packed.data_ptr() != members[0].data_ptr():
            with torch.no_grad():
                for index, member in enumerate(members):
                    member.copy_(lane_view(self.recipe, packed, index))


class Alias(torch.autograd.Function):
    """The buffer as a function of the Parameters that are views of it: no copy forward, slices backward."""

    @staticmethod
    def forward(ctx: Any, buffer: Tensor, recipe: Recipe, *members: Tensor) -> Tensor:
        ctx.recipe = recipe
        return buffer.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *lane_views(ctx.recipe, grads[0]))


def _aliased(buffer: Tensor, recipe: Recipe, members: Sequence[Tensor]) -> Tensor:
    """The buffer as a function of the members, which lie in it: no copy forward, slices backward."""
    if recipe.style == "stack" and recipe.own_shapes is None and recipe.order == tuple(range(len(recipe.shape))):
        return joined(torch.stack, members, buffer)
    if recipe.style == "rows":
        return joined(torch.cat, members, buffer)
    result: Tensor = Alias.apply(buffer, recipe, *members)  # type: ignore[no-untyped-call]
    return result


def _requires_grad(tensor: Tensor) -> bool:
    return tensor.requires_grad


def why_fixed(members: Sequence[Tensor]) -> str | None:
    """Why the members' memory must stay where it is: somebody else holds it, or it is no memory of their own. None where it may move."""
    first = members[0]
    for member in members:
        if type(member) not in (Tensor, nn.Parameter) or member.layout is not torch.strided or member.is_inference():
            return "it is no plain tensor"
        if not member.is_leaf or not member.is_contiguous() or member.is_conj() or member.is_neg() or not member.numel():
            return "it is computed, or lies in another order"
        if member.dtype is not first.dtype or member.device != first.device or member.requires_grad != first.requires_grad:
            return "the lanes differ in dtype, device or requires_grad"
        if (member.device.type == "cpu" and member.is_shared()) or member.is_pinned():  # type: ignore[no-untyped-call]
            return "its memory is shared with another process, or pinned"
    if len({*map(Tensor.data_ptr, members)}) < len(members):
        return "two lanes are one tensor"
    # By storage, the members in it. One of ours that some of its members have left is held by its ``Bound``, too.
    inside = Counter(storage_key(member.untyped_storage()) for member in members)
    of = {storage_key(member.untyped_storage()): member for member in members}
    if any(holders(of[key]) > number + (key in _buffers) for key, number in inside.items()):
        return "another tensor holds its memory"
    return None
