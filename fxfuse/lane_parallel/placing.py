"""Packs become DTensors, and programs those of one process: what ``shard_lanes`` does to a model once all is decided.

Comes in: a region's state, and its plan for this process. Goes out: the region, in place, and the way back. Nothing is sent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from fxfuse.distributed.sharding import Sharding
from fxfuse.graph import RegionPlan
from fxfuse.models.sharded import shared_as
from fxfuse.running.region import RegionState

from .dividing import slot_of


def place(state: RegionState, plan: RegionPlan, sharding: Sharding, mesh: Any, group_dim: int) -> Callable[[], None]:
    """Keep of each divided pack this process's lanes, and run ``plan``'s programs. The result undoes it."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    placements = [Shard(0) if d == group_dim else Replicate() for d in range(mesh.ndim)]
    before = dict(vars(state))
    held_before: list[tuple[dict[str, Any], str, Tensor]] = []

    def undo() -> None:
        for store, name, tensor in held_before:
            store[name] = tensor
        vars(state).update(before)

    try:
        for recipe in plan.recipes:
            slot = slot_of(state, recipe)
            if recipe.name not in sharding.sharded or slot is None:
                continue
            store = getattr(slot.owner, slot.store)
            held = store[slot.name]
            local = distribute_tensor(held.detach(), mesh, placements, src_data_rank=None).to_local().clone()  # else the whole stays alive
            made: Tensor = DTensor.from_local(local, mesh, placements, run_check=False, shape=held.shape, stride=held.stride())
            if isinstance(held, nn.Parameter):
                made = nn.Parameter(made, held.requires_grad)
                if held.grad is not None:
                    made.grad = shared_as(held.grad, made)
            made.__dict__.update(held.__dict__)
            held_before.append((store, slot.name, held))
            store[slot.name] = made
        state.sharding, state.plan = sharding, replace(plan, notes=[*plan.notes, *sharding.sentences()])
        facts = {name: replace(fact, shape=tuple(state.sources()[name].fetch().shape))
                 for name, fact in state.facts.items() if name in sharding.sharded}  # fmt: skip
        state.facts = {**state.facts, **facts}
        state.compiled, state.others, state.adapted, state.unfit = {}, {}, {}, {}
        state.prepare()
    except BaseException:
        undo()
        raise
    return undo
