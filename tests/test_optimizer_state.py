"""State dicts of optimizers in the original's layout: a run goes on in a program without fxfuse, and a run from there with it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from small_loops import KINDS
from test_optimizers import MAKE, assert_equal_training, steps
from torch import nn

import fxfuse
from checks import QUICK, assert_close, randomized

O = torch.optim  # noqa: E741


def fuse(model: nn.Module, inputs: Any, **options: Any) -> nn.Module:
    fused = fxfuse.optimize(model, inputs(1, 6), objective="launches", **QUICK, **options)
    assert fxfuse.report(fused).fused
    return fused


def assert_same_state(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    """To rounding, place by place."""
    assert mine["param_groups"] == theirs["param_groups"]
    assert mine["state"].keys() == theirs["state"].keys()
    for number, state in theirs["state"].items():
        assert mine["state"][number].keys() == state.keys()
        for key, value in state.items():
            one, other = (torch.as_tensor(each).double() for each in (mine["state"][number][key], value))  # loading makes all of one dtype
            assert_close(one, other, f"{number} {key}", 1e-7 if key in ("eta", "mu_product") else 1e-8, floor=1e-10)


def by_rank(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups, the second one in an order of its own: last things first, the lanes before what is no lane."""
    named = [*model.named_parameters()]
    biases = [p for n, p in reversed(named) if p.dim() < 2 and n != "head.bias"]
    return [{"params": [p for _, p in named if p.dim() > 1], "weight_decay": 0.1}, {"params": [*biases, model.head.bias], "lr": 0.02}]


@pytest.mark.parametrize("kind", ["columns", "unequal", "raw_weights", "conv_norm"])
@pytest.mark.parametrize("name", ["sgd", "adam", "amsgrad", "nadam", "asgd"])
def test_saved_and_read_in_both_programs(name: str, kind: str, tmp_path: Path) -> None:
    model, inputs = KINDS[kind]()
    never = copy.deepcopy(model)
    plain = MAKE[name](never.parameters())
    steps(never, plain, inputs, 0, 4)
    middle = copy.deepcopy(never.state_dict()), copy.deepcopy(plain.state_dict())
    steps(never, plain, inputs, 4, 4)

    fused = fuse(model, inputs)
    optimizer = MAKE[name](fused.parameters())  # built from the packs
    steps(fused, optimizer, inputs, 0, 4)
    saved = fxfuse.original_optimizer_state_dict(optimizer, fused)
    assert_same_state(saved, middle[1])
    assert all(value.is_contiguous() for state in saved["state"].values() for value in state.values() if torch.is_tensor(value))
    torch.save(saved, tmp_path / "optimizer.pt")

    other = copy.deepcopy(model)
    other.load_state_dict(fxfuse.original_state_dict(fused))
    reader = MAKE[name](other.parameters())
    reader.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    steps(other, reader, inputs, 4, 4)
    assert_equal_training(never, other)

    again = fuse(randomized(copy.deepcopy(model), 3), inputs)
    again.load_state_dict(middle[0])
    later = MAKE[name](again.parameters())
    fxfuse.load_original_optimizer_state_dict(later, again, middle[1])
    steps(again, later, inputs, 4, 4)
    assert_equal_training(never, again)
    assert_same_state(fxfuse.original_optimizer_state_dict(later, again), plain.state_dict())


def test_a_migrated_optimizer_keeps_the_places_that_it_had() -> None:
    model, inputs = KINDS["columns"]()
    beside = nn.Parameter(torch.ones(2, dtype=torch.float64))  # of another model, in the midst

    def groups(m: nn.Module, other: nn.Parameter) -> list[dict[str, Any]]:
        found = by_rank(m)
        found[1]["params"].insert(3, other)
        return found

    never, other = copy.deepcopy(model), nn.Parameter(beside.detach().clone())
    plain, optimizer = O.AdamW(groups(never, other), 0.01), O.AdamW(groups(model, beside), 0.01)

    def train(trained: nn.Module, each: Any, extra: nn.Parameter, first: int) -> None:
        extra.grad = torch.full_like(extra, 0.1 + first)
        for step in range(first, first + 3):
            trained.zero_grad()
            trained(*inputs(50 + step, 6)).square().mean().backward()
            each.step()

    for first in (0, 3, 6):
        train(never, plain, other, first)
    train(model, optimizer, beside, 0)
    fused = fuse(model, inputs, optimizer=optimizer)
    train(fused, optimizer, beside, 3)
    fxfuse.freeze(fused, "nets.1.*")  # cuts packs
    fxfuse.unfreeze(fused, "nets.1.*")
    train(fused, optimizer, beside, 6)
    assert_same_state(fxfuse.original_optimizer_state_dict(optimizer, fused), plain.state_dict())
    again = fxfuse.migrate_optimizer(optimizer, fused, copy.deepcopy(fused), inplace=False)
    assert len(again.param_groups[1]["params"]) == len(optimizer.param_groups[1]["params"])
    back = fxfuse.unfuse(fused)
    fxfuse.migrate_optimizer(optimizer, fused, back)
    assert_same_state(optimizer.state_dict(), plain.state_dict())
    assert optimizer.param_groups[1]["params"][3] is beside
    reader = O.AdamW(groups(copy.deepcopy(never), nn.Parameter(torch.zeros(2, dtype=torch.float64))), 0.5)
    fxfuse.load_original_optimizer_state_dict(optimizer, back, plain.state_dict())
    reader.load_state_dict(optimizer.state_dict())
    assert_same_state(reader.state_dict(), plain.state_dict())


