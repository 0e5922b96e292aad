"""Say why a lane stays out: the nearest bundle, and the first thing in which it differs.

Comes in: the bundles of a graph. Goes out: a ``Refusal`` for each parameter-carrying op that stays single although its line of source
also makes lanes of that op: "lane differs: weight [16, 1] against [8, 1] (model.py:41)".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import networkx as nx

from fxfuse.graph import Refusal

from .bundle import Bundle, Bundles, Node, dataflow_of


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
        for bundle in group if lanes else ():
            if bundle.index in bundles.active:
                continue
            depends = nx.ancestors(dataflow, bundle.index) | nx.descendants(dataflow, bundle.index)
            beside = [other for other in lanes if other.index not in depends]  # what feeds it is another layer, no other lane
            if not beside:
                continue
            nearest = max(beside, key=lambda other: (_alike(bundle, other), len(other.members)))
            facts = ("dtype", "device", "requires_grad") if nearest.unequal else ()  # lanes of any width: widths do not keep it out
            difference = _difference(bundle.members[0], nearest.members[0], facts) if facts else ""
            difference = difference or _difference(bundle.members[0], nearest.members[0])
            if difference:
                name = bundle.members[0].meta.get("path") or "a lane"
                found.setdefault(difference, Refusal(f"{name} stays out of the lanes next to it: {difference}", place, region))
    return list(found.values())


def _alike(one: Bundle, other: Bundle) -> int:
    """How many trailing parts of their module paths are the same: ``nets.2.3`` is a lane of ``nets.0.3``, not of ``nets.0.0``."""
    count = 0
    for a, b in zip(*(reversed(str(x.members[0].meta.get("path")).split(".")) for x in (one, other)), strict=False):
        if a != b:
            break
        count += 1
    return count


def _difference(one: Node, other: Node, facts: tuple[str, ...] = ("shape", "dtype", "device", "requires_grad")) -> str:
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
