"""Regions planned by hand: the packed program answers, the loop answers where it must, and both read the same weights."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import threading
from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from hand_built import FeatureNets, Model, feature_plan, randomize, specs
from torch import Tensor, nn

from fxfuse import fused
from fxfuse.errors import ArgumentError, FallbackError, FxfuseError
from fxfuse.graph import Guard, Program, Recipe, RegionPlan, TensorGuard
from fxfuse.running import install
from fxfuse.running.surroundings import Spelled
from fxfuse.weights import packing

F64 = torch.float64
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def pair(strict: bool = True, packing: str = "packed", cat: bool = False) -> tuple[nn.Module, nn.Module]:
    original = randomize(Model().double())
    return original, install.install(copy.deepcopy(original), [feature_plan(cat=cat)], strict=strict, packing=packing)


def data(n: int = 6) -> Tensor:
    return torch.randn(n, 5, dtype=F64)


def fell_back(model: nn.Module) -> list[str]:
    return [reason for state in fused.regions(model).values() for reason in state.fallbacks]


def assert_same_training(original: nn.Module, model: nn.Module) -> None:
    """Outputs, input gradients and parameter gradients agree, in train and eval mode."""
    for mode in (True, False):
        original.train(mode)
        model.train(mode)
        x = data()
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        for m in (original, model):
            m.zero_grad()
        ya, yb = original(a), model(b)
        torch.testing.assert_close(yb, ya, **CLOSE)
        for y in (ya, yb):  # a sum of squares alone would be constant behind the BatchNorm
            (y * torch.linspace(0.5, 2, y.numel(), dtype=F64).view_as(y)).square().sum().backward()
        assert max(p.grad.abs().max() for p in original.core.parameters()) > 1e-4
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-10, atol=1e-10)
        for name, grad in packing.original_gradients(model).items():
            torch.testing.assert_close(grad, original.get_parameter(name).grad, rtol=1e-10, atol=1e-10, msg=name)


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
    """The checks of this file see a wrong order of lanes."""
    original = randomize(Model().double())
    model = install.install(copy.deepcopy(original), [feature_plan()])
    w = model.core.packed.nets.get_submodule("0").weight
    with torch.no_grad():
        w.copy_(w.flip(0))
    with pytest.raises(AssertionError):
        assert_same_training(original, model)


def test_it_is_an_instance_of_its_own_class() -> None:
    original, model = pair()
    assert isinstance(model.core, FeatureNets)
    assert type(model) is Model
    assert (type(model.core).__name__, type(model.core).__module__) == ("FeatureNets", "hand_built")
    assert isinstance(model.core.nets[0][0], nn.Linear)
    assert repr(model.core.nets) == repr(original.core.nets)
    assert inspect.signature(model.core.forward) == inspect.signature(original.core.forward)
    names = [name for name, _ in model.named_modules() if ".packed" not in name]
    assert names == [name for name, _ in original.named_modules()]
    assert type(type(model.core.nets)([nn.ReLU()])) is nn.ModuleList
    assert type(model.core.nets[1:3]) is nn.ModuleList


def test_only_packed_and_untouched_parameters_are_listed() -> None:
    original, model = pair()
    names = [name for name, _ in model.named_parameters()]
    assert sorted(n for n in names if "packed" not in n) == sorted(n for n, _ in original.named_parameters() if ".nets." not in n)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in original.parameters())


def test_weights_of_lanes_are_views() -> None:
    original, model = pair()
    for i in range(5):
        for j in (0, 2):
            for name in ("weight", "bias"):
                assert torch.equal(getattr(model.core.nets[i][j], name), getattr(original.core.nets[i][j], name))
    loss = model.core.nets[3][2].weight.pow(2).sum() + model.core.nets[1][2].weight.sum()
    loss.backward()
    grads = packing.original_gradients(model)
    assert torch.equal(grads["core.nets.3.2.weight"], 2 * original.core.nets[3][2].weight)
    assert grads["core.nets.1.2.weight"].eq(1).all()
    assert grads["core.nets.0.2.weight"].eq(0).all()


WRITES: dict[str, Callable[[nn.Module], object]] = {
    "init": lambda layer: nn.init.xavier_uniform_(layer.weight),
    "data": lambda layer: layer.weight.data.mul_(3),
    "assign": lambda layer: setattr(layer, "weight", nn.Parameter(torch.full_like(layer.weight, 5.0))),
    "reset": lambda layer: layer.reset_parameters(),
    "index": lambda layer: layer.weight.data.__setitem__((0, 0), 9.0),
}


@pytest.mark.parametrize("how", WRITES)
@pytest.mark.parametrize("place", [(3, 0), (4, 2)])
def test_writes_reach_the_pack(how: str, place: tuple[int, int]) -> None:
    original, model = pair()
    layers = [m.core.nets[place[0]][place[1]] for m in (original, model)]
    for layer in layers:
        torch.manual_seed(0)
        WRITES[how](layer)
    assert torch.equal(layers[1].weight, layers[0].weight)
    assert_same_training(original, model)
    assert len(list(model.parameters())) == 10


def test_assignments_that_cannot_be_are_refused() -> None:
    _, model = pair()
    layer = model.core.nets[1][0]
    with pytest.raises(ArgumentError, match=r"nets\.1\.0\.weight is packed .* expected a tensor of shape \(4, 1\), got NoneType"):
        layer.weight = None
    with pytest.raises(ArgumentError, match=r"nets\.1\.0\.weight is packed .* expected shape \(4, 1\), got \(1, 4\)"):
        layer.weight = nn.Parameter(torch.zeros(1, 4))
    with pytest.raises(TypeError, match=r"cannot assign Tensor as parameter nets\.1\.0\.weight"):
        layer.weight = torch.zeros(4, 1)
    with pytest.raises(ArgumentError, match="requires_grad=True; got False"):
        layer.weight = nn.Parameter(torch.zeros(4, 1), requires_grad=False)
    with pytest.raises(ArgumentError, match="cannot be deleted"):
        del layer.weight
    with pytest.raises(FxfuseError, match=r"packs 5 lanes, and requires_grad_ of 1 of them"):
        layer.requires_grad_(False)


def test_requires_grad_of_all_lanes() -> None:
    _, model = pair()
    model.core.nets.requires_grad_(False)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "packed" in n)
    model.requires_grad_(True)
    assert all(p.requires_grad for p in model.parameters())


def test_apply_initialises_every_lane() -> None:
    original, model = pair()

    def init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight)
            nn.init.uniform_(module.bias)

    for m in (original, model):
        torch.manual_seed(3)
        m.apply(init)
    assert_same_training(original, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_follow(dtype: torch.dtype) -> None:
    original, model = pair(strict=False)
    original.to(dtype).eval()
    model.to(dtype).eval()
    x = data().to(dtype)
    torch.testing.assert_close(model(x), original(x), rtol=2e-2, atol=2e-2)
    assert fell_back(model) == []
    assert model.core.nets[0][0].weight.dtype is dtype
    with pytest.raises(RuntimeError):  # as the original: mixed dtypes
        model(data())
    assert len(fell_back(model)) == 0  # model.before raised, the region was not reached
    with pytest.raises(RuntimeError):
        model.core(data())
    assert fell_back(model) == [f"core.packed.nets.0.weight has dtype {dtype}, input 0 has torch.float64".removeprefix("core.")]


@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "save"])
def test_copies_stay_fused_and_independent(copied: str) -> None:
    original, model = pair()
    model.core(data())  # compiled functions are not copied
    if copied == "deepcopy":
        other = copy.deepcopy(model)
    elif copied == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        other = torch.load(stream, weights_only=False)
    assert type(other.core) is type(model.core)
    assert_same_training(copy.deepcopy(original), other)
    with torch.no_grad():
        other.core.nets[0][0].weight.zero_()
    assert model.core.nets[0][0].weight.abs().min() > 0
    assert fused.regions(other)["core"].region is other.core
    assert fused.regions(other)["core"].plan.path == "core"
    again = copy.deepcopy(other)
    assert again.core.nets[0][0].weight.abs().max() == 0
    other.core.nets[0].register_forward_hook(lambda *_: None)
    assert_same_training(original, model)
    with pytest.raises(FallbackError):
        other(data())


def test_a_copy_of_one_lane_stands_alone() -> None:
    original, model = pair()
    lane = copy.deepcopy(model.core.nets[3])
    assert type(lane) is nn.Sequential
    assert type(lane[0]) is nn.Linear
    assert [tuple(p.shape) for p in lane.parameters()] == [(4, 1), (4,), (1, 4), (1,)]
    x = torch.randn(2, 1, dtype=F64)
    assert torch.equal(lane(x), original.core.nets[3](x))
    assert_same_training(original, model)


def test_a_pickled_lane_brings_its_region() -> None:
    original, model = pair()
    lane = pickle.loads(pickle.dumps(model.core.nets[3]))
    x = torch.randn(2, 1, dtype=F64)
    assert torch.equal(lane(x), original.core.nets[3](x))


def test_unfuse_gives_the_original_back() -> None:
    original, model = pair()
    model.note = "kept"
    model.core.note = [1, 2]
    model.core.packed.nets.get_submodule("2").weight.requires_grad_(False)
    model.core.nets[1].eval()
    back = fused.unfuse(model)
    assert [type(m) for m in back.modules()] == [type(m) for m in original.modules()]
    assert [n for n, _ in back.named_parameters()] == [n for n, _ in original.named_parameters()]
    assert list(back.state_dict()) == list(original.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), original.state_dict().values()))
    assert (back.note, back.core.note) == ("kept", [1, 2])
    assert [n for n, p in back.named_parameters() if not p.requires_grad] == [f"core.nets.{i}.2.weight" for i in range(5)]
    assert not back.core.nets[1][0].training
    assert back.core.nets[2][0].training
    assert all(isinstance(p, nn.Parameter) and p.is_leaf for p in back.parameters())
    assert "fxfuse" not in str(back.core.__dict__.keys())
    assert isinstance(model.core.packed, nn.Module)
    for p in back.parameters():
        p.requires_grad_()
    back.train()
    assert_same_training(original, back)
    pickle.loads(pickle.dumps(back))


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


def test_replaced_weights_outside_of_the_pack_are_used() -> None:
    original, model = pair()
    new = torch.randn(2, 5, dtype=F64)
    for m in (original, model):
        m.core.head.weight = nn.Parameter(new.clone())
        m.core.scale = m.core.scale * 2
    assert_same_training(original, model)
    model.core.head.weight = nn.Parameter(torch.randn(2, 7, dtype=F64))
    with pytest.raises(FallbackError, match=r"head\.weight is not a tensor of shape \(2, 5\) any more"):
        model(data())


def test_hooks_on_the_region_run_and_do_not_disturb() -> None:
    original, model = pair()
    for m in (original, model):
        m.core.register_forward_hook(lambda mod, args, out: out * 2)
        m.core.register_forward_pre_hook(lambda mod, args: (args[0] + 1,))
    assert_same_training(original, model)


def test_training_steps_agree() -> None:
    original, model = pair()
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.05, weight_decay=0.1) for m in (original, model)]
    for _ in range(5):
        x = data()
        for m, optimizer in zip((original, model), optimizers):
            optimizer.zero_grad()
            (m.core(x) - 1).square().sum().backward()
            optimizer.step()
    saved = packing.original_state_dict(model)
    for name, value in original.state_dict().items():
        torch.testing.assert_close(saved[name], value, rtol=1e-9, atol=1e-9)


def test_a_region_that_owns_raw_parameters() -> None:
    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.ParameterList(nn.Parameter(torch.randn(3, 2)) for _ in range(4))
            self.named = nn.ParameterDict({k: nn.Parameter(torch.randn(2)) for k in "abcd"})
            self.first = nn.Parameter(torch.randn(2))
            self.second = nn.Parameter(torch.randn(2))
            for name in ("low", "high"):
                self.register_buffer(name, torch.randn(3), persistent=name == "never")

        def forward(self, x: Tensor) -> Tensor:
            lanes = [x @ w + self.named[k] for w, k in zip(self.w, self.named)]
            return torch.stack(lanes).sum(0) * self.first + self.second + (self.low * self.high).sum()

    original = Raw()
    recipes = [
        Recipe("packed.w", tuple(f"w.{i}" for i in range(4)), (3, 2), (0, 1), "stack"),
        Recipe("packed.named", tuple(f"named.{k}" for k in "abcd"), (2,), (0,), "stack"),
        Recipe("packed.both", ("second", "first"), (2,), (0,), "cat"),
        Recipe("packed.limits", ("low", "high"), (3,), (0,), "stack", kind="buffer"),
    ]
    model = install.install(copy.deepcopy(original), [RegionPlan("", recipes, {})])
    assert [n for n, _ in model.named_parameters()] == ["packed.w", "packed.named", "packed.both"]
    assert list(packing.original_state_dict(model)) == list(original.state_dict())
    assert "packed.limits" not in model.state_dict()
    x = torch.randn(5, 3)
    assert torch.equal(model(x), original(x))
    assert fell_back(model) == ["no program was recorded in train mode"]
    model.low = torch.ones(3)
    assert model.packed.limits[0].eq(1).all()
    model.load_state_dict(original.state_dict())
    back = fused.unfuse(model)
    assert list(back.state_dict()) == list(original.state_dict())
    assert [n for n, _ in back.named_buffers()] == ["low", "high"]
    assert back.low.eq(1).all()


class Hidden(nn.Module):
    """Lanes in a plain list, which the module does not register."""

    def __init__(self) -> None:
        super().__init__()
        self.lanes = [nn.Linear(2, 2) for _ in range(3)]
        self.table = {"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}

    def forward(self, x: Tensor) -> Tensor:
        return sum(lane(x) for lane in self.lanes) + self.table["a"](x) * self.table["b"](x)


def test_unregistered_lanes_stay_unregistered() -> None:
    original = Hidden()
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    w, b = graph.get_attr("packed.weight"), graph.get_attr("packed.bias")
    out = graph.call_function(torch.baddbmm, (b, graph.call_method("expand", (x, 5, -1, -1)), w))
    total = graph.call_method("sum", (graph.call_function(torch.narrow, (out, 0, 0, 3)), 0))
    product = graph.call_function(torch.mul, tuple(graph.call_function(torch.select, (out, 0, i)) for i in (3, 4)))
    graph.output([graph.call_function(torch.add, (total, product))])
    names = [f"lanes.{i}" for i in range(3)] + ["table.a", "table.b"]
    recipes = [
        Recipe("packed.weight", tuple(f"{n}.weight" for n in names), (2, 2), (1, 0), "stack"),
        Recipe("packed.bias", tuple(f"{n}.bias" for n in names), (2,), (0,), "stack"),
    ]
    # the bias is [5, 2], baddbmm wants [5, 1, 2]
    with graph.inserting_after(b):
        wide = graph.call_method("unsqueeze", (b, 1))
    out.args = (wide, *out.args[1:])
    guard = Guard((TensorGuard((None, 2), torch.float32, torch.device("cpu")),), (0,))
    program = Program(graph, guard, *specs((0,), {}, 0))
    model = install.install(copy.deepcopy(original), [RegionPlan("", recipes, {(True,): program})], strict=True)
    assert list(model.parameters()) == []
    assert list(model.state_dict()) == []
    x = torch.randn(4, 2)
    for m in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(m(x), original(x))
    model.lanes[1].eval()
    with pytest.raises(FallbackError, match="an unregistered submodule changed its training flag"):
        model(x)
    back = fused.unfuse(model)
    assert [tuple(p.shape) for p in back.lanes[0].parameters()] == [(2, 2), (2,)]
    torch.testing.assert_close(back(x), original(x))


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


def test_only_attributes_that_were_read_count_where_the_plan_knows_them() -> None:
    original, model = pair()
    fused.regions(model)["core"].plan.spelled = Spelled(frozenset({"calls"}), False)
    model.core.note = 1
    model.core.nets[0].note = 2
    assert_same_training(original, model)
    model.core.calls = 7
    with pytest.raises(FallbackError, match="attribute calls was set after fusing"):
        model(data())


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


def test_opaque_children_and_all_kinds_of_targets_survive_pickle() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_module("inner", (x,))
    y = graph.call_function(torch.nn.functional.gelu, (y,), {"approximate": "tanh"})
    y = graph.call_function(torch.nn.functional.softmax, (y,), {"dim": -1, "dtype": F64})
    y = graph.call_function(torch.ops.aten.mul.Tensor, (y, 2))
    y = graph.call_function(__import__("operator").getitem, (y, (slice(None, None, None), slice(1, None, None), None)))
    y = graph.call_function(torch.Tensor.add, (y, 1))
    y = graph.call_method("contiguous", (y,), {"memory_format": torch.contiguous_format})
    y = graph.call_function(torch.special.expit, (y,))
    y = graph.call_function(torch.cat, ([y, y], 1))
    graph.output([y])
    example = torch.randn(2, 4)
    program = Program(graph, Guard((TensorGuard((None, 4), torch.float32, torch.device("cpu")),), (0,)), *specs((0,), {}, 0))
    model = install.install(Outer(), [RegionPlan("", [], {(True, True): program})], strict=True)
    expected = model.loop(example)
    for m in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        m.load_state_dict(model.state_dict())
        torch.testing.assert_close(m(example), expected)
    model.inner.register_forward_hook(lambda *_: None)
    with pytest.raises(FallbackError):
        model(example)


class Outer(nn.Module):
    """A region with one opaque child."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def loop(self, x: Tensor) -> Tensor:
        y = torch.nn.functional.gelu(self.inner(x), approximate="tanh")
        y = (y.softmax(-1, dtype=F64) * 2)[:, 1:, None] + 1
        return torch.cat([y.sigmoid()] * 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("the program should have answered")


def test_graphs_print_and_share_the_tensors() -> None:
    _, model = pair()
    graph = fused.graphs(model)["core"]
    assert isinstance(graph, torch.fx.GraphModule)
    assert "torch.baddbmm" in graph.print_readable(print_output=False)
    y = data()
    assert torch.equal(graph(y)[0], model.core(y))
    packed = model.core.packed.nets.get_submodule("0").weight
    assert any(p is packed for p in graph.parameters())
    model.core.nets[0].train(False)
    assert fused.graphs(model) == {}


@pytest.mark.parametrize("how", ["packed", "alias"])
def test_torch_compile_takes_the_whole_model(how: str) -> None:
    torch._dynamo.reset()
    original, model = pair(packing=how)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for n in (6, 3):
        x = data(n)
        torch.testing.assert_close(compiled(x), original(x), **CLOSE)
    x = data()
    for m in (compiled, original):
        (m(x) - 1).pow(3).sum().backward()
    for name, grad in packing.original_gradients(model).items():
        torch.testing.assert_close(grad, original.get_parameter(name).grad, **CLOSE)
    for mode in (False, True):  # the flags choose another program
        for m in (model, original):
            m.train(mode)
        torch.testing.assert_close(compiled(x), original(x), **CLOSE)


def test_torch_compile_takes_what_falls_back() -> None:
    torch._dynamo.reset()
    original, model = pair(strict=False)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    x = data()
    for m in (original, model):
        m.core.nets[1][1] = nn.Tanh()
    torch.testing.assert_close(compiled(x), original(x), **CLOSE)


def test_torch_export_exports_the_packed_program() -> None:
    original, model = pair()
    original.eval(), model.eval()
    exported = torch.export.export(model, (data(),), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
    x = data(9)
    torch.testing.assert_close(exported.module()(x), original(x), **CLOSE)
    assert sum(str(node.target) == "aten.bmm.default" for node in exported.graph.nodes) == 2


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own, at its first jvp
def test_function_transforms_work() -> None:
    original, model = pair()
    for m in (original, model):
        m.eval()
    x, v = data(), data()
    torch.testing.assert_close(torch.func.vmap(model)(x[:, None]), original(x)[:, None], **CLOSE)
    got, expected = (torch.func.jvp(m, (x,), (v,)) for m in (model, original))
    torch.testing.assert_close(got, expected, **CLOSE)
    params = {name: p.detach() * 2 for name, p in model.named_parameters()}
    doubled = copy.deepcopy(original)
    with torch.no_grad():
        for p in doubled.parameters():
            p.mul_(2)
    torch.testing.assert_close(torch.func.functional_call(model, params, (x,)), doubled(x), **CLOSE)


def test_threads_do_not_share_views() -> None:
    original, model = pair(strict=False)
    model.core.nets[0].register_forward_hook(lambda *_: None)
    for m in (original, model):
        m.eval()
    x = data()
    expected, results = original(x), []

    def work() -> None:
        for _ in range(20):
            out = model(x)
            out.sum().backward()
            results.append(torch.allclose(out, expected, **CLOSE))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 60


def test_views_made_without_grad_are_not_reused_with_grad() -> None:
    class Target(FeatureNets):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                frozen = super().forward(x)
            return super().forward(x) + frozen

    original = randomize(Target().double())
    model = install.install(copy.deepcopy(original), [feature_plan(path="")])
    model.nets[0].register_forward_hook(lambda *_: None)
    x = data()
    for m in (original, model):
        m(x).sum().backward()
    for name, grad in packing.original_gradients(model).items():
        torch.testing.assert_close(grad, original.get_parameter(name).grad, **CLOSE)


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


def test_recurrent_lanes_read_the_pack() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells = nn.ModuleList(nn.LSTM(2, 3, batch_first=True) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([cell(x)[0] for cell in self.cells], -1)

    original = Recurrent().double()
    shapes = {"weight_ih_l0": (12, 2), "weight_hh_l0": (12, 3), "bias_ih_l0": (12,), "bias_hh_l0": (12,)}
    recipes = [
        Recipe(f"packed.{name}", tuple(f"cells.{i}.{name}" for i in range(3)), shape, tuple(range(len(shape))), "stack")
        for name, shape in shapes.items()
    ]
    model = install.install(copy.deepcopy(original), [RegionPlan("", recipes, {})])
    x = torch.randn(4, 5, 2, dtype=F64)
    with torch.no_grad():
        for m in (original, model):
            m.cells[1].weight_ih_l0.fill_(0.25)
    for m in (model, copy.deepcopy(model), fused.unfuse(model)):
        torch.testing.assert_close(m(x), original(x), **CLOSE)
    torch.testing.assert_close(model.float()(x.float()), original.float()(x.float()))


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


@pytest.mark.parametrize("change", ["step", "data", "to", "assign", "replace"])
def test_alias_never_uses_stale_weights(change: str) -> None:
    original = randomize(Model().double())
    model = copy.deepcopy(original)
    before = list(model.parameters())
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (original, model)]
    install.install(model, [feature_plan()], strict=True, packing="alias")
    assert [id(p) for p in model.parameters()] == [id(p) for p in before]
    assert list(model.state_dict()) == list(original.state_dict())
    assert_same_training(original, model)
    other = randomize(Model().double(), 9)
    for m, optimizer in zip((original, model), optimizers):
        if change == "step":
            optimizer.step()
            optimizer.step()
        elif change == "data":
            m.core.nets[2][0].weight.data = other.core.nets[2][0].weight.data.clone()
        elif change == "to":
            m.to(torch.float32).to(F64)
        elif change == "assign":
            m.load_state_dict(other.state_dict(), assign=True)
        else:
            m.core.nets[1][2].weight = nn.Parameter(torch.full((1, 4), 2.0, dtype=F64))
    assert_same_training(original, model)
    with torch.no_grad():
        for m in (original, model):
            m.core.nets[4][0].bias.add_(1)
    assert_same_training(original, model)


def test_alias_falls_back_where_members_disagree_and_copies_and_unfuses() -> None:
    original, model = pair(strict=False, packing="alias")
    for m in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fused.unfuse(model)):
        assert_same_training(copy.deepcopy(original), m)
    assert type(fused.unfuse(model).core) is FeatureNets
    assert_same_training(original, model)
    assert fell_back(model) == []
    packed = install.install(copy.deepcopy(original), [feature_plan()])
    other = randomize(copy.deepcopy(packed), 4)
    model.load_state_dict(other.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(packing.original_state_dict(other).values(), model.state_dict().values()))
    model.core.nets[1][0].half()
    with pytest.raises(RuntimeError):
        model(data())
    assert fell_back(model) == ["nets.1.0.weight has dtype torch.float16, nets.0.0.weight has torch.float64"]


@pytest.mark.parametrize("packing", ["packed", "alias"])
def test_zero_grad_forgets_every_gradient(packing: str) -> None:
    _, model = pair(packing=packing)
    model(data()).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    model.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_a_zero_grad_of_the_users_own_is_called() -> None:
    class Own(FeatureNets):
        calls = 0

        def zero_grad(self, set_to_none: bool = True) -> None:
            Own.calls += 1
            super().zero_grad(set_to_none)

    original = randomize(Model().double())
    original.core.__class__ = Own
    model = install.install(original, [feature_plan()])
    model(data()).sum().backward()
    before = Own.calls
    model.core.zero_grad()
    assert Own.calls == before + 1
    assert all(p.grad is None for p in model.core.parameters())


def test_a_buffer_that_is_not_saved_is_assigned_in_a_lane():
    """torch asks for the signature of ``register_buffer`` then (position tables of transformers' speech models are made in forward)."""
    original, model = pair()
    for each in (original, model):
        each.core.nets[1].table = nn.Buffer(torch.ones(3, dtype=F64), persistent=False)
        each.core.nets[1].table = nn.Buffer(torch.zeros(3, dtype=F64), persistent=False)
    assert "core.nets.1.table" in dict(model.named_buffers())
    assert packing.original_state_dict(model).keys() == original.state_dict().keys()
    x = data()
    assert torch.allclose(model(x), original(x), **CLOSE)
