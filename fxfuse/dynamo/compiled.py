"""From one graph of dynamo's to what runs it.

Comes in: dynamo's ``GraphModule``, its inputs, the settings and the inner backend. Goes out: a function of the graph's inputs. Whatever
goes wrong, it is the inner backend's of dynamo's own graph, with one warning that says why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch import Tensor

from fxfuse.graph import Recipe, Refusal
from fxfuse.private.dynamo import Compiler, is_dynamos, keep_origin, stand_in
from fxfuse.running.for_compilers import biases_apart_here
from fxfuse.weights.shared import SharedPack, may_share, memory_form

from .call import Call, Pack, leave_hooks_alone, without_autocast
from .captured import Captured
from .checked import first_line, rewritten_or_refused, tell
from .frozen_pack import FrozenPack
from .outside import worth_sharing
from .pieces import holds_graphs, in_pieces, inlined
from .rewrite import Rewritten
from .settings import Settings
from .written import constants_of, write

log = logging.getLogger(__name__)

def compiled(graph: torch.fx.GraphModule, inputs: list[Any], settings: Settings, inner: Compiler) -> Callable[..., Any]:
    """A function of the inputs of ``graph`` that gives its results."""
    if holds_graphs(graph.graph):
        return _with_graphs(graph, inputs, settings, inner)
    made = rewritten_or_refused(graph.graph, inputs, settings)
    if isinstance(made, Refusal):
        tell(made)
        return inner(graph, inputs)
    try:
        return _call(graph, inputs, *made, settings, inner)
    except Exception as error:
        return _dynamos_own(graph, inputs, inner, error)


def _with_graphs(graph: torch.fx.GraphModule, inputs: list[Any], settings: Settings, inner: Compiler) -> Callable[..., Any]:
    """The same for a graph that calls what is given graphs."""
    try:
        flat = inlined(graph)
        if flat is not None and not holds_graphs(flat.graph):
            found = rewritten_or_refused(flat.graph, inputs, settings)
            if not isinstance(found, Refusal):
                return _call(flat, inputs, *found, settings, inner)
            tell(found)
            return inner(graph, inputs)
        made = in_pieces(graph if flat is None else flat, inputs, settings)
        if not isinstance(made, Refusal):
            log.debug("%s", made.code)
            return inner(made, inputs)
    except Exception as error:
        return _dynamos_own(graph, inputs, inner, error)
    tell(made)
    return inner(graph, inputs)


def _dynamos_own(graph: torch.fx.GraphModule, inputs: list[Any], inner: Compiler, error: Exception) -> Callable[..., Any]:
    if is_dynamos(error):
        raise error
    log.debug("failed", exc_info=True)
    tell(Refusal(f"it fails on the fused one ({type(error).__name__}: {first_line(error)})"))
    return inner(graph, inputs)


def _call(
    graph: torch.fx.GraphModule, inputs: list[Any], captured: Captured, rewritten: Rewritten, settings: Settings, inner: Compiler
) -> Callable[..., Any]:
    frozen = settings.freeze and not torch.is_grad_enabled()
    weights = {slot.weight: tensor for slot, tensor in zip(captured.slots, inputs, strict=True) if slot.weight}
    outside = {recipe.name: form for recipe in rewritten.recipes if (form := _outside(recipe, weights, frozen)) is not None}
    written = write(captured, rewritten, outside)
    if settings.inner == "inductor":
        biases_apart_here(written.graph)
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
    leave_hooks_alone()
    return Call(run, written.kept, packs, constants, kind, written.writes)


def _outside(recipe: Recipe, weights: dict[str, Tensor], frozen: bool) -> Recipe | None:
    """The form in which a pack is made outside of the graph; None where it is stacked at every call."""
    form = memory_form(recipe)
    members = [weights[member] for member in recipe.members]
    if frozen:
        return form if recipe.kind == "parameter" else None
    return form if worth_sharing(form, members) and may_share(form, members) else None


def _like_pack(recipe: Recipe, weights: dict[str, Tensor]) -> Tensor:
    """A tensor like the pack; its numbers mean nothing."""
    from fxfuse.weights.recipes import packed_shape

    first = weights[recipe.members[0]]
    made = torch.empty(packed_shape(recipe), dtype=first.dtype, device=first.device)
    return made.requires_grad_(first.requires_grad)
