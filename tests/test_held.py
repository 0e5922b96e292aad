"""Objects that a model passes to its submodules: known in copies of the model, and what never runs is not called fused."""

from __future__ import annotations

import copy
import dataclasses
import io
from typing import Any

import numpy
import pytest
import torch
from torch import nn

import fxfuse
from checks import QUICK, assert_fused_equals, mlp, model_of, randn, randomized


class Feature:
    """A configuration, equal to itself only; it keeps the table that it made, as torch-rechub's do."""

    def __init__(self, name: str, width: int) -> None:
        self.name, self.width = name, width

    def layer(self) -> nn.Module:
        if not hasattr(self, "net"):
            self.net = nn.Linear(1, self.width, dtype=torch.float64)
        return self.net


class Embedding(nn.Module):
    def __init__(self, features: list[Feature]) -> None:
        super().__init__()
        self.nets = nn.ModuleDict({feature.name: feature.layer() for feature in features})

    def forward(self, x: dict[str, torch.Tensor], features: list[Feature], scale: float = 1.0) -> torch.Tensor:
        return torch.cat([self.nets[each.name](x[each.name]) for each in features], 1) * scale


class Model(nn.Module):
    def __init__(self, lanes: int = 4) -> None:
        super().__init__()
        self.features = [Feature(f"f{i}", 3) for i in range(lanes)]
        self.embedding = Embedding(self.features)
        self.head = nn.Linear(3 * lanes, 2, dtype=torch.float64)

    def forward(self, x: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.head(self.embedding(x, self.features))


def inputs(lanes: int = 4, rows: int = 5) -> dict[str, torch.Tensor]:
    return {f"f{i}": torch.randn(rows, 1, dtype=torch.float64) for i in range(lanes)}


def fused_model(model: nn.Module | None = None, x: object = None) -> nn.Module:
    return fxfuse.optimize(model or Model(), (inputs() if x is None else x,), objective="launches", tune=False)


def fallbacks(model: nn.Module) -> dict[str, int]:
    return dict(fxfuse.report(model).fallbacks)


def test_a_copy_knows_its_own_objects() -> None:
    fused = assert_fused_equals(Model(), (inputs(),), heavy=2)
    fused(inputs())
    assert not fallbacks(fused)


@pytest.mark.parametrize("held", ["list", "dict", "tuple of lists", "in a submodule"])
def test_wherever_they_are_held(held: str) -> None:
    class Holder(Model):
        def __init__(self) -> None:
            super().__init__()
            given = self.features
            del self.features
            if held == "dict":
                self.by_name = {each.name: each for each in given}
            elif held == "tuple of lists":
                self.groups = (given[:2], given[2:])
            elif held == "in a submodule":
                self.head.features = given  # type: ignore[assignment]
            else:
                self.features = given

        def forward(self, x: dict[str, torch.Tensor]) -> torch.Tensor:
            if held == "dict":
                features = list(self.by_name.values())
            elif held == "tuple of lists":
                features = [*self.groups[0], *self.groups[1]]
            else:
                features = self.head.features if held == "in a submodule" else self.features  # type: ignore[assignment]
            return self.head(self.embedding(x, features))

    fused = fused_model(Holder())
    fused(inputs())
    assert len(fxfuse.report(fused).fused) == 1
    assert not fallbacks(fused)


def test_copies_and_saved_models_know_theirs() -> None:
    fused, x = fused_model(), inputs()
    want = fused(x)
    buffer = io.BytesIO()
    torch.save(fused, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(fused), copy.deepcopy(copy.deepcopy(fused)), torch.load(buffer, weights_only=False)):
        assert other.features[0] is not fused.features[0]
        torch.testing.assert_close(other(x), want, rtol=0, atol=1e-14)
        assert not fallbacks(other)
        with torch.no_grad():  # its lanes are its own: the objects reach the same layers as the model
            other.features[1].net.weight.mul_(2)
        assert not torch.allclose(other(x), want)
        assert not fallbacks(other)
    torch.testing.assert_close(fused(x), want, rtol=0, atol=0)


def test_another_object_runs_the_loop() -> None:
    fused, x = fused_model(), inputs()
    same = [copy.copy(each) for each in fused.features]
    torch.testing.assert_close(fused.embedding(x, same), fused.embedding(x, fused.features), rtol=0, atol=1e-14)
    assert list(fallbacks(fused).values()) == [1]


def test_an_object_that_changed_runs_the_loop() -> None:
    model, x = Model(), inputs()
    fused = fused_model(model)
    for each in (model, fused):
        each.features[0].name, each.features[1].name = "f1", "f0"
    torch.testing.assert_close(fused(x), model(x), rtol=1e-12, atol=0)
    ((reason, number),) = fallbacks(fused).items()
    assert number == 1
    assert "has other attributes than when it was recorded" in reason


def test_an_object_with_layers_that_the_model_does_not_register() -> None:
    """Its layers are in no copy's Parameters; what the recording read was the recorded copy's."""

    class Loose(nn.Module):
        def forward(self, x: torch.Tensor, features: list[Feature]) -> torch.Tensor:
            return torch.cat([each.net(x[:, i : i + 1]) for i, each in enumerate(features)], 1)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = [Feature(f"f{i}", 3) for i in range(4)]
            for each in self.features:
                each.layer()
            self.inner = Loose()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x, self.features)

    model, x = Outer(), torch.randn(5, 4, dtype=torch.float64)
    fused = fused_model(model, x)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-12, atol=0)
    with torch.no_grad():
        fused.features[2].net.weight.mul_(3)
        model.features[2].net.weight.mul_(3)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-12, atol=0)
    fused(x).sum().backward()
    assert all(each.net.weight.grad is not None for each in fused.features)


