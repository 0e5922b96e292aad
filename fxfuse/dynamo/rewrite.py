"""The pipeline on one graph of dynamo's: record, find lanes, bundle, plan, rewrite.

Comes in: a ``Captured`` graph and the settings. Goes out: ``Rewritten``: a graph over packed weights, and how they are packed; or a
``Refusal`` (no loop, or one that has to stay).

A graph of dynamo's takes the same steps at every call that its guards let through, so that one recording is enough, and one more for each
size that is open. What is open because it changes stays open: a rewritten form that would hold such a size is refused. Sizes that are open
because all are (``dynamic=True``: also the number of columns that the loop counts) may be held, by a guard of dynamo's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.fx
from torch import Tensor

from fxfuse.building.regions import RegionFinder
from fxfuse.graph import FusedOp, Program, Recipe, Refusal
from fxfuse.models.inputs import batch_size, resample, vary
from fxfuse.options import Options
from fxfuse.passes.packs import Packs
from fxfuse.passes.program import make_program, resolve_packed
from fxfuse.passes.vectorize import Prepared
from fxfuse.planning.plan import Planner
from fxfuse.recording.observe import Observation, second_batch
from fxfuse.recording.tracer import record
from fxfuse.recording.unify import Unifier

from .captured import Captured, Symbol
from .settings import Settings
from .worth import not_worth_it

MOST_SYMBOLS = 6

Tensors = tuple[Tensor, ...]


@dataclass
class Rewritten:
    """``program.graph`` reads packs (``recipes``), ``constants`` and single weights by name; its inputs are those of ``Captured``."""

    program: Program
    recipes: list[Recipe]
    constants: dict[str, Tensor]
    ops: list[FusedOp]
    examples: list[Tensors]  # of every size that is open, besides the given one
    held: list[Symbol] = field(default_factory=list)  # open sizes that are fixed from now on
    refusals: list[Refusal] = field(default_factory=list)  # lanes that stay


def rewrite(captured: Captured, settings: Settings) -> Rewritten | Refusal:
    """The graph rewritten, or why it stays as it is."""
    given = apart(captured.given)
    found = _observed(captured, given)
    if isinstance(found, Refusal):
        return found
    observation, examples = found
    finder = RegionFinder(observation, settings.min_lanes, merge=False)
    frame = observation.trace.frames[0]
    prepared = Refusal(frame.poison, frame.place) if frame.poison else finder.prepared(frame, sum(s.wanted for s in captured.symbols))
    if isinstance(prepared, Refusal):
        return prepared
    if not prepared.worthwhile:
        return prepared.idle[0] if prepared.idle else Refusal(NO_LOOP)
    held = _held_sizes(captured, prepared)
    wanted = next((symbol for symbol in held if symbol.wanted), None)
    if wanted is not None:
        why = f": {prepared.lifted.specialised}" if prepared.lifted.specialised else ""
        return Refusal(f"the fused form would hold the size {wanted.name}, which is open here{why}", prepared.lifted.place or frame.place)
    kinds: Any = {name: "parameter" if isinstance(t, torch.nn.Parameter) else "buffer" for name, t in captured.weights().items()}
    asked = settings.lowering != "auto"  # a form that is asked for is not held against the loop
    options = Options(
        lowering=settings.lowering, tune=settings.tune, min_lanes=settings.min_lanes, mode=_mode(captured),
        objective="launches" if asked else "time",
    )  # fmt: skip
    bench = captured.alias()  # gradients are asked of what is timed, and the user's tensors may have hooks
    packs = Packs(kinds=kinds, holder="packed", members_stay=True)
    planner = Planner(prepared, bench, packs, options, compiled=settings.inner == "inductor")
    choice = planner.plan()
    if choice.refusal is not None or choice.vectorized is None:
        return choice.refusal or Refusal("nothing is left to fuse")
    if not (settings.tune or asked):
        loss = not_worth_it(planner, choice, bench, settings)
        if loss is not None:
            return loss
    made = choice.vectorized
    resolve_packed(made.graph, made.packs)
    program = make_program(observation.trace, prepared.lifted, made.graph)
    used = {str(node.target) for node in made.graph.nodes if node.op == "get_attr"}
    recipes = [recipe for recipe in made.packs.recipes.values() if recipe.name in used]
    constants = {name: tensor for name, tensor in made.packs.constants.items() if name in used}
    return Rewritten(program, recipes, constants, made.ops, open_only(examples, captured, held), held, [*prepared.refusals, *planner.left])


def open_only(examples: list[Tensors], captured: Captured, held: Sequence[Symbol]) -> list[Tensors]:
    """The examples of the sizes that stay open."""
    return [tensors for symbol, tensors in zip(captured.symbols, examples, strict=True) if symbol not in held]


NO_LOOP = "no loop over equal networks was found"


def apart(tensors: Sequence[Tensor]) -> Tensors:
    """The tensors, or ordinary copies of those made in inference mode, which cannot take part in a backward."""
    return tuple(tensor.clone() if tensor.is_inference() else tensor for tensor in tensors)


def _mode(captured: Captured) -> Any:
    # Whether gradients are tracked here, while the graph is recorded, says nothing of the caller.
    wanted = any(tensor.requires_grad for tensor in (*captured.given, *captured.weights().values()))
    return "train" if captured.tracked and wanted else "infer"


def _observed(captured: Captured, given: Tensors) -> tuple[Observation, list[Tensors]] | Refusal:
    """The graph's run, and which dims are free: for each symbol, those that differ in a run in which it is another number."""
    trace = record(captured, given, {})
    if trace.failure:
        return Refusal(f"the graph raises {trace.failure} when it is run by itself")
    observation = Observation(trace, (captured.training,))
    examples: list[Tensors] = []
    if len(captured.symbols) > MOST_SYMBOLS:
        return Refusal(f"{len(captured.symbols)} sizes are open")
    for symbol in captured.symbols:
        run = _resized(captured, given, symbol)
        if run is None:
            return Refusal(f"no other number than the recorded one was found for the open size {symbol.name}")
        other, tensors = run
        unifier = Unifier(trace, other)
        mismatch = unifier.compare(trace.frames[0], other.frames[0])
        if mismatch is not None:
            return Refusal(f"with another size {symbol.name} the steps differ: {mismatch.reason}", mismatch.place)
        observation.sizes.append(unifier.dynamic())
        examples.append(tensors)
    for dims in observation.sizes:
        for value, free in dims.items():
            observation.dynamic[value] = observation.dynamic.get(value, frozenset()) | free
    return observation, examples


