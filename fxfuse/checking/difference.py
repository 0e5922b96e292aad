"""How far two tensors are apart, and what a whole validation found. Data and arithmetic; no model is run here.

Comes in: pairs of tensors. Goes out: ``Difference`` (one tensor), ``Spread`` and ``Rounding`` (all tensors of one kind) and
``Validation`` (the verdict), each printable and convertible to JSON.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fxfuse.errors import ValidationError

from .saved_memory import KEPT

Kind = Literal["output", "input gradient", "parameter gradient", "buffer"]
KINDS: tuple[Kind, ...] = ("output", "input gradient", "parameter gradient", "buffer")
_TINY = 1e-300  # stands for the scale of a tensor of zeros
_OF_ZEROS = 1e150  # a larger relative difference was divided by it
Histogram = list[tuple[float, int]]  # (e, n): n elements differ by 10**e up to 10**(e+1); e is -inf for equal elements


@dataclass(frozen=True)
class Difference:
    """One tensor of the original against the same tensor of the fused model.

    ``max_rel`` is the largest absolute difference over the largest absolute value of the original's tensor. Where the two cannot
    be subtracted (shapes, dtypes, None, NaN in other places) the numbers are inf and ``note`` says why.
    """

    name: str
    kind: Kind
    mode: str
    example: int
    dtype: str
    max_abs: float
    mean_abs: float
    max_rel: float
    histogram: Histogram
    ok: bool
    note: str = ""

    def __str__(self) -> str:
        where = f"{self.kind} {self.name} ({self.mode}, example {self.example}, {self.dtype})"
        if self.note:
            return f"{where}: {self.note}"
        relative = "where the original's is all zeros" if self.max_rel > _OF_ZEROS else f"relative {self.max_rel:.1e}"
        return f"{where}: max {self.max_abs:.1e}, {relative}"

    def to_dict(self) -> dict[str, Any]:
        """The fields as data for ``json.dumps``; inf and nan become strings."""
        return _jsonable(asdict(self))  # type: ignore[no-any-return]


@dataclass
class Spread:
    """Absolute differences of many elements: how many, the largest, the mean, the histogram by powers of ten."""

    count: int = 0
    max: float = 0.0
    total: float = 0.0
    by_exponent: Counter[float] = field(default_factory=Counter)

    @property
    def mean(self) -> float:
        """The mean absolute difference; 0 of nothing."""
        return self.total / self.count if self.count else 0.0

    @property
    def histogram(self) -> Histogram:
        """``(e, n)`` in rising order: n elements differ by 10**e up to 10**(e+1)."""
        return sorted(self.by_exponent.items())

    def add(self, gap: Gap) -> None:
        """Count the elements of a pair of tensors that could be compared."""
        self.count += gap.count
        self.max = max(self.max, gap.max_abs)
        self.total += gap.total
        self.by_exponent.update(dict(gap.histogram))

    def to_dict(self) -> dict[str, Any]:
        """The figures as data for ``json.dumps``."""
        return _jsonable(  # type: ignore[no-any-return]
            {"count": self.count, "max": self.max, "mean": self.mean, "histogram": self.histogram}
        )


@dataclass
class Rounding:
    """Rounding in the model's own dtype, for one kind of tensor: the two models against each other, and each against float64."""

    kind: Kind
    dtype: str
    between: Spread = field(default_factory=Spread)  # fused against original
    original: Spread = field(default_factory=Spread)  # original against the original in float64
    fused: Spread = field(default_factory=Spread)  # fused against the original in float64

    def to_dict(self) -> dict[str, Any]:
        """The three spreads as data for ``json.dumps``."""
        return {
            "kind": self.kind,
            "dtype": self.dtype,
            "fused_to_original": self.between.to_dict(),
            "original_to_float64": self.original.to_dict(),
            "fused_to_float64": self.fused.to_dict(),
        }


