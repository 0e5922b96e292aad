"""How far two tensors are apart, and what a whole validation found. Data and arithmetic; no model is run here.

Comes in: pairs of tensors. Goes out: ``Difference`` (one tensor), ``Spread`` and ``Rounding`` (all tensors of one kind) and
``Validation`` (the verdict), each printable and convertible to JSON.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fxfuse.errors import ValidationError

Kind = Literal["output", "input gradient", "parameter gradient", "buffer"]
KINDS: tuple[Kind, ...] = ("output", "input gradient", "parameter gradient", "buffer")
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
        return f"{where}: max {self.max_abs:.1e}, relative {self.max_rel:.1e}"

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

    def add(self, delta: Tensor) -> None:
        """Count the elements of ``delta`` (float64, not negative)."""
        if delta.numel():
            self.count += delta.numel()
            self.max = max(self.max, float(delta.max()))
            self.total += float(delta.sum())
            self.by_exponent.update(dict(histogram(delta)))

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
    answered through the original's forward (there the comparison says nothing of the rewrite), with their number.
    """

    ok: bool = True
    worst: Difference | None = None
    differences: list[Difference] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)  # the inputs that were tried: "[64, 8] float32"
    reason: str = ""
    proved: bool = False
    fallbacks: Counter[str] = field(default_factory=Counter)
    rounding: list[Rounding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    modes: tuple[str, ...] = ()
    rtol: float = 0.0
    seconds: float = 0.0

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


def histogram(delta: Tensor) -> Histogram:
    """Count elements by power of ten: ``(e, n)`` for n elements in 10**e up to 10**(e+1), e = -inf for zeros, inf for inf and NaN.

    >>> histogram(torch.tensor([0.0, 0.02, 0.05, 3.0]))
    [(-inf, 1), (-2.0, 2), (0.0, 1)]
    """
    delta = delta.detach().to("cpu", torch.float64).reshape(-1)
    zeros = delta.numel() - int(delta.count_nonzero())
    if zeros == delta.numel():
        return [(-math.inf, zeros)] if zeros else []
    finite = delta[(delta > 0) & delta.isfinite()]
    lost = delta.numel() - zeros - finite.numel()
    result: Histogram = [(-math.inf, zeros)] if zeros else []
    if finite.numel():
        edges, counts = torch.unique(torch.floor(torch.log10(finite)), return_counts=True)
        result += list(zip(edges.tolist(), counts.tolist(), strict=True))
    return [*result, (math.inf, lost)] if lost else result


@dataclass
class Distance:
    """What ``distance`` measured; ``delta`` is None where the two cannot be subtracted, and ``note`` says why."""

    max_abs: float
    mean_abs: float
    scale: float  # the largest finite absolute value of the first
    delta: Tensor | None
    note: str = ""

    @property
    def max_rel(self) -> float:
        """``max_abs`` over ``scale``; 0 if nothing differs."""
        return self.max_abs / max(self.scale, _TINY) if self.max_abs else 0.0


_TINY = 1e-300


def distance(a: Tensor, b: Tensor) -> Distance:
    """Measure |a - b| elementwise in float64. NaN must stand in the same places, inf equals inf.

    >>> distance(torch.tensor([1.0, math.inf]), torch.tensor([1.5, math.inf])).max_abs
    0.5
    """
    if a.shape != b.shape:
        return Distance(math.inf, math.inf, 0.0, None, f"shape {list(b.shape)}, the original has {list(a.shape)}")
    if a.layout is not torch.strided or b.layout is not torch.strided:
        a, b = (t.to_dense() if t.layout is not torch.strided else t for t in (a, b))
    if a.numel() == 0:
        return Distance(0.0, 0.0, 0.0, torch.zeros(0, dtype=torch.float64))
    if torch.equal(a, b):
        return Distance(0.0, 0.0, float(torch.where(a.isfinite(), a, 0).abs().max()), torch.zeros(a.numel(), dtype=torch.float64))
    if not (_inexact(a) or _inexact(b)):  # integers: float64 would round large ones
        unequal = (a != b).reshape(-1)
        delta = torch.where(unequal, (a.double() - b.double()).abs().reshape(-1).clamp(min=1.0), 0.0)
        return Distance(float(delta.max()), float(delta.mean()), float(a.double().abs().max()), delta)
    exact = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
    a, b = (torch.view_as_real(t.detach().to(exact).resolve_conj()) if exact.is_complex else t.detach().to(exact) for t in (a, b))
    same = (a == b) | (a.isnan() & b.isnan())
    lost = int((~same & ~(a.isfinite() & b.isfinite())).sum())
    scale = float(torch.where(a.isfinite(), a.abs(), 0.0).max())
    if lost:
        return Distance(math.inf, math.inf, scale, None, f"NaN or inf in {lost} places where the other has another value")
    delta = torch.where(same, 0.0, (a - b).abs()).reshape(-1)
    return Distance(float(delta.max()), float(delta.mean()), scale, delta)


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
