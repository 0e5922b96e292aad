"""Where lanes come together (cat, stack, sums), as single nodes and as ops inside an outer loop's lanes.

A join of packed lanes moves their axis to where the join wants it: a view and, at most, one copy. Operands that are not lanes of one
bundle are joined around them. Inside an outer loop the members' operands are runs of an inner bundle, which is unfolded into
outer and inner lanes: so loops in loops collapse without a second pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ..bundle import Bundle, Node
from ..emit import Emitter
from ..joins import is_op, is_plain_add
from ..writer import CannotVectorize, Packed
from .base import rank, rule
from .folded import folded

KIND = "joins"  # in the README's table


def _lane_runs(emitter: Emitter, nodes: list[Node], dim: int | None) -> list[tuple[Bundle | None, list[Node]]]:
    """Consecutive operands that are lanes of one packed value, or lie end to end in the dim in which they are joined; others one by one."""
    runs: list[tuple[Bundle | None, list[Node]]] = []
    for node in nodes:
        bundle = emitter.bundles.end_to_end(node)
        if bundle is not None and bundle.index not in emitter.values:
            bundle = None
        elif bundle is not None and bundle.apart is not None:
            bundle = bundle if dim == rank(node) + bundle.apart else None
        elif bundle is not None and emitter.values[bundle.index].dim is None:
            bundle = None
        follows = bundle is not None and runs and runs[-1][0] is bundle
        if follows and bundle is not None and bundle.apart is not None:
            follows = emitter.bundles.position[node] == emitter.bundles.position[runs[-1][1][-1]] + 1
        if follows:
            runs[-1][1].append(node)
        else:
            runs.append((bundle, [node]))
    return [(bundle if len(members) > 1 else None, members) for bundle, members in runs]


def _lanes(emitter: Emitter, bundle: Bundle, nodes: list[Node]) -> Packed:
    positions = [emitter.bundles.position[node] for node in nodes]
    return emitter.pick(emitter.values[bundle.index], len(bundle.members), positions)


def join(emitter: Emitter, node: Node) -> Any:
    """The packed form of a single ``cat``, ``stack``, chain or addition of lanes; None where it joins no lanes."""
    for name in _CHAINS:
        if is_op(node, name):
            return _chain(emitter, name, list(node.args[0]), node)  # type: ignore[arg-type]
    if is_plain_add(node):
        return _chain(emitter, "sum_of", [node.args[0], node.args[1]], node)  # type: ignore[list-item]
    if is_op(node, "sum") or is_op(node, "mean"):
        return _sum_of_join(emitter, node)
    if is_op(node, "cat") or is_op(node, "stack"):
        tensors, dim = node.args
        dim = int(dim)  # type: ignore[arg-type]
        stack = is_op(node, "stack")
        runs = _lane_runs(emitter, list(tensors), None if stack else dim)  # type: ignore[arg-type]
        if all(bundle is None for bundle, _ in runs):
            return None
        parts = [_part(emitter, bundle, members, dim, stack) for bundle, members in runs]
        return parts[0] if len(parts) == 1 else emitter.call(torch.cat, parts, dim)
    return None


def _part(emitter: Emitter, bundle: Bundle | None, members: list[Node], dim: int, stack: bool) -> Node:
    if bundle is None:
        single = emitter.single(members[0])
        return emitter.call(torch.unsqueeze, single, dim) if stack else single
    if bundle.apart is not None:
        return emitter.stretch(bundle, emitter.bundles.position[members[0]], len(members))
    moved = emitter.at(_lanes(emitter, bundle, members), dim)
    return moved if stack else emitter.call(torch.flatten, moved, dim, dim + 1)


# A chain as one op over the lane axis, and as an operation on two tensors.
_CHAINS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "sum_of": (torch.sum, torch.add),
    "prod_of": (torch.prod, torch.mul),
    "min_of": (torch.amin, torch.minimum),
    "max_of": (torch.amax, torch.maximum),
}


def _as_written(name: str, count: int) -> bool:
    """A minimum of more than two, two at a time: where three tie, ``amin`` shares the gradient evenly, and the chain does not."""
    return name in ("min_of", "max_of") and count > 2


def _over_lanes(emitter: Emitter, name: str, value: Node, dim: int) -> Node:
    """The chain ``name`` along one dim; the dtype stays what it is."""
    dtype = value.meta["val"].dtype
    if name in ("min_of", "max_of"):
        return emitter.call(_CHAINS[name][0], value, dim)
    exact = dtype.is_floating_point or dtype.is_complex
    return emitter.call(_CHAINS[name][0], value, dim) if exact else emitter.call(_CHAINS[name][0], value, dim, dtype=dtype)


def _sum_of_join(emitter: Emitter, node: Node) -> Any:
    """``stack(lanes, d).sum(d)``, or the mean, where it folds into the lanes' last layer; else None: it is a sum over the packed lanes."""
    given: dict[str, Any] = dict(zip(node.target.names, node.args, strict=True))  # type: ignore[union-attr]
    source: Any = given["input"]
    dims = given.get("dim")
    stack = is_op(source, "stack")
    if not (stack or is_op(source, "cat")) or set(source.users) != {node} or given.get("dtype") is not None:
        return None
    tensors, dim, dtype = list(source.args[0]), int(source.args[1]), source.meta["dtype"]
    if (list(dims) if isinstance(dims, (list, tuple)) else [dims]) not in ([dim], [dim - len(source.meta["shape"])]):
        return None
    if not (dtype.is_floating_point or dtype.is_complex) or any(t.meta["dtype"] is not dtype for t in tensors):
        return None
    if not stack and any(t.meta["shape"][dim] != 1 or dim in t.meta["dyn"] for t in tensors):
        return None
    groups: dict[int, list[Node]] = {}
    for tensor in tensors:
        bundle = emitter.bundles.bundle(tensor)
        if bundle is None:
            return None
        groups.setdefault(bundle.index, []).append(tensor)
    parts = [folded(emitter, members, source) for members in groups.values()]
    if any(part is None for part in parts):
        return None
    total = functools.reduce(lambda a, b: emitter.call(torch.add, a, b), parts)
    if is_op(node, "mean"):
        total = emitter.call(torch.div, total, float(len(tensors)))
    if stack and given.get("keepdim"):
        return emitter.call(torch.unsqueeze, total, dim)
    return total if stack or given.get("keepdim") else emitter.call(torch.squeeze, total, dim)