@dataclass
class Validation:
    """The verdict on a fused model.

    ``ok``: no tensor differs by more than rounding, and something was compared. ``proved``: in every mode, at least one run that the
    fused model answered itself, not through the original's forward, agreed in float64. ``fallbacks``: reasons of runs that it
    answered through the original's forward (there the comparison says nothing of the rewrite), with their number; ``missed``: how many of
    the ``calls`` of each region those were.
    """

    ok: bool = True
    worst: Difference | None = None
    differences: list[Difference] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)  # the inputs that were tried: "[64, 8] float32"
    reason: str = ""
    proved: bool = False
    fallbacks: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    missed: Counter[str] = field(default_factory=Counter)
    rounding: list[Rounding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    modes: tuple[str, ...] = ()
    rtol: float = 0.0
    seconds: float = 0.0

    @property
    def only_kept(self) -> bool:
        """Is all that differs what backward keeps of the results?"""
        return not self.ok and bool(self.differences) and all(d.ok or d.note == KEPT for d in self.differences)

    def raise_if_failed(self) -> None:
        """Raise ``ValidationError`` that names the worst tensor, if the models differ."""
        if not self.ok:
            raise ValidationError(self.reason or str(self.worst))

    def summary(self) -> list[str]:
        """A few lines for a person: the verdict, what was compared, the worst tensor by kind, what could not be compared."""
        failed = [d for d in self.differences if not d.ok]
        lines = ["equal to the original" if self.ok else f"NOT equal to the original: {self.reason}"]
        if self.ok and not self.proved:
            lines[0] += " as far as compared: not every mode could be checked in float64 on the fused path (see below)"
        tried = "; ".join(f"{text} ({n}x)" if n > 1 else text for text, n in Counter(self.examples).items())
        lines.append(f"compared: {len(self.differences):,} tensors; modes: {', '.join(self.modes)}; inputs: {tried or 'none'}")
        for kind in KINDS:
            for dtype in dict.fromkeys(d.dtype for d in self.differences):
                some = [d for d in self.differences if d.kind == kind and d.dtype == dtype]
                if some:
                    worst = max(some, key=lambda d: (not d.ok, d.max_rel))
                    at = f"  at {worst.name} ({worst.mode})" if worst.max_rel else ""
                    lines.append(f"{kind + 's':20} {dtype:8} {len(some):7,}  max relative {worst.max_rel:7.1e}{at}")
        lines += [f"differs: {d}" for d in failed[:5]]
        if len(failed) > 5:
            lines.append(f"... and {len(failed) - 5:,} more that differ")
        lines += [f"answered by the original's forward {n}x: {reason}" for reason, n in self.fallbacks.items()]
        lines += self.notes
        return lines

    def __str__(self) -> str:
        return "\n".join(self.summary())

    def to_dict(self, *, full: bool = False) -> dict[str, Any]:
        """Data for ``json.dumps``; of the differences the failed ones and the worst of each kind, dtype and mode, or all if ``full``."""
        shown = self.differences
        if not full:
            worst: dict[tuple[str, ...], Difference] = {}
            for d in self.differences:
                key = (d.kind, d.dtype, d.mode)
                if key not in worst or d.max_rel > worst[key].max_rel:
                    worst[key] = d
            kept = {id(d) for d in worst.values()}
            shown = [d for d in self.differences if not d.ok or id(d) in kept]
        return {
            "ok": self.ok,
            "proved": self.proved,
            "reason": self.reason,
            "worst": self.worst.to_dict() if self.worst else None,
            "compared": len(self.differences),
            "differences": [d.to_dict() for d in shown],
            "examples": list(self.examples),
            "modes": list(self.modes),
            "rtol": self.rtol,
            "fallbacks": dict(self.fallbacks),
            "rounding": [r.to_dict() for r in self.rounding],
            "notes": list(self.notes),
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class Gap:
    """How far two tensors are apart; where they cannot be subtracted, ``note`` says why and the distances are inf."""

    count: int = 0
    max_abs: float = 0.0
    total: float = 0.0  # of the absolute differences
    squares: float = 0.0  # of the differences
    scale: float = 0.0  # the largest finite absolute value of the first tensor
    norm: float = 0.0  # the sum of its squares
    histogram: Histogram = field(default_factory=list)
    note: str = ""

    @classmethod
    def lost(cls, note: str) -> Gap:
        """Of two things that cannot be subtracted."""
        return cls(max_abs=math.inf, total=math.inf, note=note)

    @property
    def mean_abs(self) -> float:
        """The mean absolute difference."""
        return self.total / max(self.count, 1)

    @property
    def max_rel(self) -> float:
        """``max_abs`` over ``scale``; 0 if nothing differs."""
        return self.max_abs / max(self.scale, _TINY) if self.max_abs else 0.0


_LARGE = 1 << 20  # elements that are measured at a time
_LOW, _HIGH = -330, 310  # powers of ten that a float64 has


def distance(a: Tensor, b: Tensor) -> Gap:
    """Measure |a - b| elementwise in float64. NaN must stand in the same places, inf equals inf.

    >>> distance(torch.tensor([1.0, math.inf]), torch.tensor([1.5, math.inf])).max_abs
    0.5
    """
    return distances([(a, b)])[0]


def distances(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[Gap]:
    """``distance`` of many pairs. Small tensors are measured together: a model of a thousand lanes has many thousands.

    >>> [gap.histogram for gap in distances([(torch.zeros(3), torch.tensor([0.0, 0.02, 0.05])), (torch.ones(1), torch.ones(2))])]
    [[(-inf, 1), (-2.0, 2)], []]
    """
    result = [_obstacle(a, b) or _EMPTY for a, b in pairs]
    flat: list[tuple[int, Tensor, Tensor]] = []
    waiting = 0
    for i, (a, b) in enumerate(pairs):
        if result[i] is not _EMPTY or a.numel() == 0:
            continue
        if not (_inexact(a) or _inexact(b)):
            result[i] = _integers(a, b)
            continue
        flat.append((i, _flat(a), _flat(b)))
        waiting += flat[-1][1].numel()
        if waiting > _LARGE:
            _measure(flat, result)
            flat, waiting = [], 0
    if flat:
        _measure(flat, result)
    return result


_EMPTY = Gap()


def _obstacle(a: Tensor, b: Tensor) -> Gap | None:
    if a.shape != b.shape:
        return Gap.lost(f"shape {list(b.shape)}, the original has {list(a.shape)}")
    if a.dtype != b.dtype and not (_inexact(a) and _inexact(b)):
        return Gap.lost(f"{b.dtype}, the original has {a.dtype}")
    return None


def _flat(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    tensor = torch.view_as_real(tensor.to(torch.complex128).resolve_conj()) if tensor.is_complex() else tensor.double()
    return tensor.reshape(-1).cpu()


def _integers(a: Tensor, b: Tensor) -> Gap:
    """Exactly: float64 would round large integers."""
    unequal = int((a != b).count_nonzero())
    far = max(float((a.double() - b.double()).abs().max()), 1.0) if unequal else 0.0
    scale = float(a.double().abs().max())
    shape: Histogram = [(-math.inf, a.numel() - unequal)] if unequal < a.numel() else []
    if unequal:
        shape.append((math.floor(math.log10(far)), unequal))
    return Gap(a.numel(), far, far * unequal, far * far * unequal, scale, 0.0, shape)


def _measure(flat: list[tuple[int, Tensor, Tensor]], result: list[Gap]) -> None:
    sizes = torch.tensor([a.numel() for _, a, _ in flat])
    owner = torch.repeat_interleave(torch.arange(len(flat)), sizes)
    a, b = torch.cat([a for _, a, _ in flat]), torch.cat([b for _, _, b in flat])
    same = (a == b) | (a.isnan() & b.isnan())
    finite = a.isfinite()
    clash = _sums(owner, (~same & ~(finite & b.isfinite())).double(), len(flat))
    value = torch.where(finite, a.abs(), 0.0)
    delta = torch.where(same, 0.0, (a - b).abs()).nan_to_num(nan=0.0, posinf=0.0)
    largest, scale = (torch.zeros(len(flat), dtype=torch.float64).scatter_reduce_(0, owner, x, "amax") for x in (delta, value))
    total, squares, norm = (_sums(owner, x, len(flat)) for x in (delta, delta.square(), value.square()))
    shapes = _histograms(owner, delta, len(flat))
    figures = zip(*(x.tolist() for x in (largest, total, squares, scale, norm, clash)), strict=True)
    for (i, x, _), shape, (top, sum_, square, size, length, lost) in zip(flat, shapes, figures, strict=True):
        note = f"NaN or inf in {int(lost)} places where the other has another value"
        result[i] = Gap.lost(note) if lost else Gap(x.numel(), top, sum_, square, size, length, shape)


def _sums(owner: Tensor, values: Tensor, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.float64).index_add_(0, owner, values)


def _histograms(owner: Tensor, delta: Tensor, count: int) -> list[Histogram]:
    some = delta > 0
    exponent = torch.floor(torch.log10(delta[some])).to(torch.int64).clamp(_LOW, _HIGH) - _LOW
    width = _HIGH - _LOW + 1
    bins, numbers = torch.unique(owner[some] * width + exponent, return_counts=True)
    zeros = torch.bincount(owner[~some], minlength=count).tolist()
    shapes: list[Histogram] = [[(-math.inf, n)] if n else [] for n in zeros]
    for bin_, number in zip(bins.tolist(), numbers.tolist(), strict=True):
        shapes[bin_ // width].append((float(bin_ % width + _LOW), number))
    return shapes


def _inexact(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _jsonable(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
