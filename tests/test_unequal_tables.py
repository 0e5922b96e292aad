"""Tables of unequal widths: one table whose rows are filled up, one look-up, and what filled them up left out again."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from checks import QUICK, Cases, assert_case, assert_equal_models, assert_fused_equals, own_gradients, randn, randomized
from fxfuse import launches
from fxfuse.graph import Recipe
from fxfuse.weights import recipes

SIZES, WIDTHS = (5, 9, 13, 40, 7, 21), (2, 3, 5, 8, 3, 6)
CASES = Cases()
case = CASES.case


def indices(rows: int, *shape: int, seed: int = 0, sizes: tuple[int, ...] = SIZES) -> Tensor:
    """``[rows, *shape, tables]``, each column within its table."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(size, (rows, *shape), generator=generator) for size in sizes], -1)


class Fields(nn.Module):
    """A table per column, as wide as its values are many: models of tables of data."""

    pads: tuple[int | None, ...] = (None,) * 6

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(
            nn.Embedding(size, width, padding_idx=pad) for size, width, pad in zip(SIZES, WIDTHS, self.pads, strict=True)
        )

    def forward(self, x: Tensor) -> Any:
        return torch.cat([table(x[:, i]) for i, table in enumerate(self.tables)], 1)


case(indices(5), heavy=1, total=6)(Fields)


class WithPadding(Fields):
    pads = (0, None, -1, 3, None, 20)


@case(indices(5, 4), heavy=1, total=7)
class OfSequences(Fields):
    """[batch, time, fields], the mean over time of each."""

    def forward(self, x: Tensor) -> Any:
        return torch.cat([table(x[..., i]).mean(1) for i, table in enumerate(self.tables)], -1)


@case(indices(5), heavy=2, total=11)
class Projected(Fields):
    """Brought to one width, as feature tokenizers do."""

    def __init__(self) -> None:
        super().__init__()
        self.onto = nn.ModuleList(nn.Linear(width, 6) for width in WIDTHS)

    def forward(self, x: Tensor) -> Any:
        return torch.stack([onto(table(x[:, i]).relu()) for i, (table, onto) in enumerate(zip(self.tables, self.onto, strict=True))], 1)


class Apart(Fields):
    def forward(self, x: Tensor) -> Any:
        return {str(i): table(x[:, i]) for i, table in enumerate(self.tables)}


