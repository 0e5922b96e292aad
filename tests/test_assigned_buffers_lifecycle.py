"""Models whose forward assigns buffers, later on: copied, saved, assigned from outside, without gradients, under autocast, compiled."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from assigned_buffers import (
    Around,
    Lanes,
    X,
    assert_same_state,
    assert_same_steps,
    lane_average,
    read_before,
    several,
    untracked,
    while_training,
)
from hazards import fuse
from torch import Tensor

import checks
import fxfuse
from checks import randn, randomized
from fxfuse.weights import packing


@pytest.mark.parametrize("options", [{"objective": "launches"}, {"mode": "train"}, {"mode": "infer"}], ids=["launches", "train", "infer"])
def test_neither_model_has_run_when_it_comes_back(options: dict[str, str]) -> None:
    model = randomized(Lanes(lane_average))
    held, before = model.nets[1].center, copy.deepcopy(model.state_dict())
    fused = fxfuse.optimize(model, X, cache=False, **options)
    assert model.nets[1].center is held
    for name, tensor in before.items():
        assert torch.equal(model.state_dict()[name], tensor)
        assert torch.equal(fxfuse.original_state_dict(fused)[name], tensor)
    for seed in range(2):
        checks.assert_close(fused(randn(5, 4, seed=seed)), model(randn(5, 4, seed=seed)), "output")
    assert_same_state(fused, model, "afterwards")


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", ["around", "lanes"])
def test_where_nobody_asks_for_gradients(kind: str, context: Any) -> None:
    model = randomized(Around(several) if kind == "around" else Lanes(lane_average))
    fused = fuse(model, X)
    for seed in range(3):
        x = randn(6, 4, seed=seed)
        with context():
            checks.assert_close(fused(x), model(x), "output")
    assert_same_state(fused, model, "afterwards") if context is torch.no_grad else checks.assert_same_buffers(fused, model, "afterwards")
    assert not fxfuse.report(fused).fallbacks


class Saved(Lanes):
    """Importable, as pickle needs it."""

    def __init__(self) -> None:
        super().__init__(lane_average)


def test_copies_files_and_unfused_models_go_on() -> None:
    model = randomized(Saved())
    fused = fuse(model, X)
    for each in (model, fused):
        each(X).sum().backward()
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    made = {"copy": copy.deepcopy(fused), "unfused": fxfuse.unfuse(fused), "loaded": torch.load(file, weights_only=False)}
    for name, each in made.items():
        twin = copy.deepcopy(model)
        assert [*each.state_dict()] == [*(model if name == "unfused" else fused).state_dict()]
        for seed in range(2):
            x = randn(4, 4, seed=seed)
            checks.assert_close(each(x), twin(x), f"{name}: output")
            for path in ("nets.0", "nets.4"):
                checks.assert_close(each.get_submodule(path).center, twin.get_submodule(path).center, f"{name}: {path}")
                assert torch.equal(each.get_submodule(path).steps, twin.get_submodule(path).steps)
    assert_same_state(fused, model, "the fused model itself")
    twin = copy.deepcopy(model)
    model(X)
    fused.load_state_dict(model.state_dict())
    assert_same_state(fused, model, "loaded by original names")
    fresh = fuse(randomized(Saved(), seed=3), X)
    fresh.load_state_dict(fused.state_dict())
    for mine, theirs in zip(fresh.nets, model.nets, strict=True):
        mine.table = theirs.table  # not saved
    for each in (model, fresh):
        each(X)
    assert_same_state(fresh, model, "loaded by packed names")


def test_assigned_from_outside() -> None:
    for made in (Lanes(lane_average), Around(untracked)):
        model = randomized(made)
        fused = fuse(model, X)
        for each in (model, fused):
            holder = each.nets[2] if isinstance(made, Lanes) else each
            holder.center = randn(*holder.center.shape, seed=4)
            each(X)
        assert_same_state(fused, model, "assigned from outside")
        assert_same_steps(model, fused)


@pytest.mark.parametrize("kind", ["around", "lanes"])
def test_a_call_that_falls_back_assigns_it_and_the_next_does_not(kind: str) -> None:
    """What the buffer was before is needed for the backward, in the loop as in the program, whichever runs next."""

    class Flag(Lanes if kind == "lanes" else Around):  # type: ignore[misc]
        twofold = False

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * 2 if self.twofold else x)

    model = randomized(Flag(lane_average if kind == "lanes" else read_before))
    fused = fuse(model, X)
    for step, flags in enumerate([(False, True), (True, False), (True, True), (False, False)]):
        for each in (model, fused):
            each.zero_grad()
            total = torch.zeros(())
            for n, flag in enumerate(flags):
                each.twofold = flag
                total = total + each(randn(5, 4, seed=step + n)).square().sum()
            total.backward()
        wanted = dict(model.named_parameters())
        for name, gradient in packing.original_gradients(fused).items():
            checks.assert_close(gradient, wanted[name].grad, f"step {step}: {name}")
        assert_same_state(fused, model, f"step {step}")
    assert sum(fxfuse.report(fused).fallbacks.values()) == 4


def lane_mean(self: Any, x: Tensor) -> Tensor:
    h = self.layer(x)
    self.center = self.center * 0.9 + 0.1 * h.detach().mean(0)
    return h - self.center


def lane_mean_of_another_dtype(self: Any, x: Tensor) -> Tensor:
    h = self.layer(x)
    self.center = h.detach().mean(0)
    return h - self.center


def test_under_autocast() -> None:
    for made in (Lanes(lane_mean), Around(while_training)):
        model = randomized(made).float()
        fused = fuse(model, X.float())
        for number in range(3):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                for each in (model, fused):
                    each.zero_grad()
                got, want = fused(X.float() + number), model(X.float() + number)
            assert got.dtype is want.dtype
            torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
            got.float().sum().backward()
        assert not fxfuse.report(fused).fallbacks, fxfuse.report(fused)  # by a program of its own
        for name, want in model.state_dict().items():
            torch.testing.assert_close(fxfuse.original_state_dict(fused)[name], want, rtol=2e-2, atol=2e-2)


def test_another_dtype_under_autocast_runs_the_loop() -> None:
    model = randomized(Lanes(lane_mean_of_another_dtype)).float()
    fused = fuse(model, X.float())
    for number in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got, want = fused(X.float() + number), model(X.float() + number)
        assert got.dtype is want.dtype
        assert torch.equal(got, want)
        for mine, theirs in zip(fused.nets, model.nets, strict=True):
            assert torch.equal(mine.center, theirs.center.float())
    assert any("forward assigns self.center a tensor of dtype" in reason for reason in fxfuse.report(fused).fallbacks)


@pytest.mark.parametrize("kind", ["around", "lanes"])
def test_under_torch_compile(kind: str) -> None:
    torch._dynamo.reset()
    model = randomized(Around(untracked) if kind == "around" else Lanes(lane_average))
    fused = fuse(model, X)
    made = torch.compile(fused, backend="aot_eager", fullgraph=True)
    for number in range(3):
        x = randn(5, 4, seed=number)
        got, want = made(x), model(x)
        checks.assert_close(got, want, f"call {number}")
        got.sum().backward()
        assert_same_state(fused, model, f"call {number}")
