"""The pipeline, nothing else: record, find regions, bundle, plan, rewrite and pack, validate, report.

Comes in: a model and example inputs, checked. Goes out: a model of the same class that computes the same, with its loops fused, and a
``Report`` on it. What does not fuse is a refusal in the report, never an exception: whatever goes wrong inside, a working model comes back.
"""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.fx
from torch import nn
from torch.nn.parameter import is_lazy

from fxfuse.private.module_hooks import hooks_for_all
from fxfuse.private.pytree import tree_map_only
from fxfuse.private.saved_hooks import unseen_by_hooks

from . import fused as fused_modules
from .building.build import Builder, Recorded, refuse
from .building.regions import Region, RegionFinder
from .checking.difference import Validation
from .checking.validate import other_examples
from .checking.validate import validate as compare
from .errors import ArgumentError, FxfuseError, HeldElsewhereError
from .failure import failed, spare
from .figures import measure
from .graph import Refusal, RegionPlan
from .models.collector import collecting, paused
from .models.contents import Contents
from .models.copies import independent_copy, sharing_copy
from .models.depth import deeper
from .models.determinism import preserved_state
from .models.exclusive import alone
from .models.first_call import drop_first_calls
from .models.inputs import resample
from .models.quiet import quiet
from .models.undo import Undo
from .options import Options
from .passes.vectorize import LaneSet, Prepared
from .planning import plan_cache
from .planning.plan import LEAST_GAIN
from .planning.staying import least_gain, times_faster, unsure
from .planning.timing import medians
from .recording.attributes import attributes_kept
from .recording.casts import without_autocast
from .recording.lengths import tracked_len
from .recording.observe import ModeError, observe_modes, reads_offsets
from .report import Report
from .running import install as installer
from .running.entries import FORWARD, Entry
from .running.region import STATE
from .store import get_report, set_report
from .weights import large
from .weights.large import Moved, sample, twin, weight_bytes, without_history

_WRAPPERS = frozenset({"DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "FSDPModule"})
LONG = 20_000  # torch calls of one forward
META = (
    "it has tensors on the meta device, where nothing can be computed or compared: "
    "give it weights first (load_state_dict with assign=True, or to_empty), then fuse it"
)
SHAPELESS = "it has tensors without a shape yet (nn.LazyLinear and its like): call it once, then fuse it"
RAISES = "the forward raises"


def run(model: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]], options: Options, inplace: bool) -> nn.Module:
    """The pipeline on the forward of a model, its arguments checked. Always returns a working model."""
    return run_entries(model, [Entry(FORWARD, *inputs)], options, inplace)


def run_entries(model: nn.Module, entries: list[Entry], options: Options, inplace: bool) -> nn.Module:
    """The pipeline on checked arguments. Always returns a working model."""
    with alone():
        try:
            return _whole(model, entries, options, inplace) or _run(model, entries, options, inplace)
        except (ArgumentError, MemoryError):
            raise
        except Exception as error:
            return failed(model, error, Report(type(model).__name__), inplace)


def _whole(model: nn.Module, entries: list[Entry], options: Options, inplace: bool) -> nn.Module | None:
    """A model that is fused, or has fused parts, fused as a whole: it is taken apart first. None where nothing is, or nothing gains."""
    parts = {path: part.__dict__[STATE].packing for path, part in fused_modules.fused_parts(model).items()}
    if not parts:
        return None
    if inplace:
        return _whole_in_place(model, [*parts], entries, options) if {*parts.values()} == {"alias"} else None
    if options.packing != "packed":
        return None
    try:
        plain = fused_modules.unfuse(model)
    except Exception:  # a part that cannot be copied stays as it is, with the reason in the report
        return None
    result = _run(plain, entries, options, False)
    report = get_report(result)
    if not report.fused:
        return None
    report.notes.append(f"{_were_fused(model, parts)} fused already: taken apart, and fused anew with the whole model")
    return result


