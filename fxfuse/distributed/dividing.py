"""How the lanes of a region can be divided among processes.

Comes in: a fused region, how many processes, and which of them this is. Goes out: the plan of this process, and what is to be said of it.
Its programs are tried at two batch sizes (``passes.split``); a pack that some op needs whole stays whole, and all is tried anew.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.fx
from torch import Tensor

from fxfuse.determinism import preserved_state
from fxfuse.graph import Program, Recipe, RegionPlan, TensorGuard
from fxfuse.lane import Slot, lane_info
from fxfuse.passes.shard import PartWriter
from fxfuse.passes.split import CannotSplit, Split, Trial
from fxfuse.recipes import packed_shape
from fxfuse.region import RegionState
from fxfuse.runtime import source, walk
from fxfuse.weight_views import VIEWS

from .one_size import for_any_size
from .sharding import Sharding

_ROWS = (5, 3, 8, 16, 2)  # batch sizes to try; two of them have to run


def divided(state: RegionState, world: int, rank: int, group: str) -> tuple[RegionPlan, Sharding]:
    """The plan of this process for a region, and what is to be said of it; the plan as it is where nothing can be divided."""
    plan = for_any_size(state.plan)  # the lanes of a loop are not divided, and those of a process are other lanes than were timed
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
        return state.plan, sharding
    made: dict[int, Program] = {}
    for number, (program, tried) in enumerate(zip(plan.all_programs(), trials, strict=True)):
        writer = PartWriter(tried[0], rank, group)
        made[id(program)] = replace(program, graph=writer.written())
        if number == 0:
            sharding.moved = [(kind, *_free_shape(node, tried, _dtype(state, program))) for kind, node in writer.moved]
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
    slot = slot_of(state, recipe)
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
            if known is None:
                real = held.is_floating_point() or held.is_complex()
                known = drawn(held.shape, held.dtype, held.device, place.store == "_buffers") if real else held
            trial.values[node] = known
    trial.run()
    return trial


def _call(state: RegionState, node: torch.fx.Node, args: Any, kwargs: Any) -> Any:
    target: Any = node.target
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
