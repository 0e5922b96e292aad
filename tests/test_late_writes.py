"""Weights written in place between forward and backward: torch raises for the loop, and for lanes that are packed where they lie."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from test_backend import nam
from torch import Tensor, nn
from torch._dynamo import compiled_autograd

import fxfuse
from checks import assert_close, randn

pytestmark = [pytest.mark.usefixtures("fresh_dynamo"), pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")]
WRITTEN = "modified by an inplace operation"


def doubled(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)


def one_lane_doubled(model: nn.Module) -> None:
    with torch.no_grad():
        list(model.parameters())[10].mul_(2)


def stepped(model: nn.Module) -> None:
    torch.optim.SGD(model.parameters(), 0.1).step()


def loaded(model: nn.Module) -> None:
    model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()})


def by_backend(model: nn.Module) -> Callable[[Tensor], Tensor]:
    call: Callable[[Tensor], Tensor] = torch.compile(model, backend=fxfuse.backend("aot_eager"))
    return call


def by_optimize(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return fxfuse.optimize(model, tune=False)  # by its first call: Parameters stay


WRITES = [doubled, one_lane_doubled, stepped, loaded]


def in_compiled_autograd() -> AbstractContextManager[Any]:
    return compiled_autograd._enable(torch.compile(backend="eager"))


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize(
    ("door", "around"),
    [(by_backend, nullcontext), (by_backend, in_compiled_autograd), (by_optimize, nullcontext)],
    ids=["backend", "backend, compiled autograd", "optimize"],
)
def test_torch_says_so(door: Any, around: Any, write: Callable[[nn.Module], None]) -> None:
    for fused in (False, True):
        model = nam()
        call = door(model) if fused else model
        x = randn(6, 10)
        for _ in range(2):
            with around():
                call(x).square().sum().backward()
        out = call(x)
        write(model if not isinstance(call, nn.Module) or door is by_backend else call)
        with pytest.raises(RuntimeError, match=WRITTEN), around():
            out.square().sum().backward()
        for parameter in call.parameters() if isinstance(call, nn.Module) else ():
            parameter.grad = None
        with around():  # and goes on
            call(x).square().sum().backward()


@pytest.mark.parametrize("door", [by_backend, by_optimize])
def test_writes_before_the_call_are_no_late_ones(door: Any) -> None:
    model, twin = nam(), nam()
    call, x = door(model), randn(6, 10)
    call(x)
    for _ in range(3):
        for each in (model if door is by_backend else call, twin):
            doubled(each)
        out = call(x)
        assert_close(out, twin(x), "output")
        out.square().sum().backward()


def test_a_transform_of_optimized_lanes() -> None:
    model, twin = nam(), nam()
    call, x = by_optimize(model), randn(6, 10)
    call(x)

    assert_close(torch.vmap(call)(x[None])[0], twin(x), "output")

    def loss(net: Any) -> Callable[[Tensor], Tensor]:
        return lambda x: net(x).square().sum()

    assert_close(torch.func.grad(loss(call))(x), torch.func.grad(loss(twin))(x), "gradient")
    assert_close(torch.func.vjp(loss(call), x)[1](torch.ones((), dtype=x.dtype))[0], torch.func.grad(loss(twin))(x), "gradient")


@pytest.mark.parametrize("door", [by_backend, by_optimize])
def test_nothing_of_a_call_stays(door: Any) -> None:
    call, x = door(nam()), randn(6, 10)
    call(x)
    gc.collect()
    gc.disable()
    try:
        out = call(x)
        node = weakref.ref(out.grad_fn) if door is by_backend else None
        kept = weakref.ref(out)
        del out
        assert kept() is None
        assert node is None or node() is None
    finally:
        gc.enable()
