"""Regions planned by hand: the packed program answers, the loop answers where it must, and results have the structure of the loop's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from hand_built import FeatureNets, Model, feature_plan, randomize, specs
from hand_installed import CLOSE, F64, assert_same_training, data, fell_back, pair
from torch import Tensor, nn

from fxfuse import fused
from fxfuse.errors import FallbackError, FxfuseError
from fxfuse.graph import Guard, Program, Recipe, RegionPlan, TensorGuard
from fxfuse.running import install
from fxfuse.running.surroundings import Spelled
from fxfuse.weights import packing


@pytest.mark.parametrize("cat", [False, True])
def test_the_program_equals_the_loop(cat: bool) -> None:
    assert_same_training(*pair(cat=cat))


@pytest.mark.parametrize("cat", [False, True])
def test_the_fallback_equals_the_loop(cat: bool) -> None:
    original, model = pair(strict=False, cat=cat)
    model.core.nets[2].register_forward_hook(lambda *_: None)
    assert_same_training(original, model)
    assert fell_back(model) == ["a hook was registered on a submodule"]


def test_swapped_lanes_are_noticed() -> None:
    """The checks of these files see a wrong order of lanes."""
    original = randomize(Model().double())
    model = install.install(copy.deepcopy(original), [feature_plan()])
    w = model.core.packed.nets.get_submodule("0").weight
    with torch.no_grad():
        w.copy_(w.flip(0))
    with pytest.raises(AssertionError):
        assert_same_training(original, model)


# -- when the loop answers -----------------------------------------------------------------------------------------------------------------


def test_reasons_of_fallbacks() -> None:
    original, model = pair(strict=False)
    for m in (original, model):
        m.eval()
    state = fused.regions(model)["core"]
    y = torch.randn(2, 5, dtype=F64)

    def reason(call: Callable[[nn.Module], Tensor]) -> str:
        state.fallbacks.clear()
        torch.testing.assert_close(call(model.core), call(original.core), **CLOSE)
        (only,) = state.fallbacks
        return only

    assert reason(lambda m: m(y.as_subclass(nn.Buffer))) == "input 0 is a Buffer, recorded a plain tensor"
    assert reason(lambda m: m(torch.cat([y, y], 1))) == "input 0 has shape (2, 10), recorded (any, 5)"
    single = copy.deepcopy(model).float(), copy.deepcopy(original).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(single[0].core(y.float()), single[1].core(y.float()))
    assert fell_back(single[0])[-1] == "autocast is on for cpu"
    model.core.nets[2].train()
    assert reason(lambda m: m(y)) == "no program was recorded with nets.2 in train mode and others not"
    model.eval()
    state.strict = True
    torch.testing.assert_close(model(y), original(y), **CLOSE)
    state.strict = False
    model.core.nets[2][0].scaling = 3
    assert reason(lambda m: m(y)) == "attribute nets.2.0.scaling was set after fusing"
    del model.core.nets[2][0].scaling
    state.strict = True
    torch.testing.assert_close(model(y), original(y), **CLOSE)
    state.strict = False
    handle = model.core.nets[4][1].register_full_backward_hook(lambda *_: None)
    assert reason(lambda m: m(y)) == "a hook was registered on a submodule"
    handle.remove()
    state.strict = True
    torch.testing.assert_close(model(y), original(y), **CLOSE)
    with pytest.raises(FallbackError, match=r"core would run its loop: input 0 has shape \(2, 10\), recorded \(any, 5\)"):
        model.core(torch.cat([y, y], 1))


def test_replaced_submodules_are_used() -> None:
    original, model = pair(strict=False)
    for m in (original, model):
        m.core.nets[1][1] = nn.Tanh()
    assert_same_training(original, model)
    assert fell_back(model) == ["a submodule was replaced, added or removed"]
    for m in (original, model):
        m.core.nets[0].forward = lambda x: x * 2
    x = data()
    torch.testing.assert_close(model(x), original(x), **CLOSE)


def test_only_attributes_that_were_read_count_where_the_plan_knows_them() -> None:
    original, model = pair()
    fused.regions(model)["core"].plan.spelled = Spelled(frozenset({"calls"}), False)
    model.core.note = 1
    model.core.nets[0].note = 2
    assert_same_training(original, model)
    model.core.calls = 7
    with pytest.raises(FallbackError, match="attribute calls was set after fusing"):
        model(data())


def test_hooks_on_the_region_run_and_do_not_disturb() -> None:
    original, model = pair()
    for m in (original, model):
        m.core.register_forward_hook(lambda mod, args, out: out * 2)
        m.core.register_forward_pre_hook(lambda mod, args: (args[0] + 1,))
    assert_same_training(original, model)


# -- arguments and results -----------------------------------------------------------------------------------------------------------------


def region(forward: Callable[..., object], program: Program, modules: int = 1, strict: bool = True) -> nn.Module:
    """A module without parameters whose program and loop are given."""
    space = {"forward": forward}
    module = type("Region", (nn.Module,), space)()
    return install.install(module, [RegionPlan("", [], {(True,) * modules: program})], strict=strict)


def test_keywords_constants_and_structured_results() -> None:
    def forward(self: nn.Module, x: Tensor, *, mask: Tensor | None = None, mode: str = "sum") -> dict:
        return {"out": [x + 1, x], "none": None}

    graph = torch.fx.Graph()
    leaves = [graph.placeholder(n) for n in ("x", "mask", "mode")]
    graph.output([graph.call_function(torch.add, (leaves[0], 1)), leaves[0], None])
    x = torch.randn(3)
    in_spec, out_spec = specs((x,), {"mask": None, "mode": "sum"}, {"out": [x, x], "none": None})
    guard = Guard((TensorGuard((None,), torch.float32, torch.device("cpu")), ("constant", None), ("constant", "sum")), (0, 1, 2))
    model = region(forward, Program(graph, guard, in_spec, out_spec))
    out = model(x, mask=None, mode="sum")
    assert list(out) == ["out", "none"]
    assert torch.equal(out["out"][0], x + 1)
    assert out["out"][1] is x
    assert out["none"] is None
    with pytest.raises(FallbackError, match="input 2 is 'mean', recorded 'sum'"):
        model(x, mask=None, mode="mean")
    with pytest.raises(FallbackError, match="input 1 is a Tensor, recorded None"):
        model(x, mask=x, mode="sum")
    for args, kwargs in [((x,), {}), ((), {"x": x}), ((x,), {"mode": "sum", "mask": None}), ((), {"mask": None, "x": x})]:
        assert torch.equal(model(*args, **kwargs)["out"][0], x + 1)  # the same call, spelled otherwise
    with pytest.raises(FallbackError, match="input 2 is 'mean', recorded 'sum'"):
        model(x, mode="mean")
    again = copy.deepcopy(model)
    assert torch.equal(again(x, mask=None, mode="sum")["out"][0], x + 1)


@pytest.mark.parametrize("result", ["tensor", "tuple", "list", "nested"])
def test_results_keep_their_structure(result: str) -> None:
    make = {
        "tensor": lambda a, b: a,
        "tuple": lambda a, b: (a, b),
        "list": lambda a, b: [a, b],
        "nested": lambda a, b: (a, [b, {"k": a}]),
    }[result]
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.neg, (x,))
    t = torch.randn(2)
    in_spec, out_spec = specs((t,), {}, make(t, t))
    graph.output({"tensor": [x], "tuple": [x, y], "list": [x, y], "nested": [x, y, x]}[result])
    guard = Guard((TensorGuard((None,), torch.float32, torch.device("cpu")),), (0,))
    out = region(lambda self, x: make(x, -x), Program(graph, guard, in_spec, out_spec))(t)
    assert torch.utils._pytree.tree_flatten(out)[1] == out_spec
    expected = torch.utils._pytree.tree_leaves(make(t, -t))
    assert all(torch.equal(a, b) for a, b in zip(torch.utils._pytree.tree_leaves(out), expected))


# -- regions of other kinds ----------------------------------------------------------------------------------------------------------------


def test_a_container_that_is_a_region_does_not_meet_the_pack() -> None:
    class Ensemble(nn.ModuleList):
        def forward(self, x: Tensor) -> Tensor:
            assert len(self) == 3
            assert len(list(self.children())) == 3
            return torch.stack([member(x) for member in self]).sum(0) + self[-1](x)

    original = Ensemble(nn.Linear(2, 2) for _ in range(3))
    recipe = Recipe("packed.weight", tuple(f"{i}.weight" for i in range(3)), (2, 2), (0, 1), "stack")
    model = install.install(copy.deepcopy(original), [RegionPlan("", [recipe], {})])
    x = torch.randn(4, 2)
    assert torch.equal(model(x), original(x))
    assert len(model) == 3
    assert list(model.state_dict())[-1] == "packed.weight"
    assert list(packing.original_state_dict(model)) == list(original.state_dict())
    assert len(fused.unfuse(model)) == 3


def test_classes_with_opinions_of_their_own() -> None:
    class Registry(nn.Module):
        known: ClassVar[list[str]] = []

        def __init_subclass__(cls, **kwargs: object) -> None:
            Registry.known.append(cls.__name__)

        def __getattr__(self, name: str) -> object:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("nets"), name)

        def __setattr__(self, name: str, value: object) -> None:
            super().__setattr__(name, value)

        def train(self, mode: bool = True) -> nn.Module:
            super().train(mode)
            self.nets[0].eval()
            return self

    class Core(Registry, FeatureNets):
        __slots__ = ("free",)

    original = randomize(Core().double()).train()
    assert Registry.known == ["Core"]
    model = install.install(copy.deepcopy(original), [feature_plan(path="")], strict=False)
    assert Registry.known == ["Core"]
    x = data()
    torch.testing.assert_close(model(x), original(x), **CLOSE)
    assert fell_back(model) == ["no program was recorded with nets.0 in eval mode and others not"]
    model.train()
    assert not model.nets[0].training
    assert len(model.extend([])) == 5  # served by its own __getattr__


def broken(change: Callable[[nn.Module, RegionPlan], None]) -> str:
    """What ``install`` says; and it changed nothing."""
    model, plan = randomize(Model().double()), feature_plan()
    change(model, plan)
    before = [type(m) for m in model.modules()], [n for n, _ in model.named_parameters()]
    with pytest.raises(FxfuseError) as caught:
        install.install(model, [plan])
    assert before == ([type(m) for m in model.modules()], [n for n, _ in model.named_parameters()])
    return str(caught.value)


def test_what_install_refuses() -> None:
    assert broken(lambda m, p: setattr(m.core, "forward", m.core.forward)) == (
        "core.forward was replaced on the instance, which would bypass the fused forward"
    )
    assert broken(lambda m, p: setattr(p, "path", "nothing")) == "the model has no module nothing"
    assert broken(lambda m, p: setattr(m.core, "packed", 1)) == "core has an attribute packed already"
    assert broken(lambda m, p: m.core.nets[1][0].weight.requires_grad_(False)) == (
        "nets.1.0.weight has requires_grad False, nets.0.0.weight has True"
    )
    assert broken(lambda m, p: m.core.nets[1].float()) == "nets.1.0.weight has dtype torch.float32, nets.0.0.weight has torch.float64"
    assert broken(lambda m, p: setattr(m.core.nets[1][0], "bias", m.core.nets[2][0].bias)) == (
        "nets.2.0.bias is the same tensor as nets.1.0.bias: it can be packed once only"
    )
    assert broken(lambda m, p: setattr(m.core, "cached", [m.core.nets[2][0].bias])) == (
        "nets.2.0.bias is also held by the attribute core.cached"
    )
    assert broken(lambda m, p: setattr(m, "extra", m.core.nets[2][0].bias)) == "nets.2.0.bias is also .extra, outside of the region"
    assert broken(lambda m, p: m.core.nets[3][0].weight.register_hook(lambda g: g)) == (
        "nets.3.0.weight has a gradient hook, which the packed tensor would not run"
    )
    _, model = pair()
    with pytest.raises(FxfuseError, match="core is fused already"):
        install.install(model, [feature_plan()])
    with pytest.raises(FxfuseError, match=r"share a module"):
        install.install(Model().double(), [feature_plan(), feature_plan()])
    with pytest.raises(FxfuseError, match=r"nn\.DataParallel"):
        model.core._replicate_for_data_parallel()
