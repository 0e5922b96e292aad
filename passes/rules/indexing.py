"""Indexing with tensors inside lanes: ``x[idx]``, gather, index_select, take_along_dim, one_hot, masked_fill.

Where lanes index their own tensor by their own indices, the lane is one more index; where they share the tensor or the indices, none is
needed. An index that is out of range raises as in the loop, because every lane keeps its own dim of its own size.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F

from ..bundle import Bundle, Node
from ..emit import Emitter
from ..writer import CannotVectorize, Packed
from .base import is_tensor, numbers, physical, rank, rule, shared
from .elementwise import aligned, pointwise


@rule("one_hot", lowering="one_hot")
def _one_hot(emitter: Emitter, bundle: Bundle) -> Packed:
    assert bundle.op is not None
    value, *rest = [emitter.operand(bundle, name) for name in bundle.op.names]
    return Packed(emitter.call(F.one_hot, value.node, *rest), value.dim)


@rule("gather", lowering="gather")
def _gather(emitter: Emitter, bundle: Bundle) -> Packed:
    source, index = emitter.operand(bundle, "input"), emitter.operand(bundle, "index")
    dim = int(emitter.operand(bundle, "dim")) % max(rank(bundle.members[0].args[0]), 1)
    if shared(source, index):
        return Packed(emitter.call(torch.gather, source.node, dim, index.node), None)
    if rank(bundle.members[0].args[0]) == 0 or rank(bundle.members[0]) == 0:
        raise CannotVectorize("gather of single numbers")
    lanes = len(bundle.members)
    return Packed(emitter.call(torch.gather, emitter.front(source, lanes), dim + 1, emitter.front(index, lanes)), 0)


@rule("take_along_dim", lowering="gather")
def _take_along_dim(emitter: Emitter, bundle: Bundle) -> Packed:
    assert bundle.op is not None
    given = dict(zip(bundle.op.names, bundle.members[0].args, strict=True))
    source, index, dim = (emitter.operand(bundle, name) for name in ("input", "indices", "dim"))
    if shared(source, index):
        return Packed(emitter.call(torch.take_along_dim, source.node, index.node, dim), None)
    lanes = len(bundle.members)
    ranks = [rank(given["input"]), rank(given["indices"])]
    nodes = [emitter.front(value, lanes) for value in (source, index)]
    if dim is None:
        flat = [emitter.call("reshape", node, (lanes, -1)) for node in nodes]
        return Packed(emitter.call(torch.take_along_dim, *flat, 1), 0)
    if ranks[0] != ranks[1]:
        raise CannotVectorize("take_along_dim of tensors of different rank")
    return Packed(emitter.call(torch.take_along_dim, *nodes, dim % ranks[0] + 1), 0)


@rule("index_select", lowering="index_select")
def _index_select(emitter: Emitter, bundle: Bundle) -> Packed:
    source, index = emitter.operand(bundle, "input"), emitter.operand(bundle, "index")
    given = bundle.members[0].args
    lane_rank, lanes = rank(given[0]), len(bundle.members)
    if lane_rank == 0 or rank(given[2]) == 0:
        raise CannotVectorize("index_select of or by a single number")
    dim = int(emitter.operand(bundle, "dim")) % lane_rank
    if index.dim is None:
        return Packed(emitter.call(torch.index_select, source.node, physical(dim, source.dim), index.node), source.dim)
    front = emitter.at(index, 0)  # [G, K]
    if source.dim is None:
        picked = emitter.call(torch.index_select, source.node, dim, emitter.call(torch.flatten, front, 0, 1))
        return Packed(emitter.call(torch.unflatten, picked, dim, (lanes, -1)), dim)
    # gather, which as index_select does not count from the end: every other dim is taken whole
    own = emitter.at(source, 0)
    shape, free = own.meta["val"].shape, given[0].meta["dyn"]  # type: ignore[union-attr]
    spread = emitter.call("reshape", front, (lanes, *([1] * dim), -1, *([1] * (lane_rank - dim - 1))))
    sizes = [-1 if d == dim else emitter.call("size", own, d + 1) if d in free else int(shape[d + 1]) for d in range(lane_rank)]
    return Packed(emitter.call(torch.gather, own, dim + 1, emitter.call("expand", spread, (-1, *sizes))), 0)


@rule("masked_fill", lowering="pointwise")
def _masked_fill(emitter: Emitter, bundle: Bundle) -> Packed:
    value = emitter.operand(bundle, "value")
    if not isinstance(value, Packed) or value.dim is None:
        return pointwise(emitter, bundle)
    # masked_fill takes one number: a number per lane is a choice between two tensors.
    x, mask = emitter.operand(bundle, "input"), emitter.operand(bundle, "mask")
    out_rank, given = rank(bundle.members[0]), bundle.members[0].args
    if isinstance(given[2], Node) and value.node.meta["val"].dtype is not bundle.members[0].meta["dtype"]:
        value = Packed(emitter.call("to", value.node, bundle.members[0].meta["dtype"]), value.dim)
    nodes, lane = aligned(emitter, [(mask, rank(given[1])), (value, 0), (x, rank(given[0]))], out_rank)
    return Packed(emitter.call(torch.where, *nodes), lane)


@rule("__getitem__", lowering="index")
def _getitem(emitter: Emitter, bundle: Bundle) -> Packed:
    """``x[..., idx, ...]``. Slices and numbers are taken first, as torch does; then each index tensor has a dim of its own."""
    lane_x: Any = bundle.members[0].args[0]
    assert bundle.op is not None
    x, index = (emitter.operand(bundle, name) for name in bundle.op.names)
    items = list(index) if type(index) is tuple else [index]
    if any(not _covered(item) for item in items):
        raise CannotVectorize("lanes index by lists, or by slices whose bounds are free")
    counted = [isinstance(item, Packed) and not is_tensor(own) for item, own in zip(items, _lane_items(bundle), strict=True)]
    if any(counted):  # x[x.shape[0] - 1]
        if any(isinstance(item, Packed) and not size for item, size in zip(items, counted, strict=True)):
            raise CannotVectorize("lanes index by sizes and by tensors at once")
        taken = [numbers(item) for item in items]
        source = emitter.at(x, 0) if x.dim is not None else x.node
        out = emitter.call(operator.getitem, source, tuple(taken) if x.dim is None else (slice(None), *taken))
        return Packed(out, None if x.dim is None else 0)
    lanes = len(bundle.members)
    ranks = [rank(own) if isinstance(item, Packed) else 0 for item, own in zip(items, _lane_items(bundle), strict=True)]
    dtypes = [item.node.meta["val"].dtype for item in items if isinstance(item, Packed)]
    if torch.bool in dtypes or torch.uint8 in dtypes:
        raise CannotVectorize("a mask picks a number of entries that depends on the data")
    width = max(ranks)  # of the index tensors, broadcast together
    own_index = any(isinstance(item, Packed) and item.dim is not None for item in items)
    own_x = x.dim is not None
    used = sum(item is not None and item is not Ellipsis for item in items)
    at = next((k for k, item in enumerate(items) if item is Ellipsis), len(items))
    items[at : at + 1] = [slice(None)] * (rank(lane_x) - used)
    ranks[at : at + 1] = [0] * (rank(lane_x) - used)
    made: list[Any] = []
    for item, own_rank in zip(items, ranks, strict=True):
        if isinstance(item, Packed):
            made.append(_index(emitter, item, own_rank, width) if own_index else item.node)
        else:
            made.append(item)
    source = emitter.at(x, 0) if own_x else x.node
    if not own_index:
        out = emitter.call(operator.getitem, source, (slice(None), *made) if own_x else tuple(made))
        lane = None if not own_x else 0 if _adjacent(made) else width  # behind the dims of separate indices, which have moved to the front
        return Packed(out, lane)
    if own_x:
        own = emitter.constant(list(range(lanes)), emitter.device(bundle.members))
        made = [emitter.call(torch.reshape, own, (lanes, *([1] * width))) if width else own, *made]
    out = emitter.call(operator.getitem, source, tuple(made))
    kept = [item for item in (made[1:] if own_x else made) if not isinstance(item, int)]  # numbers take their dim away first
    first = next(k for k, item in enumerate(kept) if isinstance(item, Node))
    if not own_x:  # the lanes are the first of the index's dims, which stand where it stood, or in front
        return Packed(out, first if _adjacent(made) else 0)
    if first and _adjacent(made[1:]):  # the lane index stood in front: the dims before the lanes' own index are now behind it
        out = emitter.call(torch.movedim, out, tuple(range(1 + width, 1 + width + first)), tuple(range(1, 1 + first)))
    return Packed(out, 0)


def _lane_items(bundle: Bundle) -> list[Any]:
    index: Any = bundle.members[0].args[1]
    return list(index) if type(index) is tuple else [index]


def _covered(item: Any) -> bool:
    if isinstance(item, slice):
        return not any(isinstance(bound, (Node, Packed)) for bound in (item.start, item.stop, item.step))
    return item is None or item is Ellipsis or type(item) is int or isinstance(item, Packed)


def _index(emitter: Emitter, item: Packed, own_rank: int, width: int) -> Node:
    """An index tensor as ``[G, ...]`` of the rank that all of them broadcast to; one that lanes share needs no lane axis."""
    if item.dim is None:
        return item.node
    node = emitter.at(item, 0)
    for _ in range(width - own_rank):
        node = emitter.call(torch.unsqueeze, node, 1)
    return node


def _adjacent(items: list[Any]) -> bool:
    """True where the index tensors stand side by side, numbers aside: then their dims stay there, else they move to the front."""
    places = [k for k, item in enumerate(i for i in items if not isinstance(i, int)) if isinstance(item, Node)]
    return places == list(range(places[0], places[0] + len(places)))
