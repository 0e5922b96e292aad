"""Where lanes come together (cat, stack, sums), as single nodes and as ops inside an outer loop's lanes.

A join of packed lanes moves their axis to where the join wants it: a view and, at most, one copy. Operands that are not lanes of one
bundle are joined around them. Inside an outer loop the members' operands are runs of an inner bundle, which is unfolded into
outer and inner lanes: so loops in loops collapse without a second pass.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from ..bundle import Bundle, Node
from ..emit import CannotVectorize, Emitter, Packed
from ..joins import is_op, is_plain_add
from .base import rank, rule

KIND = "joins"  # in the README's table


def _lane_runs(emitter: Emitter, nodes: list[Node]) -> list[tuple[Bundle | None, list[Node]]]:
    """Consecutive operands that are lanes of one packed value; others one by one."""
    runs: list[tuple[Bundle | None, list[Node]]] = []
    for node in nodes:
        bundle = emitter.bundles.bundle(node)
        if bundle is not None and (bundle.index not in emitter.values or emitter.values[bundle.index].dim is None):
            bundle = None
        if bundle is not None and runs and runs[-1][0] is bundle:
            runs[-1][1].append(node)
        else:
            runs.append((bundle, [node]))
    return [(bundle if len(members) > 1 else None, members) for bundle, members in runs]


def _lanes(emitter: Emitter, bundle: Bundle, nodes: list[Node]) -> Packed:
    positions = [emitter.bundles.position[node] for node in nodes]
    return emitter.pick(emitter.values[bundle.index], len(bundle.members), positions)


def join(emitter: Emitter, node: Node) -> Any:
    """The packed form of a single ``cat`` / ``stack`` / ``sum_of`` / addition of lanes; None where it joins no lanes."""
    if is_op(node, "sum_of"):
        return _sum(emitter, list(node.args[0]))  # type: ignore[arg-type]
    if is_plain_add(node):
        return _sum(emitter, [node.args[0], node.args[1]])  # type: ignore[list-item]
    if is_op(node, "cat") or is_op(node, "stack"):
        tensors, dim = node.args
        runs = _lane_runs(emitter, list(tensors))  # type: ignore[arg-type]
        if all(bundle is None for bundle, _ in runs):
            return None
        dim = int(dim)  # type: ignore[arg-type]
        stack = is_op(node, "stack")
        parts = [_part(emitter, bundle, members, dim, stack) for bundle, members in runs]
        return parts[0] if len(parts) == 1 else emitter.call(torch.cat, parts, dim)
    return None


def _part(emitter: Emitter, bundle: Bundle | None, members: list[Node], dim: int, stack: bool) -> Node:
    if bundle is None:
        single = emitter.single(members[0])
        return emitter.call(torch.unsqueeze, single, dim) if stack else single
    moved = emitter.at(_lanes(emitter, bundle, members), dim)
    return moved if stack else emitter.call(torch.flatten, moved, dim, dim + 1)


def _sum(emitter: Emitter, nodes: list[Node]) -> Any:
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
        value = _lanes(emitter, emitter.bundles.classes[index], members)
        terms.append(emitter.call(torch.sum, value.node, value.dim))
    terms.extend(emitter.single(node) for node in alone)
    return functools.reduce(lambda a, b: emitter.call(torch.add, a, b), terms)


# -- joins that are themselves in lanes of an outer loop -------------------------------------------------------------------------------


@rule("cat", "stack", "sum_of", lowering="join")
def _join_in_lanes(emitter: Emitter, bundle: Bundle) -> Packed:
    lists = [list(member.args[0]) for member in bundle.members]  # type: ignore[arg-type]
    inner = len(lists[0])
    dim = int(bundle.members[0].args[1]) if bundle.name != "sum_of" else 0  # type: ignore[arg-type]
    nested = _nested(emitter, bundle, lists)
    if nested is not None:
        return _join_nested(emitter, bundle, nested, dim)
    lane_rank = rank(lists[0][0])
    columns = [emitter.fetch([operands[i] for operands in lists]) for i in range(inner)]
    if bundle.name == "sum_of":
        from .elementwise import aligned

        nodes, lane = aligned(emitter, [(column, lane_rank) for column in columns], lane_rank)
        if all(column.dim is None for column in columns):
            raise CannotVectorize("every lane adds the same tensors")
        return Packed(functools.reduce(lambda a, b: emitter.call(torch.add, a, b), nodes), lane)
    lanes = len(bundle.members)
    fronts = [emitter.front(column, lanes) for column in columns]
    return Packed(emitter.call(torch.stack if bundle.name == "stack" else torch.cat, fronts, dim + 1), 0)


def _nested(emitter: Emitter, bundle: Bundle, lists: list[list[Node]]) -> Packed | None:
    """``[outer, inner, ...]`` lanes in front, where the operands of all members are, in order, the lanes of one inner bundle."""
    flat = [node for operands in lists for node in operands]
    inner = emitter.bundles.bundle(flat[0])
    if inner is None or any(emitter.bundles.of.get(node) != inner.index for node in flat):
        return None
    value = _lanes(emitter, inner, flat)
    if value.dim is None:
        return None
    return Packed(emitter.call(torch.unflatten, value.node, value.dim, (len(lists), len(lists[0]))), value.dim)


def _join_nested(emitter: Emitter, bundle: Bundle, nested: Packed, dim: int) -> Packed:
    """``nested`` has the outer lanes at ``dim`` and the inner ones right after; the inner ones are joined."""
    assert nested.dim is not None
    outer, inner = nested.dim, nested.dim + 1
    if bundle.name == "sum_of":
        return Packed(emitter.call(torch.sum, nested.node, inner), outer)
    front = emitter.call(torch.movedim, nested.node, (outer, inner), (0, 1 + dim))
    if bundle.name == "stack":
        return Packed(front, 0)
    return Packed(emitter.call(torch.flatten, front, 1 + dim, 2 + dim), 0)


