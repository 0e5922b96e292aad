"""Several places of every lane's own tensor, each read for itself: ``y[:, -1]`` and ``y[:, 0]``, the halves of a gate.

Comes in: classes of nodes, in which slices of equal tensors are one class whatever their places. Goes out: the slices that are to be a
class per place. Lanes x places in one pack are a copy, which pays where one op reads them all; where every reader takes one place of
each lane, each place is a view of the pack.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch.fx

Node = torch.fx.Node


class Class(Protocol):
    """What is asked of a class of nodes."""

    members: list[Node]

    @property
    def name(self) -> str: ...


def read_apart(classes: Sequence[Class], of: dict[Node, int], positions: dict[str, tuple[str, ...]]) -> set[Node]:
    """The slices whose readers take one place of each lane. ``positions``: the arguments of slicing ops that say which place.

    Slices of slices (``y[:, -1, :h]`` and ``y[:, 0, h:]``) are told apart from the last one on: call it until it finds nothing new.
    """
    found: set[Node] = set()
    for members in (each.members for each in classes if each.name in positions and len(each.members) > 2):
        places = {member: _place(member, positions) for member in members}
        sources = {member: member.args[0] for member in members}
        lanes, rest = divmod(len(members), len(set(places.values())))
        if not rest and 1 < lanes < len(members) and _one_by_one(classes, of, places, sources, lanes):
            found.update(members)
    return found


def _place(node: Node, positions: dict[str, tuple[str, ...]]) -> tuple[Any, ...]:
    op: Any = node.target
    return tuple(repr(node.args[op.names.index(name)]) for name in positions[op.name])


def _one_by_one(
    classes: Sequence[Class], of: dict[Node, int], places: dict[Node, tuple[Any, ...]], sources: dict[Node, Any], lanes: int
) -> bool:
    """Whether every class that reads them has one member per lane, and takes one place in each of its arguments."""
    read: dict[tuple[int, int], list[Node]] = {}
    for node in places:
        for user in node.users:
            if user.op == "output" or len(classes[of[user]].members) != lanes:
                return False
    readers = dict.fromkeys(user for node in places for user in node.users)
    for user in readers:
        for slot, operand in enumerate(operands_of(user)):
            if operand in places:
                read.setdefault((of[user], slot), []).append(operand)
    return bool(read) and all(
        len(taken) == lanes and len({places[node] for node in taken}) == 1 and len({sources[node] for node in taken}) == lanes
        for taken in read.values()
    )


def operands_of(node: Node) -> list[Node]:
    """The nodes among its arguments, in their order, each as often as it is one."""
    found: list[Node] = []
    torch.fx.node.map_arg((node.args, node.kwargs), lambda operand: found.append(operand) or operand)  # type: ignore[func-returns-value]
    return found
