"""Embedding and EmbeddingBag in lanes, as recommenders and codec models write them: one table and offsets, or one shared table."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import checks
import fxfuse
from fxfuse.graph import Recipe
from fxfuse.planning.memory import peak_bytes
from fxfuse.weights import recipes

ROWS = (7, 3, 11, 5, 4, 9, 2, 6)  # unequal tables


def indices(rows: int, sizes: tuple[int, ...] = ROWS, length: int | None = None, seed: int = 3) -> Tensor:
    """Valid indices, ``[rows, fields]`` or ``[rows, fields, length]``; both ends of every table occur."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows,) if length is None else (rows, length)
    columns = [torch.randint(size, shape, generator=generator) for size in sizes]
    for column, size in zip(columns, sizes, strict=True):
        column.flatten()[0] = size - 1
        column.flatten()[-1] = 0
    return torch.stack(columns, 1)


def floats(rows: int) -> Tensor:
    """Other indices in the columns of a float tensor."""
    return indices(rows, seed=rows + 20).double()


class Fields(nn.Module):
    """deepctr, DeepFM: a dict of tables by field name, all fields in the columns of one float tensor."""

    def __init__(self, sizes: tuple[int, ...] = ROWS, dim: int = 4, **options: object) -> None:
        super().__init__()
        self.names = [f"C{i}" for i in range(len(sizes))]
        self.embedding_dict = nn.ModuleDict({n: nn.Embedding(size, dim, **options) for n, size in zip(self.names, sizes, strict=True)})
        self.head = nn.Linear(dim * len(sizes), 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.embedding_dict[name](x[:, i].long()) for i, name in enumerate(self.names)], dim=-1))


class SlicedFields(Fields):
    """deepctr-torch: a slice of width one per feature, the embeddings side by side."""

    def forward(self, x: Tensor) -> Tensor:
        found = [self.embedding_dict[name](x[:, i:i + 1].long()) for i, name in enumerate(self.names)]
        return self.head(torch.cat(found, dim=1).flatten(1))


class Codebooks(nn.Module):
    """MusicGen, Bark: the sum of codebook embeddings."""

    def __init__(self, books: int = 4, size: int = 9, dim: int = 5) -> None:
        super().__init__()
        self.books = books
        self.embed_tokens = nn.ModuleList(nn.Embedding(size, dim) for _ in range(books))

    def forward(self, codes: Tensor) -> Tensor:
        return sum(self.embed_tokens[k](codes[:, k]) for k in range(self.books))


class HashBuckets(nn.Module):
    """CANINE: tables found by name, each on its own hash of the same ids."""

    primes = (31, 43, 59, 61, 73, 97, 103, 113)

    def __init__(self, buckets: int = 16, dim: int = 3) -> None:
        super().__init__()
        self.buckets = buckets
        for i in range(len(self.primes)):
            setattr(self, f"HashBucketCodepointEmbedder_{i}", nn.Embedding(buckets, dim))

    def forward(self, ids: Tensor) -> Tensor:
        parts = []
        for i, prime in enumerate(self.primes):
            hashed = ((ids + 1) * prime) % self.buckets
            parts.append(getattr(self, f"HashBucketCodepointEmbedder_{i}")(hashed))
        return torch.cat(parts, dim=-1)


