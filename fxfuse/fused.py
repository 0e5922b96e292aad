"""Fused models as a whole: their regions, their graphs, and the way back.

Comes in: a model, fused or not. Goes out: ``regions``, ``graphs``, ``unfuse``. What a region does when it is called is in ``region``,
how it is made in ``install``.
"""

from __future__ import annotations

import copy
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from fxfuse.errors import FxfuseError
from fxfuse.graph import Program

from .models.module_tree import all_modules, named_modules
from .models.sharded import is_sharded
from .models.side_by_side import move_apart
from .models.undo import Undo
from .models.unregistered import unregistered
from .running.region import STATE, RegionState
from .running.runtime import graph_module, source, walk
from .running.widen import widened
from .weights.alias import StaleAlias
from .weights.all_or_nothing import loads_as_before
from .weights.lane import divided, restore


def settle(model: nn.Module) -> None:
    """Let Parameters that stay, and that somebody held the memory of until now, move into their packs at the next call."""
    for state in regions(model).values():
        for alias in state.aliases.values():
            alias.settle_at_next_call()


def regions(model: nn.Module) -> dict[str, RegionState]:
    """The state of every fused region by its module path: ``plan``, ``fallbacks`` (reason -> calls) and so on."""
    return {path: module.__dict__[STATE] for path, module in named_modules(model) if STATE in module.__dict__}


def attributes_set(model: nn.Module, by_programs: bool = False) -> list[tuple[str, str]]:
    """The attributes (module path, name) that the forwards of fused regions set; ``by_programs``: without those that closed calls set."""
    found: list[tuple[str, str]] = []
    for path, state in regions(model).items():
        programs = {(store.module, store.name) for program in state.plan.all_programs() for store in program.stores}
        for module, name in sorted(programs if by_programs else state.plan.sets):
            found.append((f"{path}.{module}" if path and module else path or module, name))
    return found


def accept_any_dtype(model: nn.Module, casts: torch.dtype | None = None) -> None:
    """Let the programs of ``model`` run in float64, also where they follow the dtype of the recording; with ``casts``, so do casts to it.

    For comparisons in float64 under ``DefaultFloat64`` only: elsewhere a factory would still make the dtype of the recording.
    """

    def generic(program: Program) -> Program:
        guard = replace(program.guard, generic_dtype=True, autocast=None)  # autocast leaves float64 alone
        return replace(program, graph=widened(program.graph, casts), guard=guard)

    for state in regions(model).values():
        programs = {flags: generic(program) for flags, program in state.plan.programs.items()}
        methods = {
            name: {flags: tuple(map(generic, programs)) for flags, programs in modes.items()} for name, modes in state.plan.methods.items()
        }
        state.plan = replace(state.plan, programs=programs, methods=methods)
        state.compiled.clear()
        state.others.clear()
        state.adapted.clear()
        state.ready = state.current = None


def unfuse(model: nn.Module) -> nn.Module:
    """A new model of the original classes, with Parameters of its own; ``model`` is not changed.

    Values, requires_grad, training flags, the order of registration and attributes set since fusing stay. A model without
    fused regions is copied. Raises ``FxfuseError`` for one that FSDP2 shards over processes; lanes that
    ``shard_lanes`` divided are gathered.

    >>> unfuse(nn.Linear(2, 3))
    Linear(in_features=2, out_features=3, bias=True)
    """
    if any(is_sharded(parameter) for parameter in model.parameters()) and not any(divided(module) for module in model.modules()):
        raise FxfuseError(
            f"the {type(model).__name__} is sharded over processes: load fxfuse.original_state_dict of it into a plain model instead"
        )
    copied = copy.deepcopy(model)
    take_apart(copied)
    return copied


def take_apart(model: nn.Module, undo: Undo | None = None) -> None:
    """The same in place, parts that no module registers too. Parameters that stayed the model's are still the same objects, and lie in
    memory of their own where nobody else holds it. ``undo`` is given the way back."""
    parts = fused_parts(model)
    states: list[RegionState] = [part.__dict__[STATE] for part in parts.values()]
    if undo is not None:
        undo.keep([*all_modules(model), *(module for state in states for module in (*state.modules, *state.hidden))])
        undo.keep(module for _, module in unregistered(model))
    loads_as_before(model)
    aliases = [alias for state in states for alias in state.aliases.values()]
    for part in parts.values():
        restore(part)
    members: dict[int, Tensor] = {}
    for alias in aliases:
        with suppress(StaleAlias):
            members.update((id(member), member) for member in alias.members() if isinstance(member, Tensor))
        alias.let_go()
    move_apart(members.values(), undo)


def fused_parts(model: nn.Module) -> dict[str, nn.Module]:
    """The fused regions of a model by path, also those in modules that no module registers."""
    everyone = [*named_modules(model), *unregistered(model)]
    return {path: module for path, module in everyone if STATE in module.__dict__}


def graphs(model: nn.Module) -> dict[str, torch.fx.GraphModule]:
    """By region path, the program of the current mode as a ``torch.fx.GraphModule`` that shares the region's tensors.

    Its inputs are the flattened arguments, its result is the flat list of outputs. Regions without a program for the
    current ``training`` flags are left out. Programs of other methods are there as ``"path.method()"``.
    """
    found: dict[str, torch.fx.GraphModule] = {}
    for path, state in regions(model).items():
        flags = state.flags()
        program = state.plan.programs.get(flags)
        if program is not None:
            found[path] = _graph_module(state, program)
        for name, modes in state.plan.methods.items():
            if name != "forward" and modes.get(flags):
                found[f"{path}.{name}()" if path else f"{name}()"] = _graph_module(state, modes[flags][0])
    return found


def _graph_module(state: RegionState, program: Program) -> torch.fx.GraphModule:
    graph = copy.deepcopy(program.graph)
    root: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            alias = state.aliases.get(node.target)
            root[node.target] = alias.tensor if alias is not None else source(state.region, node.target).fetch()
        elif node.op == "call_module":
            root[node.target] = walk(state.region, node.target)
    return graph_module(root, graph, type(state.region).__name__)
