"""Indexing: basic indexing and splitting as chains of steps along one dim each.

Comes in: ``x[:, 2:4, None]``, ``x.chunk(3)``, ``x.unbind(1)``. Goes out: ``Indexing``, a layer of the lifter: it spells them ``select`` /
``slice_along`` / ``unsqueeze``, so that lanes that take their own part of a tensor differ in one number only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx

from fxfuse.functional import op_of, pick_along, slice_along
from fxfuse.ops import Op, canonical
from fxfuse.recording.trace import Event, Frame, Trace

from .lifted import SizeDependent, Sizes
from .nodes import Nodes

_SELECT = canonical(torch.select, (torch.empty(0), 0, 0), {})[0]
_UNSQUEEZE = canonical(torch.unsqueeze, (torch.empty(0), 0), {})[0]
_SLICE = op_of(slice_along)
_PICK = op_of(pick_along)


class Indexing(Nodes):
    """Takes tensors apart."""

    def __init__(self, trace: Trace, frame: Frame, sizes: Sizes, opaque: frozenset[int]) -> None:
        super().__init__(trace, frame, sizes, opaque)
        self.env: dict[int, Any] = {}  # value -> node of its contents now

    def _part(self, name: str, func: Any, args: Any, kwargs: Any, value: int) -> Any:
        """``x[...]``, ``narrow`` or ``select`` as one chain of steps; None for any other call."""
        if name == "__getitem__":
            return self._getitem(args[0], args[1], value, func)
        if name not in ("narrow", "select"):
            return None
        op, canonical_args = canonical(func, tuple(args), kwargs)
        given = dict(zip(op.names, canonical_args, strict=True))
        node, dim, start = args[0], given.get("dim"), given.get("index" if name == "select" else "start")
        shape = node.meta["shape"]
        if not shape or not isinstance(dim, int) or not isinstance(start, int):
            return None
        dim = dim % len(shape)
        if dim in node.meta["dyn"] or (name == "narrow" and type(given["length"]) is not int):
            return None
        start = start % shape[dim] if start < 0 else start
        if name == "select":
            return self._step(_SELECT, node, (dim, start), value)
        whole = start == 0 and given["length"] == shape[dim]
        return node if whole else self._step(_SLICE, node, (dim, start, start + given["length"], 1), value)

    def _getitem(self, node: Any, index: Any, value: int, func: Any) -> Any:
        """Basic indexing as a chain of single-dim steps; anything else stays an indexing call."""
        items = list(index) if isinstance(index, tuple) else [index]
        shape = node.meta["shape"]
        if sum(isinstance(i, list) for i in items) == 1:  # x[:, [3]] is x[:, 3:4]; a copy there, but here nothing is written in place
            items = [_as_slice(i) if isinstance(i, list) else i for i in items]
        along = _list_dim(items, len(shape)) if shape is not None else None
        picked = along is not None and along not in node.meta["dyn"]
        if shape is None or not all(i is None or i is Ellipsis or type(i) is int or isinstance(i, slice) or picked for i in items):
            op, args = canonical(func, (node, index), {})
            return self._node(op, args, value)
        used = sum(1 for i in items if i is not None and i is not Ellipsis)
        if Ellipsis in [i for i in items if not isinstance(i, torch.fx.Node)]:
            at = next(k for k, i in enumerate(items) if i is Ellipsis)
            items[at : at + 1] = [slice(None)] * (len(shape) - used)
        steps: list[tuple[Op, tuple[Any, ...]]] = []
        dim, source = 0, 0
        for item in items:
            if item is None:
                steps.append((_UNSQUEEZE, (dim,)))
                dim += 1
                continue
            size, free = shape[source], source in node.meta["dyn"]
            if isinstance(item, slice):
                step = self._slice(item, dim, size, free)
                if step is not None:
                    steps.append((_SLICE, step))
                dim += 1
            elif isinstance(item, list):
                steps.append((_PICK, (dim, tuple(position % size for position in item))))
                dim += 1
            else:
                if free:
                    self._check(node, source, ">=", item + 1 if item >= 0 else -item)
                steps.append((_SELECT, (dim, item if free or item >= 0 else item + size)))
            source += 1
        for position, (op, args) in enumerate(steps):
            last = position == len(steps) - 1
            node = self._step(op, node, args, value if last else None)
        return node

    def _slice(self, item: slice, dim: int, size: int, free: bool) -> tuple[Any, ...] | None:
        bounds = (item.start, item.stop, item.step)
        if any(isinstance(b, torch.fx.Node) for b in bounds):
            raise SizeDependent("a free size is a slice bound", self.place)
        if free:
            if item.start in (None, 0) and item.stop is None and item.step in (None, 1):
                return None
            raise SizeDependent("a slice with fixed bounds along a free size", self.place)
        start, stop, step = item.indices(size)
        if (start, stop, step) == (0, size, 1):
            return None
        return dim, start, max(start, stop), step

    def _step(self, op: Op, node: Any, args: tuple[Any, ...], value: int | None) -> Any:
        """One step of basic indexing, with shape and free dims worked out for those in the middle of a chain."""
        made = self._node(op, (node, *args), value)
        if value is None and made.meta["shape"] is None:
            shape, dyn, dim = list(node.meta["shape"]), node.meta["dyn"], args[0]
            if op is _SELECT:
                del shape[dim]
                dyn = frozenset(d - (d > dim) for d in dyn if d != dim)
            elif op is _UNSQUEEZE:
                shape.insert(dim, 1)
                dyn = frozenset(d + (d >= dim) for d in dyn)
            else:
                shape[dim] = len(args[1]) if op is _PICK else len(range(args[1], args[2], args[3]))
            made.meta.update(shape=tuple(shape), dyn=dyn, dtype=node.meta["dtype"], device=node.meta["device"], stride=None)
        return made

    def _split(self, name: str, event: Event, args: Any, kwargs: Any) -> None:
        node = args[0]
        op, canonical_args = canonical(event.func, tuple(args), kwargs)
        given = dict(zip(op.names, canonical_args, strict=True))
        dim = given.get("dim", 0)
        rank = len(node.meta["shape"])
        dim = {"hsplit": 0 if rank == 1 else 1, "vsplit": 0, "dsplit": 2}.get(name, dim)
        dim = (dim if isinstance(dim, int) else 0) % rank
        if dim in node.meta["dyn"]:
            raise SizeDependent("a free size is split", self.place)
        start = 0
        for index, ref in enumerate(event.out):
            if name.endswith("unbind"):
                self.env[ref.value] = self._step(_SELECT, node, (dim, index), ref.value)
            else:
                width = self.trace.values[ref.value].shape[dim]
                whole = start == 0 and width == node.meta["shape"][dim]
                self.env[ref.value] = node if whole else self._step(_SLICE, node, (dim, start, start + width, 1), ref.value)
                start += width


def _as_slice(index: list[Any]) -> Any:
    """A list of consecutive positions as the slice it is; any other list as it came."""
    if index and all(type(i) is int for i in index) and index[0] >= 0 and index == list(range(index[0], index[0] + len(index))):
        return slice(index[0], index[-1] + 1)
    return index


def _list_dim(items: list[Any], rank: int) -> int | None:
    """Where the only index besides slices is one list of positions: the dim it picks along. (A number next to a list would move it.)"""
    lists = [at for at, item in enumerate(items) if isinstance(item, list)]
    if len(lists) != 1 or not all(type(position) is int for position in items[lists[0]]):
        return None
    if not all(item is None or item is Ellipsis or isinstance(item, (slice, list)) for item in items):
        return None
    before, after = items[: lists[0]], items[lists[0] + 1 :]
    if any(item is Ellipsis for item in before):
        return rank - 1 - sum(item is not None for item in after)
    return sum(item is not None for item in before)
