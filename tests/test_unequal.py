"""Lanes of unequal widths: layers that take, or give, other numbers of features in every lane."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxfuse
from checks import QUICK, Cases, assert_case, assert_fused_equals, own_gradients, randn, randomized
from fxfuse import launches
from fxfuse.errors import FxfuseError
from fxfuse.graph import Recipe
from fxfuse.passes.unequal import MOST_WASTE
from fxfuse.weights.recipes import check, lane_views, pack, packed_shape, unpack

CASES = Cases()
case = CASES.case


def columns(x, widths):
    return torch.split(x, list(widths), dim=-1)


@case(randn(5, 17), heavy=2, total=6)
class OneNetworkPerGroupOfColumns(nn.Module):
    widths = (3, 5, 2, 7)

    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(w, 6), nn.ReLU(), nn.Linear(6, 1)) for w in self.widths)

    def forward(self, x):
        return torch.cat([net(part) for net, part in zip(self.nets, columns(x, self.widths))], 1)


@case(randn(3, 4, 17), heavy=2, total=6)
class InSequences(OneNetworkPerGroupOfColumns):
    """[batch, time, features]"""

    def forward(self, x):
        return torch.cat([net(part) for net, part in zip(self.nets, columns(x, self.widths))], -1)


@case(randn(17), heavy=2, total=6, batches=(), make=lambda rows: randn(17, seed=rows))
class OneRow(OneNetworkPerGroupOfColumns):
    def forward(self, x):
        return torch.cat([net(part) for net, part in zip(self.nets, columns(x, self.widths))], -1)


@case(({"a": randn(5, 3), "b": randn(5, 2, seed=2), "c": randn(5, 6, seed=3), "d": randn(5, 4, seed=4)},), heavy=2, total=7)
class OneNetworkPerInput(nn.Module):
    """A dict of inputs, as variable selection has it."""

    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleDict(
            {k: nn.Sequential(nn.Linear(w, 6), nn.ELU(), nn.Linear(6, 6, bias=False)) for k, w in dict(a=3, b=2, c=6, d=4).items()}
        )

    def forward(self, x):
        return torch.stack([self.nets[name](value) for name, value in x.items()], -1)


@case(randn(5, 9), heavy=2, total=6)
class OverlappingWindows(nn.Module):
    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(w, 4), nn.Tanh(), nn.Linear(4, 2)) for w in (2, 3, 4, 5))

    def forward(self, x):
        return sum(net(x[:, i : i + 2 + i]) for i, net in enumerate(self.nets))


@case(randn(5, 4), heavy=2, total=4)
class HeadsOfUnequalWidths(nn.Module):
    """As many outputs as a task has classes."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 8)
        self.heads = nn.ModuleList(nn.Linear(8, classes) for classes in (3, 5, 2, 7))

    def forward(self, x):
        hidden = torch.relu(self.body(x))
        return [head(hidden) for head in self.heads]


@case(randn(5, 4), heavy=3, total=10)
class DeepHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleDict(
            {str(c): nn.Sequential(nn.Linear(4, c + 1), nn.GELU(), nn.Linear(c + 1, 6), nn.ReLU(), nn.Linear(6, c)) for c in (3, 5, 2, 7)}
        )

    def forward(self, x):
        return {name: head(x) for name, head in self.heads.items()}


@case(randn(5, 4), heavy=3, total=14)
class HiddenWidths(nn.Module):
    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleList(
            nn.Sequential(nn.Linear(1, h), nn.Tanh(), nn.Linear(h, h + 1), nn.Softplus(), nn.Linear(h + 1, 1)) for h in (3, 5, 2, 7)
        )

    def forward(self, x):
        return torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1)


@case(randn(5, 4), heavy=4, total=7)
class GateBesideExperts(nn.Module):
    """The gate is a lane of the experts' first layer; experts of one width lie one behind the other."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)) for _ in range(5))
        self.gate = nn.Linear(4, 5)

    def forward(self, x):
        outs = torch.stack([expert(x) for expert in self.experts], 1)
        return (outs * torch.softmax(self.gate(x), -1).unsqueeze(-1)).sum(1)


@case(randn(3, 4, 6, 6), heavy=2, total=5)
class PointwiseBranches(nn.Module):
    """1x1 convolutions of one input, as in an inception block."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(4, 4, 3)
        self.branches = nn.ModuleList(nn.Conv2d(4, c, 1, bias=c != 0) for c in (2, 5, 3))

    def forward(self, x):
        x = self.stem(x)
        return torch.cat([F.relu(branch(x)) for branch in self.branches], 1)


