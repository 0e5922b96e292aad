"""Models as strangers write them, each of which once came out wrong, failed inside, or stayed a loop for no good reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxfuse
from checks import QUICK, assert_fused_equals, randn, randomized, relative_error, run
from fxfuse.weights import packing


def mlp(n_in: int, n_out: int, hidden: int = 6) -> nn.Sequential:
    return nn.Sequential(nn.Linear(n_in, hidden), nn.ReLU(), nn.Linear(hidden, n_out))


class Nets(nn.Module):
    """Some networks and how to call them."""

    def __init__(self, count: int = 3, net: Callable[[], nn.Module] = lambda: nn.Linear(4, 4)) -> None:
        super().__init__()
        self.nets = nn.ModuleList(net() for _ in range(count))


# -- no_grad inside of forward ---------------------------------------------------------------------------------------------------------


class Baseline(Nets):
    """Each network once without gradients, once with."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            before = [net(x) for net in self.nets]
        after = [net(x) for net in self.nets]
        return torch.stack(after) - 0.5 * torch.stack(before)


class Decorated(Nets):
    @torch.no_grad()
    def target(self, x: Tensor) -> Tensor:
        return torch.stack([net(x).softmax(-1) for net in self.nets])

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([net(x) for net in self.nets]) * self.target(x)


class MixedTracking(Nets):
    """One of the lanes is also called without gradients: that does not keep it out."""

    def forward(self, x: Tensor) -> list[Tensor]:
        with torch.no_grad():
            first, views = self.nets[0](x), x.view(-1, 2, 2).flatten(1)
        return [net(x) * first + views for net in self.nets]


class Switched(Nets):
    """The switch as an object, in one mode only, and once more inside of itself."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.training), torch.no_grad():
            off = [net(x).tanh().chunk(2, -1)[0].repeat(1, 2) for net in self.nets]
        return torch.stack([a * net(x + 1) for a, net in zip(off, self.nets, strict=True)])


@pytest.mark.parametrize(("make", "heavy"), [(Baseline, 1), (Decorated, 1), (MixedTracking, 1), (Switched, 2)])
def test_no_grad_is_a_detach(make: type[Nets], heavy: int | None) -> None:
    assert_fused_equals(randomized(make()), randn(5, 4), heavy=heavy)


class Critics(nn.Module):
    """TD3: the target networks are called under ``no_grad``."""

    def __init__(self) -> None:
        super().__init__()
        self.online = nn.ModuleList(mlp(4, 1) for _ in range(2))
        self.target = nn.ModuleList(mlp(4, 1) for _ in range(2))

    def forward(self, x: Tensor, later: Tensor) -> tuple[Tensor, list[Tensor]]:
        with torch.no_grad():
            bound = 1 + 0.9 * torch.min(self.target[0](later), self.target[1](later))
        values = [critic(x) for critic in self.online]
        return sum(F.mse_loss(value, bound) for value in values), values


def test_a_target_network_is_not_packed_with_the_one_that_trains() -> None:
    fused = assert_fused_equals(randomized(Critics()), (randn(5, 4), randn(5, 4, seed=2)), heavy=4)
    fused.zero_grad(set_to_none=True)
    fused(randn(5, 4), randn(5, 4, seed=2))[0].backward()
    trained = [name for name, parameter in fused.named_parameters() if parameter.grad is not None]
    assert len(trained) == 4, "a layer's weight and bias of both online networks, and nothing of the others"
    assert len(list(fused.parameters())) == 8


def double(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out * 2


class Hooked(nn.Module):
    """What stays a call is made under the caller's ``no_grad`` too."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.ModuleList(nn.Linear(4, 3) for _ in range(2))
        self.nets = nn.ModuleList(nn.Linear(4, 3) for _ in range(3))
        for gate in self.gates:
            gate.register_forward_hook(double)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            gates = [gate(x) for gate in self.gates]
        return torch.stack(gates).sum(0) * torch.stack([net(x) for net in self.nets])


def test_a_hooked_call_under_no_grad_stays_without_gradient() -> None:
    assert_fused_equals(randomized(Hooked()), randn(5, 4), refused="has hooks")


class Rounded(torch.autograd.Function):
    """Straight through, with a ``no_grad`` of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, net: nn.Module) -> Tensor:
        with torch.no_grad():
            return net(x).sign()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * 2, None


class Quantized(Nets):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = sum(net(x) for net in self.nets)
        return torch.stack([Rounded.apply(x, net) for net in self.nets]) * scale


def test_no_grad_inside_a_function_of_ones_own_stays_the_functions() -> None:
    model, x = randomized(Quantized()), randn(5, 4)
    fused = fxfuse.optimize(model, x, objective="launches", **QUICK)
    assert not any("fxfuse failed" in str(refusal) for refusal in fxfuse.report(fused).refused)
    want = run(model, x, {}, packing.original_gradients)
    got = run(fused, x, {}, packing.original_gradients)
    assert relative_error(got.outputs[0], want.outputs[0]) < 1e-12
    assert relative_error(got.inputs[0], want.inputs[0]) < 1e-12


class HalfAutocast(Nets):
    """A hooked call under a caller's autocast, which a graph does not repeat."""

    def __init__(self) -> None:
        super().__init__()
        self.nets[0].register_forward_hook(double)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = [net(x) for net in self.nets]
        return torch.stack(low).float() + torch.stack([net(x) for net in self.nets])


