"""Is a fused subject right, and how many launches did it save?

Comes in: a ``Subject``. Goes out: ``Outcome``. Fused with ``objective="launches"`` and compared with its original in float64: outputs,
input gradients and every parameter's gradient by name, buffers, in train and eval mode, on data and batch sizes that nobody has shown
to fxfuse.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

import checks
import fxfuse
from fxfuse.launches import Launches, count
from fxfuse.weights import packing
from zoo.registry import Subject

RTOL = 1e-10
FLOOR = 64 * torch.finfo(torch.float64).eps  # of the largest tensor of its kind: a bias before a BatchNorm has a gradient of pure rounding
SINGLE = 1e-5  # where the model itself computes in float32 somewhere inside, whatever its parameters are


@dataclass
class Outcome:
    """What fusing one subject gave."""

    subject: Subject
    before: Launches
    after: Launches
    report: fxfuse.Report
    wrong: list[str] = field(default_factory=list)  # empty: right
    compared: int = 0  # calls of which everything was compared

    @property
    def share(self) -> float:
        """Of the heavy launches above the bound, the part that is gone; 1.0 where there was none to remove."""
        above = self.before.heavy - self.before.bound
        return (self.before.heavy - self.after.heavy) / above if above else 1.0


def fuse(subject: Subject, **options: Any) -> tuple[nn.Module, nn.Module]:
    """The original, without dropout, and its fused form."""
    model = subject.model(dropout=False)
    args, kwargs = subject.inputs()
    return model, fxfuse.optimize(model, args, example_kwargs=kwargs, **{"objective": "launches", "tune": False, **options})


def check(subject: Subject) -> Outcome:
    """Fuse, compare, count."""
    model, fused = fuse(subject)
    args, kwargs = subject.inputs()
    counts = []
    for each in (model.eval(), fused.eval()):
        with torch.no_grad():
            counts.append(count(lambda each=each: each(*args, **kwargs)))
    report = fxfuse.report(fused)
    outcome = Outcome(subject, *counts, report)
    rows = subject.file.ROWS
    for number, size in enumerate(dict.fromkeys((rows, 1, rows // 2 + 1))):
        for training in (True, False):
            difference = compare(model, fused, subject.inputs(size, seed=10 + number), training)
            if difference is not None:
                outcome.compared += 1
                outcome.wrong += [f"{'train' if training else 'eval'}, {size} rows: {each}" for each in difference]
    return outcome


def compare(
    model: nn.Module, fused: nn.Module, inputs: Any, training: bool, *, rtol: float | None = None, floor: float = FLOOR,
) -> list[str] | None:
    """What differs in one call and its backward; None where the original itself refuses the call (one row in a BatchNorm).

    ``rtol``: None finds out whether the model computes in float32 inside.
    """
    model.train(training)
    fused.train(training)
    state = packing.original_state_dict(fused)
    saved = copy.deepcopy(state), copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    try:
        want = checks.run(model, *inputs, checks.own_gradients)
    except (ValueError, RuntimeError, IndexError):
        model.load_state_dict(saved[1])
        return None
    torch.manual_seed(3)
    got = checks.run(fused, *inputs, packing.original_gradients)
    if rtol is None:
        rtol = SINGLE if narrow(want.outputs, model) else RTOL
    found = [] if got.spec == want.spec else [f"another output structure: {got.spec} against {want.spec}"]
    for kind, names, actual, expected in (
        ("output", range(len(want.outputs)), got.outputs, want.outputs),
        ("gradient of input", range(len(want.inputs)), got.inputs, want.inputs),
        ("gradient of", want.parameters, [got.parameters.get(name) for name in want.parameters], list(want.parameters.values())),
        ("buffer", *_buffers(model, fused)),
    ):
        found += differences(kind, names, actual, expected, rtol, floor)
    fxfuse.load_original_state_dict(fused, saved[0])
    model.load_state_dict(saved[1])
    return found


def _buffers(model: nn.Module, fused: nn.Module) -> tuple[list[str], list[Tensor], list[Tensor]]:
    state = packing.original_state_dict(fused)
    expected = {name: buffer for name, buffer in model.named_buffers() if name in state}
    return list(expected), [state[name] for name in expected], list(expected.values())


def differences(kind: str, names: Any, actual: list[Any], expected: list[Any], rtol: float, floor: float = FLOOR) -> list[str]:
    """One line per tensor that is off by more than ``rtol`` of its largest element and by more than ``floor``."""
    tensors = [want for want in expected if isinstance(want, Tensor) and want.numel()]
    largest = max((want.abs().max().item() for want in tensors), default=0.0)
    found = []
    for name, got, want in zip(names, actual, expected, strict=True):
        if not isinstance(want, Tensor):
            if got is not want and got != want:
                found.append(f"{kind} {name} is {describe(got)}, expected {want!r}")
            continue
        if not isinstance(got, Tensor) or got.shape != want.shape or got.dtype != want.dtype:
            found.append(f"{kind} {name}: {describe(got)}, expected {describe(want)}")
            continue
        if not want.numel():
            continue
        if want.is_floating_point() and torch.equal(got.isnan(), want.isnan()):  # nan where the original has it is right
            got, want = got.nan_to_num(), want.nan_to_num()
        error = (got - want).abs().max().item() if want.is_floating_point() or want.is_complex() else float(not torch.equal(got, want))
        if not error <= max(rtol * want.abs().max().item(), floor * largest):
            found.append(f"{kind} {name} is off by {error:.2g}, its largest element is {want.abs().max().item():.2g}")
    return found


def narrow(outputs: list[Any], model: nn.Module) -> bool:
    """Whether a float64 model computes in float32 somewhere: it says so by its outputs, or by tensors it holds."""
    held = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    return any(isinstance(t, Tensor) and t.dtype in (torch.float32, torch.complex64) for t in tree_flatten((outputs, held))[0])


def describe(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
