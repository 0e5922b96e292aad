"""A result that the original's backward does not look at again is the caller's to write to, before backward, in the fused model too."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse.building.build import Builder
from fxfuse.passes import lift

QUICK = {"objective": "launches", "tune": False}


class Normalized(nn.Module):
    """Lanes normalize columns of a result: torch copies what does not lie in rows, and keeps the copy."""

    def __init__(self, norm: type[nn.Module], columns: int) -> None:
        super().__init__()
        self.columns = columns
        self.norms = nn.ModuleList(nn.GroupNorm(1, columns, affine=False) if norm is nn.GroupNorm else norm(columns) for _ in range(2))

    def forward(self, x):
        h = x * x.tanh()
        return h, [norm(h[:, i::2]) for i, norm in enumerate(self.norms)], h[..., :1]


class Chunks(nn.Module):
    """Norms with running statistics, of columns that lie side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.InstanceNorm1d(3, affine=True, track_running_stats=True) for _ in range(2))

    def forward(self, x):
        h = x * x.tanh()
        return h, [norm(part) for norm, part in zip(self.norms, h.chunk(2, 1), strict=True)], h[..., :1]


class Twice(nn.Module):
    """The lanes read the second of two equal tensors; the caller has the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.lanes = nn.Linear(3, 4), nn.ModuleList(nn.Linear(4, 2) for _ in range(4))

    def forward(self, x):
        h, again = self.first(x), self.first(x)
        return h, torch.cat([lane(again) for lane in self.lanes], 1), h[:, :1]


class Permuted(nn.Module):
    """torch's product copies what it cannot view as a matrix: the writer of ``h`` does not reach it."""

    def __init__(self) -> None:
        super().__init__()
        self.lanes = nn.ModuleList(nn.Linear(3, 5) for _ in range(4))

    def forward(self, x):
        h = x * x.tanh()
        return h, torch.stack([lane(h[..., i::4].transpose(1, 2).flip(0)) for i, lane in enumerate(self.lanes)])


def written_then_backward(model, x, result):
    """The gradient of ``x`` where a caller doubles a result in place before backward."""
    x = x.clone().requires_grad_()
    leaves = torch.utils._pytree.tree_leaves(model(x))
    with torch.no_grad():
        leaves[result].mul_(2)
    sum((leaf * leaf.detach().cos()).sum() for leaf in leaves).backward()
    return x.grad


CASES = {
    "group norm of one column": (lambda: Normalized(nn.GroupNorm, 1), (4, 2)),
    "group norm of three columns": (lambda: Normalized(nn.GroupNorm, 3), (4, 6, 3)),
    "instance norm": (lambda: Normalized(nn.InstanceNorm1d, 3), (4, 6, 5)),
    "instance norm with running statistics": (Chunks, (4, 6, 5)),
    "computed twice": (Twice, (4, 3)),
    "products of permuted columns": (Permuted, (4, 3, 12)),
}


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_a_caller_may_write_to_a_result_as_in_the_original(case, validate):
    torch.manual_seed(3)
    make, shape = CASES[case]
    model, x = make().double(), torch.randn(shape, dtype=torch.float64)
    fused = fxfuse.optimize(model, x, validate=validate, **QUICK)
    assert fxfuse.report(fused).fused
    for rows in (x, torch.randn(7, *shape[1:], dtype=torch.float64), x[:2]):
        for result in (0, -1):
            expected, got = (written_then_backward(each, rows, result) for each in (model, fused))
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


class Recurrent(nn.Module):
    """torch turns what a GRU reads with its batch first, and keeps a copy; packed, the result itself would be kept."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 4)
        self.lanes = nn.ModuleList(nn.GRU(4, 3, batch_first=True) for _ in range(3))

    def forward(self, x):
        h = self.first(x)
        return {"all": torch.cat([lane(h)[0] for lane in self.lanes], -1), "features": h, "part": h[:, 1:]}


def test_where_a_result_would_be_kept_it_is_a_copy():
    torch.manual_seed(3)
    model, x = Recurrent().double(), torch.randn(4, 6, 5, dtype=torch.float64)
    fused = fxfuse.optimize(model, x, **QUICK)
    report = fxfuse.report(fused)
    assert report.fused
    assert any("its results are copies" in note for region in report.fused for note in region.notes)
    for rows in (x, torch.randn(7, 6, 5, dtype=torch.float64)):
        for result in (0, 1, 2):
            expected, got = (written_then_backward(each, rows, result) for each in (model, fused))
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
        out = fused(rows)
        assert out["part"].untyped_storage().data_ptr() == out["features"].untyped_storage().data_ptr()
    assert not report.fallbacks


def test_programs_that_are_made_later_copy_their_results_too():
    torch.manual_seed(3)
    model, x = Recurrent(), torch.randn(4, 6, 5)
    fused = fxfuse.optimize(model, x, **QUICK)
    with torch.autocast("cpu", torch.bfloat16):
        for each in (model, fused):
            assert written_then_backward(each, x, 1).isfinite().all()
    assert not fxfuse.report(fused).fallbacks


def test_a_form_that_keeps_a_result_is_undone(monkeypatch):
    monkeypatch.setattr(lift, "_ROWS_OF_ITS_OWN", frozenset())
    monkeypatch.setattr(Builder, "owning_results", lambda self, path: None)
    torch.manual_seed(3)
    model, x = Normalized(nn.GroupNorm, 1).double(), torch.randn(4, 2, dtype=torch.float64)
    report = fxfuse.report(fxfuse.optimize(model, x, **QUICK))
    assert not report.fused
    said = "output[0] (train, example 0, float64): is kept for backward, which raises where a caller writes into it before"
    assert any(said in refusal.reason and refusal.place for refusal in report.refused)
    bare = fxfuse.optimize(model, x, validate=False, **QUICK)  # the check is what caught it
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        written_then_backward(bare, x, 0)
