"""Lane parallelism: the lanes of a fused model divided among processes.

Comes in: a fused model, the same on every process, and a device mesh. Goes out: the model, in place: packed tensors are DTensors on the lane
axis, and programs compute the lanes of their process. Everything is decided, and compared between the processes, before anything changes.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.fx
from torch import Tensor, nn

from fxfuse.determinism import preserved_state
from fxfuse.errors import ArgumentError, FxfuseError
from fxfuse.fused import regions
from fxfuse.graph import Program, Recipe, RegionPlan, TensorGuard
from fxfuse.guards import Facts
from fxfuse.lane import Slot, lane_info
from fxfuse.passes.shard import PartWriter
from fxfuse.passes.split import CannotSplit, Split, Trial
from fxfuse.recipes import packed_shape
from fxfuse.region import RegionState
from fxfuse.runtime import source, walk

from .data_parallel import average_gradients
from .groups import name_of
from .packs import is_sharded, like
from .sharding import Sharding

_ROWS = (5, 3, 8, 16, 2)  # batch sizes to try; two of them have to run


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
    _agree(device_mesh, repr([(path, _digest(state.plan)) for path, state in states.items()]), "hold different models, or fused forms of one")
    decided: list[tuple[RegionState, RegionPlan, Sharding]] = []
    for state in states.values():
        plan, sharding = _divided(state, world, rank, name_of(group))
        decided.append((state, plan, sharding))
    _agree(device_mesh, repr([(sorted(s.sharded), s.moved, s.whole) for _, _, s in decided]), "would divide the lanes differently")
    _broadcast(fused, device_mesh)
    for state, plan, sharding in decided:
        _apply(state, plan, sharding, device_mesh, group_dim)
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
            raise FxfuseError(
                f"the processes {what}: build the model with one seed, and fuse it with tune=False or objective='launches', which choose alike"
            )


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


# -- deciding --------------------------------------------------------------------------------------------------------------------------------


def _divided(state: RegionState, world: int, rank: int, group: str) -> tuple[RegionPlan, Sharding]:
    """The plan of this process for a region, and what is to be said of it; the plan as it is where nothing can be divided."""
    plan = state.plan
    packs: dict[str, Split] = {}
    staying: dict[str, str] = {}
    for recipe in plan.recipes:
        found = _rows(state, recipe, world)
        if isinstance(found, str):
            staying[recipe.name] = found
        else:
            packs[recipe.name] = found
    trials: list[list[Trial]] = []
    while packs:
        try:
            trials = [_trials(state, program, packs, world) for program in plan.all_programs()]
        except CannotSplit as reason:
            staying.update(dict.fromkeys(packs, str(reason)))
            packs = {}
            break
        wanted = {name for tried in trials for name in _needed_whole(tried[0])}
        if not wanted:
            break
        for name in wanted:
            del packs[name]
            staying[name] = "some op needs all its lanes at once"
    sharding = Sharding(world, rank, frozenset(packs), staying)
    if not packs:
        return plan, sharding
    made: dict[int, Program] = {}
    for number, (program, tried) in enumerate(zip(plan.all_programs(), trials, strict=True)):
        writer = PartWriter(tried[0], rank, group)
        made[id(program)] = replace(program, graph=writer.written())
        if number == 0:
            sharding.moved = [(kind, *_free_shape(node, tried)) for kind, node in writer.moved]
    programs = {flags: made[id(program)] for flags, program in plan.programs.items()}
    methods = {
        name: {flags: tuple(made[id(p)] for p in each) for flags, each in modes.items()} for name, modes in plan.methods.items()
    }
    return replace(plan, programs=programs, methods=methods, making=None), sharding


def _rows(state: RegionState, recipe: Recipe, world: int) -> Split | str:
    """How ``Shard(0)`` divides a packed tensor, where no lane lies on two processes and each has one; else why not."""
    if state.packing != "packed" or state.plan.keeps_parameters:
        return "its lanes stay Parameters of their own"
    if recipe.name in {part.name for part in state.plan.recipes} and state.plan.wholes:
        return "packs of its region are cut into parts (frozen lanes, other param groups)"
    slot = _slot(state, recipe)
    if slot is None or slot.store == "__dict__":
        return "its lanes are not registered by the model"
    rows, lanes = packed_shape(recipe)[0], len(recipe.members)
    size = -(-rows // world)
    starts = tuple(min(size * r, rows) for r in range(world + 1))
    edges = set(recipe.row_starts() if recipe.style in ("cat", "rows") else range(lanes + 1))
    if starts[-2] >= rows:
        return f"{lanes} lanes are too few for {world} processes"
    if not edges.issuperset(starts):
        return f"its {lanes} lanes of {rows // lanes} rows have no edges where {world} equal parts of {rows} rows do"
    return Split(0, starts)


def _slot(state: RegionState, recipe: Recipe) -> Slot | None:
    for module in state.members():
        info = lane_info(module)
        for slot in info.slots.values() if info is not None else ():
            if slot.recipe.name == recipe.name:
                return slot
    return None


def _trials(state: RegionState, program: Program, packs: dict[str, Split], world: int) -> list[Trial]:
    """The program tried at two sizes, with equal steps. Raises ``CannotSplit`` where that cannot be had."""
    free = any(isinstance(leaf, TensorGuard) and None in leaf.shape for leaf in program.guard.leaves)
    found: list[Trial] = []
    said = ""
    for rows in _ROWS:
        try:
            with preserved_state(state.region), torch.no_grad():
                found.append(_trial(state, program, packs, world, rows, len(found)))
        except CannotSplit:
            raise
        except Exception as error:  # sizes or numbers that this model does not take
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
        if len(found) == 2 or (found and not free):
            break
    if not found or (free and len(found) < 2):
        raise CannotSplit(f"the program cannot be tried on random numbers: {said}")
    if any(one.steps != found[0].steps for one in found):
        raise CannotSplit("how lanes can be divided hangs on the batch size")
    return found


def _trial(state: RegionState, program: Program, packs: dict[str, Split], world: int, rows: int, seed: int) -> Trial:
    generator = torch.Generator().manual_seed(seed)
    closed = any(node.op == "call_module" for node in program.graph.nodes)
    wide = program.guard.generic_dtype and not closed

    def drawn(shape: Any, dtype: torch.dtype, device: torch.device, positive: bool = False) -> Tensor:
        if not (dtype.is_floating_point or dtype.is_complex):
            return torch.randint(0, 2, shape, generator=generator).to(device, dtype)
        made = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5 if positive else torch.randn(
            shape, generator=generator, dtype=torch.complex128 if dtype.is_complex else torch.float64
        )  # fmt: skip
        return made.to(device, torch.float64 if wide and dtype.is_floating_point else dtype)

    trial = Trial(program.graph, world, packs, lambda node, args, kwargs: _call(state, node, args, kwargs))
    leaves = iter(zip(program.guard.leaves, program.guard.same, strict=True))
    given: list[Any] = []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            leaf, same = next(leaves)
            if not isinstance(leaf, TensorGuard):
                given.append(leaf[1])
            elif same != len(given):
                given.append(given[same])
            else:
                given.append(drawn([rows if n is None else n for n in leaf.shape], leaf.dtype, leaf.device))
            trial.values[node] = given[-1]
        elif node.op == "get_attr":
            place = state.sources().get(node.target) or source(state.region, node.target)
            held = place.fetch().detach()
            known = next((v for n, v in trial.values.items() if n.op == "get_attr" and n.target == node.target), None)
            trial.values[node] = known if known is not None else (
                drawn(held.shape, held.dtype, held.device, place.store == "_buffers") if held.is_floating_point() or held.is_complex() else held
            )  # fmt: skip
    trial.run()
    return trial


def _call(state: RegionState, node: torch.fx.Node, args: Any, kwargs: Any) -> Any:
    target: Any = node.target
    if node.op == "call_module":
        return walk(state.region, target)(*args, **kwargs)
    return getattr(args[0], target)(*args[1:], **kwargs) if node.op == "call_method" else target(*args, **kwargs)


def _needed_whole(trial: Trial) -> set[str]:
    """Packs that some op reads whole, or a view of them."""
    from fxfuse.weight_views import VIEWS

    found: set[str] = set()
    for node in trial.graph.nodes:
        if node.op == "output" or (node in trial.steps and not trial.steps[node].own):
            for operand in node.all_input_nodes:
                if trial.splits.get(operand) is None:
                    continue
                at = operand
                while at.op != "get_attr" and at.target in VIEWS and len(at.all_input_nodes) == 1:
                    at = at.all_input_nodes[0]
                if at.op == "get_attr":
                    found.add(str(at.target))
    return found


def _free_shape(node: torch.fx.Node, tried: list[Trial]) -> tuple[tuple[int | None, ...], int]:
    values = [trial.values[node] for trial in tried]
    shape = tuple(sizes[0] if len(set(sizes)) == 1 else None for sizes in zip(*(v.shape for v in values), strict=True))
    return shape, values[0].element_size()


# -- doing -----------------------------------------------------------------------------------------------------------------------------------


def _apply(state: RegionState, plan: RegionPlan, sharding: Sharding, mesh: Any, group_dim: int) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    placements = [Shard(0) if d == group_dim else Replicate() for d in range(mesh.ndim)]
    for recipe in plan.recipes:
        slot = _slot(state, recipe)
        if recipe.name not in sharding.sharded or slot is None:
            continue
        store = getattr(slot.owner, slot.store)
        held = store[slot.name]
        made: Tensor = distribute_tensor(held.detach(), mesh, placements, src_data_rank=None)
        # A part must not keep the memory of the whole alive.
        cast(Any, made)._local_tensor = cast(Any, made)._local_tensor.clone()
        if isinstance(held, nn.Parameter):
            made = nn.Parameter(made, held.requires_grad)
            if held.grad is not None:
                made.grad = like(made, held.grad)
        made.__dict__.update(held.__dict__)
        store[slot.name] = made
    state.sharding, state.plan = sharding, plan
    for name in sharding.sharded:
        if name in state.facts:
            state.facts[name] = Facts.of(name, state.sources()[name].fetch())
    state.compiled, state.others = {}, {}
    state.adapted.clear()
    state.unfit.clear()
    plan.notes = [*plan.notes, *sharding.sentences()]
    state.prepare()

