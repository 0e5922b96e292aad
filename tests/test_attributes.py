"""Attributes that forward sets to be looked at afterwards: what a program gives besides its result, set as the original sets it."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxfuse
from checks import QUICK, assert_close, assert_fused_equals, mlp, model_of, randn, randomized, relative_error


def lanes(x, nets):
    return torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(nets)], 1)


def nets(count=4):
    return nn.ModuleList(mlp() for _ in range(count))


class Attention(nn.Module):
    """As deepctr-torch's InteractingLayer: scores are kept on the layer."""

    def __init__(self, size=6, heads=2):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Parameter(torch.empty(size, size)) for _ in range(3))

    def forward(self, x):
        q, k, v = (torch.stack(torch.tensordot(x, w, dims=([-1], [0])).chunk(self.heads, 2)) for w in (self.query, self.key, self.value))
        self.normalized_att_scores = F.softmax(torch.einsum("bnik,bnjk->bnij", q, k), dim=-1)
        return F.relu(torch.cat(torch.matmul(self.normalized_att_scores, v).unbind(0), -1))


class Remembering(nn.Module):
    """A lane that keeps what it gave."""

    def __init__(self):
        super().__init__()
        self.net = mlp()
        self.last = None

    def forward(self, x):
        self.last = self.net(x)
        return self.last


def kept(model, *names):
    """What lies under dotted names, flattened to tensors and plain values."""
    found = []
    for name in names:
        path, _, attribute = name.rpartition(".")
        value = vars(model.get_submodule(path)).get(attribute, "nothing")
        found += list(value.values()) if isinstance(value, dict) else list(value) if isinstance(value, (list, tuple)) else [value]
    return found


def forget(model, *names):
    """Leave nothing of the call before under these names."""
    for name in names:
        path, _, attribute = name.rpartition(".")
        vars(model.get_submodule(path)).pop(attribute, None)


def assert_keeps(model, x, *names, heavy, batches=(1, 3, 8), **options):
    """Fused, with ``heavy`` launches; and the attributes are the original's: values, grad_fn, gradients through them, in both modes."""
    fused = assert_fused_equals(model, x, heavy=heavy, **{**QUICK, **options})
    for training in (True, False):
        model.train(training)
        fused.train(training)
        for seed, rows in enumerate((x.shape[0], *batches)):
            given = randn(rows, *x.shape[1:], seed=40 + seed)
            results = []
            for each in (model, fused):
                each.zero_grad()
                forget(each, *names)
                leaf = given.clone().requires_grad_()
                out = each(leaf)
                found = kept(each, *names)
                tensors = [t for t in found if isinstance(t, torch.Tensor)]
                total = sum((t * t).sum() for t in (out, *tensors) if t.requires_grad)
                total.backward()
                results.append((found, leaf.grad, fxfuse.weights.packing.original_gradients(each)))
            (want, want_x, want_p), (got, got_x, got_p) = results
            assert len(want) == len(got)
            for a, b in zip(want, got, strict=True):
                if isinstance(a, torch.Tensor):
                    assert a.shape == b.shape
                    assert a.stride() == b.stride()
                    assert a.dtype == b.dtype
                    assert a.requires_grad == b.requires_grad
                    assert relative_error(b.detach(), a.detach()) <= 1e-10
                else:
                    assert type(a) is type(b)
                    assert a == b
            assert_close(got_x, want_x, "gradient of the input")
            for name, gradient in want_p.items():
                assert_close(got_p[name], gradient, name)
        assert not fxfuse.report(fused).fallbacks
    return fused


def test_scores_of_attention_layers():
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.flatten(1) + lanes(x[:, 0], self.nets).sum(1, keepdim=True)

    model = model_of(forward, layers=nn.ModuleList(Attention() for _ in range(2)), nets=nets(6))
    names = [f"layers.{i}.normalized_att_scores" for i in range(2)]
    fused = assert_keeps(randomized(model), randn(5, 3, 6), *names, heavy=None)
    before = fused.layers[0].normalized_att_scores
    fused(randn(5, 3, 6, seed=9))
    assert fused.layers[0].normalized_att_scores is not before


