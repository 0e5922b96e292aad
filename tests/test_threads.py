"""Threads: two that optimize, two that call, one that optimizes while another trains; and what of one thread must not reach another."""

from __future__ import annotations

import copy
import queue
import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from everything import assert_unchanged, everything
from small_loops import KINDS
from torch import Tensor, nn

import fxfuse
from checks import QUICK, assert_close, own_gradients, randn
from fxfuse.models.quiet import quiet

LAUNCHES: dict[str, Any] = {"objective": "launches", **QUICK}


@contextmanager
def often_switched() -> Iterator[None]:
    """Threads take turns a thousand times as often as usual."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


def together(*works: Callable[[], Any]) -> list[Any]:
    """All at once; their results, or the first exception that any of them raised."""
    results: list[Any] = [None] * len(works)
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(works))

    def run(index: int, work: Callable[[], Any]) -> None:
        try:
            barrier.wait()
            results[index] = work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=each) for each in enumerate(works)]
    with often_switched():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    assert not any(thread.is_alive() for thread in threads), "a thread waits for ever"
    if errors:
        raise errors[0]
    return results


def answer(model: nn.Module, x: tuple[Any, ...]) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Outputs, and gradients by ``torch.autograd.grad``: another thread may be using the same Parameters."""
    out = model(*x)
    out = out if isinstance(out, Tensor) else torch.cat([o.flatten() for o in out])
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(out.square().sum(), list(parameters.values()), allow_unused=True)
    return out.detach(), dict(zip(parameters, grads))


def assert_answers(got: Any, expected: Any, where: str) -> None:
    assert_close(got[0], expected[0], where)
    assert list(got[1]) == list(expected[1])
    for name in expected[1]:
        assert_close(got[1][name], expected[1][name], f"{where}: {name}", floor=1e-12)


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.stress)])
def test_threads_optimize_different_models(count: int) -> None:
    made = [KINDS[kind]() for kind in ("columns", "conv_norm", "experts", "attention")[:count]]
    before = [everything(model) for model, _ in made]
    filters, usual = list(warnings.filters), nn.Module.to
    fused = together(*(lambda m=m, x=x: fxfuse.optimize(m, x(1, 6), objective="launches") for m, x in made))
    for (model, inputs), each in zip(made, fused):
        assert fxfuse.report(each).fused, str(fxfuse.report(each))
        assert not [refusal for refusal in fxfuse.report(each).refused if "fxfuse failed" in str(refusal)]
        assert_close_outputs(each.eval(), copy.deepcopy(model).eval(), inputs(5, 3))
    assert warnings.filters == filters
    assert nn.Module.to is usual
    for (model, _), was in zip(made, before):
        assert_unchanged({**was, "process": None}, {**everything(model), "process": None})


def assert_close_outputs(one: nn.Module, other: nn.Module, x: tuple[Any, ...]) -> None:
    a, b = one(*x), other(*x)
    for got, want in zip(a if isinstance(a, list) else [a], b if isinstance(b, list) else [b]):
        assert_close(got, want, "output")


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.stress)])
def test_threads_optimize_one_model(count: int) -> None:
    """Trial runs silence its hooks; when all are done, the hooks are there."""
    model, inputs = KINDS["columns"]()
    seen: list[str] = []
    model.head.register_forward_hook(lambda *_: seen.append("forward"))
    model.head.weight.register_hook(lambda grad: seen.append("gradient"))
    before = everything(model)
    options: dict[str, Any] = {"objective": "launches", "validate": False}  # verification runs the copies' hooks
    for _ in range(2):
        results = together(*(lambda: fxfuse.optimize(model, inputs(1, 6), **options) for _ in range(count)))
        assert all(fxfuse.report(each).fused for each in results)
        assert_unchanged({**before, "process": None}, {**everything(model), "process": None})
        assert not seen
    model.zero_grad()
    model(*inputs(2, 3)).sum().backward()
    assert seen == ["forward", "gradient"]


@pytest.mark.parametrize("kind", ["columns", "conv_norm", "embeddings"])
def test_threads_call_one_fused_model(kind: str) -> None:
    model, inputs = KINDS[kind]()
    fused = fxfuse.optimize(model, inputs(1, 6), **LAUNCHES).eval()
    cases = [inputs(seed, rows) for seed, rows in enumerate((6, 3, 1, 9))]
    expected = [answer(fused, x) for x in cases]
    for x, (out, _) in zip(cases, expected):
        assert_close(out, answer(model.eval(), x)[0], "alone")

    def call(x: tuple[Any, ...], wanted: Any) -> None:
        for _ in range(8):
            assert_answers(answer(fused, x), wanted, "in a thread")
            with torch.no_grad():
                assert_close(fused(*x), wanted[0], "without grad")

    together(*(lambda x=x, w=w: call(x, w) for x, w in zip(cases, expected)))
    assert not fxfuse.report(fused).fallbacks