@dataclasses.dataclass(eq=False)
class Options:
    scale: float = 2.0


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Linear(2, 3, dtype=torch.float64) for _ in range(4))

    def forward(self, x: torch.Tensor, options: Options) -> torch.Tensor:
        return torch.cat([net(x) for net in self.nets], 1) * options.scale


class Fresh(nn.Module):
    """Passes a new object at every call: no call is like the recorded one."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.other = Block(), Block()
        self.options = Options(3.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(self.block(x, Options())[:, :2].sin(), self.options)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_region_that_never_runs_is_refused_alone(inplace: bool) -> None:
    model, x = Fresh(), torch.randn(5, 2, dtype=torch.float64)
    want = model(x)
    fused = fxfuse.optimize(model, x, objective="launches", tune=False, inplace=inplace)
    report = fxfuse.report(fused)
    assert [plan.path for plan in report.fused] == ["other"]
    (refusal,) = [each for each in report.refused if each.region == "block"]
    assert refusal.reason.startswith("block would run its loop at every call: input 1 is Options(scale=2.0), recorded")
    torch.testing.assert_close(fused(x), want, rtol=1e-12, atol=0)
    assert not fallbacks(fused)


# Objects that the model does not hold: the caller's own, which the caller may change.


@dataclasses.dataclass
class Scaling:
    scale: float = 2.0
    offsets: list[float] = dataclasses.field(default_factory=lambda: [0.5, 1.0])


class Plain:
    def __init__(self) -> None:
        self.scale, self.offsets = 2.0, [0.5, 1.0]


def scaled(self: nn.Module, x: torch.Tensor, options: Any) -> torch.Tensor:
    out = torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1)  # type: ignore[arg-type]
    return out * options.scale + options.offsets[1]


def scaling_model(forward: Any, options: Any) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    model, x = randomized(model_of(forward, nets=nn.ModuleList(mlp() for _ in range(4)))), randn(5, 4)
    fused = fxfuse.optimize(model, (x, options), objective="launches", **QUICK)
    assert fxfuse.report(fused).fused, str(fxfuse.report(fused))
    return model, fused, x


@pytest.mark.parametrize("make", [Scaling, Plain])
def test_an_argument_that_the_caller_changes(make: type) -> None:
    options = make()
    model, fused, x = scaling_model(scaled, options)
    torch.testing.assert_close(fused(x, options), model(x, options), rtol=1e-12, atol=0)
    assert not fallbacks(fused)
    options.scale = 3.0
    torch.testing.assert_close(fused(x, options), model(x, options), rtol=1e-12, atol=0)
    options.scale, options.offsets[1] = 2.0, 7.0
    torch.testing.assert_close(fused(x, options), model(x, options), rtol=1e-12, atol=0)
    assert sum(fallbacks(fused).values()) == 2
    options.offsets[1] = 1.0
    torch.testing.assert_close(fused(x, options), model(x, options), rtol=1e-12, atol=0)
    assert sum(fallbacks(fused).values()) == 2


def test_an_equal_argument_is_as_good() -> None:
    options = Scaling()
    model, fused, x = scaling_model(scaled, options)
    torch.testing.assert_close(fused(x, Scaling()), model(x, Scaling()), rtol=1e-12, atol=0)
    assert not fallbacks(fused)
    options.scale = 5.0  # an object equal to what the recorded one is now is not what was recorded
    torch.testing.assert_close(fused(x, Scaling(5.0)), model(x, Scaling(5.0)), rtol=1e-12, atol=0)


def test_an_array_that_the_caller_changes() -> None:
    def forward(self: nn.Module, x: torch.Tensor, factors: Any) -> torch.Tensor:
        out = torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1)  # type: ignore[arg-type]
        return out * torch.tensor(factors)

    factors = numpy.array([1.0, 2.0, 3.0, 4.0])
    model, fused, x = scaling_model(forward, factors)
    fused(x, factors)
    assert not fallbacks(fused)
    factors[2] = 7.0
    torch.testing.assert_close(fused(x, factors), model(x, factors), rtol=1e-12, atol=0)


@pytest.mark.parametrize("inside", ["attribute", "list in a dict"])
def test_tensors_in_an_argument_are_not_taken_for_constants(inside: str) -> None:
    class Bag:
        def __init__(self, x: torch.Tensor) -> None:
            self.x, self.parts = x, {"x": [x]}

    def forward(self: nn.Module, bag: Any) -> torch.Tensor:
        x = bag.x if inside == "attribute" else bag.parts["x"][0]
        return torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1)  # type: ignore[arg-type]

    model, bag = randomized(model_of(forward, nets=nn.ModuleList(mlp() for _ in range(4)))), Bag(randn(5, 4))
    fused = fxfuse.optimize(model, (bag,), objective="launches", **QUICK)
    said = [str(refusal) for refusal in fxfuse.report(fused).refused]
    assert len(said) == 1
    assert said[0].startswith("reads a tensor out of its argument, a Bag, which fxfuse cannot take apart (test_held.py:")
    bag.x = bag.parts["x"][0] = randn(5, 4, seed=9)
    torch.testing.assert_close(fused(bag), model(bag), rtol=1e-12, atol=0)


def test_a_call_inside_that_is_given_tensors_in_an_object() -> None:
    class Child(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nets = nn.ModuleList(mlp() for _ in range(4))

        def forward(self, given: Any) -> torch.Tensor:
            return torch.cat([net(given.scale[:, i : i + 1]) for i, net in enumerate(self.nets)], 1)

    model = randomized(model_of(lambda self, x: self.child(Scaling(x * 2)), child=Child()))
    fused = fxfuse.optimize(model, randn(5, 4), objective="launches", **QUICK)
    report = fxfuse.report(fused)
    assert report.fused or "reads a tensor out of its argument, a Scaling, which" in str(report)
    torch.testing.assert_close(fused(randn(3, 4)), model(randn(3, 4)), rtol=1e-12, atol=0)
