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
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from . import fused as fused_modules
from .collector import paused
from .copies import independent_copy, sharing_copy
from .determinism import preserved_state
from .errors import ArgumentError, FxfuseError, HeldElsewhereError
from .graph import Program, Refusal, RegionPlan
from .inputs import resample
from .launches import count
from .lengths import tracked_len
from .observe import Observation, observe_modes
from .options import Options, make_inputs, make_options
from .passes.emit import Packs
from .passes.program import fits, make_program, resolve_packed
from .passes.vectorize import Prepared, vectorize
from .plan import Planner
from .regions import Region, RegionFinder
from .report import Report
from .store import get_report, set_report
from .timing import medians
from .trace import Frame
from .tracer import hooks_silent
from .validate import other_examples
from .validate import validate as compare
from .weights import carry_over, unpackable
from .workbench import Case


def optimize(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    example_kwargs: dict[str, Any] | None = None,
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
    if inputs is None:
        from .lazy import fuse_at_first_call

        return fuse_at_first_call(model, options, inplace)
    holders = _optimizers_of(model)
    result = run(model, inputs, options, inplace)
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
    if example_inputs is None and keywords.get("example_kwargs") is None:
        from .errors import ArgumentError

        raise ArgumentError("explain needs example_inputs (a tensor or a tuple) or example_kwargs; none came")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return get_report(optimize(model, example_inputs, **keywords))


def run(model: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]], options: Options, inplace: bool) -> nn.Module:
    """The pipeline on checked arguments. Always returns a working model."""
    report = Report(type(model).__name__)
    pipeline = _Pipeline(model, inputs, options, report)
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