def test_a_call_under_autocast_stays_there() -> None:
    torch.manual_seed(0)
    model, x = HalfAutocast(), torch.randn(5, 4)
    fused = fxfuse.optimize(model, x, objective="launches", **QUICK)
    assert torch.equal(fused(x), model(x))
    assert any("switches autocast" in str(refusal) for refusal in fxfuse.report(fused).refused)


# -- writes ----------------------------------------------------------------------------------------------------------------------------


class Overlapping(Nets):
    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros(x.size(0), 8, dtype=x.dtype)
        for i, net in enumerate(self.nets):
            out[:, 2 * i:2 * i + 4] += net(x)
        return out


class OverlappingSet(Nets):
    def forward(self, x: Tensor) -> Tensor:
        out = x.new_zeros(x.size(0), 8)
        for i, net in enumerate(self.nets):
            out[:, 2 * i:2 * i + 4] = net(x)
        return out


class ReadBetween(Nets):
    """The buffer as it was between two writes is read later: those writes need copies."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out, seen = torch.zeros(x.size(0), 8, dtype=x.dtype), []
        for i, net in enumerate(self.nets):
            out[:, 2 * i:2 * i + 4] += net(x)
            seen.append((out + 1).exp())
        return out, torch.stack(seen)


@pytest.mark.parametrize("make", [Overlapping, OverlappingSet, ReadBetween])
def test_writes_that_overlap_do_not_cost_launches(make: type[Nets]) -> None:
    fused = assert_fused_equals(randomized(make()), randn(5, 4), heavy=1)
    before, after = fxfuse.report(fused).launches
    assert after < before


# -- weights -----------------------------------------------------------------------------------------------------------------------------


class Normed(nn.Module):
    """Temporal convolutions with weight norm, as TCNs have them; or norms over another dim, or over all."""

    def __init__(self, dim: int | None) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm
        self.branches = nn.ModuleList(
            nn.Sequential(norm(nn.Conv1d(1, 4, 3), dim=dim), nn.ReLU(), norm(nn.Conv1d(4, 2, 1))) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(F.pad(x[:, i, None], (2, 0))) for i, branch in enumerate(self.branches)], 1)


@pytest.mark.parametrize("dim", [0, 1, 2, -2, None])
def test_weight_norm(dim: int | None) -> None:
    assert_fused_equals(randomized(Normed(dim)), randn(3, 4, 9), heavy=2)


# -- models that can only be run forward -------------------------------------------------------------------------------------------------


class InferenceOnly(Nets):
    """Writes over what autograd has saved: a backward raises."""

    def forward(self, x: Tensor) -> Tensor:
        outs = []
        for net in self.nets:
            hidden = net(x)
            hidden.relu_()
            hidden += 1
            outs.append(hidden)
        return torch.cat(outs, 1)


@pytest.mark.parametrize("objective", ["launches", "time"])
def test_a_model_whose_backward_raises(objective: Any) -> None:
    model, x = randomized(InferenceOnly()), randn(5, 4)
    with pytest.raises(RuntimeError, match="inplace"):
        model(x).sum().backward()
    fused = fxfuse.optimize(model, x, objective=objective, mode="train")
    report = fxfuse.report(fused)
    assert not any("fxfuse failed" in str(refusal) for refusal in report.refused)
    assert report.fused or objective == "time"
    with torch.no_grad():
        assert relative_error(fused(x), model(x)) < 1e-12


# -- losses of all lanes on one target ---------------------------------------------------------------------------------------------------


class DeepSupervision(Nets):
    """Every head's loss on the same target, as each kind of loss wants it."""

    def __init__(self, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, x: Tensor) -> Tensor:
        target = x.sigmoid()
        return torch.stack([self.loss(torch.sigmoid(net(x)), target) for net in self.nets]).sum()


@pytest.mark.parametrize(
    "loss", [F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.binary_cross_entropy, F.binary_cross_entropy_with_logits, F.kl_div],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:reduction")
def test_one_target_for_all_heads(loss: Callable[..., Tensor]) -> None:
    assert_fused_equals(randomized(DeepSupervision(loss)), randn(5, 4), heavy=1, **QUICK)


class LeavesTrackingOff(Nets):
    def forward(self, x: Tensor) -> Tensor:
        torch.set_grad_enabled(False)
        return torch.stack([net(x) for net in self.nets])


def test_a_forward_that_leaves_tracking_off_still_does() -> None:
    model, x = randomized(LeavesTrackingOff()), randn(5, 4)
    fused = fxfuse.optimize(model, x, objective="launches", **QUICK)
    assert any("gradient tracking" in str(refusal) for refusal in fxfuse.report(fused).refused)
    try:
        fused(x)
        assert not torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(True)