def _whole_in_place(model: nn.Module, parts: list[str], entries: list[Entry], options: Options) -> nn.Module:
    """The same on the model itself, whose parts fused at first calls of their own: their Parameters are still the model's."""
    undo = Undo()
    said = _were_fused(model, parts)
    try:
        fused_modules.take_apart(model, undo)
        result = _run(model, entries, options, True)
    except BaseException:
        undo.restore()
        raise
    report = get_report(result)
    if report.fused:
        report.notes.append(f"{said} fused already: taken apart, and fused anew with the whole model")
        del undo
        gc.collect()  # the parts' packs, of which the weights are views still: they may move once nobody else holds that memory
    else:
        undo.restore()
        report.notes.append(f"{said} fused already, and stay{'s' if len(parts) == 1 else ''} so")
        set_report(result, report)
    return result


def _were_fused(model: nn.Module, parts: Iterable[str]) -> str:
    names = [path or f"the {type(model).__name__}" for path in parts]
    more = "" if len(names) <= 3 else f" and {len(names) - 3} others"
    return f"{', '.join(names[:3])}{more} {'was' if len(names) == 1 else 'were'}"


def _run(model: nn.Module, entries: list[Entry], options: Options, inplace: bool) -> nn.Module:
    report = Report(type(model).__name__)
    undo = Undo()
    given = Contents(part for entry in entries for part in (*entry.args, *entry.kwargs.values()))
    try:
        try:
            # What the model warns of, it warns of when it is called; here it runs dozens of times, and in ways that are not the user's.
            # Recorded without autocast, whoever calls: a region makes programs for calls under it when the first of them comes.
            # Random numbers are drawn on the way (rules are tried, candidates timed): the caller's come as if nothing had been drawn.
            # A first call may come from within ``checkpoint``, which counts what autograd keeps.
            with quiet(), deeper(model), torch.inference_mode(False), without_autocast(), unseen_by_hooks(), paused(), preserved_state():
                return _Pipeline(model, entries, options, report, undo).run(inplace)
        finally:
            given.restore()  # a cache among the example inputs is as it was
    except (ArgumentError, MemoryError):
        undo.restore()
        raise
    except Exception as error:
        undo.restore()
        return failed(model, error, report, inplace)
    except BaseException:
        undo.restore()
        raise


def _wraps(kind: type) -> bool:
    """Is this one of torch's wrappers for training on several devices?"""
    return any(base.__name__ in _WRAPPERS and base.__module__.startswith("torch.") for base in kind.__mro__)