def test_each_lane_keeps_its_output():
    model = model_of(lambda self, x: lanes(x, self.nets), nets=nn.ModuleList(Remembering() for _ in range(4)))
    assert_keeps(randomized(model), randn(5, 4), *(f"nets.{i}.last" for i in range(4)), heavy=2)


FORWARDS = {}


def keeps(*names, heavy=2):
    def note(function):
        FORWARDS[function.__name__] = (function, names, heavy)
        return function

    return note


@keeps("hidden")
def detached(self, x):
    out = lanes(x, self.nets)
    self.hidden = out.detach()
    return out


@keeps("out")
def the_result_itself(self, x):
    self.out = lanes(x, self.nets)
    return self.out


@keeps("both")
def a_tuple(self, x):
    y = lanes(x, self.nets)
    self.both = (y, y.sum())
    return y


@keeps("parts")
def a_dict(self, x):
    self.parts = {str(i): net(x[:, i : i + 1]) for i, net in enumerate(self.nets)}
    return torch.cat(list(self.parts.values()), 1)


@keeps("outs")
def a_list_that_grows(self, x):
    self.outs = []
    for i, net in enumerate(self.nets):
        self.outs.append(net(x[:, i : i + 1]))
    return torch.stack(self.outs).sum(0)


@keeps("losses", "count")
def a_penalty_and_numbers(self, x):
    y = lanes(x, self.nets)
    self.losses, self.count = (y**2).mean(), len(self.nets)
    return y


@keeps("rows")
def a_size(self, x):
    self.rows = x.shape[0]
    return lanes(x, self.nets) / self.rows


@keeps("seen")
def the_input(self, x):
    self.seen = x
    return lanes(x, self.nets)


@keeps("h")
def set_twice(self, x):
    self.h = x * 2
    self.h = lanes(self.h, self.nets)
    return self.h + 1


@keeps("h")
def written_after_it_was_kept(self, x):
    y = lanes(x, self.nets)
    self.h = y
    y.add_(1)
    return y * 2


@keeps("h")
def in_eval_alone(self, x):
    y = lanes(x, self.nets)
    if not self.training:
        self.h = y.tanh()
    return y


@keeps("stat")
def without_gradient(self, x):
    y = lanes(x, self.nets)
    with torch.no_grad():
        self.stat = y.abs().mean(0)
    return y


@keeps("none", "h")
def reset_first(self, x):
    self.none = self.h = None
    y = lanes(x, self.nets)
    self.h = y if self.h is None else self.h
    return y


@keeps("nets.0.seen")
def on_another_module(self, x):
    self.nets[0].seen = x.mean()
    return lanes(x, self.nets)


@keeps("h")
def by_setattr_and_getattr(self, x):
    setattr(self, "h", lanes(x, self.nets))  # noqa: B010
    return getattr(self, "h") * 2  # noqa: B009


@pytest.mark.parametrize("name", FORWARDS)
def test_what_forward_keeps(name):
    forward, names, heavy = FORWARDS[name]
    assert_keeps(randomized(model_of(forward, nets=nets())), randn(5, 4), *names, heavy=heavy)


def test_one_object_stays_one_object():
    for made in (fxfuse.optimize(randomized(model_of(the_result_itself, nets=nets())), randn(5, 4), objective="launches", **QUICK),):
        out = made(randn(5, 4))
        assert made.out is out


def test_a_class_attribute_as_default():
    class Model(nn.Module):
        cache = None

        def __init__(self):
            super().__init__()
            self.nets = nets()

        def forward(self, x):
            out = lanes(x, self.nets)
            self.cache = out.detach()
            return out

    model = randomized(Model())
    fused = assert_keeps(model, randn(5, 4), "cache", heavy=2)
    assert Model.cache is None
    assert "cache" not in vars(fxfuse.optimize(model_of(detached, nets=nets()), torch.randn(5, 4), **QUICK))
    assert vars(fused)["cache"].shape == (8, 4)