class SharedTable(nn.Module):
    """One table for the words of title, body and author."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.words = nn.Embedding(12, 4, **options)
        self.towers = nn.ModuleList(nn.Linear(4, 2) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([tower(self.words(x[:, i])) for i, tower in enumerate(self.towers)], 1)


class Named(nn.Module):
    """A dict of inputs, a table each; sequences pooled."""

    def __init__(self, sizes: tuple[int, ...] = (7, 5, 6)) -> None:
        super().__init__()
        self.tables = nn.ModuleDict({f"f{i}": nn.Embedding(size, 4) for i, size in enumerate(sizes)})

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return torch.cat([self.tables[name](inputs[name]).mean(1) for name in self.tables], 1)


class Bags(nn.Module):
    """A bag of ids per field: two-dimensional inputs."""

    def __init__(self, sizes: tuple[int, ...] = ROWS, **options: object) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(size, 4, **options) for size in sizes)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([bag(x[:, i]) for i, bag in enumerate(self.bags)], dim=1)


class WeightedBags(Bags):
    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return torch.cat([bag(x[:, i], per_sample_weights=w[:, i]) for i, bag in enumerate(self.bags)], dim=1)


class DLRM(nn.Module):
    """DLRM: ``apply_emb`` over stacked one-dimensional indices and offsets."""

    def __init__(self, sizes: tuple[int, ...] = ROWS, **options: object) -> None:
        super().__init__()
        self.emb_l = nn.ModuleList(nn.EmbeddingBag(size, 3, **options) for size in sizes)

    def forward(self, lS_o: Tensor, lS_i: Tensor) -> Tensor:
        ly = []
        for k, sparse_index_group_batch in enumerate(lS_i):
            ly.append(self.emb_l[k](sparse_index_group_batch, lS_o[k]))
        return torch.cat(ly, dim=1)


class Tied(nn.Module):
    """The last layer of each lane is its table: a look-up and a product read the same weight."""

    def __init__(self, sizes: tuple[int, ...] = (5, 8, 6)) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(size, 4) for size in sizes)

    def forward(self, x: Tensor) -> list[Tensor]:
        hidden = [table(x[:, i]) for i, table in enumerate(self.tables)]
        return [torch.nn.functional.linear(h.tanh(), table.weight) for h, table in zip(hidden, self.tables, strict=True)]


@pytest.mark.parametrize("kind", [Fields, SlicedFields])
@pytest.mark.parametrize("sizes", [ROWS, (6, 6, 6, 6, 6, 6), (3, 9) * 4])
def test_a_table_per_field(kind: type[Fields], sizes: tuple[int, ...]) -> None:
    model = checks.randomized(kind(sizes))

    def make(rows: int) -> Tensor:
        return indices(rows, sizes, seed=rows).double()

    fused = checks.assert_fused_equals(model, make(6), most_heavy=2, make=make, batches=(1, 9), **checks.QUICK)
    assert "one table and offsets" in str(fxfuse.report(fused).to_dict())


def test_codebook_embeddings_are_summed() -> None:
    model = checks.randomized(Codebooks(8))
    checks.assert_fused_equals(model, torch.randint(9, (3, 8, 5)), most_heavy=1, make=lambda rows: torch.randint(9, (rows, 8, 5)))


def test_hash_buckets_by_name() -> None:
    checks.assert_fused_equals(checks.randomized(HashBuckets()), torch.randint(1000, (3, 5)), most_heavy=1)


@pytest.mark.parametrize("options", [{}, {"padding_idx": 0}, {"padding_idx": -1}])
def test_one_table_for_many_columns(options: dict[str, int]) -> None:
    model = checks.randomized(SharedTable(**options))
    checks.assert_fused_equals(model, torch.randint(12, (4, 3, 6)), most_heavy=2, make=lambda rows: torch.randint(12, (rows, 3, 6)))


def test_a_dict_of_inputs() -> None:
    x = {f"f{i}": torch.randint(5, (4, 6)) for i in range(3)}
    checks.assert_fused_equals(checks.randomized(Named()), (x,))


def test_tables_read_by_a_product_too() -> None:
    model = checks.randomized(Tied())
    said = "no lanes of one loop: weight [5, 4] against [8, 4]"
    checks.assert_fused_equals(model, indices(5, (5, 8, 6)), make=lambda rows: indices(rows, (5, 8, 6), seed=rows), refused=said)


def test_a_table_read_by_two_lanes() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.user, self.item, self.tag = nn.Embedding(5, 3), nn.Embedding(8, 3), nn.Embedding(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            tables = [self.user, self.item, self.tag, self.item]
            return torch.stack([table(x[:, i]) for i, table in enumerate(tables)], 1)

    checks.assert_fused_equals(checks.randomized(Twice()), indices(5, (5, 8, 6, 8)), most_heavy=1)


def test_frozen_and_trained_tables_stay_apart() -> None:
    model = checks.randomized(Fields())
    for name in ("C1", "C2", "C5"):
        model.embedding_dict[name].weight.requires_grad_(False)
    checks.assert_fused_equals(model, indices(6).double(), most_heavy=3, make=floats)


@pytest.mark.parametrize("pads", [(0,) * 8, (None, 1, 10, None, 3, 0, 1, -1)])
def test_a_padding_row_per_table(pads: tuple[int | None, ...]) -> None:
    model = Fields()
    for (name, table), pad in zip(list(model.embedding_dict.items()), pads, strict=True):
        model.embedding_dict[name] = nn.Embedding(table.num_embeddings, 4, padding_idx=pad)
    model = checks.randomized(model)
    x = indices(9).double()
    fused = checks.assert_fused_equals(model, x, most_heavy=2, make=floats)
    fused(x).sum().backward()
    for name, pad in zip(model.names, pads, strict=True):
        if pad is not None:
            assert not fxfuse.weights.packing.original_gradients(fused)[f"embedding_dict.{name}.weight"][pad].any()


@pytest.mark.parametrize("kind", [Fields, Bags, DLRM])
def test_an_index_outside_its_own_table_raises(kind: type[nn.Module]) -> None:
    model = checks.randomized(kind())
    good = {"Fields": (indices(6),), "Bags": (indices(6, length=2),), "DLRM": (torch.tensor([[0, 2]] * 8), indices(6).T.contiguous())}
    args = good[kind.__name__]
    fused = fxfuse.optimize(model, args, objective="launches", strict=True, **checks.QUICK)
    assert fxfuse.report(fused).fused
    fused(*args)
    limits = torch.iinfo(torch.int64)
    for lane in range(8):
        for wrong in (ROWS[lane], -1, limits.min, limits.max):
            bad = args[-1].clone()
            (bad[lane, 1] if kind is DLRM else bad[1, lane]).fill_(wrong)
            with pytest.raises((IndexError, RuntimeError)) as expected:
                model(*args[:-1], bad)
            with pytest.raises(type(expected.value)):
                fused(*args[:-1], bad)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_max_norm_is_refused(kind: type[nn.Module]) -> None:
    class Renormed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tables = nn.ModuleList(kind(6, 3, max_norm=1.0) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([table(x[:, i]) for i, table in enumerate(self.tables)], 1)

    model = checks.randomized(Renormed())
    x = torch.randint(6, (5, 4, 2))
    fused = fxfuse.optimize(copy.deepcopy(model), x, objective="launches", **checks.QUICK)
    report = fxfuse.report(fused)
    assert not report.fused
    sentence = "tables.0 (and 3 others) stays a call of its own: max_norm renormalizes its weight in forward"
    assert sentence in [refusal.reason for refusal in report.refused]
    checks.assert_close(fused(x).detach(), model(x).detach(), "renormed")


@pytest.mark.parametrize("options", [{"scale_grad_by_freq": True}, {"sparse": True}, {"sparse": True, "padding_idx": 0}])
@pytest.mark.parametrize("sizes", [ROWS, (6, 6, 6, 6)])
def test_gradient_options(options: dict[str, object], sizes: tuple[int, ...]) -> None:
    model = checks.randomized(Fields(sizes, **options))
    x = indices(9, sizes).double()
    fused = fxfuse.optimize(model, x, objective="launches", strict=True)
    report = fxfuse.report(fused)
    assert report.fused, str(report)
    assert not report.refused, str(report)
    x = indices(30, sizes, seed=8).double()
    for each in (model, fused):
        each.zero_grad()
        each(x).square().sum().backward()
    got = fxfuse.weights.packing.original_gradients(fused)
    for name, parameter in model.named_parameters():
        assert got[name].is_sparse is parameter.grad.is_sparse
        checks.assert_close(got[name].to_dense(), parameter.grad.to_dense(), name)


def test_sparse_gradients_step_with_sparse_adam() -> None:
    model = checks.randomized(Fields(sparse=True))
    model.head = nn.Identity()
    fused = fxfuse.optimize(model, indices(9).double(), objective="launches", strict=True)
    for each in (model, fused):
        optimizer = torch.optim.SparseAdam(list(each.parameters()), lr=0.1)
        for step in range(3):
            optimizer.zero_grad()
            each(indices(9, seed=step).double()).square().sum().backward()
            optimizer.step()
    checks.assert_close(fused(indices(20).double()), model(indices(20).double()), "after three steps")


def test_counted_gradients_of_a_shared_table_are_refused() -> None:
    model = checks.randomized(SharedTable(scale_grad_by_freq=True))
    x = torch.randint(12, (4, 3, 6))
    fused = fxfuse.optimize(model, x, objective="launches")
    sentence = "embedding with scale_grad_by_freq: the lanes share a table and count its indices one by one"
    assert sentence in [refusal.reason for refusal in fxfuse.report(fused).refused]
    checks.assert_equal_models(model, fused, [((x,), {})])


# -- bags ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("sizes", [ROWS, (6,) * 6])
def test_bags_of_equal_length(mode: str, sizes: tuple[int, ...]) -> None:
    model = checks.randomized(Bags(sizes, mode=mode))
    checks.assert_fused_equals(
        model, indices(5, sizes, 4), most_heavy=1, make=lambda rows: indices(rows, sizes, 4, seed=rows), batches=(9,), **checks.QUICK
    )


def test_weighted_bags() -> None:
    model = checks.randomized(WeightedBags(mode="sum"))
    x = (indices(5, length=4), checks.randn(5, 8, 4))
    checks.assert_fused_equals(model, x, most_heavy=1, make=lambda rows: (indices(rows, length=4, seed=rows), checks.randn(rows, 8, 4)))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("pads", [(0,) * 8, (None, 1, 10, None, 3, 0, 1, -1)])
def test_bags_leave_each_tables_padding_out(mode: str, pads: tuple[int | None, ...]) -> None:
    model = Bags()
    for i, pad in enumerate(pads):
        model.bags[i] = nn.EmbeddingBag(ROWS[i], 4, mode=mode, padding_idx=pad)
    checks.assert_fused_equals(checks.randomized(model), indices(6, length=3), most_heavy=1, batches=(9,), **checks.QUICK)


OFFSETS = torch.tensor([[0, 2, 2, 6], [0, 1, 5, 6], [0, 0, 3, 6], [0, 6, 6, 6], [0, 1, 2, 6], [0, 3, 4, 6], [0, 5, 5, 6], [0, 2, 4, 6]])


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_by_offsets(mode: str) -> None:
    sizes = ROWS + ROWS[::-1]
    model = checks.randomized(DLRM(sizes, mode=mode))

    def make(rows: int) -> tuple[Tensor, Tensor]:
        return torch.cat([OFFSETS, OFFSETS.roll(rows, 0)]), indices(6, sizes, seed=rows).T.contiguous()

    checks.assert_fused_equals(model, make(1), most_heavy=1, batches=(), specialised=True, make=make, **checks.QUICK)


def test_a_last_offset_is_refused() -> None:
    model = checks.randomized(DLRM(mode="sum", include_last_offset=True))
    x = (OFFSETS, indices(6).T.contiguous())
    fused = fxfuse.optimize(model, x, objective="launches")
    sentence = "embedding_bag with include_last_offset: torch's kernels disagree on indices behind the last offset"
    assert sentence in [refusal.reason for refusal in fxfuse.report(fused).refused]
    checks.assert_equal_models(model, fused, [(x, {})])


def test_bags_by_offsets_of_unequal_numbers_of_indices() -> None:
    """DLRM on real data: as many indices as there are clicks, in lists of tensors; other numbers of them at every call."""
    sizes = ROWS + ROWS[::-1]
    model = checks.randomized(DLRM(sizes, mode="mean"))

    def make(more: int) -> tuple[list[Tensor], list[Tensor]]:
        generator = torch.Generator().manual_seed(more)
        counts = [7 + (k if more == 0 else more + 2 * k) for k in range(len(sizes))]
        found = [torch.randint(size, (count,), generator=generator) for size, count in zip(sizes, counts, strict=True)]
        return [torch.tensor([0, 2, 2 + k % 3, 5]) for k in range(len(sizes))], found

    x = make(0)
    fused = fxfuse.optimize(model, x, objective="launches")
    assert "embedding_bag" in [op.op for region in fxfuse.report(fused).fused for op in region.ops], str(fxfuse.report(fused))
    checks.assert_equal_models(model, fused, [(make(more), {}) for more in (0, 1, 4)])
    checks.assert_heavy(fused, x, 1)
    bad = x[1][3].clone()
    bad[2] = sizes[3]
    for each in (model, fused):
        with pytest.raises((RuntimeError, IndexError)):
            each(x[0], [*x[1][:3], bad, *x[1][4:]])
        with pytest.raises((RuntimeError, IndexError)):
            each([*x[0][:3], torch.tensor([0, 2, 3, 99]), *x[0][4:]], x[1])


def test_eight_lanes_are_enough_for_bags_of_unequal_numbers() -> None:
    """What joins and checks them launches no more than it saves."""
    model = checks.randomized(DLRM(mode="mean"))
    x = [torch.tensor([0, 2, 2 + k % 3, 5]) for k in range(8)], [torch.arange(7 + k) % size for k, size in enumerate(ROWS)]
    fused = fxfuse.optimize(model, x, objective="launches")
    assert not fxfuse.report(fused).refused
    checks.assert_equal_models(model, fused, [(x, {}), (([*x[0][1:], x[0][0]], [index.flip(0) for index in x[1]]), {})])
    checks.assert_heavy(fused, x, 1)
    assert not fxfuse.report(fused).fallbacks


@pytest.mark.parametrize("offsets", [[0, 7], [1, 2], [0, -1]])
def test_offsets_that_leave_the_lane_raise(offsets: list[int]) -> None:
    model = checks.randomized(DLRM(mode="sum"))
    good, x = torch.tensor([[0, 2]] * 8), indices(6).T.contiguous()
    fused = fxfuse.optimize(model, (good, x), objective="launches", strict=True, **checks.QUICK)
    assert fxfuse.report(fused).fused
    bad = good.clone()
    bad[3] = torch.tensor(offsets)
    for each in (model, fused):
        with pytest.raises((RuntimeError, IndexError)):
            each(bad, x)


def test_the_bags_of_one_table() -> None:
    class OneTable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag = nn.EmbeddingBag(9, 4, mode="mean", padding_idx=2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.bag(x[:, i]) for i in range(5)], 1)

    checks.assert_fused_equals(checks.randomized(OneTable()), torch.randint(9, (4, 5, 6)), most_heavy=1)


# -- what must not be merged -------------------------------------------------------------------------------------------------------------


def test_what_else_reads_unequal_tables_stays_apart() -> None:
    class Norms(nn.Module):
        """The tables' column sums have equal shapes, the tables do not."""

        def __init__(self) -> None:
            super().__init__()
            self.tables = nn.ModuleList(nn.Embedding(size, 4) for size in ROWS)

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([table(x[:, i]) * table.weight.sum(0) for i, table in enumerate(self.tables)], 1)

    checks.assert_fused_equals(checks.randomized(Norms()), indices(6))


