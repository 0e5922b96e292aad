"""Regions planned by hand: the program and the loop read the same weights, and writes, gradients and flags reach them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from hand_built import FeatureNets, Model, feature_plan, randomize
from hand_installed import CLOSE, F64, assert_same_training, data, fell_back, pair
from torch import Tensor, nn

from fxfuse import fused
from fxfuse.errors import ArgumentError, FallbackError, FxfuseError
from fxfuse.graph import Recipe, RegionPlan
from fxfuse.running import install
from fxfuse.weights import packing

# -- what is read --------------------------------------------------------------------------------------------------------------------------


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


# -- what is written -----------------------------------------------------------------------------------------------------------------------


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


# -- what is trained -----------------------------------------------------------------------------------------------------------------------


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


# -- packs of weights that stay where they are ---------------------------------------------------------------------------------------------


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
