"""Build the regions: plan each, and write its programs for every mode, method and form of call over one pack.

Comes in: what was recorded of a model, and its regions. Goes out: ``RegionPlan``s; what does not come about is a refusal in the report.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
import torch.fx
from torch import nn

from fxfuse.errors import ArgumentError
from fxfuse.graph import Making, Program, Refusal, RegionPlan
from fxfuse.models.determinism import preserved_state
from fxfuse.models.held import Places
from fxfuse.models.inputs import resample
from fxfuse.models.module_tree import all_modules
from fxfuse.models.silent_hooks import hooks_silent
from fxfuse.options import Options
from fxfuse.passes.lifted import Lifted
from fxfuse.passes.own_results import own_results
from fxfuse.passes.packs import Packs
from fxfuse.passes.program import fits, make_program, resolve_packed
from fxfuse.passes.vectorize import LaneSet, Prepared, Vectorized, vectorize
from fxfuse.planning.choice import Choice
from fxfuse.planning.patience import Patience
from fxfuse.planning.plan_by_size import PlannerBySize
from fxfuse.planning.progress import Progress
from fxfuse.planning.workbench import Case
from fxfuse.recording.observe import Observation
from fxfuse.recording.ran import Ran, ran_in
from fxfuse.recording.trace import Frame, Ref, Trace
from fxfuse.report import Report
from fxfuse.running.entries import FORWARD, INSIDE, Entry
from fxfuse.running.surroundings import Outside, Spelled, closed_modules, outside
from fxfuse.weights.weights import unpackable

from . import by_size
from .by_size import Serves
from .input_orders import held_to_order, held_to_own_order
from .regions import Region, RegionFinder

# What forward may ask torch for: one that verification varies, and one that it does not.
VERIFIED, UNVERIFIED = frozenset({"is_grad_enabled"}), frozenset({"is_inference_mode_enabled"})
# Calls of one module in more forms than these run its loop.
MOST_FORMS = 8


@dataclass
class Recorded:
    """One way into the model: what to call, and what was seen when it was called."""

    entry: Entry
    root: nn.Module
    observations: list[Observation]
    regions: list[Region] = field(default_factory=list)


@dataclass(frozen=True)
class Chosen:
    """How a region is rewritten, and from what."""

    region: Region
    way: Recorded
    choice: Choice
    prefer: str
    packs: Packs  # before anything is packed
    key: str = ""  # of the plan in the cache


@dataclass
class _Graph:
    """A rewritten graph, of a method in the modes of an observation; ``serves``: the range of sizes, where several do."""

    way: Recorded
    observation: Observation
    lifted: Lifted
    graph: torch.fx.Graph
    method: str
    serves: Serves | None = None


@dataclass
class _Built:
    """A region while its programs come together: those of the first way in were planned, others follow its packs and lowerings."""

    plan: RegionPlan
    packs: Packs
    chosen: Chosen
    graphs: list[_Graph] = field(default_factory=list)


def refuse(report: Report, refusal: Refusal, entry: Entry) -> None:
    """Note a refusal, with the method that it speaks of."""
    if entry.is_method:
        refusal = replace(refusal, region=f"{entry.name}, {refusal.region}" if refusal.region else entry.name)
    report.refused.append(refusal)


def made_relative(lifted: Lifted, entry: Entry, path: str) -> Refusal | None:
    """Names in the body of a method are those of what it was called through: make them names in its module, or say why not."""
    if not entry.is_method or lifted.frame.path:
        return None
    prefix = f"{INSIDE}.{path}." if path else f"{INSIDE}."
    for node in lifted.graph.nodes:
        if node.op in ("get_attr", "call_module") and node.target not in lifted.constants:
            if not str(node.target).startswith(prefix):
                name = str(node.target).removeprefix(f"{INSIDE}.")
                return Refusal(f"reads {name}, which belongs to a module outside", node.meta.get("place"))
            node.target = str(node.target).removeprefix(prefix)
    return None


class Builder:
    """Builds the regions of ``model``; ``work`` is the copy of it that was recorded."""

    def __init__(self, model: nn.Module, work: nn.Module, options: Options, report: Report) -> None:
        self.model, self.work, self.options, self.report = model, work, options, report
        self.progress, self.patience = Progress(options.progress), Patience()
        self.chosen: dict[str, Chosen] = {}  # by region path
        self.followers: dict[str, list[tuple[Region, Recorded]]] = {}  # further ways in to the same region
        self.owning: set[str] = set()  # paths of regions whose results are copies
        self.ordered: dict[int, dict[int, Any]] = {}  # by frame: inputs that are held to their order, as the guard has them
        self.examples: dict[str, list[Case]] = {}  # by method: calls of sizes for which there are plans of their own

    @cached_property
    def places(self) -> Places:
        """Where the recorded copy holds the objects that it passes on."""
        return Places(self.work)

    def plans(self, recorded: Sequence[Recorded]) -> list[RegionPlan]:
        """The plans of all regions of all ways in."""
        built: dict[str, _Built] = {}
        for way in recorded:
            for region in way.regions:
                self._build(region, way, built)
        if (untimed := self.patience.fact()) is not None:
            self.report.facts.append(untimed)
        return [plan for each in built.values() if self._asks_nothing(plan := self._finished(each))]

    def _asks_nothing(self, plan: RegionPlan) -> bool:
        """Refuse regions whose code asks torch what may be answered otherwise at another call, and shows in no op."""
        asked = plan.spelled.names & (UNVERIFIED if self.options.validate else UNVERIFIED | VERIFIED)
        for name in sorted(asked):
            self.report.refused.append(Refusal(f"asks torch.{name}(), which a program does not ask again", plan.place, plan.path))
        return not asked

    def single_layers(self, finder: RegionFinder, way: Recorded) -> list[RegionPlan]:
        """Linear and pointwise convolution layers that are faster spelled as each other; equal layers are measured once."""
        plans: list[RegionPlan] = []
        faster: dict[Any, bool] = {}
        for region in finder.single_layers():
            shapes = tuple(node.meta.get("shape") for node in region.prepared.lifted.graph.nodes)
            kind = (type(region.frame.module), repr(region.frame.module), shapes)
            if faster.get(kind, True):
                known = len(self.report.refused)
                built: dict[str, _Built] = {}
                self._build(region, way, built)
                del self.report.refused[known:]  # a layer that stays as it is was no loop: nobody waits to hear of it
                faster[kind] = bool(built)
                plans.extend(self._finished(each) for each in built.values())
        return plans

    def without(self, path: str, skipped: frozenset[LaneSet]) -> RegionPlan | None:
        """The region at ``path`` built again, with these lane sets left as they are."""
        known = self.chosen[path]
        choice, prepared = known.choice, known.region.prepared.without(skipped)
        made = vectorize(prepared.cut(choice.chunks), known.packs, choice.lowering, known.prefer)
        if made is None:
            return None
        region = Region(known.region.frame, prepared)
        built = self._started(replace(known, region=region, choice=replace(choice, vectorized=made)))
        self._other_programs(region, known.way, built)
        for other, way in self.followers.get(path, ()):
            self._join(other, way, built)
        return self._finished(built)

    def owning_results(self, path: str) -> RegionPlan | None:
        """The region at ``path`` built again, its results copies of what it computes with."""
        self.owning.add(path)
        return self.without(path, frozenset())

    def _build(self, region: Region, way: Recorded, built: dict[str, _Built]) -> None:
        """Plan the region, or, where another way in has planned it, give it the programs of this one over the same packs."""
        path, _ = way.entry.place(region.frame.path)
        if not self._made_relative(region.prepared.lifted, way, path):
            return
        if path in built:
            self.followers.setdefault(path, []).append((region, way))
            self._join(region, way, built[path])
            return
        made = self._plan(region, way)
        if made is not None:
            built[path] = made
            self._other_programs(region, way, made)

    def _join(self, region: Region, way: Recorded, built: _Built) -> None:
        """The programs of a further way in to a region that is planned already."""
        vectorized = self._follow(region.prepared, way, built)
        if vectorized is not None:
            _add(built, way, way.observations[0], region.prepared, vectorized, way.entry.place(region.frame.path)[1])
            self._other_programs(region, way, built)

    def _made_relative(self, lifted: Lifted, way: Recorded, path: str) -> bool:
        refusal = made_relative(lifted, way.entry, path)
        if refusal is not None:
            refuse(self.report, refusal, way.entry)
        return refusal is None

    def _plan(self, region: Region, way: Recorded) -> _Built | None:
        frame, prepared = region.frame, region.prepared
        path, _ = way.entry.place(frame.path)
        module = way.entry.region(self.work, frame.path)
        blocked, kinds = unpackable(self.model, path)
        blocked = {**blocked, **_returned(way, frame.path)}
        stay = self.options.packing == "alias"
        packs = Packs(unpackable=blocked, kinds=kinds, holder=_holder(module), members_stay=stay, in_own_order=stay)
        _set_training(way.root, way.observations[0].flags)
        given = self._cases(frame, prepared, way)
        planner = PlannerBySize(prepared, module, packs, self.options, [case for _, case in given], self.progress, self.patience)
        with hooks_silent(self.work):
            choice = planner.plan()
        for refusal in [*prepared.refusals, *planner.left, *([choice.refusal] if choice.refusal is not None else [])]:
            refuse(self.report, refusal, way.entry)
        if choice.refusal is not None or choice.vectorized is None:
            return None
        if prepared.lifted.specialised:
            place = f" ({prepared.lifted.place})" if prepared.lifted.place else ""
            where = path or "the model"
            self.report.facts.append(f"{where} is fused for the recorded sizes only: {prepared.lifted.specialised}{place}")
        for each in choice.sizes:  # every plan is compared with the original
            self.examples.setdefault(way.entry.name, []).append(given[each.cases[0]][0])
        prepared = prepared.with_widths(choice.together)
        region = Region(frame, prepared.without(choice.skipped) if choice.skipped else prepared)
        self.chosen[path] = Chosen(region, way, choice, planner.prefer, packs, planner.key or "")
        return self._started(self.chosen[path])

    def _started(self, chosen: Chosen) -> _Built:
        """The plan with its first program."""
        choice, frame, lifted = chosen.choice, chosen.region.frame, chosen.region.prepared.lifted
        assert choice.vectorized is not None
        ops = choice.vectorized.ops
        plan = RegionPlan(chosen.way.entry.place(frame.path)[0], [], {}, {}, ops, list(choice.vectorized.notes))
        plan.place = ops[0].place if ops else frame.place
        prepared = chosen.region.prepared
        plan.making = Making(
            choice.lowering, chosen.prefer, choice.chunks, prepared.skipped, prepared.single, self.options.validate, prepared.together,
            plan.path in self.owning,
        )  # fmt: skip
        if choice.launches is not None:
            loop, fused = choice.launches
            plan.launches, plan.heavy = (loop.total, fused.total), (loop.heavy, fused.heavy)
        plan.seconds, plan.peak_bytes, plan.tried = choice.seconds, choice.peak, choice.tried
        plan.cached, plan.key, plan.by_size = choice.cached, chosen.key, by_size.in_words(choice)
        plan.sure = choice.sure
        if lifted.random:
            plan.notes.append("dropout and other random ops draw other numbers than the loop did, from the same distribution")
        built = _Built(plan, choice.vectorized.packs, chosen)
        _add(built, chosen.way, chosen.way.observations[0], prepared, choice.vectorized, chosen.way.entry.place(frame.path)[1])
        return built

    def _follow(self, prepared: Prepared, way: Recorded, built: _Built, alone: bool = False) -> Vectorized | None:
        """A further program of a region that is planned already. ``alone``: also where it has no lanes (in eval mode, without dropout,
        too little may be left of them): it reads the packed weights, and spares the way through the original forward."""
        chosen, before = built.chosen, len(prepared.refusals)
        skipped = chosen.region.prepared.skipped
        prepared = prepared.with_widths(chosen.choice.together)
        if alone and not prepared.worthwhile:
            prepared = prepared.whatever_it_saves()
        if skipped:
            prepared = prepared.without(skipped)
        made = vectorize(prepared.cut(chosen.choice.chunks), built.packs, chosen.choice.lowering, chosen.prefer, alone)
        if way.entry.is_method:
            for refusal in prepared.refusals[before:]:
                refuse(self.report, refusal, way.entry)
        return made

    def _other_programs(self, region: Region, way: Recorded, built: _Built) -> None:
        """The region in other modes, and in calls of another form in the same run."""
        first, method = way.observations[0], way.entry.place(region.frame.path)[1]
        for observation in way.observations:
            if observation.same_as is first:
                continue
            forms = {_form(frame, observation.trace): frame for frame in reversed(observation.trace.frames) if _is_call(frame, region)}
            if observation is first:
                forms.pop(_form(region.frame, first.trace), None)
            if not forms:
                continue
            finder = RegionFinder(observation, self.options.min_lanes, self.options.objective == "launches")
            for frame in list(reversed(forms.values()))[:MOST_FORMS]:
                prepared = finder.prepared(frame)
                if isinstance(prepared, Refusal):
                    mode = "train" if any(observation.flags) else "eval"
                    refuse(self.report, Refusal(f"in {mode} mode: {prepared.reason}", prepared.place, built.plan.path), way.entry)
                    continue
                prepared.single = region.prepared.single
                if self._made_relative(prepared.lifted, way, built.plan.path):
                    made = self._follow(prepared, way, built, alone=True)
                    if made is not None:
                        _add(built, way, observation, prepared, made, method)

    def _finished(self, built: _Built) -> RegionPlan:
        """The plan with its programs: all read each weight from the pack, whichever of them has packed it."""
        plan, packs = built.plan, built.packs
        owner = self.work.get_submodule(plan.path)
        for each in built.graphs:
            way, observation, method = each.way, each.observation, each.method
            resolve_packed(each.graph, packs)
            if plan.path in self.owning:
                own_results(each.graph)
            program = self.places.named(self._held_to_order(make_program(observation.trace, each.lifted, each.graph), each))
            if each.serves is not None:
                program, needed = each.serves.only(program)
                if not needed:
                    continue
            for same in [observation, *(o for o in way.observations if o.same_as is observation)]:
                flags = dict(zip(all_modules(way.root), same.flags, strict=True))
                key = tuple(flags[m] for m in all_modules(owner))
                if method == FORWARD and key not in plan.programs:
                    plan.programs[key] = program
                    continue
                modes = plan.methods.setdefault(method, {}) if method != FORWARD else plan.methods.get(method, {})
                known = [*([plan.programs[key]] if method == FORWARD else []), *modes.get(key, ())]
                if not any(_alike(program, other) for other in known):
                    plan.methods.setdefault(method, modes)[key] = (*modes.get(key, ()), program)
        self._look_around(built)
        used = {str(n.target) for p in plan.all_programs() for n in p.graph.nodes if n.op == "get_attr"}
        plan.recipes = [r for r in packs.recipes.values() if r.name in used]
        plan.constants = {name: tensor for name, tensor in packs.constants.items() if name in used}
        return plan

    def _held_to_order(self, program: Program, made: _Graph) -> Program:
        """``held_to_order``, asked once for each call that was recorded."""
        frame = made.lifted.frame
        if id(frame) not in self.ordered:
            held = held_to_order(program, made.lifted, made.way.root, made.observation.flags)
            self.ordered[id(frame)] = {i: leaf for i, leaf in enumerate(held.guard.leaves) if leaf is not program.guard.leaves[i]}
        leaves = tuple(self.ordered[id(frame)].get(i, leaf) for i, leaf in enumerate(program.guard.leaves))
        return held_to_own_order(replace(program, guard=replace(program.guard, leaves=leaves)), made.lifted)

    def _look_around(self, built: _Built) -> None:
        """What the code that ran in the region could read, besides its arguments and tensors."""
        ran: Ran = {}
        region = self.work.get_submodule(built.plan.path)
        closed = closed_modules(built.plan.all_programs(), region)
        for each in built.graphs:
            ran.update(ran_in(each.observation.trace, each.lifted.frame, closed))
        spelled = Spelled.of(ran)
        spelled.computed = spelled.computed or not all(each.observation.trace.ran_known for each in built.graphs)
        built.plan.spelled = spelled
        built.plan.outside = Outside(outside([module for module in all_modules(region) if module not in closed], ran, spelled))

    def _cases(self, frame: Frame, prepared: Prepared, way: Recorded) -> list[tuple[Case, Case]]:
        """Inputs of the model at the sizes of ``tune_for``, and those of the region: its call is caught while the model runs on them."""
        found: list[tuple[Case, Case]] = []
        region = way.root.get_submodule(frame.path)
        args, kwargs = way.entry.args, way.entry.kwargs
        for wanted in self.options.tune_for:
            given = resample(args, kwargs, batch=wanted, seed=3) if isinstance(wanted, int) else (wanted, kwargs)
            caught: list[Case] = []
            handle = region.register_forward_pre_hook(lambda _, a, k, caught=caught: caught.append((a, k)), with_kwargs=True)
            try:
                with torch.no_grad(), preserved_state(self.work):
                    way.root(*given[0], **given[1])
            except Exception as error:
                said = str(error).splitlines()[0] if str(error) else type(error).__name__
                what = f"batch size {wanted}" if isinstance(wanted, int) else "these inputs"
                raise ArgumentError(f"tune_for: the model does not take {what}: {said}") from error
            finally:
                handle.remove()
            if caught and fits(caught[0], frame, prepared.lifted):
                found.append((given, caught[0]))
            else:
                where = frame.path or "the model"
                self.report.notes.append(f"tune_for: {where} is not called with the recorded sizes there; timed as recorded")
        return found


def _add(built: _Built, way: Recorded, observation: Observation, prepared: Prepared, made: Vectorized, method: str) -> None:
    """One more program of a region, or one for each range of sizes."""
    built.packs = made.packs
    built.plan.sets |= prepared.lifted.sets
    choice, prefer = built.chosen.choice, built.chosen.prefer
    if not choice.sizes:
        built.graphs.append(_Graph(way, observation, prepared.lifted, made.graph, method))
    for serves, each in by_size.programs(choice, prepared, made, prefer):
        built.packs = built.packs if each is made else each.packs
        built.graphs.append(_Graph(way, observation, prepared.lifted, each.graph, method, serves))
    if method != FORWARD:
        built.plan.method_ops.setdefault(method, made.ops)


def _returned(way: Recorded, path: str) -> dict[str, str]:
    """The tensors of the region at ``path`` that it, or the model, returns: whoever calls gets that very Parameter, a leaf with a ``grad``.

    By name in the region, with the reason that keeps them out of packs.
    """
    found: dict[str, str] = {}
    for trace in (observation.trace for observation in way.observations):
        names = {value.storage: value.name.removeprefix(f"{INSIDE}.") for value in trace.values if value.origin == "attribute"}
        for frame in trace.frames:
            if frame.index == 0 or frame.path == path:
                out = (trace.values[leaf.value].storage for leaf in frame.out if isinstance(leaf, Ref))
                found.update((names[storage], frame.path or "forward") for storage in out if storage in names)
    prefix = f"{path.removeprefix(INSIDE).removeprefix('.')}."
    return {name.removeprefix(prefix): f"{by} returns it" for name, by in found.items()}


def _is_call(frame: Frame, region: Region) -> bool:
    """Is this a call of the region's module that may be recorded?"""
    return frame.path == region.frame.path and not frame.poison



def _form(frame: Frame, trace: Trace) -> Any:
    """What tells calls of one module apart that need programs of their own: structure, shapes, dtypes, constants."""
    leaves: list[Any] = []
    for leaf in frame.leaves:
        if isinstance(leaf, Ref):
            value = trace.values[leaf.value]
            leaves.append((value.shape, str(value.tensor.dtype)))
        else:
            leaves.append((type(leaf).__name__, repr(leaf)))
    return repr(frame.in_spec), tuple(leaves)



def _alike(one: Program, other: Program) -> bool:
    """Do two programs answer the same calls?"""
    try:
        return bool(one.in_spec == other.in_spec and one.guard == other.guard)
    except Exception:  # constants whose equality is no bool
        return False



def _holder(module: nn.Module) -> str:
    """A name for the child that holds the packed weights."""
    name, number = "packed", 1
    while hasattr(module, name):
        number += 1
        name = f"packed_{number}"
    return name



def _set_training(model: nn.Module, flags: Any) -> None:
    for module, flag in zip(all_modules(model), flags, strict=True):
        module.__dict__["training"] = flag
