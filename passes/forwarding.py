"""Reads of a buffer that is being filled see what was written: store-to-load forwarding, as compilers call it.

Comes in: a functional graph from ``lift``, where each write is an ``index_write`` of the whole buffer. Goes out: the same graph, in
place, in which

- a view that undoes another is the tensor itself (``flat = out.view(-1)``, and back for the next write);
- a write at several dims (``out[:, i, j] = v``) is a write into a row that is written into the buffer, each at one dim;
- a write of a whole tensor is the value; its size is that of the buffer;
- a read of a place that no write has touched reads the buffer as it was; a read of a place that was written is the value written.

So ``out[:, i] += net(x)`` and writes through views of views become plain chains of writes (``buffers`` joins those), and lanes that
fill one buffer no longer look as if each read what the last one wrote.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx

from fxfuse.functional import as_slot, casting, drop_unused, index_write, op_of, slice_along
from fxfuse.ops import Op, canonical

Node = torch.fx.Node

SELECT = canonical(torch.select, (torch.empty(0), 0, 0), {})[0]
SLICE = op_of(slice_along)
WRITE = op_of(index_write)
SLOT = op_of(as_slot)
_RESHAPES = frozenset("view reshape flatten unsqueeze squeeze unflatten".split())
_MADE = frozenset(
    "zeros ones empty full rand randn new_zeros new_ones new_empty new_full zeros_like ones_like empty_like full_like clone".split()
)


@dataclass(frozen=True)
class Place:
    """Where a write goes: some positions of one dim. ``single``: one index, which the value does not have as a dim."""

    dim: int
    positions: range
    single: bool


@dataclass
class _Buffer:
    """A chain of writes along one dim of ``root``: what each position held, and since which write."""

    root: Node
    dim: int
    writes: dict[Node, int] = field(default_factory=dict)  # write -> its number in the chain
    held: dict[int, list[tuple[int, Node]]] = field(default_factory=dict)  # position -> (number of the write, the write)
    before: dict[Place, Node] = field(default_factory=dict)  # reads of ``root``, each made once


def forward_writes(graph: torch.fx.Graph) -> None:
    """Rewrite in place. Near-linear: a read looks at the positions it reads, not at the writes before it."""
    if not any(node.target == WRITE for node in graph.nodes):
        return
    buffers: dict[Node, _Buffer] = {}  # the last write of each chain, and all before it
    for node in list(graph.nodes):
        if not isinstance(node.target, Op) or not node.users:
            continue
        if node.target.name == "size":
            _size(node)
        elif node.meta.get("shape") is None:
            continue
        elif node.target.name in _RESHAPES or node.target.name == "transpose":
            _undo_views(node)
        elif node.target == SLOT:
            _fitting_slot(node)
        elif node.target == WRITE:
            _write(graph, node, buffers)
        elif node.target in (SELECT, SLICE):
            _read(graph, node, buffers)
    drop_unused(graph)


def place_of(index: Any, shape: tuple[int, ...], dyn: frozenset[int]) -> Place | None:
    """The place of an index that picks along one dim of fixed size; None for any other index."""
    places = _places(index, shape, dyn)
    return places[0] if places is not None and len(places) == 1 else None


def _places(index: Any, shape: tuple[int, ...], dyn: frozenset[int]) -> list[Place] | None:
    """What an index picks, for each dim at which it picks; None where that is not known when the graph is made."""
    items = list(index) if isinstance(index, tuple) else [index]
    if any(not (i is Ellipsis or type(i) in (int, slice, list)) for i in items):
        return None
    if any(i is Ellipsis for i in items):
        at = next(k for k, i in enumerate(items) if i is Ellipsis)
        items[at : at + 1] = [slice(None)] * (len(shape) - len(items) + 1)
    found: list[Place] = []
    for dim, item in enumerate(items):
        size = shape[dim]
        if isinstance(item, slice):
            if item.start in (None, 0) and item.stop is None and item.step in (None, 1):
                continue
            if any(isinstance(bound, Node) for bound in (item.start, item.stop, item.step)):
                return None
            positions = range(*item.indices(size))
            if positions == range(size) and dim not in dyn:
                continue
            found.append(Place(dim, positions, False))
        elif isinstance(item, list):  # consecutive positions are the slice they are
            if not item or any(type(i) is not int for i in item) or item != list(range(item[0], item[0] + len(item))) or item[0] < 0:
                return None
            found.append(Place(dim, range(item[0], item[-1] + 1), False))
        else:
            found.append(Place(dim, range(item % size, item % size + 1) if size else range(0), True))
        if dim in dyn or not found[-1].positions or found[-1].positions.step < 0:
            return None
    return found


# -- views ------------------------------------------------------------------------------------------------------------------------


def _undo_views(node: Node) -> None:
    """A view of a view that has the shape of what it started from is that tensor."""
    source: Any = node.args[0]
    assert isinstance(node.target, Op)
    if node.target.name == "transpose":
        if _is(source, "transpose") and set(source.args[1:]) == set(node.args[1:]):
            _replace(node, source.args[0])
        return
    at = source
    while isinstance(at, Node) and isinstance(at.target, Op) and at.target.name in _RESHAPES:
        at = at.args[0]
    if isinstance(at, Node) and _alike(at, node):
        _replace(node, at)


def _replace(node: Node, by: Node) -> None:
    """What leaves the graph stays as it is: it may share memory with an input, or have strides of its own."""
    node.replace_all_uses_with(by, delete_user_cb=lambda user: user.op != "output")


def _size(node: Node) -> None:
    """A size of a buffer is that of the buffer before it was written to; that of a view is what it was made with."""
    source, dim = node.args
    while isinstance(source, Node) and source.target == WRITE:
        source = source.args[0]
    if isinstance(source, Node) and isinstance(source.target, Op) and source.target.name in ("view", "reshape"):
        sizes = source.args[1]
        if isinstance(sizes, (tuple, list)) and isinstance(sizes[dim], Node):  # type: ignore[index]
            node.replace_all_uses_with(sizes[dim])  # type: ignore[index, arg-type]
            return
    node.args = (source, dim)


def _fitting_slot(node: Node) -> None:
    """A value that already has the shape and dtype of its slot."""
    value = node.args[0]
    if isinstance(value, Node) and _alike(value, node):
        _replace(node, value)


def _alike(one: Node, other: Node) -> bool:
    return all(one.meta.get(fact) == other.meta.get(fact) for fact in ("shape", "dyn", "dtype"))


# -- writes -----------------------------------------------------------------------------------------------------------------------


def _write(graph: torch.fx.Graph, node: Node, buffers: dict[Node, _Buffer]) -> None:
    base, index, value = node.args
    assert isinstance(base, Node)
    places = _places(index, node.meta["shape"], node.meta["dyn"])
    if places is None or not isinstance(value, Node) or value.meta.get("shape") is None:
        return
    if not places:  # buffer[:] = value
        if _blank(base) or (len(base.users) > 1 and has_history(value)):
            _replace(node, fitted(graph, node, value, base))
        return
    if len(places) > 1:
        # The outer dim of single indices first: out[:, i, j] is element j of row i.
        outer = next((place for place in places if place.single), places[0])
        row = taken(graph, node, base, outer)
        row = _read(graph, row, buffers) or row
        inner = [_index_at(place, outer) for place in places if place is not outer]
        with graph.inserting_before(node):
            written = graph.call_function(WRITE, (row, _full_index(inner), value))
        written.meta.update(row.meta, value=None, place=node.meta.get("place"), path=node.meta.get("path"), frame=node.meta.get("frame"))
        _write(graph, written, buffers)
        node.args = (base, _full_index([outer]), written)
        places, value = [outer], written
    (place,) = places
    known = buffers.get(base)
    if known is None or known.dim != place.dim or known.writes[base] != len(known.writes) - 1:
        known = _Buffer(base, place.dim)
    number = known.writes[node] = len(known.writes)
    for position in place.positions:
        known.held.setdefault(position, []).append((number, node))
    buffers[node] = known


def _blank(node: Any) -> bool:
    """A buffer as it was made, or part of it. What was computed and is overwritten stays: its weights get gradients of zeros, not None."""
    while isinstance(node, Node) and isinstance(node.target, Op) and node.target.name in (*_RESHAPES, "transpose", "select", "slice_along"):
        node = node.args[0]
    return isinstance(node, Node) and (not isinstance(node.target, Op) or node.target.name in _MADE)


def keeps_history(base: Any, values: list[Node]) -> bool:
    """Does a computed ``base`` that ``values`` cover as a whole still give its history to the result? They have none, then."""
    return not _blank(base) and not any(map(has_history, values))


def has_history(node: Node) -> bool:
    """Can a gradient go through it to a weight or an input?"""
    pending, seen = [node], {node}
    while pending:
        at = pending.pop()
        if at.op != "call_function":
            return True
        if not (isinstance(at.target, Op) and at.target.name == "detach"):
            pending.extend(each for each in at.all_input_nodes if each not in seen)
            seen.update(at.all_input_nodes)
    return False


def fitted(graph: torch.fx.Graph, node: Node, value: Node, slot: Node) -> Node:
    """``value`` in the shape and dtype of ``slot``, ahead of ``node``."""
    if _alike(value, slot):
        return value
    with graph.inserting_before(node):
        if value.meta["shape"] == slot.meta["shape"] and value.meta["dyn"] == slot.meta["dyn"]:
            made = graph.call_function(*canonical(casting(value.meta["dtype"], slot.meta["dtype"]), (value, slot.meta["dtype"]), {}))
        else:
            made = graph.call_function(SLOT, (value, slot))
    made.meta.update(slot.meta, value=None, stride=None, place=value.meta.get("place"), path=value.meta.get("path"))
    return made


def _full_index(places: list[Place]) -> tuple[Any, ...]:
    items: list[Any] = [slice(None)] * (max(place.dim for place in places) + 1)
    for place in places:
        r = place.positions
        items[place.dim] = r.start if place.single else slice(r.start, r.stop, r.step)
    return tuple(items)


def _index_at(place: Place, outer: Place) -> Place:
    """A place inside the row that ``outer`` takes."""
    return Place(place.dim - (outer.single and place.dim > outer.dim), place.positions, place.single)


# -- reads ------------------------------------------------------------------------------------------------------------------------


def taken(graph: torch.fx.Graph, node: Node, base: Node, place: Place) -> Node:
    """A read of ``place``, ahead of ``node``."""
    shape, dyn = list(base.meta["shape"]), base.meta["dyn"]
    with graph.inserting_before(node):
        if place.single:
            made = graph.call_function(SELECT, (base, place.dim, place.positions.start))
            del shape[place.dim]
            dyn = frozenset(d - (d > place.dim) for d in dyn)
        else:
            made = graph.call_function(SLICE, (base, place.dim, place.positions.start, place.positions.stop, place.positions.step))
            shape[place.dim] = len(place.positions)
    made.meta.update(base.meta, value=None, stride=None, shape=tuple(shape), dyn=dyn)
    made.meta.update({key: node.meta.get(key) for key in ("place", "path", "frame")})
    return made


def _read(graph: torch.fx.Graph, node: Node, buffers: dict[Node, _Buffer]) -> Node | None:
    """Replace a ``select`` or ``slice_along`` by what it reads, where that is known; returns the replacement."""
    source: Any = node.args[0]
    known = buffers.get(source)
    if known is None:
        return None
    dim, *numbers = [int(arg) for arg in node.args[1:]]  # type: ignore[arg-type]
    if node.target == SELECT:
        at = numbers[0] % source.meta["shape"][dim]
        place = Place(dim, range(at, at + 1), True)
    else:
        place = Place(dim, range(*numbers), False)
    if place.dim != known.dim or not place.positions:
        return None
    now = known.writes[source]
    found = {next((write for number, write in reversed(known.held.get(p, [])) if number <= now), None) for p in place.positions}
    if len(found) > 1:
        return None
    (write,) = found
    if write is None:
        if place not in known.before:
            made = taken(graph, node, known.root, place)
            known.before[place] = _read(graph, made, buffers) or made
        made = known.before[place]
    else:
        written = place_of(write.args[1], write.meta["shape"], write.meta["dyn"])
        if written is None or written.positions != place.positions or written.single != place.single:
            return None
        assert isinstance(write.args[2], Node)
        made = fitted(graph, node, write.args[2], taken(graph, node, known.root, place))
    _replace(node, made)
    return made


def _is(node: Any, name: str) -> bool:
    return isinstance(node, Node) and isinstance(node.target, Op) and node.target.name == name
