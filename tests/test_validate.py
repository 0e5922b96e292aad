"""Validation: wrong models are caught, each mistake on its own; right ones pass, whatever their rounding."""

import copy
import json
import math
import random
import re
import threading
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxfuse
from fxfuse.checking.difference import Spread, distance, distances
from fxfuse.checking.validate import validate, verify
from fxfuse.errors import ArgumentError, ValidationError

LANES = 4


class Loop(nn.Module):
    """The loop that a user writes: one small network per column, with BatchNorm and dropout inside."""

    def __init__(self, lanes=LANES, hidden=8):
        super().__init__()
        self.nets = nn.ModuleList(
            nn.Sequential(nn.Linear(1, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(0.25), nn.Linear(hidden, 1))
            for _ in range(lanes)
        )

    def forward(self, x):
        return torch.stack([net(x[:, i : i + 1])[:, 0] for i, net in enumerate(self.nets)], 1)


class Packed(Loop):
    """The same by hand: batched matmuls over stacked weights, and one BatchNorm over all channels."""

    dropout = 0.25

    def weights(self, layer, name):
        return torch.stack([getattr(net[layer], name) for net in self.nets])

    def join(self, out):
        return out[..., 0].t().contiguous()

    def normalize(self, h):  # h: [lanes, batch, hidden]
        norms = [net[1] for net in self.nets]
        mean = torch.cat([norm.running_mean for norm in norms])
        var = torch.cat([norm.running_var for norm in norms])
        flat = h.transpose(0, 1).flatten(1)
        out = F.batch_norm(flat, mean, var, self.weights(1, "weight").flatten(), self.weights(1, "bias").flatten(), self.training)
        if self.training:
            self.write_back(norms, mean, var)
        return out.view(h.shape[1], h.shape[0], -1).transpose(0, 1)

    def write_back(self, norms, mean, var):
        for norm, m, v in zip(norms, mean.chunk(len(norms)), var.chunk(len(norms))):
            norm.running_mean.copy_(m)
            norm.running_var.copy_(v)
            norm.num_batches_tracked += 1

    def first(self, x):
        return torch.baddbmm(self.weights(0, "bias").unsqueeze(1), x.t().unsqueeze(-1), self.weights(0, "weight").transpose(1, 2))

    def last(self, h):
        return torch.baddbmm(self.weights(4, "bias").unsqueeze(1), h, self.weights(4, "weight").transpose(1, 2))

    def forward(self, x):
        h = self.normalize(self.first(x)).relu()
        return self.join(self.last(F.dropout(h, self.dropout, self.training)))


@pytest.fixture
def original():
    torch.manual_seed(0)
    return randomized(Loop())


def randomized(model):
    """Every lane its own weights and statistics, so that no mistake can hide behind equal ones."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape))
        for b in model.buffers():
            if b.is_floating_point():
                b.copy_(torch.rand(b.shape) + 0.5)
    return model


def like(original, kind, *args):
    fused = kind(*args)
    fused.load_state_dict(original.state_dict())
    return fused


def data(rows=12, columns=LANES):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))


def failed(result, *, kind=None, mode=None):
    """The names of the tensors that differ."""
    return {d.name for d in result.differences if not d.ok and (kind is None or d.kind == kind) and (mode is None or d.mode == mode)}


# -- what is right passes ---------------------------------------------------------------------------------------------


def test_a_true_rewrite_passes(original):
    result = verify(original, like(original, Packed), data())
    assert result.ok, str(result)
    assert result.proved
    assert not result.fallbacks
    exact = [d for d in result.differences if d.dtype == "float64"]
    assert {d.kind for d in exact} == {"output", "input gradient", "parameter gradient", "buffer"}
    assert {d.mode for d in exact} == {"train", "eval", "eval without grad"}
    assert {d.name for d in exact if d.kind == "parameter gradient"} == set(dict(original.named_parameters()))
    # The gradient of a bias in front of a BatchNorm is zero up to rounding: judged by what rounding does to it.
    clear = [d for d in exact if d.name.split(".")[-2:] != ["0", "bias"] and d.max_abs > 1e-14]
    assert max((d.max_rel for d in clear), default=0.0) < 1e-12


def test_a_model_equals_itself_bit_for_bit(original):
    result = verify(original, original, data())
    assert result.ok
    assert all(d.max_abs == 0 for d in result.differences)


def test_other_batch_sizes_are_tried(original):
    result = verify(original.eval(), like(original, Packed), data(rows=3))
    assert [text.split("]")[0] for text in result.examples] == ["[3, 4", "[3, 4", "[1, 4", "[4, 4", "[7, 4"]
    # BatchNorm refuses one row in train mode, in both models alike.
    assert {d.example for d in result.differences if d.mode == "train"} == {0, 1, 3, 4}
    assert {d.example for d in result.differences if d.mode == "eval"} == {0, 1}
    assert {d.example for d in result.differences if d.mode == "eval without grad"} == {0, 2, 3, 4}
    only = verify(original, like(original, Packed), data(rows=3), other_batches=False)
    assert len(only.examples) == 1


# -- each mistake is caught -------------------------------------------------------------------------------------------


class SwappedLanes(Packed):
    def join(self, out):
        return super().join(out[[1, 0, *range(2, len(out))]])


def test_swapped_lanes(original):
    result = verify(original, like(original, SwappedLanes), data())
    assert not result.ok
    assert "output" in failed(result, mode="eval")


class Norms(nn.Module):
    """Norms as they are made: ones, zeros, no batch seen. ``eval_order``: whose statistics and frozen scale a lane reads in eval mode."""

    def __init__(self, eval_order=(0, 1, 2)):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm1d(2) for _ in range(3))
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(2), requires_grad=False) for _ in range(3))
        self.eval_order = eval_order

    def forward(self, x):
        found = []
        for i, norm in enumerate(self.norms):
            if self.training:
                found.append(norm(x[:, i]))
                continue
            other = self.eval_order[i]
            y = F.batch_norm(x[:, i], self.norms[other].running_mean, self.norms[other].running_var, norm.weight, norm.bias)
            found.append(y * self.scales[other])
        return torch.stack(found, 1)


def test_lanes_of_new_norms_that_are_swapped():
    x = torch.randn(6, 3, 2)
    assert verify(Norms(), Norms(), x).ok
    swapped = verify(Norms(), Norms((1, 0, 2)), x)
    assert not swapped.ok
    assert swapped.worst.mode.startswith("eval")
    assert not verify(Norms(), Norms((1, 0, 2)), x, other_batches=False).ok


def test_weights_that_cannot_be_loaded_stay_as_they_are():
    class Own(nn.Linear):
        def _load_from_state_dict(self, *args):
            raise NotImplementedError("not like this")

    model, x = Own(2, 3), torch.randn(4, 2)
    result = verify(model, copy.deepcopy(model), x)
    assert result.ok
    assert any("compared with the weights as they are only" in note for note in result.notes)
    model = model.double()
    other = copy.deepcopy(model)
    other.bias.data += 1e-9
    assert not verify(model, other, x.double()).ok


class LostBias(Packed):
    def last(self, h):
        return h @ self.weights(4, "weight").transpose(1, 2)


def test_a_lost_bias(original):
    result = verify(original, like(original, LostBias), data())
    assert "output" in failed(result)
    assert {f"nets.{i}.4.bias" for i in range(LANES)} <= failed(result, kind="parameter gradient")


class LostGradient(Packed):
    def weights(self, layer, name):
        parts = list(super().weights(layer, name))
        if (layer, name) == (4, "weight"):
            parts[2] = parts[2].detach()
        return torch.stack(parts)


def test_a_gradient_that_reaches_all_lanes_but_one(original):
    result = verify(original, like(original, LostGradient), data())
    assert failed(result) == {"nets.2.4.weight"}
    assert result.worst.kind == "parameter gradient"
    assert "nothing" not in result.worst.note
    assert verify(original, like(original, LostGradient), data(), gradients=False).ok, "outputs alone do not show it"


class WrongBuffer(Packed):
    def write_back(self, norms, mean, var):
        super().write_back(norms, mean.roll(1), var)


def test_a_buffer_written_to_the_wrong_place(original):
    result = verify(original, like(original, WrongBuffer), data())
    assert failed(result) == {f"nets.{i}.1.running_mean" for i in range(LANES)}
    assert failed(result, mode="eval") == set()


class LostCounter(Packed):
    def write_back(self, norms, mean, var):
        super().write_back(norms, mean, var)
        norms[3].num_batches_tracked -= 1


def test_an_integer_buffer(original):
    result = verify(original, like(original, LostCounter), data())
    assert failed(result) == {"nets.3.1.num_batches_tracked"}


class ScaledInEval(Packed):
    def join(self, out):
        return super().join(out if self.training else out * (1 + 1e-8))


def test_a_scale_in_eval_mode_only_and_below_float32(original):
    result = verify(original, like(original, ScaledInEval), data())
    assert not failed(result, mode="train")
    assert "output" in failed(result, mode="eval")
    assert {d.dtype for d in result.differences if not d.ok} == {"float64"}, "in float32 it would pass as rounding"


class DetachedInput(Packed):
    def forward(self, x):
        return super().forward(x.detach())


def test_a_detached_input(original):
    result = verify(original, like(original, DetachedInput), data())
    assert failed(result) == {"input[0]"}
    assert result.worst.kind == "input gradient"


class OtherDropout(Packed):
    dropout = 0.3


def test_another_dropout_probability(original):
    result = verify(original, like(original, OtherDropout), data())
    assert "output" in failed(result, mode="train")
    assert not failed(result, mode="eval")


class OtherStrides(Packed):
    def join(self, out):
        return out[..., 0].t()


def test_strides_that_a_caller_can_see(original):
    result = verify(original, like(original, OtherStrides), data())
    assert failed(result) == {"output"}
    assert re.search(r"strides \(1, \d+\), the original has \(4, 1\)", result.reason)


class NeedsNoGrad(Packed):
    def forward(self, x):
        return super().forward(x).detach()


def test_requires_grad_of_an_output(original):
    result = verify(original, like(original, NeedsNoGrad), data())
    assert "requires_grad is False, in the original True" in {d.note for d in result.differences}


class OneShape(Packed):
    def forward(self, x):
        return super().forward(x) if len(x) == 12 else super().forward(x) * 2


def test_right_at_the_example_wrong_at_other_batch_sizes(original):
    fused = like(original, OneShape)
    assert verify(original, fused, data(), other_batches=False).ok
    result = verify(original, fused, data())
    assert {d.example for d in result.differences if not d.ok} == {2, 3, 4}


class WritesInput(Packed):
    def forward(self, x):
        out = super().forward(x)
        with torch.no_grad():
            x += 1
        return out


def test_an_input_that_is_written(original):
    result = verify(original, like(original, WritesInput), data())
    assert "input[0] after the call" in failed(result, mode="eval without grad")


class Dtype(Packed):
    def forward(self, x):
        return super().forward(x).float()


def test_another_dtype(original):
    result = verify(original, like(original, Dtype), data())
    assert "float32 on cpu, the original has float64 on cpu" in {d.note for d in result.differences}


class Raises(Packed):
    def forward(self, x):
        if len(x) == 1:
            raise IndexError("no such row")
        return super().forward(x)


def test_only_one_of_them_raises(original):
    fused = like(original, Raises)
    result = verify(original.eval(), fused, data())
    assert not result.ok
    assert "the fused model raises IndexError: no such row, the original answers" in result.reason
    result = verify(fused, original, data(), modes=["eval"])
    assert "the original raises IndexError: no such row, the fused model answers" in result.reason.replace("  ", " ")


# -- small models for one thing each ----------------------------------------------------------------------------------


class Fn(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, *args, **kwargs):
        return self.fn(*args, **kwargs)


def same(f, g, x, **options):
    return verify(Fn(f), Fn(g), x, **options)


@dataclass
class Result:
    loss: torch.Tensor
    parts: list


class Plain:
    def __init__(self, value):
        self.value = value


@pytest.mark.parametrize(
    ("f", "g", "name"),
    [
        (lambda x: (x, None), lambda x: (x, x), "output[1]"),
        (lambda x: (x, 3), lambda x: (x, 4), "output[1]"),
        (lambda x: (x, 3), lambda x: (x, 3.0), "output[1]"),
        (lambda x: (x, 0.5), lambda x: (x, 0.25), "output[1]"),
        (lambda x: (x, "a"), lambda x: (x, "b"), "output[1]"),
        (lambda x: (x, x), lambda x: [x, x], "output (length)"),
        (lambda x: (x,), lambda x: (x, x), "output[1]"),
        (lambda x: {"a": x, "b": x * 2}, lambda x: {"a": x, "b": x * 3}, "output['b']"),
        (lambda x: {"a": x, "b": x}, lambda x: {"b": x, "a": x}, "output (keys)"),
        (lambda x: Result(x.sum(), [x]), lambda x: Result(x.sum(), [x * 2]), "output.parts[0]"),
        (lambda x: Plain(x), lambda x: Plain(x + 1), "output.value"),
        (lambda x: x.argmax(1), lambda x: x.argmin(1), "output"),
        (lambda x: x > 0, lambda x: x >= 10, "output"),
        (lambda x: x, lambda x: x[:1], "output"),
        (lambda x: x.sum(), lambda x: x.sum()[None], "output"),
        (lambda x: torch.complex(x, x), lambda x: torch.complex(x, -x), "output"),
    ],
)
def test_every_kind_of_output(f, g, name):
    assert same(f, f, data()).ok
    result = same(f, g, data())
    assert not result.ok
    assert name in failed(result)


def test_nan_and_inf():
    def zero_over_zero(x):
        return x.where(x > 0, torch.nan)

    x = data()
    assert same(zero_over_zero, zero_over_zero, x, gradients=False).ok
    result = same(zero_over_zero, lambda x: x.where(x > 0, 0.0), x, gradients=False)
    assert "NaN or inf" in result.reason
    assert same(lambda x: x / 0, lambda x: x / 0, x, gradients=False).ok
    assert not same(lambda x: x / 0, lambda x: -x / 0, x, gradients=False).ok
    json.dumps(result.to_dict(), allow_nan=False)


def test_no_gradient_and_a_gradient_of_zeros():
    class One(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.used, self.unused, self.scale = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3)), scale

        def forward(self, x):
            return x[:, :3] * self.used + (0 if self.scale is None else self.scale * (self.unused - self.unused.detach()))

    assert verify(One(None), One(0.0), data()).ok
    assert verify(One(0.0), One(None), data()).ok
    assert failed(verify(One(None), One(1e-12), data())) == {"unused"}


def test_a_gradient_of_pure_rounding_passes():
    class Bias(nn.Module):
        """The mean is taken away again: the bias has no influence, its gradient is rounding."""

        def __init__(self, order):
            super().__init__()
            self.bias, self.order = nn.Parameter(torch.randn(4, generator=torch.Generator().manual_seed(0))), order

        def forward(self, x):
            h = (x if self.order else x.flip(0)) + self.bias
            h = h - h.mean(0, keepdim=True)
            return h if self.order else h.flip(0)

    result = verify(Bias(True), Bias(False), data())
    assert result.ok, str(result)
    assert max(d.max_rel for d in result.differences if d.name == "bias" and d.dtype == "float64") > 1e-6
    assert max(d.max_abs for d in result.differences if d.name == "bias" and d.dtype == "float64") < 1e-13


class Signs(nn.Module):
    """A lane's one element over its own size: the gradient of all in front of it is zero but for rounding. ``small`` is a way around."""

    def __init__(self, form, spoil=lambda h, i: h, small=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.nets = nn.ModuleList(nn.Linear(4, 1) for _ in range(3))
        self.form, self.spoil, self.small = form, spoil, small

    def forward(self, x):
        each = [self.spoil(net(x), i) for i, net in enumerate(self.nets)]
        return torch.stack([self.form(h) + self.small * h for h in each], 1)


def centred(h):
    return (h - h.mean(-1, keepdim=True)) * 1000 / 3 + h.sign()


OVER_ONE = {
    "divided": lambda h: F.normalize(h, dim=-1),
    "by the absolute value": lambda h: h / h.abs(),
    "layer norm": lambda h: F.layer_norm(h, (1,)) + h.sign(),
    "centred": centred,
    "exactly zero": lambda h: h.detach().sign() + 0.0 * h,
}


@pytest.mark.parametrize("fused", OVER_ONE)
@pytest.mark.parametrize("original", OVER_ONE)
def test_zero_but_for_either_s_rounding_passes(original, fused):
    """Exact zeros do not move with the last bits, and rounding of few outcomes does not always."""
    for rows in (1, 2):
        result = verify(Signs(OVER_ONE[original]), Signs(OVER_ONE[fused]), data(rows))
        assert result.ok, str(result)
        assert result.proved


class Wrong(torch.autograd.Function):
    """Its forward changes nothing, its backward is off by ``add`` and by a factor."""

    @staticmethod
    def forward(ctx, h, add, factor):
        ctx.by = add, factor
        return h.view_as(h)

    @staticmethod
    def backward(ctx, grad):
        add, factor = ctx.by
        return grad * factor + add, None, None


@pytest.mark.parametrize(("add", "factor", "small"), [
    (1e-3, 1, 0), (1e-9, 1, 0), (1e-12, 1, 0), (0, 1 + 1e-8, 1), (0, 1 + 1e-6, 1e-6), (0, 1.01, 1e-9), (0, 0, 1e-11),
])  # fmt: skip
@pytest.mark.parametrize("original", ["divided", "centred", "exactly zero"])
def test_a_wrong_gradient_is_found_where_the_others_are_rounding(original, add, factor, small):
    form = OVER_ONE[original]

    def spoil(h, i):
        return Wrong.apply(h, add, factor) if i == 1 else h

    for rows in (1, 5):
        result = verify(Signs(form, small=small), Signs(form, spoil, small), data(rows))
        assert {"nets.1.weight", "nets.1.bias"} <= failed(result, kind="parameter gradient"), str(result)


@pytest.mark.parametrize("small", [1.0, 1e-6, 1e-9])
def test_gradients_of_swapped_lanes_are_found_where_the_others_are_rounding(small):
    """Forward is right; backward hands lane 0 what is lane 1's."""

    class Swapped(Signs):
        def forward(self, x):
            a, b, c = (net(x) for net in self.nets)
            outs = [self.form(h) + self.small * (h.detach() + other - other.detach()) for h, other in ((a, b), (b, a), (c, c))]
            return torch.stack(outs, 1)

    form = OVER_ONE["divided"]
    result = verify(Signs(form, small=small), Swapped(form, small=small), data())
    assert {"nets.0.weight", "nets.1.weight"} <= failed(result, kind="parameter gradient"), str(result)


class OneElement(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.first, self.norm = nn.Linear(4, 1), nn.LayerNorm(1) if norm == "layer norm" else None

    def forward(self, x):
        h = self.first(x)
        return F.normalize(h, dim=-1) if self.norm is None else self.norm(h)


@pytest.mark.parametrize("norm", ["normalize", "layer norm"])
def test_lanes_that_normalize_one_element_fuse(norm):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.nets = nn.ModuleList(OneElement(norm) for _ in range(5))

        def forward(self, x):
            return torch.stack([net(x) for net in self.nets])

    for seed, rows in enumerate((1, 3, 5)):
        torch.manual_seed(seed)
        model, x = randomized(Model()).double(), torch.randn(rows, 4, dtype=torch.float64)
        report = fxfuse.report(fxfuse.optimize(model, x, objective="launches", tune=False))
        assert report.fused
        assert not report.refused, str(report)


def test_a_small_true_gradient_is_not_taken_for_rounding():
    class Two(nn.Module):
        def __init__(self, wrong):
            super().__init__()
            self.small, self.large, self.wrong = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4)), wrong

        def forward(self, x):
            return x * self.large + 1e-9 * x * self.small * (1.01 if self.wrong else 1.0)

    assert verify(Two(False), Two(False), data()).ok
    assert "small" in failed(verify(Two(False), Two(True), data()), kind="parameter gradient")


def test_elements_on_an_edge_may_jump_in_float32_only():
    """Rounding puts one element on the other side of a step: allowed in float32 where float64 shows that the maps are equal."""
    x = torch.cat([data(400, 8), torch.full((1, 8), 1 / 3)])

    def f(x):
        return x + ((x * 3).sum(1, keepdim=True) > 8.0 - 1e-9).to(x.dtype) * 1e-3

    def g(x):
        return x + ((x.sum(1, keepdim=True) * 3) > 8.0 - 1e-9).to(x.dtype) * 1e-3

    result = same(f, g, x, other_batches=False)
    assert result.ok, str(result)


def test_mixed_flags_are_compared_as_they_are(original):
    class FrozenAlike(Packed):
        def forward(self, x):
            return Loop.forward(self, x)

    class FrozenForgotten(Packed):
        pass

    original.train()
    original.nets[1].eval()
    right, wrong = like(original, FrozenAlike), like(original, FrozenForgotten)
    for fused in (right, wrong):
        fused.nets[1].eval()
    assert verify(original, right, data()).ok
    result = verify(original, wrong, data())
    assert failed(result, mode="given")
    assert not failed(result, mode="train")


class FixedDtype(nn.Module):
    """Computes in float32 inside, whatever comes in."""

    def __init__(self, packed, scale=1.0):
        super().__init__()
        self.weight, self.packed, self.scale = nn.Parameter(torch.randn(3, 4, 4)), packed, scale

    def forward(self, x):
        h, w = x.float(), self.weight.float()
        out = (h @ w).sum(0) if self.packed else h @ w[0] + h @ w[1] + h @ w[2]
        return out.to(x.dtype) * self.scale


def test_a_fixed_dtype_inside_is_measured_by_its_own_rounding():
    torch.manual_seed(0)
    loop, packed, wrong = FixedDtype(False), FixedDtype(True), FixedDtype(True, 1 + 1e-3)
    for model in (packed, wrong):
        model.load_state_dict(loop.state_dict())
    result = verify(loop, packed, data())
    assert result.ok, str(result)
    assert max(d.max_rel for d in result.differences if d.dtype == "float64") > 1e-10
    assert not verify(loop, wrong, data()).ok


class Constant(nn.Module):
    """A tensor that is no buffer keeps float32: the float64 copy cannot run."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.constant, self.weight = torch.eye(4) * factor, nn.Parameter(torch.ones(4))

    def forward(self, x):
        return x @ self.constant * self.weight


def test_a_model_that_cannot_run_in_float64_is_compared_in_its_own_dtype():
    result = verify(Constant(), Constant(), data())
    assert result.ok
    assert not result.proved
    assert {d.dtype for d in result.differences} == {"float32"}
    assert any("float64 left out" in note for note in result.notes)
    assert not verify(Constant(), Constant(1.001), data()).ok


class Locked(nn.Module):
    def __init__(self, factor=1.0):
        super().__init__()
        self.weight, self.lock, self.factor = nn.Parameter(torch.ones(4)), threading.Lock(), factor

    def forward(self, x):
        return x * self.weight * self.factor


def test_a_model_that_cannot_be_copied():
    model, other = Locked(), Locked(2.0)
    model.weight.grad = kept = torch.full((4,), 7.0)
    result = verify(model, Locked(), data())
    assert result.ok
    assert any("cannot be copied" in note for note in result.notes)
    assert model.weight.grad is kept
    assert torch.equal(kept, torch.full((4,), 7.0))
    assert not verify(model, other, data()).ok


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(original, dtype):
    loop, packed = original.to(dtype), like(original, Packed).to(dtype)
    result = verify(loop, packed, data().to(dtype), gradients=False)
    assert result.ok, str(result)
    assert {d.dtype for d in result.differences} == {"float64", str(dtype).removeprefix("torch.")}


def test_a_float64_model_is_run_once(original):
    result = verify(original.double(), like(original, Packed).double(), data().double())
    assert result.ok
    assert {d.dtype for d in result.differences} == {"float64"}


def test_integer_inputs():
    class Tables(nn.Module):
        def __init__(self, packed, shift=0):
            super().__init__()
            self.tables, self.packed, self.shift = nn.ModuleList(nn.Embedding(5, 2) for _ in range(3)), packed, shift

        def forward(self, i):
            if not self.packed:
                return torch.cat([table(i[:, k]) for k, table in enumerate(self.tables)], 1)
            offsets = torch.arange(3) * 5 + self.shift
            return F.embedding(i + offsets, torch.cat([t.weight for t in self.tables])).flatten(1)

    i = torch.randint(4, (6, 3), generator=torch.Generator().manual_seed(0))
    loop, packed, wrong = Tables(False), Tables(True), Tables(True, 1)
    for model in (packed, wrong):
        model.load_state_dict(loop.state_dict())
    assert verify(loop, packed, i).proved
    assert not verify(loop, wrong, i).ok


def test_keyword_inputs_and_names():
    def f(x, *, scale):
        return x * scale["by"]

    result = verify(Fn(f), Fn(f), data(), example_kwargs={"scale": {"by": torch.rand(4)}})
    assert result.ok
    assert {d.name for d in result.differences if d.kind == "input gradient"} == {"input[0]", "input['scale']['by']"}


# -- both models stay as they are -------------------------------------------------------------------------------------


def test_nothing_is_left_behind(original):
    fused = like(original, Packed)
    original.nets[0].eval()
    for p in original.parameters():
        p.grad = torch.ones_like(p)
    before = [(copy.deepcopy(m.state_dict()), [s.training for s in m.modules()]) for m in (original, fused)]
    x = data().requires_grad_()
    torch.manual_seed(5)
    random.seed(5)
    expected = (torch.rand(1), random.random())
    torch.manual_seed(5)
    random.seed(5)
    with torch.no_grad():
        verify(original, fused, x)
        assert not torch.is_grad_enabled()
    assert (torch.rand(1), random.random()) == expected
    for model, (state, flags) in zip((original, fused), before):
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values()))
        assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in original.parameters())
    assert all(p.grad is None for p in fused.parameters())
    assert x.grad is None
    assert torch.equal(x, data())


def test_inside_of_inference_mode(original):
    with torch.inference_mode():
        result = verify(original, like(original, Packed), data())
    assert result.ok
    assert any(d.kind == "parameter gradient" for d in result.differences)


# -- fallbacks --------------------------------------------------------------------------------------------------------


class State:
    def __init__(self, region):
        from collections import Counter

        from fxfuse.graph import RegionPlan

        self.region, self.plan, self.fallbacks = region, RegionPlan("", [], {}), Counter()


def test_answers_through_the_original_are_recorded(original, monkeypatch):
    """A fused model that answers with its loop is equal to the loop; that proves nothing of the rewrite."""
    from fxfuse.checking import runs

    class FallsBack(Packed):
        def forward(self, x):
            self.__dict__["state"].fallbacks["batch size 12 was recorded"] += 1
            return Loop.forward(self, x)

    fused = like(original, FallsBack)
    fused.__dict__["state"] = State(fused)
    monkeypatch.setattr(runs, "regions", lambda model: {"": model.__dict__["state"]} if "state" in model.__dict__ else {})
    result = verify(original, fused, data())
    assert result.ok
    assert not result.proved
    assert set(result.fallbacks) == {"FallsBack: batch size 12 was recorded"}
    assert result.calls[""] == result.missed[""] > 0
    assert "answered by the original's forward" in str(result)
    assert "not every mode could be checked" in str(result)


# -- the result -------------------------------------------------------------------------------------------------------


def test_the_error_names_the_worst_tensor(original):
    with pytest.raises(ValidationError, match=r"parameter gradient nets\.2\.4\.weight \(train, example \d, float64\)"):
        verify(original, like(original, LostGradient), data(), raises=True)
    verify(original, original, data(), raises=True)


def test_rounding_shows_both_models_against_float64(original):
    result = verify(original, like(original, Packed), data())
    rows = {row.kind: row for row in result.rounding}
    assert set(rows) == {"output", "input gradient", "parameter gradient", "buffer"}
    row = rows["output"]
    assert row.dtype == "float32"
    assert 0 < row.original.max < 1e-3
    assert 0 < row.fused.max < 1e-3
    assert row.between.count == sum(n for _, n in row.between.histogram) == row.fused.count
    assert row.between.mean <= row.between.max


def test_the_result_is_json(original):
    result = verify(original, like(original, LostBias), data())
    short = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    full = json.loads(json.dumps(result.to_dict(full=True), allow_nan=False))
    assert short["ok"] is False
    assert short["worst"]["ok"] is False
    assert short["compared"] == len(full["differences"]) == len(result.differences)
    assert len(short["differences"]) < len(full["differences"])
    assert {d["name"] for d in short["differences"] if not d["ok"]} == failed(result)


def test_a_model_that_never_runs():
    def broken(x):
        raise ValueError("no")

    result = same(broken, broken, data())
    assert not result.ok
    assert result.reason.startswith("nothing could be compared")
    assert "both models raise ValueError: no" in result.reason


def test_no_examples_is_not_equality(original):
    assert not validate(original, original, []).ok


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: verify(len, m, data()), "original must be a torch.nn.Module, builtin_function_or_method came"),
        (lambda m: verify(m, None, data()), "fused must be a torch.nn.Module, NoneType came"),
        (lambda m: verify(m, m, [data()]), "example_inputs must be a tensor or a tuple of arguments, list came"),
        (lambda m: verify(m, m, data(), example_kwargs=3), "example_kwargs must be a dict, int came"),
        (lambda m: verify(m, m, data(), modes=["test"]), r"modes must be some of .*; \['test'\] came"),
        (lambda m: verify(m, m, data(), modes=[]), r"\[\] came"),
        (lambda m: verify(m, m, data(), rtol=float("nan")), "nan came"),
        (lambda m: validate(m, m, [], float64=False, own_dtype=False), "one of float64 and own_dtype must be on"),
    ],
)
def test_wrong_arguments(original, call, message):
    with pytest.raises(ArgumentError, match=message):
        call(original)


# -- the arithmetic ---------------------------------------------------------------------------------------------------


def test_distance():
    a, b = torch.tensor([1.0, -4.0]), torch.tensor([1.5, -4.0])
    gap = distance(a, b)
    assert (gap.count, gap.max_abs, gap.mean_abs, gap.squares, gap.scale, gap.norm, gap.max_rel) == (2, 0.5, 0.25, 0.25, 4, 17, 0.125)
    assert gap.histogram == [(-math.inf, 1), (-1.0, 1)]
    assert distance(torch.zeros(2), torch.zeros(2)).max_rel == 0
    assert distance(torch.zeros(2), torch.full((2,), 1e-30)).max_rel > 1
    assert distance(torch.zeros(0), torch.zeros(0)).max_rel == 0
    assert distance(torch.tensor([2**62]), torch.tensor([2**62 + 1])).max_abs >= 1
    assert distance(torch.tensor([True]), torch.tensor([False])).max_abs == 1
    assert distance(torch.tensor([1j]), torch.tensor([1.0 + 0j])).max_abs == 1
    assert distance(torch.tensor([torch.inf]), torch.tensor([torch.inf])).max_abs == 0
    assert distance(torch.tensor([torch.inf, 2.0]), torch.tensor([torch.inf, 2.5])).max_rel == 0.25
    assert "in 1 places" in distance(torch.tensor([torch.inf]), torch.tensor([-torch.inf])).note
    assert "in 2 places" in distance(torch.tensor([torch.nan, 1.0]), torch.tensor([1.0, torch.nan])).note
    assert distance(torch.zeros(2), torch.zeros(3)).note == "shape [3], the original has [2]"


def test_many_distances_are_those_of_each(monkeypatch):
    random = torch.Generator().manual_seed(0)
    shapes = [(3,), (0,), (2, 5), (), (7,), (4, 4)]
    pairs = [(torch.randn(s, generator=random), torch.randn(s, generator=random) * 1e-3) for s in shapes]
    pairs += [(torch.arange(3), torch.arange(3)), (torch.randn(2, dtype=torch.complex64), torch.zeros(2, dtype=torch.complex64))]
    pairs += [(torch.zeros(1), torch.tensor([torch.nan])), (torch.ones(2), torch.ones(3))]
    together = distances(pairs)
    assert together == [distance(a, b) for a, b in pairs]
    for (a, b), gap in zip(pairs[:6], together):
        delta = (a.double() - b.double()).abs()
        assert gap.count == a.numel() == sum(n for _, n in gap.histogram)
        assert gap.max_abs == (delta.max() if a.numel() else 0)
        assert math.isclose(gap.total, float(delta.sum()), rel_tol=1e-12)
        assert all((delta >= 10**e).sum() - (delta >= 10 ** (e + 1)).sum() == n for e, n in gap.histogram if e > -math.inf)
    monkeypatch.setattr("fxfuse.checking.difference._LARGE", 4)
    assert distances(pairs) == together, "in portions"


def test_spreads():
    spread = Spread()
    for other in ([0.0, 0.5], [0.25]):
        b = torch.tensor(other)
        spread.add(distance(torch.zeros_like(b), b))
    assert (spread.count, spread.max, spread.mean) == (3, 0.5, 0.25)
    assert spread.histogram == [(-math.inf, 1), (-1.0, 2)]
    assert Spread().mean == 0


class Turned(nn.Module):
    """Works in float32 whatever the model's dtype is: with a tensor that forward makes, or one that it is given."""

    def __init__(self, made):
        super().__init__()
        self.q, self.k, self.made = nn.Linear(4, 6), nn.Linear(4, 6), made

    def forward(self, x, angles):
        if self.made:
            ones = torch.ones(6, 3, dtype=torch.float32)
            return self.q(x).float() @ ones, self.k(x).float() @ ones
        return self.q(x) * angles.cos(), self.k(x) * angles.cos()


class Angles(nn.Module):
    """Makes angles in float32, outside of the module that holds the lanes, as many language models do."""

    def __init__(self, made):
        super().__init__()
        self.turned = Turned(made)

    def forward(self, x):
        return self.turned(x, torch.arange(6, dtype=torch.float32) / 7)


@pytest.mark.parametrize("made", [True, False])
def test_a_float64_model_with_float32_inside_fuses_and_is_proved(made):
    torch.manual_seed(0)
    model, x = Angles(made).double(), torch.randn(5, 4, dtype=torch.float64)
    fused = fxfuse.optimize(model, x, objective="launches", tune=False)
    report = fxfuse.report(fused)
    assert report.fused, str(report)
    assert not report.refused, str(report)
    assert report.validation is None or report.validation.proved
    for mode in (True, False):
        for got, want in zip(fused.train(mode)(x), model.train(mode)(x)):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert not fxfuse.report(fused).fallbacks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_inputs_of_two_dtypes_take_the_fast_way(dtype):
    """The region is given float32 beside the model's own dtype, call after call."""
    torch.manual_seed(0)
    model, x = Angles(False).to(dtype), torch.randn(5, 4).to(dtype)
    fused = fxfuse.optimize(model, x, objective="launches", tune=False, strict=True)
    assert fxfuse.report(fused).fused, str(fxfuse.report(fused))
    for rows in (5, 2):
        for got, want in zip(fused(x[:rows]), model(x[:rows])):
            torch.testing.assert_close(got, want)


def test_a_model_of_two_dtypes_fuses():
    """The first half is kept in float32; what comes of it is given to lanes that are not."""
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.turned = nn.Linear(4, 6), Turned(False)

        def forward(self, x):
            return self.turned(x, self.first(x.float()))

    torch.manual_seed(0)
    model, x = Halves().double(), torch.randn(5, 4, dtype=torch.float64)
    model.first.float()
    fused = fxfuse.optimize(model, x, objective="launches", tune=False)
    assert fxfuse.report(fused).fused, str(fxfuse.report(fused))
    for got, want in zip(fused(x), model(x)):
        torch.testing.assert_close(got, want)
    assert not fxfuse.report(fused).fallbacks


class Casting(nn.Module):
    """Lanes that compute in float64 for a while, and go back to the dtype that they were given, or to the one they name."""

    def __init__(self, back: torch.dtype | None) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(4))
        self.back = back

    def forward(self, xs: list[torch.Tensor]) -> torch.Tensor:
        out = []
        for net, x in zip(self.nets, xs, strict=True):
            same = torch.exp(x.double().log()).to(self.back or x.dtype)
            out.append(net(torch.tanh(x - same)))
        return torch.stack(out, 1)


