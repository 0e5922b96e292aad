"""Regions planned by hand: instances of their own class, and copied, pickled, saved and unfused as such."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch
from hand_built import FeatureNets, Model, specs
from hand_installed import F64, assert_same_training, data, pair
from torch import Tensor, nn

from fxfuse import fused
from fxfuse.errors import FallbackError
from fxfuse.graph import Guard, Program, Recipe, RegionPlan, TensorGuard
from fxfuse.running import install


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
