"""Is the fused model equal to the original?

Comes in: two models and example inputs. Goes out: ``Validation``. Compared are outputs (values, None, integers, strides,
``requires_grad``), gradients of inputs, every parameter's gradient under the original's name, and buffers after the call, in train
and eval mode, in float64 and in the models' own dtype. A true rewrite agrees in float64 to about 1e-12, so a wrong one cannot
hide in rounding; what differs in float32 is reported as rounding, next to how far the original itself is from float64.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fxfuse import fused as fused_modules
from fxfuse.errors import ArgumentError
from fxfuse.models import inputs as fresh
from fxfuse.models.determinism import preserved_state
from fxfuse.models.unregistered import unregistered
from fxfuse.weights.packing import load_original_state_dict, original_state_dict

from .difference import KINDS, Difference, Gap, Kind, Rounding, Spread, Validation, distances
from .other_weights import vary_weights
from .runs import Run, coarsest, results_saved, run
from .saved_memory import KEPT

__all__ = ["Difference", "Rounding", "Spread", "Validation", "validate", "verify"]

Example = tuple[tuple[Any, ...], dict[str, Any]]

SLACK = 64  # an error of this many roundings, or this many times what a change of the last bit causes, is still rounding
GRADIENT_EXAMPLES = 2  # as many examples have their gradients compared in eval mode too; the others do so in train mode
FLOOR = 16  # and so is one of this many roundings of the largest tensor of its kind, where the tensor itself is zero but for rounding
SHAKES = 8  # so often are last bits changed: rounding that has few outcomes, 0 among them, may well come out the same twice

_GRADIENTS: tuple[Kind, ...] = ("input gradient", "parameter gradient")


def verify(
    original: nn.Module,
    fused: nn.Module,
    example_inputs: Any,
    *,
    example_kwargs: dict[str, Any] | None = None,
    modes: Sequence[str] = ("train", "eval"),
    gradients: bool = True,
    rtol: float = 1e-10,
    other_batches: bool = True,
    seed: int = 0,
    raises: bool = False,
) -> Validation:
    """Compare two models of the same parameters on the examples, on fresh data and on other batch sizes.

    ``example_inputs``: a tensor or a tuple of positional arguments, any shapes and dtypes. ``modes``: of "train", "eval". ``rtol``: the
    largest relative difference (largest absolute difference over the largest absolute value, per tensor) in float64.
    ``other_batches``: also resampled rows of the example, as many as it has, 1, n+1 and 2n+1, where the original takes them. ``raises``:
    raise ``ValidationError`` with the worst tensor instead of returning a failed ``Validation``. Both models stay as they are. Raises
    ``ArgumentError`` for arguments of another kind.

    Method: float64 copies of both models under fixed "random" numbers (dropout differs in its mask by design), random cotangents;
    see ``validate``.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
    >>> verify(model, copy.deepcopy(model), torch.randn(5, 3)).ok
    True
    >>> other = copy.deepcopy(model)
    >>> other[0].bias.data += 1
    >>> verify(model, other, torch.randn(5, 3)).ok
    False
    """
    for name, value in (("original", original), ("fused", fused)):
        if not isinstance(value, nn.Module):
            raise ArgumentError(f"verify: {name} must be a torch.nn.Module, {type(value).__name__} came")
    if not isinstance(example_inputs, (Tensor, tuple)):
        raise ArgumentError(f"verify: example_inputs must be a tensor or a tuple of arguments, {type(example_inputs).__name__} came")
    if example_kwargs is not None and not isinstance(example_kwargs, dict):
        raise ArgumentError(f"verify: example_kwargs must be a dict, {type(example_kwargs).__name__} came")
    if not rtol >= 0:
        raise ArgumentError(f"verify: rtol must be a number of 0 or more, {rtol!r} came")
    given: Example = ((example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs, dict(example_kwargs or {}))
    examples = [given, *(other_examples(given, seed=seed) if other_batches else [])]
    result = validate(original, fused, examples, modes=modes, gradients=gradients, rtol=rtol, seed=seed, must_run=1)
    if raises:
        result.raise_if_failed()
    return result


def other_examples(example: Example, *, seed: int = 0) -> list[Example]:
    """Fresh data for an example: as many rows, then 1, n+1 and 2n+1 rows; empty where no tensor has rows.

    >>> [x.shape[0] for (x,), _ in other_examples(((torch.randn(4, 2),), {}))]
    [4, 1, 5, 9]
    """
    rows = fresh.batch_size(*example)
    if not rows:
        return []
    sizes = list(dict.fromkeys([rows, 1, rows + 1, 2 * rows + 1]))
    return [fresh.resample(*example, batch=size, seed=seed + i + 1) for i, size in enumerate(sizes)]


def validate(
    original: nn.Module,
    fused: nn.Module,
    examples: Sequence[Example],
    *,
    modes: Sequence[str] = ("train", "eval"),
    gradients: bool = True,
    float64: bool = True,
    own_dtype: bool = True,
    rtol: float = 1e-10,
    seed: int = 0,
    must_run: int | None = None,
    copies: bool = True,
) -> Validation:
    """Compare two models on ``examples``, each ``(args, kwargs)``.

    Each example is run in each mode, in float64; where the flags of the original are mixed (some lanes in eval mode), also as
    they are. From the second on (a single one is run twice) both float64 copies hold weights and running statistics that differ by some
    percent from those given: ones, zeros and equal lanes hide mistakes. The first is also run without grad in eval mode, and in the
    models' own dtype; the others in that dtype only where float64 proves nothing.

    In float64 a tensor passes if its relative difference is at most ``rtol``, or no larger than what a change of the last bits
    of the original's weights, inputs and cotangents causes (a bias before a BatchNorm has a gradient of pure rounding), or
    than ``FLOOR`` roundings of the largest tensor of its kind; one that is nothing but rounding in the original may also be off by what
    such a change causes in the fused model. A model that computes in a narrower dtype somewhere inside is measured
    with that dtype's rounding. In the own dtype the bound is ``SLACK`` roundings, or that same change; where float64 has proved the two
    equal, single elements on the edge of a ReLU or a maximum may differ too, as long as the relative norm of all tensors
    of a kind stays below the root of the dtype's eps.

    ``float64=False`` and ``own_dtype=False`` leave one of the two out. ``must_run``: how many examples, from the first, the original
    must accept (default: all); others that it refuses are left out if the fused model refuses them too. ``copies=False``: no copies are
    made of the models, which are compared in place and in their own dtype.

    Raises ``ArgumentError`` for modes other than "train" and "eval", or if there is nothing to compare in.
    """
    unknown = [m for m in modes if m not in ("train", "eval", "given")]
    if unknown or not modes:
        raise ArgumentError(f'validate: modes must be some of "train", "eval", "given"; {list(modes)} came')
    if not (float64 or own_dtype):
        raise ArgumentError("validate: one of float64 and own_dtype must be on")
    start = time.perf_counter()
    with torch.inference_mode(False), torch.enable_grad(), preserved_state(original, fused):
        check = _Check(original, fused, list(examples), rtol, len(examples) if must_run is None else must_run, copies)
        result = check.run(list(modes), gradients, float64, own_dtype, seed)
    result.seconds = time.perf_counter() - start
    return result


@dataclass(frozen=True)
class _Call:
    """One call that both models answer."""

    example: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mode: str
    gradients: bool
    dtype: torch.dtype | None  # None: the model's own
    cotangents: torch.dtype
    seed: int
    requires_grad: bool | None = True
    shake: float = 0.0
    buffers: bool = True
    attributes: tuple[tuple[str, str], ...] = ()
    follow: bool = False

    @property
    def label(self) -> str:
        return self.mode if self.gradients else f"{self.mode} without grad"

    @property
    def precision(self) -> torch.dtype:
        return self.dtype or self.cotangents

    def run(self, model: nn.Module) -> Run:
        return run(
            model,
            self.args,
            self.kwargs,
            mode=self.mode,
            gradients=self.gradients,
            requires_grad=self.requires_grad,
            dtype=self.dtype,
            cotangents=self.cotangents,
            seed=self.seed,
            shake=self.shake,
            buffers=self.buffers,
            attributes=self.attributes,
            follow=self.follow,
        )


@dataclass(frozen=True)
class _Pair:
    """What both models answered to one call."""

    call: _Call
    model: nn.Module  # the original
    other: nn.Module  # the fused one
    original: Run
    fused: Run

    @property
    def eps(self) -> float:
        """One rounding of the narrowest floating dtype that either run computed in."""
        narrow = {d for d in self.original.precisions | self.fused.precisions if not d.is_complex}
        return max(torch.finfo(d).eps for d in narrow | {self.call.precision})

    @cached_property
    def gaps(self) -> dict[tuple[Kind, str], Gap]:
        """How far every tensor of the two runs is apart."""
        return _gaps(self.original, self.fused)


class _Check:
    """The course of one validation; ``result`` fills up."""

    def __init__(
        self, original: nn.Module, fused: nn.Module, examples: list[Example], rtol: float, must_run: int, copied: bool
    ) -> None:
        self.examples, self.rtol, self.must_run = examples, rtol, must_run
        self.result = Validation(rtol=rtol, examples=[_described(*example) for example in examples])
        self.rounding: dict[Kind, Rounding] = {}
        self.proofs: set[str] = set()
        self.casts_follow = False  # do the casts of the float64 copy's programs follow the model to float64?
        self.in_place, self.all_float64, self.several_dtypes = not copied, False, False
        copies = [self._copy(original, "original"), self._copy(fused, "fused model")] if copied else [(original, False), (fused, False)]
        self.copied = all(made for _, made in copies)
        self.original, self.fused = (model for model, _ in copies)

    def _copy(self, model: nn.Module, what: str) -> tuple[nn.Module, bool]:
        try:
            return copy.deepcopy(model), True
        except Exception as error:  # a user's module may hold anything
            self._note(f"the {what} cannot be copied ({_said(error)}): compared in place, in its own dtype only")
            return model, False

    def _doubled(self) -> tuple[nn.Module, nn.Module] | None:
        try:
            one, two = copy.deepcopy(self.original), copy.deepcopy(self.fused)
            for model in (one, two):
                for each in [model, *(module for _, module in unregistered(model))]:
                    each._apply(_double)  # type: ignore[no-untyped-call]
            # Factories make float64 during this comparison, in both models: the recorded dtypes are followed, not required.
            fused_modules.accept_any_dtype(two)
            self.casts_follow = False
        except Exception as error:
            self._note(f"no float64 copy of the models ({_said(error)}): compared in their own dtype only")
            return None
        return one, two

    def run(self, modes: list[str], gradients: bool, float64: bool, own_dtype: bool, seed: int) -> Validation:
        if len({m.training for m in self.original.modules()}) == 2 and "given" not in modes:
            modes = [*modes, "given"]  # some lanes in eval mode: neither train() nor eval() shows that state
        wide = self._doubled() if float64 and self.copied else None
        self.all_float64 = _all_float64(self.original, self.examples)
        self.several_dtypes = len({p.dtype for p in self.original.parameters() if p.is_floating_point()}) > 1
        own = (own_dtype or wide is None) and not (wide is not None and self.all_float64)
        buffers = any(True for _ in self.original.buffers())
        attributes = tuple(fused_modules.attributes_set(self.fused, by_programs=True))
        examples = self.examples if len(self.examples) > 1 or wide is None else self.examples * 2
        for i, (args, kwargs) in enumerate(examples):
            if i == 1 and wide is not None:
                wide = self._other_weights(*wide)
            for mode in modes:
                coarse = coarsest((args, kwargs), self.original)
                call = _Call(
                    i, args, kwargs, mode, gradients, None, coarse, seed + 7919 * i, buffers=buffers, attributes=attributes
                )  # fmt: skip
                if i < GRADIENT_EXAMPLES or mode != "eval":
                    self._compare_both(call, wide, own)
                if mode == "eval" and gradients and (i == 0 or i >= GRADIENT_EXAMPLES):
                    self._compare_both(replace(call, gradients=False), wide, own)
                if i == 0 and gradients and fused_modules.regions(self.fused):
                    self._compare_saved(call)
        self.result.modes = tuple(dict.fromkeys(d.mode for d in self.result.differences))
        self._verdict(modes)
        return self.result

    def _other_weights(self, original: nn.Module, fused: nn.Module) -> tuple[nn.Module, nn.Module] | None:
        """Both float64 copies with other weights: those of new norms are alike in all lanes, and hide which lane is which."""
        try:
            vary_weights(original)
            load_original_state_dict(fused, original_state_dict(original))
        except Exception as error:  # a module may save and load as it likes
            self._note(f"compared with the weights as they are only: others cannot be loaded ({_said(error)})")
            return self._doubled()
        return original, fused

    def _compare_both(self, call: _Call, wide: tuple[nn.Module, nn.Module] | None, own: bool) -> None:
        exact = self._pair_in_float64(call, *wide) if wide is not None else None
        if exact is not None and (self.all_float64 or self.several_dtypes) and _follows_no_dtype(exact):
            exact, own = None, True
        if exact is not None and self.casts_follow and not _same_dtypes(exact):
            self._note(f"float64 left out ({call.label}): some casts follow a tensor's dtype, others do not")
            exact, own = None, True
        proved = exact is not None and self._compare(exact, proved=False) is True and not exact.fused.fallbacks
        if proved:
            self.proofs.add(call.mode)
        inputs = [tensor for tensor in fresh.tensors_in(call.args, call.kwargs) if _inexact(tensor)]
        if call.example == 0 and call.gradients and not all(tensor.requires_grad for tensor in inputs):
            self._compare_as_given(call, wide if exact is not None else None)
        # Rounding is shown on the first example; on the others the own dtype is run only where float64 has proved nothing.
        unseen = exact is not None and not exact.original.usual_strides and call.gradients
        if (own or unseen) and (call.example == 0 or not proved):
            mine = self._pair(call, self.original, self.fused)
            passed = self._compare(mine, proved=proved and not mine.fused.fallbacks)
            if passed is not None:
                self._round(mine, exact)
            if passed and self.all_float64 and not mine.fused.fallbacks:
                self.proofs.add(call.mode)

    def _compare_as_given(self, call: _Call, wide: tuple[nn.Module, nn.Module] | None) -> None:
        """Once more with inputs that need gradients only where the caller's do: which results need one shows in no other call."""
        given = replace(call, requires_grad=None)
        pair = self._pair_in_float64(given, *wide) if wide is not None else self._pair(given, self.original, self.fused)
        one, other = pair.original, pair.fused
        if one.error is not None or other.error is not None:
            return
        for name in one.flags.keys() & other.flags.keys():
            if one.flags[name] != other.flags[name]:
                gap = Gap.lost(f"requires_grad is {other.flags[name]}, in the original {one.flags[name]}")
                self.result.differences.append(_difference(given, "output", name, gap, self.rtol))

    def _compare_saved(self, call: _Call) -> None:
        """A result that the original's backward does not look at again is the caller's to write to before that."""
        original, fused = (results_saved(model, call.args, call.kwargs, mode=call.mode) for model in (self.original, self.fused))
        for name in sorted(fused - original) if original is not None and fused is not None else ():
            gap = Gap.lost(KEPT)
            self.result.differences.append(_difference(call, "output", name, gap, self.rtol))

    def _pair_in_float64(self, call: _Call, original: nn.Module, fused: nn.Module) -> _Pair:
        """Both in float64; recorded casts to their own dtype follow it where the fused model computes more narrowly without."""
        call = replace(call, dtype=torch.float64)
        pair = self._pair(call, original, fused)
        recorded = bool(fused_modules.regions(fused))  # else it is no program of ours, and its dtypes are its own
        if recorded and not self.casts_follow and (not _same_dtypes(pair) or pair.fused.precisions - pair.original.precisions):
            self.casts_follow = True
            fused_modules.accept_any_dtype(fused, casts=call.cotangents)
            pair = self._pair(call, original, fused)
        return pair

    def _pair(self, call: _Call, original: nn.Module, fused: nn.Module) -> _Pair:
        pair = _Pair(call, original, fused, call.run(original), call.run(fused))
        if call.gradients and (pair.original.error is not None or pair.fused.fallbacks):
            # Inputs that require grad may be what the original refuses (it writes to them) or the fused model was not made for.
            call = replace(call, requires_grad=None)
            other = _Pair(call, original, fused, call.run(original), call.run(fused))
            if other.original.error is None and (pair.original.error is not None or not other.fused.fallbacks):
                pair = other
        self.result.fallbacks.update(pair.fused.fallbacks)
        self.result.calls.update(pair.fused.calls)
        self.result.missed.update(pair.fused.missed)
        for op in sorted(pair.original.undefined | pair.fused.undefined):
            self._note(f"{op} drew real random numbers: what depends on it cannot be compared")
        return pair

    def _compare(self, pair: _Pair, *, proved: bool) -> bool | None:
        """Add the differences of one call; True if all passed, None if there was nothing to compare."""
        call, a, b = pair.call, pair.original, pair.fused
        if a.error is not None and call.dtype is not None and self.copied and not self._refuses(call):
            self._note(f"float64 left out ({call.label}): there the original raises {_said(a.error)}")
            return None
        if a.error is not None and b.error is not None:
            if call.example < self.must_run:
                self._note(f"example {call.example} left out ({call.label}): both models raise {_said(a.error)}")
            return None
        if a.error is not None or b.error is not None:
            one, other, error = ("original", "fused model", a.error) if a.error is not None else ("fused model", "original", b.error)
            gap = Gap.lost(f"the {one} raises {_said(error)}, the {other} answers")
            self.result.differences.append(_difference(call, "output", "of the call", gap, self.rtol))
            return False
        bound = self.rtol if call.precision == torch.float64 else SLACK * pair.eps
        found = [_difference(call, kind, name, gap, bound) for (kind, name), gap in pair.gaps.items()]
        if not all(d.ok for d in found):
            found = self._forgive(pair, found, proved)
        found += [_difference(call, "output", name, gap, bound) for name, gap in _shared_otherwise(a, b)]
        if a.drawn != b.drawn:
            found += self._drawn(pair, bound)
        self.result.differences += found
        return all(d.ok for d in found)

    def _drawn(self, pair: _Pair, bound: float) -> list[Difference]:
        """Lanes that share a mask draw fewer numbers; values under fixed numbers cannot show it. What is thrown away is not counted."""
        one, other = (replace(pair.call, follow=True).run(model).drawn for model in (pair.model, pair.other))
        if one == other:
            return []
        gap = Gap.lost(f"{other} random numbers have a part in the results, {one} in the original's: a draw is shared, or one too many")
        return [_difference(pair.call, "output", "random numbers", gap, bound)]

    def _refuses(self, call: _Call) -> bool:
        """Does the original refuse this call in its own dtype as well?"""
        return replace(call, dtype=None, gradients=False).run(self.original).error is not None

    def _forgive(self, pair: _Pair, found: list[Difference], proved: bool) -> list[Difference]:
        """Let pass what is rounding, see ``validate``; the dear measurements only where something is left to explain."""
        sizes, apart = _norms(pair.gaps)
        # Elements on the edge of a ReLU or a maximum jump; once float64 has spoken, the norm decides in the narrower dtype.
        edges = {kind for kind in KINDS if proved and apart[kind] <= pair.eps**0.5}
        found = [replace(d, ok=d.ok or (not d.note and (d.kind in edges or d.max_abs <= FLOOR * pair.eps * sizes[d.kind]))) for d in found]
        noise: dict[tuple[Kind, str], float] = {}
        # In float64 an original that moves by more than a millionth of its size proves nothing: that is chaos, not rounding. A
        # gradient that all of backward takes away again has no size; cotangents of about 1 are what its rounding comes from.
        ceiling = {kind: math.inf if pair.eps > 1e-15 else 1e-6 * sizes[kind] for kind in KINDS}
        for kind in _GRADIENTS:
            ceiling[kind] = max(ceiling[kind], self.rtol)
        for attempt in range(1, SHAKES + 1):
            left = [d for d in found if not d.ok and not d.note]
            if not left or (attempt > 2 and any(d.max_abs > self._most(pair, d.kind, sizes) for d in left)):
                break
            _add(noise, self._noise(pair.call, pair.model, pair.original, pair.eps, attempt))
            found = [
                replace(d, ok=d.ok or (not d.note and d.max_abs <= min(SLACK * noise.get((d.kind, d.name), 0.0), ceiling[d.kind])))
                for d in found
            ]
        return self._forgive_zeros(pair, found, noise, sizes)

    def _most(self, pair: _Pair, kind: Kind, sizes: dict[Kind, float]) -> float:
        """What is further apart than this is not worth more shakes. Gradients: of cotangents of about 1, as above."""
        most = math.sqrt(pair.eps) * sizes[kind]
        return max(most, self.rtol, SLACK * pair.eps) if kind in _GRADIENTS else most

    def _forgive_zeros(
        self, pair: _Pair, found: list[Difference], noise: dict[tuple[Kind, str], float], sizes: dict[Kind, float]
    ) -> list[Difference]:
        """Let pass what is zero but for rounding in the original, and no more than its own rounding in the fused model.

        Of g - sum(g) over one element one kernel makes 0 and another the rounding of two products: an original of exact zeros does
        not move. That the fused model rounds otherwise says nothing against it there; elsewhere its own rounding excuses nothing, or a
        form that loses digits would excuse itself. A wrong number moves with the last bits by some roundings of its own, not by a
        part of itself.
        """
        zero: set[tuple[Kind, str]] = set()
        for (kind, name), gap in pair.gaps.items():
            if gap.scale <= max(SLACK * noise.get((kind, name), 0.0), FLOOR * pair.eps * sizes[kind]):
                zero.add((kind, name))
        own: dict[tuple[Kind, str], float] = {}
        for attempt in range(1, SHAKES + 1):
            left = [d for d in found if not d.ok]
            # One that nothing here can excuse is a failure, whatever becomes of the others.
            if not left or any(d.note or (d.kind, d.name) not in zero or d.max_abs > self._most(pair, d.kind, sizes) for d in left):
                break
            _add(own, self._noise(pair.call, pair.other, pair.fused, pair.eps, attempt))
            found = [replace(d, ok=d.ok or d.max_abs <= SLACK * own.get((d.kind, d.name), 0.0)) for d in found]
        return found

    def _noise(self, call: _Call, model: nn.Module, was: Run, eps: float, attempt: int) -> dict[tuple[Kind, str], float]:
        """How far each tensor of a model moves when weights, inputs and cotangents change by about one rounding."""
        if not (self.copied or self.in_place):
            return {}
        random = torch.Generator().manual_seed(attempt)
        other = model if self.in_place else copy.deepcopy(model)
        with torch.no_grad():
            for p in other.parameters() if not self.in_place else ():
                p.copy_(fresh.shaken(p.detach(), eps, random))
        tree = (call.args, call.kwargs)
        args, kwargs = fresh.shaken(fresh.to_dtype(tree, call.dtype) if call.dtype is not None else tree, eps, random)
        again = replace(call, args=args, kwargs=kwargs, shake=eps).run(other)
        return {key: gap.max_abs for key, gap in _gaps(was, again).items() if not gap.note} if again.error is None else {}

    def _round(self, mine: _Pair, exact: _Pair | None) -> None:
        """Collect rounding in the own dtype: the models against each other, and each against the original in float64."""
        if mine.original.error is not None or mine.fused.error is not None:
            return
        truth: dict[tuple[Kind, str], Any] = {}
        if exact is not None and exact.original.error is None:
            truth = {(kind, name): value for kind, name, value, _, _ in _entries(exact.original, exact.original)}
        rows: list[tuple[Spread, Tensor, Tensor]] = []
        for kind, name, a, b, _ in _entries(mine.original, mine.fused):
            if not (isinstance(a, Tensor) and isinstance(b, Tensor) and _inexact(a) and _inexact(b)):
                continue
            row = self.rounding.setdefault(kind, Rounding(kind, _name(mine.call.precision)))
            rows.append((row.between, a, b))
            known = truth.get((kind, name))
            if isinstance(known, Tensor) and _inexact(known):
                rows += [(row.original, known, a), (row.fused, known, b)]
        for (spread, _, _), gap in zip(rows, distances([(a, b) for _, a, b in rows]), strict=True):
            if not gap.note:
                spread.add(gap)

    def _verdict(self, modes: list[str]) -> None:
        result = self.result
        result.rounding = [self.rounding[kind] for kind in KINDS if kind in self.rounding]
        result.proved = set(modes) <= self.proofs
        result.worst = max(result.differences, key=lambda d: (not d.ok, d.dtype == "float64", d.max_rel), default=None)
        result.ok = bool(result.differences) and all(d.ok for d in result.differences)
        if not result.differences:
            result.reason = "nothing could be compared: " + ("; ".join(result.notes) or "no example was given")
        elif not result.ok:
            result.reason = str(result.worst)

    def _note(self, text: str) -> None:
        if text not in self.result.notes:
            self.result.notes.append(text)


