"""What models of other packages do that nobody would think of; each was found by the zoo."""

import copy
import functools
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import fxfuse
from checks import assert_equal_models, assert_fused_equals, assert_heavy, assert_same_state, fresh, own_gradients, randn, randomized


class NamedPairs(nn.Module):
    """deepctr-torch's ONN: modules found by the names of two fields."""

    def __init__(self, keys):
        super().__init__()
        self.keys = keys
        self.pairs = nn.ModuleDict({key: nn.Linear(2, 3) for key in keys})

    def forward(self, x):
        return torch.cat([self.pairs[key](x[:, 2 * i : 2 * i + 2]) for i, key in enumerate(self.keys)], 1)


@pytest.mark.parametrize("keys", [("C0+C1", "C0+C2", "C1+C2"), ("a b", "a-b", "a_b"), ("class", "None", "1"), ("größe", "x", "y")], ids=str)
def test_keys_that_are_no_identifiers(keys):
    assert_fused_equals(randomized(NamedPairs(keys)), randn(5, 6), most_heavy=1)


class Outside(NamedPairs):
    """The same, with layers of such names that stay as they are."""

    def __init__(self, keys):
        super().__init__(keys)
        self.after = nn.ModuleDict({"in+out": nn.Linear(9, 4), "in_out": nn.Linear(4, 5), "in": nn.ModuleDict({"out": nn.Linear(5, 2)})})

    def forward(self, x):
        x = torch.relu(self.after["in+out"](super().forward(x)))
        return self.after["in"]["out"](torch.relu(self.after["in_out"](x)))


def test_names_that_differ_in_a_dot_alone_and_keywords():
    fused = assert_fused_equals(randomized(Outside(("C0+C1", "C0+C2", "C1+C2"))), randn(5, 6), most_heavy=4)
    for graph in fxfuse.graph(fused).values():
        assert graph(randn(4, 6))[0].shape == (4, 2)


