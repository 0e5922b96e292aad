"""Fresh inputs: the same structure, other data, other batch sizes, nothing invented."""

import collections

import pytest
import torch

from fxfuse.models.inputs import batch_size, clone_inputs, resample, shaken, tensors_in, to_dtype


@pytest.fixture
def rows():
    torch.manual_seed(0)
    return torch.randn(6, 3)


def in_hull(new, old):
    return bool(((new >= old.amin(0)) & (new <= old.amax(0))).all())


def test_tensors_are_found_once_in_order(rows):
    y = torch.ones(2)
    assert [id(t) for t in tensors_in((rows, {"a": [y, rows]}), {"k": (y, 3, None)})] == [id(rows), id(y)]


@pytest.mark.parametrize(
    ("args", "expected"),
    [((torch.zeros(5, 2),), 5), ((torch.tensor(1.0), torch.zeros(3)), 3), ((torch.tensor(1.0),), None), ((2, "x"), None), ((), None)],
)
def test_batch_size(args, expected):
    assert batch_size(args) == expected


def test_batch_size_of_keywords_comes_after_the_arguments():
    assert batch_size((torch.zeros(2),), {"x": torch.zeros(7)}) == 2
    assert batch_size((), {"x": torch.zeros(7)}) == 7


@pytest.mark.parametrize("batch", [None, 0, 1, 6, 7, 13])
def test_rows_and_hull(rows, batch):
    (new,), kwargs = resample((rows,), batch=batch, seed=3)
    assert kwargs == {}
    assert new.shape == (6 if batch is None else batch, 3)
    assert new.dtype == rows.dtype
    assert in_hull(new, rows)
    assert not any((new == row).all(1).any() for row in rows)


def test_no_row_twice_of_the_same_numbers(rows):
    (new,), _ = resample((rows,), batch=12, seed=1)
    assert len({tuple(row.tolist()) for row in new}) == 12


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_integers_are_drawn_not_made(dtype):
    x = torch.tensor([[0, 1], [1, 1], [1, 0]]).to(dtype)
    (new,), _ = resample((x,), batch=9, seed=0)
    assert new.dtype == dtype
    assert all(any(torch.equal(row, old) for old in x) for row in new)


def test_large_integers_survive():
    x = torch.tensor([2**62 + 1, 2**53 + 1])
    (new,), _ = resample((x,), batch=8)
    assert set(new.tolist()) <= set(x.tolist())


def test_a_row_of_several_tensors_stays_together():
    index = torch.arange(8)
    onehot = torch.eye(8)
    (new_index, new_onehot), kwargs = resample((index, onehot), {"same": index * 10, "length": torch.tensor(8)}, batch=20, seed=5)
    assert torch.equal(kwargs["same"], new_index * 10)
    assert int(kwargs["length"]) == 8
    # the row named by the index has a share of the mixture
    assert (new_onehot.gather(1, new_index[:, None]) >= 0.2).all()


def test_tensors_without_the_batch_dim():
    weights, mask = torch.rand(4, 4) + 1, torch.ones(3, 2, dtype=torch.int64)
    (x, w, m), _ = resample((torch.randn(5, 2), weights, mask), batch=2, seed=0)
    assert x.shape == (2, 2)
    ratio = w / weights
    assert torch.allclose(ratio, ratio[0, 0].expand_as(ratio))
    assert 0.5 <= float(ratio[0, 0]) < 1
    assert torch.equal(m, mask)


def test_one_row_is_scaled():
    x = torch.ones(1, 4)
    (new,), _ = resample((x,), batch=5, seed=0)
    assert ((new >= 0.5) & (new < 1)).all()
    assert len(set(new[:, 0].tolist())) == 5


def test_scalar_floats_are_scaled():
    (new,), _ = resample((torch.tensor(2.0),), seed=0)
    assert new.shape == ()
    assert 1 <= float(new) < 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floating_dtypes_stay_in_the_hull(dtype):
    x = torch.rand(4, 3).to(dtype)
    (new,), _ = resample((x,), batch=50, seed=0)
    assert new.dtype == dtype
    assert in_hull(new, x)


def test_complex():
    x = torch.randn(5, 2, dtype=torch.complex64)
    (new,), _ = resample((x,), batch=4)
    assert new.dtype == torch.complex64
    assert in_hull(torch.view_as_real(new), torch.view_as_real(x))


def test_infinite_masks():
    x = torch.tensor([[0.0, -torch.inf], [torch.inf, 0.0], [-torch.inf, 1.0]])
    (new,), _ = resample((x,), batch=40, seed=0)
    assert not new.isnan().any()
    assert new.isinf().any()


def test_zero_rows():
    (new,), _ = resample((torch.zeros(0, 3),))
    assert new.shape == (0, 3)
    with pytest.raises(ValueError, match="has none to draw from"):
        resample((torch.zeros(0, 3),), batch=2)
    with pytest.raises(ValueError, match="-1 came"):
        resample((torch.zeros(2, 3),), batch=-1)


