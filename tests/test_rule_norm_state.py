"""Running statistics of lanes over several steps, in copies and checkpoints, and of lanes that are not alike: never another number."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from norm_models import BATCH_NORMS, MANY, SOME, Branches, Experts, Layer, PerColumn, images
from torch import Tensor, nn

import checks
import fxfuse
from checks import QUICK, randn, randomized

# -- over several steps ---------------------------------------------------------------------------------------------------------


def steps(model: nn.Module, data: list[Tensor], **options: Any) -> None:
    """Train both, check parameters and buffers after each step, and eval in between."""
    model = model.double()
    fused = fxfuse.optimize(model, data[0], objective="launches", **QUICK, **options)
    assert fxfuse.report(fused).fused
    one, two = torch.optim.SGD(model.parameters(), 0.05), torch.optim.SGD(fused.parameters(), 0.05)
    for number, x in enumerate(data):
        for each, optimizer in ((model, one), (fused, two)):
            each.train()
            optimizer.zero_grad()
            each(x).square().mean().backward()
            optimizer.step()
            each.eval()
        checks.assert_close(fused(x), model(x), f"eval after step {number}", 1e-9)
        checks.assert_same_buffers(fused, model, f"after step {number}")
    assert not fxfuse.report(fused).fallbacks


@pytest.mark.parametrize("kind", SOME)
def test_several_steps(kind: str) -> None:
    model = randomized(PerColumn(3, lambda c: nn.BatchNorm1d(c, **BATCH_NORMS[kind])))
    steps(model, [randn(7, 3, seed=seed) for seed in range(5)])


def test_several_steps_of_instance_norm() -> None:
    model = randomized(Branches(3, lambda c: nn.InstanceNorm2d(c, affine=True, track_running_stats=True, momentum=0.4), 2))
    steps(model, [randn(3, 6, 4, 3, seed=seed) for seed in range(4)])


def test_without_gradients_statistics_move_as_well() -> None:
    model = randomized(Experts(3, nn.BatchNorm1d))
    fused = fxfuse.optimize(model, randn(6, 5), objective="launches", **QUICK)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            for seed in range(3):
                x = randn(6, 5, seed=seed)
                checks.assert_close(fused(x), model(x), "output")
        checks.assert_same_buffers(fused, model, "afterwards")


def test_two_forwards_before_one_backward() -> None:
    for momentum in (0.1, None):
        model = randomized(Experts(3, lambda c, m=momentum: nn.BatchNorm1d(c, momentum=m)))
        fused = fxfuse.optimize(model, randn(6, 5), objective="launches", **QUICK)
        grads = []
        for each in (model, fused):
            a, b = each.train()(randn(6, 5)), each.eval()(randn(6, 5))
            (a.square().sum() + (b * each.train()(randn(6, 5, seed=2))).sum()).backward()
            grads.append(fxfuse.weights.packing.original_gradients(each))
        for name, grad in grads[0].items():
            checks.assert_close(grads[1][name], grad, name, floor=1e-12)


def test_one_row_raises_as_before_and_leaves_the_statistics_as_the_loop_does() -> None:
    model = randomized(PerColumn(3, nn.BatchNorm1d))
    fused = fxfuse.optimize(model, randn(6, 3), objective="launches", **QUICK)
    for each in (model, fused):
        with pytest.raises(ValueError, match=r"more than 1 value per channel when training, got input size torch.Size\(\[1, 4\]\)"):
            each.train()(randn(1, 3))
    checks.assert_same_buffers(fused, model, "after the error")
    for each in (model, fused):
        each.eval()
    checks.assert_close(fused(randn(1, 3)), model(randn(1, 3)), "one row in eval mode")


def test_checkpoints_copies_and_pickles_carry_the_statistics() -> None:
    model = randomized(PerColumn(3, nn.BatchNorm1d))
    fused = fxfuse.optimize(model, randn(6, 3), objective="launches", **QUICK)
    for each in (model, fused):
        each.train()(randn(6, 3))
    state = fxfuse.original_state_dict(fused)
    assert list(state) == list(model.state_dict())
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), fxfuse.unfuse(fused)):
        checks.assert_same_state(fxfuse.original_state_dict(other), state, "copy")
        other.train()(randn(6, 3, seed=5))
        assert int(fxfuse.original_state_dict(other)["nets.1.1.num_batches_tracked"]) == int(state["nets.1.1.num_batches_tracked"]) + 1
    checks.assert_same_state(fxfuse.original_state_dict(fused), state, "the fused model, whose copies ran")
    fused.nets[1][1].reset_running_stats()
    assert int(fused.nets[1][1].num_batches_tracked) == 0
    assert int(fused.nets[0][1].num_batches_tracked) == int(state["nets.0.1.num_batches_tracked"])


def test_validation_compares_the_statistics() -> None:
    model = randomized(PerColumn(3, nn.BatchNorm1d))
    report = fxfuse.report(fxfuse.optimize(model, randn(6, 3), objective="launches"))
    assert report.validation is not None
    assert report.validation.ok
    names = {d.name for d in report.validation.differences if d.kind == "buffer" and d.mode == "train"}
    assert {f"nets.{i}.1.{n}" for i in range(3) for n in ("running_mean", "running_var", "num_batches_tracked")} <= names


def test_parameters_that_stay_where_they_are() -> None:
    model = randomized(PerColumn(3, nn.BatchNorm1d))
    fused = fxfuse.optimize(copy.deepcopy(model), tune=False)
    for seed in range(3):
        x = randn(6, 3, seed=seed)
        checks.assert_close(fused.train()(x), model.train()(x), "output")
    checks.assert_same_buffers(fused, model, "shared Parameters")


@pytest.mark.parametrize("packing", ["packed", "alias"])
def test_compiled(packing: str) -> None:
    model = randomized(PerColumn(3, nn.BatchNorm1d))
    if packing == "packed":
        fused = fxfuse.optimize(model, randn(6, 3), objective="launches", **QUICK)
    else:
        fused = fxfuse.optimize(copy.deepcopy(model), objective="launches", **QUICK)
        checks.assert_close(fused.train()(randn(6, 3)), model.train()(randn(6, 3)), "first call")
    compiled = torch.compile(fused.train(), backend="eager")
    for seed in range(2):
        x = randn(6, 3, seed=seed)
        checks.assert_close(compiled(x), model.train()(x), "compiled")
    checks.assert_same_buffers(fused, model, "after compiled calls")


def test_statistics_that_share_memory_are_not_packed() -> None:
    model = randomized(PerColumn(3, nn.BatchNorm1d))
    for net in model.nets:
        net[1].running_mean = model.nets[0][1].running_mean.view(4)
    _, report = assert_equal_after(model, randn(6, 3))
    assert "nets.2.1 stays a call of its own: changes its running_mean in forward" in report


def test_statistics_held_by_several_lanes() -> None:
    for names in (["running_mean"], ["num_batches_tracked"], ["running_mean", "running_var", "num_batches_tracked"]):
        model = randomized(PerColumn(3, nn.BatchNorm1d))
        for net in model.nets:
            for name in names:
                setattr(net[1], name, getattr(model.nets[0][1], name))
        assert_equal_after(model, randn(6, 3))


class Steps(nn.Module):
    """Recurrent lanes: the same norms at each step."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm1d(2) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        states = list(x.chunk(3, 1))
        for _ in range(3):
            states = [torch.tanh(norm(cell(h))) for norm, cell, h in zip(self.norms, self.cells, states, strict=True)]
        return torch.cat(states, 1)


