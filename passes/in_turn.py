"""Say why calls of one normalization layer stay apart: each changes the running statistics that the next one changes.

Comes in: the bundles of a graph. Goes out: a ``Refusal`` for each layer that runs several times in one call of the region, in turn.
"""

from __future__ import annotations

from fxfuse.graph import Refusal

from .bundle import Bundles, Node


def in_turn(bundles: Bundles, region: str) -> list[Refusal]:
    """Refusals for layers whose updates are in no bundle, although there are several."""
    calls: dict[str, list[Node]] = {}
    fused: set[str] = set()
    for bundle in bundles.classes:
        for node in bundle.members:
            statistics = node.meta.get("update") and not node.meta.get("late")
            if statistics and node.meta.get("shape") != () and isinstance(node.args[1], Node):
                held = str(node.args[1].target)
                calls.setdefault(held, []).append(node)
                if bundle.index in bundles.active:
                    fused.add(held)
    return [
        Refusal(
            f"{nodes[0].meta.get('path') or held} runs {len(nodes)} times, one after the other: each changes the {held.rpartition('.')[2]}"
            " that the next one changes",
            nodes[0].meta.get("place"),
            region,
        )
        for held, nodes in calls.items()
        if len(nodes) > 1 and held not in fused
    ]  # fmt: skip