def _resized(captured: Captured, given: Tensors, symbol: Symbol) -> tuple[Any, Tensors] | None:
    """A run in which ``symbol`` is another number, and its inputs. None where the graph takes no other."""
    before = given[symbol.places[0][0]].shape[symbol.places[0][1]]
    if before == 0:
        return None
    for size in dict.fromkeys((second_batch(before), 2 * before, 3 * before, before + 1)):
        tensors = given
        for dim in sorted({dim for _, dim in symbol.places}):
            chosen = tuple(index for index, at in symbol.places if at == dim)
            tensors, _ = vary(tensors, {}, chosen, partial(_number, size), dim=dim, seed=4)
        trace = record(captured, tensors, {})
        if not trace.failure and trace.frames:
            return trace, tensors
    return None


def _number(size: int, before: int) -> int:
    return size


def other_data(given: Tensors) -> Tensors:
    """Fresh data of the same sizes."""
    tensors, _ = resample(given, {}, batch=batch_size(given, {}) or None, seed=2)
    return tuple(tensors)


def _held_sizes(captured: Captured, prepared: Prepared) -> list[Symbol]:
    """The open sizes that the rewritten form holds at the recorded number."""
    lifted = prepared.lifted
    values = [leaf.value for leaf in lifted.frame.leaves]
    dynamic = {} if lifted.specialised else lifted.dynamic
    return [s for s in captured.symbols if any(dim not in dynamic.get(values[i], frozenset()) for i, dim in s.places)]