@case(randn(3, 4, 9), heavy=1, total=3)
class Convolutions1d(nn.Module):
    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv1d(4, c, 3, padding=1) for c in (2, 5, 3))

    def forward(self, x):
        return [branch(x).tanh() for branch in self.branches]


@case(randn(3, 2, 4, 5, 5), heavy=1, total=3)
class Convolutions3d(nn.Module):
    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv3d(2, c, 2, bias=False) for c in (2, 5, 3))

    def forward(self, x):
        return [branch(x).tanh() for branch in self.branches]


@case((randn(5, 3), randn(5, 7, seed=2)), heavy=3, total=9)
class TwoTowers(nn.Module):
    """Two first layers, which filling up would not make fewer launches; the others are lanes."""

    def __init__(self):
        super().__init__()
        self.user = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU())
        self.item = nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU())

    def forward(self, user, item):
        return (self.user(user) * self.item(item)).sum(-1)


@pytest.mark.parametrize("name", CASES)
def test_unequal(name):
    assert_case(CASES[name])


@pytest.mark.parametrize("name", ["OneNetworkPerGroupOfColumns", "HeadsOfUnequalWidths", "HiddenWidths", "PointwiseBranches"])
def test_with_the_planner(name):
    assert_fused_equals(randomized(CASES[name].model()), CASES[name].x, heavy=CASES[name].heavy)


def fused_of(cls, x, **options):
    model = randomized(cls())
    return model, fxfuse.optimize(model, x, objective="launches", **{**QUICK, **options})


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("cls", [OneNetworkPerGroupOfColumns, HiddenWidths, OverlappingWindows])
def test_inf_and_nan_stay_in_their_lane(cls, bad):
    x = CASES[cls.__name__].x
    model, fused = fused_of(cls, x)
    for column in range(x.shape[1]):
        given = x.clone()
        given[1, column] = bad
        torch.testing.assert_close(fused(given), model(given), rtol=1e-10, atol=0, equal_nan=True)


def test_what_fills_up_stays_zero():
    """Training steps, with momentum and weight decay, move nothing but the lanes' own weights."""
    x = randn(5, 17)
    model, fused = fused_of(OneNetworkPerGroupOfColumns, x)
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.AdamW(each.parameters(), lr=0.01, weight_decay=0.1) for each in (twin, fused)]
    for step in range(20):
        for each, optimizer in zip((twin, fused), optimizers):
            optimizer.zero_grad()
            each(randn(5, 17, seed=step)).square().mean().backward()
            optimizer.step()
    saved = fxfuse.original_state_dict(fused)
    for key, value in twin.state_dict().items():
        torch.testing.assert_close(saved[key], value, rtol=1e-9, atol=1e-12)
    (recipe,) = [r for plan in fxfuse.report(fused).fused for r in plan.recipes if r.style == "padded"]
    packed = fused.get_parameter(recipe.name)
    own = sum(tensor.numel() for tensor in unpack(recipe, packed.detach()))
    assert int(packed.count_nonzero()) == own < packed.numel()


def test_gradients_may_be_written_into_an_output():
    """Heads leave as tensors of their own: writing into one and calling backward is as before."""
    x = randn(5, 4)
    model, fused = fused_of(HeadsOfUnequalWidths, x)
    grads = []
    for each in (model, fused):
        each.zero_grad()
        outs = each(x)
        outs[1].mul_(2)
        sum(out.square().sum() for out in outs).backward()
        grads.append(own_gradients(each) if each is model else fxfuse.weights.packing.original_gradients(each))
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cls", [OneNetworkPerGroupOfColumns, HiddenWidths, HeadsOfUnequalWidths])
def test_copies_pickles_and_shared_parameters(cls):
    x = CASES[cls.__name__].x
    model, fused = fused_of(cls, x)
    expected = torch.utils._pytree.tree_leaves(model(x))
    lazy = fxfuse.optimize(model, tune=False)
    lazy(x)
    inside = fxfuse.optimize(copy.deepcopy(model), x, objective="launches", inplace=True, **QUICK)
    for each in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), fxfuse.unfuse(fused), lazy, inside):
        for got, want in zip(torch.utils._pytree.tree_leaves(each(x)), expected):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["OneNetworkPerGroupOfColumns", "HeadsOfUnequalWidths", "HiddenWidths", "PointwiseBranches"])
