"""Medians of alternating runs: every candidate is timed in every round, so that a busy moment of the machine hits them all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def medians(candidates: Mapping[str, Callable[[], object]], *, seconds: float = 6.0, blocks: int = 25) -> dict[str, float]:
    """Median seconds of one call of each candidate.

    After a warm-up come up to ``blocks`` rounds, fewer (but three at least) where ``seconds`` are over earlier; in each round every
    candidate runs a block of calls, in an order that rotates. The median is taken over blocks, whose length is chosen per candidate.
    """
    block = seconds / (blocks * len(candidates))
    calls = {name: max(1, round(block / _warm(fn))) for name, fn in candidates.items()}
    times: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    end = time.perf_counter() + seconds
    for turn in range(blocks):
        if turn >= 3 and time.perf_counter() > end:
            break
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(_run(candidates[name], calls[name]))
    return {name: statistics.median(found) for name, found in times.items()}


def _run(fn: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        fn()
    return (time.perf_counter() - start) / calls


def _warm(fn: Callable[[], object]) -> float:
    fn()
    return min(_run(fn, 1) for _ in range(3))


def table(times: Mapping[str, Mapping[str, float]], against: str) -> str:
    """One line per candidate: microseconds and how many times faster than `against`, per measure.

    ``times`` is ``{measure: {candidate: seconds}}``.
    """
    candidates = list(next(iter(times.values())))
    width = max(map(len, candidates))
    lines = [" " * width + "".join(f"{measure:>26}" for measure in times)]
    for name in candidates:
        cells = (f"{found[name] * 1e6:14,.0f} us {found[against] / found[name]:7.2f}x" for found in times.values())
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>26}" for cell in cells))
    return "\n".join(lines)