def test_statistics_that_move_at_each_step() -> None:
    checks.assert_fused_equals(randomized(Steps()), randn(6, 6), most_heavy=6, batches=MANY, **QUICK)


class Resnets(nn.Module):
    """Residual networks on one image, averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)) for _ in range(3))
        self.second = nn.ModuleList(nn.Sequential(nn.Conv2d(4, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)) for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(3, 2) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        outs = []
        for first, second, head in zip(self.first, self.second, self.heads, strict=True):
            outs.append(head(F.relu(x + second(first(x))).mean((2, 3))))
        return sum(outs) / len(outs)


def test_residual_networks() -> None:
    checks.assert_fused_equals(randomized(Resnets()), randn(3, 3, 4, 4), most_heavy=5, batches=(1,), **QUICK)


# -- lanes that are not alike ---------------------------------------------------------------------------------------------------------


def assert_equal_after(model: nn.Module, x: Tensor, *, validate: bool = False) -> tuple[nn.Module, str]:
    """Fused however much of it is legal, equal in train and eval mode, buffers included; the model and its report."""
    with checks.untouched(model):
        fused = fxfuse.optimize(model, x, objective="launches", tune=False, validate=validate)
    trials = [(checks.fresh(x, rows, seed=rows), {}) for rows in (x.shape[0], 9)]
    checks.assert_equal_models(model, fused, trials)
    assert not fxfuse.report(fused).fallbacks
    return fused, str(fxfuse.report(fused))


def test_lanes_of_another_momentum_stay_apart() -> None:
    model = randomized(PerColumn(4, nn.BatchNorm1d))
    for net in list(model.nets)[2:]:
        net[1].momentum = 0.5
    _, report = assert_equal_after(model, randn(6, 4))
    assert "batch_norm_update  2 lanes" in report


def test_frozen_by_a_train_override() -> None:
    class Frozen(Experts):
        def train(self, mode: bool = True) -> Frozen:
            super().train(mode)
            for module in self.modules():
                if isinstance(module, nn.BatchNorm1d):
                    module.eval()
            return self

    model = randomized(Frozen(3, nn.BatchNorm1d))
    before = model.state_dict()["experts.1.1.running_mean"].clone()
    fused, report = assert_equal_after(model, randn(6, 5))
    assert "batch_norm  3 lanes" in report
    assert "batch_norm_update" not in report
    assert torch.equal(fused.experts[1][1].running_mean, before)


def test_lanes_in_other_modes() -> None:
    class PartlyFrozen(PerColumn):
        def train(self, mode: bool = True) -> PartlyFrozen:
            super().train(mode)
            for net in list(self.nets)[:2]:
                net[1].eval()
            return self

    assert_equal_after(randomized(PartlyFrozen(5, nn.BatchNorm1d)), randn(6, 5))


def test_mode_set_by_hand_after_fusing() -> None:
    model = randomized(PerColumn(3, nn.BatchNorm1d))
    fused = fxfuse.optimize(model, randn(6, 3), objective="launches", **QUICK)
    for each in (model, fused):
        each.train()
        each.nets[1][1].eval()
        each(randn(6, 3))
    checks.assert_close(fused(randn(5, 3)), model(randn(5, 3)), "output")
    checks.assert_same_buffers(fused, model, "one lane in eval mode")


class OneNorm(nn.Module):
    """One BatchNorm for all lanes: its statistics move once for each lane, in order."""

    def __init__(self, norm: nn.Module, twice: bool = False) -> None:
        super().__init__()
        self.first = nn.ModuleList(nn.Linear(2, 4) for _ in range(3))
        self.norm, self.twice = norm, twice
        self.last = nn.ModuleList(nn.Linear(4, 2) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        outs = []
        for a, b, part in zip(self.first, self.last, x.chunk(3, 1), strict=True):
            h = self.norm(a(part))
            outs.append(b(F.relu(self.norm(h) if self.twice else h)))
        return torch.cat(outs, 1)


@pytest.mark.parametrize(("kind", "twice"), [("usual", False), ("usual", True), ("cumulative", True), ("no statistics", False)])
def test_one_norm_for_all_lanes(kind: str, twice: bool) -> None:
    model = randomized(OneNorm(nn.BatchNorm1d(4, **BATCH_NORMS[kind]), twice))
    fused, report = assert_equal_after(model, randn(6, 6))
    assert [(op.op, op.lanes) for plan in fxfuse.report(fused).fused for op in plan.ops if op.op == "linear"] == [("linear", 3)] * 2
    said = {
        "usual": f"norm runs {6 if twice else 3} times, one after the other: each changes the running_mean that the next one changes",
        "cumulative": "stays a call of its own: changes its num_batches_tracked in forward",
        "no statistics": "batch_norm",
    }
    assert said[kind] in " ".join(report.split())


class SharedTower(nn.Module):
    """A tower of lanes that is called twice: every statistic moves twice, the second time after the first."""

    def __init__(self, norm: Layer) -> None:
        super().__init__()
        self.tower = PerColumn(3, norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.tower(x[:, :3]) * self.tower(x[:, 3:])


@pytest.mark.parametrize("kind", SOME)
def test_lanes_called_twice(kind: str) -> None:
    model = randomized(SharedTower(lambda c: nn.BatchNorm1d(c, **BATCH_NORMS[kind])))
    fused, _ = assert_equal_after(model, randn(6, 6))
    checks.assert_heavy(fused, randn(6, 6), None, 4)  # in eval mode no statistics move: both calls are one


def test_unused_lane_still_counts() -> None:
    class Ignored(PerColumn):
        def forward(self, x: Tensor) -> Tensor:
            outs = [net(x[:, i : i + 1]) for i, net in enumerate(self.nets)]
            return torch.cat(outs[:-1], dim=1)

    _, report = assert_equal_after(randomized(Ignored(4, nn.BatchNorm1d)), randn(6, 4))
    assert "batch_norm_update" in report


class OwnNorm(nn.Module):
    """Running statistics by hand."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("var", torch.ones(features))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.scale = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return F.batch_norm(x, self.mean, self.var, self.scale, None, self.training, 0.2)


