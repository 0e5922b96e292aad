"""From one graph of dynamo's to what runs it.

Comes in: dynamo's ``GraphModule``, its inputs, the settings and the inner backend. Goes out: a function of the graph's inputs. Whatever
goes wrong, it is the inner backend's of dynamo's own graph, with one warning that says why.
"""

from __future__ import annotations

import logging
import operator
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor

from fxfuse.determinism import preserved_state
from fxfuse.exclusive import alone
from fxfuse.graph import Recipe, Refusal
from fxfuse.private.dynamo import Compiler, is_open, keep_origin, stand_in
from fxfuse.quiet import quiet

from .call import Call, Pack, without_autocast
from .captured import NUMBERS, Captured, Uncaptured
from .check import check
from .rewrite import NO_LOOP, Rewritten, rewrite
from .settings import Settings
from .shared import FrozenPack, SharedPack, may_share
from .written import constants_of, outside_form, write

log = logging.getLogger(__name__)

# A pack of so many members, or bytes, is worth sharing memory for. ``benchmarks/share_or_stack.py`` on a CPU: looking at members where
# they lie is never slower than stacking them in inference (8 of 128 bytes 0.9 of its time, 64 of 4 KiB 0.65, 16 of 64 KiB 0.2); in
# training its fixed cost of some 15 us outweighs the copy below 256 KiB or so, and is 1 % of a call. Stacked members are inputs of the
# compiled graph each, which Inductor compiles for: no difference at 8 lanes (14.3 against 15.0 s cold), 27 against 17 s at 32. Below
# these bounds nothing is gained, and the user's memory stays where it is.
SHARED_MEMBERS = 8
SHARED_BYTES = 1 << 18


# Reasons that are no failure: there is no loop, or it is better left as it is. They are logged.
DECISIONS = (NO_LOOP, NUMBERS, "left as a loop: ", " stays a loop: ")


def compiled(graph: torch.fx.GraphModule, inputs: list[Any], settings: Settings, inner: Compiler) -> Callable[..., Any]:
    """A function of the inputs of ``graph`` that gives its results."""
    made = rewritten_or_refused(graph.graph, inputs, settings)
    if isinstance(made, Refusal):
        tell(made)
        return inner(graph, inputs)
    captured, rewritten = made
    try:
        return _call(graph, inputs, captured, rewritten, settings, inner)
    except Exception as error:
        log.debug("failed", exc_info=True)
        tell(Refusal(f"it fails on the fused one ({type(error).__name__}: {_first_line(error)})"))
        return inner(graph, inputs)


def rewritten_or_refused(graph: torch.fx.Graph, inputs: Sequence[Any], settings: Settings) -> tuple[Captured, Rewritten] | Refusal:
    """The graph rewritten and checked, or why it stays. Never raises; what was done is logged."""
    start = time.perf_counter()
    try:
        with alone():
            made = _rewritten(graph, inputs, settings)
    except Exception as error:  # a failure inside fxfuse must not cost anybody a compilation
        log.debug("failed", exc_info=True)
        made = Refusal(f"fxfuse failed ({type(error).__name__}: {_first_line(error)}); please report it")
    if not isinstance(made, Refusal):
        for op in made[1].ops:
            log.info("%d lanes of %s as one: %s %s (%s)", op.lanes, op.op, op.lowering, op.detail, op.place)
        for refusal in made[1].refusals:
            log.info("%s", refusal)
    log.info("looked at, rewritten and checked in %.2f s", time.perf_counter() - start)
    return made


def tell(refusal: Refusal) -> None:
    """One warning that a graph goes to the inner backend as it is; where that is no failure, a line of the log."""
    text = f"fxfuse leaves a graph to the inner backend as it is: {refusal}"
    log.info("%s", text)
    if not any(said in refusal.reason for said in DECISIONS):
        warnings.warn(text, UserWarning, stacklevel=2)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _rewritten(graph: torch.fx.Graph, inputs: Sequence[Any], settings: Settings) -> tuple[Captured, Rewritten] | Refusal:
    """The graph rewritten and checked, or why it stays."""
    try:
        captured = Captured(graph, inputs)
    except Uncaptured as reason:
        return Refusal(str(reason))
    with quiet(), torch.inference_mode(False), preserved_state(captured):
        rewritten = rewrite(captured, settings)
    if isinstance(rewritten, Refusal):
        return rewritten
    if settings.validate:
        outcome = check(captured, rewritten)
        log.debug("%s", outcome)
        if not outcome.ok:
            return Refusal(f"undone: the rewritten form differs: {outcome.reason}")
    return _unguarded(captured, rewritten) or (captured, rewritten)


