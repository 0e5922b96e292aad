"""Optimizers move from a model to its fused form in mid-training, and back: the same training as without fusing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_loops import KINDS
from torch import nn
from torch.optim import lr_scheduler

import fxfuse
from checks import QUICK, assert_close, randn, randomized

O = torch.optim  # noqa: E741
Make = Callable[[Any], torch.optim.Optimizer]
MAKE: dict[str, Make] = {
    "sgd": lambda p: O.SGD(p, 0.02, momentum=0.9, dampening=0.1, weight_decay=0.01),
    "nesterov": lambda p: O.SGD(p, 0.02, momentum=0.9, nesterov=True, maximize=True),
    "adam": lambda p: O.Adam(p, 0.01, weight_decay=0.01),
    "amsgrad": lambda p: O.AdamW(p, torch.tensor(0.01), amsgrad=True, foreach=False),
    "fused adam": lambda p: O.AdamW(p, 0.01, fused=True),
    "adagrad": lambda p: O.Adagrad(p, 0.01, lr_decay=0.1, initial_accumulator_value=0.1),
    "rmsprop": lambda p: O.RMSprop(p, 0.01, centered=True, momentum=0.5, foreach=True),
    "adadelta": lambda p: O.Adadelta(p, 0.1),
    "nadam": lambda p: O.NAdam(p, 0.01, decoupled_weight_decay=True, weight_decay=0.1),
    "radam": lambda p: O.RAdam(p, 0.01),
    "adamax": lambda p: O.Adamax(p, 0.01),
    "asgd": lambda p: O.ASGD(p, 0.01, t0=2),
    "rprop": lambda p: O.Rprop(p, 0.01),
}


def steps(model: nn.Module, optimizer: Any, inputs: Any, first: int, number: int, each: Any = None) -> None:
    for step in range(first, first + number):
        optimizer.zero_grad()
        out = model(*inputs(50 + step, 6))
        out = torch.cat([o.flatten() for o in out]) if isinstance(out, list) else out
        (out - 0.3).square().mean().backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.7)
        optimizer.step()
        if each is not None:
            each(norm)


def assert_equal_training(model: nn.Module, other: nn.Module) -> None:
    state = fxfuse.original_state_dict(other)
    for name, value in fxfuse.original_state_dict(model).items():
        assert_close(state[name], value, name, 1e-9, floor=1e-10)


@pytest.mark.parametrize("kind", ["columns", "unequal", "raw_weights", "conv_norm"])
@pytest.mark.parametrize("name", MAKE)
def test_fused_and_unfused_in_mid_training(name: str, kind: str) -> None:
    model, inputs = KINDS[kind]()
    never, norms = copy.deepcopy(model), ([], [])
    plain, optimizer = MAKE[name](never.parameters()), MAKE[name](model.parameters())
    steps(never, plain, inputs, 0, 9, norms[0].append)
    steps(model, optimizer, inputs, 0, 3, norms[1].append)
    fused = fxfuse.optimize(model, inputs(1, 6), objective="launches", optimizer=optimizer, **QUICK)
    assert fxfuse.report(fused).fused
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in fused.parameters()}
    steps(fused, optimizer, inputs, 3, 3, norms[1].append)
    back = fxfuse.unfuse(fused)
    assert fxfuse.migrate_optimizer(optimizer, fused, back) is optimizer
    steps(back, optimizer, inputs, 6, 3, norms[1].append)
    assert_equal_training(never, back)
    assert_close(torch.stack(norms[1]), torch.stack(norms[0]), "total norms", 1e-9)
    mine, theirs = optimizer.state_dict(), plain.state_dict()
    assert mine["param_groups"] == theirs["param_groups"]
    for number, state in theirs["state"].items():
        for key, value in state.items():
            assert_close(torch.as_tensor(mine["state"][number][key]), torch.as_tensor(value), f"{number} {key}", 1e-8, floor=1e-10)


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.05, total_steps=12),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedulers_go_on(name: str) -> None:
    model, inputs = KINDS["columns"]()
    never = copy.deepcopy(model)
    made = [O.SGD(each.parameters(), 0.05, momentum=0.9) for each in (never, model)]
    schedules = [SCHEDULES[name](each) for each in made]

    def after(schedule: Any) -> Any:
        return lambda norm: schedule.step(norm) if name == "plateau" else schedule.step()

    steps(never, made[0], inputs, 0, 8, after(schedules[0]))
    steps(model, made[1], inputs, 0, 4, after(schedules[1]))
    fused = fxfuse.optimize(model, inputs(1, 6), objective="launches", optimizer=made[1], **QUICK)
    steps(fused, made[1], inputs, 4, 4, after(schedules[1]))
    assert_equal_training(never, fused)
    assert made[0].param_groups[0]["lr"] == made[1].param_groups[0]["lr"] != 0.05


def test_lanes_in_groups_of_their_own() -> None:
    model, inputs = KINDS["columns"]()

    def groups(m: nn.Module) -> list[dict[str, Any]]:
        lanes = [*m.nets[1].parameters()]
        ids = {id(p) for p in lanes}
        return [{"params": lanes, "lr": 0.002, "weight_decay": 0.3}, {"params": [p for p in m.parameters() if id(p) not in ids]}]

    never = copy.deepcopy(model)
    plain, optimizer = (O.Adam(groups(m), 0.01) for m in (never, model))
    steps(never, plain, inputs, 0, 8)
    steps(model, optimizer, inputs, 0, 4)
    with pytest.warns(UserWarning, match=r"Adam holds Parameters .* fxfuse\.migrate_optimizer\(optimizer, model, fused\)"):
        fused = fxfuse.optimize(model, inputs(1, 6), objective="launches", **QUICK)
    other = fxfuse.migrate_optimizer(optimizer, model, fused, inplace=False)
    assert optimizer.param_groups[0]["params"][0] is model.nets[1][0].weight
    assert "packed.nets.0.lane_1.weight" in dict(fused.named_parameters())
    steps(fused, other, inputs, 4, 4)
    assert_equal_training(never, fused)
    assert not fxfuse.report(fused).fallbacks
    steps(model, optimizer, inputs, 4, 4)  # as it was
    assert_equal_training(never, model)


def test_lanes_with_other_counts_of_steps() -> None:
    model, inputs = KINDS["columns"]()
    never = copy.deepcopy(model)
    made = [O.Adam(each.parameters(), 0.01) for each in (never, model)]
    for each, optimizer in zip((never, model), made):
        each.nets[2].requires_grad_(False)
        steps(each, optimizer, inputs, 0, 3)
        each.nets[2].requires_grad_(True)
        steps(each, optimizer, inputs, 3, 2)
    fused = fxfuse.optimize(model, inputs(1, 6), objective="launches", optimizer=made[1], **QUICK)
    for each, optimizer in zip((never, fused), made):
        steps(each, optimizer, inputs, 5, 4)
    assert_equal_training(never, fused)


class Custom(O.SGD):
    pass


@pytest.mark.parametrize(("make", "reason"), [
    (lambda p: O.LBFGS(p), "LBFGS is not elementwise: it searches"),
    (lambda p: O.Adafactor(p), "Adafactor is not elementwise: it factors"),
    (lambda p: O.Muon([x for x in p if x.dim() == 2]), "Muon is not elementwise: it orthogonalizes"),
    (lambda p: Custom(p, 0.1), "Custom is not one of torch's elementwise optimizers"),
])  # fmt: skip
def test_not_elementwise(make: Make, reason: str) -> None:
    model, inputs = KINDS["columns"]()
    optimizer = make(model.parameters())
    with pytest.raises(fxfuse.OptimizerError, match=reason):
        fxfuse.optimize(model, inputs(1, 6), optimizer=optimizer, **QUICK)
    with pytest.raises(fxfuse.OptimizerError, match=reason):
        fxfuse.migrate_optimizer(optimizer, model, copy.deepcopy(model))


def test_wrong_models() -> None:
    model, _ = KINDS["columns"]()
    optimizer = O.SGD(model.parameters(), 0.1)
    with pytest.raises(fxfuse.OptimizerError, match="holds no Parameter of the Linear"):
        fxfuse.migrate_optimizer(optimizer, nn.Linear(2, 2), model)
    with pytest.raises(fxfuse.ArgumentError, match="no forms of one model"):
        fxfuse.migrate_optimizer(optimizer, model, nn.Linear(2, 2))
    assert optimizer.param_groups[0]["params"] == [*model.parameters()]


# -- freezing -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_a_frozen_lane_stays_and_the_others_train(name: str, before: bool) -> None:
    model, inputs = KINDS["columns"]()
    fused = fxfuse.optimize(model, inputs(1, 6), objective="launches", **QUICK)
    made: list[Any] = [None if before and m is fused else MAKE[name](m.parameters()) for m in (model, fused)]
    if not before:
        for each, optimizer in zip((model, fused), made):
            steps(each, optimizer, inputs, 0, 3)
    kept = {n: v for n, v in fxfuse.original_state_dict(fused).items() if n.startswith("nets.2.")}
    model.nets[2].requires_grad_(False)
    assert fxfuse.freeze(fused, "nets.2.*") == [*kept]
    optimizers = made[0], made[1] or MAKE[name](fused.parameters())
    for each, optimizer in zip((model, fused), optimizers):
        optimizer.zero_grad()
        steps(each, optimizer, inputs, 3, 4)
    assert_equal_training(model, fused)
    state = fxfuse.original_state_dict(fused)
    assert all(torch.equal(state[n], value) for n, value in kept.items())
    assert not fxfuse.report(fused).fallbacks
    assert not any(p.requires_grad for p in fxfuse.unfuse(fused).nets[2].parameters())

    copied = copy.deepcopy(fused)
    steps(copied, MAKE[name](copied.parameters()), inputs, 20, 2)
    assert all(torch.equal(fxfuse.original_state_dict(copied)[n], value) for n, value in kept.items())
    whole = fxfuse.optimize(randomized(copy.deepcopy(model), 5).requires_grad_(True), inputs(1, 6), objective="launches", **QUICK)
    whole.load_state_dict(fused.state_dict())  # packed names of packs that are cut otherwise
    assert_equal_training(fused, whole)
    steps(whole, O.SGD(whole.parameters(), 0.1), inputs, 0, 1)
    fused.load_state_dict(whole.state_dict())
    assert_equal_training(whole, fused)
    fused.load_state_dict(model.state_dict())
    assert_equal_training(model, fused)

    model.nets[2].requires_grad_(True)
    assert fxfuse.unfreeze(fused, "nets.2.*") == [*kept]
    for each, optimizer in zip((model, fused), optimizers):
        steps(each, optimizer, inputs, 9, 3)
    assert_equal_training(model, fused)


def test_freeze_says_what_it_does_not_find() -> None:
    model, _ = KINDS["columns"]()
    with pytest.raises(fxfuse.ArgumentError, match=r"no parameter matches 'nets\.9\.\*'; the names are nets\.0\.0\.weight"):
        fxfuse.freeze(model, "nets.9.*")
    with pytest.raises(fxfuse.ArgumentError, match="needs patterns"):
        fxfuse.freeze(model)


# -- by original name ---------------------------------------------------------------------------------------------------------------


def test_gradients_of_named_parameters_are_the_lanes() -> None:
    model, inputs = KINDS["unequal"]()
    fused = fxfuse.optimize(model, inputs(1, 6), objective="launches", **QUICK)
    named = dict(fxfuse.named_original_parameters(fused))
    assert [*named] == [name for name, _ in model.named_parameters()]
    assert all(p.grad is None for p in named.values())
    for each in (model, fused):
        each(*inputs(2, 5)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(named[name], parameter)
        assert_close(named[name].grad, parameter.grad, name)
    named["nets.1.0.weight"].grad = None
    assert not dict(fxfuse.named_original_parameters(fused))["nets.1.0.weight"].grad.any()
    assert named["nets.3.0.weight"].grad.any()
    fused.zero_grad()
    sum(p.square().sum() for p in named.values()).backward()
    assert_close(named["nets.1.0.weight"].grad, 2 * model.nets[1][0].weight, "a penalty by name")


@pytest.mark.parametrize("kind", ["columns", "conv_norm", "tied", "embeddings"])
def test_checkpoints_in_the_original_s_format(kind: str, tmp_path: Any) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model, inputs = KINDS[kind]()
    fused = fxfuse.optimize(model, inputs(1, 6), objective="launches", **QUICK)
    packed = [*fused.state_dict()]
    with fxfuse.checkpoint_format(fused, "original"):
        assert [*fused.state_dict()] == [*model.state_dict()]
    assert [*fused.state_dict()] == packed
    fxfuse.checkpoint_format(fused, "original")
    for each in (fused, copy.deepcopy(fused)):
        state = each.state_dict()
        assert [*state] == [*model.state_dict()]
        assert state._metadata == model.state_dict()._metadata
        assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    if kind != "tied":
        safetensors.save_file(fused.state_dict(), tmp_path / "model.safetensors")
        other = randomized(copy.deepcopy(model), 3)
        other.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"))
        assert_equal_training(model, other)
    again = randomized(copy.deepcopy(fused), 4)
    again.load_state_dict(state)
    assert_equal_training(model, again)
    with pytest.raises(fxfuse.ArgumentError, match="format must be"):
        fxfuse.checkpoint_format(fused, "other")  # type: ignore[arg-type]


def test_averaged_models_and_scalers() -> None:
    model, inputs = KINDS["columns"]()
    fused = fxfuse.optimize(model, inputs(1, 6), objective="launches", **QUICK)
    averages = [O.swa_utils.AveragedModel(each) for each in (model, fused)]
    for each, average in zip((model, fused), averages):
        optimizer, scaler = MAKE["adam"](each.parameters()), torch.amp.GradScaler("cpu", init_scale=4.0)
        for step in range(4):
            optimizer.zero_grad()
            scaler.scale(each(randn(6, 4, seed=step)).square().mean()).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            average.update_parameters(each)
    assert_equal_training(model, fused)
    assert_equal_training(averages[0].module, averages[1].module)


def test_a_copy_without_a_loop_takes_the_optimizer_or_warns() -> None:
    layer = nn.Linear(2, 2).double()
    optimizer = O.SGD(layer.parameters(), 0.1)
    with pytest.warns(UserWarning, match="SGD holds Parameters of the model"):
        fxfuse.optimize(layer, randn(3, 2), **QUICK)
    other = fxfuse.optimize(layer, randn(3, 2), optimizer=optimizer, **QUICK)
    assert optimizer.param_groups[0]["params"] == [*other.parameters()]
