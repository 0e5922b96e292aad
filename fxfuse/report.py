"""What fused, what did not and why: the page a person reads, and the same as data.

Comes in: the region plans, refusals, validation and measurements that the pipeline collected. Goes out: ``Report``. ``str(report)`` is
plain text of fewer than 100 columns; ``report.to_dict()`` is what ``json.dumps`` takes.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fxfuse.graph import FusedOp, Refusal, RegionPlan

from .checking.difference import Histogram, Rounding, Validation

WIDTH = 98


@dataclass
class Report:
    """What ``optimize`` or ``explain`` did with one model.

    ``fused``: one plan per rewritten region. ``refused``: lane sets and regions that stay as they are. ``timings``: median seconds
    (before, after) of the whole model, by what was timed. ``stages``: seconds that each stage of the pipeline took. ``fallbacks``: calls
    that a fused model answered through the original's forward, by reason. ``facts``: what recording found and specialised to.
    """

    model: str
    fused: list[RegionPlan] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    validation: Validation | None = None
    timings: dict[str, tuple[float, float]] = field(default_factory=dict)
    launches: tuple[int, int] | None = None
    heavy: tuple[int, int] | None = None
    peak_bytes: tuple[int, int] | None = None
    notes: list[str] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)
    fallbacks: Counter[str] = field(default_factory=Counter)
    stages: dict[str, float] = field(default_factory=dict)
    methods: dict[str, Validation] = field(default_factory=dict)  # of the other methods that were asked for

    def __str__(self) -> str:
        sections = [self._head(), *(_region(plan) for plan in self.fused), self._refusals(), self._validation()]
        sections += [_list("recorded", self.facts), _list("notes", self.notes), self._calls(), self._stages()]
        return "\n\n".join("\n".join(line.rstrip() for line in section) for section in sections if section)

    def to_dict(self) -> dict[str, Any]:
        """The report as data: JSON's own types only, inf and nan as strings.

        >>> Report("Net").to_dict()["model"]
        'Net'
        """
        data = {
            "model": self.model,
            "fused": [_plan(plan) for plan in self.fused],
            "refused": [_refusal(refusal) for refusal in self.refused],
            "validation": self.validation.to_dict() if self.validation is not None else None,
            "timings": self.timings,
            "launches": self.launches,
            "heavy": self.heavy,
            "peak_bytes": self.peak_bytes,
            "notes": self.notes,
            "facts": self.facts,
            "fallbacks": self.fallbacks,
            "stages": self.stages,
            "methods": {name: validation.to_dict() for name, validation in self.methods.items()},
        }
        return _jsonable(data)  # type: ignore[no-any-return]

    def to_json(self, *, indent: int | None = 2) -> str:
        """The report as JSON text.

        >>> json.loads(Report("Net").to_json())["fused"]
        []
        """
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    # -- the page ------------------------------------------------------------------------------------------------------

    def _head(self) -> list[str]:
        lanes = max((op.lanes for plan in self.fused for op in plan.ops), default=0)
        what = f"{_count(len(self.fused), 'region')} fused, up to {_count(lanes, 'lane')} in one op" if self.fused else "nothing fused"
        title = f"fxfuse: {self.model}: {what}"
        if self.refused:
            title += f", {len(self.refused)} left as {'it is' if len(self.refused) == 1 else 'they are'}"
        rows = _changes(self.launches, self.heavy, self.peak_bytes, self.timings)
        return [*_wrap(title, ""), *_table(rows, "  ")]

    def _refusals(self) -> list[str]:
        if not self.refused:
            return []
        lines = ["left as it is"]
        for sentence, number in Counter(_sentence(r) for r in self.refused).items():
            lines += _wrap(sentence + (f"  [{number}x]" if number > 1 else ""), "  ", "    ")
        return lines

    def _validation(self) -> list[str]:
        if self.validation is None:
            return []
        lines = ["checked against the original"]
        for line in self.validation.summary():
            lines += _wrap(line, "  ", "      ")
        for name, validation in self.methods.items():
            lines += _wrap(f"{name}: {validation.summary()[0]}", "  ", "      ")
        if self.validation.rounding:
            lines += ["", *_rounding(self.validation.rounding)]
        return lines

    def _calls(self) -> list[str]:
        if not self.fallbacks:
            return []
        return _list("answered by the original's forward", [f"{n:,}x {reason}" for reason, n in self.fallbacks.most_common()])

    def _stages(self) -> list[str]:
        if not self.stages:
            return []
        parts = ", ".join(f"{name} {_seconds(s)}" for name, s in self.stages.items())
        return _wrap(f"took {_seconds(sum(self.stages.values()))}: {parts}", "")


def _region(plan: RegionPlan) -> list[str]:
    place = f" ({plan.place})" if plan.place is not None else ""
    lines = [f"fused: {plan.path or 'the model itself'}{place}"]
    rows = [[op.op, _lanes(op), op.detail, op.lowering, str(op.place) if op.place is not None else ""] for op in _joined(plan.ops)]
    lines += _table(rows, "  ")
    for method, ops in plan.method_ops.items():
        rows = [[op.op, _lanes(op), op.detail, op.lowering, str(op.place or "")] for op in _joined(ops)]
        lines += [f"  in {method}:", *_table(rows, "    ")]
    lines += _table(_changes(plan.launches, plan.heavy, plan.peak_bytes, {"median time": plan.seconds} if plan.seconds else {}), "  ")
    lines += _sizes(plan)
    if plan.tried:
        # The data (to_dict) has them all; a person wants the few that came close.
        fastest = sorted(plan.tried, key=lambda entry: entry[1])
        shown = "; ".join(f"{name} {_seconds(s)}" for name, s in fastest[:3])
        more = f"; and {len(fastest) - 3} slower" if len(fastest) > 3 else ""
        lines += _wrap(f"also timed: {shown}{more}", "  ", "    ")
    if plan.cached:
        lines += _wrap("plan and figures from the cache: an equal loop was measured on this machine before", "  ", "    ")
    for note in plan.notes:
        lines += _wrap(f"note: {note}", "  ", "    ")
    return lines


def _sizes(plan: RegionPlan) -> list[str]:
    """Which plan serves which sizes."""
    lines: list[str] = []
    for each in plan.by_size:
        sizes = f"sizes {each.first:,} to {each.last:,}" if each.last is not None else f"sizes from {each.first:,}"
        gains = ", ".join(f"at {size:,} {_seconds(loop)} -> {_seconds(own)}" for size, loop, own in each.measured)
        lines += _wrap(f"{sizes}: {each.how} ({gains})", "  ", "    ")
    return lines


def _joined(ops: Sequence[FusedOp], most: int = 40) -> list[FusedOp]:
    """The ops as they stand, cut where a page would overflow."""
    if len(ops) <= most:
        return list(ops)
    return [*ops[: most - 1], FusedOp(f"... and {len(ops) - most + 1} more", 0, "", None)]


def _lanes(op: FusedOp) -> str:
    return _count(op.lanes, "lane") if op.lanes else ""


def _changes(
    launches: tuple[int, int] | None,
    heavy: tuple[int, int] | None,
    peak: tuple[int, int] | None,
    timings: dict[str, tuple[float, float]],
) -> list[list[str]]:
    rows: list[list[str]] = []
    for name, pair in (("launches", launches), ("of them heavy", heavy)):
        if pair is not None:
            rows.append([name, f"{pair[0]:,}", "->", f"{pair[1]:,}", _ratio(*pair, "fewer", "more")])
    for name, times in timings.items():
        rows.append([name, _seconds(times[0]), "->", _seconds(times[1]), _ratio(*times, "faster", "slower")])
    if peak is not None:
        rows.append(["peak memory", _bytes(peak[0]), "->", _bytes(peak[1]), _ratio(*peak, "less", "more")])
    return rows


def _rounding(rows: Sequence[Rounding]) -> list[str]:
    lines = [f"rounding in {rows[0].dtype}: absolute differences, max / mean"]
    table = [["", "fused to original", "original to float64", "fused to float64"]]
    for row in rows:
        # Without a float64 run there is no truth to be near.
        cells = [f"{s.max:.1e} / {s.mean:.1e}" if s.count else "-" for s in (row.between, row.original, row.fused)]
        table.append([row.kind + "s", *cells])
    lines += _table(table, "  ")
    kinds = [row for row in rows if row.between.count and row.kind in ("output", "parameter gradient", "input gradient")]
    for row in kinds[:3]:
        lines += ["", f"  {row.kind}s, fused to original: elements by size of the difference", *_bars(row.between.histogram)]
    return ["  " + line if line else "" for line in lines]


def _bars(histogram: Histogram, most: int = 10, width: int = 40) -> list[str]:
    """A bar per power of ten, the smallest ones joined so that at most ``most`` lines are needed."""
    entries = sorted(histogram)
    zeros = sum(n for edge, n in entries if edge == -math.inf)
    entries = [(edge, n) for edge, n in entries if edge != -math.inf]
    room = most - (1 if zeros else 0)
    cut = len(entries) - room + 1 if len(entries) > room else 0
    rows = [("equal", zeros)] if zeros else []
    if cut:
        rows.append((f"below 1e{int(entries[cut][0]):+03d}", sum(n for _, n in entries[:cut])))
    for edge, n in entries[cut:]:
        rows.append(("NaN or inf" if edge == math.inf else f"1e{int(edge):+03d} to 1e{int(edge) + 1:+03d}", n))
    top = max((n for _, n in rows), default=0)
    return [f"  {name:>14} {n:>12,} {'#' * math.ceil(width * n / top)}" for name, n in rows if top]


def _table(rows: Sequence[Sequence[str]], indent: str) -> list[str]:
    """Columns of equal width; numbers (before and after) to the right; the widest column gives way on a narrow page."""
    if not rows:
        return []
    columns = max(map(len, rows))
    cells = [[*row, *[""] * (columns - len(row))] for row in rows]
    widths = [max(len(row[c]) for row in cells) for c in range(columns)]
    room = WIDTH - len(indent) - 2 * (columns - 1)
    while sum(widths) > room:
        widest = max(range(columns), key=lambda c: widths[c])
        widths[widest] -= 1
    right = [all(not row[c] or row[c][0].isdigit() or row[c][0] == "-" for row in cells) for c in range(columns)]
    lines = []
    for row in cells:
        parts = []
        for text, width, to_right in zip(row, widths, right, strict=True):
            text = text if len(text) <= width else text[: max(0, width - 3)] + "..."
            parts.append(text.rjust(width) if to_right else text.ljust(width))
        lines.append((indent + "  ".join(parts)).rstrip())
    return lines


def _list(title: str, entries: Iterable[str]) -> list[str]:
    entries = list(dict.fromkeys(entries))
    if not entries:
        return []
    return [title, *(line for entry in entries for line in _wrap(entry, "  ", "    "))]


def _wrap(text: str, first: str, rest: str | None = None) -> list[str]:
    inner = first + "  " if rest is None else rest
    if len(first) + len(text) <= WIDTH:
        return [first + text]  # keeps the spacing of aligned lines
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=inner)


def _sentence(refusal: Refusal) -> str:
    return f"{refusal.region}: {refusal}" if refusal.region else str(refusal)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _seconds(value: float) -> str:
    """
    >>> _seconds(0.00042), _seconds(0.0042), _seconds(4.2)
    ('420 us', '4.20 ms', '4.20 s')
    """
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= size or unit == "us":
            number = value / size
            return f"{number:.0f} {unit}" if number >= 100 else f"{number:.3g} {unit}" if number < 1 else f"{number:#.3g} {unit}"
    raise AssertionError("unreachable")


def _bytes(value: int) -> str:
    """
    >>> _bytes(12), _bytes(20 * 1024), _bytes(3 * 1024**3)
    ('12 B', '20.0 KiB', '3.0 GiB')
    """
    size = float(value)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} B" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1024
    raise AssertionError("unreachable")


def _ratio(before: float, after: float, better: str, worse: str) -> str:
    """
    >>> _ratio(10, 4, "faster", "slower"), _ratio(4, 10, "faster", "slower"), _ratio(3, 3, "faster", "slower")
    ('2.5x faster', '2.5x slower', 'the same')
    """
    if before <= 0 or after <= 0:
        return "the same" if before == after else ""
    ratio, word = (before / after, better) if before >= after else (after / before, worse)
    return "the same" if ratio < 1.005 else f"{ratio:,.0f}x {word}" if ratio >= 100 else f"{ratio:.3g}x {word}"


# -- as data -----------------------------------------------------------------------------------------------------------


def _plan(plan: RegionPlan) -> dict[str, Any]:
    return {
        "path": plan.path,
        "place": str(plan.place) if plan.place is not None else None,
        "lanes": max((op.lanes for op in plan.ops), default=0),
        "ops": [
            {
                "op": op.op,
                "lanes": op.lanes,
                "lowering": op.lowering,
                "place": str(op.place) if op.place is not None else None,
                "detail": op.detail,
            }
            for op in plan.ops
        ],
        "launches": plan.launches,
        "heavy": plan.heavy,
        "seconds": plan.seconds,
        "peak_bytes": plan.peak_bytes,
        "tried": plan.tried,
        "by_size": [{"first": s.first, "last": s.last, "how": s.how, "measured": s.measured} for s in plan.by_size],
        "cached": plan.cached,
        "notes": plan.notes,
        "methods": {
            name: [{"op": op.op, "lanes": op.lanes, "lowering": op.lowering} for op in ops] for name, ops in plan.method_ops.items()
        },
        "packed": [
            {
                "name": r.name,
                "members": r.members,
                "shape": r.shape,
                "order": r.order,
                "style": r.style,
                "kind": r.kind,
                "requires_grad": r.requires_grad,
            }
            for r in plan.recipes
        ],
    }


def _refusal(refusal: Refusal) -> dict[str, Any]:
    place = refusal.place
    return {
        "reason": refusal.reason,
        "region": refusal.region,
        "place": str(place) if place is not None else None,
        "file": place.file if place is not None else None,
        "line": place.line if place is not None else None,
    }


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _jsonable(v) for key, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_jsonable(v) for v in value]
    if isinstance(value, bool) or value is None or isinstance(value, (int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return str(value)
