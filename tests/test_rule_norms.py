"""Normalization inside lanes, in the loops that people write: outputs, gradients, statistics and counters, in train and eval mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from norm_models import BATCH_NORMS, MANY, SOME, Branches, Experts, Layer, PerColumn, images
from torch import Tensor, nn

import checks
import fxfuse
from checks import QUICK, randn, randomized
from fxfuse.planning.memory import peak_bytes


@pytest.mark.parametrize("kind", BATCH_NORMS)
def test_columns_with_batch_norm(kind: str) -> None:
    model = randomized(PerColumn(3, lambda c: nn.BatchNorm1d(c, **BATCH_NORMS[kind])))
    fused = checks.assert_fused_equals(model, randn(6, 3), most_heavy=3, batches=MANY, **QUICK)
    assert "batch_norm" in str(fxfuse.report(fused))


@pytest.mark.parametrize("kind", SOME)
def test_experts_with_batch_norm_share_an_input(kind: str) -> None:
    model = randomized(Experts(4, lambda c: nn.BatchNorm1d(c, **BATCH_NORMS[kind])))
    checks.assert_fused_equals(model, randn(6, 5), most_heavy=6, batches=MANY, **QUICK)


@pytest.mark.parametrize(("dims", "source"), [(1, "chunk"), (2, "split"), (2, "shared"), (3, "chunk")])
def test_convolution_branches_with_batch_norm(dims: int, source: str) -> None:
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
    model = randomized(Branches(3, norm, dims, source))
    checks.assert_fused_equals(model, images(3, dims, source), most_heavy=3, batches=(1,), **QUICK)


def test_convolution_branches_average_all_batches() -> None:
    model = randomized(Branches(4, lambda c: nn.BatchNorm2d(c, momentum=None), 2))
    checks.assert_fused_equals(model, images(4, 2, "chunk"), most_heavy=3, batches=(1,), **QUICK)


@pytest.mark.parametrize(("groups", "source"), [(1, "chunk"), (2, "shared"), (4, "chunk")])
def test_convolution_branches_with_group_norm(groups: int, source: str) -> None:
    model = randomized(Branches(3, lambda c: nn.GroupNorm(groups, c), 2, source))
    checks.assert_fused_equals(model, images(3, 2, source), most_heavy=4, batches=(1,), **QUICK)


@pytest.mark.parametrize("norm", [lambda c: nn.GroupNorm(2, c), lambda c: nn.GroupNorm(2, c, affine=False)], ids=["affine", "plain"])
def test_columns_with_group_norm(norm: Layer) -> None:
    checks.assert_fused_equals(randomized(PerColumn(3, norm)), randn(6, 3), most_heavy=3, **QUICK)


def test_group_norm_without_scale_folds_lanes_into_the_batch() -> None:
    model = randomized(Branches(3, lambda c: nn.GroupNorm(2, c, affine=False), 1))
    fused = checks.assert_fused_equals(model, images(3, 1, "chunk"), most_heavy=3, batches=(1,), **QUICK)
    assert "fold into batch" in str(fxfuse.report(fused))


@pytest.mark.parametrize(("dims", "source"), [(1, "chunk"), (2, "shared"), (3, "chunk")])
@pytest.mark.parametrize(("affine", "tracked"), [(False, False), (True, False), (False, True), (True, True)])
def test_convolution_branches_with_instance_norm(affine: bool, tracked: bool, dims: int, source: str) -> None:
    norm = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[dims - 1]
    model = randomized(Branches(2, lambda c: norm(c, affine=affine, track_running_stats=tracked), dims, source))
    checks.assert_fused_equals(model, images(2, dims, source), most_heavy=3, batches=(1,), **QUICK)


LAST_DIMS: dict[str, Layer] = {
    "LayerNorm": nn.LayerNorm,
    "LayerNorm, no bias": lambda c: nn.LayerNorm(c, bias=False),
    "LayerNorm, plain": lambda c: nn.LayerNorm(c, elementwise_affine=False),
    "RMSNorm": nn.RMSNorm,
    "RMSNorm, eps": lambda c: nn.RMSNorm(c, eps=1e-3),
    "RMSNorm, plain": lambda c: nn.RMSNorm(c, elementwise_affine=False),
}


@pytest.mark.parametrize("kind", LAST_DIMS)
def test_columns_with_norms_of_the_last_dims(kind: str) -> None:
    checks.assert_fused_equals(randomized(PerColumn(3, LAST_DIMS[kind])), randn(6, 3), most_heavy=3, **QUICK)


@pytest.mark.parametrize("kind", LAST_DIMS)
def test_experts_with_norms_of_the_last_dims(kind: str) -> None:
    model = randomized(Experts(3, LAST_DIMS[kind]))
    checks.assert_fused_equals(model, randn(6, 5), batches=(1,), **QUICK)


@pytest.mark.parametrize("kind", ["LayerNorm, no bias", "RMSNorm", "RMSNorm, plain"])
def test_norms_of_tokens(kind: str) -> None:
    tokens = randomized(TokenExperts(3, LAST_DIMS[kind]))
    checks.assert_fused_equals(tokens, randn(2, 7, 5), batches=(1,), **QUICK)


class TokenExperts(nn.Module):
    """Pre-norm feed-forward experts on tokens ``[B, T, D]``, summed."""

    def __init__(self, lanes: int, norm: Layer) -> None:
        super().__init__()
        self.norms = nn.ModuleList(norm(5) for _ in range(lanes))
        self.up = nn.ModuleList(nn.Linear(5, 8) for _ in range(lanes))
        self.down = nn.ModuleList(nn.Linear(8, 5) for _ in range(lanes))

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for norm, up, down in zip(self.norms, self.up, self.down, strict=True):
            out = out + down(F.gelu(up(norm(x))))
        return out


class OverTwoDims(nn.Module):
    """LayerNorm over the last two dims of each chunk."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm((3, 4), **kwargs) for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(4, 2) for _ in range(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [head(norm(part)) for norm, head, part in zip(self.norms, self.heads, x.chunk(3, dim=1), strict=True)]


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"elementwise_affine": False}], ids=str)
def test_layer_norm_over_two_dims(options: dict[str, Any]) -> None:
    checks.assert_fused_equals(randomized(OverTwoDims(**options)), randn(5, 9, 4), **QUICK)


