"""Small gains have to show twice: in the medians and in the quickest runs, then in the whole model. Less is left as a loop."""

from __future__ import annotations

import copy
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from checks import assert_equal_models, randn, randomized

X = randn(5, 8)
plan = import_module("fxfuse.planning.plan")
pipeline = import_module("fxfuse.pipeline")


class Nets(nn.Module):
    def __init__(self, lanes: int = 8) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1)) for _ in range(lanes))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1)


class Two(nn.Module):
    """Two regions: the second has another number of lanes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Nets(8), Nets(4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(x))[:, :4])
        return out


def times(monkeypatch: pytest.MonkeyPatch, median: float, least: float | None, seen: bool = True) -> list[str]:
    """The loop takes a millisecond, all others what is said; what was asked for. ``least`` is None: nobody may ask."""
    asked: list[str] = []

    def quickest(functions: Any) -> list[float]:
        asked.append("quickest")
        assert least is not None
        return [1e-3, least * 1e-3]

    monkeypatch.setattr(plan, "as_usual", lambda planner, choice: choice)
    monkeypatch.setattr(plan, "medians", lambda functions, budget: [1e-3] + [median * 1e-3] * (len(functions) - 1))
    monkeypatch.setattr(plan, "quickest", quickest)
    monkeypatch.setattr(plan.Planner, "_seen", lambda planner, choice: seen)
    return asked


@pytest.mark.parametrize(
    ("median", "least", "seen", "fuses"),
    [
        (0.9, 1.1, True, False), (0.9, 0.9, True, True), (0.9, 0.6, True, True), (0.98, 0.9, True, True), (0.98, 0.97, True, False),
        (0.7, None, True, True), (0.7, 1.05, False, False), (0.7, 0.9, False, True), (0.4, None, False, True),
    ],
)  # fmt: skip
def test_in_the_medians_and_in_the_quickest_runs(monkeypatch: Any, median: float, least: float | None, seen: bool, fuses: bool) -> None:
    asked = times(monkeypatch, median, least, seen)
    monkeypatch.setattr(pipeline, "times_faster", lambda *_: 2.0)
    report = fxfuse.report(fxfuse.optimize(randomized(Nets()), X, cache=False))
    assert bool(report.fused) is fuses
    assert bool(asked) is (least is not None)
    if not fuses:
        slower = max(median, least or 0.0) if median < 0.95 else least or 0.0
        assert f"left as a loop: packed runs {1 / slower:.2f}x" in str(report.refused[0])


@pytest.mark.parametrize(
    ("looks", "seen", "fuses"),
    [
        ((1.4,), True, True), ((1.2, 1.2, 0.8), True, True), ((1.2, 0.9, 0.8), True, False),
        ((1.4, 1.4, 1.4), False, False), ((1.6, 1.5, 1.2), False, True), ((2.1,), False, True),
    ],
)  # fmt: skip
def test_long_steps(monkeypatch: Any, looks: tuple[float, ...], seen: bool, fuses: bool) -> None:
    """The middle of three looks decides; what the static model does not see has to gain more."""
    times(monkeypatch, 1.0, None, seen)
    left = list(looks)
    monkeypatch.setattr(plan, "medians", lambda functions, budget: [0.1] * len(functions) if budget != 0.5 else [0.1, 0.1 / left.pop(0)])
    monkeypatch.setattr(pipeline, "times_faster", lambda *_: 2.0)
    report = fxfuse.report(fxfuse.optimize(randomized(Nets()), X, cache=False))
    assert not left
    assert bool(report.fused) is fuses, report.refused
    assert fuses or ("nothing in its shapes says why" in str(report.refused[0])) is (sorted(looks)[len(looks) // 2] > 1.05)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("gain", "fuses"), [(0.9, False), (0.99, True), (1.2, True)])
def test_in_the_whole_model(monkeypatch: Any, gain: float, fuses: bool, inplace: bool) -> None:
    times(monkeypatch, 0.9, 0.9)
    monkeypatch.setattr(pipeline, "times_faster", lambda *_: gain)
    model = randomized(Nets())
    want = model(X)
    fused = fxfuse.optimize(model, X, cache=False, inplace=inplace)
    report = fxfuse.report(fused)
    assert bool(report.fused) is fuses
    if not fuses:
        assert str(report.refused[0]).startswith("left as a loop: 0.90x in the whole model")
    torch.testing.assert_close(fused(X), want, rtol=1e-12, atol=1e-12)


def test_what_is_sure_is_not_asked_again(monkeypatch: Any) -> None:
    times(monkeypatch, 0.5, None)

    def never(*_: Any) -> float:
        raise AssertionError("the whole model is timed")

    monkeypatch.setattr(pipeline, "times_faster", never)
    assert fxfuse.report(fxfuse.optimize(randomized(Nets()), X, cache=False)).fused


def test_only_what_is_not_sure_is_left(monkeypatch: Any) -> None:
    times(monkeypatch, 0.5, None)
    real = plan.Planner.decide

    def decide(self: Any, choice: Any) -> Any:
        decided = real(self, choice)
        decided.sure = self.prepared.lifted.frame.path == "first"
        return decided

    monkeypatch.setattr(plan.Planner, "decide", decide)
    monkeypatch.setattr(pipeline, "times_faster", lambda *_: 0.9)
    model = randomized(Two())
    fused = fxfuse.optimize(model, X, cache=False)
    report = fxfuse.report(fused)
    assert [each.path for each in report.fused] == ["first"]
    assert [each.region for each in report.refused] == ["second"]
    assert_equal_models(model, fused, [(X, {}), (randn(3, 8, seed=4), {})])


def test_it_is_remembered(monkeypatch: Any) -> None:
    times(monkeypatch, 0.9, 0.9)
    asked: list[int] = []
    monkeypatch.setattr(pipeline, "times_faster", lambda *_: asked.append(1) or 0.9)
    model = randomized(Nets())
    first, second = (fxfuse.report(fxfuse.optimize(model, X)) for _ in range(2))
    assert (first.fused, second.fused, len(asked)) == ([], [], 1)
    assert second.refused[0].reason == f"{first.refused[0].reason}, measured in an earlier run"


class Counting(Nets):
    """Its forward sets an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = super().forward(x)
        return self.last


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_the_model_that_was_given_is_not_called(monkeypatch: Any, mode: Any) -> None:
    times(monkeypatch, 0.9, 0.9)
    model, given = randomized(Counting()), []
    real = pipeline.times_faster

    def measured(original: nn.Module, *rest: Any) -> float:
        given.append(original)
        real(original, *rest, budget=0.01)
        return 1.5

    monkeypatch.setattr(pipeline, "times_faster", measured)
    fused = fxfuse.optimize(model, X, mode=mode, cache=False)
    assert fxfuse.report(fused).fused
    assert len(given) == 1
    assert given[0] is not model
    assert model.last is None
    assert fused.last is None


