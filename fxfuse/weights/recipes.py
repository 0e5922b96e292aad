"""Recipes as arithmetic: lanes' tensors -> one packed tensor -> views that look like the lanes' tensors again.

Comes in: a ``graph.Recipe`` and tensors. Goes out: the packed tensor (``pack``), or views of it in the originals' shapes
(``unpack``, ``lane_view``). Pure functions; nothing here knows of modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fxfuse.errors import FxfuseError
from fxfuse.graph import Recipe


def inverse(order: Sequence[int]) -> tuple[int, ...]:
    """The permutation that undoes ``order``.

    >>> inverse((2, 0, 1))
    (1, 2, 0)
    """
    result = [0] * len(order)
    for position, dim in enumerate(order):
        result[dim] = position
    return tuple(result)


def stored_shape(recipe: Recipe) -> tuple[int, ...]:
    """The shape of one member as it lies in the pack: its own shape, permuted."""
    return tuple(recipe.shape[dim] for dim in recipe.order)


def packed_shape(recipe: Recipe) -> tuple[int, ...]:
    """The shape of the packed tensor.

    >>> packed_shape(Recipe("packed.weight", ("0.weight", "1.weight"), (3, 5), (1, 0), "cat"))
    (10, 3)
    """
    lanes, stored = len(recipe.members), stored_shape(recipe)
    if recipe.style == "rows":
        return (recipe.row_starts()[-1], *stored[1:])
    return (lanes * stored[0], *stored[1:]) if recipe.style == "cat" else (lanes, *stored)


def check(recipe: Recipe) -> None:
    """Raise ``FxfuseError`` where a recipe contradicts itself."""
    if not recipe.members:
        raise FxfuseError(f"the recipe of {recipe.name} has no members")
    if sorted(recipe.order) != list(range(len(recipe.shape))):
        raise FxfuseError(f"the recipe of {recipe.name} orders dims {recipe.order}, its members have shape {recipe.shape}")
    if recipe.style != "stack" and not recipe.shape:
        raise FxfuseError(f"the recipe of {recipe.name} concatenates members without dims; these can only be stacked")
    if recipe.style == "padded":
        own = recipe.own_shapes
        if own is None or len(own) != len(recipe.members) or any(not _within(shape, recipe.shape) for shape in own):
            raise FxfuseError(f"the recipe of {recipe.name} pads its members: it needs each one's shape, none larger than {recipe.shape}")
    if recipe.style == "rows":
        own = recipe.own_shapes
        if own is None or len(own) != len(recipe.members) or any(not _within(shape[1:], recipe.shape[1:]) for shape in own):
            raise FxfuseError(f"the recipe of {recipe.name} concatenates rows: it needs each member's shape, no row larger")
        if recipe.order != tuple(range(len(recipe.shape))):
            raise FxfuseError(f"the recipe of {recipe.name} concatenates rows: its members cannot be permuted")


def _within(shape: Sequence[int], limit: Sequence[int]) -> bool:
    return len(shape) == len(limit) and all(size <= most for size, most in zip(shape, limit, strict=True))


def _filled(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The tensor with zeros behind it up to ``shape``."""
    missing = [amount for size, most in zip(tensor.shape[::-1], shape[::-1], strict=True) for amount in (0, most - size)]
    return F.pad(tensor, missing) if any(missing) else tensor


def pack(recipe: Recipe, tensors: Sequence[Tensor]) -> Tensor:
    """Join one tensor per lane into the packed tensor, bit for bit; differentiable.

    ``tensors[i]`` has ``recipe.shape``; all share one dtype and device. The result is contiguous. Raises ``FxfuseError``
    where count or shape do not fit.

    >>> recipe = Recipe("packed.weight", ("0.weight", "1.weight"), (3, 5), (1, 0), "stack")
    >>> pack(recipe, [torch.zeros(3, 5), torch.ones(3, 5)]).shape
    torch.Size([2, 5, 3])
    """
    if len(tensors) != len(recipe.members):
        raise FxfuseError(f"{recipe.name} is packed of {len(recipe.members)} tensors, got {len(tensors)}")
    for index, (name, tensor) in enumerate(zip(recipe.members, tensors, strict=True)):
        if tuple(tensor.shape) != recipe.member_shape(index):
            raise FxfuseError(f"{name} has shape {tuple(tensor.shape)}, its recipe says {recipe.member_shape(index)}")
    if recipe.style == "rows":
        return torch.cat([_filled(tensor, (tensor.shape[0], *recipe.shape[1:])) for tensor in tensors])
    if recipe.style == "padded":
        tensors = [_filled(tensor, recipe.shape) for tensor in tensors]
    elif recipe.own_shapes is not None:
        tensors = [tensor.reshape(recipe.shape) for tensor in tensors]
    identity = recipe.order == tuple(range(len(recipe.shape)))
    stored = list(tensors) if identity else [tensor.permute(recipe.order) for tensor in tensors]
    return torch.cat(stored) if recipe.style == "cat" else torch.stack(stored)


