"""Lanes of unequal widths: layers that are one loop but for how many numbers they take or give.

Comes in: a graph. Goes out: groups of nodes that can be computed as one although their sizes differ:

- linear layers with weights of their own that take unequal widths, give unequal widths, or both: one product of weights filled up with
  zeros, where that does not multiply the work by more than ``MOST_WASTE``;
- linear layers and convolutions on one shared input that give unequal widths: one wide layer, nothing filled up;
- look-ups in tables of unequal widths: one table whose rows are filled up with zeros, where that does not make it too much larger;
- elementwise ops of one tensor on what those give.

Nodes are compared by value numbers that leave sizes out: members of a group have equal histories but for sizes, so they sit at the same
height of the graph and cannot depend on each other. What a group gives lies end to end in one tensor where its widths differ; where
they are equal, it is a pack like any other, and what follows in the lanes are ordinary bundles.

Nothing is ever multiplied by a zero that fills up unless it is a zero itself: an input's inf or nan stays in its own lane.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch.fx

from fxfuse.ops import Op

Node = torch.fx.Node

# A group's filled-up weights may have at most so many times the elements of the lanes' own.
MOST_WASTE = 4.0

# Which dim of a result holds its features, counted from the end.
CONVOLUTIONS = {"conv1d": -2, "conv2d": -3, "conv3d": -4}


# Of one tensor, over other dims than its last: each feature by itself (means of sequences of embeddings).
REDUCTIONS = frozenset({"sum", "mean", "amax", "amin"})
# Random, but element by element: each draws its own.
DROPOUTS = frozenset({"dropout", "alpha_dropout"})


@dataclass(frozen=True)
class Group:
    """Nodes to be computed as one. ``dim``: the dim in which their results differ, counted from the end; None where they are equal."""

    members: tuple[Node, ...]
    dim: int | None


def unequal_groups(nodes: Iterable[Node], blurred: dict[Node, int], min_lanes: int) -> list[Group]:
    """The groups, operands first. ``blurred``: a number for each node, equal for nodes of equal histories but for sizes."""
    found: list[Group] = []
    of: dict[Node, Group] = {}
    by_number: dict[int, list[Node]] = {}
    for node in nodes:
        if node.op == "call_function" and isinstance(node.target, Op):
            by_number.setdefault(blurred[node], []).append(node)
    for members in by_number.values():  # in the order of their first members: operands come first
        for group in _groups(members, of):
            if len(group.members) >= min_lanes:
                found.append(group)
                of.update((member, group) for member in group.members)
    return found


def _groups(members: list[Node], of: dict[Node, Group]) -> list[Group]:
    op = members[0].target
    assert isinstance(op, Op)
    if op.name == "linear" or op.name in CONVOLUTIONS:
        return _layers(members, op)
    if op.name == "embedding":
        return _look_ups(members, op)
    if (op.pointwise and not op.random) or op.name in DROPOUTS or (op.name in REDUCTIONS and _keeps_features(members)):
        return _elementwise(members, of)
    return []


def _layers(members: list[Node], op: Op) -> list[Group]:
    """Layers of one op, by what else they must agree in."""
    alike: dict[Any, list[Node]] = {}
    for node in members:
        given = dict(zip(op.names, node.args, strict=True))
        x, weight, bias = (uncast(given[name]) for name in ("input", "weight", "bias"))
        if not _is_weight(weight) or (bias is not None and not _is_weight(bias)) or not isinstance(x, Node):
            continue
        assert isinstance(weight, Node)
        if len(x.meta["shape"]) < 1 or (op.name == "linear" and len(weight.meta["shape"]) != 2):
            continue
        if op.name in CONVOLUTIONS:
            if given["groups"] == 1 and len(x.meta["shape"]) == len(weight.meta["shape"]):
                alike.setdefault((x, weight.meta["shape"][1:]), []).append(node)
        else:
            alike.setdefault((x.meta["shape"][:-1], x.meta["dyn"], len(x.meta["shape"])), []).append(node)
    found: list[Group] = []
    for group in alike.values():
        if len({uncast(node.args[1]).meta["shape"] for node in group}) < 2:
            continue
        if op.name == "linear" and len({uncast(node.args[0]) for node in group}) > 1:
            for part in _of_like_size(_apart(group)):
                found.extend(_group(part, -1))
        else:
            found.extend(_group(group, CONVOLUTIONS.get(op.name, -1)))
    return found


def _group(members: list[Node], dim: int) -> list[Group]:
    """The group, where its members' weights are distinct and their sizes unequal."""
    weights = [uncast(member.args[1]) for member in members]
    sizes = {weight.meta["shape"] for weight in weights}
    if len(set(weights)) < len(weights) or len(sizes) < 2:
        return []
    widths = {member.meta["shape"][dim] for member in members}
    return [Group(tuple(members), dim if len(widths) > 1 else None)]


