"""The pipeline, nothing else: record, find regions, bundle, plan, rewrite and pack, validate, report.

Comes in: a model and example inputs. Goes out: a model of the same class that computes the same, with its loops fused, and a
``Report`` on it. What does not fuse is a refusal in the report, never an exception: whatever goes wrong inside, a working model comes back.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.fx
from torch import nn
from torch.utils._pytree import tree_map_only

from . import fused as fused_modules
from .collector import paused
from .copies import independent_copy, sharing_copy
from .determinism import preserved_state
from .difference import Validation
from .entries import FORWARD, INSIDE, Entry, make_entries
from .errors import ArgumentError, FxfuseError
from .graph import Program, Refusal, RegionPlan
from .inputs import resample
from .launches import count
from .lengths import tracked_len
from .observe import Observation, observe_modes
from .options import Options, make_inputs, make_options
from .passes.emit import Packs
from .passes.lift import Lifted
from .passes.program import fits, make_program, resolve_packed
from .passes.vectorize import Prepared, Vectorized, vectorize
from .plan import Planner
from .regions import Region, RegionFinder
from .report import Report
from .store import get_report, set_report
from .timing import medians
from .trace import Frame, Ref, Trace
from .tracer import hooks_silent
from .validate import other_examples
from .validate import validate as compare
from .weights import carry_over, unpackable
from .workbench import Case

# Calls of one module in more forms than these run its loop.
MOST_FORMS = 8


def optimize(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    example_kwargs: dict[str, Any] | None = None,
    methods: Any = None,
    mode: Literal["train", "infer"] = "train",
    objective: Literal["time", "launches"] = "time",
    lowering: Literal["auto", "grouped_conv", "bmm"] = "auto",
    tune: bool = True,
    tune_for: Any = None,
    max_memory: int | None = None,
    validate: bool = True,
    strict: bool = False,
    min_lanes: int = 2,
    inplace: bool = False,
) -> nn.Module:
    """A model that computes the same as ``model``, its loops over small networks fused.

    Args:
        model: any module. It is not modified, unless ``inplace``.
        example_inputs: a tensor or a tuple of positional arguments, as the model is called; any shapes, dtypes, device. Without inputs
            the model fuses at its first call, on that call's inputs, and shares ``model``'s Parameters (an optimizer built before stays
            valid): slower in training than packed Parameters, see the README.
        example_kwargs: keyword arguments of the call. Alone, they count as inputs.
        methods: other methods that hold loops, by name (``"training_step"``, ``"critic.q1_forward"``): a list, called with the example
            inputs, or a dict of each one's own example (a tensor, a tuple, or ``(args, kwargs)``), with which ``example_inputs`` may
            be left out. They share the packed weights with forward.
        mode: what is timed: "train" forward and backward, "infer" the forward. The result is right in both.
        objective: "time" fuses what measures faster; "launches" fuses everything that is legal, whatever it costs.
        lowering: "auto" chooses by measurement; "grouped_conv" and "bmm" force that form where it exists.
        tune: measure candidates; False takes the rules' first choice.
        tune_for: a batch size, or example inputs, to time at instead of ``example_inputs``; a list of them must all gain.
        max_memory: bytes that a fused region may allocate at its peak; a region that needs more stays a loop.
        validate: prove outputs, input gradients and every parameter gradient equal, in float64, on data and batch sizes not seen before.
        strict: a call that does not fit what was recorded raises ``FallbackError``; otherwise it runs the original forward.
        min_lanes: the fewest lanes worth fusing.
        inplace: rewrite ``model`` itself.

    Returns an instance of ``model``'s class. Raises ``ArgumentError`` for wrong arguments; a model that cannot be recorded, or has no loop,
    comes back working, with the reason in ``fxfuse.report``.

    Method: the SLP vectorizer's (isomorphic scalar ops packed, chosen by cost) with batching rules as in ``vmap``; see the README.

    >>> class Nets(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.nets = nn.ModuleList(nn.Linear(1, 4) for _ in range(8))
    ...     def forward(self, x):
    ...         return torch.cat([net(x[:, i:i + 1]) for i, net in enumerate(self.nets)], 1)
    >>> fast = optimize(Nets(), torch.randn(5, 8), objective="launches")
    >>> [op.op for op in get_report(fast).fused[0].ops]
    ['linear']
    """
    options = make_options(
        model, mode=mode, objective=objective, lowering=lowering, tune=tune, tune_for=tune_for, max_memory=max_memory, validate=validate,
        strict=strict, min_lanes=min_lanes, inplace=inplace, packing="packed",
    )  # fmt: skip
    inputs = make_inputs(example_inputs, example_kwargs)
    entries = make_entries(model, inputs, methods)
    if not entries:
        from .lazy import fuse_at_first_call

        return fuse_at_first_call(model, options, inplace)
    holders = _optimizers_of(model)
    result = run_entries(model, entries, options, inplace)
    if holders and get_report(result).fused:
        warnings.warn(
            f"{' and '.join(holders)} holds Parameters of the model that was given to fxfuse.optimize: it would not train the fused model. "
            "Build the optimizer from fused.parameters(), or call fxfuse.optimize(model) without inputs, which keeps the Parameters.",
            UserWarning,
            stacklevel=2,
        )
    return result


def explain(model: nn.Module, example_inputs: Any = None, **keywords: Any) -> Report:
    """What ``optimize`` would do with the same arguments: its report. Nothing is changed.

    >>> explain(nn.Linear(2, 2), torch.randn(3, 2), tune=False).fused
    []
    """
    keywords.pop("inplace", None)
    if example_inputs is None and keywords.get("example_kwargs") is None and not isinstance(keywords.get("methods"), dict):
        from .errors import ArgumentError

        raise ArgumentError("explain needs example_inputs (a tensor or a tuple) or example_kwargs; none came")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return get_report(optimize(model, example_inputs, **keywords))


def run(model: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]], options: Options, inplace: bool) -> nn.Module:
    """The pipeline on the forward of a model, its arguments checked. Always returns a working model."""
    return run_entries(model, [Entry(FORWARD, *inputs)], options, inplace)


def run_entries(model: nn.Module, entries: list[Entry], options: Options, inplace: bool) -> nn.Module:
    """The pipeline on checked arguments. Always returns a working model."""
    report = Report(type(model).__name__)
    pipeline = _Pipeline(model, entries, options, report)
    try:
        # What the model warns of, it warns of when it is called; here it runs dozens of times, and in ways that are not the user's.
        with warnings.catch_warnings(), torch.inference_mode(False):
            warnings.simplefilter("ignore")
            return pipeline.run(inplace)
    except ArgumentError:
        raise
    except Exception as error:  # a failure inside fxfuse must not cost anybody their model
        report.fused = []
        said = str(error).splitlines()[0] if str(error) else ""
        report.refused.append(Refusal(f"fxfuse failed ({type(error).__name__}: {said}); please report it"))
        report.notes.append(_traceback(error))
        result = model if inplace else pipeline.spare()
        set_report(result, report)
        return result


@dataclass
class _Recorded:
    """One way into the model: what to call, and what was seen when it was called."""

    entry: Entry
    root: nn.Module
    observations: list[Observation]
    regions: list[Region] = field(default_factory=list)


@dataclass
class _Built:
    """A region while its programs come together: those of the first way in were planned, others follow its packs and lowerings."""

    plan: RegionPlan
    packs: Packs
    lowering: dict[Any, str]
    prefer: str
    graphs: list[tuple[_Recorded, Observation, Lifted, torch.fx.Graph, str]] = field(default_factory=list)


class _Pipeline:
    def __init__(self, model: nn.Module, entries: list[Entry], options: Options, report: Report) -> None:
        self.model, self.options, self.report = model, options, report
        # A tensor made in inference mode cannot take part in a backward; an ordinary copy of it can.
        with torch.inference_mode(False):
            self.entries = [
                Entry(e.name, *tree_map_only(torch.Tensor, lambda t: t.clone() if t.is_inference() else t, (e.args, e.kwargs)))
                for e in entries
            ]
        self.work = model

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            # The passes make a million objects and no garbage; what runs the model itself collects as usual.
            with paused() if name in ("record", "find lanes", "rewrite and pack", "measure") else nullcontext():
                yield
        finally:
            self.report.stages[name] = self.report.stages.get(name, 0.0) + time.perf_counter() - start

    def spare(self) -> nn.Module:
        """An independent copy of the model, or the model itself where it cannot be copied."""
        try:
            copied = independent_copy(self.model)
            carry_over(self.model, copied)
            return copied
        except Exception as error:
            self.report.notes.append(f"the model cannot be copied ({error}): it is returned itself")
            return self.model

    def run(self, inplace: bool) -> nn.Module:
        with self.stage("record"):
            try:
                self.work = sharing_copy(self.model)
            except Exception as error:
                return self._unchanged(inplace, Refusal(f"the model cannot be copied: {str(error).splitlines()[0]}"))
            with tracked_len(self.work):
                recorded = [self._record(entry) for entry in self.entries]
        for failed in [way for way in recorded if way.observations[0].failure]:
            what = failed.entry.name if failed.entry.is_method else "the forward"
            self._refuse(Refusal(f"{what} raises {failed.observations[0].failure}"), failed.entry)
            recorded.remove(failed)
        if not recorded:
            return self._unchanged(inplace)
        self.entries = [way.entry for way in recorded]
        with self.stage("find lanes"):
            finders = [self._find(way) for way in recorded]
            self._widen(recorded, finders)
        plans: list[RegionPlan] = []
        if self.options.objective == "time" and self.options.tune and self.options.lowering == "auto" and len(recorded) == 1:
            with self.stage("plan"):
                plans.extend(self._single_layers(finders[0], recorded[0]))
        with preserved_state(self.work):
            built: dict[str, _Built] = {}
            for way in recorded:
                for region in way.regions:
                    with self.stage("plan"):
                        self._build(region, way, built)
            plans.extend(self._finished(each) for each in built.values())
        result = self.model if inplace else self.spare()
        if not plans:
            if not self.report.refused:
                self.report.refused.append(Refusal("no loop over equal networks was found"))
            set_report(result, self.report)
            return result
        if result is self.model and not inplace:
            return self._unchanged(True, Refusal("the model cannot be copied"))
        before = self.model
        if inplace and self.options.validate:
            before = self.spare()  # what to compare with, once the model itself is rewritten
        with self.stage("rewrite and pack"):
            if inplace and self.options.validate:
                trial = self.spare()
                plans = self._validated(before, trial, self._install(trial, plans))
            plans = self._install(result, plans)
        if plans and self.options.validate and not inplace:
            kept = self._validated(self.model, result, plans)
            if len(kept) != len(plans):
                result = self.spare()
                plans = self._install(result, kept)
        self.report.fused = plans
        if plans:
            with self.stage("measure"):
                try:
                    self._measure(result)
                except Exception as error:  # the model is rewritten and verified: figures are all that is missing
                    self.report.notes.append(f"launches and times could not be measured: {type(error).__name__}: {error}")
            for state in fused_modules.regions(result).values():
                state.fallbacks.clear()
                state.strict = self.options.strict  # from here on: verification itself tries sizes that fall back
        set_report(result, self.report)
        return result

    def _unchanged(self, inplace: bool, refusal: Refusal | None = None) -> nn.Module:
        if refusal is not None:
            self.report.refused.append(refusal)
        result = self.model if inplace else self.spare()
        set_report(result, self.report)
        return result

    def _refuse(self, refusal: Refusal, entry: Entry) -> None:
        """Note a refusal, with the method that it speaks of."""
        if entry.is_method:
            refusal = replace(refusal, region=f"{entry.name}, {refusal.region}" if refusal.region else entry.name)
        self.report.refused.append(refusal)

    def _record(self, entry: Entry) -> _Recorded:
        """The model recorded in train mode, in eval mode, and as it is where that is neither; the mode that is timed first."""
        modes = (True, False) if self.options.mode == "train" else (False, True)
        root = entry.root(self.work)
        found = observe_modes(root, entry.args, entry.kwargs, modes)
        working = [o for o in found if not o.failure]
        return _Recorded(entry, root, working or found)

    def _find(self, way: _Recorded) -> RegionFinder:
        finder = RegionFinder(way.observations[0], self.options.min_lanes, self.options.objective == "launches")
        finder.visit()
        way.regions = finder.regions
        for refusal in finder.refusals:
            self._refuse(refusal, way.entry)
        return finder

    def _widen(self, recorded: list[_Recorded], finders: list[RegionFinder]) -> None:
        """Where one way in has its region inside another's, both take the outer module: a module belongs to one region."""
        paths = {way.entry.place(region.frame.path)[0] for way in recorded for region in way.regions}
        for way, finder in zip(recorded, finders, strict=True):
            kept: dict[int, Region] = {}
            for region in way.regions:
                path = way.entry.place(region.frame.path)[0]
                outer = min((other for other in paths if _inside(path, other)), key=len, default=path)
                wider = region if outer == path else self._frame_in(way, finder, outer)
                if wider is not None:
                    kept[wider.frame.index] = wider
                else:
                    reason = f"its loop is in {path or 'the model'}, which is part of {outer or 'the model'}, fused for another method"
                    self._refuse(Refusal(reason, region.frame.place), way.entry)
            way.regions = list(kept.values())

    def _frame_in(self, way: _Recorded, finder: RegionFinder, path: str) -> Region | None:
        """The call of the module at ``path`` as a region; None where there is none, or it cannot be one."""
        for frame in way.observations[0].trace.frames:
            if way.entry.place(frame.path)[0] == path:
                prepared = None if frame.poison else finder.prepared(frame)
                return Region(frame, prepared) if isinstance(prepared, Prepared) and prepared.worthwhile else None
        return None

    # -- one region ---------------------------------------------------------------------------------------------------------------

    def _build(self, region: Region, way: _Recorded, built: dict[str, _Built]) -> None:
        """Plan the region, or, where another way in has planned it, give it the programs of this one over the same packs."""
        path, method = way.entry.place(region.frame.path)
        if not self._made_relative(region.prepared.lifted, way, path):
            return
        known = built.get(path)
        if known is None:
            made = self._plan(region, way)
            if made is None:
                return
            known = built[path] = made
        else:
            vectorized = self._follow(region.prepared, way, known)
            if vectorized is None:
                return
            self._add(known, way, way.observations[0], region.prepared.lifted, vectorized, method)
        self._other_programs(region, way, known, method)

    def _made_relative(self, lifted: Lifted, way: _Recorded, path: str) -> bool:
        """Names in the body of a method are those of what it was called through: make them names in its module."""
        if not way.entry.is_method or lifted.frame.path:
            return True
        prefix = f"{INSIDE}.{path}." if path else f"{INSIDE}."
        for node in lifted.graph.nodes:
            if node.op in ("get_attr", "call_module") and node.target not in lifted.constants:
                if not str(node.target).startswith(prefix):
                    name = str(node.target).removeprefix(f"{INSIDE}.")
                    self._refuse(Refusal(f"reads {name}, which belongs to a module outside", node.meta.get("place")), way.entry)
                    return False
                node.target = str(node.target).removeprefix(prefix)
        return True

    def _plan(self, region: Region, way: _Recorded) -> _Built | None:
        frame, prepared = region.frame, region.prepared
        path, method = way.entry.place(frame.path)
        module = way.entry.region(self.work, frame.path)
        blocked, kinds = unpackable(self.model, path)
        packs = Packs(unpackable=blocked, kinds=kinds, holder=_holder(module))
        _set_training(way.root, way.observations[0].flags)
        planner = Planner(prepared, module, packs, self.options, self._cases(frame, prepared, way))
        with hooks_silent(self.work):
            choice = planner.plan()
        for refusal in [*prepared.refusals, *([choice.refusal] if choice.refusal is not None else [])]:
            self._refuse(refusal, way.entry)
        if choice.refusal is not None or choice.vectorized is None:
            return None
        if self.options.tune:
            with hooks_silent(self.work):
                planner.measure_memory(choice)
        plan = RegionPlan(path, [], {}, {}, choice.vectorized.ops)
        plan.place = choice.vectorized.ops[0].place if choice.vectorized.ops else frame.place
        if choice.launches is not None:
            loop, fused = choice.launches
            plan.launches, plan.heavy = (loop.total, fused.total), (loop.heavy, fused.heavy)
        plan.seconds, plan.peak_bytes, plan.tried = choice.seconds, choice.peak, choice.tried
        if prepared.lifted.random:
            plan.notes.append("dropout and other random ops draw other numbers than the loop did, from the same distribution")
        if prepared.lifted.specialised:
            place = f" ({prepared.lifted.place})" if prepared.lifted.place else ""
            where = path or "the model"
            self.report.facts.append(f"{where} is fused for the recorded sizes only: {prepared.lifted.specialised}{place}")
        built = _Built(plan, choice.vectorized.packs, choice.lowering, planner.prefer)
        self._add(built, way, way.observations[0], prepared.lifted, choice.vectorized, method)
        return built

    def _follow(self, prepared: Prepared, way: _Recorded, built: _Built) -> Vectorized | None:
        """A further program of a region that is planned already."""
        before = len(prepared.refusals)
        made = vectorize(prepared, built.packs, built.lowering, built.prefer)
        if way.entry.is_method:
            for refusal in prepared.refusals[before:]:
                self._refuse(refusal, way.entry)
        return made

    def _add(self, built: _Built, way: _Recorded, observation: Observation, lifted: Lifted, made: Vectorized, method: str) -> None:
        built.packs = made.packs
        for name, tensor in lifted.constants.items():
            given, number = name, len(built.packs.constants)
            while built.packs.constants.get(given, tensor) is not tensor:
                given, number = f"{name.rpartition('_')[0]}_{number}", number + 1
            built.packs.constants[given] = tensor
            if given != name:
                for node in made.graph.nodes:
                    if node.op == "get_attr" and node.target == name:
                        node.target = given
        built.graphs.append((way, observation, lifted, made.graph, method))
        if method != FORWARD:
            built.plan.method_ops.setdefault(method, made.ops)

    def _other_programs(self, region: Region, way: _Recorded, built: _Built, method: str) -> None:
        """The region in other modes, and in calls of another form in the same run."""
        first = way.observations[0]
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
                    self._refuse(Refusal(f"in {mode} mode: {prepared.reason}", prepared.place, built.plan.path), way.entry)
                    continue
                prepared.single = region.prepared.single
                if prepared.worthwhile and self._made_relative(prepared.lifted, way, built.plan.path):
                    made = self._follow(prepared, way, built)
                    if made is not None:
                        self._add(built, way, observation, prepared.lifted, made, method)

    def _finished(self, built: _Built) -> RegionPlan:
        """The plan with its programs: all read each weight from the pack, whichever of them has packed it."""
        plan, packs = built.plan, built.packs
        owner = self.work.get_submodule(plan.path)
        for way, observation, lifted, graph, method in built.graphs:
            resolve_packed(graph, packs)
            program = make_program(observation.trace, lifted, graph)
            for same in [observation, *(o for o in way.observations if o.same_as is observation)]:
                flags = dict(zip(way.root.modules(), same.flags, strict=True))
                key = tuple(flags[m] for m in owner.modules())
                if method == FORWARD and key not in plan.programs:
                    plan.programs[key] = program
                    continue
                modes = plan.methods.setdefault(method, {}) if method != FORWARD else plan.methods.get(method, {})
                known = [*([plan.programs[key]] if method == FORWARD else []), *modes.get(key, ())]
                if not any(_alike(program, other) for other in known):
                    plan.methods.setdefault(method, modes)[key] = (*modes.get(key, ()), program)
        used = {str(n.target) for p in plan.all_programs() for n in p.graph.nodes if n.op == "get_attr"}
        plan.recipes = [r for r in packs.recipes.values() if r.name in used]
        plan.constants = {name: tensor for name, tensor in packs.constants.items() if name in used}
        return plan

    def _cases(self, frame: Frame, prepared: Prepared, way: _Recorded) -> list[Case]:
        """The inputs of the region at the sizes of ``tune_for``: its call is caught while the model runs on them."""
        found: list[Case] = []
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
                found.append(caught[0])
            else:
                where = frame.path or "the model"
                self.report.notes.append(f"tune_for: {where} is not called with the recorded sizes there; timed as recorded")
        return found

    def _single_layers(self, finder: RegionFinder, way: _Recorded) -> list[RegionPlan]:
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

    # -- the whole model ----------------------------------------------------------------------------------------------------------

    def _install(self, model: nn.Module, plans: list[RegionPlan]) -> list[RegionPlan]:
        """Rewrite ``model`` by the plans that fit it, and return those; what cannot be installed becomes a refusal."""
        kept = list(plans)
        while kept:
            try:
                fused_modules.install(model, kept, packing=self.options.packing)
                return kept
            except FxfuseError as error:
                culprit = next((plan for plan in kept if fused_modules.misfit(model, plan, self.options.packing)), kept[-1])
                self.report.refused.append(Refusal(str(error), culprit.place, culprit.path))
                kept.remove(culprit)
        return kept

    def _installed(self, plans: list[RegionPlan]) -> nn.Module:
        return fused_modules.install(self.spare(), plans, packing=self.options.packing)

    def _validated(self, original: nn.Module, result: nn.Module, plans: list[RegionPlan]) -> list[RegionPlan]:
        """The plans that pass; a region that does not is undone alone."""
        with self.stage("validate"):
            outcome = self._compared(original, result)
            if outcome.ok:
                return plans
            if len(plans) == 1:
                self.report.refused.append(Refusal(f"undone: the rewritten form differs: {outcome.reason}", plans[0].place, plans[0].path))
                return []
            kept: list[RegionPlan] = []
            for plan in plans:
                alone = self._compared(original, self._installed([plan]))
                if alone.ok:
                    kept.append(plan)
                else:
                    self.report.refused.append(Refusal(f"undone: the rewritten form differs: {alone.reason}", plan.place, plan.path))
            if kept and not self._compared(original, self._installed(kept)).ok:
                return []
            return kept

    def _compared(self, original: nn.Module, result: nn.Module) -> Validation:
        """Every way into the model, compared with the original: the worst outcome, or that of the first."""
        outcomes: list[Validation] = []
        for entry in self.entries:
            example = (entry.args, entry.kwargs)
            outcomes.append(compare(entry.root(original), entry.root(result), [example, *other_examples(example)[:3]], must_run=1))
            if entry.is_method:
                self.report.methods[entry.name] = outcomes[-1]
        self.report.validation = next((outcome for outcome in outcomes if not outcome.ok), outcomes[0])
        return self.report.validation

    def _measure(self, result: nn.Module) -> None:
        """Launches of one forward, before and after, in the mode asked for; times of the whole model where tuning is on."""
        training, entry = self.options.mode == "train", self.entries[0]
        with preserved_state(self.work, result), hooks_silent(self.work), hooks_silent(result), torch.set_grad_enabled(training):
            alone = self.report.fused[0] if len(self.report.fused) == 1 else None
            for module in (self.work, result):
                module.train(training)
            if training and alone is not None and not alone.path and alone.launches is not None:
                self.report.launches, self.report.heavy = alone.launches, alone.heavy  # the planner has counted already
            else:
                forwards = [lambda m=root: m(*entry.args, **entry.kwargs) for root in (entry.root(self.work), entry.root(result))]
                counts = [count(forward, bound=False) for forward in forwards]
                self.report.launches = (counts[0].total, counts[1].total)
                self.report.heavy = (counts[0].heavy, counts[1].heavy)
                if alone is not None:
                    alone.launches, alone.heavy = self.report.launches, self.report.heavy
            if self.options.tune and self.options.objective == "time":
                calls = [lambda m=root: m(*entry.args, **entry.kwargs) for root in (entry.root(self.work), entry.root(result))]
                before, after = medians(calls, budget=0.3)
                self.report.timings["forward"] = (before, after)


def _inside(path: str, other: str) -> bool:
    """Is the module at ``path`` inside the one at ``other``?"""
    return path != other and (not other or path.startswith(f"{other}."))


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
    for module, flag in zip(model.modules(), flags, strict=True):
        module.__dict__["training"] = flag


def _optimizers_of(model: nn.Module) -> list[str]:
    """Class names of live optimizers that hold a Parameter of ``model``."""
    mine = {id(parameter) for parameter in model.parameters()}
    names: list[str] = []
    kinds: set[type] = set()
    pending: list[type] = [torch.optim.Optimizer]
    while pending:
        kinds.add(kind := pending.pop())
        pending.extend(kind.__subclasses__())
    for candidate in gc.get_objects():
        if type(candidate) in kinds:
            groups = getattr(candidate, "param_groups", [])
            if any(id(p) in mine for group in groups for p in group.get("params", [])):
                names.append(type(candidate).__name__)
    return names


def _traceback(error: BaseException) -> str:
    import traceback

    lines = traceback.format_exception(error)
    return "for a bug report: " + " ".join("".join(lines[-3:]).split())