def lane_view(recipe: Recipe, packed: Tensor, index: int) -> Tensor:
    """Member ``index`` as a view of the packed tensor, in the original's shape; differentiable. Of a sparse tensor (a gradient) a copy."""
    if recipe.style == "rows" or (packed.is_sparse and recipe.style == "cat"):
        start, stop = recipe.row_starts()[index : index + 2]
        if packed.is_sparse:
            return torch.narrow_copy(packed, 0, start, stop - start)
        return _narrowed(packed.narrow(0, start, stop - start), recipe.member_shape(index))
    if recipe.style == "cat":
        rows = recipe.shape[recipe.order[0]]
        stored = packed.narrow(0, index * rows, rows)
    else:
        stored = packed.select(0, index)
    member = stored if recipe.order == tuple(range(len(recipe.shape))) else stored.permute(inverse(recipe.order))
    return _own(recipe, member, index)


def _own(recipe: Recipe, member: Tensor, index: int) -> Tensor:
    """A member that was filled up, or spelled in another shape, as the original has it: a view."""
    if recipe.own_shapes is None:
        return member
    own = recipe.own_shapes[index]
    if recipe.style != "padded":
        return member.reshape(own)  # only dims of size 1 come and go: a view
    return _narrowed(member, own)


def _narrowed(member: Tensor, shape: Sequence[int]) -> Tensor:
    """What was filled up, without the zeros: a view."""
    for dim, size in enumerate(shape):
        member = member if member.shape[dim] == size else member.narrow(dim, 0, size)
    return member


def clear_filling(recipe: Recipe, packed: Tensor) -> None:
    """Write zeros, in place, behind every member that was filled up: memory that ``to_empty`` took has anything there.

    >>> recipe = Recipe("packed.bias", ("0.bias", "1.bias"), (3,), (0,), "padded", own_shapes=((2,), (3,)))
    >>> packed = torch.ones(2, 3)
    >>> clear_filling(recipe, packed)
    >>> packed
    tensor([[1., 1., 0.],
            [1., 1., 1.]])
    """
    if recipe.own_shapes is None or recipe.style not in ("rows", "padded"):
        return
    for index in range(len(recipe.members)):
        shape = recipe.member_shape(index)
        if recipe.style == "rows":
            start, stop = recipe.row_starts()[index : index + 2]
            whole = packed.narrow(0, start, stop - start)
        else:
            whole = packed.select(0, index).permute(inverse(recipe.order))
        for dim, size in enumerate(shape):
            whole.narrow(dim, size, whole.shape[dim] - size).zero_()


def lane_views(recipe: Recipe, packed: Tensor) -> tuple[Tensor, ...]:
    """All members as views made by one ``unbind``: its backward is one ``stack``, where n ``select`` would each fill and add
    a zero tensor of the size of the whole pack."""
    if recipe.style == "rows":
        parts = torch.split(packed, [recipe.member_shape(index)[0] for index in range(len(recipe.members))])
        return tuple(_narrowed(part, recipe.member_shape(index)) for index, part in enumerate(parts))
    # splitting a dim never copies, whatever the strides: view and unflatten agree
    lanes = packed.view(len(recipe.members), recipe.shape[recipe.order[0]], *packed.shape[1:]) if recipe.style == "cat" else packed
    stored = lanes.unbind(0)
    if recipe.order != tuple(range(len(recipe.shape))):
        back = inverse(recipe.order)
        stored = tuple(tensor.permute(back) for tensor in stored)
    return stored if recipe.own_shapes is None else tuple(_own(recipe, tensor, index) for index, tensor in enumerate(stored))


def part(recipe: Recipe, name: str, start: int, stop: int, requires_grad: bool | None = None) -> Recipe:
    """The recipe of lanes ``start`` to ``stop`` (excluded) of a pack, as a pack of their own.

    >>> part(Recipe("packed.w", ("0.w", "1.w", "2.w"), (3, 5), (1, 0), "cat"), "packed.lane_2.w", 2, 3).members
    ('2.w',)
    """
    own = None if recipe.own_shapes is None else recipe.own_shapes[start:stop]
    return replace(
        recipe,
        name=name,
        members=recipe.members[start:stop],
        shape=own[0] if own is not None and recipe.style == "rows" else recipe.shape,
        own_shapes=own,
        requires_grad=recipe.requires_grad if requires_grad is None else requires_grad,
    )


def part_view(recipe: Recipe, packed: Tensor, start: int, stop: int) -> Tensor:
    """Lanes ``start`` to ``stop`` (excluded) of a packed tensor, packed: a view. Every style lays its lanes out along dim 0.

    Of a sparse tensor (a gradient) a copy.
    """
    if recipe.style in ("cat", "rows"):
        starts = recipe.row_starts()
        start, stop = starts[start], starts[stop]
    return torch.narrow_copy(packed, 0, start, stop - start) if packed.is_sparse else packed.narrow(0, start, stop - start)


def unpack(recipe: Recipe, packed: Tensor) -> list[Tensor]:
    """Split a packed tensor into views, one per lane, in the originals' shapes: the inverse of ``pack``, bit for bit.

    >>> recipe = Recipe("packed.weight", ("0.weight", "1.weight"), (3, 5), (1, 0), "cat")
    >>> [tuple(t.shape) for t in unpack(recipe, torch.zeros(10, 3))]
    [(3, 5), (3, 5)]
    """
    if tuple(packed.shape) != packed_shape(recipe):
        raise FxfuseError(f"{recipe.name} has shape {tuple(packed.shape)}, its recipe says {packed_shape(recipe)}")
    return [lane_view(recipe, packed, index) for index in range(len(recipe.members))]