class _Pipeline:
    def __init__(self, model: nn.Module, entries: list[Entry], options: Options, report: Report, undo: Undo) -> None:
        self.model, self.options, self.report = model, options, report
        self.undo = undo  # the way back, once the model itself is rewritten
        # A tensor made in inference mode cannot take part in a backward; an ordinary copy of it can.
        with torch.inference_mode(False):
            self.entries = [
                Entry(e.name, *tree_map_only(torch.Tensor, lambda t: t.clone() if t.is_inference() else t, (e.args, e.kwargs)))
                for e in entries
            ]
        self.work = model
        self.builder = Builder(model, model, options, report)
        self.compared: list[Validation] = []  # of the last comparison, one for each way in
        self.large = weight_bytes(model) > large.LARGE
        self.base = model  # what is rewritten
        self.moved: Moved | None = None  # the packs into which the weights of ``base`` have moved, where it is large
        self.compared_gradients = ""
        self.long = False  # compared on one example besides the given one, of another batch size and other data
        self.keep_integers = False  # fresh inputs are made with the example's own integers

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            # The passes make a million objects and no garbage; what runs the model itself collects as usual.
            passes = name in ("record", "find lanes", "rewrite and pack", "measure") or (name == "plan" and not self.options.tune)
            with nullcontext() if passes else collecting():
                yield
        finally:
            self.report.stages[name] = self.report.stages.get(name, 0.0) + time.perf_counter() - start

    def spare(self) -> nn.Module:
        """An independent copy of the model, or the model itself where it cannot be copied."""
        return spare(self.model, self.report)

    def run(self, inplace: bool) -> nn.Module:
        if hooks_for_all():
            return self._unchanged(inplace, Refusal("hooks for all modules are registered, which every call of a module runs"))
        wrapped = next(((path, type(m)) for path, m in self.model.named_modules() if _wraps(type(m))), None)
        if wrapped is not None:
            said = f"{wrapped[0] or 'the model'} is wrapped in {wrapped[1].__name__}, which holds the Parameters that it was given"
            return self._unchanged(True, Refusal(f"{said}: fuse first, then wrap"))
        if any(tensor.is_meta for tensor in (*self.model.parameters(), *self.model.buffers()) if not is_lazy(tensor)):
            return self._unchanged(inplace, Refusal(META))
        if any(map(is_lazy, (*self.model.parameters(), *self.model.buffers()))):
            return self._unchanged(inplace, Refusal(SHAPELESS))
        with self.stage("record"):
            try:
                self.work = sharing_copy(self.model)
                drop_first_calls(self.work)
            except Exception as error:
                return self._unchanged(inplace, Refusal(f"the model cannot be copied: {str(error).splitlines()[0]}"))
            try:
                with tracked_len(self.work):
                    recorded = [self._record(entry) for entry in self.entries]
            except ModeError as error:
                return self._unchanged(inplace, Refusal(f"{error}: a plan is compared in both modes"))
        for raising in [way for way in recorded if way.observations[0].failure]:
            what = f"{raising.entry.name} raises" if raising.entry.is_method else RAISES
            refuse(self.report, Refusal(f"{what} {raising.observations[0].failure}"), raising.entry)
            recorded.remove(raising)
        if not recorded:
            return self._unchanged(inplace)
        self.entries = [way.entry for way in recorded]
        self.long = any(len(way.observations[0].trace.events) > LONG for way in recorded)
        self.keep_integers = any(reads_offsets(way.observations[0].trace) for way in recorded)
        self.builder = Builder(self.model, self.work, self.options, self.report)
        with self.stage("find lanes"):
            finders = [self._find(way) for way in recorded]
            self._widen(recorded, finders)
        plans: list[RegionPlan] = []
        if self.large:  # measured once its weights have moved, not before: a candidate would hold them all again
            self.builder.options = replace(self.options, tune=False, large=True)
        elif self.options.objective == "time" and self.options.tune and self.options.lowering == "auto" and len(recorded) == 1:
            with self.builder.progress, self.stage("plan"):
                plans.extend(self.builder.single_layers(finders[0], recorded[0]))
        with self.builder.progress, preserved_state(self.work), self.stage("plan"):
            plans.extend(self.builder.plans(recorded))
        result = self.model if inplace else self.spare()
        self.base = result
        if not plans:
            if not self.report.refused:
                self.report.refused.append(Refusal("no loop over equal networks was found"))
            set_report(result, self.report)
            return result
        if result is self.model and not inplace:
            return self._unchanged(True, Refusal("the model cannot be copied"))
        with self.stage("rewrite and pack"):
            if self.large:
                for way in recorded:
                    for observation in way.observations:
                        without_history(observation.trace)
                plans = self._moved(plans)
            elif inplace and (self.options.validate or self._is_timed_whole(plans)):
                trial = self.spare()
                if trial is self.model:
                    return self._unchanged(True)
                _, plans = self._that_pass(trial, self._install(trial, plans))
            plans = self._install(result, plans)
        if plans and not inplace and not self.large:
            result, plans = self._that_pass(result, plans)
        self.report.fused = plans
        if plans:
            with self.stage("measure"):
                measure(*self._to_time(result, plans), self.entries, self.options, self.report)
            for state in fused_modules.regions(result).values():
                state.fallbacks.clear()
                state.strict = self.options.strict  # from here on: verification itself tries sizes that fall back
                state.prepare()  # for the mode that the model is in, once measured in another
        set_report(result, self.report)
        return result

    def _that_pass(self, fused: nn.Module, plans: list[RegionPlan]) -> tuple[nn.Module, list[RegionPlan]]:
        """``fused``, on which ``plans`` are installed, with those alone that compute the same, and gain."""
        if self.options.validate:
            fused, plans = self._anew(fused, plans, self._validated(self.model, fused, plans))
        return self._anew(fused, plans, self._where_it_gains(fused, plans))

    def _anew(self, fused: nn.Module, plans: list[RegionPlan], kept: list[RegionPlan]) -> tuple[nn.Module, list[RegionPlan]]:
        """``fused`` made anew where other plans are kept than are installed on it."""
        if [*map(id, kept)] == [*map(id, plans)]:
            return fused, plans
        fused = self.spare()
        return fused, self._install(fused, kept)

    def _unchanged(self, inplace: bool, refusal: Refusal | None = None) -> nn.Module:
        if refusal is not None:
            self.report.refused.append(refusal)
        result = self.model if inplace else self.spare()
        set_report(result, self.report)
        return result

    def _record(self, entry: Entry) -> Recorded:
        """The model recorded in train mode, in eval mode, and as it is where that is neither; the mode that is timed first."""
        modes = (True, False) if self.options.mode == "train" else (False, True)
        root = entry.root(self.work)
        found = observe_modes(root, entry.args, entry.kwargs, modes, attributes=len(self.entries) == 1 and not entry.is_method)
        working = [o for o in found if not o.failure]
        return Recorded(entry, root, working or found)

    def _find(self, way: Recorded) -> RegionFinder:
        finder = RegionFinder(way.observations[0], self.options.min_lanes, self.options.objective == "launches")
        finder.visit()
        way.regions = finder.regions
        for refusal in finder.refusals:
            refuse(self.report, refusal, way.entry)
        return finder

    def _widen(self, recorded: list[Recorded], finders: list[RegionFinder]) -> None:
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
                    refuse(self.report, Refusal(reason, region.frame.place), way.entry)
            way.regions = list(kept.values())

    def _frame_in(self, way: Recorded, finder: RegionFinder, path: str) -> Region | None:
        """The call of the module at ``path`` as a region; None where there is none, or it cannot be one."""
        for frame in way.observations[0].trace.frames:
            if way.entry.place(frame.path)[0] == path:
                prepared = None if frame.poison else finder.prepared(frame)
                return Region(frame, prepared) if isinstance(prepared, Prepared) and prepared.worthwhile else None
        return None

    # -- the whole model ----------------------------------------------------------------------------------------------------------

    def _install(self, model: nn.Module, plans: list[RegionPlan], dry: bool = False) -> list[RegionPlan]:
        """Rewrite ``model`` by the plans that fit it, and return those; what cannot be installed becomes a refusal. ``dry``: only look."""
        kept = list(plans)
        undo = self.undo if model is self.model else None
        if plans and not dry:
            drop_first_calls(model, undo)
        for plan in kept:
            unseen = None if plan.keeps_parameters else installer.held_unregistered(model, plan)
            if unseen is not None:
                plan.keeps_parameters = True
                plan.notes.append(f"the Parameters stay, as views of the pack: no module registers {unseen}, whoever trains it holds it")
        while kept:
            try:
                if dry:
                    installer.examine(model, kept, packing=self.options.packing)
                else:
                    installer.install(model, kept, packing=self.options.packing, undo=undo, moved=self.moved)
                return kept
            except FxfuseError as error:
                culprit = next((plan for plan in kept if installer.misfit(model, plan, self.options.packing)), kept[-1])
                held = installer.misfit(model, culprit, self.options.packing)
                if isinstance(held, HeldElsewhereError):
                    culprit.keeps_parameters = True
                    culprit.notes.append(f"the Parameters stay, as views of the pack: {held}")
                    continue
                self.report.refused.append(Refusal(str(error), culprit.place, culprit.path))
                kept.remove(culprit)
        return kept

    def _installed(self, plans: list[RegionPlan]) -> nn.Module:
        made = self.spare() if self.moved is None else twin(self.base)
        return installer.install(made, plans, packing=self.options.packing, moved=self.moved)

    def _staying(self, plans: list[RegionPlan]) -> list[RegionPlan]:
        return plans if self.options.packing == "alias" else [plan for plan in plans if plan.keeps_parameters]

    def _is_timed_whole(self, plans: list[RegionPlan]) -> bool:
        """Are there plans that are not sure to gain, or whose Parameters stay?"""
        return self.options.tune and self.options.objective == "time" and bool(self._staying(plans) or unsure(plans))

    def _where_it_gains(self, fused: nn.Module, plans: list[RegionPlan]) -> list[RegionPlan]:
        """The plans, without those that are not sure to gain, or whose Parameters stay, where the model is no faster for them."""
        if not self._is_timed_whole(plans):
            return plans
        staying = self._staying(plans)
        if staying:
            fused_modules.settle(fused)
        try:
            with self.stage("plan"), attributes_kept(fused, fused_modules.attributes_set(fused)):
                gain = times_faster(*self._to_time(fused, plans), self.entries[0], self.options.mode == "train")
        except MemoryError:
            raise
        except Exception as error:  # in a mode that it does not have; each region was timed by itself
            said = str(error).splitlines()[0] if str(error) else ""
            self.report.notes.append(f"the whole model could not be timed: {type(error).__name__}: {said}")
            return plans
        if gain >= least_gain(bool(staying)):
            return plans
        asked = staying or unsure(plans)
        for plan in asked:
            said = f"left as a loop: {gain:.2f}x {'with Parameters that stay, as views of the pack' if staying else 'in the whole model'}"
            self.report.refused.append(Refusal(said, plan.place, plan.path))
            if not staying and self.options.cache:
                plan_cache.refuse(plan.key, said)
        left = {*map(id, asked)}
        return [plan for plan in plans if id(plan) not in left]

    def _to_time(self, fused: nn.Module, plans: list[RegionPlan]) -> tuple[nn.Module, nn.Module]:
        """The original and the fused model, to be called hundreds of times. Where code of the user's runs around the regions, it may write
        Parameters, lists, and tensors that no module registers: copies of both."""
        if self.large or all(not plan.path for plan in plans):
            return self.work, fused
        return independent_copy(self.work), independent_copy(fused)

    # -- a model whose weights should not be there twice --------------------------------------------------------------------------

    def _moved(self, plans: list[RegionPlan]) -> list[RegionPlan]:
        """The plans that are right, and faster where that is asked for, once the weights of ``base`` lie in their packs."""
        self.moved = Moved()
        plans = self._install(twin(self.base), plans, dry=True)
        if not plans:
            return plans
        installer.move(self.base, plans, self.options.packing, self.moved)
        original = twin(self.base)
        if self.options.validate:
            plans = self._validated(original, self._installed(plans), plans)
            size = f"its weights take {weight_bytes(self.base) / 2**20:.0f} MiB"
            said = f"{size}: compared in their own dtype, without a float64 copy; gradients of {self.compared_gradients} weights compared"
            self.report.notes.append(said)
        if plans and self.options.tune and self.options.objective == "time":
            with self.stage("plan"), preserved_state(original), torch.no_grad():
                entry, fused = self.entries[0], self._installed(plans)
                for each in (original, fused):
                    each.train(self.options.mode == "train")
                calls = [lambda m=root: m(*entry.args, **entry.kwargs) for root in (entry.root(original), entry.root(fused))]
                before, after = medians(calls, budget=1.0)
            if after * LEAST_GAIN > before:
                how = "inference; weights as large as these are timed without gradients"
                said = f"left as a loop: packed runs {before / after:.2f}x ({how})"
                self.report.refused.append(Refusal(said, plans[0].place, plans[0].path))
                return []
        return plans

    def _validated(self, original: nn.Module, result: nn.Module, plans: list[RegionPlan]) -> list[RegionPlan]:
        """The plans that pass; a region that does not is undone alone, and of a region only the lane sets that differ."""
        with self.stage("validate"):
            outcome = self._compared(original, result)
            plans = self._answering(plans)
            if outcome.ok or not plans:
                return plans

            def alone(plan: RegionPlan) -> Validation:
                return self._compared(original, self._installed([plan]))

            kept: list[RegionPlan] = []
            for plan in plans:
                found = outcome if len(plans) == 1 else alone(plan)
                mended = plan if found.ok else self._mended(plan, found, alone)
                kept.extend([mended] if mended is not None else [])
            if kept and not self._compared(original, self._installed(kept)).ok:
                return []
            return kept

    def _answering(self, plans: list[RegionPlan]) -> list[RegionPlan]:
        """The plans that answered a call themselves while they were compared; a region that always runs its loop is none that fused."""
        kept: list[RegionPlan] = []
        for plan in plans:
            where = plan.path or type(self.model).__name__
            calls = sum(outcome.calls[path] for outcome, path in self._places(plan))
            missed = sum(outcome.missed[path] for outcome, path in self._places(plan))
            if not calls or missed < calls or any(name != FORWARD for name in plan.methods):
                kept.append(plan)
                continue
            fallbacks = sum((outcome.fallbacks for outcome in self.compared), Counter[str]())
            reasons = [reason for reason, _ in fallbacks.most_common() if reason.partition(": ")[0].endswith(where)]
            said = reasons[0].partition(": ")[2] if reasons else "no call fits what was recorded"
            self.report.refused.append(Refusal(f"{where} would run its loop at every call: {said}", plan.place, plan.path))
        return kept

    def _places(self, plan: RegionPlan) -> list[tuple[Validation, str]]:
        """Every way in, as compared last, with the region's path there."""
        found = zip(self.entries, self.compared, strict=True)
        return [(outcome, entry.frame_path(plan.path, FORWARD)) for entry, outcome in found]

    def _mended(self, plan: RegionPlan, outcome: Validation, check: Callable[[RegionPlan], Validation]) -> RegionPlan | None:
        """The plan without the lane sets that make it differ, tried one by one; None where nothing is left. Where results differ in that
        backward keeps them, and in nothing else, the plan with copies of its results."""
        if outcome.only_kept:
            owning = self.builder.owning_results(plan.path)
            if owning is not None and (outcome := check(owning)).ok:
                owning.notes.append("its results are copies: backward keeps what it computes with, and a caller may write into them before")
                return owning
        sets = self.builder.chosen[plan.path].region.prepared.lane_sets()
        wrong: dict[LaneSet, str] = {}
        for lanes in sets if len(sets) > 1 else ():
            one = self.builder.without(plan.path, frozenset(sets) - {lanes})
            found = check(one) if one is not None else None
            if found is not None and not found.ok:
                wrong[lanes] = found.reason
        rest = self.builder.without(plan.path, frozenset(wrong)) if 0 < len(wrong) < len(sets) else None
        if rest is None or not check(rest).ok:
            self.report.refused.append(Refusal(f"undone: the rewritten form differs: {outcome.reason}", plan.place, plan.path))
            return None
        for lanes, said in wrong.items():
            self.report.refused.append(Refusal(f"undone: the rewritten form differs: {said}", sets[lanes], plan.path))
        rest.seconds = rest.peak_bytes = rest.launches = rest.heavy = None  # what was measured was another program
        return rest

    def _compared(self, original: nn.Module, result: nn.Module) -> Validation:
        """Every way into the model, compared with the original: the worst outcome, or that of the first."""
        outcomes: list[Validation] = []
        for entry in self.entries:
            example = (entry.args, entry.kwargs)
            others = other_examples(example)[2:3] if self.long else other_examples(example)[:3]
            if self.keep_integers:
                others = [resample(*example, seed=seed, keep_integers=True) for seed in (1, 2)]
            others = [*others, *self.builder.examples.get(entry.name, ())]
            if self.moved is not None:
                original = twin(self.base)
                compared = sample(original, result)
                self.compared_gradients = f"{compared[0]} of {compared[1]}"
            copies = self.moved is None
            outcomes.append(
                compare(entry.root(original), entry.root(result), [example, *others], must_run=1, float64=copies, copies=copies)
            )
            if entry.is_method:
                self.report.methods[entry.name] = outcomes[-1]
        self.compared = outcomes
        self.report.validation = next((outcome for outcome in outcomes if not outcome.ok), outcomes[0])
        return self.report.validation


def _inside(path: str, other: str) -> bool:
    """Is the module at ``path`` inside the one at ``other``?"""
    return path != other and (not other or path.startswith(f"{other}."))
