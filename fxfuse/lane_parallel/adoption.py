"""The first process's plan, taken over by processes that chose otherwise.

Comes in: fused models of one architecture, one on each process. Measuring chooses by time, so that plans differ; lanes can be divided
only where all processes run the same programs. Goes out: the models with the first process's regions: where another one differs, it is
taken apart, so that its weights are Parameters of their own again, and the first one's plan, which packs them, is installed.
"""

from __future__ import annotations

import hashlib
import pickle
from typing import Any, cast

from torch import nn

from fxfuse.errors import ArgumentError, FxfuseError
from fxfuse.fused import regions, take_apart
from fxfuse.graph import RegionPlan
from fxfuse.models.undo import Undo
from fxfuse.running.install import install

from .agreement import Processes

ALIKE = "build one model on all of them, and fuse it with tune=False or objective='launches', which choose alike"


def adopt_first(fused: nn.Module, processes: Processes, undo: Undo) -> bool:
    """Give every process the regions of the first one, where they differ; whether they did. ``undo`` is given the way back.

    Raises ``ArgumentError`` where the first process's model has no region, ``FxfuseError`` where its plan does not fit a model.
    """
    with processes.all_or_none():
        if processes.first and not regions(fused):
            raise ArgumentError("shard_lanes divides fused lanes, and this model has no fused region: fxfuse.report(model) says why")
        mine = _digests(fused)
    if processes.alike(mine):
        return False
    data = processes.of_first(lambda: _packed(fused))
    with processes.all_or_none():
        if not processes.first:
            _replace(fused, data, undo)
        mine = _digests(fused)
    if not processes.alike(mine):
        raise FxfuseError(f"the processes hold different models, or fused forms of one: {ALIKE}")
    return True


def _digests(fused: nn.Module) -> str:
    return repr([(path, state.packing, digest(state.plan)) for path, state in regions(fused).items()])


def digest(plan: RegionPlan) -> str:
    """A name for what a plan packs and computes."""
    parts = [repr((r.name, r.members, r.shape, r.order, r.style, r.own_shapes, r.requires_grad)) for r in plan.recipes]
    parts += [f"{sorted(plan.programs)}"]
    parts += [f"{node.op} {node.target if isinstance(node.target, str) else node.target.__name__} {node.args} {node.kwargs}"
              for program in plan.all_programs() for node in program.graph.nodes]  # fmt: skip
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _packed(fused: nn.Module) -> bytes:
    """The plans of all regions, as data for the other processes of this job."""
    states = regions(fused)
    packing = {state.packing for state in states.values() if not state.plan.keeps_parameters} or {"packed"}
    try:
        return pickle.dumps((packing.pop(), [state.plan for state in states.values()]))
    except Exception as error:  # a model may hold anything
        said = f"{type(error).__name__}: {error}"
        raise FxfuseError(
            f"the processes chose different plans, and the first one's cannot be sent to the others ({said}): {ALIKE}"
        ) from error


def _replace(fused: nn.Module, data: bytes, undo: Undo) -> None:
    packing, plans = cast("tuple[Any, list[RegionPlan]]", pickle.loads(data))
    states = regions(fused)
    strict = any(state.strict for state in states.values())
    try:
        take_apart(fused, undo)
        install(fused, plans, strict=strict, packing=packing, undo=undo)
    except FxfuseError as error:
        raise FxfuseError(f"the processes hold different models, or fused forms of one ({error}): {ALIKE}") from error
