"""Choose how to compute each lane set, and whether to, by measuring.

Comes in: a region with its prepared graph, and the options. Goes out: the rewritten program with the lowering of every bundle chosen, or a
``Refusal`` where the loop is faster. Candidates are timed against the region's own forward, in turn and by medians, on the recorded
inputs or those of ``tune_for``; ``objective="launches"`` fuses all that is legal, ``tune=False`` takes the first lowering that the
rules name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .determinism import preserved_state
from .graph import Refusal
from .launches import Launches, count
from .memory import peak_bytes
from .options import Options
from .passes.emit import Packs
from .passes.vectorize import Prepared, Vectorized, vectorize
from .timing import medians
from .workbench import Case, Workbench

# A form must be this much faster than the loop to be worth the change: below, it is noise.
LEAST_GAIN = 1.02
# A candidate replaces the best one so far only where it is clearly faster.
CLEARLY = 0.97
# A layer of its own that becomes a region pays for the guard at every call.
GUARD_SECONDS = 6e-6


@dataclass
class Choice:
    """The outcome for one region. ``seconds`` are medians (loop, fused), ``peak`` bytes (loop, fused); None where not measured."""

    vectorized: Vectorized | None
    lowering: dict[Any, str]
    refusal: Refusal | None = None
    seconds: tuple[float, float] | None = None
    peak: tuple[int, int] | None = None
    launches: tuple[Launches, Launches] | None = None  # (loop, fused), of one forward
    tried: list[tuple[str, float]] = field(default_factory=list)


class Planner:
    """Plans one region: ``prepared`` is its graph in the mode that is timed, ``cases`` are inputs to time it on (default: as recorded)."""

    def __init__(self, prepared: Prepared, region: nn.Module, packs: Packs, options: Options, cases: Sequence[Case] = ()) -> None:
        self.prepared, self.region, self.packs, self.options = prepared, region, packs, options
        frame = prepared.lifted.frame
        self.train = options.mode == "train"
        cases = list(cases) or [frame.raw or ((), {})]
        self.benches = [Workbench(region, case, self.train, frame.parent >= 0) for case in cases]
        self.prefer = _preferred(options)

    def plan(self) -> Choice:
        """Search, measure, decide."""
        base = self.emit({})
        if base is None:
            return Choice(None, {}, self._refusal("nothing is left to fuse"))
        if self.options.objective == "launches":
            choice = self._fewest_launches(base)
        elif not self.options.tune:
            choice = Choice(base, self._first(base))
        else:
            choice = self._fastest(base)
        if self.options.max_memory is not None and choice.refusal is None:
            choice.refusal = self._over_memory(choice)
        return choice

    def emit(self, lowering: dict[Any, str]) -> Vectorized | None:
        """The program with these lowerings."""
        return vectorize(self.prepared, self.packs, lowering, self.prefer)

    def _first(self, base: Vectorized) -> dict[Any, str]:
        return {key: self.prefer if self.prefer in options else options[0] for key, options in base.choices.items()}

    def _refusal(self, reason: str) -> Refusal:
        return Refusal(reason, self.prepared.lifted.place, self.prepared.lifted.frame.path)

    def _others(self, base: Vectorized, lowering: Callable[[], dict[Any, str]]) -> Any:
        """One change at a time to the best lowering so far, which ``lowering()`` tells: coordinate descent."""
        if self.options.lowering != "auto":
            return
        for key, options in base.choices.items():
            for option in options:
                if option != lowering()[key]:
                    changed = {**lowering(), key: option}
                    candidate = self.emit(changed)
                    if candidate is not None:
                        yield changed, candidate

    # -- launches -----------------------------------------------------------------------------------------------------------------

    def _fewest_launches(self, base: Vectorized) -> Choice:
        """The lowerings that launch least, counted on one run each; refused only where the loop launches no more."""
        bench = self.benches[0]
        with preserved_state(self.region):
            loop, least = _launches(bench.forward()), _launches(bench.program(base))
            choice = Choice(base, self._first(base))
            if self.options.tune:
                for lowering, candidate in self._others(base, lambda: choice.lowering):
                    counted = _launches(bench.program(candidate))
                    if counted.total < least.total:
                        choice.vectorized, choice.lowering, least = candidate, lowering, counted
        choice.launches = (loop, least)
        if least.total >= loop.total and least.heavy >= loop.heavy:
            choice.refusal = self._refusal(f"left as a loop: packed launches {least.total} ops, the loop {loop.total}")
        return choice

    # -- time ---------------------------------------------------------------------------------------------------------------------

    def _fastest(self, base: Vectorized) -> Choice:
        """The lowerings that measure fastest; refused where the loop is as fast."""
        choice = Choice(base, self._first(base))
        if self.prepared.single and not base.choices:
            choice.refusal = self._refusal("a layer with one spelling")
            return choice
        steps = self._steps(base)
        for lowering, candidate in self._others(base, lambda: choice.lowering):
            other = self._steps(candidate)
            ratio, seconds = self._compare(steps, other)
            choice.tried.append((_describe(lowering), seconds))
            if ratio < CLEARLY:
                choice.vectorized, choice.lowering, steps = candidate, lowering, other
        return self._decide(choice, steps)

    def _steps(self, candidate: Vectorized) -> list[Callable[[], object]]:
        return [bench.step(candidate) for bench in self.benches]

    def _compare(self, steps: list[Callable[[], object]], others: list[Callable[[], object]]) -> tuple[float, float]:
        """(time of the others over that of ``steps``, as a geometric mean over the cases; seconds of the others in the first case)."""
        pairs = [medians([a, b], budget=0.25) for a, b in zip(steps, others, strict=True)]
        ratio = math.exp(sum(math.log(b / a) for a, b in pairs) / len(pairs))
        return ratio, pairs[0][1]

    def _decide(self, choice: Choice, steps: list[Callable[[], object]]) -> Choice:
        single = self.prepared.single
        for bench, step in zip(self.benches, steps, strict=True):
            loop, fused = medians([bench.loop(), step], budget=0.5)
            if single:
                fused += GUARD_SECONDS + 0.03 * loop
            choice.seconds = choice.seconds or (loop, fused)
            if fused * LEAST_GAIN > loop and choice.refusal is None:
                batch = f" at batch {bench.batch}" if bench.batch is not None else ""
                what = "forward and backward" if self.train else "inference"
                choice.refusal = self._refusal(f"left as a loop: packed runs {loop / fused:.2f}x{batch} on {bench.device} ({what})")
        assert choice.vectorized is not None
        if single and choice.lowering == self._first(choice.vectorized):
            choice.refusal = self._refusal("no other spelling of the layer is faster")
        return choice

    # -- memory -------------------------------------------------------------------------------------------------------------------

    def _over_memory(self, choice: Choice) -> Refusal | None:
        assert choice.vectorized is not None
        assert self.options.max_memory is not None
        used = max(peak_bytes(bench.step(choice.vectorized)) for bench in self.benches)
        if used <= self.options.max_memory:
            return None
        return self._refusal(f"left as a loop: packed needs {used} bytes at its peak, max_memory allows {self.options.max_memory}")

    def measure_memory(self, choice: Choice) -> None:
        """Peak bytes of the loop and of the chosen form, in the mode that was asked for."""
        if choice.vectorized is not None:
            with preserved_state(self.region):
                choice.peak = (peak_bytes(self.benches[0].loop()), peak_bytes(self.benches[0].step(choice.vectorized)))


def _preferred(options: Options) -> str:
    """The lowering asked for by name; for launches the product forms, one launch each."""
    if options.lowering == "grouped_conv":
        return "grouped_conv"
    return "baddbmm" if options.lowering == "bmm" or options.objective == "launches" else ""


def _launches(forward: Callable[[], Any]) -> Launches:
    return count(forward, bound=False)


def _describe(lowering: dict[Any, str]) -> str:
    """The lowerings as a person reads them: ``linear 32x32: baddbmm``."""
    words = []
    for key, name in lowering.items():
        name_of, shapes = (key[1], key[2]) if key[0] == "single" else (key[0], key[2])
        weight = "x".join(map(str, shapes[1] or ())) if len(shapes) > 1 else ""
        words.append(f"{name_of} {weight}: {name}" if weight else f"{name_of}: {name}")
    return ", ".join(dict.fromkeys(words)) or "as the rules name it"
