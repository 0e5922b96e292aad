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
from typing import Any
from weakref import WeakValueDictionary, ref

import torch
from torch import Tensor, nn

from fxfuse.graph import Recipe
from fxfuse.private.known_result import joined
from fxfuse.private.storages import holders, storage_key
from fxfuse.private.versions import version
from fxfuse.weights.alias import Alias, in_own_parts
from fxfuse.weights.recipes import lane_view, pack

_binding = threading.RLock()
MOST_MODELS = 16  # of one class that are called in turn through one compiled graph; further ones are packed at every call


class Bound:
    """Members that lie in one buffer, as they lay when they were put there."""

    def __init__(self, recipe: Recipe, buffer: Tensor, members: Sequence[Tensor]) -> None:
        self.recipe, self.buffer = recipe, buffer
        self.addresses = [*map(Tensor.data_ptr, members)]
        self.lie = _lie(members)
        self.versions = [*map(version, members)]

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

    def note_writes(self, members: Sequence[Tensor]) -> None:
        """Count writes to the members as writes to the buffer: what autograd saved of it is then found to be stale, as of a Parameter."""
        now = [*map(version, members)]
        if now != self.versions:
            self.versions = now
            with torch.no_grad():
                self.buffer.view(-1)[:0].zero_()


def _lie(members: Sequence[Tensor]) -> list[Any]:
    return [(type(m), m.dtype, m.device, m.shape, m.stride()) for m in members]


_bound: WeakValueDictionary[Any, Bound] = WeakValueDictionary()  # of all graphs, by what they pack and where it begins
_buffers: WeakValueDictionary[int, Bound] = WeakValueDictionary()  # the same by the buffer's storage


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
            bound = self._bind(members)
            if bound is None:
                return in_own_parts(pack(self.recipe, members))
        if torch.is_grad_enabled():
            bound.note_writes(members)
            if any(map(_requires_grad, members)):
                return in_own_parts(_aliased(bound.buffer, self.recipe, members))
        return bound.buffer

    def bound(self, members: Sequence[Tensor]) -> Bound | None:
        """The buffer in which ``packed`` found the members; None where it stacked them."""
        return self.known.get(members[0].data_ptr())

    def _bind(self, members: Sequence[Tensor]) -> Bound | None:
        self.calls += 1
        if self.refused and self.calls < 2 * self.refused:  # it takes a while to ask: less and less often
            return None
        with _binding:
            key = (members[0].data_ptr(), _geometry(self.recipe))
            bound = _bound.get(key)
            if bound is None or not bound.holds(members):
                self.known = {at: each for at, each in self.known.items() if each.lives()}
                if len(self.known) >= MOST_MODELS or why_fixed(members) is not None:
                    self.refused = self.calls
                    return None
                bound = _moved(self.recipe, members)
                _bound[members[0].data_ptr(), _geometry(self.recipe)] = bound
                _buffers[storage_key(bound.buffer.untyped_storage())] = bound
            self.refused = 0
            self.known[members[0].data_ptr()] = bound
            return bound

    def write_back(self, members: Sequence[Tensor], packed: Tensor) -> None:
        """Running statistics that were updated in a copy go where they belong."""
        if packed.data_ptr() != members[0].data_ptr():
            with torch.no_grad():
                for index, member in enumerate(members):
                    member.copy_(lane_view(self.recipe, packed, index))


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


def _moved(recipe: Recipe, members: Sequence[Tensor]) -> Bound:
    """Move the members into one buffer, of which their data are views then."""
    with torch.inference_mode(False), torch.no_grad():
        buffer = pack(recipe, [member.detach() for member in members])
        for index, member in enumerate(members):
            member.data = lane_view(recipe, buffer, index)
    return Bound(recipe, buffer, members)


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


class FrozenPack:
    """A pack that is made once of each model's weights, for inference with weights that do not change any more."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.made: dict[tuple[int, ...], _Frozen] = {}  # by where the members begin

    def packed(self, members: Sequence[Tensor]) -> Tensor:
        """The packed tensor of the values at the first call."""
        addresses = tuple(map(Tensor.data_ptr, members))
        known = self.made.get(addresses)
        if known is None or not known.valid:
            with torch.inference_mode(False), torch.no_grad():
                made = pack(self.recipe, [member.detach() for member in members])
            self.made = {at: each for at, each in list(self.made.items()) if each.valid}
            known = self.made[addresses] = _Frozen(made, members)
        return known.packed

    def bound(self, members: Sequence[Tensor]) -> Bound | None:
        """None: writes to the members are not looked at."""
        return None

    def write_back(self, members: Sequence[Tensor], packed: Tensor) -> None:
        """Only Parameters are frozen, which no graph writes."""


class _Frozen:
    """A pack, and whether the memory that it was made of is still there: another model's may begin at the same addresses later."""

    def __init__(self, packed: Tensor, members: Sequence[Tensor]) -> None:
        self.packed, self.valid = packed, True
        mine = ref(self)

        def gone(_: object) -> None:
            if (frozen := mine()) is not None:
                frozen.valid = False

        # Of the memory, not of the members: see above. It stays the same object for as long as any tensor lies in it.
        self.storages = [ref(storage, gone) for storage in {id(s): s for s in map(Tensor.untyped_storage, members)}.values()]