def _add(noise: dict[tuple[Kind, str], float], more: dict[tuple[Kind, str], float]) -> None:
    for key, moved in more.items():
        noise[key] = max(moved, noise.get(key, 0.0))


def _entries(a: Run, b: Run) -> Iterator[tuple[Kind, str, Any, Any, str]]:
    """Kind, name, both values, and what is wrong besides the values."""
    for name in dict.fromkeys([*a.outputs, *b.outputs]):
        x, y = a.outputs.get(name, _MISSING), b.outputs.get(name, _MISSING)
        flags = _flags(x, y) if a.usual_strides else ""
        if not flags and a.flags.get(name) != b.flags.get(name):
            flags = f"requires_grad is {b.flags.get(name)}, in the original {a.flags.get(name)}"
        if not flags and (name in a.bare) != (name in b.bare):
            flags = "has no history, the original's has one" if name in b.bare else "has a history, the original's has none"
        yield "output", name, x, y, flags
    for name, (written, value) in a.inputs.items():
        if name in b.inputs and (written or b.inputs[name][0]):
            yield "output", f"{name} after the call", value, b.inputs[name][1], ""
    parts: tuple[tuple[Kind, dict[str, Any], dict[str, Any]], ...] = (
        ("input gradient", a.input_gradients, b.input_gradients),
        ("parameter gradient", a.parameter_gradients, b.parameter_gradients),
        # A fused model saves tied parameters under names that are not among its parameters: only the original's buffers count.
        ("buffer", a.buffers, {n: t for n, t in b.buffers.items() if n in a.buffers}),
    )
    for kind, ours, theirs in parts:
        for name in dict.fromkeys([*ours, *theirs]):
            x, y = ours.get(name, _MISSING), theirs.get(name, _MISSING)
            if x is not None or y is not None:
                yield kind, name, x, y, ""
    for name in a.unsaved:
        if name in b.unsaved:
            yield "buffer", name, a.unsaved[name], b.unsaved[name], ""


