"""Programs that a region made at calls under autocast, kept for when its lanes are divided.

Comes in: a region's state. Goes out: the same, its plan with these programs as further ones of their methods, so that they are divided
as all others are. (Once lanes are divided no further ones can be made: that would take all of them.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fxfuse.graph import Program
from fxfuse.running.guards import Facts
from fxfuse.running.region import RegionState
from fxfuse.running.runtime import source


def keep_adapted(state: RegionState) -> Callable[[], None]:
    """Take the programs over into the plan; the result undoes it. One that reads index tensors of its own stays out."""
    plan, adapted, facts = state.plan, dict(state.adapted), state.facts
    methods = {name: dict(modes) for name, modes in plan.methods.items()}
    for (name, flags), programs in adapted.items():
        kept = tuple(each.program for each in programs if not _reads(each.program) & state.extra.keys())
        if kept:
            modes = methods.setdefault(name, {})
            modes[flags] = (*modes.get(flags, ()), *kept)
    if methods != plan.methods:
        state.plan = replace(plan, methods=methods)
        # They were made for the weights as they are now, which may have gone to another dtype since the model was fused.
        places = state.sources()
        state.facts = {name: Facts.of(name, (places.get(name) or source(state.region, name)).fetch()) for name in facts}
        state.adapted, state.compiled, state.others, state.ready = {}, {}, {}, None

    def undo() -> None:
        state.plan, state.adapted, state.facts = plan, adapted, facts
        state.compiled, state.others, state.ready = {}, {}, None

    return undo


def _reads(program: Program) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if node.op == "get_attr"}
