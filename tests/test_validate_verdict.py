"""Validation: what the result says, and of which calls; both models stay as they are; wrong arguments."""

from __future__ import annotations

import copy
import json
import random
import threading

import pytest
import rewritten
import torch
from rewritten import Fn, Loop, LostBias, LostGradient, Packed, data, failed, like, same
from torch import nn

from fxfuse.checking.validate import validate, verify
from fxfuse.errors import ArgumentError, ValidationError

original = rewritten.original  # a fixture


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


def test_keyword_inputs_and_names():
    def f(x, *, scale):
        return x * scale["by"]

    result = verify(Fn(f), Fn(f), data(), example_kwargs={"scale": {"by": torch.rand(4)}})
    assert result.ok
    assert {d.name for d in result.differences if d.kind == "input gradient"} == {"input[0]", "input['scale']['by']"}


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