def test_functional_norm_with_buffers_of_its_own() -> None:
    _, report = assert_equal_after(randomized(PerColumn(3, OwnNorm)), randn(6, 3))
    assert "batch_norm_update  3 lanes" in report


class Unsaved(OwnNorm):
    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.register_buffer("mean", torch.zeros(features), persistent=False)


def test_statistics_that_cannot_be_packed_stay_in_their_lanes() -> None:
    _, report = assert_equal_after(randomized(PerColumn(3, Unsaved)), randn(6, 3))
    assert "updates its running_mean, which cannot be packed: it is a buffer that is not saved" in " ".join(report.split())


class Rows(nn.Module):
    """All lanes' statistics in one buffer, a row each."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(1, 4) for _ in range(3))
        self.register_buffer("mean", torch.zeros(3, 4))
        self.register_buffer("var", torch.ones(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        outs = [F.batch_norm(m(x[:, i : i + 1]), self.mean[i], self.var[i], training=self.training) for i, m in enumerate(self.maps)]
        return torch.cat(outs, 1)


def test_statistics_in_rows_of_one_buffer_are_left_alone() -> None:
    _, report = assert_equal_after(randomized(Rows()), randn(6, 3))
    assert "changes mean in forward" in report


class Penalty(PerColumn):
    """Reads the statistics in the forward that moves them."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out + torch.stack([net[1].running_mean for net in self.nets]).sum() + self.nets[0][1].running_var[0]


