"""Copies of modules: what copy.deepcopy gives, and what it shares."""

import copy
import functools
import threading
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from fxfuse.models.copies import independent_copy, sharing_copy

BOTH = pytest.mark.parametrize("copied", [sharing_copy, independent_copy])


def facts(model):
    """All of a model that can be compared, every object replaced by the number of its first appearance: aliases show."""
    numbers: dict[int, int] = {}

    def number(value):
        return numbers.setdefault(id(value), len(numbers))

    def look(value):
        if isinstance(value, torch.Tensor):
            layout = (type(value), value.dtype, value.shape, value.stride(), value.requires_grad, value.grad is None)
            return (number(value), *layout, value.detach().double().flatten().tolist())
        if isinstance(value, (list, tuple, set, dict, nn.Module)):
            seen, constant = id(value) in numbers, isinstance(value, tuple) and not value
            name = None if constant else number(value)
            if seen:
                return (type(value), name)
            inside = vars(value) if isinstance(value, nn.Module) else value
            items = inside.items() if isinstance(inside, dict) else inside
            return (type(value), name, [look(item) for item in items])
        if isinstance(value, (int, float, str, bool, type(None), torch.dtype, type(len), type(look))):
            return value
        return type(value)

    return look(model)


def tensors(model):
    """Every tensor that a model's modules hold, by path and name."""
    found = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for store in (module._parameters, module._buffers, vars(module)):
            found.update({f"{path}.{name}": value for name, value in store.items() if isinstance(value, torch.Tensor)})
    return found


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 3)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("table", torch.arange(6.0).view(2, 3).t())
        self.register_buffer("left_out", torch.ones(2), persistent=False)
        self.register_buffer("nothing", None)
        self.register_parameter("no_bias", None)
        self.scale = nn.Parameter(torch.ones(3, 2).t(), requires_grad=False)
        self.settings = {"sizes": [1, 2, (3, 4)], "name": "x", 5: {6, 7}}
        self.frozen = ("a", (1, 2))
        self.device, self.dtype = torch.device("cpu"), torch.float32