class Forward(Nets):
    """A forward whose backward raises."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        kept = out.exp()
        kept.add_(1.0)
        return kept


def test_a_model_without_a_backward_is_timed_forward(monkeypatch: Any) -> None:
    staying = import_module("fxfuse.planning.staying")
    model = randomized(Forward())
    with pytest.raises(RuntimeError):
        model(X).sum().backward()
    entry = import_module("fxfuse.running.entries").Entry("forward", (X,), {})
    assert staying.times_faster(model, randomized(Forward()), entry, True, budget=0.01) > 0


def test_without_validation_too(monkeypatch: Any) -> None:
    times(monkeypatch, 0.9, 0.9)
    monkeypatch.setattr(pipeline, "times_faster", lambda *_: 0.9)
    report = fxfuse.report(fxfuse.optimize(randomized(Nets()), X, validate=False, cache=False))
    assert not report.fused


def test_gradients_live_until_the_next_step(monkeypatch: Any) -> None:
    """As they do in training: memory that is all free goes back to the system, which slows whoever needs it next."""
    alive: list[list[int]] = []
    real = plan.medians

    def medians(functions: Any, budget: float) -> Any:
        for function in functions:
            held = function.__closure__
            function()
            alive.append([len(cell.cell_contents) for cell in held if isinstance(cell.cell_contents, list) and cell.cell_contents])
        return real(functions, budget=0.0)

    monkeypatch.setattr(plan, "medians", medians)
    fxfuse.optimize(randomized(Nets()), X, mode="train", cache=False)
    assert alive
    assert all(any(size >= 4 for size in sizes) for sizes in alive)


class Writing(nn.Module):
    """Its own code writes all that no program of its part knows of; the part fuses."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.scale = Nets(), nn.Parameter(torch.full((8,), 2.0))
        self.calls, self.seen, self.memory, self.plain = 0, [], torch.zeros(8).double(), [nn.BatchNorm1d(8).double()]

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(len(x))
        with torch.no_grad():
            self.scale.mul_(0.9)
        y = self.part(x)
        self.memory.add_(y.detach().mean(0))
        out: Tensor = self.plain[0](y * self.scale) + self.memory
        return out

    def state(self) -> list[Any]:
        return [self.calls, self.seen, self.scale.detach().clone(), self.memory.clone(), *self.plain[0].state_dict().values()]


def assert_equal_states(one: Any, other: Any, what: str) -> None:
    for got, want in zip(one.state(), other.state(), strict=True):
        assert torch.equal(got, want) if isinstance(want, Tensor) else got == want, f"{what}: {got} for {want}"


