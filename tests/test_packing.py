"""Recipes, state dicts and gradients by the original's names: exact both ways."""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict

import pytest
import torch
from hand_built import Model, feature_plan, randomize
from torch import nn

from fxfuse import fused
from fxfuse.errors import FxfuseError, StateDictError
from fxfuse.graph import Recipe
from fxfuse.running import install
from fxfuse.weights import packing
from fxfuse.weights.recipes import lane_views


def pair(cat: bool = False, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    original = randomize(Model().double(), seed)
    return original, install.install(copy.deepcopy(original), [feature_plan(cat=cat)], strict=True)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


CASES = [
    ((shape, order), style)
    for shape in [(), (3,), (3, 4), (2, 3, 4)]
    for order in itertools.permutations(range(len(shape)))
    for style in ("stack", "cat")
    if shape or style == "stack"
]


@pytest.mark.parametrize(("layout", "style"), CASES)
def test_pack_and_unpack_are_inverse_bit_for_bit(layout: tuple, style: str) -> None:
    shape, order = layout
    recipe = Recipe("packed.weight", ("0.weight", "1.weight", "2.weight"), shape, order, style)
    lanes = [torch.randn(shape) for _ in range(3)]
    packed = packing.pack(recipe, lanes)
    assert tuple(packed.shape) == packing.packed_shape(recipe)
    for back in (packing.unpack(recipe, packed), lane_views(recipe, packed)):
        assert all(torch.equal(a, b) for a, b in zip(back, lanes))
        assert all(a.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr() for a in back)


@pytest.mark.parametrize("style", ["stack", "cat"])
def test_packing_stores_the_members_as_the_recipe_says(style: str) -> None:
    recipe = Recipe("packed.w", ("0.w", "1.w"), (2, 3), (1, 0), style)
    a, b = torch.arange(6.0).view(2, 3), torch.arange(6.0, 12.0).view(2, 3)
    expected = torch.stack([a.t(), b.t()])
    assert torch.equal(packing.pack(recipe, [a, b]), expected if style == "stack" else expected.flatten(0, 1))


def test_recipes_refuse_what_does_not_fit() -> None:
    recipe = Recipe("packed.w", ("0.w", "1.w"), (2, 3), (0, 1), "stack")
    with pytest.raises(FxfuseError, match=r"1\.w has shape \(3, 2\), its recipe says \(2, 3\)"):
        packing.pack(recipe, [torch.zeros(2, 3), torch.zeros(3, 2)])
    with pytest.raises(FxfuseError, match="packed of 2 tensors, got 1"):
        packing.pack(recipe, [torch.zeros(2, 3)])
    with pytest.raises(FxfuseError, match=r"has shape \(4, 3\), its recipe says \(2, 2, 3\)"):
        packing.unpack(recipe, torch.zeros(4, 3))


@pytest.mark.parametrize("cat", [False, True])
def test_original_state_dict_is_the_originals(cat: bool) -> None:
    original, model = pair(cat)
    saved = packing.original_state_dict(model)
    assert same(saved, original.state_dict())
    assert saved._metadata == original.state_dict()._metadata
    assert same(packing.original_state_dict(original), original.state_dict())
    with torch.no_grad():  # copies, not views
        model.core.packed.nets.get_submodule("0").weight.zero_()
    assert same(saved, original.state_dict())


def test_the_plain_state_dict_has_packed_names() -> None:
    _, model = pair()
    names = list(model.state_dict())
    assert "core.packed.nets.0.weight" in names
    assert not any(name.startswith("core.nets") or "index" in name for name in names)
    assert [n for n in names if "packed" in n] == [n for n, _ in model.named_parameters() if "packed" in n]


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("naming", ["packed", "original"])
def test_load_state_dict_takes_either_naming(naming: str, assign: bool) -> None:
    original, source = pair()
    _, model = pair(seed=1)
    given = source.state_dict() if naming == "packed" else original.state_dict()
    result = model.load_state_dict(given, assign=assign)
    assert result.missing_keys == []
    assert result.unexpected_keys == []
    assert same(packing.original_state_dict(model), original.state_dict())
    x = torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(model(x), original(x), rtol=1e-12, atol=1e-12)
    assert len(list(model.parameters())) == len({p.data_ptr() for p in model.parameters()})


def test_load_original_names_onto_meta_with_assign() -> None:
    original, _ = pair()
    _, model = pair(seed=1)
    model = model.to("meta")
    model.load_state_dict(original.state_dict(), assign=True)
    assert same(packing.original_state_dict(model), original.state_dict())
    _, model = pair(seed=1)
    model = model.to("meta")
    partial = OrderedDict((k, v) for k, v in original.state_dict().items() if k != "core.nets.1.0.bias")
    with pytest.raises(RuntimeError, match=r"core\.nets\.0\.0\.weight cannot be loaded alone into a pack on the meta device"):
        model.load_state_dict(partial, assign=True, strict=False)


def test_load_state_dict_errors_name_the_originals() -> None:
    original, _ = pair()
    _, model = pair(seed=1)
    given = original.state_dict()
    del given["core.nets.3.2.weight"]
    given["core.nets.1.0.wieght"] = torch.zeros(1)
    given["core.nets.2.0.weight"] = torch.zeros(7)
    with pytest.raises(RuntimeError) as caught:
        model.load_state_dict(given)
    text = str(caught.value)
    assert 'Missing key(s) in state_dict: "core.nets.3.2.weight".' in text
    assert 'Unexpected key(s) in state_dict: "core.nets.1.0.wieght".' in text
    assert "size mismatch for core.nets.2.0.weight" in text
    assert "packed" not in text


def test_partial_loads_write_only_what_is_given() -> None:
    original, _ = pair()
    other, model = pair(seed=1)
    part = {name: value for name, value in original.state_dict().items() if ".nets.2." in name}
    result = model.load_state_dict(part, strict=False)
    expected = other.state_dict()
    expected.update(part)
    assert same(packing.original_state_dict(model), expected)
    assert {name for name in result.missing_keys if "after" not in name} == {n for n in other.state_dict() if "after" not in n} - set(part)
    model.core.nets[4].load_state_dict(original.core.nets[4].state_dict())  # one lane by itself
    assert torch.equal(model.core.nets[4][2].weight, original.core.nets[4][2].weight)
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*0\.weight"):
        model.core.nets[4].load_state_dict({"0.bias": torch.zeros(4)})


def test_load_original_state_dict_checks_before_it_writes() -> None:
    original, _ = pair()
    other, model = pair(seed=1)
    before = packing.original_state_dict(model)
    given = original.state_dict()
    del given["core.nets.0.0.weight"]
    given["core.nets.9.0.weight"] = torch.zeros(2)
    given["after.weight"] = torch.zeros(3)
    with pytest.raises(StateDictError) as caught:
        packing.load_original_state_dict(model, given)
    text = str(caught.value)
    assert "missing: core.nets.0.0.weight" in text
    assert "unexpected: core.nets.9.0.weight" in text
    assert "after.weight has shape (3,), the model has (2,)" in text
    assert same(packing.original_state_dict(model), before)

    packing.load_original_state_dict(model, original.state_dict())
    assert same(packing.original_state_dict(model), original.state_dict())
    packing.load_original_state_dict(model, {"core.nets.0.0.bias": torch.zeros(4)}, strict=False)
    assert model.core.nets[0][0].bias.abs().max() == 0
    assert torch.equal(model.core.nets[1][0].bias, original.core.nets[1][0].bias)
    packing.load_original_state_dict(other, original.state_dict())
    assert same(other.state_dict(), original.state_dict())


@pytest.mark.parametrize("cat", [False, True])
def test_parameters_and_gradients_by_original_name(cat: bool) -> None:
    original, model = pair(cat)
    x = torch.randn(6, 5, dtype=torch.float64)
    assert all(grad is None for grad in packing.original_gradients(model).values())
    original(x).square().sum().backward()
    model(x).square().sum().backward()
    names = [name for name, _ in original.named_parameters()]
    assert list(packing.original_named_parameters(model)) == names == list(packing.original_gradients(model))
    assert same(packing.original_named_parameters(model), dict(original.named_parameters()))
    for name, grad in packing.original_gradients(model).items():
        torch.testing.assert_close(grad, original.get_parameter(name).grad, rtol=1e-11, atol=1e-11)
    assert list(packing.original_gradients(original)) == names


def test_gradients_come_along_when_packed_in_mid_training() -> None:
    original = randomize(Model().double())
    original(torch.randn(6, 5, dtype=torch.float64)).square().sum().backward()
    model = copy.deepcopy(original)
    for a, b in zip(model.parameters(), original.parameters()):
        a.grad = b.grad.clone()
    install.install(model, [feature_plan()])
    grads = packing.original_gradients(model)
    assert same(grads, {name: p.grad for name, p in original.named_parameters()})


class Tied(nn.Module):
    """Two lanes whose layers are also reachable by other names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.lanes = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
        self.first.weight = self.lanes[1].weight
        self.twice = self.lanes[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lanes[0](x) + self.lanes[1](x) + self.first(x) + self.twice(x)


def tied_plan() -> object:
    plan = feature_plan(path="")
    plan.recipes = [Recipe("packed.lanes.weight", ("lanes.0.weight", "lanes.1.weight"), (3, 3), (1, 0), "stack")]
    plan.programs, plan.constants = {}, {}
    return plan


def test_tied_names_are_all_served() -> None:
    original = randomize(Tied().double())
    model = install.install(copy.deepcopy(original), [tied_plan()])
    assert same(packing.original_state_dict(model), original.state_dict())
    assert list(packing.original_named_parameters(model)) == [name for name, _ in original.named_parameters()]
    x = torch.randn(2, 3, dtype=torch.float64)
    torch.testing.assert_close(model(x), original(x), rtol=1e-13, atol=1e-13)
    with torch.no_grad():
        model.lanes[1].weight.fill_(3.0)
    assert model.first.weight.eq(3).all()
    back = fused.unfuse(model)
    assert back.first.weight is back.lanes[1].weight
    assert back.twice is back.lanes[0]
    other = randomize(Tied().double(), 7)
    model.load_state_dict(other.state_dict(), assign=True)
    torch.testing.assert_close(model(x), other(x), rtol=1e-13, atol=1e-13)
    with pytest.raises(FxfuseError, match=r"is also head\.weight, outside of the region"):
        holder = nn.ModuleDict({"body": Tied(), "head": nn.Linear(3, 3)})
        holder["head"].weight = holder["body"].lanes[0].weight
        plan = tied_plan()
        plan.path = "body"
        install.install(holder, [plan])
