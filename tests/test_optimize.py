"""``fxfuse.optimize``: its arguments, what it gives back, and what stays as it was."""

from __future__ import annotations

import copy
import io
import json
import pickle
import threading
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import fxfuse
from checks import assert_close, assert_equal_models, assert_same_state, own_gradients, randn, randomized, untouched
from fxfuse.launches import count

X = randn(5, 4)


class Nets(nn.Module):
    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleList(
            nn.Sequential(nn.Linear(1, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 1)) for _ in range(4)
        )
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1) + self.bias


def new(seed: int = 0) -> Nets:
    return randomized(Nets(), seed)


def fuse(model: nn.Module, x: Any = X, **options: Any) -> nn.Module:
    return fxfuse.optimize(model, x, **{"objective": "launches", "validate": False, "tune": False, **options})


def assert_same(model: nn.Module, fused: nn.Module) -> None:
    assert_equal_models(model, fused, [(X, {}), (randn(3, 4, seed=8), {})])


def reasons(fused: nn.Module) -> str:
    return "\n".join(str(refusal) for refusal in fxfuse.report(fused).refused)


# -- arguments --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"mode": "eval"}, "mode must be one of 'train', 'infer'; 'eval' came"),
        ({"objective": 1}, "objective must be one of 'time', 'launches'; 1 came"),
        ({"lowering": "conv"}, "lowering must be one of 'auto', 'grouped_conv', 'bmm'; 'conv' came"),
        ({"tune": 1}, "tune must be True or False, 1 came"),
        ({"validate": None}, "validate must be True or False, None came"),
        ({"strict": "yes"}, "strict must be True or False, 'yes' came"),
        ({"inplace": 1}, "inplace must be True or False, 1 came"),
        ({"progress": None}, "progress must be True or False, None came"),
        ({"cache": "no"}, "cache must be True or False, 'no' came"),
        ({"min_lanes": 1}, "min_lanes must be a whole number of at least 2, 1 came"),
        ({"min_lanes": 2.5}, "min_lanes must be a whole number of at least 2, 2.5 came"),
        ({"max_memory": -1}, "max_memory must be a positive number of bytes or None, -1 came"),
        ({"max_memory": "1GB"}, "max_memory must be a positive number of bytes or None, '1GB' came"),
        ({"tune_for": "a"}, "tune_for must be a batch size, example inputs"),
        ({"tune_for": 0}, "tune_for must be a batch size, example inputs"),
        ({"example_kwargs": [1]}, "example_kwargs must be a dict of keyword arguments, a list came"),
        ({"example_kwargs": {1: 2}}, "example_kwargs must have the names of arguments as its keys"),
        ({"example_inputs": [X]}, "a list came; pass a list of arguments as tuple"),
        ({"example_inputs": 3}, "example_inputs must be a tensor or a tuple of the model's arguments, int 3 came"),
        ({"example_inputs": X.numpy()}, "example_inputs must be a tensor or a tuple of the model's arguments, a ndarray came"),
        ({"model": 3}, "model must be a torch.nn.Module, int 3 came"),
        ({"model": Nets}, "model must be a torch.nn.Module, a type came"),
    ],
)
def test_wrong_arguments_raise_at_once(given, said):
    arguments = {"model": Nets(), "example_inputs": X, **given}
    with pytest.raises(fxfuse.ArgumentError) as raised:
        fxfuse.optimize(arguments.pop("model"), arguments.pop("example_inputs"), **arguments)
    assert said in str(raised.value)
    assert isinstance(raised.value, fxfuse.FxfuseError)


@pytest.mark.parametrize("mode", ["train", "infer"])
@pytest.mark.parametrize("lowering", ["auto", "grouped_conv", "bmm"])
def test_modes_and_lowerings(mode, lowering):
    model = new()
    fused = fuse(model, mode=mode, lowering=lowering)
    assert_same(model, fused)
    used = {op.lowering for op in fxfuse.report(fused).fused[0].ops if op.op == "linear"}
    assert used == {"grouped_conv"} if lowering == "grouped_conv" else "grouped_conv" not in used


def test_fewest_lanes():
    assert not fxfuse.report(fuse(new(), min_lanes=5)).fused
    assert fxfuse.report(fuse(new(), min_lanes=4)).fused


def test_memory_limit():
    fused = fuse(new(), max_memory=10)
    assert not fxfuse.report(fused).fused
    assert "max_memory allows 10" in reasons(fused)
    assert fxfuse.report(fuse(new(), max_memory=10**9)).fused