def test_word_position_and_type_embeddings() -> None:
    class Bert(nn.Module):
        """No lanes: three look-ups of unequal shapes and meanings. Whatever is made of them is right."""

        def __init__(self) -> None:
            super().__init__()
            self.word, self.position, self.kind = nn.Embedding(30, 4, padding_idx=0), nn.Embedding(12, 4), nn.Embedding(2, 4)
            self.register_buffer("position_ids", torch.arange(12).unsqueeze(0))

        def forward(self, ids: Tensor, kinds: Tensor) -> Tensor:
            return self.word(ids) + self.position(self.position_ids[:, : ids.shape[1]]) + self.kind(kinds)

    model = checks.randomized(Bert())
    x = (torch.randint(30, (3, 7)), torch.randint(2, (3, 7)))
    fused = fxfuse.optimize(model, x, objective="launches")
    checks.assert_equal_models(model, fused, [(x, {}), (checks.fresh(x, 5, 3), {})])


def test_state_dicts_of_unequal_tables_travel() -> None:
    model = checks.randomized(Fields())
    fused = fxfuse.optimize(model, indices(6).double(), objective="launches", strict=True, **checks.QUICK)
    packed = [value for name, value in fused.state_dict().items() if name.startswith("packed.embedding_dict")]
    assert [tuple(value.shape) for value in packed] == [(sum(ROWS), 4)]
    again = copy.deepcopy(fused)
    again.load_state_dict(fused.state_dict())
    with torch.no_grad():
        again.embedding_dict["C3"].weight[2] = 9.0
        assert (again.embedding_dict["C3"].weight[2] == 9.0).all()
    assert torch.equal(again.embedding_dict["C2"].weight, model.embedding_dict["C2"].weight)


