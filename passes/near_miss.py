"""Say why a lane stays out: the nearest bundle, and the first thing in which it differs.

Comes in: the bundles of a graph. Goes out: a ``Refusal`` for each parameter-carrying op that stays single although its line of source
also makes lanes of that op: "lane differs: weight [16, 1] against [8, 1] (model.py:41)". Where none of that line's ops are lanes, a number
in which they differ, there or in what feeds them, is told as well; so is an op at which lanes part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import networkx as nx

from fxfuse.graph import Place, Refusal
from fxfuse.ops import Op

from .bundle import POSITIONS, Bundle, Bundles, Node, dataflow_of
from .numbers import TENSOR_TOO
from .rules import has_rule

# Ops whose numbers are a lane's place or, of one loop, become a tensor: others are calls that only look alike.
_MAY_DIFFER = frozenset({*POSITIONS, *TENSOR_TOO, "item"})
# How far up a difference is looked for.
DEEPEST = 12


def near_misses(bundles: Bundles, is_heavy: Callable[[Bundle], bool], region: str) -> list[Refusal]:
    """Refusals for single nodes next to a bundle of the same op from the same line; a few per line are enough for a person."""
    groups: dict[Any, list[Bundle]] = {}
    for bundle in bundles.classes:
        if bundle.op is not None and is_heavy(bundle) and bundle.members[0].meta.get("place") is not None:
            groups.setdefault((bundle.name, bundle.members[0].meta["place"]), []).append(bundle)
    found: dict[str, Refusal] = {}
    dataflow = dataflow_of(bundles.classes)
    for (_, place), group in groups.items():
        lanes = [bundle for bundle in group if bundle.index in bundles.active]
        for bundle in group if len(group) > 1 else ():
            if bundle.index in bundles.active:
                continue
            depends = nx.ancestors(dataflow, bundle.index) | nx.descendants(dataflow, bundle.index)
            # What feeds it is another layer, no other lane.
            beside = [other for other in lanes or group if other.index not in depends and other is not bundle]
            if not beside:
                continue
            nearest = max(beside, key=lambda other: (_alike(bundle, other), len(other.members)))
            difference, at = "", place
            if lanes:
                # lanes of any width: widths do not keep it out
                facts = ("dtype", "device", "requires_grad", "registered") if nearest.unequal else ()
                difference = _difference(bundle.members[0], nearest.members[0], facts) if facts else ""
                difference = difference or _difference(bundle.members[0], nearest.members[0])
            if not difference:
                difference, at = _number(bundle.members[0], nearest.members[0], bundles, DEEPEST)
            if not difference and len(group) > 2:
                difference, at = _difference(bundle.members[0], nearest.members[0]), place
            if difference:
                name = bundle.members[0].meta.get("path") or "a lane"
                other = nearest.members[0].meta.get("path") or "another"
                said = "stays out of the lanes next to it" if lanes else f"and {other} are no lanes of one loop"
                found.setdefault(difference, Refusal(f"{name} {said}: {difference}", at or place, region))
                if not lanes:
                    break
    for bundle in bundles.classes:
        if bundle.op is not None and bundle.op.random and len(bundle.members) > 1 and not has_rule(bundle):
            said = f"{bundle.name} of {len(bundle.members)} lanes stays as it is: it draws random numbers, and has no rule"
            found.setdefault(bundle.name, Refusal(said, bundle.members[0].meta.get("place"), region))
    return [*found.values(), *_partings(bundles, region, {refusal.place for refusal in found.values()})]


def _partings(bundles: Bundles, region: str, told: set[Place | None]) -> list[Refusal]:
    """Refusals for ops that take lanes which were one class until there, and differ in a number."""
    groups: dict[Any, list[Node]] = {}
    for bundle in bundles.classes:
        first = bundle.members[0]
        place = first.meta.get("place")
        if bundle.op is None or place is None or place in told or bundle.name in _MAY_DIFFER:
            continue
        operands = tuple(bundles.of[node] for node in first.all_input_nodes)
        if any(operand in bundles.active or bundles.classes[operand].name in POSITIONS for operand in operands):
            groups.setdefault((bundle.name, place, operands), []).append(first)
    found: dict[str, Refusal] = {}
    for (_, place, operands), nodes in groups.items():
        if all(bundles.of[node] in bundles.active for node in nodes):
            continue  # several lane sets
        together = any(operand in bundles.active for operand in operands)
        for other in nodes[1:] if together or len(nodes) > 2 else ():
            if set(nodes[0].all_input_nodes).isdisjoint(other.all_input_nodes):
                difference, _ = _number(other, nodes[0], bundles, 0)
                if difference:
                    found.setdefault(difference, Refusal(f"lanes part at {difference}", place, region))
                    break
    return list(found.values())


def _alike(one: Bundle, other: Bundle) -> int:
    """How many trailing parts of their module paths are the same: ``nets.2.3`` is a lane of ``nets.0.3``, not of ``nets.0.0``."""
    count = 0
    for a, b in zip(*(reversed(str(x.members[0].meta.get("path")).split(".")) for x in (one, other)), strict=False):
        if a != b:
            break
        count += 1
    return count


def _difference(one: Node, other: Node, facts: tuple[str, ...] = ("shape", "dtype", "device", "requires_grad", "registered")) -> str:
    """The first argument in which two calls of one op differ, in words."""
    for name, a, b in zip(one.target.names, one.args, other.args, strict=True):  # type: ignore[union-attr]
        if isinstance(a, Node) and isinstance(b, Node):
            for fact in facts:
                left, right = a.meta.get(fact), b.meta.get(fact)
                if left != right:
                    words = [list(v) if fact == "shape" and v is not None else v for v in (left, right)]
                    return f"{name} {'' if fact == 'shape' else fact + ' '}{words[0]} against {words[1]}"
        elif isinstance(a, Node) is not isinstance(b, Node):
            return f"{name} {'given' if isinstance(a, Node) else 'left out'} against {'given' if isinstance(b, Node) else 'left out'}"
        elif a != b:
            return f"{name} {a} against {b}"
    for a, b in zip(one.all_input_nodes, other.all_input_nodes, strict=False):
        names = [getattr(n.target, "__name__", n.op) for n in (a, b)]
        if names[0] != names[1]:
            return f"its input comes from {names[0]} against {names[1]}"
    return ""


def _number(one: Node, other: Node, bundles: Bundles, depth: int) -> tuple[str, Place | None]:
    """The first argument that is no tensor in which two calls differ, or those up to ``depth`` above them do; and its line."""
    if not isinstance(one.target, Op) or one.target != other.target or one is other:
        return "", None
    op = cast(Op, one.target)
    for name, a, b in zip(op.names, one.args, other.args, strict=True):
        plain = not any(_holds_nodes(value) for value in (a, b)) and name not in POSITIONS.get(op.name, ())
        if plain and (type(a) is not type(b) or a != b):
            return f"{op.name} {name} {a} against {b}", one.meta.get("place")
    for a, b in zip(one.all_input_nodes, other.all_input_nodes, strict=False):
        if depth and bundles.of.get(a) != bundles.of.get(b):
            found = _number(a, b, bundles, depth - 1)
            if found[0]:
                return found
    return "", None


def _holds_nodes(value: Any) -> bool:
    return isinstance(value, Node) or (isinstance(value, (list, tuple)) and any(_holds_nodes(item) for item in value))
