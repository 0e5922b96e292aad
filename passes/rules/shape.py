"""Shape ops inside lanes: the same op on the packed tensor, dims counted past the lane axis."""

from __future__ import annotations

from typing import Any

import torch

from ..bundle import Bundle
from ..emit import Emitter
from ..writer import CannotVectorize, Packed
from .base import numbers, physical, rank, rule, sizes_of


def _input(emitter: Emitter, bundle: Bundle) -> Packed:
    value = emitter.operand(bundle, "input")
    assert isinstance(value, Packed)
    return value


def _same(emitter: Emitter, bundle: Bundle, value: Packed) -> Packed:
    """All lanes are one: the op as it is."""
    assert bundle.op is not None
    args = [emitter.operand(bundle, name) for name in bundle.op.names[1:]]
    return Packed(emitter.respell(bundle.op, (value.node, *(numbers(a) for a in args))), None)


@rule("size", view=True)
def _size(emitter: Emitter, bundle: Bundle) -> Packed:
    first: Any = bundle.members[0].args[0]
    if emitter.bundles.bundle(first) is None:  # tensors from several places have one size: nothing is gathered to read it
        return Packed(emitter.call("size", emitter.single(first), emitter.operand(bundle, "dim")), None)
    value = _input(emitter, bundle)
    return Packed(emitter.call("size", value.node, physical(emitter.operand(bundle, "dim"), value.dim)), None)


@rule("size_add", "size_sub", "size_mul", view=True)
def _size_arithmetic(emitter: Emitter, bundle: Bundle) -> Packed:
    assert bundle.op is not None
    args = [numbers(emitter.operand(bundle, name)) for name in bundle.op.names]
    return Packed(emitter.call(bundle.op.func, *args), None)


@rule("view_as", "reshape_as", view=True)
def _reshape_as(emitter: Emitter, bundle: Bundle) -> Packed:
    value, other = _input(emitter, bundle), emitter.operand(bundle, "other")
    if value.dim is None and other.dim is None:
        return _same(emitter, bundle, value)
    lanes = len(bundle.members)
    sizes = sizes_of(emitter, other, bundle.members[0].args[1])  # type: ignore[arg-type]
    return Packed(emitter.call("reshape", emitter.front(value, lanes), (lanes, *sizes)), 0)


@rule("view", "reshape", view=True)
def _reshape(emitter: Emitter, bundle: Bundle) -> Packed:
    value = _input(emitter, bundle)
    if bundle.members[0].meta["dtype"] is not bundle.members[0].args[0].meta["dtype"]:  # type: ignore[union-attr]
        raise CannotVectorize("a view as another dtype")
    if value.dim is None:
        return _same(emitter, bundle, value)
    assert bundle.op is not None
    sizes = numbers(emitter.operand(bundle, bundle.op.names[1]))
    sizes = tuple(sizes) if isinstance(sizes, (tuple, list)) else (sizes,)
    lanes = len(bundle.members)
    return Packed(emitter.call("reshape", emitter.front(value, lanes), (lanes, *sizes)), 0)


@rule("ravel", view=True)
def _ravel(emitter: Emitter, bundle: Bundle) -> Packed:
    value = _input(emitter, bundle)
    if value.dim is None:
        return _same(emitter, bundle, value)
    return Packed(emitter.call("reshape", emitter.front(value, len(bundle.members)), (len(bundle.members), -1)), 0)


@rule("flatten", view=True)
def _flatten(emitter: Emitter, bundle: Bundle) -> Packed:
    value = _input(emitter, bundle)
    if value.dim is None:
        return _same(emitter, bundle, value)
    start, end = emitter.operand(bundle, "start_dim"), emitter.operand(bundle, "end_dim")
    if rank(bundle.members[0].args[0]) == 0:
        return Packed(emitter.call(torch.unsqueeze, value.node, 1), 0)
    if start < value.dim <= end:
        value = Packed(emitter.front(value, len(bundle.members)), 0)
    assert value.dim is not None
    node = emitter.call(torch.flatten, value.node, physical(start, value.dim), physical(end, value.dim))
    return Packed(node, value.dim if value.dim <= start else value.dim - (end - start))