def test_strict_raises_where_it_would_run_the_loop():
    fused = fuse(new(), strict=True)
    fused(randn(9, 4))
    with pytest.raises(fxfuse.FallbackError, match=r"would run its loop: .*float32"):
        fused(X.float())


def test_inputs_by_keyword_alone():
    model = new()
    with untouched(model):
        fused = fxfuse.optimize(model, example_kwargs={"x": X}, objective="launches", tune=False)
    assert fxfuse.report(fused).fused
    assert_close(fused(x=X), model(x=X), "by keyword")
    assert_close(fused(X), model(X), "by position")


def test_in_place():
    model = new()
    before = copy.deepcopy(model)
    for validate in (False, True):
        each = copy.deepcopy(model)
        assert fuse(each, inplace=True, validate=validate) is each
        assert fxfuse.report(each).fused
        assert_same(before, each)


def test_tuning_leaves_the_original_alone():
    model = new()
    model.nets[0].eval()
    with untouched(model):
        fused = fxfuse.optimize(model, X, tune_for=2)
    assert [module.training for _, module in model.named_modules()][:2] == [True, True]
    assert not fused.nets[0].training
    assert not model.nets[0].training
    assert_same(model, fused)


def test_explain_names_itself():
    with pytest.raises(TypeError, match=r"explain\(\) got an unexpected keyword argument 'bogus'"):
        fxfuse.explain(nn.Linear(2, 2), torch.randn(3, 2), bogus=1)


def test_explain_changes_nothing():
    model = new()
    with untouched(model):
        report = fxfuse.explain(model, X, objective="launches", tune=False)
    assert type(model) is Nets
    assert report.fused
    json.dumps(report.to_dict())
    with pytest.raises(fxfuse.ArgumentError, match="explain needs example_inputs"):
        fxfuse.explain(model)


# -- models that do not fuse ------------------------------------------------------------------------------------------------------


def test_a_forward_that_raises():
    class Raising(Nets):
        def forward(self, x):
            raise ValueError("boom\nand more")

    fused = fuse(Raising())
    assert "the forward raises ValueError: boom" in reasons(fused)
    with pytest.raises(ValueError, match="boom"):
        fused(X)


@pytest.mark.parametrize("x", [(X, X), (), randn(5, 3)], ids=["too many", "too few", "too narrow"])
def test_inputs_that_do_not_fit_the_model(x):
    model = new()
    fused = fuse(model, x)
    assert "the forward raises" in reasons(fused)
    assert_same(model, fused)


def test_nothing_to_fuse():
    model = randomized(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
    fused = fuse(model)
    assert reasons(fused) == "no loop over equal networks was found"
    assert_same(model, fused)
    for function in (fxfuse.report, fxfuse.graph, fxfuse.original_state_dict, fxfuse.unfuse):
        function(fused)


def test_a_replaced_forward():
    model = new()
    model.forward = lambda x: x * 2
    fused = fuse(model)
    assert "its forward was replaced on the instance" in reasons(fused)
    assert torch.equal(fused(X), X * 2)


def test_a_model_that_cannot_be_copied():
    model = new()
    model.lock = threading.Lock()
    fused = fuse(model)
    assert fused is model
    assert "the model cannot be copied: cannot pickle" in reasons(fused)
    assert type(model) is Nets


def test_warnings_of_trial_runs_are_nobody_s():
    class Warning_(Nets):
        def forward(self, x):
            warnings.warn("from the model", stacklevel=1)
            return super().forward(x)

    fused = fuse(randomized(Warning_()))  # warnings are errors in these tests
    assert "fxfuse failed" not in reasons(fused)


# -- the result -------------------------------------------------------------------------------------------------------------------


def test_the_result_is_of_the_original_s_class():
    model = new()
    fused = fuse(model)
    assert isinstance(fused, Nets)
    assert sum(p.numel() for p in fused.parameters()) == sum(p.numel() for p in model.parameters())
    assert len(list(fused.parameters())) == 7
    assert torch.equal(fused.nets[3][2].weight, model.nets[3][2].weight)
    assert "Nets" in repr(fused)
    assert "4 lanes" in str(fxfuse.report(fused))
    json.dumps(fxfuse.report(fused).to_dict())


def by_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def by_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle, by_torch_save])
def test_copies(copied):
    model = new()
    fused = fuse(model)
    other = copied(fused)
    assert_same(model, other)
    assert fxfuse.report(other).fused
    assert not fxfuse.report(other).fallbacks
    with torch.no_grad():
        other.nets[1][0].weight.zero_()
    assert_same(model, fused)