class Offsets(nn.Module):
    """torchfm: a numpy array held by the module becomes a tensor in every call."""

    def __init__(self, make, many=1):
        super().__init__()
        self.make = make
        self.offsets = np.array([0.5, 1.25, -2.0] * many)
        self.nets = nn.ModuleList(nn.Linear(1, 2) for _ in range(3))

    def forward(self, x):
        x = x + self.make(x, self.offsets)[:3]
        return torch.stack([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1)


MAKERS = {
    "new_tensor": lambda x, a: x.new_tensor(a), "tensor": lambda x, a: torch.tensor(a), "as_tensor": lambda x, a: torch.as_tensor(a),
    "dtype": lambda x, a: torch.tensor(a, dtype=torch.float64), "int": lambda x, a: torch.tensor(a.astype("int64")),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_a_numpy_array_of_the_module(make):
    assert_fused_equals(randomized(Offsets(make)), randn(5, 3), most_heavy=1)


def test_a_large_numpy_array_is_not_spelled_out():
    model = randomized(Offsets(MAKERS["tensor"], many=2000))
    fused = fxfuse.optimize(model, randn(5, 3), objective="launches", tune=False)
    assert "makes a tensor of a numpy array of 6,000 numbers" in str(fxfuse.report(fused))
    assert_equal_models(model, fused, [(randn(4, 3), {})])


def flattened(shape):
    return (shape[0] * shape[1], shape[2])


def cached_by_shape(module_name):
    """A ``flatten`` that remembers what it made of a shape; without its cache where a shape cannot be hashed, as einops does it."""
    space = {"__name__": module_name, "flattened": flattened, "cached": functools.lru_cache(flattened)}
    exec("def flatten(x):\n try:\n  return x.reshape(cached(x.shape))\n except TypeError:\n  return x.reshape(flattened(x.shape))\n", space)
    return space["flatten"]


class Cached(nn.Module):
    def __init__(self, flatten):
        super().__init__()
        self.flatten = flatten
        self.nets = nn.ModuleList(nn.Linear(4, 2) for _ in range(3))

    def forward(self, x):
        flat = self.flatten(x)
        return torch.stack([net(flat) for net in self.nets], 1)


def test_einops_cache_does_not_fix_sizes():
    flatten = cached_by_shape("einops.einops")
    x = randn(5, 3, 4)
    flatten(x)  # the number is in the cache before anything is recorded
    assert_fused_equals(randomized(Cached(flatten)), x, most_heavy=1)
    assert_fused_equals(randomized(Cached(flatten)), x, most_heavy=1)


def test_any_other_cache_is_right_all_the_same():
    flatten = cached_by_shape("somebody")
    x = randn(5, 3, 4)
    model = randomized(Cached(flatten))
    for seen_before in (False, True):
        if seen_before:
            flatten(x)
        for _ in range(2):
            fused = fxfuse.optimize(model, x, objective="launches", tune=False)
            assert_equal_models(model, fused, [(fresh(x, rows, rows), {}) for rows in (5, 1, 8)])


class OwnState(nn.Module):
    """einops' layers: pickled as the arguments of their ``__init__``."""

    def __init__(self, sign):
        super().__init__()
        self.sign = sign

    def __getstate__(self):
        return {"sign": self.sign}

    def __setstate__(self, state):
        self.__init__(state["sign"])

    def forward(self, x):
        return x.transpose(1, 2) * self.sign


class WithOwnState(nn.Module):
    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleList(nn.Sequential(OwnState(i + 1), nn.Linear(3, 2), nn.Dropout(0.0)) for i in range(3))
        self.last = OwnState(-1)

    def forward(self, x):
        return self.last(torch.stack([net(x) for net in self.nets], 1).flatten(2))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_of_modules_with_a_state_of_their_own(copied, training):
    model, x = randomized(WithOwnState()), randn(5, 3, 4)
    fused = assert_fused_equals(model, x, most_heavy=1)
    fused.train(training)
    other = copied(fused)
    assert [m.training for m in other.modules()] == [m.training for m in fused.modules()]
    assert torch.equal(other(x), fused(x))
    assert not fxfuse.report(other).fallbacks
    assert other.state_dict().keys() == fused.state_dict().keys()
    assert_equal_models(model, other, [(randn(4, 3, 4), {})])
    assert_equal_models(model, copied(fxfuse.unfuse(other)), [(randn(4, 3, 4), {})], gradients=own_gradients)


class Regularised(nn.Module):
    """deepctr-torch: the model keeps its weights a second time, in lists, for a penalty that is computed outside of forward."""

    def __init__(self, how):
        super().__init__()
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)) for _ in range(3))
        if how == "list":
            self.penalised = [p for p in self.nets.parameters() if p.dim() == 2]
        elif how == "dict":
            self.penalised = {"l2": {name: p for name, p in self.nets.named_parameters()}}
        else:
            self.penalised = [([(name, p) for name, p in net.named_parameters()], 0.1, 0.2) for net in self.nets]

    def weights(self):
        def walk(value):
            if isinstance(value, torch.Tensor):
                yield value
            elif isinstance(value, (list, tuple, dict)):
                for item in value.values() if isinstance(value, dict) else value:
                    yield from walk(item)

        return list(walk(self.penalised))

    def penalty(self):
        return sum((w**2).sum() for w in self.weights())

    def forward(self, x):
        return torch.cat([net(x) for net in self.nets], 1)


@pytest.mark.parametrize("how", ["list", "dict", "tuples"])
def test_weights_that_the_model_holds_twice_stay_the_ones_that_train(how):
    model, x = randomized(Regularised(how)), randn(6, 2)
    fused = fxfuse.optimize(model, x, objective="launches", tune=False)
    assert_heavy(fused, x, 2)
    assert_equal_models(model, fused, [(fresh(x, rows, rows), {}) for rows in (6, 1, 9)])
    assert_same_state(fxfuse.original_state_dict(fused), model.state_dict(), "original_state_dict")
    (plan,) = fxfuse.report(fused).fused
    assert "the Parameters stay, as views of the pack: nets.0.0.weight is also held by the attribute penalised" in plan.notes
    live = {id(p) for p in fused.parameters()}
    assert all(id(w) in live for w in fused.weights())
    each = [(m, torch.optim.SGD(m.parameters(), lr=0.05)) for m in (model, fused)]
    for _ in range(3):
        losses = []
        for one, optimizer in each:
            optimizer.zero_grad()
            loss = one(x).square().mean() + one.penalty()
            loss.backward()
            optimizer.step()
            losses.append(loss)
        assert torch.allclose(*losses, rtol=1e-12)
    assert_equal_models(model, fused, [(randn(4, 2), {})])
    assert not fxfuse.report(fused).fallbacks