@rule("unflatten", view=True)
def _unflatten(emitter: Emitter, bundle: Bundle) -> Packed:
    value = _input(emitter, bundle)
    if value.dim is None:
        return _same(emitter, bundle, value)
    dim = emitter.operand(bundle, "dim") % rank(bundle.members[0].args[0])
    sizes = numbers(emitter.operand(bundle, "sizes"))
    node = emitter.call(torch.unflatten, value.node, physical(dim, value.dim), tuple(sizes))
    return Packed(node, value.dim if value.dim <= dim else value.dim + len(sizes) - 1)


@rule("unsqueeze", view=True)
def _unsqueeze(emitter: Emitter, bundle: Bundle) -> Packed:
    value = _input(emitter, bundle)
    dim = emitter.operand(bundle, "dim")
    if value.dim is None:
        return Packed(emitter.call(torch.unsqueeze, value.node, dim), None)
    if dim <= value.dim:
        return Packed(emitter.call(torch.unsqueeze, value.node, dim), value.dim + 1)
    return Packed(emitter.call(torch.unsqueeze, value.node, dim + 1), value.dim)


@rule("squeeze", view=True)
def _squeeze(emitter: Emitter, bundle: Bundle) -> Packed:
    value = _input(emitter, bundle)
    dims = emitter.operand(bundle, "dim")
    dims = tuple(dims) if isinstance(dims, (tuple, list)) else (dims,)
    node = value.node
    lane = value.dim
    for dim in sorted(dims, reverse=True):
        node = emitter.call(torch.squeeze, node, physical(dim, lane))
        lane = lane if lane is None or dim >= lane else lane - 1
    return Packed(node, lane)


@rule("transpose", "t", "mT", view=True)
def _transpose(emitter: Emitter, bundle: Bundle) -> Packed:
    value = _input(emitter, bundle)
    lanes_rank = rank(bundle.members[0].args[0])
    if bundle.name == "transpose":
        first, second = emitter.operand(bundle, "dim0"), emitter.operand(bundle, "dim1")
    elif lanes_rank < 2:
        return value
    else:
        first, second = lanes_rank - 2, lanes_rank - 1
    return Packed(emitter.call(torch.transpose, value.node, physical(first, value.dim), physical(second, value.dim)), value.dim)


@rule("permute", view=True)
def _permute(emitter: Emitter, bundle: Bundle) -> Packed:
    value = _input(emitter, bundle)
    dims = emitter.operand(bundle, "dims")
    if value.dim is None:
        return Packed(emitter.call(torch.permute, value.node, tuple(dims)), None)
    node = emitter.front(value, len(bundle.members))
    return Packed(emitter.call(torch.permute, node, (0, *(d + 1 for d in dims))), 0)


@rule("movedim", view=True)
def _movedim(emitter: Emitter, bundle: Bundle) -> Packed:
    value = _input(emitter, bundle)
    source, destination = emitter.operand(bundle, "source"), emitter.operand(bundle, "destination")
    if value.dim is None:
        return Packed(emitter.call(torch.movedim, value.node, source, destination), None)
    as_tuple = [(v,) if isinstance(v, int) else tuple(v) for v in (source, destination)]
    node = emitter.front(value, len(bundle.members))
    return Packed(emitter.call(torch.movedim, node, tuple(s + 1 for s in as_tuple[0]), tuple(d + 1 for d in as_tuple[1])), 0)