class _Missing:
    def __repr__(self) -> str:
        return "nothing"


_MISSING = _Missing()


def _gaps(a: Run, b: Run) -> dict[tuple[Kind, str], Gap]:
    """How far all that two runs left is apart, by kind and name."""
    found: dict[tuple[Kind, str], Gap] = {}
    pairs: dict[tuple[Kind, str], tuple[Tensor, Tensor]] = {}
    for kind, name, x, y, flag in _entries(a, b):
        gap = _plain_gap(x, y)
        found[kind, name] = gap if gap.note or not flag else replace(gap, note=flag)
        if not gap.note and isinstance(x, Tensor) and isinstance(y, Tensor):
            pairs[kind, name] = x, y
    for key, gap in zip(pairs, distances(list(pairs.values())), strict=True):
        found[key] = gap if gap.note else replace(gap, note=found[key].note)
    return found


def _plain_gap(a: Any, b: Any) -> Gap:
    """Between two leaves, if they are not both tensors; for two tensors only whether they can be subtracted."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = a.dtype == b.dtype and a.device == b.device
        return Gap() if same else _unequal(f"{_name(b.dtype)} on {b.device}", f"{_name(a.dtype)} on {a.device}")
    for one, other in ((a, b), (b, a)):
        if one is None and isinstance(other, Tensor) and not other.count_nonzero():
            return Gap()  # no gradient, and a gradient of zeros: the same to plain gradient descent
    if type(a) is type(b) is float:
        return distances([(torch.tensor([a], dtype=torch.float64), torch.tensor([b], dtype=torch.float64))])[0]
    return Gap() if type(a) is type(b) and bool(a == b) else _unequal(_brief(b), _brief(a))


def _unequal(fused: str, original: str) -> Gap:
    return Gap.lost(f"{fused}, the original has {original}")


def _flags(a: Any, b: Any) -> str:
    """Strides where they can be seen: in dims of more than one element."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or a.shape != b.shape or a.numel() == 0:
        return ""
    if a.layout is not torch.strided or b.layout is not torch.strided:
        return "" if a.layout == b.layout else f"layout {b.layout}, the original has {a.layout}"
    seen = [d for d in range(a.ndim) if a.shape[d] > 1]
    if any(a.stride(d) != b.stride(d) for d in seen):
        return f"strides {b.stride()}, the original has {a.stride()}"
    return ""


