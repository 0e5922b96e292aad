"""How much memory a packed form may need at its peak, and the chunks of lanes in which it needs no more.

Comes in: a planner and what it chose. Goes out: the same choice, in more chunks where all lanes at once need more than ``max_memory``, or
than is usual; or a refusal. What is usual, where nobody said: in inference ``MORE`` bytes above the loop; in training ``TIMES`` what the
loop needs, which keeps every lane's activations for the backward as well. What needs more than that, but at most ``MORE_IN_TRAINING`` bytes
above the loop, is cut only where that costs next to no time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from fxfuse.models.determinism import preserved_state
from fxfuse.passes.chunk import widest
from fxfuse.private.profiler import is_profiling

from .choice import Choice
from .memory import peak_bytes

if TYPE_CHECKING:
    from .plan import Planner

MORE = 64 << 20
MORE_IN_TRAINING = 8 << 20
TIMES = 2.15  # what is measured with a loss, 2.2 times
# Chunks that spare a few MiB may take so many times as long.
NEARLY = 1.05
# A form that needs more than is usual, in any number of chunks, must be so much faster than the loop.
WORTH_MORE = 1.25


def within_limit(planner: Planner, choice: Choice, limit: int) -> Choice:
    """The choice, in as many more chunks as ``limit`` bytes ask for; refused where no number of them is enough."""
    if all(peak <= limit for peak in _peaks(planner, choice)):
        return choice
    cut, least = _in_chunks(planner, choice, [limit] * len(planner.benches))
    if cut is None:
        said = f"packed needs {least} bytes at its peak, in any number of chunks; max_memory allows {limit}"
        return replace(choice, refusal=planner.refusal(f"left as a loop: {said}"))
    if choice.seconds is None or planner.prepared.single:
        return cut
    return planner.decide(replace(cut, seconds=None))


def as_usual(planner: Planner, choice: Choice) -> Choice:
    """The choice with its peaks; in more chunks, or left as a loop, where it needs more than is usual and is not worth it."""
    if choice.vectorized is None or is_profiling():  # PyTorch runs one profiler at a time: here it is the user's
        return choice
    with preserved_state(planner.region):
        loops = [peak_bytes(bench.loop()) for bench in planner.benches]
    peaks = _peaks(planner, choice)
    limits = [max(loop + MORE_IN_TRAINING, int(TIMES * loop)) if planner.train else loop + MORE for loop in loops]
    choice.peak = (loops[0], peaks[0])
    if choice.seconds is None or choice.sizes or planner.prepared.single:
        return choice
    if all(map(int.__le__, peaks, limits)):
        spared = [int(TIMES * loop) for loop in loops] if planner.train else limits
        return choice if all(map(int.__le__, peaks, spared)) else _sparing(planner, choice, loops[0], spared)
    cut, _ = _in_chunks(planner, choice, limits)
    if cut is not None:
        cut = planner.decide(replace(cut, seconds=None, peak=(loops[0], _peaks(planner, cut)[0])))
        if cut.refusal is None:
            return cut
    loop, packed = choice.seconds
    if packed * WORTH_MORE > loop:
        worst = max(range(len(peaks)), key=lambda i: peaks[i] - limits[i])
        said = f"left as a loop: packed runs {loop / packed:.2f}x, and needs {peaks[worst]} bytes at its peak, the loop {loops[worst]}"
        choice.refusal = planner.refusal(said)
    return choice


def _sparing(planner: Planner, choice: Choice, loop: int, limits: list[int]) -> Choice:
    """The choice in the chunks that stay within these limits, where they take about as long; else as it is."""
    cut, _ = _in_chunks(planner, choice, limits)
    if cut is None or planner.compare(planner.steps(choice), planner.steps(cut))[0] > NEARLY:
        return choice
    cut = planner.decide(replace(cut, seconds=None, peak=(loop, _peaks(planner, cut)[0])))
    return cut if cut.refusal is None else choice


def _in_chunks(planner: Planner, choice: Choice, limits: list[int]) -> tuple[Choice | None, int]:
    """The choice in the fewest chunks (doubled each time) that stay within the limits, None where none do; and the least peak seen."""
    _, lanes = widest(planner.prepared.bundles)
    chunks, least = choice.chunks, max(_peaks(planner, choice))
    while True:
        more = min(chunks * 2, lanes)
        made = planner.emit(choice.lowering, more, choice.skipped) if more > chunks else None
        if made is None:
            return None, least
        chunks = more
        cut = replace(choice, vectorized=made, chunks=more)
        peaks = _peaks(planner, cut)
        least = min(least, max(peaks))
        if all(map(int.__le__, peaks, limits)):
            return cut, least


def _peaks(planner: Planner, choice: Choice) -> list[int]:
    """Bytes at the peak of one step, for each case that is timed."""
    steps: list[Callable[[], object]] = planner.steps(choice)
    with preserved_state(planner.region):
        return [peak_bytes(step) for step in steps]