@case((indices(5), randn(5, 2)), heavy=2, total=9)
class AmongOthers(Fields):
    """Some of them side by side, in another order than the columns', and other columns between them."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(sum(WIDTHS) + 2, 3)

    def forward(self, x: Tensor, more: Tensor) -> Any:
        a, b, c, d, e, f = (table(x[:, i]) for i, table in enumerate(self.tables))
        return self.last(torch.cat([d, e, f, more, c, a, b], 1))


class Named(Fields):
    """An input of its own for each."""

    def forward(self, x: dict[str, Tensor]) -> Any:
        return torch.cat([table(x[str(i)]) for i, table in enumerate(self.tables)], 1)


@pytest.mark.parametrize("make", [WithPadding, Apart, Named])
def test_checks_of_indices_that_cost_as_much_as_they_save(make: type[Fields]) -> None:
    """In all as many launches as before, or one more; of the heavy ones all but one are gone."""
    x: Any = ({str(i): indices(5)[:, i] for i in range(6)},) if make is Named else (indices(5),)
    fused = assert_fused_equals(randomized(make()), x, **QUICK)
    assert launches.count(lambda: fused.eval()(*x)).heavy == 1


@pytest.mark.parametrize("name", CASES)
def test_tables(name: str) -> None:
    assert_case(CASES[name])


def test_with_verification() -> None:
    assert_fused_equals(randomized(AmongOthers()), (indices(5), randn(5, 2)), heavy=2)


def test_one_table_rather_than_one_for_each_width() -> None:
    """Tables of two columns of one width are fewer launches in all by themselves; all in one are fewer heavy ones."""

    class Tabular(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tables = nn.ModuleList(nn.Embedding(*shape) for shape in zip(SIZES[:5], (2, 4, 3, 2, 5), strict=True))
            self.norms = nn.ModuleList([nn.BatchNorm1d(3), nn.BatchNorm1d(8)])
            self.layers = nn.ModuleList([nn.Linear(19, 8), nn.Linear(8, 2)])

        def forward(self, x: Tensor, more: Tensor) -> Tensor:
            found = torch.cat([table(x[:, i]) for i, table in enumerate(self.tables)], 1)
            hidden = self.layers[0](torch.cat([found, self.norms[0](more)], 1)).relu()
            result: Tensor = self.layers[1](self.norms[1](hidden))
            return result

    model, x = randomized(Tabular()), (indices(5), randn(5, 3))
    fused = fxfuse.optimize(model, x, objective="launches")
    assert launches.count(lambda: fused.eval()(*x)).heavy == 5
    assert_equal_models(model, fused, [(x, {}), ((indices(7, seed=3), randn(7, 3, seed=3)), {})])


@pytest.mark.parametrize(("dims", "refused"), [((1,), ""), ((-1,), "sizes"), ((1, 2), "sizes"), ((0, 1), "")])
def test_only_reductions_that_leave_features_alone_are_of_all_at_once(dims: tuple[int, ...], refused: str) -> None:
    class Reduced(Fields):
        def forward(self, x: Tensor) -> Any:
            return [table(x[..., i]).sum(dims) for i, table in enumerate(self.tables)]

    fused = assert_fused_equals(randomized(Reduced()), indices(5, 4), refused=refused, **QUICK)
    assert launches.count(lambda: fused(indices(5, 4))).heavy == 1


@pytest.mark.parametrize("column", range(6))
@pytest.mark.parametrize("beyond", [-1, 0, 100, 2**62])
def test_an_index_outside_its_own_table_raises(column: int, beyond: int) -> None:
    model = randomized(Fields())
    fused = fxfuse.optimize(model, indices(5), objective="launches", **QUICK)
    assert launches.count(lambda: fused(indices(5))).heavy == 1
    wrong = indices(5)
    wrong[3, column] = beyond if beyond < 0 else SIZES[column] + beyond
    for each in (model, fused):
        with pytest.raises(IndexError, match="out of range"):
            each(wrong)


def test_what_fills_up_stays_zero_and_is_in_no_checkpoint() -> None:
    model = randomized(Fields())
    fused = fxfuse.optimize(model, indices(5), objective="launches", **QUICK)
    (packed,) = fused.parameters()
    assert packed.shape == (sum(SIZES), max(WIDTHS))
    inside = recipes.pack(fxfuse.report(fused).fused[0].recipes[0], [torch.ones(s, w) for s, w in zip(SIZES, WIDTHS, strict=True)])
    assert not packed[inside == 0].any()
    step = torch.optim.AdamW(fused.parameters(), lr=0.1, weight_decay=0.1)
    for seed in range(3):
        fused(indices(6, seed=seed)).square().sum().backward()
        step.step()
    assert not packed[inside == 0].any()
    saved = fxfuse.original_state_dict(fused)
    assert [tuple(value.shape) for value in saved.values()] == list(zip(SIZES, WIDTHS, strict=True))


def test_copies_pickles_and_shared_parameters() -> None:
    model = randomized(Fields())
    fused = fxfuse.optimize(model, indices(5), objective="launches", **QUICK)
    trials = [((indices(7, seed=4),), {})]
    for each in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert_equal_models(model, each, trials)
    kept = fxfuse.optimize(copy.deepcopy(model), objective="launches", strict=True)
    kept(indices(5))
    assert fxfuse.report(kept).fused
    assert_equal_models(model, kept, trials, gradients=own_gradients)


@pytest.mark.parametrize("option", ["sparse", "max_norm", "shared", "frozen"])
def test_what_cannot_be_filled_up_stays_by_width(option: str) -> None:
    model = randomized(Fields())
    for i, table in enumerate(model.tables):
        if option == "sparse":
            table.sparse = True
        elif option == "max_norm":
            table.max_norm = 1.0
        elif option == "frozen":
            table.weight.requires_grad_(i % 2 == 0)
    if option == "shared":
        model.tables[4] = model.tables[1]
    x = indices(5) % 5
    fused = fxfuse.optimize(model, x, objective="launches", **QUICK)
    if option == "sparse":
        with torch.no_grad():
            assert torch.equal(fused(x), model(x))
        return
    assert_equal_models(model, fused, [((x,), {}), ((indices(7, seed=2) % 5,), {})])


def test_waste_is_bounded() -> None:
    """A narrow table of many rows is not filled up to a wide one's width."""

    class Uneven(Fields):
        def __init__(self) -> None:
            super().__init__()
            shapes = ((1000, 1), (10, 64), (8, 48), (900, 2))
            self.tables = nn.ModuleList(nn.Embedding(*shape) for shape in shapes)

        def forward(self, x: Tensor) -> Any:
            return [table(x[:, i % 4]) for i, table in enumerate(self.tables)]

    model = randomized(Uneven())
    x = indices(5) % 5
    fused = fxfuse.optimize(model, x, objective="launches", **QUICK)
    assert_equal_models(model, fused, [((x,), {})])
    before = sum(parameter.numel() for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in fused.parameters()) <= 4 * before


def test_a_recipe_of_rows_of_unequal_widths_is_exact_both_ways() -> None:
    shapes = tuple(zip(SIZES, WIDTHS, strict=True))
    recipe = Recipe("packed.weight", tuple(f"{i}.weight" for i in range(6)), (5, 8), (0, 1), "rows", own_shapes=shapes)
    recipes.check(recipe)
    tensors = [randn(*shape, seed=i) for i, shape in enumerate(shapes)]
    packed = recipes.pack(recipe, tensors)
    assert tuple(packed.shape) == recipes.packed_shape(recipe) == (sum(SIZES), 8)
    for views in (recipes.unpack(recipe, packed), recipes.lane_views(recipe, packed)):
        for view, tensor in zip(views, tensors, strict=True):
            assert torch.equal(view, tensor)
            assert view.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()
