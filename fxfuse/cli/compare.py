"""Are two things that can be called equal, in numbers?

Comes in: the answers to some calls, and another thing to call. Goes out: ``Comparison``. Unlike ``fxfuse.verify``, which looks into two
models of one class, this compares whatever runs: a model, a program of torch.export, an ONNX file. So outputs count, with ``gradients``
also those of the inputs and of parameters that both have under one name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from fxfuse.checking.difference import distance
from fxfuse.checking.runs import coarsest, named_leaves
from fxfuse.models import inputs as fresh
from fxfuse.models.determinism import Derandomized, preserved_state
from fxfuse.private.pytree import tree_map_only
from fxfuse.weights.packing import original_gradients

from .failure import CommandError, said
from .prepare import described
from .specs import Call

RTOL = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
MOST_MOVED = 1e-2  # a model whose outputs move by more for the last bits of its inputs is compared by this: by its own noise all is equal
SLACK = 8  # times what a change of the inputs' last bits causes, is still rounding


@dataclass(frozen=True)
class Row:
    """One tensor of one call: how far the two are apart. ``max_rel``: the largest difference over the largest value."""

    call: str
    name: str
    max_abs: float
    max_rel: float
    bound: float
    ok: bool
    note: str = ""

    @property
    def badness(self) -> tuple[bool, float]:
        """Larger for what is further from its bound."""
        return not self.ok, self.max_rel / self.bound if self.bound else self.max_rel


@dataclass
class Comparison:
    """All tensors of all calls."""

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Nothing differs by more than rounding, and something was compared."""
        return bool(self.rows) and all(row.ok for row in self.rows)

    @property
    def worst(self) -> Row | None:
        """The tensor that is furthest from its bound."""
        return max(self.rows, key=lambda row: row.badness, default=None)

    def sentence(self) -> str:
        """The verdict in one line."""
        if self.worst is None:
            return "nothing could be compared" + (f": {self.notes[0]}" if self.notes else "")
        calls = len({row.call for row in self.rows})
        count = f"{len(self.rows)} tensor{'s' if len(self.rows) != 1 else ''} of {calls} call{'s' if calls != 1 else ''}"
        if self.ok:
            return f"equal: {count}, largest relative difference {self.worst.max_rel:.1e} at {self.worst.name}"
        what = self.worst.note or f"relative difference {self.worst.max_rel:.1e}, {self.worst.bound:.0e} allowed"
        return f"NOT equal: {self.worst.name} for {self.worst.call}: {what}"

    def to_dict(self) -> dict[str, Any]:
        """Data for ``json.dumps``."""
        rows = [{key: str(v) if v in (float("inf"),) or v != v else v for key, v in asdict(row).items()} for row in self.rows]
        return {"ok": self.ok, "verdict": self.sentence(), "tensors": rows, "notes": self.notes}


@dataclass(frozen=True)
class Expected:
    """What one call gave: its tensors and numbers, and how far they move when the inputs move by their last bits."""

    call: Call
    answers: dict[str, Any]
    moved: dict[str, float]


def fresh_calls(call: Call, *, seed: int, other_batches: bool) -> list[Call]:
    """The call itself, other data of as many rows and, with ``other_batches``, calls of 1, n+1 and 2n+1 rows."""
    rows = fresh.batch_size(*call)
    calls = [call, fresh.resample(*call, seed=seed + 1)]
    if other_batches and rows:
        sizes = [size for size in (1, rows + 1, 2 * rows + 1) if size != rows]
        calls += [fresh.resample(*call, batch=size, seed=seed + 2 + size) for size in sizes]
    return calls


def expected(
    model: Callable[..., Any], calls: list[Call], *, gradients: bool = False, seed: int = 0, name: str = "the model"
) -> list[Expected]:
    """What ``model`` answers to each call. The first must be answered, others that it refuses are left out. Raises ``CommandError``."""
    found = []
    for i, call in enumerate(calls):
        try:
            answers = answers_of(model, call, gradients=gradients, seed=seed)
            eps = torch.finfo(_precision(model, call)).eps
            shaken = answers_of(model, fresh.shaken(call, eps, torch.Generator().manual_seed(seed)), gradients=gradients, seed=seed)
        except Exception as error:
            if i == 0:
                raise CommandError(f"{name} cannot be called with {described(call)}: {said(error)}; check --inputs") from None
            continue
        moved = {name: distance(answers[name], shaken[name]).max_rel for name in answers if isinstance(answers[name], Tensor)}
        found.append(Expected(call, answers, moved))
    return found


