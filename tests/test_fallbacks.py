"""Calls that do not fit what was recorded: the original's answer and gradients, the reason in a sentence, and ``strict`` raises it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from checks import QUICK, assert_close, mlp, own_gradients, randn, randomized
from fxfuse.errors import FallbackError
from fxfuse.recording import tracer


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(mlp() for _ in range(4))

    def forward(self, x: Tensor, y: Tensor | None = None, scale: float = 1.0, *, mask: Tensor | None = None, flag: bool = False) -> Tensor:
        out = torch.cat([net(x[..., i : i + 1]) for i, net in enumerate(self.nets)], -1)
        out = out if y is None else out + y
        out = out if mask is None else out * mask
        return out.flip(0) * scale if flag else out * scale


X, Y = randn(5, 4), randn(5, 4, seed=2)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def in_default_dtype(model: nn.Module) -> Tensor:
    with default_dtype(torch.float64):
        return model(X)


def one_lane_in_eval(model: nn.Module) -> Tensor:
    model.nets[1].eval()
    try:
        return model(X)
    finally:
        model.nets[1].train()


def bigger(model: nn.Module) -> Tensor:
    return model(torch.cat([X, X[:, :2]], 1))


def said(form: str) -> str:
    return f"called with {form}, recorded 1 positional argument (1 values)"


CALLS: dict[str, tuple[Callable[[nn.Module], Any], str | None]] = {
    "as recorded": (lambda m: m(X), None),
    "by keyword": (lambda m: m(x=X), None),
    "defaults spelled out": (lambda m: m(X, None, 1.0, mask=None, flag=False), None),
    "another batch": (lambda m: m(randn(3, 4)), None),
    "no rows": (lambda m: m(X[:0]), None),
    "other strides": (lambda m: m(X.t().contiguous().t()), None),
    "a parameter": (lambda m: m(nn.Parameter(X)), None),
    "a batch dim more": (lambda m: m(torch.stack([X, Y])), "input 0 has shape (2, 5, 4), recorded (any, 4)"),
    "a batch dim less": (lambda m: m(X[0]), "input 0 has shape (4,), recorded (any, 4)"),
    "more columns": (bigger, "input 0 has shape (5, 6), recorded (any, 4)"),
    "an optional argument": (lambda m: m(X, Y), said("2 positional arguments (2 values)")),
    "an optional argument by name": (lambda m: m(X, y=Y), said("1 positional argument and y (2 values)")),
    "a number": (lambda m: m(X, scale=2.0), said("1 positional argument and scale (2 values)")),
    "an int for a float": (lambda m: m(X, scale=1), said("1 positional argument and scale (2 values)")),
    "a mask": (lambda m: m(X, mask=Y > 0), said("1 positional argument and mask (2 values)")),
    "a flag": (lambda m: m(X, flag=True), said("1 positional argument and flag (2 values)")),
    "a subclass": (lambda m: m(X.as_subclass(nn.Buffer)), "input 0 is a Buffer, recorded a plain tensor"),
    "another default dtype": (in_default_dtype, "the default dtype is torch.float64, recorded torch.float32"),
    "one lane in eval mode": (one_lane_in_eval, "no program was recorded with nets.1 in eval mode and others not"),
    "another dtype": (lambda m: m(X.float()), "packed.nets.0.bias has dtype torch.float64, input 0 has torch.float32"),
    "integers": (lambda m: m(X.long()), "input 0 has dtype torch.int64, recorded torch.float64"),
    "too many arguments": (lambda m: m(X, Y, 1.0, 2.0), said("4 positional arguments (4 values)")),
    "no such argument": (lambda m: m(X, weights=Y), said("1 positional argument and weights (2 values)")),
}  # fmt: skip


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, nn.Module]:
    model = randomized(Model())
    return model, fxfuse.optimize(model, X, objective="launches", **QUICK)


def answered(model: nn.Module, call: Callable[[nn.Module], Any]) -> tuple[Any, dict[str, Tensor | None]]:
    """The result, or the type of the exception, and all gradients by the original's names."""
    model.zero_grad()
    try:
        out = call(model)
    except Exception as error:
        return type(error), {}
    (out.as_subclass(Tensor) * torch.linspace(1, 2, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
    fused = hasattr(type(model), "_fxfuse_forward")
    return out.detach(), fxfuse.weights.packing.original_gradients(model) if fused else own_gradients(model)


@pytest.mark.parametrize("name", CALLS)
def test_the_answer_and_why(pair: tuple[nn.Module, nn.Module], name: str) -> None:
    call, reason = CALLS[name]
    model, fused = pair
    before = fxfuse.report(fused).fallbacks.copy()
    (got, gradients), (want, expected) = answered(fused, call), answered(model, call)
    if not isinstance(want, Tensor):
        assert got is want
    else:
        assert type(got) is type(want)
        assert_close(got.as_subclass(Tensor), want.as_subclass(Tensor), "output")
        for weight, grad in expected.items():
            assert_close(gradients[weight], grad, weight)
    after = fxfuse.report(fused).fallbacks.copy()
    after.subtract(before)
    assert {text: n for text, n in after.items() if n} == ({} if reason is None else {reason: 1})


@pytest.mark.parametrize("name", CALLS)
def test_strict_says_the_same(pair: tuple[nn.Module, nn.Module], name: str) -> None:
    call, reason = CALLS[name]
    strict = fxfuse.optimize(pair[0], X, objective="launches", strict=True, **QUICK)
    if reason is None:
        call(strict)
        return
    with pytest.raises(FallbackError) as raised:
        call(strict)
    assert str(raised.value) == f"Model would run its loop: {reason}"


def test_batch_sizes_without_recording_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomized(Model())
    fused = fxfuse.optimize(model, X, objective="launches", **QUICK)

    def fails(*args: Any) -> Any:
        raise AssertionError("recorded again")

    monkeypatch.setattr(tracer, "record", fails)
    for rows in (0, 1, 2, 10_000, 3, 64):
        for training in (True, False):
            x = randn(rows, 4, seed=rows)
            (got, gradients), (want, expected) = answered(fused.train(training), lambda m, x=x: m(x)), answered(
                model.train(training), lambda m, x=x: m(x)
            )
            assert_close(got, want, f"{rows} rows")
            for weight, grad in expected.items():
                assert_close(gradients[weight], grad, f"{rows} rows: {weight}")
    assert not fxfuse.report(fused).fallbacks
