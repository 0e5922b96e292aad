"""What was decided for one region: data that the planner fills in, the builder reads, and the cache of plans keeps.

Comes in: nothing. Goes out: ``Choice``, what it says of ranges of sizes (``SizeChoice``), and the same as JSON's own types, ``to_data``
and ``from_data``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fxfuse.graph import Refusal
from fxfuse.launches import Launches
from fxfuse.passes.vectorize import LaneSet, Vectorized

# Of what was timed, as many as a person could want to read.
MOST_TRIED = 100


@dataclass(frozen=True)
class SizeChoice:
    """How calls are computed whose size is more than ``above``, up to the next choice's ``above``."""

    above: int
    lowering: dict[Any, str]
    chunks: int = 1
    loop: bool = False  # the lanes one by one, on views of the packed weights
    measured: tuple[tuple[int, float, float], ...] = ()  # (size, seconds of the loop, of this)
    cases: tuple[int, ...] = ()  # of those that were timed, the ones of these sizes


@dataclass
class Choice:
    """The outcome for one region. ``seconds`` are medians (loop, fused), ``peak`` bytes (loop, fused); None where not measured.
    ``estimated``: seconds by the static model (loop, fused), where it chose."""

    vectorized: Vectorized | None
    lowering: dict[Any, str]
    chunks: int = 1
    together: bool = False  # lanes of unequal widths in one bundle, rather than bundled by width
    skipped: frozenset[LaneSet] = frozenset()  # lane sets that stay as they are
    refusal: Refusal | None = None
    seconds: tuple[float, float] | None = None
    peak: tuple[int, int] | None = None
    estimated: tuple[float, float] | None = None
    launches: tuple[Launches, Launches] | None = None  # (loop, fused), of one forward
    tried: list[tuple[str, float]] = field(default_factory=list)
    cached: bool = False  # it was read, and nothing was timed
    sure: bool = True  # it gained so much that another measurement would say the same
    sizes: tuple[SizeChoice, ...] = ()  # where one plan does not serve all; the pack is stored as ``lowering`` wants it
    told_by: tuple[int, int] = (0, 0)  # (leaf, dim) of the input whose size tells which


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
        "told_by": choice.told_by,
        "sizes": [
            [each.above, [[key, option] for key, option in each.lowering.items()], each.chunks, each.loop, each.measured, each.cases]
            for each in choice.sizes
        ],
    }


def from_data(data: dict[str, Any]) -> tuple[Choice, str | None] | None:
    """The choice, still without a program, and the reason of its refusal; None where ``data`` is not what ``to_data`` gives.

    >>> made = Choice(None, {("linear", 4, ((5, 1), (6, 1), None)): "addcmul"}, 2, seconds=(2.0, 1.0))
    >>> from_data(to_data(made)) == (made, None)
    True
    >>> large = SizeChoice(64, {}, 1, True, ((256, 2.0, 2.0),), (1,))
    >>> small = SizeChoice(0, {("linear", 2, ((5, 1), (6, 1))): "dot"}, 4, False, ((8, 2.0, 1.0),), (0,))
    >>> apart = Choice(None, {}, sizes=(small, large), told_by=(0, 1))
    >>> from_data(to_data(apart)) == (apart, None)
    True
    >>> from_data({"chunks": "many"}) is None
    True
    """
    try:
        lowering = _lowering(data["lowering"])
        chunks, together, reason = data["chunks"], data["together"], data["refusal"]
        tried = [(name, float(seconds)) for name, seconds in data["tried"]]
        seconds = None if data["seconds"] is None else (float(data["seconds"][0]), float(data["seconds"][1]))
        peak = None if data["peak"] is None else (int(data["peak"][0]), int(data["peak"][1]))
        sound = type(chunks) is int and chunks >= 1 and type(together) is bool and (reason is None or isinstance(reason, str))
        sizes = tuple(_size_choice(*each) for each in data["sizes"])
        leaf, dim = map(int, data["told_by"])
        sound = sound and leaf >= 0 and dim >= 0
        if not sound or not all(isinstance(name, str) for name in [*lowering.values(), *(name for name, _ in tried)]):
            return None
        for each in (lowering, *(size.lowering for size in sizes)):
            in_words(each, 1)  # raises on keys that are none
        if sizes and ([each.above for each in sizes] != sorted({each.above for each in sizes}) or sizes[0].above != 0):
            return None
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError):
        return None
    return Choice(None, lowering, chunks, together, seconds=seconds, peak=peak, tried=tried, sizes=sizes, told_by=(leaf, dim)), reason


def _lowering(data: Any) -> dict[Any, str]:
    return {_tuples(key): option for key, option in data}


def _size_choice(above: Any, lowering: Any, chunks: Any, loop: Any, measured: Any, cases: Any) -> SizeChoice:
    known = _lowering(lowering)
    if type(above) is not int or type(chunks) is not int or chunks < 1 or type(loop) is not bool or not measured or not cases:
        raise ValueError("no choice for a range of sizes")
    if not all(isinstance(name, str) for name in known.values()):
        raise TypeError("a lowering is a name")
    found = tuple((int(size), float(before), float(after)) for size, before, after in measured)
    return SizeChoice(above, known, chunks, loop, found, tuple(map(int, cases)))


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value


def in_words(lowering: dict[Any, str], chunks: int) -> str:
    """The lowerings as a person reads them: ``linear 32x32: baddbmm``."""
    words = []
    for key, name in lowering.items():
        name_of, shapes = (key[1], key[2]) if key[0] == "single" else (key[0], key[2])
        weight = "x".join(map(str, shapes[1] or ())) if len(shapes) > 1 else ""
        words.append(f"{name_of} {weight}: {name}" if weight else f"{name_of}: {name}")
    if chunks > 1:
        words.append(f"in {chunks} chunks")
    return ", ".join(dict.fromkeys(words)) or "as the rules name it"