def test_state_dict_of_the_original_fits_another_fused_model():
    model = new()
    fused = fuse(new(seed=9))
    fused.load_state_dict(model.state_dict())
    assert_same(model, fused)
    other = fuse(new(seed=7))
    other.load_state_dict(fused.state_dict())
    assert_same(model, other)
    assert_same_state(fxfuse.original_state_dict(other), model.state_dict(), "two ways")


def test_requires_grad():
    model = new()
    fused = fuse(model)
    fused.requires_grad_(False)
    assert not fused(X).requires_grad
    fused.requires_grad_(True)
    assert_same(model, fused)
    with pytest.raises(fxfuse.FxfuseError, match="packs 4 lanes"):
        fused.nets[1].requires_grad_(False)
    with pytest.raises(RuntimeError):
        fused.nets[1][0].weight.requires_grad_(False)


def test_lanes_can_be_written_and_replaced():
    model = new()
    fused = fuse(model)
    for each in (model, fused):
        with torch.no_grad():
            each.nets[1][0].weight.fill_(1.0)
        each.nets[2][0].bias.data.mul_(2)
        each.nets[0][0].weight = nn.Parameter(torch.zeros(6, 1, dtype=torch.float64))
        each.apply(lambda m: nn.init.constant_(m.bias, 0.3) if isinstance(m, nn.Linear) else None)
    assert_same(model, fused)
    assert not fxfuse.report(fused).fallbacks
    model.nets[3] = fused.nets[3] = randomized(nn.Linear(1, 1), 4)
    assert_close(fused(X), model(X), "a lane replaced")
    assert "a submodule was replaced" in str(fxfuse.report(fused).fallbacks)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, number: int = 4) -> None:
    for step in range(number):
        model.train(step % 2 == 0)
        optimizer.zero_grad()
        model(randn(6, 4, seed=step)).pow(2).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_training_takes_the_same_path(kind):
    model = new()
    fused = fuse(model)
    for each in (model, fused):
        steps(each, kind(each.parameters(), lr=0.01))
    assert_equal_models(model, fused, [(X, {})], rtol=1e-8)


def test_an_optimizer_built_before_is_warned_of():
    model = new()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.warns(UserWarning, match=r"SGD holds Parameters of the model .* Build the optimizer from fused.parameters\(\)"):
        fuse(model)
    assert optimizer.param_groups


# -- fused models in fused models ---------------------------------------------------------------------------------------------------


