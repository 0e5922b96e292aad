"""Validation: wrong models are caught, each mistake on its own, whatever they return; right ones pass."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

import pytest
import rewritten
import torch
import torch.nn.functional as F
from rewritten import LANES, Loop, LostBias, LostGradient, Packed, data, failed, like, same
from torch import nn

from fxfuse.checking.validate import verify

original = rewritten.original  # a fixture


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


def test_a_lost_bias(original):
    result = verify(original, like(original, LostBias), data())
    assert "output" in failed(result)
    assert {f"nets.{i}.4.bias" for i in range(LANES)} <= failed(result, kind="parameter gradient")


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


# -- in every kind of output ------------------------------------------------------------------------------------------


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
