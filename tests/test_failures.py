"""Whatever fails inside fxfuse, nobody loses a model: exceptions are raised in every function that ``optimize`` calls, one at a time.

What comes back computes the same; the original is, to the bit, what it was, in place too; the report says what to tell a bug tracker.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import pytest
import torch
from everything import assert_unchanged, everything
from small_loops import KINDS
from torch import Tensor, nn

import fxfuse
from checks import assert_close, mlp, model_of, own_gradients, randn, randomized
from fxfuse.passes.rules import RULES

X = randn(5, 4)


class Injected(Exception):
    pass


class Interrupted(BaseException):
    pass


def new() -> nn.Module:
    """A loop in a submodule, buffers, gradients, hooks, a tied weight: all that a rewrite in place could leave half done."""
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.after(self.loop(x))

    def loop(self: Any, x: Tensor) -> Tensor:
        return torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1)

    def predict(self: Any, x: Tensor) -> Tensor:
        return self.loop(x) * 2

    nets = nn.ModuleList(nn.Sequential(nn.Linear(1, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 1)) for _ in range(4))
    model = model_of(forward, loop=model_of(loop, nets=nets), after=nn.Linear(4, 4))
    type(model).predict = predict  # type: ignore[attr-defined]
    model = randomized(model)
    model(X).sum().backward()
    model.register_forward_hook(lambda *_: None)
    next(model.parameters()).register_hook(lambda grad: grad)
    return model


def functions() -> dict[str, list[tuple[dict[str, Any] | type, str, FunctionType]]]:
    """Every function and method of fxfuse by its full name, with all the places where it is found by a name."""
    assert all(hasattr(fxfuse, name) for name in fxfuse.__all__)  # which imports what is behind them
    modules = [module for name, module in sorted(sys.modules.items()) if name.split(".")[0] == "fxfuse"]
    found: dict[str, list[tuple[Any, str, FunctionType]]] = {}
    for module in modules:
        for name, value in vars(module).items():
            if isinstance(value, FunctionType) and value.__module__.startswith("fxfuse."):
                found.setdefault(f"{value.__module__}.{value.__qualname__}", []).append((vars(module), name, value))
            if isinstance(value, type) and value.__module__ == module.__name__:
                for key, method in vars(value).items():
                    if isinstance(method, FunctionType) and not key.startswith("__"):
                        found.setdefault(f"{value.__module__}.{method.__qualname__}", []).append((value, key, method))
    return found


# The way back itself, what only describes, and the functions that users call: these may say what is wrong by raising.
LEFT_OUT = ("fxfuse.models.undo.", "fxfuse.optimize.optimize", "fxfuse.optimize.explain", "fxfuse.failure.failed", "fxfuse.pipeline.run")
FUNCTIONS = {name: places for name, places in functions().items() if not name.startswith(LEFT_OUT)}


@contextmanager
def watching(name: str, call: Callable[[int], None]) -> Iterator[list[int]]:
    """``call(n)`` comes before the n-th call of the function."""
    calls = [0]
    function = FUNCTIONS[name][0][2]

    @functools.wraps(function)
    def watched(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        call(calls[0])
        return function(*args, **kwargs)

    def put(place: Any, key: str, value: Any) -> None:
        setattr(place, key, value) if isinstance(place, type) else place.__setitem__(key, value)

    rules = {key: rule for key, rule in RULES.items() if rule.vectorize is function}
    for place, key, _ in FUNCTIONS[name]:
        put(place, key, watched)
    for key, rule in rules.items():
        RULES[key] = type(rule)(**{**vars(rule), "vectorize": watched})
    try:
        yield calls
    finally:
        for place, key, original in FUNCTIONS[name]:
            put(place, key, original)
        RULES.update(rules)


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "copied": lambda model: fxfuse.optimize(model, X, objective="launches"),
    "inplace": lambda model: fxfuse.optimize(model, X, objective="launches", inplace=True),
    "methods": lambda model: fxfuse.optimize(model, X, methods=["predict"], objective="launches", tune=False),
    "timed": lambda model: fxfuse.optimize(model, X, max_memory=10**8, inplace=True),
}


def first_call(model: nn.Module) -> nn.Module:
    fused = fxfuse.optimize(model, objective="launches", tune=False, inplace=True)
    fused(X)
    return fused


WAYS["first call"] = first_call


def called(way: str) -> list[tuple[str, int]]:
    """The functions that this way calls, and how often; those that a call of the fused model uses are left out of its first call."""
    counts: dict[str, int] = {}
    place_of = {id(value.__code__): name for name, places in FUNCTIONS.items() for _, _, value in places}

    def see(frame: Any, event: str, arg: Any) -> None:
        if event == "call" and id(frame.f_code) in place_of:
            name = place_of[id(frame.f_code)]
            counts[name] = counts.get(name, 0) + 1

    model = new()
    sys.setprofile(see)
    try:
        fused = WAYS[way](model)
        fusing = dict(counts)
        fused(X)
    finally:
        sys.setprofile(None)
    assert fxfuse.report(fused).fused
    if way != "first call":
        return sorted(fusing.items())
    return sorted((name, 2 * count - counts[name]) for name, count in fusing.items() if 2 * count > counts[name])


def assert_works(model: nn.Module, expected: nn.Module, where: str) -> None:
    """The same results and gradients, in both modes, on another batch size too."""
    for training in (True, False):
        model.train(training)
        expected.train(training)
        for rows in (5, 3):
            results = []
            for each, gradients in ((model, fxfuse.weights.packing.original_gradients), (expected, own_gradients)):
                each.zero_grad()
                x = X[:rows].clone().requires_grad_()
                out = each(x)
                out.square().sum().backward()
                results.append((out.detach(), x.grad, gradients(each)))
            (a, b, c), (d, e, f) = results
            assert_close(a, d, f"{where}: output")
            assert_close(b, e, f"{where}: input gradient", floor=1e-12)
            for name in f:
                assert_close(c[name], f[name], f"{where}: gradient of {name}", floor=1e-9)


def fail_in(name: str, at: int, way: str, error: type[BaseException]) -> bool:
    """Raise in one call of one function; True where that happened."""
    def raise_at(count: int) -> None:
        if count == at:
            raise error("injected")

    model = new().train(way != "first call")  # whose call writes running statistics, as it should
    expected = copy.deepcopy(model)
    before, where = everything(model), f"{error.__name__} in call {at} of {name}, {way}"
    happened = False
    with watching(name, raise_at) as calls:
        try:
            result = WAYS[way](model)
        except (Interrupted, MemoryError):
            assert not issubclass(error, Injected), where
            result = model
            model.__dict__.pop("forward", None)  # of ``optimize(model)``: it would try again at its next call
            assert_unchanged(before, everything(model), where)
        happened = calls[0] >= at
    if result is not model or not fxfuse.report(result).fused:
        model.__dict__.pop("forward", None)
        assert_unchanged(before, everything(model), where)
    if happened and not fxfuse.report(result).fused and issubclass(error, Injected):
        report = fxfuse.report(result)
        assert report.refused or report.notes, where
        failed = [refusal for refusal in report.refused if "fxfuse failed" in str(refusal)]
        if failed:
            assert "Injected: injected" in str(failed[0]), where
            assert any(note.startswith("for a bug report: ") and "test_failures" in note for note in report.notes), where
    assert_works(result, expected, where)
    return happened


def some(way: str, every: int) -> list[tuple[str, int]]:
    """Of what this way calls, one function in ``every``; the stress run takes them all."""
    return called(way)[sorted(WAYS).index(way) % every :: every]


@pytest.mark.parametrize("way", ["inplace", "methods", "first call"])
def test_a_failure_anywhere_leaves_a_working_model(way: str) -> None:
    assert sum([fail_in(name, 1, way, Injected) for name, _ in some(way, 110)]) > 1


@pytest.mark.parametrize("way", ["inplace", "first call"])
def test_a_late_failure_in_place_leaves_nothing_behind(way: str) -> None:
    """The last call of what runs while the model is rewritten."""
    running = tuple(f"fxfuse.running.{name}." for name in ("region", "install", "runtime"))
    places = ("fxfuse.fused.", *running, "fxfuse.weights.lane.", "fxfuse.weights.alias.")
    late = [(name, count) for name, count in called(way) if name.startswith(places)]
    assert len(late) > 20
    assert sum([fail_in(name, count, way, Injected) for name, count in late[::24]]) > 1


@pytest.mark.parametrize("error", [Interrupted, MemoryError])
@pytest.mark.parametrize("way", ["inplace", "first call"])
def test_what_is_no_failure_of_ours_passes_through(way: str, error: type[BaseException]) -> None:
    assert sum([fail_in(name, max(1, count // 2), way, error) for name, count in some(way, 150)]) > 0


@pytest.mark.stress
@pytest.mark.parametrize("error", [Injected, Interrupted, MemoryError])
@pytest.mark.parametrize("way", WAYS)
def test_every_function_at_its_first_and_last_call(way: str, error: type[BaseException]) -> None:
    tried = 0
    for name, count in called(way):
        for at in {1, count}:
            tried += fail_in(name, at, way, error)
    print(f"{way}, {error.__name__}: {tried} calls failed, {len(called(way))} functions")
    assert tried > 200


def test_the_interrupted_first_call_is_tried_again() -> None:
    def interrupt(count: int) -> None:
        if count == 1:
            raise KeyboardInterrupt

    model = new()
    expected = copy.deepcopy(model)
    fused = fxfuse.optimize(model, objective="launches", tune=False, inplace=True)
    with watching("fxfuse.running.install._operate", interrupt):
        with pytest.raises(KeyboardInterrupt):
            fused(X)
        fused(X)
    assert fxfuse.report(fused).fused
    expected(X)
    assert_works(fused, expected, "the second call")


# -- the original -----------------------------------------------------------------------------------------------------------------


LATER = pytest.mark.stress
MANY: list[tuple[str, dict[str, Any]]] = [(kind, {"objective": "launches"}) for kind in ("conv_norm", "frozen", "raw_weights")]
MANY += [pytest.param(kind, {"objective": "launches"}, marks=LATER) for kind in KINDS]  # type: ignore[misc]
TIMED = [{"mode": "infer"}, {"tune_for": [3, 9], "max_memory": 10**8}]


@pytest.mark.parametrize(
    ("kind", "options"), [*MANY, ("columns", TIMED[0]), *(pytest.param(k, o, marks=LATER) for k in ("conv_norm", "experts") for o in TIMED)]
)
def test_the_original_is_left_to_the_bit(kind: str, options: dict[str, Any]) -> None:
    model, inputs = KINDS[kind]()
    for parameter in list(model.parameters())[::2]:
        parameter.grad = torch.randn_like(parameter)
        parameter.mark = "mine"  # type: ignore[attr-defined]
    list(model.modules())[1].eval()
    model.note = {"list": [1, randn(2)], "calls": 0}
    x = inputs(1, 6)
    for each in x:
        if each.is_floating_point():
            each.requires_grad_()
    before, given = everything(model), [everything(nn.ParameterList()), [(id(each), each.clone(), each.grad) for each in x]]
    fxfuse.optimize(model, x, **options)
    assert_unchanged(before, everything(model), kind)
    assert all(torch.equal(each, was) and each.grad is grad for each, (_, was, grad) in zip(x, given[1]))


@pytest.mark.parametrize("switch", ["grad", "inference", "dtype", "deterministic", "profile", "warnings"])
def test_the_switches_of_the_process_are_left_as_they_are(switch: str) -> None:
    import warnings

    model, x = new(), X
    seen: list[str] = []
    with warnings.catch_warnings():
        try:
            if switch == "dtype":
                torch.set_default_dtype(torch.float64)
            elif switch == "deterministic":
                torch.use_deterministic_algorithms(True, warn_only=True)
            elif switch == "profile":
                sys.setprofile(lambda frame, event, arg: seen.append(event) if len(seen) < 9 else None)
            elif switch == "warnings":
                warnings.filterwarnings("always", "mine")
                warnings.filterwarnings("error", category=DeprecationWarning)
            with torch.set_grad_enabled(switch != "grad"), torch.inference_mode(switch == "inference"):
                before = everything(model)
                fused = fxfuse.optimize(model, x, objective="launches")
                assert_unchanged(before, everything(model), switch)
        finally:
            torch.set_default_dtype(torch.float32)
            torch.use_deterministic_algorithms(False)
            sys.setprofile(None)
    assert fxfuse.report(fused).fused
    assert (len(seen) == 9) is (switch == "profile")


def test_inside_of_a_profiler_s_range() -> None:
    """Where memory cannot be measured, because PyTorch runs one profiler at a time."""
    model = new()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True):
        fused = fxfuse.optimize(model, X, objective="launches")
    (plan,) = fxfuse.report(fused).fused
    assert plan.peak_bytes is None
    assert_works(fused, model, "under a profiler")


def test_a_failing_report_does_not_cost_the_model() -> None:
    """Even what says that something failed may fail."""
    model = new()

    def always(count: int) -> None:
        raise Injected("injected")

    with watching("fxfuse.store.set_report", always):
        result = fxfuse.optimize(model, X, objective="launches")
    assert_works(result, model, "without a report")


def test_an_argument_that_is_found_wrong_late_leaves_the_model() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1) @ torch.ones(4, 4).double()

    model = randomized(model_of(forward, nets=nn.ModuleList(mlp() for _ in range(4))))
    before = everything(model)
    with pytest.raises(fxfuse.ArgumentError, match="tune_for: the model does not take these inputs"):
        fxfuse.optimize(model, X, tune_for=(randn(5, 9, 2),), inplace=True)
    assert_unchanged(before, everything(model))