_COMPARE = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt, "!=": operator.ne}


def _unguarded(captured: Captured, rewritten: Rewritten) -> Refusal | None:
    """What the rewritten form takes for granted of open sizes becomes a guard of dynamo's; why it cannot, where it cannot."""
    nodes = {slot.input: slot.node for slot in captured.slots if slot.input >= 0}
    for symbol in rewritten.held:
        index, dim = symbol.places[0]
        operator.index(nodes[index].meta["example_value"].shape[dim])  # guards
    for given in rewritten.program.guard.sizes:
        example = nodes[given.input].meta.get("example_value")
        size = example.shape[given.dim] if isinstance(example, Tensor) else None
        if not is_open(size):
            continue
        if given.op == "==":
            return Refusal(f"the fused form would hold the size {size} at {given.bound}, which is open here")
        compare: Any = _COMPARE[given.op]
        if not compare(size, given.bound):  # guards
            return Refusal(f"the fused form is for sizes {size} {given.op} {given.bound}")
    return None


def _call(
    graph: torch.fx.GraphModule, inputs: list[Any], captured: Captured, rewritten: Rewritten, settings: Settings, inner: Compiler
) -> Callable[..., Any]:
    frozen = settings.freeze and not torch.is_grad_enabled()
    weights = {slot.weight: tensor for slot, tensor in zip(captured.slots, inputs, strict=True) if slot.weight}
    outside = {recipe.name: form for recipe in rewritten.recipes if (form := _outside(recipe, weights, frozen)) is not None}
    written = write(captured, rewritten, outside)
    module = torch.fx.GraphModule(torch.nn.Module(), written.graph)
    keep_origin(module, graph)
    log.debug("%s", module.code)
    constants = constants_of(rewritten, written)
    examples = [
        *(inputs[number] for number in written.kept),
        *(stand_in(_like_pack(outside[recipe.name], weights), inputs) for recipe in written.outside),
        *(stand_in(constant, inputs) for constant in constants),
    ]
    casts = rewritten.program.guard.autocast
    kind = None if casts is None else casts[0]
    with without_autocast(kind):
        run = inner(module, examples)
    numbers = {slot.weight: number for number, slot in enumerate(captured.slots) if slot.weight}
    packs: list[tuple[Pack, list[int]]] = []
    for recipe in written.outside:
        form = outside[recipe.name]
        packs.append((FrozenPack(form) if frozen else SharedPack(form), [numbers[member] for member in form.members]))
    if not packs and written.kept == list(range(len(inputs))) and not constants and kind is None:
        return run
    return Call(run, written.kept, packs, constants, kind, written.writes)


def _outside(recipe: Recipe, weights: dict[str, Tensor], frozen: bool) -> Recipe | None:
    """The form in which a pack is made outside of the graph; None where it is stacked at every call."""
    form = outside_form(recipe)
    if form is None:
        return None
    members = [weights[member] for member in recipe.members]
    if frozen:
        return form if recipe.kind == "parameter" else None
    size = sum(member.numel() * member.element_size() for member in members)
    worth = len(members) >= SHARED_MEMBERS or size >= SHARED_BYTES
    return form if worth and may_share(form, members) else None


def _like_pack(recipe: Recipe, weights: dict[str, Tensor]) -> Tensor:
    """A tensor like the pack; its numbers mean nothing."""
    from fxfuse.recipes import packed_shape

    first = weights[recipe.members[0]]
    made = torch.empty(packed_shape(recipe), dtype=first.dtype, device=first.device)
    return made.requires_grad_(first.requires_grad)
