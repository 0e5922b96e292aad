"""Named candidates, timed in turn so that a busy moment of the machine hits them all alike, and printed as ratios."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fxfuse.planning import timing


def medians(candidates: Mapping[str, Callable[[], object]], *, seconds: float = 6.0, calls: int = 1) -> dict[str, float]:
    """Median seconds of one call of each candidate, from about ``seconds`` of alternating turns (five at the least).

    ``calls``: as many in a turn. Models of hundreds of modules and Parameters push each other's objects out of the cache where they take
    turns after each call, which triples a call of half a millisecond; in a training loop or a server a call follows one of its own.
    """

    def turn(call: Callable[[], object]) -> Callable[[], object]:
        def several() -> None:
            for _ in range(calls):
                call()

        return call if calls == 1 else several

    times = timing.medians([turn(call) for call in candidates.values()], budget=seconds, most=10_000)
    return {name: seconds / calls for name, seconds in zip(candidates, times, strict=True)}


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