def test_statistics_that_forward_also_reads() -> None:
    _, report = assert_equal_after(randomized(Penalty(3, nn.BatchNorm1d)), randn(6, 3))
    assert "reads nets.0.1.running_mean, which nets.0.1 changes" in " ".join(report.split())


def test_counters_alone_make_no_loop() -> None:
    model = randomized(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3), nn.BatchNorm1d(3)))
    report = fxfuse.report(fxfuse.optimize(model, randn(6, 5), objective="launches", **QUICK))
    assert not report.fused
    assert [str(refusal) for refusal in report.refused] == ["no loop over equal networks was found"]


def test_large_tensors_are_planned_without_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxfuse.passes.writer.SMALL", 0)
    for norm in (nn.BatchNorm2d, lambda c: nn.BatchNorm2d(c, momentum=None), lambda c: nn.InstanceNorm2d(c, track_running_stats=True)):
        model = randomized(Branches(2, norm, 2))
        fused = fxfuse.optimize(model, images(2, 2, "chunk"), objective="launches", **QUICK)
        checks.assert_equal_models(model, fused, [(images(2, 2, "chunk"), {})])
        checks.assert_heavy(fused, images(2, 2, "chunk"), 3)


class Adaptive(nn.Module):
    """AdaIN as in MUNIT: statistics per sample through F.batch_norm, on copies of the buffers that nobody sees again."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        b, c = x.shape[0], x.shape[1]
        mean, var = self.running_mean.repeat(b), self.running_var.repeat(b)
        out = F.batch_norm(x.contiguous().view(1, b * c, *x.shape[2:]), mean, var, self.scale.repeat(b), None, True, 0.1, 1e-5)
        return out.view(b, c, *x.shape[2:])


def test_statistics_that_are_thrown_away() -> None:
    with checks.untouched(model := randomized(Branches(2, Adaptive, 2))):
        fused = fxfuse.optimize(model, images(2, 2, "chunk"), objective="launches", **QUICK)
    checks.assert_equal_models(model, fused, [(images(2, 2, "chunk"), {}), (images(2, 2, "chunk", rows=5), {})])


def test_hooks_keep_a_norm_a_call_in_order() -> None:
    seen: list[Tensor] = []
    model = randomized(OneNorm(nn.BatchNorm1d(4)))
    model.norm.register_forward_hook(lambda module, args, out: seen.append(module.running_mean.clone()))
    fused = fxfuse.optimize(model, randn(6, 6), objective="launches", **QUICK)
    for each in (model, fused):
        each(randn(6, 6))
    checks.assert_same_buffers(fused, model, "with hooks")
    assert len(seen) == 6
    for mine, other in zip(seen[:3], seen[3:], strict=True):
        checks.assert_close(mine, other, "what the hook saw")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = PerColumn(3, nn.BatchNorm1d).to(dtype)
    fused = fxfuse.optimize(model, torch.randn(16, 3, dtype=dtype), objective="launches", tune=False)
    report = fxfuse.report(fused)
    assert report.fused, str(report)
    assert "batch_norm_update" in str(report)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_wider_than_the_activations(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = PerColumn(3, nn.BatchNorm1d).to(dtype)
    for net in model.nets:
        net[1].float()
    x = torch.randn(16, 3, dtype=dtype)
    fused = fxfuse.optimize(model, x, objective="launches", tune=False)
    assert "batch_norm_update" in str(fxfuse.report(fused))
    for each in (model, fused):
        each.train()(x)
    for name, buffer in model.named_buffers():
        mine = fxfuse.original_state_dict(fused)[name]
        assert mine.dtype is buffer.dtype
        assert torch.allclose(mine, buffer, rtol=0.02, atol=0.02), name


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_measured_and_validated(mode: str) -> None:
    model = randomized(Experts(4, nn.BatchNorm1d))
    fused = fxfuse.optimize(model, randn(8, 5), mode=mode, lowering="bmm")
    checks.assert_equal_models(model, fused, [(randn(8, 5), {}), (randn(3, 5), {})])
    assert fxfuse.verify(model, fused, randn(8, 5)).ok