def _chain(emitter: Emitter, name: str, nodes: list[Node], reader: Node) -> Any:
    """One op for all lanes of a bundle among ``nodes``, combined with what else there is; None where there are none."""
    if _as_written(name, len(nodes)):
        return None
    by_bundle: dict[int, list[Node]] = {}
    alone: list[Node] = []
    for node in nodes:
        bundle = emitter.bundles.bundle(node)
        if bundle is not None and bundle.index in emitter.values and emitter.values[bundle.index].dim is not None:
            by_bundle.setdefault(bundle.index, []).append(node)
        else:
            alone.append(node)
    if all(len(members) < 2 for members in by_bundle.values()):
        return None
    terms: list[Node] = []
    for index, members in by_bundle.items():
        if len(members) < 2:
            alone.extend(members)
            continue
        members.sort(key=lambda n: emitter.bundles.position[n])
        whole = folded(emitter, members, reader) if name == "sum_of" and len(set(nodes)) == len(nodes) else None
        if whole is not None:
            terms.append(whole)
            continue
        value = _lanes(emitter, emitter.bundles.classes[index], members)
        assert value.dim is not None
        terms.append(_over_lanes(emitter, name, value.node, value.dim))
    terms.extend(emitter.single(node) for node in alone)
    return functools.reduce(lambda a, b: emitter.call(_CHAINS[name][1], a, b), terms)


# -- joins that are themselves in lanes of an outer loop -------------------------------------------------------------------------------


@rule("cat", "stack", *_CHAINS, lowering="join")
def _join_in_lanes(emitter: Emitter, bundle: Bundle) -> Packed:
    lists = [list(member.args[0]) for member in bundle.members]  # type: ignore[arg-type]
    inner = len(lists[0])
    dim = 0 if bundle.name in _CHAINS else int(bundle.members[0].args[1])  # type: ignore[arg-type]
    nested = None if _as_written(bundle.name, inner) else _nested(emitter, bundle, lists)
    if nested is not None:
        return _join_nested(emitter, bundle, nested, dim)
    lane_rank = rank(lists[0][0])
    columns = [emitter.fetch([operands[i] for operands in lists]) for i in range(inner)]
    if bundle.name in _CHAINS:
        from .elementwise import aligned

        nodes, lane = aligned(emitter, [(column, lane_rank) for column in columns], lane_rank)
        if all(column.dim is None for column in columns):
            raise CannotVectorize("every lane combines the same tensors")
        return Packed(functools.reduce(lambda a, b: emitter.call(_CHAINS[bundle.name][1], a, b), nodes), lane)
    lanes = len(bundle.members)
    fronts = [emitter.front(column, lanes) for column in columns]
    return Packed(emitter.call(torch.stack if bundle.name == "stack" else torch.cat, fronts, dim + 1), 0)


def _nested(emitter: Emitter, bundle: Bundle, lists: list[list[Node]]) -> Packed | None:
    """``[outer, inner, ...]`` lanes in front, where the operands of all members are, in order, the lanes of one inner bundle."""
    flat = [node for operands in lists for node in operands]
    inner = emitter.bundles.bundle(flat[0])
    if inner is None or any(emitter.bundles.of.get(node) != inner.index for node in flat):
        return None
    rows, columns = len(lists), len(lists[0])
    whole = emitter.values[inner.index]
    positions = [emitter.bundles.position[node] for node in flat]
    turned_order = [column * rows + row for row in range(rows) for column in range(columns)]
    if whole.dim is not None and len(inner.members) == len(flat) and positions == turned_order:
        turned = emitter.call(torch.unflatten, whole.node, whole.dim, (columns, rows))
        return Packed(emitter.call(torch.transpose, turned, whole.dim, whole.dim + 1), whole.dim)
    value = emitter.pick(whole, len(inner.members), positions)
    if value.dim is None:
        return None
    return Packed(emitter.call(torch.unflatten, value.node, value.dim, (rows, columns)), value.dim)


def _join_nested(emitter: Emitter, bundle: Bundle, nested: Packed, dim: int) -> Packed:
    """``nested`` has the outer lanes at ``dim`` and the inner ones right after; the inner ones are joined."""
    assert nested.dim is not None
    outer, inner = nested.dim, nested.dim + 1
    if bundle.name in _CHAINS:
        return Packed(_over_lanes(emitter, bundle.name, nested.node, inner), outer)
    front = emitter.call(torch.movedim, nested.node, (outer, inner), (0, 1 + dim))
    if bundle.name == "stack":
        return Packed(front, 0)
    return Packed(emitter.call(torch.flatten, front, 1 + dim, 2 + dim), 0)


