"""How the lanes of a region can be divided among processes.

Comes in: a fused region, how many processes, and which of them this is. Goes out: the plan of this process, and what is to be said of it.
Its programs are tried at two batch sizes (``passes.split``); a pack that some op needs whole, or whose lanes have
no edges where equal shares of its rows do, is held in shares and gathered at each call, or stays whole where it is small.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.fx

from fxfuse.distributed.sharding import Sharding
from fxfuse.functional import autocast_to
from fxfuse.graph import Program, Recipe, RegionPlan
from fxfuse.models.determinism import preserved_state
from fxfuse.passes.shard import PartWriter
from fxfuse.passes.split import CannotSplit, Split, Trial, alike
from fxfuse.running.region import RegionState
from fxfuse.running.runtime import source, walk
from fxfuse.running.weight_views import VIEWS
from fxfuse.weights.lane import Slot, lane_info
from fxfuse.weights.recipes import packed_shape

from .drawn import ROWS, Drawn, free_rows
from .one_size import for_any_size

WORTH_DIVIDING = 1 << 16  # bytes of a pack that programs need whole: a smaller one stays so on every process


def divided(state: RegionState, world: int, rank: int, group: str, *, idle: bool = True) -> tuple[RegionPlan, Sharding]:
    """The plan of this process for a region, and what is to be said of it; the plan as it is where nothing can be divided.

    ``idle``: lanes may be divided so that the last processes get none of them.
    """
    # The lanes of a loop are not divided, and those of a process are other lanes than were timed.
    plan, reason = for_any_size(state.plan), ""
    less = without_autocast_programs(plan)  # which shall not cost the others their lanes
    ways = [(plan, idle), *([(less, idle)] if less is not plan else []), *([(less, False)] if idle else [])]
    for tried, some_idle in ways:
        try:
            return _divided(state, tried, world, rank, group, some_idle)
        except CannotSplit as cannot:
            reason = reason or str(cannot)
    return state.plan, Sharding(world, rank, frozenset(), {recipe.name: reason for recipe in plan.recipes})


def _divided(state: RegionState, plan: RegionPlan, world: int, rank: int, group: str, idle: bool) -> tuple[RegionPlan, Sharding]:
    packs: dict[str, Split] = {}
    rows: dict[str, Split] = {}  # of packs whose lanes cannot be divided, but their memory
    staying: dict[str, str] = {}
    for recipe in plan.recipes:
        reason = _blocked(state, recipe)
        if not reason:
            reason = _uneven(recipe, world, idle)
            if not reason:
                packs[recipe.name] = _equal_rows(recipe, world)
            elif _worth_dividing(state, recipe, world):
                rows[recipe.name] = _equal_rows(recipe, world)
        if reason:
            staying[recipe.name] = reason
    trials: list[list[Trial]] = []
    first = {id(program) for program in plan.programs.values() or plan.all_programs()}
    while packs or rows:
        trials = [_trials(state, program, packs, world) for program in plan.all_programs()]
        # Of packs that other programs need whole (the loop at small sizes, calls under autocast) these gather the lanes.
        usual = [t for p, t in zip(plan.all_programs(), trials, strict=True) if id(p) in first]
        wanted = {name for tried in usual for name in _needed_whole(tried[0])}
        if not wanted:
            break
        for name in sorted(wanted):  # in one order on every process
            split = packs.pop(name)
            staying[name] = "some op needs all its lanes at once"
            if _worth_dividing(state, next(recipe for recipe in plan.recipes if recipe.name == name), world):
                rows[name] = split
    whole = {name: reason for name, reason in staying.items() if name not in rows}
    gathered = {name: reason for name, reason in staying.items() if name in rows}
    sharding = Sharding(world, rank, frozenset((*packs, *rows)), whole, gathered)
    sharding.idle = any(split.starts[-2] >= split.starts[-1] for split in packs.values())
    if not sharding.sharded:
        return state.plan, sharding
    made: dict[int, Program] = {}
    for number, (program, tried) in enumerate(zip(plan.all_programs(), trials, strict=True)):
        writer = PartWriter(tried[0], rank, group, rows)
        made[id(program)] = replace(program, graph=writer.written())
        if number == 0:
            sharding.moved = [(kind, *_free_shape(node, tried, _dtype(state, program))) for kind, node in writer.moved]
    programs = {flags: made[id(program)] for flags, program in plan.programs.items()}
    methods = {name: {flags: tuple(made[id(p)] for p in each) for flags, each in modes.items()} for name, modes in plan.methods.items()}
    return replace(plan, programs=programs, methods=methods, making=None), sharding


def without_autocast_programs(plan: RegionPlan) -> RegionPlan:
    """The plan without its programs for calls under autocast; itself where it has none."""
    if all(program.guard.autocast is None for program in plan.all_programs()):
        return plan
    methods = {name: {flags: tuple(p for p in each if p.guard.autocast is None) for flags, each in modes.items()}
               for name, modes in plan.methods.items()}  # fmt: skip
    kept = {name: {flags: each for flags, each in modes.items() if each} for name, modes in methods.items()}
    return replace(plan, methods={name: modes for name, modes in kept.items() if modes})


def _blocked(state: RegionState, recipe: Recipe) -> str:
    """Why a packed tensor stays a plain one; empty where it may become a DTensor."""
    if state.packing != "packed" or state.plan.keeps_parameters:
        return "its lanes stay Parameters of their own"
    if state.plan.wholes:
        return "packs of its region are cut into parts (frozen lanes, other param groups)"
    slot = slot_of(state, recipe)
    return "its lanes are not registered by the model" if slot is None or slot.store == "__dict__" else ""


def _equal_rows(recipe: Recipe, world: int) -> Split:
    """As ``Shard(0)`` divides the rows."""
    rows = packed_shape(recipe)[0]
    size = -(-rows // world)
    return Split(0, tuple(min(size * r, rows) for r in range(world + 1)))


def _uneven(recipe: Recipe, world: int, idle: bool) -> str:
    """Why a lane would lie on two processes; empty where equal parts of the rows are lanes."""
    starts, lanes, rows = _equal_rows(recipe, world).starts, len(recipe.members), packed_shape(recipe)[0]
    edges = set(recipe.row_starts() if recipe.style in ("cat", "rows") else range(lanes + 1))
    if starts[-2] >= rows and not idle:
        return f"{lanes} lanes are too few for {world} processes: one of them would have none"
    if edges.issuperset(starts):
        return ""
    each = f" of {rows // lanes} rows" if recipe.style == "cat" else ""
    return f"its {lanes} lanes{each} have no edges where {world} equal parts of {rows} rows do"


def _worth_dividing(state: RegionState, recipe: Recipe, world: int) -> bool:
    """Is it worth a collective at each call to hold a share only? Not for buffers, into which programs write."""
    slot, shape = slot_of(state, recipe), packed_shape(recipe)
    if slot is None or recipe.kind != "parameter" or shape[0] < world:
        return False
    return math.prod(shape) * slot.packed().element_size() >= WORTH_DIVIDING


def slot_of(state: RegionState, recipe: Recipe) -> Slot | None:
    """The slot of some lane of a pack."""
    for module in state.members():
        info = lane_info(module)
        for slot in info.slots.values() if info is not None else ():
            if slot.recipe.name == recipe.name:
                return slot
    return None


def _trials(state: RegionState, program: Program, packs: dict[str, Split], world: int) -> list[Trial]:
    """The program tried at two sizes, with equal steps. Raises ``CannotSplit`` where that cannot be had."""
    free = free_rows(program.guard)
    found: list[Trial] = []
    said = ""
    for rows in ROWS:
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
    if not all(alike(step, found[0].steps[node]) for one in found for node, step in one.steps.items()):
        raise CannotSplit("how lanes can be divided hangs on the batch size")
    return found


def _trial(state: RegionState, program: Program, packs: dict[str, Split], world: int, rows: int, seed: int) -> Trial:
    closed = any(node.op == "call_module" for node in program.graph.nodes)
    # In float64 where the program takes it, the casts of autocast left out: rounding of a narrow dtype would hide a bias added twice.
    draw = Drawn(seed, (program.guard.generic_dtype or program.guard.autocast is not None) and not closed)
    trial = Trial(program.graph, world, packs, lambda node, args, kwargs: _call(state, node, args, kwargs, draw.wide))
    given = iter(draw.inputs(program.guard, rows))
    for node in program.graph.nodes:
        if node.op == "placeholder":
            trial.values[node] = next(given)
        elif node.op == "get_attr":
            place = state.sources().get(node.target) or source(state.region, node.target)
            held = place.fetch().detach()
            known = next((v for n, v in trial.values.items() if n.op == "get_attr" and n.target == node.target), None)
            if known is None:
                real = held.is_floating_point() or held.is_complex()
                known = draw.tensor(held.shape, held.dtype, held.device, place.store == "_buffers") if real else held
            trial.values[node] = known
    trial.run()
    return trial


def _call(state: RegionState, node: torch.fx.Node, args: Any, kwargs: Any, wide: bool) -> Any:
    target: Any = node.target
    if wide and target is autocast_to and args[1].is_floating_point:
        return args[0].view_as(args[0])
    if node.op == "call_module":
        return walk(state.region, target)(*args, **kwargs)
    return getattr(args[0], target)(*args[1:], **kwargs) if node.op == "call_method" else target(*args, **kwargs)


def _needed_whole(trial: Trial) -> set[str]:
    """Packs that some op reads whole, or a view of them."""
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


def _dtype(state: RegionState, program: Program) -> torch.dtype | None:
    """What stands for float64 where a trial ran in that instead of the model's dtype."""
    held = (fact.dtype for name, fact in state.facts.items() if fact.dtype.is_floating_point)
    return next(held, None) if program.guard.generic_dtype else None


def _free_shape(node: torch.fx.Node, tried: list[Trial], instead: torch.dtype | None) -> tuple[tuple[int | None, ...], int]:
    """The shape of a node's value, None for sizes that are free, and the bytes of an element."""
    values = [trial.values[node] for trial in tried]
    shape = tuple(sizes[0] if len(set(sizes)) == 1 else None for sizes in zip(*(v.shape for v in values), strict=True))
    dtype = instead if instead is not None and values[0].dtype is torch.float64 else values[0].dtype
    return shape, dtype.itemsize