@rule("expand", "expand_as", "broadcast_to", view=True)
def _expand(emitter: Emitter, bundle: Bundle) -> Packed:
    value = _input(emitter, bundle)
    if bundle.name == "expand_as":
        other = emitter.operand(bundle, "other")
        node = _padded(emitter, bundle, value, rank(bundle.members[0]))
        return Packed(emitter.call("expand_as", node, emitter.front(other, len(bundle.members))), 0)
    if value.dim is None:
        return _same(emitter, bundle, value)
    sizes = numbers(emitter.operand(bundle, "size"))
    sizes = tuple(sizes) if isinstance(sizes, (tuple, list)) else (sizes,)
    return Packed(emitter.call("expand", _padded(emitter, bundle, value, len(sizes)), (-1, *sizes)), 0)


@rule("repeat", "tile", lowering="repeat")
def _repeat(emitter: Emitter, bundle: Bundle) -> Packed:
    value = _input(emitter, bundle)
    if value.dim is None:
        return _same(emitter, bundle, value)
    times = numbers(emitter.operand(bundle, "repeats" if bundle.name == "repeat" else "dims"))
    times = tuple(times) if isinstance(times, (tuple, list)) else (times,)
    if bundle.name == "tile":
        times = (1,) * (rank(bundle.members[0].args[0]) - len(times)) + times
    return Packed(emitter.call("repeat", _padded(emitter, bundle, value, len(times)), (1, *times)), 0)


def _padded(emitter: Emitter, bundle: Bundle, value: Packed, to_rank: int) -> Any:
    """``[G, ...]`` with ones after the lane axis, up to ``to_rank`` dims of the lane's own."""
    node = emitter.front(value, len(bundle.members))
    for _ in range(to_rank - rank(bundle.members[0].args[0])):
        node = emitter.call(torch.unsqueeze, node, 1)
    return node


@rule("fliplr", "flipud", lowering="along a dim")
def _flip_named(emitter: Emitter, bundle: Bundle) -> Packed:
    value = _input(emitter, bundle)
    return Packed(emitter.call(torch.flip, value.node, (physical(1 if bundle.name == "fliplr" else 0, value.dim),)), value.dim)


@rule("trace", lowering="reduction")
def _trace(emitter: Emitter, bundle: Bundle) -> Packed:
    value = _input(emitter, bundle)
    if value.dim is None:
        return _same(emitter, bundle, value)
    return Packed(emitter.call(torch.sum, emitter.call(torch.diagonal, emitter.at(value, 0), 0, 1, 2), 1), 0)


@rule("hstack", "vstack", "dstack", "column_stack", "row_stack", lowering="join")
def _stacked(emitter: Emitter, bundle: Bundle) -> Packed:
    """numpy's names for ``cat``, spelled as one."""
    given: list[Any] = [emitter.operand(bundle, "tensors")[i] for i in range(len(bundle.members[0].args[0]))]  # type: ignore[arg-type]
    ranks = [rank(node) for node in bundle.members[0].args[0]]  # type: ignore[union-attr]
    lanes = len(bundle.members)
    nodes = [_at_least(emitter, bundle.name, emitter.front(value, lanes), r) for value, r in zip(given, ranks, strict=True)]
    dim = {"vstack": 0, "row_stack": 0, "dstack": 2}.get(bundle.name, 1 if bundle.name == "column_stack" or max(ranks) > 1 else 0)
    return Packed(emitter.call(torch.cat, nodes, dim + 1), 0)


def _at_least(emitter: Emitter, name: str, node: Any, own: int) -> Any:
    """``[G, ...]`` of a lane's rank ``own`` with the dims that the op adds: ``[N]`` is a row, to ``column_stack`` a column."""
    if own == 0:
        return emitter.call("reshape", node, (-1, *([1] * {"hstack": 1, "dstack": 3}.get(name, 2))))
    if name == "dstack":
        node = emitter.call(torch.unsqueeze, node, 1) if own == 1 else node
        return emitter.call(torch.unsqueeze, node, -1) if own < 3 else node
    if name == "hstack" or own > 1:
        return node
    return emitter.call(torch.unsqueeze, node, 2 if name == "column_stack" else 1)