class _Pipeline:
    def __init__(self, model: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]], options: Options, report: Report) -> None:
        self.model, self.options, self.report = model, options, report
        # A tensor made in inference mode cannot take part in a backward; an ordinary copy of it can.
        with torch.inference_mode(False):
            self.args, self.kwargs = tree_map_only(torch.Tensor, lambda t: t.clone() if t.is_inference() else t, inputs)
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
                observations = self._observe()
        first = observations[0]
        if first.failure:
            return self._unchanged(inplace, Refusal(f"the forward raises {first.failure}"))
        with self.stage("find lanes"):
            finder = RegionFinder(first, self.options.min_lanes, self.options.objective == "launches")
            finder.visit()
        self.report.refused.extend(finder.refusals)
        plans: list[RegionPlan] = []
        if self.options.objective == "time" and self.options.tune and self.options.lowering == "auto":
            with self.stage("plan"):
                plans.extend(self._single_layers(finder, observations))
        with preserved_state(self.work):
            for region in finder.regions:
                with self.stage("plan"):
                    plan = self._plan(region, observations)
                if plan is not None:
                    plans.append(plan)
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

    def _unchanged(self, inplace: bool, refusal: Refusal) -> nn.Module:
        self.report.refused.append(refusal)
        result = self.model if inplace else self.spare()
        set_report(result, self.report)
        return result

    def _observe(self) -> list[Observation]:
        """The model recorded in train mode, in eval mode, and as it is where that is neither; the mode that is timed first."""
        modes = (True, False) if self.options.mode == "train" else (False, True)
        found = observe_modes(self.work, self.args, self.kwargs, modes)
        working = [o for o in found if not o.failure]
        return working or found

    # -- one region ---------------------------------------------------------------------------------------------------------------

    def _plan(self, region: Region, observations: list[Observation]) -> RegionPlan | None:
        frame, prepared = region.frame, region.prepared
        module = self.work.get_submodule(frame.path)
        blocked, kinds = unpackable(self.model, frame.path)
        packs = Packs(unpackable=blocked, kinds=kinds, holder=_holder(module))
        modules = list(self.work.modules())
        _set_training(self.work, observations[0].flags)
        planner = Planner(prepared, module, packs, self.options, self._cases(frame, prepared))
        with hooks_silent(self.work):
            choice = planner.plan()
        self.report.refused.extend(prepared.refusals)
        if choice.refusal is not None or choice.vectorized is None:
            if choice.refusal is not None:
                self.report.refused.append(choice.refusal)
            return None
        if self.options.tune:
            with hooks_silent(self.work):
                planner.measure_memory(choice)
        programs: dict[tuple[bool, ...], Program] = {}
        packs = choice.vectorized.packs
        notes: list[str] = []
        graphs = [(observations[0], prepared.lifted, choice.vectorized.graph)]
        alike = [o for o in observations[1:] if o.same_as is observations[0]]
        for observation in observations[1:]:
            if observation.same_as is observations[0]:
                continue
            other = self._other_mode(observation, region)
            if other is None:
                continue
            made = vectorize(other, packs, choice.lowering, planner.prefer)
            if made is None:
                continue
            packs = made.packs
            graphs.append((observation, other.lifted, made.graph))
        for observation, lifted, graph in graphs:
            resolve_packed(graph, packs)
            flags = dict(zip(modules, observation.flags, strict=True))
            programs[tuple(flags[m] for m in module.modules())] = make_program(observation.trace, lifted, graph)
            packs.constants.update(lifted.constants)
            for same in alike if observation is observations[0] else ():
                others = dict(zip(modules, same.flags, strict=True))
                programs[tuple(others[m] for m in module.modules())] = programs[tuple(flags[m] for m in module.modules())]
        used = {str(n.target) for p in programs.values() for n in p.graph.nodes if n.op == "get_attr"}
        constants = {name: tensor for name, tensor in packs.constants.items() if name in used}
        plan = RegionPlan(frame.path, [r for r in packs.recipes.values() if r.name in used], programs, constants, choice.vectorized.ops)
        plan.place = choice.vectorized.ops[0].place if choice.vectorized.ops else frame.place
        if choice.launches is not None:
            loop, fused = choice.launches
            plan.launches, plan.heavy = (loop.total, fused.total), (loop.heavy, fused.heavy)
        plan.seconds, plan.peak_bytes, plan.tried = choice.seconds, choice.peak, choice.tried
        if prepared.lifted.random:
            notes.append("dropout and other random ops draw other numbers than the loop did, from the same distribution")
        if prepared.lifted.specialised:
            place = f" ({prepared.lifted.place})" if prepared.lifted.place else ""
            where = frame.path or "the model"
            self.report.facts.append(f"{where} is fused for the recorded sizes only: {prepared.lifted.specialised}{place}")
        plan.notes = notes
        return plan

    def _cases(self, frame: Frame, prepared: Prepared) -> list[Case]:
        """The inputs of the region at the sizes of ``tune_for``: its call is caught while the model runs on them."""
        found: list[Case] = []
        region = self.work.get_submodule(frame.path)
        for wanted in self.options.tune_for:
            given = resample(self.args, self.kwargs, batch=wanted, seed=3) if isinstance(wanted, int) else (wanted, self.kwargs)
            caught: list[Case] = []
            handle = region.register_forward_pre_hook(lambda _, a, k, caught=caught: caught.append((a, k)), with_kwargs=True)
            try:
                with torch.no_grad(), preserved_state(self.work):
                    self.work(*given[0], **given[1])
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

    def _single_layers(self, finder: RegionFinder, observations: list[Observation]) -> list[RegionPlan]:
        """Linear and pointwise convolution layers that are faster spelled as each other; equal layers are measured once."""
        plans: list[RegionPlan] = []
        faster: dict[Any, bool] = {}
        for region in finder.single_layers():
            shapes = tuple(node.meta.get("shape") for node in region.prepared.lifted.graph.nodes)
            kind = (type(region.frame.module), repr(region.frame.module), shapes)
            if faster.get(kind, True):
                known = len(self.report.refused)
                plan = self._plan(region, observations)
                del self.report.refused[known:]  # a layer that stays as it is was no loop: nobody waits to hear of it
                faster[kind] = plan is not None
                if plan is not None:
                    plans.append(plan)
        return plans

    def _other_mode(self, observation: Observation, region: Region) -> Prepared | None:
        """The region's graph in another mode of the model."""
        finder = RegionFinder(observation, self.options.min_lanes, self.options.objective == "launches")
        frame = next((f for f in observation.trace.frames if f.path == region.frame.path), None)
        if frame is None or frame.poison:
            return None
        prepared = finder.prepared(frame)
        if isinstance(prepared, Refusal):
            mode = "train" if any(observation.flags) else "eval"
            self.report.refused.append(Refusal(f"in {mode} mode: {prepared.reason}", prepared.place, frame.path))
            return None
        prepared.single = region.prepared.single
        return prepared if prepared.worthwhile else None

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
                held = fused_modules.misfit(model, culprit, self.options.packing)
                if isinstance(held, HeldElsewhereError):
                    culprit.keeps_parameters = True
                    culprit.notes.append(f"the Parameters stay, as views of the pack: {held}")
                    continue
                self.report.refused.append(Refusal(str(error), culprit.place, culprit.path))
                kept.remove(culprit)
        return kept

    def _installed(self, plans: list[RegionPlan]) -> nn.Module:
        return fused_modules.install(self.spare(), plans, packing=self.options.packing)

    def _validated(self, original: nn.Module, result: nn.Module, plans: list[RegionPlan]) -> list[RegionPlan]:
        """The plans that pass; a region that does not is undone alone."""
        with self.stage("validate"):
            example = (self.args, self.kwargs)
            examples = [example, *other_examples(example)[:3]]
            outcome = compare(original, result, examples, must_run=1)
            self.report.validation = outcome
            if outcome.ok:
                return plans
            if len(plans) == 1:
                self.report.refused.append(Refusal(f"undone: the rewritten form differs: {outcome.reason}", plans[0].place, plans[0].path))
                return []
            kept: list[RegionPlan] = []
            for plan in plans:
                alone = compare(original, self._installed([plan]), examples, must_run=1)
                if alone.ok:
                    kept.append(plan)
                else:
                    self.report.refused.append(Refusal(f"undone: the rewritten form differs: {alone.reason}", plan.place, plan.path))
            if kept:
                together = compare(original, self._installed(kept), examples, must_run=1)
                self.report.validation = together
                if not together.ok:
                    return []
            return kept

    def _measure(self, result: nn.Module) -> None:
        """Launches of one forward, before and after, in the mode asked for; times of the whole model where tuning is on."""
        training = self.options.mode == "train"
        with preserved_state(self.work, result), hooks_silent(self.work), hooks_silent(result), torch.set_grad_enabled(training):
            alone = self.report.fused[0] if len(self.report.fused) == 1 else None
            for module in (self.work, result):
                module.train(training)
            if training and alone is not None and not alone.path and alone.launches is not None:
                self.report.launches, self.report.heavy = alone.launches, alone.heavy  # the planner has counted already
            else:
                forwards = [lambda m=module: m(*self.args, **self.kwargs) for module in (self.work, result)]
                counts = [count(forward, bound=False) for forward in forwards]
                self.report.launches = (counts[0].total, counts[1].total)
                self.report.heavy = (counts[0].heavy, counts[1].heavy)
                if alone is not None:
                    alone.launches, alone.heavy = self.report.launches, self.report.heavy
            if self.options.tune and self.options.objective == "time":
                calls = [lambda m=module: m(*self.args, **self.kwargs) for module in (self.work, result)]
                before, after = medians(calls, budget=0.3)
                self.report.timings["forward"] = (before, after)


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