class Shared(nn.Module):
    """Tied weights, a submodule under two names, lists that are one list, a cycle."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)
        self.b.weight = self.a.weight
        self.again = self.a
        self.hidden = [nn.Linear(1, 1), self.a]
        self.same_list = self.hidden
        self.by_name = OrderedDict(first=self.hidden[0])
        self.table = torch.ones(2)
        self.also = (self.table, [self.table])
        self.loop = [1]
        self.loop.append(self.loop)
        self.held = ([],)
        self.held[0].append(self.held)
        vars(self)["parent"] = self
        vars(self.a)["parent"] = self


class Growing(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.ones(i + 1)) for i in range(3)])
        self.named = nn.ParameterDict({"a": nn.Parameter(torch.ones(2))})
        self.nets = nn.ModuleDict({"x": nn.Sequential(nn.Linear(1, 2), nn.ReLU())})
        self.cache = {}

    def forward(self, x):
        self.cache["last"] = x.detach()
        self.lazy = torch.ones(2)
        return x


def grown():
    model = Growing()
    model(torch.randn(2))
    return model


MODELS = {
    "plain": Plain, "shared": Shared, "attributes made in forward": grown, "LSTM": lambda: nn.Sequential(nn.LSTM(2, 3, num_layers=2)),
    "transformer": lambda: nn.TransformerEncoderLayer(4, 2), "eval": lambda: Plain().eval(), "half": lambda: Plain().half(),
    "spectral norm": lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(2, 3))),
    "pruned": lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3)), "conv": lambda: nn.Conv2d(2, 3, 1, padding_mode="circular"),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_copy_is_what_deepcopy_gives(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    expected = facts(copy.deepcopy(model))
    before = facts(model)
    for copied in (independent_copy(model), sharing_copy(model)):
        assert facts(copied) == expected
    assert facts(model) == before


@pytest.mark.parametrize("name", MODELS)
def test_what_is_shared_and_what_is_not(name):
    model = MODELS[name]()
    original = tensors(model)
    parameters = {id(parameter) for parameter in model.parameters()}
    assert original
    for path, tensor in tensors(independent_copy(model)).items():
        assert tensor is not original[path]
        assert tensor.data_ptr() != original[path].data_ptr()
    for path, tensor in tensors(sharing_copy(model)).items():
        assert (tensor is original[path]) == (id(original[path]) in parameters)


@BOTH
def test_modules_and_containers_are_the_copys_own(copied):
    model = Shared()
    other = copied(model)
    assert not {*model.modules()} & {*other.modules()}
    assert other.again is other.a
    assert other.hidden[1] is other.a
    assert other.same_list is other.hidden
    assert other.by_name["first"] is other.hidden[0] is not model.hidden[0]
    assert other.also[0] is other.table is other.also[1][0] is not model.table
    assert other.parent is other
    assert other.a.parent is other
    assert other.loop[1] is other.loop is not model.loop
    assert other.held[0][0] is other.held is not model.held
    assert other.b.weight is other.a.weight


@BOTH
def test_views_of_one_storage_stay_views_of_one_storage(copied):
    model = nn.Module()
    base = torch.zeros(4)
    model.register_buffer("whole", base)
    model.register_buffer("part", base[1:3])
    other = copied(model)
    other.whole[1] = 5.0
    assert other.part[0] == 5.0
    assert base[1] == 0.0


@BOTH
def test_hooks_are_shared_functions_and_bound_methods_follow(copied):
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.calls = 0
            self.handle = self.layer.register_forward_hook(self.note)
            self.layer.register_forward_pre_hook(functools.partial(self.note_more, 10))

        def note(self, module, args, out):
            self.calls += 1

        def note_more(self, number, module, args):
            self.calls += number

        def forward(self, x):
            return self.layer(x)

    def free(module, args, out):
        return out * 2

    model = Counts()
    model.register_forward_hook(free)
    other = copied(model)
    x = torch.randn(3, 2)
    assert torch.equal(other(x), model(x))
    assert (model.calls, other.calls) == (11, 11)
    assert [*other._forward_hooks.values()] == [free]
    other.handle.remove()
    other(x)
    model(x)
    assert (model.calls, other.calls) == (22, 21)


@BOTH
def test_a_handle_of_a_removed_hook_is_copied_dead(copied):
    model = nn.Linear(2, 2)
    model.handle = model.register_forward_hook(lambda *args: None)
    model.handle.remove()
    other = copied(model)
    other.handle.remove()
    assert not other._forward_hooks


def test_gradients_and_parameter_attributes_come_out_as_of_deepcopy():
    model = nn.Linear(2, 2)
    model(torch.ones(1, 2)).sum().backward()
    model.weight.tag = "mine"
    model.table = torch.ones(2, requires_grad=True)
    model.table.sum().backward()
    expected, other = copy.deepcopy(model), independent_copy(model)
    for name in ("weight", "table"):
        one, two = getattr(expected, name), getattr(other, name)
        assert (one.grad is None) == (two.grad is None)
        assert vars(one).keys() == vars(two).keys()
    assert other.table.grad is not model.table.grad
    assert torch.equal(other.table.grad, model.table.grad)


@BOTH
@pytest.mark.parametrize("where", ["attribute", "list", "dict", "buffer"])
def test_hidden_state_with_a_history_is_copied_without_it(copied, where):
    model = nn.LSTM(2, 3) if where == "list" else nn.Linear(2, 3)
    hidden = (model(torch.randn(1, 2))[0] if where == "list" else model(torch.randn(1, 2)))
    assert not hidden.is_leaf
    if where == "attribute":
        model.hidden = hidden
    elif where == "buffer":
        model.register_buffer("hidden", hidden)
    elif where == "list":
        model = nn.Sequential(nn.Linear(2, 2))
        model.hidden = [(hidden, hidden)]
    else:
        model = nn.Sequential(nn.Linear(2, 2))
        model.hidden = {"h": hidden}
    with pytest.raises(RuntimeError):
        copy.deepcopy(model)
    made = copied(model).hidden
    made = made[0] if where == "list" else (made["h"],) * 2 if where == "dict" else (made, made)
    assert made[0] is made[1] is not hidden
    assert torch.equal(made[0], hidden)
    assert made[0].is_leaf
    assert not made[0].requires_grad
    made[0].zero_()
    assert hidden.abs().sum() > 0


class OwnDeepcopy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.made_by = "init"

    def __deepcopy__(self, memo):
        made = memo[id(self)] = type(self)()
        made.layer = copy.deepcopy(self.layer, memo)
        made.made_by = "deepcopy"
        return made


class OwnState(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.lock = threading.Lock()

    def __getstate__(self):
        return {**vars(self), "lock": None}

    def __setstate__(self, state):
        super().__setstate__({**state, "lock": threading.Lock()})


class Made(nn.Module):
    def __new__(cls, number):
        made = super().__new__(cls)
        made.__dict__["number"] = number
        return made

    def __init__(self, number):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def __reduce__(self):
        return Made, (self.number,), vars(self)


@BOTH
@pytest.mark.parametrize("kind", [OwnDeepcopy, OwnState, lambda: Made(3)])
def test_modules_with_copying_of_their_own_are_asked(copied, kind):
    model = nn.Sequential(nn.Linear(2, 2), kind())
    model.also = model[1].layer
    other = copied(model)
    assert type(other[1]) is type(model[1])
    assert other.also is other[1].layer is not model[1].layer
    assert torch.equal(other[1].layer.weight, model[1].layer.weight)
    if kind is OwnDeepcopy:
        assert other[1].made_by == "deepcopy"
    elif kind is OwnState:
        assert other[1].lock is not None
        assert other[1].lock is not model[1].lock
    else:
        assert other[1].number == 3


@BOTH
def test_a_recurrent_copy_computes_with_its_own_weights(copied):
    model = nn.LSTM(2, 3, num_layers=2)
    other = copied(model)
    assert all(a is getattr(other, name) for a, name in zip(other._flat_weights, other._flat_weights_names))
    assert [ref() for ref in other._flat_weight_refs] == other._flat_weights
    x = torch.randn(4, 1, 2)
    assert torch.equal(model(x)[0], other(x)[0])


@BOTH
def test_what_cannot_be_copied_raises_as_deepcopy_does(copied):
    model = nn.Sequential(nn.Linear(2, 2))
    model.lock = threading.Lock()
    with pytest.raises(TypeError, match="pickle"):
        copied(model)


@BOTH
def test_a_compiled_call_is_left_out(copied):
    model = nn.Linear(2, 2)
    vars(model)["_compiled_call_impl"] = lambda *args: pytest.fail("the compiled function of the original was called")
    assert "_compiled_call_impl" not in vars(copied(model))


def test_a_pruned_layer_is_copied_although_deepcopy_cannot():
    model = nn.Sequential(nn.Linear(2, 3))
    prune.l1_unstructured(model[0], "weight", amount=2)
    other = independent_copy(model)
    x = torch.randn(4, 2)
    assert torch.equal(other(x), model(x))
    other(x).sum().backward()
    assert other[0].weight_orig.grad is not None
    assert model[0].weight_orig.grad is None


def watch_deepcopy(patch):
    """What deepcopy is asked for from here on."""
    given, original = [], copy.deepcopy
    patch.setattr(copy, "deepcopy", lambda value, memo=None: given.append(value) or original(value, memo))
    return given


def test_no_lane_is_given_to_deepcopy(monkeypatch):
    """Steps, not seconds: deepcopy is asked for tensors alone, equally often for each lane."""
    counts = []
    for lanes in (50, 500):
        model = nn.ModuleList(nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2)) for _ in range(lanes))
        with monkeypatch.context() as patch:
            given = watch_deepcopy(patch)
            sharing_copy(model)
        assert not [value for value in given if isinstance(value, (nn.Module, dict, list))]
        counts.append(len(given) / lanes)
    assert counts[0] == counts[1]