def test_in_a_region_below_the_top():
    inner = model_of(a_tuple, nets=nets())
    model = nn.Sequential(nn.Linear(4, 4), inner, nn.Tanh())
    assert_keeps(randomized(model), randn(5, 4), "1.both", heavy=None)


def test_copies_pickles_and_unfused_models_set_them_too():
    model = randomized(model_of(a_tuple, nets=nets()))
    fused = fxfuse.optimize(model, randn(5, 4), objective="launches", **QUICK)
    assert "both" not in vars(fused)
    x = randn(3, 4, seed=5)
    model(x)
    fused(x)
    fxfuse.unfuse(fused)(x)
    for made in (copy.deepcopy(fused), fxfuse.unfuse(fused)):
        y = randn(4, 4, seed=6)
        made(y)
        model(y)
        assert relative_error(made.both[0].detach(), model.both[0].detach()) <= 1e-10
        made.both = None
        made(y)
        assert made.both[0].grad_fn is not None


def test_saved_programs_set_them():
    model = Saved()
    fused = fxfuse.optimize(model, torch.randn(5, 4), objective="launches", **QUICK)
    buffer = io.BytesIO()
    torch.save(fused, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    x = torch.randn(3, 4)
    loaded(x)
    model(x)
    assert torch.allclose(loaded.parts["1"], model.parts["1"])
    assert not fxfuse.report(loaded).fallbacks


class Saved(nn.Module):
    """Importable, as pickle needs it."""

    forward = a_dict

    def __init__(self):
        super().__init__()
        self.nets = nets()


def test_setting_it_from_outside_leaves_the_program_as_it_is():
    model = randomized(model_of(a_tuple, nets=nets()))
    fused = fxfuse.optimize(model, randn(5, 4), objective="launches", strict=True, **QUICK)
    x = randn(3, 4, seed=5)
    for value in (None, "anything", 3):
        fused.both = value
        out = fused(x)  # strict: falling back would raise
        assert relative_error(out.detach(), model(x).detach()) <= 1e-10
        assert fused.both[0] is out


def test_a_call_that_falls_back_sets_it_and_the_next_one_does_not_fall_back():
    model = randomized(model_of(a_tuple, nets=nets()))
    fused = fxfuse.optimize(model, randn(5, 4), objective="launches", **QUICK)
    x = randn(6, 4, seed=5)
    fused(x.float().double().requires_grad_()[:, :4].to(torch.complex128).real)
    calls = sum(fxfuse.report(fused).fallbacks.values())
    fused.float()
    fused(x.float())
    fused.double()
    fused(x)
    assert sum(fxfuse.report(fused).fallbacks.values()) == calls
    assert fused.both[0].dtype is torch.float64


def state_first(self, x):
    y = lanes(x, self.nets)
    self.total = y.sum() if self.total is None else self.total + y.sum()
    return y


def looks_whether_it_is_there(self, x):
    y = lanes(x, self.nets)
    if not hasattr(self, "first"):
        self.first = y.detach()
    return y


def counts(self, x):
    self.calls += 1
    return lanes(x, self.nets)


def keeps_a_module(self, x):
    self.chosen = self.nets[0]
    return lanes(x, self.nets)


def deletes(self, x):
    self.h = x
    del self.h
    self.h = None
    del self.total
    return lanes(x, self.nets)


def appends_to_what_is_there(self, x):
    y = lanes(x, self.nets)
    self.history.append(y.detach())
    return y


@pytest.mark.parametrize(
    ("forward", "attribute"),
    [
        (state_first, "total"), (looks_whether_it_is_there, "first"), (counts, "calls"), (appends_to_what_is_there, "history"),
        (keeps_a_module, "chosen"), (deletes, "h"),
    ],
)  # fmt: skip
def test_state_from_the_call_before_is_left(forward, attribute):
    model = randomized(model_of(forward, nets=nets(), total=None, calls=0, history=[]))
    fused = fxfuse.optimize(model, randn(5, 4), objective="launches", tune=False)
    report = fxfuse.report(fused)
    assert not report.fused
    assert any(f"forward changes self.{attribute}" in str(refusal) for refusal in report.refused), str(report)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp(4, 3, 4)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.net(x) + self.calls


def test_a_call_that_counts_stays_and_what_is_around_it_fuses_and_stays_fused():
    def forward(self, x):
        return self.counting(lanes(x, self.nets))

    model = randomized(model_of(forward, nets=nets(), counting=Counting()))
    fused = fxfuse.optimize(model, randn(5, 4), objective="launches", tune=False)
    report = fxfuse.report(fused)
    assert report.fused
    assert any("counting stays a call of its own: forward changes self.calls" in str(refusal) for refusal in report.refused), str(report)
    for seed in range(3):
        x = randn(4, 4, seed=seed)
        assert relative_error(fused(x).detach(), model(x).detach()) <= 1e-10
    assert (fused.counting.calls, model.counting.calls) == (3, 3)
    assert not report.fallbacks


def test_what_another_mode_sets_is_read_as_the_last_call_left_it():
    def forward(self, x):
        y = lanes(x, self.nets)
        if self.training:
            self.scale = y.detach().abs().mean()
            return y
        return y / self.scale

    model = randomized(model_of(forward, nets=nets(), scale=torch.tensor(2.0, dtype=torch.float64)))
    fused = fxfuse.optimize(model, randn(5, 4), objective="launches", tune=False)
    for seed in range(3):
        for training in (True, False):
            x = randn(4, 4, seed=seed)
            assert relative_error(fused.train(training)(x).detach(), model.train(training)(x).detach()) <= 1e-10


def test_what_the_parent_sets_on_the_child():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.nets = nets()
            self.scale = 1.0

        def forward(self, x):
            return lanes(x, self.nets) * self.scale

    def forward(self, x):
        self.child.scale = x.mean()
        return self.child(x)

    assert_keeps(randomized(model_of(forward, child=Scaled())), randn(5, 4), "child.scale", heavy=2)


def test_a_module_called_twice_keeps_the_last():
    def forward(self, x):
        return self.child(x) + self.child(x.tanh())

    model = model_of(forward, child=model_of(a_tuple, nets=nets()))
    assert_keeps(randomized(model), randn(5, 4), "child.both", heavy=2)


def test_another_attribute_in_every_call_comes_to_an_end():
    names = iter(range(10**6))

    def forward(self, x):
        setattr(self, f"h_{next(names)}", x)
        return lanes(x, self.nets)

    fused = fxfuse.optimize(randomized(model_of(forward, nets=nets())), randn(5, 4), objective="launches", **QUICK)
    report = fxfuse.report(fused)
    assert not report.fused
    assert "forward changes self.h_" in str(report.refused[0])


def test_compiled_models_set_them():
    model = randomized(model_of(a_tuple, nets=nets()))
    fused = fxfuse.optimize(model, randn(5, 4), objective="launches", **QUICK)
    x = randn(6, 4, seed=3)
    torch.compile(fused, backend="eager", fullgraph=True)(x)
    model(x)
    assert relative_error(fused.both[0].detach(), model.both[0].detach()) <= 1e-10


def test_an_optimizer_made_before_trains_through_what_was_kept():
    def forward(self, x):
        self.penalty = sum((net[0].weight ** 2).sum() for net in self.nets)
        return lanes(x, self.nets)

    model = randomized(model_of(forward, nets=nets()))
    fused = fxfuse.optimize(copy.deepcopy(model), tune=False)
    for each in (model, fused):
        optimizer = torch.optim.SGD(each.parameters(), 0.01)
        for seed in range(3):
            optimizer.zero_grad()
            (each(randn(5, 4, seed=seed)).square().mean() + each.penalty).backward()
            optimizer.step()
    assert fxfuse.report(fused).fused
    for (name, want), got in zip(model.state_dict().items(), fxfuse.original_state_dict(fused).values(), strict=True):
        assert relative_error(got, want) <= 1e-10, name
