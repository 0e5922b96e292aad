"""What stands around an optimizer lives through fusing in mid-training: averages, scalers, wrappers, sparse gradients, plain lists."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_loops import KINDS
from test_optimizers import MAKE, assert_equal_training, steps
from torch import Tensor, nn

import fxfuse
from checks import QUICK, assert_close, mlp, model_of, randn, randomized

O = torch.optim  # noqa: E741
FUNCTIONS: dict[str, dict[str, Any]] = {
    "swa": {},
    "ema": {"multi_avg_fn": O.swa_utils.get_ema_multi_avg_fn(0.9)},
    "one by one": {"avg_fn": lambda mean, value, number: mean + (value - mean) / (number + 2)},
    "buffers too": {"multi_avg_fn": O.swa_utils.get_ema_multi_avg_fn(0.9), "use_buffers": True},
}


def fuse(model: nn.Module, *inputs: Any, **options: Any) -> nn.Module:
    fused = fxfuse.optimize(model, *inputs, objective="launches", **QUICK, **options)
    assert fxfuse.report(fused).fused
    return fused


@pytest.mark.parametrize("kind", ["columns", "conv_norm", "unequal"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_average_goes_on_over_the_fused_model_and_back(name: str, kind: str) -> None:
    model, inputs = KINDS[kind]()
    if name == "buffers too" and kind == "conv_norm":
        pytest.skip("lerp takes no counters of batches")
    never = copy.deepcopy(model)
    averages = [O.swa_utils.AveragedModel(each, **FUNCTIONS[name]) for each in (never, model)]
    averages[1].module.requires_grad_(False)
    made = [MAKE["adam"](each.parameters()) for each in (never, model)]

    def train(which: int, trained: nn.Module, first: int, number: int) -> None:
        steps(trained, made[which], inputs, first, number, lambda _: averages[which].update_parameters(trained))

    train(0, never, 0, 9)
    train(1, model, 0, 3)
    fused = fuse(model, inputs(1, 6), optimizer=made[1])
    assert fxfuse.migrate_average(averages[1], fused) is averages[1]
    assert [*averages[1].module.state_dict()] == [*fused.state_dict()]
    train(1, fused, 3, 3)
    assert not any(p.requires_grad or p.grad is not None for p in averages[1].module.parameters())
    assert all(p.requires_grad for p in fused.parameters())
    back = fxfuse.unfuse(fused)
    fxfuse.migrate_optimizer(made[1], fused, back)
    fxfuse.migrate_average(averages[1], back)
    train(1, back, 6, 3)
    assert_equal_training(never, back)
    assert_equal_training(averages[0].module, averages[1].module)
    assert int(averages[1].n_averaged) == 9
    x = inputs(80, 5)
    assert_close(averages[1].eval()(*x), averages[0].eval()(*x), "the averages' outputs", 1e-9)


def test_an_average_of_another_model_stays_as_it_is() -> None:
    model, _ = KINDS["columns"]()
    average = O.swa_utils.AveragedModel(model)
    before = average.module
    with pytest.raises(fxfuse.StateDictError, match=r"missing: .*weight"):
        fxfuse.migrate_average(average, nn.Linear(2, 2))
    assert average.module is before
    with pytest.raises(fxfuse.ArgumentError, match="AveragedModel, a Linear came"):
        fxfuse.migrate_average(nn.Linear(2, 2), model)  # type: ignore[arg-type]


def test_a_scaler_goes_on() -> None:
    model, inputs = KINDS["columns"]()
    never = copy.deepcopy(model)
    made = [MAKE["adam"](each.parameters()) for each in (never, model)]
    scalers = [torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2) for _ in made]

    def train(which: int, trained: nn.Module, first: int, number: int) -> None:
        for step in range(first, first + number):
            made[which].zero_grad()
            loss = trained(*inputs(50 + step, 6)).square().mean() * (float("inf") if step in (1, 4) else 1.0)  # these steps are left out
            scalers[which].scale(loss).backward()
            scalers[which].unscale_(made[which])
            nn.utils.clip_grad_norm_(trained.parameters(), 0.7)
            scalers[which].step(made[which])
            scalers[which].update()

    train(0, never, 0, 9)
    train(1, model, 0, 3)
    fused = fuse(model, inputs(1, 6), optimizer=made[1])
    train(1, fused, 3, 3)
    back = fxfuse.unfuse(fused)
    fxfuse.migrate_optimizer(made[1], fused, back)
    train(1, back, 6, 3)
    assert_equal_training(never, back)
    assert scalers[0].get_scale() == scalers[1].get_scale() != 4.0


SPARSE: dict[str, Callable[[Any], Any]] = {
    "sparse adam": lambda p: O.SparseAdam([*p], 0.05),
    "sgd": lambda p: O.SGD(p, 0.1),
    "adagrad": lambda p: O.Adagrad(p, 0.1),
}


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")  # torch's own
@pytest.mark.parametrize("name", SPARSE)
def test_sparse_gradients(name: str) -> None:
    def forward(self: Any, ids: Tensor) -> Tensor:
        return self.out(torch.cat([table(ids[:, i]) for i, table in enumerate(self.tables)], 1))

    tables = nn.ModuleList(nn.Embedding(9 + i, 3, sparse=True) for i in range(4))
    model = randomized(model_of(forward, tables=tables, out=nn.Linear(12, 2)))
    never = copy.deepcopy(model)
    made = [SPARSE[name](each.tables.parameters()) for each in (never, model)]

    def train(which: int, trained: nn.Module, first: int, number: int) -> None:
        for step in range(first, first + number):
            trained.zero_grad()
            (trained(ids(step)) - 0.3).square().mean().backward()
            made[which].step()

    def ids(seed: int) -> Tensor:
        return torch.randint(0, 9, (3, 4), generator=torch.Generator().manual_seed(seed))

    train(0, never, 0, 9)
    train(1, model, 0, 3)
    fused = fuse(model, ids(1), optimizer=made[1])
    train(1, fused, 3, 3)
    assert [p.grad.is_sparse for n, p in fused.named_parameters() if "tables" in n] == [True]
    back = fxfuse.unfuse(fused)
    fxfuse.migrate_optimizer(made[1], fused, back)
    train(1, back, 6, 3)
    assert_equal_training(never, back)


HOLDERS: dict[str, Callable[[Any], Any]] = {"list": list, "dict": lambda nets: {f"net {i}": net for i, net in enumerate(nets)}}


def unregistered(holder: str) -> tuple[nn.Module, Callable[[Any], list[nn.Parameter]]]:
    """A model whose networks no module registers, and how its users collect what to train."""
    def nets(model: Any) -> Any:
        return model.nets.values() if holder == "dict" else model.nets

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(nets(self))], 1))

    lanes = [randomized(mlp(), seed) for seed in range(4)]
    model = randomized(model_of(forward, head=nn.Linear(4, 2)), 9)
    model.nets = HOLDERS[holder](lanes)
    return model, lambda model: [*model.parameters(), *(p for net in nets(model) for p in net.parameters())]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("holder", HOLDERS)
def test_networks_in_plain_lists(holder: str, inplace: bool) -> None:
    model, trained = unregistered(holder)
    never = copy.deepcopy(model)
    made = [O.Adam(trained(each), 0.05) for each in (never, model)]

    def train(which: int, each: nn.Module, first: int) -> None:
        for step in range(first, first + 3):
            made[which].zero_grad()
            (each(randn(6, 4, seed=step)) - 0.3).square().mean().backward()
            made[which].step()

    for first in (0, 3, 6):
        train(0, never, first)
    train(1, model, 0)
    fused = fuse(model, randn(6, 4), optimizer=made[1], inplace=inplace)
    assert {id(p) for p in trained(fused)} == {id(p) for g in made[1].param_groups for p in g["params"]}
    train(1, fused, 3)
    back = fxfuse.unfuse(fused)
    fxfuse.migrate_optimizer(made[1], fused, back)
    train(1, back, 6)
    for number, (mine, theirs) in enumerate(zip(trained(back), trained(never), strict=True)):
        assert_close(mine, theirs, str(number), 1e-9)
    assert len(made[1].state) == len(trained(back))


def test_who_trains_unregistered_networks_is_warned_where_they_stay_behind() -> None:
    model, trained = unregistered("list")
    optimizer = O.Adam(trained(model)[2:], 0.05)  # the lanes alone
    with pytest.warns(UserWarning, match="Adam holds Parameters of the model that was given"):
        fuse(model, randn(6, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fuse(model, randn(6, 4), inplace=True)  # these very Parameters stay
    assert {id(p) for p in trained(model)[2:]} == {id(p) for p in optimizer.param_groups[0]["params"]}


class AcceleratedOptimizer(O.Optimizer):
    """As accelerate wraps: everything is asked of the optimizer inside."""

    def __init__(self, optimizer: O.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def state(self) -> Any:
        return self.optimizer.state

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups


def test_a_wrapped_optimizer_is_the_one_inside() -> None:
    model, inputs = KINDS["columns"]()
    never = copy.deepcopy(model)
    made = [MAKE["adam"](each.parameters()) for each in (never, model)]
    wrapped = AcceleratedOptimizer(made[1])
    steps(never, made[0], inputs, 0, 6)
    steps(model, made[1], inputs, 0, 3)
    fused = fuse(model, inputs(1, 6), optimizer=wrapped)
    steps(fused, made[1], inputs, 3, 3)
    assert_equal_training(never, fused)
    back = fxfuse.unfuse(fused)
    assert fxfuse.migrate_optimizer(wrapped, fused, back) is wrapped
    assert made[1].param_groups[0]["params"] == [*back.parameters()]
    with pytest.raises(fxfuse.OptimizerError, match="LBFGS is not elementwise"):
        fxfuse.migrate_optimizer(AcceleratedOptimizer(O.LBFGS(back.parameters())), back, fused)


def test_state_with_a_history_is_refused() -> None:
    model, inputs = KINDS["columns"]()
    optimizer = O.SGD(model.parameters(), 0.1, momentum=0.9, differentiable=True)
    weight = model.nets[1][0].weight
    optimizer.state[weight]["momentum_buffer"] = weight * 2
    with pytest.raises(fxfuse.OptimizerError, match=r"nets\.1\.0\.weight: its state momentum_buffer has a history of autograd"):
        fxfuse.optimize(model, inputs(1, 6), optimizer=optimizer, **QUICK)


@pytest.mark.gpu
@pytest.mark.parametrize("make", [O.Adam, O.AdamW, O.NAdam, O.RAdam, O.Adamax, O.RMSprop, O.Adadelta, O.ASGD, O.Rprop])
def test_capturable(make: Any) -> None:
    """Counts of steps lie on the device."""
    if not torch.cuda.is_available():
        pytest.skip("needs an accelerator")
    model, given = KINDS["columns"]()
    model.cuda()
    never = copy.deepcopy(model)
    made = [make(each.parameters(), 0.01, capturable=True) for each in (never, model)]

    def inputs(seed: int, batch: int) -> tuple[Tensor, ...]:
        return tuple(tensor.cuda() for tensor in given(seed, batch))

    steps(never, made[0], inputs, 0, 6)
    steps(model, made[1], inputs, 0, 3)
    fused = fuse(model, inputs(1, 6), optimizer=made[1])
    steps(fused, made[1], inputs, 3, 3)
    assert_equal_training(never, fused)
    assert all(state["step"].is_cuda for state in made[1].state.values())
