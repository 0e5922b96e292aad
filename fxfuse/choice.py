"""What was decided for one region: data that the planner fills in, the builder reads, and the cache of plans keeps.

Comes in: nothing. Goes out: ``Choice``, and the same as JSON's own types, ``to_data`` and ``from_data``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .graph import Refusal
from .launches import Launches
from .passes.vectorize import LaneSet, Vectorized

# Of what was timed, as many as a person could want to read.
MOST_TRIED = 100


@dataclass
class Choice:
    """The outcome for one region. ``seconds`` are medians (loop, fused), ``peak`` bytes (loop, fused); None where not measured."""

    vectorized: Vectorized | None
    lowering: dict[Any, str]
    chunks: int = 1
    together: bool = False  # lanes of unequal widths in one bundle, rather than bundled by width
    skipped: frozenset[LaneSet] = frozenset()  # lane sets that stay as they are
    refusal: Refusal | None = None
    seconds: tuple[float, float] | None = None
    peak: tuple[int, int] | None = None
    launches: tuple[Launches, Launches] | None = None  # (loop, fused), of one forward
    tried: list[tuple[str, float]] = field(default_factory=list)
    cached: bool = False  # it was read, and nothing was timed


def to_data(choice: Choice) -> dict[str, Any]:
    """The choice without its program, which is made anew from it; the reason alone of a refusal."""
    return {
        "lowering": [[key, option] for key, option in choice.lowering.items()],
        "chunks": choice.chunks,
        "together": choice.together,
        "refusal": None if choice.refusal is None else choice.refusal.reason,
        "seconds": choice.seconds,
        "peak": choice.peak,
        "tried": choice.tried[-MOST_TRIED:],
    }


def from_data(data: dict[str, Any]) -> tuple[Choice, str | None] | None:
    """The choice, still without a program, and the reason of its refusal; None where ``data`` is not what ``to_data`` gives.

    >>> made = Choice(None, {("linear", 4, ((5, 1), (6, 1), None)): "addcmul"}, 2, seconds=(2.0, 1.0))
    >>> from_data(to_data(made)) == (made, None)
    True
    >>> from_data({"chunks": "many"}) is None
    True
    """
    try:
        lowering = {_tuples(key): option for key, option in data["lowering"]}
        chunks, together, reason = data["chunks"], data["together"], data["refusal"]
        tried = [(name, float(seconds)) for name, seconds in data["tried"]]
        seconds = None if data["seconds"] is None else (float(data["seconds"][0]), float(data["seconds"][1]))
        peak = None if data["peak"] is None else (int(data["peak"][0]), int(data["peak"][1]))
        sound = type(chunks) is int and chunks >= 1 and type(together) is bool and (reason is None or isinstance(reason, str))
        if not sound or not all(isinstance(name, str) for name in [*lowering.values(), *(name for name, _ in tried)]):
            return None
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError):
        return None
    return Choice(None, lowering, chunks, together, seconds=seconds, peak=peak, tried=tried), reason


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value
