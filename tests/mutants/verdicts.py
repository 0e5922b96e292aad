"""Is a fused model still the original? An answer that shares no code with ``fxfuse.checking.validate``.

Comes in: a model, its fused form, inputs. Goes out: the first difference as a sentence, "" where there is none. Compared are the state
dict by the original's names, outputs, gradients of inputs and parameters, and buffers afterwards, in train and eval mode, with the
weights as they are and with others loaded by the original's names.
"""

from __future__ import annotations

import copy
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import checks
import fxfuse
from fxfuse.fused import regions
from fxfuse.passes.emit import Emitter
from fxfuse.weights import packing
from mutants.subjects import Subject

RTOL = 1e-9


@dataclass
class Fused:
    """What ``optimize`` gave: whether anything is fused, and the first difference from the original."""

    fused: bool
    difference: str

    @property
    def wrong(self) -> bool:
        """Does it compute something else?"""
        return bool(self.difference)


def fuse(subject: Subject, validate: bool) -> Fused:
    """Fuse and compare, on the example and on other data."""
    model, example = subject.model(), subject.inputs(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            fused = optimized(subject, model, example, validate)
        except Exception as error:  # a bug may raise anywhere: no number is wrong then
            return Fused(False, "" if not validate else f"optimize raises {type(error).__name__}: {error}")
        if not fxfuse.report(fused).fused:
            return Fused(False, difference(model, fused, [example]))
        return Fused(True, difference(model, fused, [example, subject.inputs(1)]))


def optimized(subject: Subject, model: nn.Module, example: tuple[Any, ...], validate: bool) -> nn.Module:
    """All that is legal, fused, in the subject's lowering; nothing is measured."""
    choose = Emitter.choose

    def chosen(emitter: Emitter, bundle: Any, options: tuple[str, ...]) -> str:
        choose(emitter, bundle, options)
        return options[min(subject.option, len(options) - 1)]

    Emitter.choose = chosen  # type: ignore[method-assign]
    try:
        return fxfuse.optimize(model, example, objective="launches", tune=False, validate=validate)
    finally:
        Emitter.choose = choose  # type: ignore[method-assign]


LOUD = "its weights cannot be loaded or saved"


def silent(said: str) -> str:
    """What ``difference`` said, or "" where the user hears of it by an exception: there is nothing for validation to catch."""
    return "" if said.startswith(LOUD) else said


def difference(model: nn.Module, fused: nn.Module, trials: Sequence[tuple[Any, ...]], kwargs: dict[str, Any] | None = None) -> str:
    """The first difference, or "". Neither model is changed. A warning is none, in a test neither, where it is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _difference(model, fused, trials, kwargs)


def _difference(model: nn.Module, fused: nn.Module, trials: Sequence[tuple[Any, ...]], kwargs: dict[str, Any] | None) -> str:
    one, other = copy.deepcopy(model), copy.deepcopy(fused)
    for drawn in (False, True):
        if drawn:
            _draw(one)
        try:
            if drawn:
                fxfuse.load_original_state_dict(other, one.state_dict())
            saved = fxfuse.original_state_dict(other)
        except Exception as error:
            return f"{LOUD}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        said = _unequal("state dict", saved, one.state_dict(), exact=True)
        for training in (True, False):
            one.train(training)
            other.train(training)
            for trial in trials:
                where = f"{'train' if training else 'eval'}{', other weights' if drawn else ''}: "
                said = said or _called(one, other, trial, kwargs or {}, where)
                if said:
                    return said
    return ""


def _called(one: nn.Module, other: nn.Module, trial: tuple[Any, ...], kwargs: dict[str, Any], where: str) -> str:
    try:
        expected = _run(one, trial, kwargs, lambda: {n: p.grad for n, p in one.named_parameters()})
    except Exception:  # data that the original refuses shows nothing
        return ""
    try:
        got = _run(other, trial, kwargs, lambda: _gradients(other))
    except Exception as error:
        return f"{where}the fused model raises {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    for what in expected:
        said = _unequal(what, got[what], expected[what])
        if said:
            return where + said
    said = _unequal("buffer", dict(fxfuse.original_state_dict(other)), dict(one.state_dict()))
    return where + said if said else ""


def _gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """By the original's names; of a model where nothing is fused without what finds lanes in packs, which may be what is wrong."""
    return packing.original_gradients(model) if regions(model) else {n: p.grad for n, p in model.named_parameters()}


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], gradients: Callable[[], Any]) -> dict[str, dict[str, Any]]:
    def leaf(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().clone().requires_grad_(value.is_floating_point() or value.is_complex())

    torch.manual_seed(0)
    model.zero_grad(set_to_none=True)
    args, kwargs = tree_map(leaf, (args, kwargs))
    outputs = tree_leaves(checks.plain(model(*args, **kwargs)))
    generator = torch.Generator().manual_seed(17)
    ends = [out for out in outputs if isinstance(out, Tensor) and out.requires_grad]
    starts = [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype) for out in ends]
    if ends:
        torch.autograd.backward(ends, starts)
    inputs = [value.grad for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor) and value.requires_grad]
    numbered = [{str(i): value for i, value in enumerate(values)} for values in (outputs, inputs)]
    return {"output": numbered[0], "gradient of input": numbered[1], "gradient of": gradients()}