def answers_of(model: Callable[..., Any], call: Call, *, gradients: bool, seed: int) -> dict[str, Any]:
    """The tensors and numbers that a call gives, by place. Random ops give fixed numbers; nothing of the model stays changed."""
    args, kwargs = fresh.clone_inputs(call, requires_grad=gradients)
    parts = [model] if isinstance(model, nn.Module) else []
    parameters = [p for part in parts for p in part.parameters()]
    grads = [p.grad for p in parameters]
    random = Derandomized()
    with preserved_state(*parts), torch.set_grad_enabled(gradients):
        for p in parameters:
            p.grad = None
        try:
            with random:
                out = model(*args, **kwargs)
            leaves = [leaf for _, leaf in named_leaves(out, "") if isinstance(leaf, (Tensor, int, float))]
            found: dict[str, Any] = {f"output {i}" if len(leaves) > 1 else "the output": leaf for i, leaf in enumerate(leaves)}
            if gradients:
                found.update(_gradients(parts, leaves, (args, kwargs), seed))
            return {name: leaf.detach() if isinstance(leaf, Tensor) else leaf for name, leaf in found.items()}
        finally:
            for p, grad in zip(parameters, grads, strict=True):
                p.grad = grad


def _gradients(parts: list[nn.Module], outputs: list[Any], call: Call, seed: int) -> dict[str, Tensor]:
    ends = [leaf for leaf in outputs if isinstance(leaf, Tensor) and leaf.requires_grad]
    random = torch.Generator().manual_seed(seed)
    starts = [torch.randn(end.shape, generator=random, dtype=torch.float64).to(end.dtype).to(end.device) for end in ends]
    if not ends:
        return {}
    torch.autograd.backward(ends, starts)
    leaves = [*named_leaves(call[0], "input"), *named_leaves(call[1], "input")]
    found = {f"gradient of {name}": leaf.grad for name, leaf in leaves if isinstance(leaf, Tensor) and leaf.grad is not None}
    for part in parts:
        found.update({f"gradient of {name}": grad for name, grad in original_gradients(part).items() if grad is not None})
    return found


def compare(
    expectations: list[Expected], other: Callable[..., Any], *, rtol: float | None = None, gradients: bool = False, seed: int = 0
) -> Comparison:
    """What ``other`` answers to the same calls, against what was expected. A call that it refuses is a difference."""
    result = Comparison()
    for want in expectations:
        label = described(want.call)
        try:
            got = answers_of(other, want.call, gradients=gradients, seed=seed)
        except Exception as error:
            result.rows.append(Row(label, "the call", float("inf"), float("inf"), 0.0, False, f"it raises {said(error)}"))
            continue
        outputs = [sum(not name.startswith("gradient") for name in each) for each in (want.answers, got)]
        if outputs[0] != outputs[1]:
            note = f"{outputs[1]} output{'s' if outputs[1] != 1 else ''}, {outputs[0]} expected"
            result.rows.append(Row(label, "the outputs", float("inf"), float("inf"), 0.0, False, note))
            continue
        for name, value in want.answers.items():
            if name in got:
                result.rows.append(_row(label, name, value, got[name], rtol, want, other))
    return result


def _row(label: str, name: str, want: Any, got: Any, rtol: float | None, call: Expected, other: Any) -> Row:
    if not isinstance(want, Tensor) or not isinstance(got, Tensor):
        want, got = (value if isinstance(value, Tensor) else torch.as_tensor(value) for value in (want, got))
        same = torch.equal(want.double(), got.double())
        far = 0.0 if same else float("inf")
        return Row(label, name, far, far, 0.0, same, "" if same else f"{got}, not {want}")
    exact = not (want.is_floating_point() or want.is_complex())
    rounding = max(RTOL[_precision(other, call.call, want)], min(SLACK * call.moved.get(name, 0.0), MOST_MOVED))
    bound = 0.0 if exact else rounding if rtol is None else rtol
    gap = distance(want, got)
    return Row(label, name, gap.max_abs, gap.max_rel, bound, gap.max_rel <= bound, gap.note)


def _precision(model: Any, call: Call, *tensors: Tensor) -> torch.dtype:
    """The narrowest floating dtype in sight: what the model computes in."""
    parts = model if isinstance(model, nn.Module) else nn.Module()
    dtypes = [coarsest(call, parts), *(t.dtype for t in tensors if t.dtype in RTOL)]
    return max(dtypes, key=lambda d: torch.finfo(d).eps)


def on_device(call: Call, device: torch.device) -> Call:
    """The arguments on another device."""
    return cast(Call, tree_map_only(Tensor, lambda t: t.to(device), call))