def _difference(call: _Call, kind: Kind, name: str, gap: Gap, bound: float) -> Difference:
    rel = gap.max_rel if gap.max_abs < math.inf else math.inf
    return Difference(
        name,
        kind,
        call.label,
        call.example,
        _name(call.precision),
        gap.max_abs,
        gap.mean_abs,
        rel,
        gap.histogram,
        ok=not gap.note and rel <= bound,
        note=gap.note,
    )


def _norms(gaps: dict[tuple[Kind, str], Gap]) -> tuple[dict[Kind, float], dict[Kind, float]]:
    """By kind: the largest absolute value, and the relative L2 distance of all floating tensors together."""
    sizes, squares, norms = (dict.fromkeys(KINDS, 0.0) for _ in range(3))
    for (kind, _), gap in gaps.items():
        sizes[kind] = max(sizes[kind], gap.scale)
        squares[kind] += gap.squares
        norms[kind] += gap.norm
    # Gradients of both kinds come from the same cotangents; one kind alone may be nothing but rounding.
    sizes["input gradient"] = sizes["parameter gradient"] = max(sizes["input gradient"], sizes["parameter gradient"])
    return sizes, {kind: (squares[kind] / max(norms[kind], 1e-300)) ** 0.5 for kind in KINDS}


def _inexact(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _double(tensor: Tensor) -> Tensor:
    return tensor.to(fresh.wider(tensor.dtype, torch.float64))


def _shared_otherwise(original: Run, fused: Run) -> Iterator[tuple[str, Gap]]:
    """Results that share memory with others than in the original: a caller who writes into one would see it elsewhere, or miss it."""
    for name in {**original.sharing, **fused.sharing}:
        one, other = original.sharing.get(name), fused.sharing.get(name)
        if one != other:
            said = [f"shares memory with {first}" if first is not None else "has memory of its own" for first in (other, one)]
            yield name, Gap.lost(f"{said[0]}, the original's {said[1]}")


def _same_dtypes(pair: _Pair) -> bool:
    """Are results of one dtype in both models, where both give them?"""
    one, other = pair.original, pair.fused
    if one.error is not None or other.error is not None:
        return True
    pairs = [(value, other.outputs.get(name)) for name, value in one.outputs.items()]
    return all(a.dtype == b.dtype for a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor))


def _follows_no_dtype(pair: _Pair) -> bool:
    """Does the fused model not answer because its dtypes are not the model's (float32 angles in float64, a backbone in float32)?

    The comparison in float64 lets a program follow the model there; where it cannot, the program as it was recorded counts.
    """
    missed = any(" has dtype " in reason for reason in pair.fused.fallbacks)
    return pair.original.error is None and (pair.fused.error is not None or missed)


def _all_float64(model: nn.Module, examples: Sequence[Example]) -> bool:
    tensors = [*model.parameters(), *model.buffers(), *(t for example in examples for t in fresh.tensors_in(*example))]
    return all(t.dtype in (torch.float64, torch.complex128) for t in tensors if t.is_floating_point() or t.is_complex())


def _described(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    tensors = fresh.tensors_in(args, kwargs)
    text = ", ".join(f"{list(t.shape)} {_name(t.dtype)}" for t in tensors[:3])
    return text + (f" and {len(tensors) - 3} more" if len(tensors) > 3 else "") if tensors else "no tensors"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _brief(value: Any) -> str:
    text = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _said(error: BaseException | None) -> str:
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