def _scaled_and_shifted() -> tuple[set[Any], int]:
    """The calls of the fused model, and the bytes that a training step takes at its peak."""
    model, x = randomized(OverTwoDims()), randn(64, 9, 4)
    fused = checks.assert_fused_equals(model, x, **QUICK)
    calls = {node.target for node in fxfuse.graph(fused)[""].graph.nodes if node.op == "call_function"}

    def step() -> None:
        sum(out.sum() for out in fused(x)).backward()

    step()  # from here on there are gradients to add to
    return calls, peak_bytes(step)


def test_scale_and_shift_in_one_launch_or_in_less_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """``addcmul`` for launches; a product and a sum where time counts, whose backward holds one tensor of all lanes less."""
    few, more = _scaled_and_shifted()
    monkeypatch.setattr("fxfuse.planning.plan._preferred", lambda options: "")
    many, less = _scaled_and_shifted()
    assert torch.addcmul in few
    assert {torch.mul, torch.add} <= many - {torch.addcmul} == many
    assert less < more


class UnitVectors(nn.Module):
    """Projections of one input, each normalized to length one along ``dim``."""

    def __init__(self, p: float, dim: int) -> None:
        super().__init__()
        self.p, self.dim = p, dim
        self.maps = nn.ModuleList(nn.Linear(5, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([F.normalize(m(x), p=self.p, dim=self.dim) for m in self.maps], dim=1)


@pytest.mark.parametrize(("p", "dim"), [(2.0, -1), (1.0, 1), (3.0, 0)])
def test_normalize(p: float, dim: int) -> None:
    checks.assert_fused_equals(randomized(UnitVectors(p, dim)), randn(6, 5), batches=MANY, **QUICK)


@pytest.mark.parametrize("source", ["chunk", "shared"])
@pytest.mark.parametrize("dims", [1, 2])
def test_local_response_norm(dims: int, source: str) -> None:
    model = randomized(Branches(3, lambda c: nn.LocalResponseNorm(3, alpha=0.5, k=2.0), dims, source))
    checks.assert_fused_equals(model, images(3, dims, source), most_heavy=2, batches=(1,), **QUICK)


class Mlp(nn.Module):
    """The MLP of torch-rechub."""

    def __init__(self, wide: int, dims: list[int], head: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for narrow in dims:
            layers += [nn.Linear(wide, narrow), nn.BatchNorm1d(narrow), nn.ReLU(), nn.Dropout(0.0)]
            wide = narrow
        self.mlp = nn.Sequential(*layers, *([nn.Linear(wide, 1)] if head else []))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class Gating(nn.Module):
    """Customized gate control: two experts for each task and one for all, mixed by a gate for each task."""

    def __init__(self, tasks: int, last: bool) -> None:
        super().__init__()
        self.own = nn.ModuleList(Mlp(6, [5, 6]) for _ in range(2 * tasks))
        self.common = nn.ModuleList([Mlp(6, [5, 6])])
        self.gates = nn.ModuleList(Mlp(6, [3]) for _ in range(tasks))
        self.gate = None if last else Mlp(6, [2 * tasks + 1])

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        own = [expert(xs[i // 2]) for i, expert in enumerate(self.own)]
        common = [expert(xs[-1]) for expert in self.common]
        outs = []
        for i, gate in enumerate(self.gates):
            mixed = torch.cat([e.unsqueeze(1) for e in [*own[2 * i : 2 * i + 2], *common]], dim=1)
            outs.append(torch.sum(torch.softmax(gate(xs[i]), -1).unsqueeze(-1) * mixed, dim=1))
        if self.gate is not None:
            mixed = torch.cat([e.unsqueeze(1) for e in own + common], dim=1)
            outs.append(torch.sum(torch.softmax(self.gate(xs[-1]), -1).unsqueeze(-1) * mixed, dim=1))
        return outs


class Extraction(nn.Module):
    """Progressive layered extraction (PLE): two levels of gating, a tower for each task."""

    def __init__(self, tasks: int = 3) -> None:
        super().__init__()
        self.tasks = tasks
        self.levels = nn.ModuleList([Gating(tasks, last=False), Gating(tasks, last=True)])
        self.towers = nn.ModuleList(Mlp(6, [4], head=True) for _ in range(tasks))

    def forward(self, x: Tensor) -> Tensor:
        xs = [x] * (self.tasks + 1)
        for level in self.levels:
            xs = level(xs)
        return torch.cat([torch.sigmoid(tower(h)) for tower, h in zip(self.towers, xs, strict=True)], dim=1)


def test_progressive_layered_extraction() -> None:
    model = randomized(Extraction())
    fused = fxfuse.optimize(model, randn(7, 6), objective="launches", **QUICK)
    checks.assert_equal_models(model, fused, [(randn(7, 6), {}), (randn(3, 6), {})], rtol=1e-9)
    checks.assert_heavy(fused, randn(7, 6), 15)  # Linear and BatchNorm of each level, gates beside experts, towers
    assert not fxfuse.report(fused).fallbacks
