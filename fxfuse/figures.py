"""What a fused model saves: launches of one forward before and after, and the time of both.

Comes in: the model as it was, and fused and verified. Goes out: figures in its report; all that is missing where one cannot be had.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from . import fused as fused_modules
from .launches import count
from .models.determinism import preserved_state
from .models.silent_hooks import hooks_silent
from .options import Options
from .planning import plan_cache
from .planning.fingerprint import combined, sizes_of
from .planning.timing import medians
from .recording.attributes import attributes_kept
from .report import Report
from .running.entries import Entry


def measure(work: nn.Module, result: nn.Module, entries: list[Entry], options: Options, report: Report) -> None:
    """Launches in the mode asked for; times of the whole model where tuning is on. Both models stay as they are."""
    training = options.mode == "train"
    kept = preserved_state(work, result), attributes_kept(result, fused_modules.attributes_set(result))
    with kept[0], kept[1], hooks_silent(work), hooks_silent(result), torch.set_grad_enabled(training):
        try:
            for module in (work, result):
                module.train(training)
            _Figures(work, result, entries, options, report).take()
        except Exception as error:  # but not one of putting the state back
            report.notes.append(f"launches and times could not be measured: {type(error).__name__}: {error}")


@dataclass
class _Figures:
    work: nn.Module
    result: nn.Module
    entries: list[Entry]
    options: Options
    report: Report

    def take(self) -> None:
        report, entry = self.report, self.entries[0]
        alone = report.fused[0] if len(report.fused) == 1 else None
        forwards = [lambda m=root: m(*entry.args, **entry.kwargs) for root in (entry.root(self.work), entry.root(self.result))]
        if self.options.mode == "train" and alone is not None and not alone.path and alone.launches is not None:
            report.launches, report.heavy = alone.launches, alone.heavy  # the planner has counted already
        else:
            counts = [count(forward, bound=False) for forward in forwards]
            report.launches = (counts[0].total, counts[1].total)
            report.heavy = (counts[0].heavy, counts[1].heavy)
            if alone is not None:
                alone.launches, alone.heavy = report.launches, report.heavy
        if self.options.tune and self.options.objective == "time":
            known = self._known()
            if known is None:
                known = medians(forwards, budget=0.3)
                self._keep(known)
            report.timings["forward"] = (known[0], known[1])

    def _known(self) -> list[float] | None:
        """The times of an equal model that was fused by the same plans, all of which came from the cache."""
        if not self.options.cache or not all(plan.cached for plan in self.report.fused):
            return None
        try:
            before, after = (plan_cache.load(self._key()) or {})["forward"]
            return [float(before), float(after)]
        except (KeyError, TypeError, ValueError):
            return None

    def _keep(self, times: list[float]) -> None:
        if self.options.cache and all(plan.key for plan in self.report.fused):
            plan_cache.store(self._key(), {"forward": times})

    def _key(self) -> str:
        modules = [f"{type(module).__module__}.{type(module).__qualname__}" for module in self.work.modules()]
        weights = [str(tuple(parameter.shape)) for parameter in self.work.parameters()]
        inputs = [repr(sizes_of((entry.name, entry.args, entry.kwargs))) for entry in self.entries]
        return combined(["model", *(f"{plan.path} {plan.key}" for plan in self.report.fused), *modules, *weights, *inputs])
