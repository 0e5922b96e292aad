"""Further programs of a fused region, made at its first calls under autocast, and on inputs that lie otherwise (channels_last).

Comes in: a region and a call that fits what was recorded but for the dtypes that ``torch.autocast`` chose, or for the order in memory in
which inputs lie. Goes out: a program for such calls, added to the region; or why there is none, and the call runs the loop. The region's
own forward is recorded once more, on such inputs, and under that autocast, whose casts become casts in the graph, so that every packed op
computes in the dtypes of the ops it replaces; then it is rewritten over the packs that are there. The result, its casts left out, is
compared with the loop as any program is, in float64 too; then as it is, under autocast, dtype by dtype. Programs made so are not saved or
copied: a copy makes its own.
"""

from __future__ import annotations

import copy
import math
import threading
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fxfuse.checking.runs import run
from fxfuse.checking.validate import other_examples, validate
from fxfuse.errors import FallbackError
from fxfuse.functional import autocast_to
from fxfuse.fused import unfuse
from fxfuse.graph import Guard, Program, Refusal, TensorGuard
from fxfuse.models.collector import paused
from fxfuse.models.determinism import preserved_state
from fxfuse.models.held import held_by_caller
from fxfuse.models.inputs import batch_size, resample
from fxfuse.models.silent_hooks import hooks_silent
from fxfuse.passes.own_results import own_results
from fxfuse.passes.packs import Packs
from fxfuse.passes.program import make_program, resolve_packed
from fxfuse.passes.vectorize import vectorize
from fxfuse.private.autocast import autocast_on
from fxfuse.private.pytree import tree_flatten, tree_map_only
from fxfuse.private.saved_hooks import unseen_by_hooks
from fxfuse.private.transforms import transforming
from fxfuse.recording.casts import without_autocast
from fxfuse.recording.lengths import tracked_len
from fxfuse.recording.observe import observe, reads_offsets
from fxfuse.running.entries import FORWARD, INSIDE, Entry
from fxfuse.running.guards import explain_miss, order_of
from fxfuse.running.region import STATE, RegionState
from fxfuse.running.runtime import walk
from fxfuse.weights.parts import in_parts, whole_recipes
from fxfuse.weights.weights import unpackable

from .build import MOST_FORMS, made_relative
from .input_orders import held_to_order, held_to_own_order
from .regions import RegionFinder

_lock = threading.RLock()
Casts = tuple[str, torch.dtype]  # the kind of device, and what autocast casts to there
_MOST_CALLS = 16  # of different dtypes and orders in memory for which a program was tried
_ROOM = 1.5  # times the root of the narrow dtype's eps: how far results of two orders of rounding may be apart, in norm


class Unfit(Exception):
    """No program can be made; the message says why."""


@dataclass(frozen=True)
class _Made:
    program: Program
    constants: dict[str, Tensor]  # index tensors that it reads
    entry: Entry  # the call, its tensors apart from those of the caller
    fresh: bool  # its inputs may be drawn anew


