"""Choose how to compute each lane set, and whether to, by measuring.

Comes in: a region with its prepared graph, and the options. Goes out: the rewritten program with the lowering of every bundle chosen, or a
``Refusal`` where the loop is faster. Candidates are timed against the region's own forward, in turn and by medians, on the recorded
inputs or those of ``tune_for``; ``objective="launches"`` fuses all that is legal, ``tune=False`` takes what the static model (``cost``)
calls fastest, which also spares timing what is hopeless. Large lane sets are computed in chunks of lanes, as many as are fastest, or as
``max_memory`` asks for. What was timed is kept on disk (``plan_cache``) and read for an equal region on an equal machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fxfuse.graph import Refusal
from fxfuse.launches import Launches, count
from fxfuse.models.determinism import preserved_state
from fxfuse.options import Options
from fxfuse.passes.chunk import CHUNK_BYTES, fitting_chunks, widest
from fxfuse.passes.packs import Packs
from fxfuse.passes.vectorize import LaneSet, Prepared, Vectorized, vectorize
from fxfuse.private.pytree import tree_flatten

from . import plan_cache
from .choice import Choice, from_data, in_words, to_data
from .estimate import Estimator
from .fingerprint import fingerprint
from .patience import Patience
from .plan_memory import as_usual, within_limit
from .progress import Progress
from .timing import medians, quickest, ratio
from .workbench import Case, RaisesError, Workbench

# A form must be this much faster than the loop to be worth the change. Less is noise: where results of half a MiB and more lie in memory,
# and on what pages, changes the ratio of two forms by 5 % from one run to the next.
LEAST_GAIN = 1.05
# A gain below this has to show twice: in the medians, and in the quickest runs, which other processes disturb least. A machine that is
# busy makes a loop of many small ops look slower than it is.
SURE = 1.3
# Steps that take so many seconds are timed a few times only, and those that move much memory vary: it has to show in two of three looks.
LONG = 0.02
# Their launches take next to nothing. Where the static model sees no gain either, what is measured is mostly who else uses the memory: 32
# attentions of width 256 ran at 0.7x to 0.8x and at 1.3x to 1.4x of their loop within minutes, which took 30 and 80 ms. Here the loop
# stays unless the gain is so many times ``LEAST_GAIN``.
UNSEEN = 1.4
# So has one that the static model, which knows of no disturbances, does not see: it is rarely this wrong.
SURE_UNSEEN = 2.0
# LEAST_GAIN of an estimate: the static model may be wrong by so much, and the loop is what the user has.
LEAST_ESTIMATED_GAIN = 1.15
# A candidate replaces the best one so far only where it is clearly faster.
CLEARLY = 0.97
# Candidates within this factor of the best are timed once more, together, at the end.
CLOSE = 1.15
MOST_FINALISTS = 4
# A candidate that the static model puts this far behind another is not timed: the model ranks forms, it is rarely this wrong.
HOPELESS = 4.0
# Graphs of more nodes are not searched by the static model: each candidate of them takes long to write.
MOST_MODELLED = 20_000
# A form this much slower than another, before its lowerings are searched, is dropped: of unequal widths each has lowerings of its own.
FAR_BEHIND = 1.5
# Lane sets whose widest result has fewer bytes than this fit the cache with room to spare: other numbers of chunks are not tried.
WORTH_CHUNKING = 1 << 19
FAR = 2.0
# Inputs within this factor of the recorded ones are computed as those are.
ALIKE = 2.0
# A layer of its own that becomes a region pays for the guard at every call.
GUARD_SECONDS = 6e-6

# Forms that want, or give, the lanes behind the batch: tried together.
BEHIND = frozenset({"addcmul_behind", "dot_behind", "folded"})

Steps = list[Callable[[], object]]  # one step of a candidate per case


class Planner:
    """Plans one region: ``prepared`` is its graph in the mode that is timed, ``cases`` are inputs to time it on (default: as recorded)."""

    def __init__(
        self, prepared: Prepared, region: nn.Module, packs: Packs, options: Options, cases: Sequence[Case] = (),
        progress: Progress | None = None, patience: Patience | None = None, *, compiled: bool = False,
    ) -> None:  # fmt: skip
        self.prepared, self.region, self.packs, self.options = prepared, region, packs, options
        self.compiled = compiled  # what is chosen will be: see ``cost``
        frame = prepared.lifted.frame
        self.train = options.mode == "train"
        cases = list(cases) or [frame.raw or ((), {})]
        self.benches = [Workbench(region, case, self.train, frame.parent >= 0) for case in cases]
        self.prefer = _preferred(options)
        self.progress = progress or Progress(False)
        self.patience = patience or Patience()
        self.left: list[Refusal] = []  # of lane sets that do not pay
        self.far: set[tuple[Any, str]] = set()  # lowerings that took so much longer than another that no size will make up for it
        # The results that are timed are so many times the size of those that were recorded.
        self.larger = self.times_larger()
        timed = options.tune and options.objective == "time"  # what is counted, rather than timed, is soon counted again
        self.key = fingerprint(prepared, region, packs, options, cases) if timed and options.cache else None

    def times_larger(self) -> float:
        """The inputs that are timed, in the geometric mean, against the recorded ones; 1 where they are about as large."""
        raw = self.prepared.lifted.frame.raw or ((), {})
        recorded = sum(leaf.numel() for leaf in tree_flatten(raw)[0] if isinstance(leaf, torch.Tensor))
        ratios = [bench.numel / recorded for bench in self.benches if recorded and bench.numel]
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else 1.0
        return 1.0 if 1 / ALIKE < mean < ALIKE else mean

    def plan(self) -> Choice:
        """Search, measure, decide; or what was decided before for an equal region."""
        known = self._known()
        if known is not None:
            return known
        try:
            choice = self._searched()
            if self.options.max_memory is not None and choice.refusal is None:
                choice = within_limit(self, choice, self.options.max_memory)
            if self.options.tune and choice.refusal is None:
                choice = as_usual(self, choice)
        except RaisesError as raised:
            refusal = self.refusal(str(raised))
            place = next(iter(self.prepared.lane_sets().values()), None)
            return Choice(None, {}, refusal=replace(refusal, place=refusal.place or place))
        if self.key is not None and (choice.tried or choice.seconds is not None):
            plan_cache.store(self.key, to_data(choice))
        return choice

    def _known(self) -> Choice | None:
        """The choice from the cache, its program made anew; None where there is none, or it does not fit what the rules offer today."""
        data = plan_cache.load(self.key) if self.key is not None else None
        found = from_data(data) if data is not None else None
        if found is None:
            return None
        choice, reason = found
        before = self.prepared
        self.prepared = before.with_widths(choice.together)
        choice.vectorized = self.emit(choice.lowering, choice.chunks)
        if any(not 0 <= case < len(self.benches) for each in choice.sizes for case in each.cases):
            choice.vectorized = None
        offered = choice.vectorized.choices if choice.vectorized is not None else {}
        if choice.vectorized is None or any(option not in offered.get(key, (option,)) for key, option in choice.lowering.items()):
            self.prepared = before
            return None
        choice.cached = True
        choice.refusal = None if reason is None else self.refusal(f"{reason}, measured in an earlier run")
        return choice

    def _searched(self) -> Choice:
        if self.train and self.options.tune and not all(bench.trains() for bench in self.benches):
            self.train = False  # a model that can only be run forward is timed so
            for bench in self.benches:
                bench.train = False
        base = self.emit({})
        forms = self._forms() if base is None or self.options.tune else [self.prepared]
        if self.options.objective == "time" and self.options.tune:
            return self._fastest(forms)
        if self.options.objective == "time":
            return self._modelled(self._forms())
        found: list[tuple[Choice, list[Refusal]]] = []  # with what each form leaves
        for self.prepared in forms:
            base, self.left = self.emit({}), []
            if base is not None:
                launches = self.options.objective == "launches" and not self.options.large
                found.append((self._fewest_launches(base) if launches else self._start(base), self.left))
        if not found:
            return Choice(None, {}, refusal=self.refusal("nothing is left to fuse"))
        best, self.left = min(found, key=lambda form: _rank(form[0]))
        self.prepared = self.prepared.with_widths(best.together)
        return best

    def _forms(self) -> list[Prepared]:
        """The region as it is prepared, and with its lanes of unequal widths bundled the other way."""
        other = self.prepared.with_widths(not self.prepared.together)
        return [self.prepared] if other is self.prepared or not other.worthwhile else [self.prepared, other]

    def emit(self, lowering: dict[Any, str], chunks: int = 1, skipped: frozenset[LaneSet] = frozenset()) -> Vectorized | None:
        """The program with these lowerings, in so many chunks, without the lane sets in ``skipped``."""
        prepared = self.prepared.without(skipped) if skipped else self.prepared
        return vectorize(prepared.cut(chunks), self.packs, lowering, self.prefer)

    def _start(self, base: Vectorized) -> Choice:
        """What is likely best: the first lowering of each rule, in chunks that fit the cache."""
        chunks = self.fitting()
        cut = self.emit({}, chunks) if chunks > 1 else None
        together = self.prepared.together
        if cut is None:
            return Choice(base, self._first(base), together=together)
        return Choice(cut, self._first(cut), chunks, together)

    def fitting(self) -> int:
        """The number of chunks in which the results of each op fit the cache, at the sizes that are timed."""
        return fitting_chunks(self.prepared.bundles, max(int(CHUNK_BYTES / self.larger), 1))

    def _first(self, base: Vectorized) -> dict[Any, str]:
        return {key: self.prefer if self.prefer in options else options[0] for key, options in base.choices.items()}

    def refusal(self, reason: str) -> Refusal:
        return Refusal(reason, self.prepared.lifted.place, self.prepared.lifted.frame.path)

    def _others(self, choice: Choice) -> Iterator[Choice]:
        """One change at a time to ``choice``, which may change meanwhile: coordinate descent over lowerings, then the number of chunks."""
        assert choice.vectorized is not None
        if self.options.lowering == "auto":
            offered = choice.vectorized.choices
            for key, options in offered.items():
                for option in options:
                    if option != choice.lowering.get(key):
                        yield from self._candidate({**choice.lowering, key: option}, choice.chunks)
            behind = {key: option for key, options in offered.items() for option in options if option in BEHIND}
            if len(behind) > 1 and any(choice.lowering.get(key) != option for key, option in behind.items()):
                yield from self._candidate({**choice.lowering, **behind}, choice.chunks)  # one of them alone pays for turning its results
        if self.options.objective == "time":
            for chunks in self._chunk_counts(choice.chunks):
                yield from self._candidate(choice.lowering, chunks)

    def _how_many(self, choice: Choice) -> int:
        """About how many candidates ``_others`` gives."""
        assert choice.vectorized is not None
        options = choice.vectorized.choices.values() if self.options.lowering == "auto" else ()
        return sum(len(each) - 1 for each in options) + len(self._chunk_counts(choice.chunks))

    def _candidate(self, lowering: dict[Any, str], chunks: int) -> Iterator[Choice]:
        made = self.emit(lowering, chunks)
        if made is not None:
            yield Choice(made, lowering, chunks, self.prepared.together)

    def _chunk_counts(self, chosen: int) -> list[int]:
        """Numbers of chunks to try besides the one chosen: none where all lanes fit the cache with room to spare."""
        size, lanes = widest(self.prepared.bundles)
        if size * self.larger < WORTH_CHUNKING:
            return []
        return [count for count in dict.fromkeys((1, chosen // 2, chosen * 2, chosen * 4)) if 1 <= count <= lanes // 2 and count != chosen]

    # -- launches -----------------------------------------------------------------------------------------------------------------

    def _fewest_launches(self, base: Vectorized) -> Choice:
        """The lowerings that launch least, counted on one run each; refused only where the loop launches no more."""
        bench = self.benches[0]
        # Without grad in "infer" mode: there torch computes a whole nn.MultiheadAttention or TransformerEncoderLayer in one launch.
        with preserved_state(self.region), torch.set_grad_enabled(self.options.mode == "train"):
            loop, least = _launches(bench.forward()), _launches(bench.program(base))
            choice = Choice(base, self._first(base), together=self.prepared.together)
            if self.options.tune:
                for other in self._others(choice):
                    assert other.vectorized is not None
                    counted = _launches(bench.program(other.vectorized))
                    if counted.total < least.total:
                        choice.vectorized, choice.lowering, least = other.vectorized, other.lowering, counted
            if least.total > loop.total:
                least = self._without_dear_ones(choice, loop, least)
        choice.launches = (loop, least)
        more, saved = least.total - loop.total, loop.heavy - least.heavy
        if choice.refusal is None and more > max(saved, 0):  # it is no lane set: around them each write in place became a copy
            what = f"left as a loop: the writes around the lanes launch {more} ops more, to save {saved} that carry parameters"
            if saved <= 0:
                what = f"left as a loop: packed launches {least.total} ops, the loop {loop.total}"
            choice.refusal = self.refusal(what)
        if choice.refusal is None and least.total >= loop.total and least.heavy >= loop.heavy:
            said = f"left as a loop: packed launches {least.total} ops, the loop {loop.total}"
            choice.refusal = self.left.pop() if self.left else self.refusal(said)
        return choice

    def _without_dear_ones(self, choice: Choice, loop: Launches, least: Launches) -> Launches:
        """Leave lane sets that cost more launches than they save heavy ones, where all together launch more than the loop: what gathers
        and checks the operands of two or three lanes may be dearer than the lanes."""
        for lanes, place in self.prepared.lane_sets().items():
            skipped = choice.skipped | {lanes}
            made = self.emit(choice.lowering, choice.chunks, skipped)
            counted = loop if made is None else _launches(self.benches[0].program(made))
            more, saved = least.total - counted.total, counted.heavy - least.heavy
            if more <= max(saved, 0):
                continue
            to = f"to save {saved} that carry parameters" if saved > 0 else "and saves none that carries parameters"
            what = f"left as a loop: packed launches {more} ops more, {to}"
            refusal = replace(self.refusal(what), place=place)
            choice.skipped, least = skipped, counted
            if made is None:
                choice.refusal = refusal
                break
            self.left.append(refusal)
            choice.vectorized = made
            if least.total <= loop.total:
                break
        return least

    # -- the static model ---------------------------------------------------------------------------------------------------------

    def _modelled(self, forms: list[Prepared]) -> Choice:
        """What the static model calls fastest; refused where it calls the loop faster. Nothing runs."""
        best: tuple[float, Choice] | None = None
        for self.prepared in forms:
            base = self.emit({})
            if base is None:
                continue
            choice = self._start(base)
            seconds = self._estimated(choice)
            if len(self.prepared.lifted.graph.nodes) <= MOST_MODELLED:
                for other in self._others(choice):
                    estimated = self._estimated(other)
                    if estimated < seconds * CLEARLY:
                        choice.vectorized, choice.lowering, choice.chunks = other.vectorized, other.lowering, other.chunks
                        seconds = estimated
            if best is None or seconds < best[0]:
                best = (seconds, choice)
        if best is None:
            return Choice(None, {}, refusal=self.refusal("nothing is left to fuse"))
        seconds, choice = best
        self.prepared = self.prepared.with_widths(choice.together)
        loop = self._estimator().loop(self.prepared)
        choice.estimated = loop, seconds
        later = self.options.large or self.compiled  # large weights are timed once they have moved, what is to be compiled by its caller
        if seconds * LEAST_ESTIMATED_GAIN > loop and not later:
            said = f"left as a loop: packed is estimated at {loop / seconds:.2f}x, from its shapes ({self._timed_what()})"
            choice.refusal = self.refusal(f"{said}; tune=True measures it")
        return choice

    def _estimated(self, choice: Choice) -> float:
        assert choice.vectorized is not None
        return self._estimator().program(self.prepared, choice.vectorized)

    def _estimator(self) -> Estimator:
        return Estimator(self.benches[0].device, self.train, self.benches[0].inner, self.compiled)

    def _seen(self, choice: Choice) -> bool:
        """Does the static model call the choice faster than the loop?"""
        return self._estimated(choice) * LEAST_ESTIMATED_GAIN <= self._estimator().loop(self.prepared)

    def _timed_what(self) -> str:
        return "forward and backward" if self.train else "inference"

    # -- time ---------------------------------------------------------------------------------------------------------------------

    def _fastest(self, forms: list[Prepared]) -> Choice:
        """The form, its lowerings and chunks that measure fastest; refused where the loop is as fast."""
        best: tuple[Choice, Steps] | None = None
        for self.prepared in forms:
            base = self.emit({})
            if base is None:
                continue
            choice = self._start(base)
            if self.prepared.single and not base.choices:
                choice.refusal = self.refusal("a layer with one spelling")
                return choice
            best = (choice, self._descended(choice)) if best is None else self._better(best, choice)
        if best is None:
            return Choice(None, {}, refusal=self.refusal("nothing is left to fuse"))
        self.prepared = self.prepared.with_widths(best[0].together)
        return self.decide(best[0])

    def _better(self, best: tuple[Choice, Steps], other: Choice) -> tuple[Choice, Steps]:
        """The best form so far or the other one, whose lowerings are searched only where it is not far behind."""
        choice, steps = best
        others = self.steps(other)
        slower, seconds = self.compare(steps, others)
        if slower < FAR_BEHIND:
            others = self._descended(other)
            slower, seconds = self.compare(steps, others)
        tried = [*choice.tried, *other.tried, ("unequal widths together" if other.together else "bundled by width", seconds)]
        if slower < CLEARLY:
            choice, steps = other, others
        choice.tried = tried
        return choice, steps

    def _descended(self, choice: Choice) -> Steps:
        """Change ``choice`` for the better as long as that is faster; what is timed of it."""
        steps = self.steps(choice)
        close: list[tuple[Choice, Steps]] = []
        expected = self._how_many(choice)
        self.progress.expect(expected)
        least = self._estimated(choice)
        with self.patience:
            for number, other in enumerate(self._others(choice)):
                if self.patience.over:
                    self.patience.untimed += max(expected - number, 1)
                    break
                estimated = self._estimated(other)
                changed = [item for item in other.lowering.items() if item not in choice.lowering.items()]
                # The model speaks of the recorded sizes.
                if (estimated > HOPELESS * least and self.larger == 1.0) or not self.far.isdisjoint(changed):
                    self.progress.step("")
                    continue
                least = min(least, estimated)
                others = self.steps(other)
                slower, seconds = self.compare(steps, others)
                choice.tried.append((in_words(other.lowering, other.chunks), seconds))
                self.progress.step(choice.tried[-1][0])
                if slower > FAR and len(changed) == 1:
                    self.far.update(changed)
                if slower < CLEARLY:
                    close.append((replace(choice), steps))
                    choice.vectorized, choice.lowering, choice.chunks, steps = other.vectorized, other.lowering, other.chunks, others
                elif slower < CLOSE:
                    close.append((other, others))
        return self._final(choice, steps, close[-MOST_FINALISTS:]) if close else steps

    def _final(self, choice: Choice, steps: Steps, close: list[tuple[Choice, Steps]]) -> Steps:
        """Time the close ones together, for longer: one comparison after the other lets noise pick the winner."""
        finalists = [(choice, steps), *close]
        rounds = [medians(list(timed), budget=0.2 * len(finalists)) for timed in zip(*(each for _, each in finalists), strict=True)]
        totals = [math.prod(times) for times in zip(*rounds, strict=True)]
        best, winner = finalists[totals.index(min(totals))]
        choice.vectorized, choice.lowering, choice.chunks = best.vectorized, best.lowering, best.chunks
        return winner

    def steps(self, choice: Choice) -> Steps:
        assert choice.vectorized is not None
        return [bench.step(choice.vectorized) for bench in self.benches]

    def compare(self, steps: Steps, others: Steps) -> tuple[float, float]:
        """(time of the others over that of ``steps``, as a geometric mean over the cases; seconds of the others in the first case)."""
        pairs = [ratio(a, b, budget=0.25) for a, b in zip(steps, others, strict=True)]
        return math.exp(sum(math.log(slower) for slower, _ in pairs) / len(pairs)), pairs[0][1]

    def decide(self, choice: Choice) -> Choice:
        """The choice with its seconds next to the loop's; refused where the loop is as fast in any case that is timed."""
        single = self.prepared.single
        for bench, step in zip(self.benches, self.steps(choice), strict=True):
            functions = [bench.loop(), step]
            loop, fused = medians(functions, budget=0.5)
            own = GUARD_SECONDS + 0.03 * loop if single else 0.0
            seen = self._seen(choice)
            sure = SURE if seen else SURE_UNSEEN
            choice.sure = choice.sure and loop / fused >= sure
            least = LEAST_GAIN * (UNSEEN if loop > LONG and not seen else 1.0)
            if loop > LONG and LEAST_GAIN < loop / fused < sure:
                looks = [(loop, fused), *(medians(functions, budget=0.5) for _ in range(2))]
                loop, fused = sorted(looks, key=lambda look: look[0] / look[1])[1]
            elif (fused + own) * LEAST_GAIN > loop:  # looked at again: a refusal is kept, and the machine may have been busy
                loop, fused = quickest(functions)
            elif loop <= LONG and loop / fused < sure:
                loop, fused = min((loop, fused), tuple(quickest(functions)), key=lambda look: look[0] / look[1])
            fused += own
            choice.seconds = choice.seconds or (loop, fused)
            if fused * least > loop and choice.refusal is None:
                batch = f" at batch {bench.batch}" if bench.batch is not None else ""
                said = f"left as a loop: packed runs {loop / fused:.2f}x{batch} on {bench.device} ({self._timed_what()})"
                unseen = "; nothing in its shapes says why, so that it may be others who use the memory"
                choice.refusal = self.refusal(said if fused * LEAST_GAIN > loop else said + unseen)
        assert choice.vectorized is not None
        if single and choice.lowering == self._first(choice.vectorized):
            choice.refusal = self.refusal("no other spelling of the layer is faster")
        return choice


def _preferred(options: Options) -> str:
    """The lowering asked for by name; for launches the product forms, one launch each."""
    if options.lowering == "grouped_conv":
        return "grouped_conv"
    return "baddbmm" if options.lowering == "bmm" or options.objective == "launches" else ""


def _rank(choice: Choice) -> tuple[bool, tuple[int, int]]:
    return choice.refusal is not None, _cost(choice.launches[1]) if choice.launches else (0, 0)


def _cost(counted: Launches) -> tuple[int, int]:
    """A launch more is worth it where it saves one that carries parameters."""
    return counted.total + counted.heavy, counted.total


def _launches(forward: Callable[[], Any]) -> Launches:
    return count(forward, bound=False)