def test_tables_that_keep_their_parameters() -> None:
    model = checks.randomized(Fields())
    fused = fxfuse.optimize(copy.deepcopy(model), objective="launches", strict=True)
    x = indices(6).double()
    fused(x)
    assert fxfuse.report(fused).fused
    checks.assert_equal_models(model, fused, [((x,), {}), ((indices(9, seed=5).double(),), {})], gradients=checks.own_gradients)


def test_recipe_of_unequal_rows() -> None:
    tensors = [checks.randn(rows, 4, seed=rows) for rows in ROWS]
    recipe = Recipe(
        "packed.weight", tuple(f"{i}.weight" for i in range(8)), (7, 4), (0, 1), "rows", own_shapes=tuple((rows, 4) for rows in ROWS)
    )
    recipes.check(recipe)
    packed = recipes.pack(recipe, tensors)
    assert tuple(packed.shape) == recipes.packed_shape(recipe) == (sum(ROWS), 4)
    for views in (recipes.unpack(recipe, packed), recipes.lane_views(recipe, packed)):
        for view, tensor in zip(views, tensors, strict=True):
            assert torch.equal(view, tensor)
            assert view.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()
    sparse = packed.to_sparse(1)
    for index, tensor in enumerate(tensors):
        assert torch.equal(recipes.lane_view(recipe, sparse, index).to_dense(), tensor)
    wrong = (
        replace(recipe, own_shapes=None), replace(recipe, order=(1, 0)), replace(recipe, own_shapes=((3, 5), *recipe.own_shapes[1:])),
    )  # fmt: skip
    for other in wrong:
        with pytest.raises(fxfuse.FxfuseError, match="concatenates rows"):
            recipes.check(other)