class Outer(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self.heads = nn.ModuleList(nn.Linear(4, 2) for _ in range(3))

    def forward(self, x):
        h = self.inner(x)
        return torch.stack([head(h) for head in self.heads], 1)


def test_a_fused_model_inside_another():
    model = randomized(Outer(Nets()))
    holder = copy.deepcopy(model)
    holder.inner = fuse(holder.inner)
    assert_same(model, holder)
    with untouched(holder):
        fused = fuse(holder)
    assert "inner was fused already: taken apart, and fused anew with the whole model" in str(fxfuse.report(fused))
    assert count(lambda: fused(X)).heavy == 4
    assert_same(model, fused)
    assert_same_state(fxfuse.original_state_dict(fused), model.state_dict(), "nested")
    assert_same(model, fxfuse.unfuse(fused))
    assert_same_state(fxfuse.original_state_dict(holder), model.state_dict(), "the model that was given")


def test_an_ensemble_of_fused_models():
    members = [randomized(Nets(), seed) for seed in range(3)]

    class Ensemble(nn.Module):
        def __init__(self, members):
            super().__init__()
            self.members = nn.ModuleList(members)

        def forward(self, x):
            return torch.stack([member(x) for member in self.members])

    model, holder = Ensemble(members), Ensemble([fuse(member) for member in members])
    fused = fuse(holder)
    assert count(lambda: fused(X)).heavy == 3
    assert_same(model, fused)
    with untouched(holder):
        kept = fxfuse.optimize(holder, X, objective="launches", inplace=False, min_lanes=100)
    assert "it is fused already; fxfuse.unfuse(model) gives the model to fuse anew" in reasons(kept)
    assert count(lambda: kept(X)).heavy == 9


def test_optimize_twice():
    model = new()
    assert_same(model, fuse(model))
    fused = fuse(model)
    with untouched(fused):
        again = fuse(fused)
    assert "was fused already: taken apart, and fused anew with the whole model" in str(fxfuse.report(again))
    assert fxfuse.report(again).fused
    assert count(lambda: again(X)).heavy == 3
    assert_same(model, again)
    assert_same_state(fxfuse.original_state_dict(again), model.state_dict(), "fused twice")
    with untouched(fused):
        kept = fxfuse.optimize(fused, X, objective="launches", min_lanes=100)
    assert "it is fused already; fxfuse.unfuse(model) gives the model to fuse anew" in reasons(kept)
    assert count(lambda: kept(X)).heavy == 3


# -- without inputs: at the first call -------------------------------------------------------------------------------------------------


def lazy(model: nn.Module) -> nn.Module:
    return fxfuse.optimize(model, objective="launches", tune=False)


def test_lazy_shares_the_parameters_with_the_optimizer():
    model = new()
    other = copy.deepcopy(model)
    optimizer = torch.optim.SGD(other.parameters(), 0.05)
    fused = lazy(other)
    assert "not called yet" in str(fxfuse.report(fused))
    steps(fused, optimizer)
    steps(model, torch.optim.SGD(model.parameters(), 0.05))
    assert fxfuse.report(fused).fused
    assert_same(model, fused)
    assert not fxfuse.report(fused).fallbacks
    assert count(lambda: fused(X)).heavy == 3
    for (name, parameter), (key, own) in zip(fused.named_parameters(), other.named_parameters(), strict=True):
        assert (name, id(parameter)) == (key, id(own))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_lazy_whose_first_call_takes_no_gradients(mode):
    model = new()
    fused = lazy(model)
    with mode():
        fused(X.clone())
    assert fxfuse.report(fused).fused
    assert_same(model, fused)


def test_lazy_with_an_input_in_somebody_s_graph():
    model = new()
    fused, grads = lazy(copy.deepcopy(model)), []
    for each in (model, fused):
        x = X.clone().requires_grad_()
        each(x * 2).sum().backward()
        grads.append(x.grad)
    assert_close(grads[1], grads[0], "gradient through the first call")
    for name, grad in own_gradients(model).items():
        assert_close(fxfuse.weights.packing.original_gradients(fused)[name], grad, name)


@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle])
def test_lazy_copied_before_its_first_call(copied):
    model = new()
    other = copied(lazy(model))
    assert_same(model, other)
    assert fxfuse.report(other).fused


def test_lazy_in_place_and_in_eval_mode():
    model = new()
    before = copy.deepcopy(model)
    fused = fxfuse.optimize(model, objective="launches", tune=False, inplace=True)
    assert fused is model
    fused.eval()
    fused(X)
    assert not fused.training
    assert_same(before, fused)


# -- verify -----------------------------------------------------------------------------------------------------------------------


def test_verify_finds_a_changed_weight():
    model = new()
    fused = fuse(model)
    assert fxfuse.verify(model, fused, X).ok
    with torch.no_grad():
        fused.nets[0][0].weight[0] += 1
    assert not fxfuse.verify(model, fused, X).ok


class Triangle(nn.Module):
    """A running sum over rows, written in place row by row, beside three Linears that could be one."""

    def __init__(self, rows):
        super().__init__()
        self.nets, self.rows = nn.ModuleList(nn.Linear(6, 6) for _ in range(3)), rows

    def forward(self, x):
        q, k, v = (net(x) for net in self.nets)
        weights = (q @ k.mT).softmax(-1)
        for i in range(1, self.rows):
            weights[..., i, :i] = weights[..., i, :i].clone() + (weights[..., i, :, None].clone() * weights.clone()).sum(-2)[..., :i]
        return weights @ v


@pytest.mark.parametrize(("rows", "fuses"), [(1, True), (9, False)])
def test_lanes_that_cost_the_rest_more_than_they_save_stay(rows, fuses):
    torch.manual_seed(0)
    model, x = Triangle(rows).double(), torch.randn(4, 9, 6, dtype=torch.float64)
    fused = fxfuse.optimize(model, x, objective="launches", tune=False)
    report = fxfuse.report(fused)
    assert bool(report.fused) is fuses, str(report)
    if not fuses:
        assert [str(each).partition("launch ")[0] for each in report.refused] == ["left as a loop: the writes around the lanes "]
    torch.testing.assert_close(fused(x), model(x), rtol=1e-12, atol=1e-12)