def test_autocast_takes_the_fast_way(name):
    case = CASES[name]
    model = randomized(case.model()).float()
    fused = fxfuse.optimize(model, case.x.float(), objective="launches", **QUICK)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = (torch.utils._pytree.tree_leaves(each(case.x.float())) for each in (fused, model))
        counted = launches.count(lambda: fused(case.x.float()))
    assert counted.heavy == case.heavy
    assert not fxfuse.report(fused).fallbacks
    for a, b in zip(got, want):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0.03, atol=0.03)


def test_dtype_and_freezing():
    model = randomized(OneNetworkPerGroupOfColumns())
    for net in model.nets:
        net[0].requires_grad_(False)
    assert_fused_equals(model, randn(5, 17), heavy=2, **QUICK)


def test_a_frozen_lane_stays_out():
    model = randomized(OneNetworkPerGroupOfColumns())
    model.nets[1][0].requires_grad_(False)
    assert_fused_equals(model, randn(5, 17), refused="requires_grad False against True", **QUICK)


def test_waste_is_bounded():
    """Four of width 1 beside one of width 64: filling up all would multiply the work by more than the bound."""
    widths = (1, 1, 1, 1, 64)

    class Skewed(OneNetworkPerGroupOfColumns):
        pass

    Skewed.widths = widths
    assert 5 * 64 / sum(widths) > MOST_WASTE
    model = randomized(Skewed())
    fused = assert_fused_equals(model, randn(5, 68), refused="nets.4.0 stays out", **QUICK)
    assert all(r.style != "padded" for plan in fxfuse.report(fused).fused for r in plan.recipes)


class Chained(nn.Module):
    """No lanes: each reads what the one before it gives, in other widths."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in ((4, 6), (6, 3), (3, 5)))

    def forward(self, x):
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


def test_layers_in_a_row_are_no_lanes():
    fused = fxfuse.optimize(randomized(Chained()), randn(5, 4), objective="launches")
    assert not fxfuse.report(fused).fused


class TiedAmongOthers(OneNetworkPerGroupOfColumns):
    def __init__(self):
        super().__init__()
        self.nets[3][0] = nn.Linear(3, 6)
        self.nets[3][0].weight = self.nets[0][0].weight

    widths = (3, 5, 2, 3)


def test_a_tied_weight():
    model, x = randomized(TiedAmongOthers()), randn(5, 13)
    fused = fxfuse.optimize(model, x, objective="launches", **QUICK)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-10, atol=1e-12)


def test_dropout_between_unequal_layers_draws_as_often():
    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.nets = nn.ModuleList(nn.Sequential(nn.Linear(1, h), nn.Dropout(0.25), nn.Linear(h, 1)) for h in (30, 50, 20))

        def forward(self, x):
            return torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1)

    model = randomized(Dropped())
    assert_fused_equals(model, randn(5, 3), random_in_train=True, most_heavy=2, **QUICK)


# -- the recipe -------------------------------------------------------------------------------------------------------------------

SHAPES = (((3, 5), (2, 7), (4, 1)), ((3,), (1,), (6,)), ((2, 2), (2, 9), (2, 3)))


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("turned", [False, True])
def test_filled_up_recipe_is_exact_both_ways(shapes, turned):
    most = tuple(max(sizes) for sizes in zip(*shapes))
    order = tuple(range(len(most)))[:: -1 if turned else 1]
    recipe = Recipe("packed.weight", tuple("abc"), most, order, "padded", own_shapes=shapes)
    check(recipe)
    tensors = [randn(*shape, seed=i) for i, shape in enumerate(shapes)]
    packed = pack(recipe, tensors)
    assert packed.shape == packed_shape(recipe)
    for views in (unpack(recipe, packed), lane_views(recipe, packed)):
        for got, want in zip(views, tensors):
            assert torch.equal(got, want)
            assert got.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()
    assert packed.count_nonzero() == sum(tensor.numel() for tensor in tensors)


def test_a_filled_up_recipe_that_contradicts_itself():
    with pytest.raises(FxfuseError, match="none larger than"):
        check(Recipe("packed.weight", ("a", "b"), (2, 3), (0, 1), "padded", own_shapes=((2, 3), (2, 4))))