def test_threads_call_a_model_whose_calls_do_not_fit() -> None:
    """Beside calls that run the program, calls that run the loop; and one thread keeps making the model look again."""
    model, inputs = KINDS["columns"]()
    fused = fxfuse.optimize(model, inputs(1, 6), **LAUNCHES)
    fits = inputs(3, 5)
    wide = (torch.cat([fits[0], fits[0]], 1),)  # more columns than were recorded: the loop reads the first four
    expected = answer(model, fits), answer(model, wide)

    def call(x: tuple[Any, ...], wanted: Any) -> None:
        for _ in range(20):
            assert_close(answer(fused, x)[0], wanted[0], "in a thread")

    def look() -> None:
        for _ in range(60):
            fused.train()
            fused.zero_grad()
            list(fused.named_parameters())

    names = [name for name, _ in fused.named_children()]
    together(lambda: call(fits, expected[0]), lambda: call(wide, expected[1]), lambda: call(wide, expected[1]), look)
    assert sum(fxfuse.report(fused).fallbacks.values()) == 40
    assert [name for name, _ in fused.named_children()] == names


def test_threads_walk_a_container_that_is_a_region() -> None:
    class Heads(nn.ModuleList):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([net(x) for net in self], 1)

    model = Heads(nn.Linear(3, 2) for _ in range(4)).double()
    fused = fxfuse.optimize(model, randn(5, 3), **LAUNCHES)
    assert fxfuse.report(fused).fused
    parameters = [name for name, _ in fused.named_parameters()]
    wide = randn(2, 3).requires_grad_()

    def walk() -> None:
        for _ in range(200):
            assert len(list(fused)) == len(fused) == 4
            assert [name for name, _ in fused.named_parameters()] == parameters
            assert_close(fused(wide).detach(), expected, "meanwhile")

    expected = model(wide).detach()
    together(walk, walk, walk)
    assert not fxfuse.report(fused).fallbacks


def test_threads_save_by_original_names_while_others_train() -> None:
    model, inputs = KINDS["conv_norm"]()
    fused = fxfuse.optimize(model, inputs(1, 6), **LAUNCHES)
    names = [name for name, _ in fused.named_parameters()]
    expected = list(model.state_dict())

    def save() -> None:
        for _ in range(30):
            assert list(fxfuse.original_state_dict(fused)) == expected

    def train() -> None:
        for seed in range(30):
            fused(*inputs(seed, 4)).sum().backward()

    together(save, save, train)
    assert [name for name, _ in fused.named_parameters()] == names


@pytest.mark.parametrize("kind", ["columns", "unequal", "conv_norm"])
def test_two_first_calls_at_once(kind: str) -> None:
    for attempt in range(3):
        model, inputs = KINDS[kind]()
        model.eval()
        fused = fxfuse.optimize(model, objective="launches", tune=False)
        cases = [inputs(attempt, 5), inputs(attempt + 1, 5)]
        got = together(*(partial(answer, fused, x) for x in cases))
        for x, each in zip(cases, got):
            expected = answer(model, x)
            assert_answers(each, expected, "the first call")
            assert_answers(answer(fused, x), expected, "the next")
        fused(*cases[0])
        assert fxfuse.report(fused).fused
        assert "forward" not in vars(fused)


def test_a_first_call_beside_somebody_else_s_optimize_does_not_wait() -> None:
    """A model inside of which a thread waits for another's first call would wait for ever if that call waited for the model."""
    model, inputs = KINDS["columns"]()
    lazy = fxfuse.optimize(model, objective="launches", tune=False)
    x, results = inputs(1, 5), queue.SimpleQueue()  # a list would be put back as it was: recordings leave no trace

    class Outer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            thread = threading.Thread(target=lambda: results.put(lazy(x.detach())))
            thread.start()
            thread.join(60)
            assert not thread.is_alive()
            return x * 2

    fxfuse.optimize(Outer(), x[0], **LAUNCHES)
    assert not results.empty()
    while not results.empty():
        each = results.get()
        assert each.shape == (each.shape[0], 2)
    lazy(*x)
    assert fxfuse.report(lazy).fused


