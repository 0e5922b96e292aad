"""Median times of callables, run in turn.

Comes in: two or more callables. Goes out: the median seconds of each. They alternate in changing order, so that a machine whose
speed drifts, and caches that one leaves cold for the next, slow all of them alike; each is warmed up first. Figures of different
calls of this function are not to be compared.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence

import torch

# A candidate that takes so many times as long need not be timed precisely.
FAR_SLOWER = 1.4
# glibc keeps freed memory, for blocks up to the largest that was ever freed, and of what lies last twice as much; the rest goes back to
# the system at each free, and a loop whose results have 512 KiB pays for 480 page faults in each of its calls, or for none, depending on
# what this process has done before. A block of this size (the most that counts is 32 MiB) ends that, for what is timed and for its callers.
LARGEST_KEPT = 31 << 20
# The least rounds may not take longer than this, in seconds; three of them do in any case.
PATIENCE = 0.5


def medians(functions: Sequence[Callable[[], object]], *, budget: float = 0.3, least: int = 5, most: int = 200) -> list[float]:
    """Median seconds of each function, from at most about ``budget`` seconds for all of them together.

    >>> fast, slow = medians([lambda: None, lambda: sum(range(100000))], budget=0.05)
    >>> fast < slow
    True
    """
    return [statistics.median(times) for times in _samples(functions, budget, least, most)]


def quickest(functions: Sequence[Callable[[], object]], *, budget: float = 1.0) -> list[float]:
    """The least seconds of each function, from about ``budget`` seconds for all of them: what a machine that is busy now and then hides
    from medians. Forms that use all cores suffer most from other processes.

    >>> fast, slow = quickest([lambda: None, lambda: sum(range(100000))], budget=0.05)
    >>> fast < slow
    True
    """
    found = [math.inf] * len(functions)
    for part in range(4):  # disturbances last longer than a round
        if part:
            time.sleep(budget / 20)
        times = _samples(functions, budget / 5, 3, 200)
        found = [min(before, *now) for before, now in zip(found, times, strict=True)]
    return found


def ratio(one: Callable[[], object], other: Callable[[], object], *, budget: float = 0.3) -> tuple[float, float]:
    """(time of ``other`` over that of ``one``, median seconds of ``other``), from at most about ``budget`` seconds.

    The ratio is the median over the rounds, not the ratio of the medians: on a machine that runs now fast, now slow both of a round are hit
    alike. Where ``other`` is far slower after a few rounds, or these took twice the budget, they are all.

    >>> slower, seconds = ratio(lambda: None, lambda: sum(range(100000)), budget=0.05)
    >>> slower > 1
    True
    """
    start = time.perf_counter()
    ones, others = _samples([one, other], 0.0, 7, 7)
    far = statistics.median(b / max(a, 1e-9) for a, b in zip(ones, others, strict=True)) >= FAR_SLOWER
    if not far and time.perf_counter() - start < 2 * budget:
        more = _samples([one, other], budget, 7, 200)
        ones, others = ones + more[0], others + more[1]
    return statistics.median(b / max(a, 1e-9) for a, b in zip(ones, others, strict=True)), statistics.median(others)


def _samples(functions: Sequence[Callable[[], object]], budget: float, least: int, most: int) -> list[list[float]]:
    torch.empty(LARGEST_KEPT, dtype=torch.uint8)  # freed at once; nobody touches it
    for function in functions:
        function()
    start = time.perf_counter()
    for function in functions:
        _once(function)
    round_seconds = max(time.perf_counter() - start, 1e-7)
    rounds = max(least, min(most, int(budget / round_seconds)))
    if rounds * round_seconds > PATIENCE:  # long steps vary less
        rounds = max(3, min(rounds, int(PATIENCE / round_seconds)))
    samples: list[list[float]] = [[] for _ in functions]
    order = list(range(len(functions)))
    shuffle = random.Random(0).shuffle  # what runs after a slow loop finds cold caches: each gets that place as often
    for _ in range(rounds):
        shuffle(order)
        for index in order:
            samples[index].append(_once(functions[index]))
    return samples


def _once(function: Callable[[], object]) -> float:
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