def adapt(state: RegionState, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Make a program for a call of the method ``name``; None where that came about, else why not (empty: the call fits nothing)."""
    casts: Casts | None = next(iter(autocast_on()), None)
    flags = state.flags()
    recorded = state.plan.programs.get(flags) if name == FORWARD else None
    bases = [*([recorded] if recorded is not None else []), *state.plan.methods.get(name, {}).get(flags, ())]
    leaves, spec = tree_flatten((args, kwargs))
    if transforming() or state.plan.making is None or not any(p.in_spec == spec and _fits(p.guard, leaves, casts) for p in bases):
        return ""
    key = (name, flags, casts, tuple((leaf.dtype, order_of(leaf)) for leaf in leaves if isinstance(leaf, Tensor)))
    with _lock:
        made_before = [c.program for c in state.adapted.get((name, flags), ()) if c.program.in_spec == spec]
        if any(explain_miss(program.guard, leaves) is None for program in made_before):
            return None  # another thread was first
        if key not in state.unfit and len(state.unfit) >= _MOST_CALLS:
            return ""
        tried = state.unfit.setdefault(key, [])
        if len(tried) >= MOST_FORMS or any(tried):
            return next(filter(None, tried), "")
        try:
            with _undisturbed():
                made = _best(state, name, args, kwargs, casts)
            state.extra.update(made.constants)
            compiled = state.compile(made.program, {})
        except Unfit as unfit:
            tried.append(str(unfit))
        except Exception as error:  # a failure inside fxfuse must not cost anybody a call
            tried.append(f"fxfuse failed ({type(error).__name__}: {str(error).partition(chr(10))[0]}); please report it")
        else:
            tried.append("")
            state.adapted.setdefault((name, flags), []).append(compiled)
            return None
        return tried[-1]


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Recording and comparing in the middle of somebody's call."""
    with (
        warnings.catch_warnings(),
        unseen_by_hooks(),
        torch.inference_mode(False),
        torch.enable_grad(),
        without_autocast(),
        preserved_state(),
    ):
        warnings.simplefilter("ignore")
        yield


def _autocast(casts: Casts | None) -> AbstractContextManager[Any]:
    return nullcontext() if casts is None else torch.autocast(casts[0], dtype=casts[1])


def _fits(guard: Guard, leaves: list[Any], casts: Casts | None) -> bool:
    """Does the call fit, whatever the order in memory of its inputs; under autocast, whatever their floating dtypes?"""
    anyhow = tuple(replace(leaf, layout="", order=()) if isinstance(leaf, TensorGuard) else leaf for leaf in guard.leaves)
    if casts is None:
        asked = replace(guard, leaves=anyhow, in_rows=False)
        return batch_size(tuple(leaves), {}) != 0 and explain_miss(asked, leaves) is None and explain_miss(guard, leaves) is not None

    def given(leaf: Any, value: Any) -> Any:
        floating = isinstance(leaf, TensorGuard) and isinstance(value, Tensor)
        if floating and leaf.dtype.is_floating_point and value.dtype.is_floating_point:
            return replace(leaf, dtype=value.dtype)
        return leaf

    wanted = tuple(given(leaf, value) for leaf, value in zip(anyhow, leaves, strict=True))
    asked = replace(guard, leaves=wanted, generic_dtype=False, autocast=casts)
    return batch_size(tuple(leaves), {}) != 0 and explain_miss(asked, leaves) is None


def _best(state: RegionState, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], casts: Casts | None) -> _Made:
    """The program that fits most calls: one row says little of strides and free sizes, so that more are tried first."""
    assert state.plan.making is not None
    example = _apart(args, kwargs)
    rows = [resample(*example, batch=3, seed=5), example] if batch_size(*example) == 1 else [example]
    for index, given in enumerate(rows):
        try:
            made = _made(state, Entry(name, *given), casts)
            if explain_miss(replace(made.program.guard, autocast=None), tree_flatten(example)[0]) is not None:
                raise Unfit("no call fits what was recorded")
            if state.plan.making.validate:
                _prove(state, made, casts)
            return made
        except Unfit:
            if index + 1 == len(rows):
                raise
    raise AssertionError("the last one raises")


def _made(state: RegionState, entry: Entry, casts: Casts | None) -> _Made:
    """The region recorded under ``casts`` and rewritten over its packs."""
    plan, making = state.plan, state.plan.making
    assert making is not None
    region = _bare(unfuse(state.region))
    for whole in plan.wholes.values():  # frozen lanes are lanes of their pack still: its parts are joined at every call
        for member in whole.members:
            walk(region, member).requires_grad_(whole.requires_grad)
    with paused(), tracked_len(region), _autocast(casts):
        observation = observe(entry.root(region), entry.args, entry.kwargs)
    if observation.failure:
        raise Unfit(f"the forward raises {observation.failure}")
    inside = f"{INSIDE}." if entry.is_method else ""
    packed = {inside + member: recipe.name for recipe in whole_recipes(plan) for member in recipe.members}
    finder, frame = RegionFinder(observation, 2, True, packed), observation.trace.frames[0]
    prepared = Refusal(frame.poison, frame.place) if frame.poison else finder.prepared(frame)
    refusal = prepared if isinstance(prepared, Refusal) else made_relative(prepared.lifted, entry, "")
    if isinstance(prepared, Refusal) or refusal is not None:
        raise Unfit(str(refusal))
    prepared.single = making.single
    prepared = prepared.with_widths(making.together)
    prepared = prepared if prepared.worthwhile else prepared.whatever_it_saves()
    prepared = prepared.without(making.skipped) if making.skipped else prepared
    made = vectorize(prepared.cut(making.chunks), _packs(state, region), making.lowering, making.prefer)
    if made is None:
        closed = [Refusal(f.poison, f.place) for f in observation.trace.frames if f.poison]
        raise Unfit(str([*prepared.refusals, *closed, Refusal("nothing is left to fuse")][0]))
    resolve_packed(made.graph, made.packs)
    if making.own_results:
        own_results(made.graph)
    used = {str(node.target) for node in made.graph.nodes if node.op == "get_attr"}
    constants = {name: tensor for name, tensor in made.packs.constants.items() if name in used and name not in plan.constants}
    program = make_program(observation.trace, prepared.lifted, made.graph)
    with _autocast(casts):
        program = held_to_order(program, prepared.lifted, entry.root(region), observation.flags)
    program = held_to_own_order(program, prepared.lifted)
    program = in_parts(held_by_caller(program), plan)
    return _Made(program, constants, entry, not reads_offsets(observation.trace))


def _bare(region: nn.Module) -> nn.Module:
    """The region with its class's own forward: a wrapper around that (accelerate's) has done its part already."""
    region.__dict__.pop("forward", None)
    return region