def _draw(model: nn.Module) -> None:
    """Other weights and statistics, no two alike; counters too."""
    generator = torch.Generator().manual_seed(23)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() or parameter.is_complex():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
        for name, buffer in model.named_buffers():
            if buffer.is_floating_point():
                buffer.copy_(torch.rand(buffer.shape, generator=generator, dtype=torch.float64) + 0.5)
            elif name.endswith("num_batches_tracked"):
                buffer.copy_(torch.randint(9, (), generator=generator))


def _unequal(what: str, got: dict[str, Any], expected: dict[str, Any], exact: bool = False) -> str:
    if list(got) != list(expected):
        return f"{what}: other names, {sorted(set(got) ^ set(expected))}"
    sizes = [float(v.detach().abs().max()) for v in expected.values() if isinstance(v, Tensor) and v.numel() and v.is_floating_point()]
    largest = max((size for size in sizes if size < float("inf")), default=0.0)
    for name, want in expected.items():
        have = got[name]
        if have is None or want is None:
            present = have if want is None else want
            if not (present is None or (isinstance(present, Tensor) and not present.any())):  # a lane of a pack has zeros for None
                return f"{what} {name}: {'nothing' if have is None else 'something'}"
        elif not isinstance(want, Tensor):
            if have != want:
                return f"{what} {name}: {have!r} instead of {want!r}"
        elif have.shape != want.shape or have.dtype != want.dtype:
            return f"{what} {name}: {tuple(have.shape)} {have.dtype} instead of {tuple(want.shape)} {want.dtype}"
        elif exact or not (want.is_floating_point() or want.is_complex()):
            if not torch.equal(have, want) and not (exact and bool(((have == want) | (have != have)).all())):
                return f"{what} {name}: not the same"
        else:
            wide = want.dtype in (torch.float64, torch.complex128)
            size = float(want.detach().abs().nan_to_num(0, 0, 0).max()) if want.numel() else 0.0
            rtol = RTOL if wide else 1e-4
            if not torch.allclose(have, want, rtol=0, atol=max(rtol * size, rtol * 1e-4 * largest), equal_nan=True):
                return f"{what} {name}: {float((have - want).abs().max()):.2g} apart, of {size:.2g}"
    return ""


class Late(BaseException):
    """No ``Exception``: those are caught at every level, by fxfuse and by the comparison."""


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """A bug may loop for ever: ``Late`` after so many seconds of the processor (others work on it, too), and again each second."""

    def late(*_: Any) -> None:
        raise Late(f"longer than {seconds} s")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
