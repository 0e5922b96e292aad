"""Named candidates, timed in turn so that a busy moment of the machine hits them all alike, and printed as ratios."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fxfuse import timing


def medians(candidates: Mapping[str, Callable[[], object]], *, seconds: float = 6.0) -> dict[str, float]:
    """Median seconds of one call of each candidate, from about ``seconds`` of alternating calls (five rounds at the least)."""
    return dict(zip(candidates, timing.medians(list(candidates.values()), budget=seconds, most=10_000), strict=True))


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