def test_structure_is_kept(rows):
    Pair = collections.namedtuple("Pair", "a b")
    args, kwargs = resample(([rows, None], {"k": Pair(rows, "text")}), {"flag": True}, batch=4)
    assert type(args[1]["k"]) is Pair
    assert args[0][1] is None
    assert args[1]["k"].b == "text"
    assert kwargs == {"flag": True}
    assert args[0][0] is args[1]["k"].a, "the same tensor stays the same tensor"


def test_seeds_and_global_random_state(rows):
    before = torch.get_rng_state()
    (a,), _ = resample((rows,), seed=1)
    (b,), _ = resample((rows,), seed=1)
    (c,), _ = resample((rows,), seed=2)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), before)


def test_requires_grad_and_leaves(rows):
    x = rows.clone().requires_grad_()
    (new, other), _ = resample((x * 2, rows))
    assert new.requires_grad
    assert new.is_leaf
    assert not other.requires_grad


LAYOUTS = {
    "contiguous": lambda: torch.randn(4, 3, 5),
    "transposed": lambda: torch.randn(5, 3, 4).permute(2, 1, 0),
    "batch in the middle": lambda: torch.randn(3, 4, 5).transpose(0, 1),
    "channels_last": lambda: torch.randn(4, 3, 2, 6).to(memory_format=torch.channels_last),
    "every second column": lambda: torch.randn(4, 3, 10)[:, :, ::2],
    "every second row": lambda: torch.randn(8, 3)[::2],
    "gaps outside of the batch": lambda: torch.randn(5, 7)[:, :4].t(),
    "expanded column": lambda: torch.randn(4, 1).expand(4, 5),
    "expanded rows": lambda: torch.randn(1, 5).expand(4, 5),
}


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS.keys())
class TestLayouts:
    def test_a_clone_has_the_same_strides(self, make):
        x = make()
        y = clone_inputs(x, requires_grad=True)
        assert y.stride() == x.stride()
        assert torch.equal(x, y)
        assert y.data_ptr() != x.data_ptr()
        assert y.is_leaf

    def test_the_same_size_has_the_same_strides(self, make):
        x = make()
        (new,), _ = resample((x,), seed=2)
        assert new.stride() == x.stride()
        assert not torch.equal(x, new)
        assert in_hull(new, x) or 0 in x.stride()

    def test_another_size_orders_its_dims_alike(self, make):
        x = make()
        (new,), _ = resample((x,), batch=9, seed=2)
        assert new.shape == (9, *x.shape[1:])

        def order(t):
            return sorted(range(t.ndim), key=lambda d: t.stride(d))

        assert order(new) == order(x)
        assert [s == 0 for s in new.stride()] == [s == 0 for s in x.stride()]
        assert new.is_contiguous() == x.is_contiguous()

    def test_a_cast_has_the_same_strides(self, make):
        x = make()
        assert to_dtype(x, torch.float64).stride() == x.stride()
        assert torch.equal(to_dtype(x, torch.float64), x.double())


def test_channels_last_with_one_image_grows_to_channels_last():
    x = torch.randn(1, 3, 4, 4).to(memory_format=torch.channels_last)
    (new,), _ = resample((x,), batch=5)
    assert new.is_contiguous(memory_format=torch.channels_last)


def test_overlapping_memory_is_read_not_written():
    x = torch.arange(6.0).unfold(0, 3, 1)  # [4, 3], rows overlap
    y = clone_inputs(x)
    (new,), _ = resample((x,), batch=7)
    assert torch.equal(x, y)
    assert new.shape == (7, 3)
    assert torch.equal(x, torch.arange(6.0).unfold(0, 3, 1))
    assert in_hull(new, x)


def test_clones_keep_flags_unless_told(rows):
    x, i = rows.clone().requires_grad_(), torch.arange(3)
    assert [t.requires_grad for t in clone_inputs((x, rows, i))] == [True, False, False]
    assert [t.requires_grad for t in clone_inputs((x, rows, i), requires_grad=True)] == [True, True, False]
    assert [t.requires_grad for t in clone_inputs((x, rows, i), requires_grad=False)] == [False, False, False]


def test_a_clone_is_independent(rows):
    kept = rows.clone()
    clone_inputs({"x": rows})["x"].zero_()
    assert torch.equal(rows, kept)


def test_to_dtype_leaves_the_rest(rows):
    x = rows.clone().requires_grad_()
    tree = {"x": x, "again": x, "i": torch.arange(3), "c": torch.zeros(1, dtype=torch.complex64), "d": torch.zeros(1).double()}
    got = to_dtype(tree, torch.float64)
    assert got["x"] is got["again"]
    assert got["x"].dtype == torch.float64
    assert got["x"].requires_grad
    assert got["i"] is tree["i"]
    assert got["d"] is tree["d"]
    assert got["c"].dtype == torch.complex128


def test_shaken_moves_a_little(rows):
    tree = {"x": rows, "i": torch.arange(3)}
    got = shaken(tree, 1e-3, torch.Generator().manual_seed(0))
    change = (got["x"] / rows - 1).abs()
    assert 0 < float(change.min()) < float(change.max()) <= 2.01e-3
    assert got["i"] is tree["i"]