def _look_ups(members: list[Node], op: Op) -> list[Group]:
    """Look-ups in tables of their own, with equally many indices."""
    alike: dict[Any, list[Node]] = {}
    for node in members:
        given = dict(zip(op.names, node.args, strict=True))
        index, weight = given["input" if "input" in op.names else "indices"], given["weight"]
        plain = not given["sparse"] and not given["scale_grad_by_freq"] and given.get("max_norm") is None
        if plain and _is_weight(weight) and isinstance(index, Node):
            alike.setdefault((index.meta["shape"], index.meta["dyn"]), []).append(node)
    found: list[Group] = []
    for group in alike.values():
        column = op.names.index("weight")
        parts: list[list[Node]] = []
        rows = own = 0
        for member in sorted(group, key=lambda node: int(node.args[column].meta["shape"][1])):  # type: ignore[union-attr]
            count, width = member.args[column].meta["shape"]  # type: ignore[union-attr]
            if parts and (rows + count) * width <= MOST_WASTE * (own + count * width):
                parts[-1].append(member)
                rows, own = rows + count, own + count * width
            else:
                parts.append([member])
                rows, own = count, count * width
        for part in parts:
            tables = [member.args[column] for member in part]
            widths = {table.meta["shape"][1] for table in tables}  # type: ignore[union-attr]
            if len(set(tables)) == len(tables) and len(widths) > 1:
                found.append(Group(tuple(node for node in group if node in part), -1))
    return found


def uncast(arg: Any) -> Any:
    """What autocast casts before the call, or ``arg`` itself: lanes are told apart, laid out and packed before they are cast."""
    return arg.args[0] if isinstance(arg, Node) and isinstance(arg.target, Op) and arg.target.name == "autocast_to" else arg


def _is_weight(arg: Any) -> bool:
    return isinstance(arg, Node) and arg.op == "get_attr" and arg.meta.get("own_shape") is None


def _apart(members: list[Node]) -> list[Node]:
    """Members whose input no other member reads: several layers on one input among others are no lanes of it."""
    readers = Counter(uncast(member.args[0]) for member in members)
    return [member for member in members if readers[uncast(member.args[0])] == 1]


def _of_like_size(members: list[Node]) -> list[list[Node]]:
    """The members in groups that filling up makes at most ``MOST_WASTE`` times as large, in program order."""
    parts: list[list[Node]] = []
    high = wide = own = 0  # of the last part: its largest sizes, and the elements of its lanes' own weights
    for member in sorted(members, key=lambda node: uncast(node.args[1]).meta["shape"]):
        m, k = uncast(member.args[1]).meta["shape"]
        if parts and (len(parts[-1]) + 1) * max(high, m) * max(wide, k) <= MOST_WASTE * (own + m * k):
            parts[-1].append(member)
            high, wide, own = max(high, m), max(wide, k), own + m * k
        else:
            parts.append([member])
            high, wide, own = m, k, m * k
    order = {member: index for index, member in enumerate(members)}
    return [sorted(part, key=order.__getitem__) for part in parts]


def _keeps_features(members: list[Node]) -> bool:
    """Are other dims than the last reduced, in every member?"""
    assert isinstance(members[0].target, Op)
    for member in members:
        given = dict(zip(members[0].target.names, member.args, strict=True))
        dims: Any = given.get("dim")
        listed = list(dims) if isinstance(dims, (list, tuple)) else [dims]
        rank = len(member.all_input_nodes[0].meta["shape"])
        if not listed or any(type(d) is not int or d % rank == rank - 1 for d in listed):
            return False
    return True


def _elementwise(members: list[Node], of: dict[Node, Group]) -> list[Group]:
    """Ops of one tensor that keep its features, each on another member of one group whose results are unequal: all of them, once each."""
    if any(len(node.all_input_nodes) != 1 for node in members):
        return []
    sources = [node.all_input_nodes[0] for node in members]
    group = of.get(sources[0])
    if group is None or group.dim is None or set(sources) != set(group.members) or len(sources) != len(group.members):
        return []
    reduces = members[0].target.name in REDUCTIONS  # type: ignore[union-attr]
    if reduces and group.dim != -1:
        return []
    pairs = list(zip(members, sources, strict=True))
    if any(not node.meta["shape"] or node.meta["shape"][-1] != source.meta["shape"][-1] for node, source in pairs):
        return []
    if not reduces and any(node.meta["shape"] != source.meta["shape"] for node, source in pairs):
        return []
    by_source = dict(zip(sources, members, strict=True))
    return [Group(tuple(by_source[source] for source in group.members), group.dim)]


def blurred_numbers(nodes: Iterable[Node], key: Callable[[Node, dict[Node, int]], Any]) -> dict[Node, int]:
    """A number for each node, equal where ``key``, given the numbers of its operands, is."""
    numbers: dict[Any, int] = {}
    found: dict[Node, int] = {}
    for node in nodes:
        if node.op != "output":
            found[node] = numbers.setdefault(key(node, found), len(numbers))
    return found