@pytest.mark.parametrize("kind", ["columns", "unequal", "raw_weights", "conv_norm", "experts"])
def test_packed_state_of_a_migrated_optimizer_fits_one_that_is_built_anew(kind: str) -> None:
    """Torch loads by places: packs lie in the order of ``fused.parameters()``, whatever the order of their lanes was."""
    model, inputs = KINDS[kind]()
    optimizer = O.RAdam(model.parameters(), 0.01)
    steps(model, optimizer, inputs, 0, 2)
    fused = fuse(model, inputs, optimizer=optimizer)
    steps(fused, optimizer, inputs, 2, 2)
    saved = copy.deepcopy((fused.state_dict(), optimizer.state_dict()))
    again = fuse(randomized(copy.deepcopy(model), 6), inputs)
    later = O.RAdam(again.parameters(), 0.5)
    again.load_state_dict(saved[0])
    later.load_state_dict(saved[1])
    for each, one in ((fused, optimizer), (again, later)):
        assert [*map(id, each.parameters())] == [*map(id, one.param_groups[0]["params"])]
        steps(each, one, inputs, 4, 3)
    assert_equal_training(fused, again)


def test_checkpoint_format_for_optimizers() -> None:
    model, inputs = KINDS["columns"]()
    never = copy.deepcopy(model)
    named = [O.AdamW(each.named_parameters(), 0.01) for each in (never,)]
    fused = fuse(model, inputs)
    optimizer = O.AdamW(fused.named_parameters(), 0.01)
    steps(never, named[0], inputs, 0, 3)
    steps(fused, optimizer, inputs, 0, 3)
    packed = copy.deepcopy(optimizer.state_dict())
    with fxfuse.checkpoint_format(fused, "original", optimizer=optimizer):
        assert_same_state(optimizer.state_dict(), named[0].state_dict())
        assert optimizer.state_dict()["param_groups"][0]["param_names"] == [n for n, _ in never.named_parameters()]
    assert_same_state(optimizer.state_dict(), packed)
    fxfuse.checkpoint_format(fused, "original", optimizer=[optimizer])
    saved = copy.deepcopy((fused.state_dict(), optimizer.state_dict()))
    steps(never, named[0], inputs, 3, 3)
    steps(fused, optimizer, inputs, 3, 3)
    for layout in (saved[1], packed):
        again = fuse(randomized(copy.deepcopy(model), 5), inputs)
        later = O.AdamW(again.named_parameters(), 0.5)
        fxfuse.checkpoint_format(again, "original", optimizer=later)
        again.load_state_dict(saved[0])
        later.load_state_dict(layout)
        steps(again, later, inputs, 3, 3)
        assert_equal_training(never, again)
    back = fxfuse.unfuse(fused)
    fxfuse.migrate_optimizer(optimizer, fused, back)  # still told to write the original's layout, which is now its own
    assert_same_state(optimizer.state_dict(), named[0].state_dict())
    fxfuse.checkpoint_format(back, "packed", optimizer=optimizer)
    assert_same_state(optimizer.state_dict(), named[0].state_dict())


def test_counts_of_steps_that_differ_cut_packs() -> None:
    model, inputs = KINDS["columns"]()
    plain = O.Adam(model.parameters(), 0.01)
    model.nets[2].requires_grad_(False)
    steps(model, plain, inputs, 0, 2)
    model.nets[2].requires_grad_(True)
    steps(model, plain, inputs, 2, 2)
    fused = fuse(copy.deepcopy(model), inputs)
    optimizer = O.Adam(fused.parameters(), 0.5)
    fxfuse.load_original_optimizer_state_dict(optimizer, fused, plain.state_dict())
    assert "packed.nets.0.lane_2.weight" in dict(fused.named_parameters())
    assert_same_state(fxfuse.original_optimizer_state_dict(optimizer, fused), plain.state_dict())
    for each, one in ((model, plain), (fused, optimizer)):
        steps(each, one, inputs, 4, 3)
    assert_equal_training(model, fused)


def test_what_does_not_fit_changes_nothing() -> None:
    model, inputs = KINDS["columns"]()
    fused = fuse(model, inputs)
    optimizer = O.Adam(fused.parameters(), 0.01)
    steps(fused, optimizer, inputs, 0, 2)
    before = copy.deepcopy(optimizer.state_dict())
    fewer = fxfuse.original_optimizer_state_dict(optimizer, fused)
    fewer["param_groups"][0]["params"] = fewer["param_groups"][0]["params"][:-1]
    odd = fxfuse.original_optimizer_state_dict(optimizer, fused)
    odd["state"][2]["exp_avg"] = torch.zeros(3, 3)
    foreign = "not one of a Adam over the original"
    for wrong, said in ((before, foreign), (fewer, foreign), (odd, "neither of the parameter's shape")):
        with pytest.raises(fxfuse.OptimizerError, match=said):
            fxfuse.load_original_optimizer_state_dict(optimizer, fused, wrong)
        assert_same_state(optimizer.state_dict(), before)
    with pytest.raises(fxfuse.ArgumentError, match="must be what"):
        fxfuse.load_original_optimizer_state_dict(optimizer, fused, {})
    with pytest.raises(fxfuse.OptimizerError, match="LBFGS is not elementwise"):
        fxfuse.checkpoint_format(fused, "original", optimizer=O.LBFGS(fused.parameters()))
    assert [*fused.state_dict()] != [*model.state_dict()]
