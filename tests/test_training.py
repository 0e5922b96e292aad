"""Training a fused model is the same training: equal losses, weights and statistics after 50 steps from equal state, and dropout of the
same distribution, independent from lane to lane."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import combinations, product
from typing import Any

import pytest
import torch
from small_loops import KINDS, Inputs
from torch import Tensor, nn

import fxfuse
from checks import QUICK, assert_close, mlp, model_of, randomized
from fxfuse.planning.memory import peak_bytes

RTOL = 1e-9
STEPS = 50

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.02, momentum=0.9, weight_decay=0.01, nesterov=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, weight_decay=0.01),
}
WAYS: dict[str, dict[str, Any]] = {
    "packed": {"objective": "launches"},
    "inplace": {"objective": "launches", "inplace": True},
    "shared": {},  # optimize(model), fused at its first call
    "chunked": {},
}


def alternating(*lists: Any, every: int = 2) -> list[Any]:
    """All combinations; all but one in ``every`` are left to the stress run."""
    found = [[*enumerate(values)] for values in lists]
    return [
        pytest.param(*(value for _, value in each), marks=[pytest.mark.stress] * bool(sum(i for i, _ in each) % every))
        for each in product(*found)
    ]


def fuse(model: nn.Module, x: tuple[Any, ...], way: str) -> nn.Module:
    model = copy.deepcopy(model)
    if way == "shared":
        fused = fxfuse.optimize(model, objective="launches", tune=False, inplace=True)
        with torch.no_grad():
            fused.eval()(*x)  # a first call that leaves running statistics alone
        fused.train()
    elif way == "chunked":
        fused = _in_chunks(model, x)
    else:
        fused = fxfuse.optimize(model, x, **QUICK, **WAYS[way])
    assert fxfuse.report(fused).fused, str(fxfuse.report(fused))
    return fused


def _in_chunks(model: nn.Module, x: tuple[Any, ...]) -> nn.Module:
    """With a little less memory than all lanes at once need."""
    whole = fxfuse.optimize(model, x, mode="train", **QUICK, max_memory=10**9)
    parameters = list(whole.parameters())
    used = peak_bytes(lambda: torch.autograd.grad(whole(*x).sum(), parameters))
    for part in (0.95, 0.9, 0.8, 0.7, 0.6):
        fused = fxfuse.optimize(model, x, mode="train", **QUICK, max_memory=int(part * used))
        if any(op.lowering.endswith("chunks") for plan in fxfuse.report(fused).fused for op in plan.ops):
            return fused
    raise AssertionError("no limit gives chunks")


def loss_of(out: Any, seed: int) -> Tensor:
    outputs = out if isinstance(out, list) else [out]
    generator = torch.Generator().manual_seed(seed)
    targets = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]
    return torch.stack([(o - t).square().mean() for o, t in zip(outputs, targets)]).sum()


def train(
    model: nn.Module, inputs: Inputs, make: Callable[[Any], torch.optim.Optimizer], each: Callable[..., None] | None = None
) -> list[float]:
    """The losses of 50 steps, on new data and, now and then, another batch size."""
    optimizer, losses = make([p for p in model.parameters() if p.requires_grad]), []
    for step in range(STEPS):
        x = inputs(100 + step, 8 if step % 5 else 5)
        optimizer.zero_grad()
        loss = loss_of(model(*x), step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if each is not None:
            each(model, optimizer, step)
    return losses


def assert_same_training(model: nn.Module, fused: nn.Module, losses: tuple[list[float], list[float]], where: str) -> None:
    expected, got = (torch.tensor(each, dtype=torch.float64) for each in losses)
    assert expected.isfinite().all()
    assert_close(got, expected, f"{where}: losses", RTOL)
    state = fxfuse.original_state_dict(fused)
    assert list(state) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            assert_close(state[name], tensor, f"{where}: {name}", RTOL)
        else:
            assert torch.equal(state[name], tensor), f"{where}: {name}"
    assert not fxfuse.report(fused).fallbacks, f"{where}: {fxfuse.report(fused).fallbacks}"


@pytest.mark.parametrize(("kind", "optimizer"), alternating(KINDS, OPTIMIZERS))
def test_fifty_steps_are_the_same(kind: str, optimizer: str) -> None:
    model, inputs = KINDS[kind]()
    fused = fuse(model, inputs(1, 8), "packed")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses = train(model, inputs, OPTIMIZERS[optimizer]), train(fused, inputs, OPTIMIZERS[optimizer])
    assert_same_training(model, fused, losses, f"{kind}, {optimizer}")
    moved = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert len(moved) > len(before) // 2, "nothing was trained"


OTHERS = alternating(["columns", "conv_norm", "tied"], ["inplace", "shared", "chunked"], OPTIMIZERS, every=3)


@pytest.mark.parametrize(("kind", "way", "optimizer"), OTHERS)
def test_other_ways_to_fuse_train_the_same(kind: str, way: str, optimizer: str) -> None:
    if (kind, way) == ("tied", "chunked"):
        kind = "unequal"
    model, inputs = KINDS[kind]()
    fused = fuse(model, inputs(1, 200 if way == "chunked" else 8), way)  # of few rows, kernels' own memory is most of it
    losses = train(model, inputs, OPTIMIZERS[optimizer]), train(fused, inputs, OPTIMIZERS[optimizer])
    assert_same_training(model, fused, losses, f"{kind}, {way}, {optimizer}")


@pytest.mark.parametrize("kind", ["columns", "conv_norm", "frozen"])
def test_an_optimizer_built_before_trains_shared_parameters(kind: str) -> None:
    model, inputs = KINDS[kind]()
    other = copy.deepcopy(model)
    optimizer = OPTIMIZERS["adam"]([p for p in other.parameters() if p.requires_grad])
    fused = fxfuse.optimize(other, objective="launches", tune=False)
    losses: tuple[list[float], list[float]] = train(model, inputs, OPTIMIZERS["adam"]), train(fused, inputs, lambda parameters: optimizer)
    assert_same_training(model, fused, losses, kind)
    for name, tensor in model.named_parameters():  # the Parameters that the optimizer was given are the fused model's
        assert_close(dict(other.named_parameters())[name].detach(), tensor.detach(), name, RTOL)


def _scheduled(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] *= 0.97 if step % 3 else 1.05


def _freezing(model: Any, optimizer: torch.optim.Optimizer, step: int) -> None:
    if step in (10, 25):
        model.nets.requires_grad_(step == 25)
    if step in (30, 40):
        model.head.requires_grad_(step == 40)


def _clipping(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 0.01 * (step + 1))
    optimizer.step()


@pytest.mark.parametrize(("each", "optimizer"), alternating([_scheduled, _freezing, _clipping], OPTIMIZERS))
def test_what_trainers_do_between_steps(each: Callable[..., None], optimizer: str) -> None:
    model, inputs = KINDS["columns"]()
    fused = fuse(model, inputs(1, 8), "packed")
    losses = train(model, inputs, OPTIMIZERS[optimizer], each), train(fused, inputs, OPTIMIZERS[optimizer], each)
    assert_same_training(model, fused, losses, each.__name__)


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("way", ["packed", "shared"])
def test_gradients_accumulate(way: str, to_none: bool) -> None:
    """Three backward passes a step, by the model's zero_grad and by the optimizer's, to None and to zeros."""
    model, inputs = KINDS["conv_norm"]()
    fused = fuse(model, inputs(1, 8), way)
    results = []
    for each in (model, fused):
        optimizer, losses = OPTIMIZERS["sgd"](each.parameters()), []
        for step in range(STEPS // 2):
            for part in range(3):
                loss = loss_of(each(*inputs(7 * step + part, 4)), part) / 3
                loss.backward()
                losses.append(loss.item())
            optimizer.step()
            (each if step % 2 else optimizer).zero_grad(set_to_none=to_none)
            grads = [p.grad for p in each.parameters()]
            assert all(g is None for g in grads) if to_none else all(g is not None and not g.any() for g in grads)
        results.append(losses)
    assert_same_training(model, fused, (results[0], results[1]), way)


def test_training_goes_on_from_a_checkpoint_of_the_original() -> None:
    model, inputs = KINDS["conv_norm"]()
    fused = fuse(model, inputs(1, 8), "packed")
    train(model, inputs, OPTIMIZERS["adam"])
    fxfuse.load_original_state_dict(fused, model.state_dict())
    losses = train(model, inputs, OPTIMIZERS["sgd"]), train(fused, inputs, OPTIMIZERS["sgd"])
    assert_same_training(model, fused, losses, "from a checkpoint")


# -- dropout ----------------------------------------------------------------------------------------------------------------------
# Every bound below is so many standard deviations: the chance that a right implementation misses it is FALSE_ALARM per comparison, by the
# normal distribution. Seeds are fixed: a test that passes once passes always.

SIGMAS = 6.0
FALSE_ALARM = math.erfc(SIGMAS / math.sqrt(2))
LANES, WIDTH, ROWS = 6, 32, 1000


def dropping(make: Callable[[int], nn.Module], shape: tuple[int, ...]) -> tuple[nn.Module, nn.Module, Tensor]:
    """Lanes that drop ones: what they give is their mask, scaled."""
    def forward(self: Any, x: Tensor) -> Tensor:
        return torch.stack([net(x[:, i] * scale) for i, (net, scale) in enumerate(zip(self.nets, self.scales))], 1)

    scales = nn.ParameterList(nn.Parameter(torch.ones(shape[-1], dtype=torch.float64)) for _ in range(LANES))
    model = model_of(forward, nets=nn.ModuleList(make(i) for i in range(LANES)), scales=scales)
    x = torch.ones(ROWS, LANES, *shape, dtype=torch.float64)
    fused = fxfuse.optimize(model, x, objective="launches", **QUICK)
    assert fxfuse.report(fused).fused
    return model, fused, x


def test_the_bounds_hardly_ever_alarm() -> None:
    comparisons = 4 * LANES + 2 * math.comb(LANES, 2) + 10  # of one test
    assert comparisons * FALSE_ALARM < 1e-6


@pytest.mark.parametrize("p", [0.5, *(pytest.param(p, marks=pytest.mark.stress) for p in (0.1, 0.8))])
def test_every_lane_drops_at_its_rate_and_alone(p: float) -> None:
    _, fused, x = dropping(lambda i: nn.Dropout(p), (WIDTH,))
    torch.manual_seed(11)
    out = fused(x).detach()
    kept = (out != 0).double()
    assert_close(out[out != 0], torch.full_like(out[out != 0], 1 / (1 - p)), "the scale of what is kept")
    trials = ROWS * WIDTH
    masks = kept.movedim(1, 0).reshape(LANES, -1)
    for lane in range(LANES):
        off = abs(masks[lane].mean().item() - (1 - p)) / math.sqrt(p * (1 - p) / trials)
        assert off < SIGMAS, f"lane {lane} keeps {masks[lane].mean():.4f} of its values, {off:.1f} deviations off"
    for one, other in combinations(range(LANES), 2):
        assert abs(correlation(masks[one], masks[other])) * math.sqrt(trials) < SIGMAS, f"masks of lanes {one} and {other} are correlated"
    shifted = correlation(masks[0][1:], masks[0][:-1])  # neighbours in one lane, and two calls
    assert abs(shifted) * math.sqrt(trials - 1) < SIGMAS
    again = (fused(x).detach() != 0).double().movedim(1, 0).reshape(LANES, -1)
    assert abs(correlation(masks.reshape(-1), again.reshape(-1))) * math.sqrt(LANES * trials) < SIGMAS


def correlation(a: Tensor, b: Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).mean() / (a.square().mean() * b.square().mean()).sqrt())


def test_lanes_of_different_rates_keep_them() -> None:
    rates = [0.1 + 0.12 * i for i in range(LANES)]
    _, fused, x = dropping(lambda i: nn.Dropout(rates[i]), (WIDTH,))
    torch.manual_seed(3)
    kept = (fused(x) != 0).double().mean((0, 2))
    for rate, lane in zip(rates, kept.tolist()):
        assert abs(lane - (1 - rate)) / math.sqrt(rate * (1 - rate) / (ROWS * WIDTH)) < SIGMAS


def test_channels_are_dropped_whole() -> None:
    p = 0.3
    _, fused, x = dropping(lambda i: nn.Dropout1d(p), (WIDTH, 3))
    torch.manual_seed(5)
    kept = fused(x) != 0
    assert torch.equal(kept.any(-1), kept.all(-1))
    masks = kept[..., 0].double().movedim(1, 0).reshape(LANES, -1)
    for lane in masks:
        assert abs(lane.mean().item() - (1 - p)) / math.sqrt(p * (1 - p) / lane.numel()) < SIGMAS
    for one, other in combinations(masks, 2):
        assert abs(correlation(one, other)) * math.sqrt(one.numel()) < SIGMAS


def test_backward_drops_what_forward_dropped() -> None:
    _, fused, x = dropping(lambda i: nn.Dropout(0.4), (WIDTH,))
    torch.manual_seed(8)
    x = x.requires_grad_()
    out = fused(x)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(grad != 0, out != 0)


def test_outputs_of_a_network_with_dropout_have_the_mean_and_variance_of_the_loop_s() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1)

    layers = [lambda: nn.Linear(1, 8), lambda: nn.Dropout(0.25), nn.ReLU, lambda: nn.Linear(8, 4), lambda: nn.AlphaDropout(0.1)]
    nets = (nn.Sequential(*(layer() for layer in layers), nn.Linear(4, 1)) for _ in range(4))
    model = randomized(model_of(forward, nets=nn.ModuleList(nets)))
    x = torch.linspace(-2, 2, 4, dtype=torch.float64).expand(20000, 4).contiguous()
    fused = fxfuse.optimize(model, x[:5], objective="launches", **QUICK)
    assert fxfuse.report(fused).fused
    samples = []
    for seed, each in enumerate((model, fused)):
        torch.manual_seed(seed)
        samples.append(each.train()(x).detach())
    (m1, m2), (v1, v2) = ([f(each, 0) for each in samples] for f in (torch.mean, torch.var))
    n = x.shape[0]
    assert ((m1 - m2).abs() / ((v1 + v2) / n).sqrt()).max() < SIGMAS
    fourth = [(each - each.mean(0)).pow(4).mean(0) for each in samples]
    spread = ((fourth[0] - v1**2 + fourth[1] - v2**2) / n).sqrt()
    assert ((v1 - v2).abs() / spread).max() < SIGMAS
    assert torch.equal(model.eval()(x[:3]).isfinite(), torch.ones(3, 4, dtype=torch.bool))
    assert_close(fused.eval()(x[:3]), model(x[:3]), "eval mode")


def test_attention_drops_at_its_rate_in_every_lane() -> None:
    """Uniform attention over equal values: the output's mean and variance say how many of the weights were kept."""
    p, length = 0.5, 4

    def forward(self: Any, q: Tensor) -> Tensor:
        attend = nn.functional.scaled_dot_product_attention
        rate = self.p if self.training else 0.0
        return torch.stack([attend(q[:, i] * w, q[:, i], torch.ones_like(q[:, i]), dropout_p=rate) for i, w in enumerate(self.weights)], 1)

    weights = nn.ParameterList(nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(LANES))
    model = model_of(forward, weights=weights, p=p)
    q = torch.zeros(ROWS, LANES, length, 2, dtype=torch.float64)
    fused = fxfuse.optimize(model, q[:3], objective="launches", **QUICK)
    assert fxfuse.report(fused).fused
    torch.manual_seed(2)
    out = fused(q).detach()[..., 0]  # mean over `length` weights of keep / (1 - p)
    kept = (out * length * (1 - p)).round().movedim(1, 0).reshape(LANES, -1)
    deviation = math.sqrt(p * (1 - p) / (kept.shape[1] * length))
    for lane in kept:
        assert abs(lane.mean().item() / length - (1 - p)) / deviation < SIGMAS
    for one, other in combinations(kept, 2):
        assert abs(correlation(one, other)) * math.sqrt(one.numel()) < SIGMAS


def test_masks_of_one_shared_input_are_independent_too() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return torch.stack([net(x) for net in self.nets], 1)

    model = model_of(forward, nets=nn.ModuleList(nn.Sequential(nn.Dropout(0.5), mlp(8, 8, 8)) for _ in range(4))).double()
    with torch.no_grad():
        for net in model.nets:  # type: ignore[union-attr]
            for layer in (net[1][0], net[1][2]):
                layer.weight.copy_(torch.eye(8))
                layer.bias.zero_()
    x = torch.ones(4000, 8, dtype=torch.float64)
    fused = fxfuse.optimize(model, x[:3], objective="launches", **QUICK)
    torch.manual_seed(4)
    masks = (fused(x) != 0).double().movedim(1, 0).reshape(4, -1)
    for one, other in combinations(masks, 2):
        assert abs(correlation(one, other)) * math.sqrt(one.numel()) < SIGMAS
