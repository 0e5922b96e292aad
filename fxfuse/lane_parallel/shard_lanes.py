"""Lane parallelism: the lanes of a fused model divided among processes.

Comes in: a fused model, of one architecture on every process, and a device mesh. Goes out: the model, in place: packed tensors are DTensors
on the lane axis, and programs compute the lanes of their process. Everything is decided (``dividing``), compared between the
processes, and tried on a copy against the unsharded model (``rehearsal``) before anything is kept; where one process fails, none keeps it.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fxfuse.checking.validate import Example
from fxfuse.distributed.groups import name_of
from fxfuse.distributed.sharding import Sharding
from fxfuse.errors import ArgumentError, FxfuseError
from fxfuse.fused import regions
from fxfuse.graph import Refusal, RegionPlan
from fxfuse.models.determinism import same_bits
from fxfuse.models.inputs import clone_inputs, tensors_in
from fxfuse.models.sharded import is_sharded
from fxfuse.models.undo import Undo
from fxfuse.options import make_inputs
from fxfuse.recording.casts import without_autocast
from fxfuse.store import get_report

from .adoption import adopt_first
from .agreement import Processes
from .data_parallel import average_gradients
from .dividing import divided, without_autocast_programs
from .placing import place
from .rehearsal import Rehearsal
from .under_autocast import keep_adapted

_ADOPTED = "the processes had chosen different plans: all run the first one's"


def shard_lanes(
    fused: nn.Module,
    device_mesh: Any,
    *,
    dim: str | None = None,
    example_inputs: Any = None,
    example_kwargs: dict[str, Any] | None = None,
    validate: bool = True,
) -> nn.Module:
    """Divide the lanes of every fused region among the processes of ``device_mesh``; in place, returns ``fused``.

    Packed Parameters and buffers become DTensors, ``Shard(0)`` on the lane axis, so that each process holds, computes and steps about one
    nth of them. Lanes that leave are gathered, or only their sum is moved. All processes of one lane group are to be given the same inputs,
    and compute the same outputs, losses and gradients as one process would. Call it on every process, after ``optimize`` and before the
    optimizer is made. Weights are those of the first process, and so is the plan, where measuring chose differently. Processes have to be
    seeded alike, as dropout outside of lanes draws from the common generator; inside each process draws its own masks.

    Calls under ``torch.autocast`` run divided lanes where the model was called under it before, in that mode; else the original forward,
    on gathered weights.

    ``device_mesh``: of one dim; or of several, of which ``dim`` (default: the one named "lanes") has the lanes. Along the others processes
    are given other rows of the batch, and gradients of all Parameters are averaged. With FSDP2 instead: ``shard_lanes(fused,
    mesh["lanes"])``, then ``fully_shard(fused, mesh=mesh["data"])``.

    ``validate``: try a sharded copy first, on random inputs of the recorded shapes, or of the whole model on ``example_inputs`` (a tensor
    or a tuple of arguments) and ``example_kwargs``: outputs, gradients of inputs and, by the original's names, of weights, and buffers
    are compared with those of the unsharded model, in float64 where it takes that, in train and eval mode.

    What cannot be divided stays whole on every process, and right; ``report(fused)`` says what and why, what a forward moves, and what
    was compared. A call that a region answers through the original forward gathers all its weights. Raises ``ArgumentError`` for a
    model without regions or a mesh that does not fit, ``FxfuseError`` where processes hold different models, where the comparison fails
    or anything raises, on any process; then every process raises, and nothing has changed.
    """
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(device_mesh, DeviceMesh):
        raise ArgumentError(f"device_mesh must be a torch.distributed.device_mesh.DeviceMesh, a {type(device_mesh).__name__} came")
    processes = Processes(device_mesh)
    with ExitStack() as way_back:
        try:
            with without_autocast():
                return _sharded(fused, device_mesh, dim, (example_inputs, example_kwargs), validate, processes, way_back)
        except BaseException as error:
            way_back.close()
            if isinstance(error, FxfuseError) and not isinstance(error, ArgumentError) and isinstance(fused, nn.Module):
                get_report(fused).refused.append(Refusal(f"shard_lanes: {error}"))
            raise
        finally:
            way_back.pop_all()  # what is kept is kept


def _sharded(
    fused: nn.Module, mesh: Any, dim: str | None, inputs: Any, validate: bool, processes: Processes, way_back: ExitStack
) -> nn.Module:
    with processes.all_or_none():
        group_dim = _lanes_dim(fused, mesh, dim)
        example = make_inputs(*inputs)
        undo = Undo()
        way_back.callback(undo.restore)
        for state in regions(fused).values():
            way_back.callback(keep_adapted(state))
    adopted = adopt_first(fused, processes, undo)
    held = [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in [*fused.named_parameters(), *fused.named_buffers()]]
    given = [(tuple(tensor.shape), str(tensor.dtype)) for tensor in tensors_in(example)]
    if not processes.alike(repr((held, given, example is None, validate, group_dim))):
        raise FxfuseError("the processes hold different models (their tensors have other names or shapes), or were given other arguments")
    _as_first(fused, processes, way_back)
    group = mesh.get_group(group_dim)
    decided: dict[str, tuple[RegionPlan, Sharding]] = {}

    def shard(model: nn.Module, undone: ExitStack) -> None:
        states = regions(model)
        for path, (plan, sharding) in decided.items():
            undone.callback(place(states[path], plan, sharding, mesh, group_dim))

    said = [_ADOPTED] if adopted else []
    if dist.get_world_size(group) == 1:
        said.append("the mesh has one process for all lanes: nothing is divided")
    else:
        tried = validate
        decided.update(_decided(fused, processes, group, idle=True))
        rehearsal = Rehearsal(fused, lambda copied: shard(copied, ExitStack()), processes, group)
        if tried and any(sharding.idle for _, sharding in decided.values()):
            try:
                said += rehearsal.sentences(_of_first(example, processes))
                tried = False
            except Exception:  # on every process: some op takes no tensor without lanes, in its backward
                decided.update(_decided(fused, processes, group, idle=False))
        if tried and any(sharding.sharded for _, sharding in decided.values()):
            said += rehearsal.sentences(_of_first(example, processes))
    with processes.all_or_none():
        shard(fused, way_back)
    plans = {state.plan.path: state.plan for state in regions(fused).values()}
    report = get_report(fused)
    report.fused = [*plans.values()] if adopted else [plans.get(plan.path, plan) for plan in report.fused]
    report.notes += said
    average_gradients(fused, [mesh.get_group(d) for d in range(mesh.ndim) if d != group_dim])
    return fused


def _decided(fused: nn.Module, processes: Processes, group: Any, idle: bool) -> dict[str, tuple[RegionPlan, Sharding]]:
    """By region, the plan of this process and what is to be said of it; the same on all. ``idle``: some process may get no lanes."""
    world, rank, name = dist.get_world_size(group), dist.get_rank(group), name_of(group)
    decided: dict[str, tuple[RegionPlan, Sharding]] = {}
    with processes.all_or_none():
        for path, state in regions(fused).items():
            decided[path] = divided(state, world, rank, name, idle=idle)
            if len(decided[path][0].all_programs()) < len(state.plan.all_programs()):  # those of autocast would cost the others their lanes
                state.plan = without_autocast_programs(state.plan)
    if not processes.alike(repr([(path, sorted(s.sharded), s.moved, s.whole, s.gathered) for path, (_, s) in decided.items()])):
        raise FxfuseError("the processes would divide the lanes differently: call shard_lanes with the same model on all of them")
    return decided


def _of_first(example: Example | None, processes: Processes) -> Example | None:
    """The example with the numbers of the first process."""
    if example is None:
        return None
    found: Example = clone_inputs(example)
    for tensor in tensors_in(found):
        data = tensor.detach().contiguous()
        processes.send(data)
        with torch.no_grad():
            tensor.copy_(data)
    return found


def _lanes_dim(fused: nn.Module, mesh: Any, dim: str | None) -> int:
    """The mesh's dim that has the lanes. Raises ``ArgumentError`` where model or mesh do not fit."""
    if not isinstance(fused, nn.Module):
        raise ArgumentError(f"shard_lanes needs a fused model, a {type(fused).__name__} came")
    for path, state in regions(fused).items():
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


def _as_first(fused: nn.Module, processes: Processes, way_back: ExitStack) -> None:
    """Give every tensor of the model the values that the first process has; ``way_back`` is given what was there."""
    for tensor in [*fused.parameters(), *fused.buffers()]:
        data = tensor.detach().clone(memory_format=torch.contiguous_format)
        processes.send(data)
        if not same_bits(tensor, data):
            way_back.callback(_write, tensor, tensor.detach().clone())
            _write(tensor, data)


def _write(tensor: Tensor, data: Tensor) -> None:
    with torch.no_grad():
        tensor.copy_(data)