@pytest.mark.parametrize("copied", [False, True])
def test_threads_bind_shared_parameters_once(copied: bool) -> None:
    """Where data were replaced, the next call packs them anew; two such calls at once must not leave one with the other's buffer."""
    model, inputs = KINDS["columns"]()
    fused = fxfuse.optimize(model, objective="launches", tune=False, inplace=False)
    x = inputs(1, 6)
    fused(*x)
    assert fxfuse.report(fused).fused
    for attempt in range(15):
        if copied:
            fused = copy.deepcopy(fused)
        with torch.no_grad():
            for parameter in fused.parameters():
                parameter.data = parameter.data.clone() + 0.01 * attempt
        expected = answer(fxfuse.unfuse(fused), x)
        for each in together(*[partial(answer, fused, x)] * 3):
            assert_answers(each, expected, "bound anew")
        with torch.no_grad():
            for parameter in fused.parameters():
                parameter.mul_(1.5)  # in place, as an optimizer does
        assert_answers(answer(fused, x), answer(fxfuse.unfuse(fused), x), "written since")


def test_ordinary_work_beside_optimize_is_neither_recorded_nor_broken() -> None:
    """Another thread trains, sets default dtypes of its own, warns, measures lengths, moves modules, uses function modes."""
    from torch.overrides import TorchFunctionMode

    model, inputs = KINDS["conv_norm"]()
    other, others_inputs = KINDS["columns"]()
    reference = copy.deepcopy(other)
    stop, steps = threading.Event(), []

    class Counting(TorchFunctionMode):
        calls = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Counting.calls += 1
            return func(*args, **(kwargs or {}))

    def step(each: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        optimizer.zero_grad()
        each.to(torch.float64)
        x = others_inputs(seed, 4)
        assert len(x[0]) == 4
        assert type(len(x[0])) is int
        (each(*x).square().mean()).backward()
        optimizer.step()

    def work() -> int:
        optimizer, seed, heard = torch.optim.SGD(other.parameters(), 0.05), 0, 0
        while not stop.is_set() or seed < 20:
            with Counting():
                before = Counting.calls
                step(other, optimizer, seed)
                assert Counting.calls > before
            try:
                warnings.warn("heard", UserWarning, stacklevel=1)  # an error here, by the settings of these tests
            except UserWarning:
                heard += 1
            assert torch.zeros(1).dtype is torch.float32
            assert not torch.is_inference_mode_enabled()
            assert torch.is_grad_enabled()
            seed += 1
        assert heard == seed, "warnings were lost"
        steps.append(seed)
        return seed

    def optimize() -> list[nn.Module]:
        try:
            return [fxfuse.optimize(model, inputs(1, 6), objective="launches") for _ in range(2)]
        finally:
            stop.set()

    fused, _ = together(optimize, work)
    optimizer = torch.optim.SGD(reference.parameters(), 0.05)
    for seed in range(steps[0]):
        step(reference, optimizer, seed)
    for name, tensor in reference.state_dict().items():
        assert_close(other.state_dict()[name], tensor, name, rtol=1e-9)
    alone = fxfuse.optimize(model, inputs(1, 6), objective="launches")
    for each in fused:
        assert fxfuse.report(each).fused[0].ops == fxfuse.report(alone).fused[0].ops
        assert str(fxfuse.graph(each)[""].code) == str(fxfuse.graph(alone)[""].code)
        assert fxfuse.report(each).validation is not None
    assert own_gradients(other)


def test_quiet_is_for_one_thread_and_leaves_no_filter() -> None:
    filters = list(warnings.filters)
    inside, outside = threading.Event(), threading.Event()

    def muted() -> None:
        with quiet():
            inside.set()
            outside.wait(10)
            warnings.warn("unheard", stacklevel=1)

    thread = threading.Thread(target=muted)
    thread.start()
    inside.wait(10)
    with pytest.warns(UserWarning, match="heard"):
        warnings.warn("heard", stacklevel=1)
    caught = warnings.catch_warnings()  # entered while the other is quiet, left afterwards: the copy that it puts back has its filter
    caught.__enter__()
    outside.set()
    thread.join()
    caught.__exit__(None, None, None)
    with pytest.warns(UserWarning, match="heard again"):
        warnings.warn("heard again", stacklevel=1)
    with quiet():  # the next tidies up
        pass
    warnings.filters[:] = [each for each in warnings.filters if each in filters]
    assert warnings.filters == filters


def test_interrupted_threads_leave_nothing_locked() -> None:
    model, inputs = KINDS["columns"]()

    class Interrupt(BaseException):
        pass

    class Stops(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise Interrupt

    state = random.getstate()
    with pytest.raises(Interrupt):
        fxfuse.optimize(Stops(), inputs(1, 6)[0])
    (fused,) = together(lambda: fxfuse.optimize(model, inputs(1, 6), **LAUNCHES))
    assert fxfuse.report(fused).fused
    assert random.getstate() == state