def _apart(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments as leaves: the call's own tensors belong to somebody's autograd graph."""
    found: tuple[tuple[Any, ...], dict[str, Any]] = tree_map_only(
        Tensor, lambda t: t.detach().clone().requires_grad_(t.requires_grad), (args, kwargs)
    )
    return found


def _packs(state: RegionState, region: nn.Module) -> Packs:
    """What is packed, as it is; nothing else can be packed any more."""
    recipes = {recipe.members: recipe for recipe in whole_recipes(state.plan)}
    where = {member: (recipe, index) for recipe in recipes.values() for index, member in enumerate(recipe.members)}
    blocked, kinds = unpackable(region, "")
    blocked = {name: reason for name, reason in blocked.items() if name not in where}
    blocked.update({name: "it is not packed" for name in kinds if name not in where})
    constants = {**state.plan.constants, **state.extra}
    return Packs(recipes, where, constants, blocked, kinds, state.holder or "packed")


def _prove(state: RegionState, made: _Made, casts: Casts | None) -> None:
    """Raise ``Unfit`` where the program is not the loop: without its casts, as far as the loop runs without autocast; and with them."""
    original, fused = _bare(unfuse(state.region)), _bare(copy.deepcopy(state.region))
    entry, trial = made.entry, fused.__dict__[STATE]
    roots, example = (entry.root(original), entry.root(fused)), (entry.args, entry.kwargs)
    examples = [example, *(other_examples(example)[:2] if made.fresh else [])]
    with hooks_silent(original), hooks_silent(fused):
        _try_only(trial, made, without_casts(made.program), strict=False)
        outcome = validate(*roots, examples, modes=("given",), own_dtype=False, must_run=0)
        if not outcome.differences:  # a forward that insists on its dtype
            outcome = validate(*roots, examples, modes=("given",), float64=False, must_run=0)
        if outcome.differences and not outcome.ok:
            raise Unfit(f"the rewritten form differs: {outcome.reason}")
        _try_only(trial, made, made.program, strict=True)  # an answer of the loop would be compared with itself
        for args, kwargs in examples:
            with _autocast(casts):
                loop, packed = (run(root, args, kwargs, mode="given", requires_grad=None) for root in roots)
            if isinstance(packed.error, FallbackError) and args is not entry.args:
                continue  # of other sizes
            if loop.error is None and packed.error is not None:
                raise Unfit(f"the rewritten form raises {type(packed.error).__name__}: {packed.error}")
            for kind in ("outputs", "input_gradients", "parameter_gradients", "buffers") if loop.error is None else ():
                reason = _difference(getattr(loop, kind), getattr(packed, kind), torch.get_default_dtype() if casts is None else casts[1])
                if reason:
                    raise Unfit(f"the rewritten form differs{' under autocast' if casts else ''}: {reason}")


def _try_only(trial: RegionState, made: _Made, program: Program, *, strict: bool) -> None:
    """Make ``program`` the only one of a copied region."""
    flags, name = trial.flags(), made.entry.name
    forward = {flags: program} if name == FORWARD else {}
    methods: dict[str, dict[tuple[bool, ...], tuple[Program, ...]]] = {} if name == FORWARD else {name: {flags: (program,)}}
    trial.plan = replace(trial.plan, programs=forward, methods=methods, making=None)
    trial.extra.update(made.constants)
    trial.facts.clear()  # what the weights are now counts
    trial.compiled.clear()
    trial.others.clear()
    trial.strict, trial.ready = strict, None


def without_casts(program: Program) -> Program:
    """The program for calls without autocast: what autocast casts stays as it is."""
    graph = copy.deepcopy(program.graph)
    for node in graph.nodes:
        if node.target is autocast_to and node.args[1].is_floating_point:
            node.replace_all_uses_with(node.args[0])
    return replace(program, graph=graph, guard=replace(program.guard, autocast=None))


def _difference(one: dict[str, Any], two: dict[str, Any], dtype: torch.dtype) -> str:
    """What differs in dtype, shape, or by more than rounding in ``dtype`` does, taken over all tensors; else nothing."""
    distance = total = 0.0
    for name, want in one.items():
        got = two.get(name)
        if not isinstance(want, Tensor) or not isinstance(got, Tensor):
            if isinstance(want, Tensor) or isinstance(got, Tensor) or got != want:
                return f"{name} is {got!r}, the loop's {want!r}"
            continue
        if got.dtype is not want.dtype:
            return f"{name} is {got.dtype}, the loop's {want.dtype}"
        if got.shape != want.shape:
            return f"{name} has shape {tuple(got.shape)}, the loop's {tuple(want.shape)}"
        wide = torch.complex128 if want.dtype.is_complex else torch.float64
        finite = want.to(wide).nan_to_num()
        distance += float((got.to(wide).nan_to_num() - finite).abs().square().sum())
        total += float(finite.abs().square().sum())
    bound = _ROOM * math.sqrt(torch.finfo(dtype).eps)
    far = math.sqrt(distance) > bound * math.sqrt(total)
    return f"all values together by {math.sqrt(distance / total) if total else math.inf:.2g} of their norm" if far else ""
