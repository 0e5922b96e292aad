"""Slices: where lanes come apart (each lane its own positions of one tensor), and slices inside lanes.

``x[:, i]`` for all i is ``x`` itself, with its lane axis at dim 1: the fork costs nothing. Places of width w that tile, overlap or
interleave regularly are a view (``unflatten`` or ``unfold``); any others are one gather.
"""

from __future__ import annotations

import torch

from fxfuse.functional import slice_along

from ..bundle import Bundle, Node
from ..emit import Emitter
from ..writer import CannotVectorize, Packed
from .base import physical, rule

KIND = "forks"  # in the README's table


@rule("select", "slice_along", view=True)
def _slices(emitter: Emitter, bundle: Bundle) -> Packed:
    return _places(emitter, bundle)


@rule("pick_along", lowering="gather")
def _picks(emitter: Emitter, bundle: Bundle) -> Packed:
    return _places(emitter, bundle)


def _positions(node: Node) -> tuple[int, ...]:
    """The places that one lane takes of its tensor."""
    name = node.target.name  # type: ignore[union-attr]
    if name == "select":
        return (int(node.args[2]),)  # type: ignore[arg-type]
    return tuple(range(*node.args[2:])) if name == "slice_along" else tuple(node.args[2])  # type: ignore[arg-type]


def _places(emitter: Emitter, bundle: Bundle) -> Packed:
    assert bundle.op is not None
    sources: list[Node] = [member.args[0] for member in bundle.members]  # type: ignore[misc]
    places = [_positions(member) for member in bundle.members]
    dim = int(bundle.members[0].args[1])  # type: ignore[arg-type]
    if len(set(places)) == 1:
        return _inside(emitter, bundle, dim)
    distinct = list(dict.fromkeys(sources))
    per_source = [[p for s, p in zip(sources, places, strict=True) if s is source] for source in distinct]
    if sources != [source for source, own in zip(distinct, per_source, strict=True) for _ in own]:
        raise CannotVectorize("lanes slice different tensors in turns")
    if len(distinct) == 1:
        return Packed(_fork(emitter, bundle, emitter.fetch(distinct).node, dim, places), dim)
    if any(p != per_source[0] for p in per_source):
        forks = [_fork(emitter, bundle, emitter.single(s), dim, own) for s, own in zip(distinct, per_source, strict=True)]
        return Packed(emitter.call(torch.cat, forks, dim), dim)
    # K tensors, N places each: lanes in the order (tensor, place), as the bundle has them.
    outer = emitter.fetch(distinct)
    if outer.dim is None:  # equal tensors (a fill per lane) are one here: its places serve all
        fork = _fork(emitter, bundle, outer.node, dim, per_source[0])
        return emitter.pick(Packed(fork, dim), len(per_source[0]), list(range(len(per_source[0]))) * len(distinct))
    inner_dim = physical(dim, outer.dim)
    node = _fork(emitter, bundle, outer.node, inner_dim, per_source[0])
    # A slice leaves its width behind its position, as a new dim; a selected position is where the dim was.
    outer_dim = outer.dim if outer.dim < inner_dim or bundle.name == "select" else outer.dim + 1
    moved = emitter.call(torch.movedim, node, (outer_dim, inner_dim), (0, 1))
    return Packed(emitter.call(torch.flatten, moved, 0, 1), 0)


def _fork(emitter: Emitter, bundle: Bundle, node: Node, dim: int, places: list[tuple[int, ...]]) -> Node:
    """``node`` with the lanes' places along ``dim`` as a lane axis at ``dim`` (and their width after it, unless each is an index)."""
    size = node.meta["val"].shape[dim]
    count, width = len(places), len(places[0])
    first = places[0][0] if width else 0
    free = bundle.members[0].args[1] in bundle.members[0].args[0].meta["dyn"]  # type: ignore[union-attr]
    if bundle.name == "select":
        indices = [place[0] for place in places]
        if min(indices) < 0 and not free:  # counted from the end, of a size that is fixed
            indices = [index % size for index in indices]
            first = indices[0]
        elif min(indices) < 0 and len(set(indices)) > 1:
            return emitter.call(torch.stack, [emitter.call(torch.select, node, dim, index) for index in indices], dim)
        if indices == list(range(size)) and not free:
            return node
        stride = indices[1] - first if count > 1 else 1
        if stride > 0 and indices == list(range(first, first + stride * count, stride)):
            return emitter.call(slice_along, node, dim, first, indices[-1] + 1, stride)
        return emitter.call(torch.index_select, node, dim, emitter.constant(indices, emitter.device(bundle.members)))
    flat = [position for place in places for position in place]
    stride = places[1][0] - first if count > 1 and width else 1
    step = places[0][1] - first if width > 1 else 1
    if width and stride > 0 and step > 0 and flat == [first + lane * stride + k * step for lane in range(count) for k in range(width)]:
        span = (first, max(flat) + 1)
        whole = node if span == (0, size) else emitter.call(slice_along, node, dim, *span, 1)
        if step == 1 and stride == width:
            return emitter.call(torch.unflatten, whole, dim, (count, width))
        if stride == 1 and step == count:
            return emitter.call(torch.movedim, emitter.call(torch.unflatten, whole, dim, (width, count)), dim + 1, dim)
        windows = emitter.call("unfold", whole, dim, (width - 1) * step + 1, stride)
        if step > 1:
            last = len(windows.meta["val"].shape) - 1
            windows = emitter.call(slice_along, windows, last, 0, (width - 1) * step + 1, step)
        return emitter.call(torch.movedim, windows, -1, dim + 1)
    gathered = emitter.call(torch.index_select, node, dim, emitter.constant(flat, emitter.device(bundle.members)))
    return emitter.call(torch.unflatten, gathered, dim, (count, width))


def _inside(emitter: Emitter, bundle: Bundle, dim: int) -> Packed:
    """Every lane takes the same position of its own tensor."""
    value = emitter.operand(bundle, "input" if bundle.name == "select" else "tensor")
    at = physical(dim, value.dim)
    rest = bundle.members[0].args[2:]
    if bundle.name == "pick_along":
        index = emitter.constant(list(_positions(bundle.members[0])), emitter.device(bundle.members))
        return Packed(emitter.call(torch.index_select, value.node, at, index), value.dim)
    if bundle.name == "select":
        lane = None if value.dim is None else value.dim - (dim < value.dim)
        return Packed(emitter.call(torch.select, value.node, at, rest[0]), lane)
    return Packed(emitter.call(slice_along, value.node, at, *rest), value.dim)