class Columns(nn.Module):
    """Tables by the columns of one tensor, as gluonts embeds static categories."""

    def __init__(self, sizes: list[int], width: int = 4, layers: int = 0) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(size, width) for size in sizes)
        self.nets = nn.ModuleList(nn.Linear(width, 3) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = torch.cat([table(x[:, i]) for i, table in enumerate(self.tables)], 1)
        return found, *[net(found[:, : net.in_features]).tanh() for net in self.nets]


def columns_of(sizes: list[int]) -> torch.Tensor:
    return torch.stack([torch.randint(0, size, (6,)) for size in sizes], 1)


def test_few_tables_whose_checks_launch_more_than_they_save_stay() -> None:
    sizes = [5, 3]
    fused = fxfuse.optimize(Columns(sizes), columns_of(sizes), objective="launches", tune=False)
    report = fxfuse.report(fused)
    assert not report.fused
    assert [each.reason for each in report.refused] == ["left as a loop: packed launches 2 ops more, to save 1 that carry parameters"]


def test_they_stay_alone() -> None:
    """What else there is to fuse in the region fuses."""

    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tables = nn.ModuleList(nn.Embedding(size, 2 + size // 2) for size in (6, 7, 2, 3, 8, 9, 4, 5))
            self.nets = nn.ModuleList(nn.Linear(5, 3) for _ in range(3))

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return *[table(x[:, i, : 1 + i // 2]) for i, table in enumerate(self.tables)], *[net(y).tanh() for net in self.nets]

    model, x = Pairs().double(), (torch.randint(0, 2, (6, 8, 4)), torch.randn(6, 5, dtype=torch.float64))
    fused = fxfuse.optimize(model, x, objective="launches", tune=False)
    report = fxfuse.report(fused)
    assert "linear" in [op.op for op in report.fused[0].ops]
    assert report.refused
    assert all(each.reason.startswith("left as a loop: packed launches") for each in report.refused)
    assert report.launches is not None
    assert report.launches[1] <= report.launches[0]
    for training in (True, False):
        for a, b in zip(fused.train(training)(*x), model.train(training)(*x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert not report.fallbacks


def test_they_stay_alone_in_chunks_too() -> None:
    """What ``max_memory`` cuts into chunks is the region without the lane sets that were left out."""

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tables = nn.ModuleList(nn.Embedding(size, 2 + size // 2) for size in (6, 7, 2, 3, 8, 9, 4, 5))
            self.nets = nn.ModuleList(nn.Linear(5, 64) for _ in range(3))

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return *[table(x[:, i, : 1 + i // 2]) for i, table in enumerate(self.tables)], *[net(y).tanh() for net in self.nets]

    model, x = Wide().double(), (torch.randint(0, 2, (512, 8, 4)), torch.randn(512, 5, dtype=torch.float64))
    options = {"objective": "launches", "tune": False, "mode": "infer"}
    whole = fxfuse.optimize(model, x, **options)
    (left,) = {each.reason for each in fxfuse.report(whole).refused}
    with torch.no_grad():
        needed = peak_bytes(lambda: whole.eval()(*x))
    cut = fxfuse.optimize(model, x, max_memory=int(0.9 * needed), **options)
    report = fxfuse.report(cut)
    assert [op.op for op in report.fused[0].ops] == [op.op for op in fxfuse.report(whole).fused[0].ops]
    assert all(op.lowering.endswith("chunks") for op in report.fused[0].ops)
    assert {each.reason for each in report.refused} == {left}
    for a, b in zip(cut.eval()(*x), model.eval()(*x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_many_tables_are_worth_their_checks() -> None:
    sizes = [5, 3, 9, 2, 2, 7, 4, 3]
    fused = fxfuse.optimize(Columns(sizes), columns_of(sizes), objective="launches", tune=False)
    assert [op.op for op in fxfuse.report(fused).fused[0].ops if op.op == "embedding"] == ["embedding"]