@pytest.mark.parametrize("options", [{}, {"inplace": True}, {"objective": "launches", "tune": False}], ids=["tuned", "inplace", "launches"])
@pytest.mark.parametrize("mode", ["train", "infer"])
def test_what_a_model_s_own_code_writes_is_written_by_calls_alone(monkeypatch: Any, options: dict[str, Any], mode: Any) -> None:
    times(monkeypatch, 0.9, 0.9)
    monkeypatch.setattr(plan, "LEAST_GAIN", 0.0)
    model = randomized(Writing())
    original, given = copy.deepcopy(model), copy.deepcopy(model)
    fused: Any = fxfuse.optimize(given, X, mode=mode, cache=False, **options)
    assert [each.path for each in fxfuse.report(fused).fused] == ["part"]
    assert_equal_states(given, original, "the model that was given")
    assert_equal_states(fused, original, "the result")
    torch.testing.assert_close(fused(X), original(X), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(fused(X), original(X), rtol=1e-12, atol=1e-12)


class Generating(nn.Module):
    """Each call leaves in it what cannot be copied; the part fuses."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.left = Nets(), None

    def forward(self, x: Tensor) -> Tensor:
        self.left = (i for i in range(3))
        y: Tensor = self.part(x)
        return y * next(self.left)


@pytest.mark.parametrize("options", [{}, {"objective": "launches", "tune": False}], ids=["tuned", "launches"])
def test_a_model_that_cannot_be_copied_once_it_was_called(monkeypatch: Any, options: dict[str, Any]) -> None:
    times(monkeypatch, 0.9, 0.9)
    monkeypatch.setattr(plan, "LEAST_GAIN", 0.0)
    model = randomized(Generating())
    fused = fxfuse.optimize(model, X, cache=False, **options)
    report = fxfuse.report(fused)
    assert [each.path for each in report.fused] == ["part"], report.refused
    assert model.left is None
    torch.testing.assert_close(fused(X), model(X), rtol=1e-12, atol=1e-12)


def test_an_example_in_somebody_s_graph(monkeypatch: Any) -> None:
    """Which the timing of the whole model must not run backward: a second backward raises."""
    times(monkeypatch, 0.9, 0.9)
    monkeypatch.setattr(plan, "LEAST_GAIN", 0.0)
    model = randomized(Nets())
    x = torch.tanh(X * model.nets[0][0].weight.sum())
    assert fxfuse.report(fxfuse.optimize(model, x, mode="train", cache=False)).fused
    x.sum().backward()
    assert model.nets[0][0].weight.grad is not None


class OneMode(Nets):
    """It has no training mode."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise ValueError("not in this mode")
        return super().forward(x)


def test_a_model_that_raises_in_the_mode_asked_for(monkeypatch: Any) -> None:
    times(monkeypatch, 0.9, 0.9)
    model = randomized(OneMode()).eval()
    for how in ({"example_inputs": X}, {}):
        fused = fxfuse.optimize(copy.deepcopy(model), mode="train", cache=False, **how)
        torch.testing.assert_close(fused(X), model(X), rtol=1e-12, atol=1e-12)
        report = fxfuse.report(fused)
        assert report.fused
        assert "the whole model could not be timed: ValueError: not in this mode" in str(report)


class InferenceOnly(Nets):
    """It says so when it is asked for its training mode."""

    def train(self, mode: bool = True) -> InferenceOnly:
        if mode:
            raise NotImplementedError("for inference only")
        return super().train(mode)


@pytest.mark.parametrize("how", [{"example_inputs": X}, {}], ids=["example", "first call"])
def test_a_model_without_a_training_mode(how: dict[str, Any]) -> None:
    model = randomized(InferenceOnly().eval())
    fused = fxfuse.optimize(copy.deepcopy(model), mode="infer", cache=False, **how)
    assert torch.equal(fused(X), model(X))
    (refusal,) = fxfuse.report(fused).refused
    assert str(refusal) == "its train(True) raises NotImplementedError: for inference only: a plan is compared in both modes"


@pytest.mark.parametrize("validate", [False, True])
def test_asked_at_first_calls_and_in_place(monkeypatch: Any, validate: bool) -> None:
    times(monkeypatch, 0.9, 0.9)
    monkeypatch.setattr(pipeline, "times_faster", lambda *_: 0.5)
    inplace = fxfuse.optimize(randomized(Nets()), X, inplace=True, validate=validate, cache=False)
    first = fxfuse.optimize(randomized(Nets()), validate=validate, cache=False)
    first(X)
    assert not fxfuse.report(inplace).fused
    assert not fxfuse.report(first).fused
