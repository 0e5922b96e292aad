"""Parts of a fused model, asked for their parameters by themselves, as param groups and logs ask."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small_loops import KINDS
from test_optimizers import assert_equal_training, steps
from torch import Tensor, nn

import fxfuse
from checks import QUICK, assert_close, mlp, model_of, randn, randomized
from fxfuse.weights.packing import original_gradients

O = torch.optim  # noqa: E741


def experts() -> Any:
    def forward(self: Any, x: Tensor) -> Tensor:
        mixed = sum(net(x) for net in self.experts)
        return torch.cat([tower(mixed) for tower in self.towers], 1)

    nets, towers = nn.ModuleList(mlp(4, 6, 5) for _ in range(3)), nn.ModuleList(mlp(5, 4) for _ in range(2))
    return randomized(model_of(forward, experts=nets, towers=towers)), lambda seed, batch: (randn(batch, 4, seed=seed),)


def fuse(model: nn.Module, inputs: Any) -> Any:
    fused = fxfuse.optimize(model, *inputs(1, 6), objective="launches", **QUICK)
    assert fxfuse.report(fused).fused
    return fused


def groups(model: Any) -> list[dict[str, Any]]:
    return [{"params": model.experts.parameters(), "lr": 0.01, "weight_decay": 0.1}, {"params": model.towers.parameters(), "lr": 0.05}]


def test_param_groups_by_submodule() -> None:
    model, inputs = experts()
    fused = fuse(copy.deepcopy(model), inputs)
    made = [O.AdamW(groups(each), 0.1) for each in (model, fused)]
    assert {id(p) for g in made[1].param_groups for p in g["params"]} == {id(p) for p in fused.parameters()}
    for each, optimizer in zip((model, fused), made):
        steps(each, optimizer, inputs, 0, 6)
    assert_equal_training(model, fused)
    assert not fxfuse.report(fused).fallbacks
    numbers = [sum(p.numel() for p in each.experts.parameters()) for each in (model, fused)]
    norms = [nn.utils.clip_grad_norm_(each.experts.parameters(), 0.01) for each in (model, fused)]
    assert numbers[0] == numbers[1] > 0
    assert_close(norms[1], norms[0], "norm of a part", 1e-9)
    for name, gradient in original_gradients(model).items():
        assert_close(original_gradients(fused)[name], gradient, name, 1e-9, floor=1e-10)


def test_one_lane_is_read_and_not_optimized() -> None:
    model, inputs = experts()
    fused = fuse(copy.deepcopy(model), inputs)
    for each in (model, fused):
        each(*inputs(3, 5)).square().sum().backward()
    assert [n for n, _ in fused.experts[1].named_parameters("here")] == [n for n, _ in model.experts[1].named_parameters("here")]
    for mine, theirs in zip(fused.experts[1].parameters(), model.experts[1].parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert_close(mine.grad, theirs.grad, "grad")
    with pytest.raises(ValueError, match="non-leaf"):
        O.SGD([{"params": fused.experts[1].parameters()}], 0.1)
    assert not [*fused.experts[1].named_parameters(recurse=False)]  # what DDP and FSDP ask of every module
    fused.experts[1].zero_grad()
    for number in range(3):
        assert [bool(p.grad.any()) for p in fused.experts[number].parameters()] == [number != 1] * 4
    names = [name for name, _ in fused.named_parameters()]
    assert all(name.startswith("packed.") for name in names)
    assert len(names) == len({*names}) == 8


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_holds_what_the_original_s_part_holds(kind: str) -> None:
    model, inputs = KINDS[kind]()
    fused = fxfuse.optimize(model, *inputs(1, 6), objective="launches", **QUICK)
    for name, child in model.named_children():
        mine = fused.get_submodule(name)
        assert sum(p.numel() for p in mine.parameters()) == sum(p.numel() for p in child.parameters()), name
        for number, lane in enumerate(child.children()):
            found = dict(mine.get_submodule(str(number)).named_parameters())
            assert [*found] == [n for n, _ in lane.named_parameters()]
            assert all(torch.equal(found[n], p) for n, p in lane.named_parameters())
        assert [p.requires_grad for p in mine.parameters()].count(True) <= len([*child.parameters()])


def test_a_forward_that_asks_a_lane_for_its_dtype_falls_back_rightly() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return torch.cat([net(x[:, i : i + 1].to(next(net.parameters()).dtype)) for i, net in enumerate(self.nets)], 1)

    model = randomized(model_of(forward, nets=nn.ModuleList(mlp() for _ in range(4))))
    fused = fuse(copy.deepcopy(model), lambda seed, batch: (randn(batch, 4, seed=seed),))
    fused.nets[1].note = 3
    fused.nets[2][1] = nn.Tanh()  # no program fits any more
    model.nets[2][1] = nn.Tanh()
    x = randn(5, 4)
    assert_close(fused(x), model(x), "output")
    assert fxfuse.report(fused).fallbacks


def critics() -> Any:
    def forward(self: Any, x: Tensor) -> Tensor:
        values = torch.cat([net(x) for net in self.nets], 1)
        with torch.no_grad():
            target = torch.cat([net(x) for net in self.targets], 1)
        return torch.cat([values, target], 1)

    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 1))

    nets, targets = (nn.ModuleList(network() for _ in range(3)) for _ in range(2))
    targets.requires_grad_(False)
    return randomized(model_of(forward, nets=nets, targets=targets)), lambda seed, batch: (randn(batch, 4, seed=seed),)


def hard(model: Any) -> None:
    model.targets.load_state_dict(model.nets.state_dict())


def hard_one_by_one(model: Any) -> None:
    for net, target in zip(model.nets, model.targets, strict=True):
        target.load_state_dict(net.state_dict())


def soft_by_names(model: Any) -> None:
    mixed = model.targets.state_dict()
    for name, value in model.nets.state_dict().items():
        mixed[name] = 0.9 * mixed[name] + 0.1 * value
    model.targets.load_state_dict(mixed)


def written_through(model: Any) -> None:
    for value in model.nets[1].state_dict().values():
        value.mul_(2)


def buffers(model: Any) -> None:
    for net, target in zip(model.nets.buffers(), model.targets.buffers(), strict=True):
        target.copy_(net)
    for net in model.nets[1].buffers():
        net.add_(1)


@pytest.mark.parametrize("update", [hard, hard_one_by_one, soft_by_names, written_through, buffers])
@pytest.mark.parametrize("inside", [False, True])
def test_state_dicts_of_parts(update: Any, inside: bool) -> None:
    model, inputs = critics()
    if inside:
        model = model_of(lambda self, x: self.inner(x), inner=model)
    fused = fuse(copy.deepcopy(model), inputs)
    for each in (model, fused):
        update(each.inner if inside else each)
    expected, got = model.state_dict(), fxfuse.original_state_dict(fused)
    assert list(expected) == list(got)
    for name, value in expected.items():
        assert torch.equal(got[name], value), name
    x = inputs(2, 5)
    assert_close(fused(*x), model(*x), "outputs")


def test_names_in_state_dicts_of_parts() -> None:
    model, inputs = critics()
    fused = fuse(copy.deepcopy(model), inputs)
    for part in ("nets", "nets.1", "nets.1.0", "targets.2"):
        mine, theirs = fused.get_submodule(part), model.get_submodule(part)
        assert list(mine.state_dict()) == list(theirs.state_dict())
        assert sum(b.numel() for b in mine.buffers()) == sum(b.numel() for b in theirs.buffers())
        with pytest.raises(RuntimeError, match="Missing key"):
            mine.load_state_dict({})
        held = model_of(lambda self, x: x, part=mine)  # a module of somebody else's
        assert list(held.state_dict()) == [f"part.{name}" for name in theirs.state_dict()]
        for order in (("part", "model"), ("model", "part")):  # beside the whole, on either side
            each = {"part": mine, "model": fused}
            saved = model_of(lambda self, x: x, **{name: each[name] for name in order}).state_dict()
            assert {name for name in saved if not name.startswith("model.packed.")} == {f"part.{name}" for name in theirs.state_dict()}
    assert all(name.startswith("packed.") for name in fused.state_dict())
    assert list(nn.Module.state_dict(fused)) == list(fused.state_dict())
    with fxfuse.checkpoint_format(fused, "original"):
        assert list(fused.nets.state_dict()) == list(model.nets.state_dict())


def doubled_vector(part: nn.Module) -> None:
    nn.utils.vector_to_parameters(torch.cat([p.reshape(-1) for p in part.parameters()]) * 2, part.parameters())


def other_data(part: nn.Module) -> None:
    for index, parameter in enumerate(part.parameters()):
        parameter.data = parameter.data + index


@pytest.mark.parametrize("change", [doubled_vector, other_data])
def test_data_of_one_lane(change: Any) -> None:
    model, inputs = experts()
    fused = fuse(copy.deepcopy(model), inputs)
    for each in (model, fused):
        change(each.experts[1])
    for name, value in model.state_dict().items():
        assert torch.equal(fxfuse.original_state_dict(fused)[name], value), name
    with pytest.raises(fxfuse.FxfuseError, match="its data stays"):
        next(iter(fused.experts[1].parameters())).data = torch.zeros(2)


def test_hooks_of_one_lanes_weights() -> None:
    model, inputs = experts()
    fused = fuse(copy.deepcopy(model), inputs)
    seen: list[list[Any]] = [[], []]
    for each, found in zip((model, fused), seen):
        handles = []
        for index, parameter in enumerate(each.experts[1].parameters()):
            handles.append(parameter.register_hook(lambda g, k=index: g * (k + 2)))
            handles.append(parameter.register_hook(lambda g, f=found: f.append(g.clone())))
            parameter.register_post_accumulate_grad_hook(lambda p, f=found: f.append(p.grad.clone()))
        each(*inputs(2, 4)).pow(2).sum().backward()
        for handle in handles:
            handle.remove()
        each(*inputs(3, 4)).pow(2).sum().backward()

    def by_size(found: list[Any]) -> list[Any]:  # the order in which gradients arrive is nobody's promise
        return sorted(found, key=lambda t: (t.shape, float(t.sum())))

    assert len(seen[0]) == len(seen[1]) == 12
    for got, expected in zip(by_size(seen[1]), by_size(seen[0])):
        assert_close(got, expected, "seen")
    for name, gradient in original_gradients(model).items():
        assert_close(original_gradients(fused)[name], gradient, name)


def test_parts_that_move_or_say_that_they_cannot() -> None:
    model, inputs = experts()
    fused = fuse(copy.deepcopy(model), inputs)
    x = inputs(2, 5)
    for each in (model, fused):
        each.experts[1].double().to("cpu").requires_grad_(True)  # as they are
        each.experts.float()
        with pytest.raises(RuntimeError, match="dtype"):
            each(*x)
        each.experts.double()
    for name, value in model.state_dict().items():
        assert torch.equal(fxfuse.original_state_dict(fused)[name], value), name
    assert_close(fused(*x), model(*x), "outputs")
    before = fxfuse.original_state_dict(fused)
    for move in (lambda part: part.half(), lambda part: part.to(torch.float32), lambda part: part.to("meta")):
        with pytest.raises(fxfuse.FxfuseError, match=r"experts.1.0.\w+ alone cannot become torch.float"):
            move(fused.experts[1])
    assert all(torch.equal(value, before[name]) for name, value in fxfuse.original_state_dict(fused).items())
    fused.half()
    assert all(p.dtype is torch.float16 for p in fused.parameters())
    assert fused.experts[1][0].weight.dtype is torch.float16


def test_a_frozen_lane_among_parts_that_move() -> None:
    model, inputs = experts()
    fused = fuse(copy.deepcopy(model), inputs)
    fxfuse.freeze(fused, "experts.1.*")
    model.experts[1].requires_grad_(False)
    for each in (model, fused):
        each.experts.float().double()
        each.experts[1].requires_grad_(False)
        each.experts[2].requires_grad_(True)
        each(*inputs(2, 4)).pow(2).sum().backward()
    for name, gradient in original_gradients(model).items():
        assert_close(original_gradients(fused)[name], gradient, name)
    for name, value in model.state_dict().items():
        assert torch.equal(fxfuse.original_state_dict(fused)[name], value), name