@pytest.mark.parametrize("back", [None, torch.float32])
def test_a_cast_to_a_tensor_s_own_dtype_follows_it_to_float64(back):
    model = Casting(back)
    torch.manual_seed(0)
    xs = [torch.rand(5, 2) + 0.5 for _ in range(4)]
    fused = fxfuse.optimize(model, (xs,), objective="launches", tune=False)
    assert [region.ops for region in fxfuse.report(fused).fused], fxfuse.report(fused)
    result = validate(model, fused, [((xs,), {})])
    assert result.ok
    assert result.proved
    exact = [d for d in result.differences if d.dtype == "float64"]
    assert exact
    if back is None:  # all gradients of the original cancel: what a cast to float32 rounds would be all that there is
        assert max(d.max_abs for d in exact) < 1e-14


class TwoResults(Loop):
    def forward(self, x):
        y = super().forward(x)
        return y, y * 1


class OneResult(Loop):
    def forward(self, x):
        y = super().forward(x)
        return y, y


class AView(Loop):
    def forward(self, x):
        y = super().forward(x)
        return y, x[:1]


class ACopy(Loop):
    def forward(self, x):
        y = super().forward(x)
        return y, x[:1].clone()


@pytest.mark.parametrize(("one", "other", "said"), [
    (TwoResults, OneResult, "output[1] (eval, example 0, float64): shares memory with output[0], the original's has memory of its own"),
    (OneResult, TwoResults, "output[1] (eval, example 0, float64): has memory of its own, the original's shares memory with output[0]"),
    (AView, ACopy, "output[1] (eval, example 0, float64): has memory of its own, the original's shares memory with input[0]"),
])  # fmt: skip
def test_results_that_share_memory_otherwise(one, other, said):
    model = one()
    result = verify(model, like(model, other), data())
    assert not result.ok
    assert any(said in str(difference) for difference in result.differences)
    assert verify(model, like(model, one), data()).ok
