"""Slices: where lanes come apart (each lane its own position of one tensor), and slices inside lanes.

``x[:, i]`` for all i is ``x`` itself, with its lane axis at dim 1: the fork costs nothing. Slices of width w that tile or overlap
regularly are one ``unfold``; other positions are one gather.
"""

from __future__ import annotations

import torch

from ..bundle import POSITIONS, Bundle, Node
from ..emit import CannotVectorize, Emitter, Packed
from ..functional import slice_along
from .base import physical, rule

KIND = "forks"  # in the README's table


@rule("select", "slice_along", view=True)
def _slices(emitter: Emitter, bundle: Bundle) -> Packed:
    op = bundle.op
    assert op is not None
    at = op.names.index(POSITIONS[op.name][0])
    sources = [member.args[0] for member in bundle.members]
    positions = [int(member.args[at]) for member in bundle.members]  # type: ignore[arg-type]
    dim = int(bundle.members[0].args[1])  # type: ignore[arg-type]
    if len(set(positions)) == 1:
        return _inside(emitter, bundle, dim)
    distinct = list(dict.fromkeys(sources))
    per_source = [[p for s, p in zip(sources, positions, strict=True) if s is source] for source in distinct]
    if any(p != per_source[0] for p in per_source) or len(per_source[0]) * len(distinct) != len(positions):
        raise CannotVectorize("lanes slice different tensors at different positions")
    outer = emitter.fetch(distinct)  # type: ignore[arg-type]
    inner_dim = physical(dim, outer.dim if len(distinct) > 1 else None)
    node = _fork(emitter, bundle, outer.node, inner_dim, per_source[0])
    if len(distinct) == 1:
        return Packed(node, inner_dim)
    # K tensors, N slices each: lanes in the order (tensor, slice), as the bundle has them.
    if outer.dim is None:
        raise CannotVectorize("equal tensors are sliced as if they were different")
    outer_dim = outer.dim if outer.dim < inner_dim else outer.dim + 1
    moved = emitter.call(torch.movedim, node, (outer_dim, inner_dim), (0, 1))
    return Packed(emitter.call(torch.flatten, moved, 0, 1), 0)


def _fork(emitter: Emitter, bundle: Bundle, node: Node, dim: int, positions: list[int]) -> Node:
    """``node`` with the positions along ``dim`` as a lane axis at ``dim`` (and, for slices, their width right after it)."""
    size = node.meta["val"].shape[dim]
    count = len(positions)
    stride = positions[1] - positions[0] if count > 1 else 1
    regular = stride > 0 and positions == list(range(positions[0], positions[0] + stride * count, stride))
    device = emitter.device(bundle.members)
    source = bundle.members[0].args[0]
    free = bundle.members[0].args[1] in source.meta["dyn"]  # type: ignore[union-attr]
    if bundle.name == "select":
        if positions == list(range(size)) and not free:
            return node
        if regular:
            return emitter.call(slice_along, node, dim, positions[0], positions[-1] + 1, stride)
        return emitter.call(torch.index_select, node, dim, emitter.constant(positions, device))
    start, stop, step = (int(v) for v in bundle.members[0].args[2:5])  # type: ignore[arg-type]
    width = len(range(start, stop, step))
    if regular and step == 1 and width > 0:
        span = (positions[0], positions[-1] + width)
        if stride == width:
            whole = node if span == (0, size) else emitter.call(slice_along, node, dim, *span, 1)
            return emitter.call(torch.unflatten, whole, dim, (count, width))
        windows = node if span == (0, size) else emitter.call(slice_along, node, dim, *span, 1)
        return emitter.call(torch.movedim, emitter.call("unfold", windows, dim, width, stride), -1, dim + 1)
    index = [p + offset * step for p in positions for offset in range(width)]
    gathered = emitter.call(torch.index_select, node, dim, emitter.constant(index, device))
    return emitter.call(torch.unflatten, gathered, dim, (count, width))


def _inside(emitter: Emitter, bundle: Bundle, dim: int) -> Packed:
    """Every lane takes the same position of its own tensor."""
    value = emitter.operand(bundle, "input" if bundle.name == "select" else "tensor")
    at = physical(dim, value.dim)
    rest = bundle.members[0].args[2:]
    if bundle.name == "select":
        lane = None if value.dim is None else value.dim - (dim < value.dim)
        return Packed(emitter.call(torch.select, value.node, at, rest[0]), lane)
    return Packed(emitter.call(slice_along, value.node, at, *rest), value.dim)
