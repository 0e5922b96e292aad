"""Lane parallelism: the lanes of a fused model divided among processes.

Comes in: a fused model, the same on every process, and a device mesh. Goes out: the model, in place: packed tensors are DTensors on the
lane axis, and programs compute the lanes of their process. Everything is decided (``dividing``), and compared between the processes,
before anything changes.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fxfuse.errors import ArgumentError, FxfuseError
from fxfuse.fused import regions
from fxfuse.graph import RegionPlan
from fxfuse.guards import Facts
from fxfuse.region import RegionState
from fxfuse.sharded import is_sharded, shared_as
from fxfuse.store import get_report

from .data_parallel import average_gradients
from .dividing import divided, slot_of
from .groups import name_of
from .sharding import Sharding


def shard_lanes(fused: nn.Module, device_mesh: Any, *, dim: str | None = None) -> nn.Module:
    """Divide the lanes of every fused region among the processes of ``device_mesh``; in place, returns ``fused``.

    Packed Parameters and buffers become DTensors, ``Shard(0)`` on the lane axis, so that each process holds, computes and steps about one
    nth of them. Lanes that leave are gathered, or only their sum is moved. All processes of one lane group are to be given the same inputs,
    and compute the same outputs, losses and gradients as one process would. Call it on every process, after ``optimize`` and before the
    optimizer is made. Weights are those of the first process. Processes have to be seeded alike, as dropout outside of lanes draws from
    the common generator; inside each process draws its own masks.

    ``device_mesh``: of one dim; or of several, of which ``dim`` (default: the one named "lanes") has the lanes. Along the others processes
    are given other rows of the batch, and gradients of all Parameters are averaged. With FSDP2 instead: ``shard_lanes(fused,
    mesh["lanes"])``, then ``fully_shard(fused, mesh=mesh["data"])``.

    What cannot be divided stays whole on every process, and right; ``report(fused)`` says what and why, and what a forward moves. A call
    that a region answers through the original forward gathers all its weights. Raises ``ArgumentError`` for a model without regions or
    a mesh that does not fit, ``FxfuseError`` where processes hold different models; then nothing has changed.
    """
    group_dim = _lanes_dim(fused, device_mesh, dim)
    group = device_mesh.get_group(group_dim)
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    states = regions(fused)
    mine = repr([(path, _digest(state.plan)) for path, state in states.items()])
    _agree(device_mesh, mine, "hold different models, or fused forms of one")
    decided: list[tuple[RegionState, RegionPlan, Sharding]] = []
    for state in states.values():
        plan, sharding = divided(state, world, rank, name_of(group))
        decided.append((state, plan, sharding))
    _agree(device_mesh, repr([(sorted(s.sharded), s.moved, s.whole) for _, _, s in decided]), "would divide the lanes differently")
    _broadcast(fused, device_mesh)
    for state, plan, sharding in decided:
        _apply(state, plan, sharding, device_mesh, group_dim)
    plans = {state.plan.path: state.plan for state in states.values()}
    report = get_report(fused)
    report.fused = [plans.get(plan.path, plan) for plan in report.fused]
    average_gradients(fused, [device_mesh.get_group(d) for d in range(device_mesh.ndim) if d != group_dim])
    return fused


def _lanes_dim(fused: nn.Module, mesh: Any, dim: str | None) -> int:
    """The mesh's dim that has the lanes. Raises ``ArgumentError`` where model or mesh do not fit."""
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(fused, nn.Module):
        raise ArgumentError(f"shard_lanes needs a fused model, a {type(fused).__name__} came")
    if not isinstance(mesh, DeviceMesh):
        raise ArgumentError(f"device_mesh must be a torch.distributed.device_mesh.DeviceMesh, a {type(mesh).__name__} came")
    states = regions(fused)
    if not states:
        raise ArgumentError("shard_lanes divides fused lanes, and this model has no fused region: fxfuse.report(model) says why")
    for path, state in states.items():
        if state.sharding is not None:
            raise ArgumentError(f"the lanes of {path or 'the model'} are divided already")
    odd = next((name for name, p in fused.named_parameters() if is_sharded(p)), None)
    if odd is not None:
        raise ArgumentError(f"{odd} is a DTensor already: call shard_lanes before fully_shard")
    names = tuple(mesh.mesh_dim_names or ())
    if dim is None and mesh.ndim == 1:
        return 0
    wanted = dim or "lanes"
    if wanted not in names:
        raise ArgumentError(f"the mesh has dims {', '.join(names) or 'without names'}, none of them {wanted}: say dim=, or name one lanes")
    return names.index(wanted)


def _digest(plan: RegionPlan) -> str:
    parts = [repr((r.name, r.members, r.shape, r.order, r.style, r.own_shapes, r.requires_grad)) for r in plan.recipes]
    parts += [f"{sorted(plan.programs)}"]
    parts += [f"{node.op} {node.target if isinstance(node.target, str) else node.target.__name__} {node.args} {node.kwargs}"
              for program in plan.all_programs() for node in program.graph.nodes]  # fmt: skip
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _agree(mesh: Any, mine: str, what: str) -> None:
    """Raise, on every process, where one of them has another text."""
    digest = int.from_bytes(hashlib.sha256(mine.encode()).digest()[:7], "big")
    device = torch.device(mesh.device_type)
    for d in range(mesh.ndim):
        group = mesh.get_group(d)
        found = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size(group))]
        dist.all_gather(found, torch.tensor([digest], dtype=torch.int64, device=device), group=group)
        if len({int(each) for each in found}) > 1:
            alike = "build one model on all of them, and fuse it with tune=False or objective='launches', which choose alike"
            raise FxfuseError(f"the processes {what}: {alike}")


def _broadcast(fused: nn.Module, mesh: Any) -> None:
    """Every tensor of the model as the first process has it."""
    with torch.no_grad():
        for tensor in [*fused.parameters(), *fused.buffers()]:
            for d in range(mesh.ndim):
                group = mesh.get_group(d)
                data = tensor.detach().contiguous()
                dist.broadcast(data, dist.get_global_rank(group, 0), group=group)
                if data.data_ptr() != tensor.data_ptr():
                    tensor.copy_(data)


def _apply(state: RegionState, plan: RegionPlan, sharding: Sharding, mesh: Any, group_dim: int) -> None:
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    placements = [Shard(0) if d == group_dim else Replicate() for d in range(mesh.ndim)]
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
        store[slot.name] = made
    state.sharding, state.plan = sharding, replace(plan, notes=[*plan.notes, *sharding.sentences()])
    for name in sharding.sharded:
        if name in state.facts:
            state.facts[name] = Facts.of(name, state.sources()[name].fetch())
    state.compiled, state.others = {}, {}
    state.adapted.clear()
    state.unfit.clear()
    state.prepare()

