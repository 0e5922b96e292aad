"""Recording one run: what is seen, what is marked, and that nothing is changed by it."""

import copy
import inspect
import math
import random
import warnings
from operator import attrgetter

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from fxfuse.recording import tracer
from fxfuse.recording.sizes import SizeOf, SizeOp
from fxfuse.recording.trace import Ref
from fxfuse.recording.tracer import record


def model_of(forward, **attributes):
    """A module with this forward; tensors, modules and plain values as attributes."""

    class Made(nn.Module):
        def __init__(self):
            super().__init__()
            for name, value in attributes.items():
                if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
                    self.register_buffer(name, value)
                else:
                    setattr(self, name, value)

    Made.forward = forward
    return Made()


def recorded(model, *args, **kwargs):
    trace = record(model, args, kwargs)
    assert not trace.failure, trace.failure
    return trace


def names(trace):
    return [event.func.__name__ for event in trace.events]


def poisons(trace):
    return [event.poison for event in trace.events if event.poison]


def line_of(text):
    """The number of the one line of this file that ends in this comment."""
    found = [i for i, line in enumerate(inspect.getsource(tracer_tests()).splitlines(), 1) if line.rstrip().endswith("# " + text)]
    assert len(found) == 1
    return found[0]


def tracer_tests():
    return inspect.getmodule(line_of)


# What is recorded.


def test_events_values_and_frames_of_a_small_model():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU()).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    trace = recorded(model, x)
    assert names(trace) == ["linear", "relu"]
    values = trace.values
    assert [(v.origin, v.name, v.shape) for v in values] == [
        ("input", "", (5, 3)), ("attribute", "0.weight", (4, 3)), ("attribute", "0.bias", (4,)), ("made", "", (5, 4)), ("made", "", (5, 4)),
    ]  # fmt: skip
    assert trace.events[0].args == (Ref(0), Ref(1), Ref(2))
    assert trace.events[0].out == Ref(3)
    assert trace.events[1].args[0] == Ref(3)
    assert torch.equal(values[4].tensor, model(x))
    assert [(f.path, f.parent, f.start, f.end, f.children) for f in trace.frames] == [
        ("", -1, 0, 2, [1, 2]), ("0", 0, 0, 1, []), ("1", 0, 1, 2, []),
    ]  # fmt: skip
    assert [event.frame for event in trace.events] == [1, 2]
    assert [(f.leaves, f.out) for f in trace.frames] == [([Ref(0)], [Ref(4)]), ([Ref(0)], [Ref(3)]), ([Ref(3)], [Ref(4)])]
    assert all(not event.mutated and not event.poison for event in trace.events)
    assert not any(frame.poison for frame in trace.frames)


CALLS = {
    "one tensor": lambda x: ((x,), {}),
    "a number": lambda x: ((x, 3), {}),
    "by name": lambda x: ((), {"x": x}),
    "nested": lambda x: (({"a": [x, (x + 1, None)]},), {"flag": True}),
    "no tensor": lambda x: ((2,), {}),
    "nothing": lambda x: ((), {}),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("result", ["given", "tuple", "dict", "none"])
def test_arguments_and_results_are_flattened_as_pytrees(call, result):
    x = torch.randn(2, 3)
    args, kwargs = CALLS[call](x)
    inner = model_of(lambda self, *args, **kwargs: {"given": x, "tuple": (x, [1, x]), "dict": {"k": x}, "none": None}[result])

    def forward(self, x):
        return self.inner(*args, **kwargs)

    trace = recorded(model_of(forward, inner=inner), x)
    frame = trace.frames[1]
    flat, spec = tree_flatten((args, kwargs))
    assert frame.in_spec == spec
    assert len(frame.leaves) == len(flat)
    for leaf, value in zip(frame.leaves, flat):
        assert trace.values[leaf.value].tensor is value if isinstance(value, torch.Tensor) else leaf is value
    assert frame.raw == (args, kwargs)
    outputs, out_spec = tree_flatten(inner())
    assert frame.out_spec == out_spec
    restored = tree_unflatten([trace.values[leaf.value].tensor if isinstance(leaf, Ref) else leaf for leaf in frame.out], frame.out_spec)
    for got, want in zip(tree_flatten(restored)[0], outputs):
        assert got is want


def test_a_tensor_is_one_value_however_often_it_is_used():
    weight = nn.Parameter(torch.ones(2, 2))
    model = model_of(lambda self, x: F.linear(F.linear(x, self.a), self.b) + x, a=weight, b=weight)
    trace = recorded(model, torch.randn(3, 2))
    assert [v.name for v in trace.values if v.origin == "attribute"] == ["a"]
    assert trace.events[0].args[1] == trace.events[1].args[1]
    assert trace.events[2].args == (Ref(trace.events[1].out.value), Ref(0))


def test_memory_is_shared_by_views_and_by_nothing_else():
    def forward(self, x):
        y = x * 2
        return y[:, 0], y.t(), y + 1, y.view(-1)

    trace = recorded(model_of(forward), torch.randn(3, 2))
    made = [v for v in trace.values if v.origin == "made"]
    assert len({v.storage for v in (made[0], made[1], made[2], made[4])}) == 1
    assert made[3].storage != made[0].storage


def test_lists_and_tuples_of_tensors():
    def forward(self, x):
        a, b = x.split(1, dim=1)
        values, _indices = x.max(1)
        return torch.cat([a, b, x], dim=1), torch.stack((values, values))

    trace = recorded(model_of(forward), torch.randn(3, 2))
    split, largest, cat, stack = trace.events
    assert cat.args[0] == [split.out[0], split.out[1], Ref(0)]
    assert isinstance(cat.args[0], list)
    assert stack.args[0] == (largest.out[0], largest.out[0])
    assert not poisons(trace)


def test_rows_of_a_tensor_are_an_unbind():
    def forward(self, x):
        first, second = x
        return torch.stack([row * 2 for row in x]) + first - second

    model = model_of(forward)
    x = torch.randn(2, 3)
    trace = recorded(model, x)
    assert names(trace) == ["unbind", "unbind", "mul", "mul", "stack", "add", "sub"]
    assert trace.events[2].args[0] == trace.events[1].out[0]
    assert not poisons(trace)
    assert torch.equal(trace.values[trace.frames[0].out[0].value].tensor, model(x))
    assert "0-d" in record(model_of(lambda self, x: [row for row in x.sum()]), (x,), {}).failure


def test_places_are_the_users_lines():
    inner = nn.Sequential(nn.Linear(2, 2), nn.ReLU())

    def helper(x):
        return x * 2  # helper line

    def forward(self, x):
        y = helper(x)
        z = self.inner(y)  # inner line
        return F.relu(z)  # relu line

    trace = recorded(model_of(forward, inner=inner), torch.randn(3, 2))
    lines = [(event.func.__name__, event.place.line) for event in trace.events]
    inside = line_of("inner line")
    assert lines == [("mul", line_of("helper line")), ("linear", inside), ("relu", inside), ("relu", line_of("relu line"))]
    assert {event.place.file for event in trace.events} == {__file__}
    assert [frame.place and frame.place.line for frame in trace.frames] == [None, inside, inside, inside]


def test_ordinary_calls_need_no_flattening(monkeypatch):
    """Steps, not seconds: one flattening for the arguments of the run, whatever the number of module calls."""
    calls = []
    monkeypatch.setattr(tracer, "tree_flatten", lambda tree: calls.append(tree) or tree_flatten(tree))
    recorded(nn.Sequential(*[nn.Linear(2, 2) for _ in range(20)]), torch.randn(3, 2))
    assert len(calls) == 1


def test_signatures_of_forward_can_be_read_while_recording():
    inner = model_of(lambda self, x, scale=2: x * scale)

    def forward(self, x):
        return self.inner(x, **{name: 3 for name in inspect.signature(self.inner.forward).parameters if name == "scale"})

    trace = recorded(model_of(forward, inner=inner), torch.ones(2))
    assert trace.events[0].args == (Ref(0), 3)


# Sizes.

SIZES = {
    "shape": (lambda x: x.shape[0], SizeOf(0, 0)),
    "size": (lambda x: x.size(1), SizeOf(0, 1)),
    "negative": (lambda x: x.size(-1), SizeOf(0, 1)),
    "all": (lambda x: x.size()[1], SizeOf(0, 1)),
    "numel": (lambda x: x.numel(), SizeOp("mul", (SizeOf(0, 1), SizeOp("mul", (SizeOf(0, 0), 1))))),
    "product": (lambda x: x.shape[0] * x.shape[1], SizeOp("mul", (SizeOf(0, 0), SizeOf(0, 1)))),
    "reflected": (lambda x: 10 - x.shape[0], SizeOp("sub", (10, SizeOf(0, 0)))),
    "floor": (lambda x: x.shape[0] // 2, SizeOp("floordiv", (SizeOf(0, 0), 2))),
    "remainder": (lambda x: 7 % x.shape[0], SizeOp("mod", (7, SizeOf(0, 0)))),
    "minus": (lambda x: -x.shape[0], SizeOp("neg", (SizeOf(0, 0),))),
    "unpacked": (lambda x: next(b for a, b in [x.shape]), SizeOf(0, 1)),
    "math.prod": (lambda x: math.prod(x.shape[:1]), SizeOp("mul", (1, SizeOf(0, 0)))),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_recorded_as_expressions(name):
    read, expression = SIZES[name]

    def forward(self, x):
        return torch.full((2,), read(x)) + x.sum()

    trace = recorded(model_of(forward), torch.randn(4, 3))
    assert trace.events[0].args == ((2,), expression)
    value = read(torch.empty(4, 3))
    assert trace.values[trace.events[0].out.value].tensor.tolist() == [value, value]


def test_sizes_that_leave_the_tracked_world_are_numbers():
    def forward(self, x):
        return x.new_zeros(int(math.sqrt(x.shape[0])), len(range(x.shape[1])))

    assert recorded(model_of(forward), torch.randn(4, 3)).events[0].args == (Ref(0), 2, 3)


def test_comparisons_are_noted_with_frame_and_line():
    def forward(self, x):
        if x.shape[0] > 2 and x.shape[0] != x.shape[1]:  # compared line
            x = x * 2
        return self.inner(x)

    def inner(self, x):
        return x if x.size(1) <= 3 else -x

    trace = recorded(model_of(forward, inner=model_of(inner)), torch.randn(4, 3))
    found = [(c.op, c.left, c.right, c.result, frame) for c, frame, _ in trace.comparisons]
    made = Ref(1)
    assert found == [
        ("gt", SizeOf(0, 0), 2, True, 0), ("ne", SizeOf(0, 0), SizeOf(0, 1), True, 0), ("le", SizeOf(made.value, 1), 3, True, 1),
    ]  # fmt: skip
    assert trace.comparisons[0][2].line == line_of("compared line")


def test_truth_of_a_size_is_a_comparison():
    trace = recorded(model_of(lambda self, x: x * 2 if x.shape[0] else x), torch.randn(4, 3))
    assert [(c.op, c.right, c.result) for c, _, _ in trace.comparisons] == [("ne", 0, True)]


@pytest.mark.parametrize("read", ["dtype", "itemsize", "is_floating_point", "element_size"])
def test_reading_the_dtype_is_noted(read):
    value = attrgetter(read)

    def forward(self, x):
        found = value(x)
        found() if callable(found) else found
        return x + 1

    assert recorded(model_of(forward), torch.ones(2)).reads_dtype
    assert not recorded(model_of(lambda self, x: x + 1), torch.ones(2)).reads_dtype


# What cannot be part of a graph.

READS = {
    "if": lambda x: x if x.sum() > 0 else -x, "item": lambda x: x * x.sum().item(), "float": lambda x: x * float(x.sum()),
    "tolist": lambda x: torch.tensor(x.tolist()), "numpy": lambda x: torch.from_numpy(x.detach().numpy()) + x,
    "nonzero": lambda x: x[x.nonzero()[:, 0]], "in": lambda x: x if 5.0 in x else x * 2, "unique": lambda x: x.unique(),
    "equal": lambda x: x if torch.equal(x, x) else -x, "str": lambda x: x if str(x) else -x, "int": lambda x: x * int(x.sum()),
    "index": lambda x: x * [1, 2, 3][(x.sum() * 0).long()], "assert": lambda x: x if (x == x).all() else None,
}  # fmt: skip


@pytest.mark.parametrize("name", READS)
def test_reading_data_into_python_is_marked(name):
    read = READS[name]
    model = model_of(lambda self, x: read(x))
    x = torch.rand(3) + 1
    trace = recorded(model, x)
    assert [text for text in poisons(trace) if "reads tensor data into Python" in text]
    assert torch.equal(model(x), trace.values[trace.frames[0].out[0].value].tensor)


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def no_grad_write(self, x):
    y = x * 2
    with torch.no_grad():
        y += 1  # which leaves the gradient of y as it was
    return y + x


def leaf_of_computed(self, x):
    weight = nn.Parameter(x * 2)
    return weight + 1


def non_leaf_parameter(self, x):
    weight = nn.Parameter(torch.ones(3))
    weight.data.add_(1)
    weight.mul_(x)
    return weight + 1


def autocast_of_a_cell(self, x):
    with torch.autocast("cpu", torch.bfloat16):
        return torch.gru_cell(x, x.float(), torch.ones(9, 3), torch.ones(9, 3))


def set_data(self, x):
    y = x * 2
    y.data = x * 3
    return y


def backward(self, x):
    self.weight.sum().backward()
    return x * self.weight


POISONED = {
    "no_grad": (no_grad_write, "gradient tracking"), "Function": (lambda self, x: Straight.apply(x * 1.5), "gradient tracking"),
    "out=": (lambda self, x: torch.add(x, x, out=torch.empty(3, 3)), "out="),
    "autocast": (autocast_of_a_cell, "autocast casts inside of gru_cell"),
    "data": (set_data, "sets the data"), "a number": (lambda self, x: x * torch.finfo(torch.result_type(x, x)).eps, "result_type"),
    "backward": (backward, "backward pass"),
}  # fmt: skip


@pytest.mark.parametrize("name", POISONED)
def test_what_a_graph_cannot_repeat_is_marked(name):
    forward, words = POISONED[name]
    trace = recorded(model_of(forward, weight=nn.Parameter(torch.ones(3, 3))), torch.rand(3, 3))
    assert any(words in text for text in poisons(trace)), poisons(trace)


def test_set_grad_enabled_in_forward_is_undone():
    def forward(self, x):
        torch.set_grad_enabled(False)
        return x * 2

    trace = recorded(model_of(forward), torch.ones(3))
    assert torch.is_grad_enabled()
    assert "gradient tracking" in trace.frames[0].poison


def test_recording_tracks_gradients_wherever_it_is_called():
    with torch.no_grad():
        trace = recorded(nn.Linear(2, 2), torch.ones(1, 2))
        assert not torch.is_grad_enabled()
    assert not poisons(trace)
    with torch.inference_mode():
        x = torch.ones(1, 2)
    assert not poisons(recorded(model_of(lambda self, x: x * 2 + 1), x))


def test_tensors_of_unknown_origin_are_constants():
    table = torch.ones(3)

    def forward(self, x):
        return x + table + nn.Parameter(table * 2)

    trace = recorded(model_of(forward), torch.ones(3))
    constants = [v for v in trace.values if v.origin == "constant"]
    assert [v.tensor is table for v in constants] == [True, False]
    assert constants[1].tensor.requires_grad


def test_a_parameter_that_is_no_leaf_is_marked():
    def forward(self, x):
        weight = nn.Parameter(torch.ones(3), requires_grad=False)
        weight.mul_(x)
        return weight + 1

    x = torch.ones(3, requires_grad=True)
    assert "Parameter that is not a leaf" in poisons(recorded(model_of(forward), x))[-1]


def test_a_failing_forward_is_a_failure_not_an_exception():
    def forward(self, x):
        x * 2
        raise ValueError("no such\nthing")

    model = model_of(forward)
    trace = record(model, (torch.ones(2),), {})
    assert trace.failure == "ValueError: no such"
    assert names(trace) == ["mul"]
    assert "forward" not in vars(model)
    assert trace.frames[0].end == 1


# Writes.

WRITES = {
    "setitem": (lambda y, x: y.__setitem__((slice(None), 0), x[:, 0]), [True]),
    "add_": (lambda y, x: y.add_(x), [True]),
    "iadd": (lambda y, x: y.__iadd__(x), [True]),
    "relu_": (lambda y, x: F.relu(y, inplace=True), [True]),
    "view": (lambda y, x: y[:, 0].fill_(1.0), [False, True]),
    "add": (lambda y, x: y.add(x), [False]),
    "copy_": (lambda y, x: y.copy_(x), [True]),
}


@pytest.mark.parametrize("name", WRITES)
def test_writes_are_noted_with_what_they_write(name):
    write, expected = WRITES[name]

    def forward(self, x):
        y = x * 2
        write(y, x)
        return y

    trace = recorded(model_of(forward), torch.randn(3, 2))
    seen = [event for event in trace.events[1:] if event.func.__name__ != "__getitem__" or name == "view"]
    assert [bool(event.mutated) for event in seen] == expected
    for event in seen:
        assert all(number == event.args[0].value for number in event.mutated)


# Nothing is changed.


def random_numbers(self, x):
    random.random()
    numpy.random.rand()
    return F.dropout(x, 0.5) + torch.rand(3)


def counter(self, x):
    self.calls += 1
    return x + 1


def lists(self, x):
    self.seen.append(3)
    self.by_name["k"] = x
    self.names.add("new")
    return x + 1


def new_attribute(self, x):
    self.hidden = x * 2
    return self.hidden


def gone_attribute(self, x):
    del self.calls
    return x + 1


def new_parameter(self, x):
    self.weight = nn.Parameter(torch.zeros(3))
    return x * self.weight


def new_buffer(self, x):
    self.table = self.table * 0.9 + x.mean(0)
    return x + self.table


def buffer_written(self, x):
    self.table += 1
    return x + self.table


def new_module(self, x):
    self.layer = nn.Linear(3, 3)
    return self.layer(x)


def parameter_written(self, x):
    with torch.no_grad():
        self.weight.mul_(0.5)
    return x * self.weight


def data_written(self, x):
    self.weight.data.mul_(0.5)
    return x * self.weight


def slice_of_data_written(self, x):
    self.weight.data[1:].zero_()
    return x * self.weight


def data_replaced(self, x):
    self.weight.data = torch.zeros(3)
    return x * self.weight


def frozen(self, x):
    self.weight.requires_grad_(False)
    return x * self.weight


def gradients(self, x):
    (x * self.weight).sum().backward()
    return x * self.weight


def input_written(self, x):
    x[:, 0] = 0
    return x * 2


def input_relu(self, x):
    return F.relu(x.sub_(0.5), True)


def input_dropped(self, x):
    return F.dropout(x, 0.9, True, True)


def view_of_input_written(self, x):
    x.t()[0].neg_()
    return x * 2


def renormed(self, x):
    return F.embedding(torch.tensor([0, 1]), self.matrix, None, 0.1)


def renormed_by_name(self, x):
    return F.embedding(torch.tensor([0, 1]), self.matrix, max_norm=0.1)


def grad_mode(self, x):
    torch.set_grad_enabled(False)
    return x + 1


def training(self, x):
    self.eval()
    return x + 1


def norm(self, x):
    return self.norm(x)


CHANGES = {
    function.__name__: function
    for function in (
        random_numbers, counter, lists, new_attribute, gone_attribute, new_parameter, new_buffer, buffer_written, new_module,
        parameter_written, data_written, slice_of_data_written, data_replaced, frozen, gradients, input_written, input_relu, input_dropped,
        view_of_input_written, renormed, renormed_by_name, grad_mode, training, norm,
    )
}  # fmt: skip
ATTRIBUTE_CHANGES = {
    "counter": "calls", "lists": None, "new_attribute": "hidden", "gone_attribute": "calls", "new_parameter": "weight",
    "new_buffer": "table", "new_module": "layer",
}  # fmt: skip


def everything(model, x):
    """All state that a recording could touch, bit for bit."""
    attributes = [
        {
            name: [*value.items()] if isinstance(value, dict) else [*value] if isinstance(value, (list, set)) else value
            for name, value in vars(module).items()
        }
        for module in model.modules()
    ]
    tensors = [tensor for module in model.modules() for store in (module._parameters, module._buffers) for tensor in store.values()]
    bits = [
        (t.detach().clone(), t.data_ptr(), t.requires_grad, id(t.grad), None if t.grad is None else t.grad.clone()) for t in (*tensors, x)
    ]
    states = (torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist(), torch.is_grad_enabled())
    return attributes, bits, states


def assert_same(one, two):
    if isinstance(one, torch.Tensor) or isinstance(two, torch.Tensor):
        assert type(one) is type(two)
        assert torch.equal(one, two)
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two)
        for a, b in zip(one, two):
            assert_same(a, b)
    elif isinstance(one, dict):
        assert [*one] == [*two]
        for key in one:
            assert_same(one[key], two[key])
    else:
        assert one is two or one == two


def changing(function):
    torch.manual_seed(0)
    model = model_of(
        function, calls=0, seen=[1, 2], by_name={}, names={"a"}, weight=nn.Parameter(torch.rand(3)), matrix=nn.Parameter(torch.rand(4, 3)),
        table=torch.rand(3), norm=nn.BatchNorm1d(3), layer=nn.Linear(3, 3),
    )  # fmt: skip
    model.register_forward_hook(lambda *args: pytest.fail("a hook was called"))
    model.norm.register_forward_pre_hook(lambda *args: pytest.fail("a hook was called"))
    model.matrix.grad = torch.ones(4, 3)
    model.matrix.grad_before = model.matrix.grad
    return model


@pytest.mark.parametrize("name", CHANGES)
def test_recording_leaves_no_trace(name):
    model, x = changing(CHANGES[name]), torch.rand(5, 3) + 0.1
    before = everything(model, x)
    identities = {(path, key): id(value) for path, module in model.named_modules() for key, value in vars(module).items()}
    trace = recorded(model, x)
    assert_same(everything(model, x), before)
    assert {(path, key): id(value) for path, module in model.named_modules() for key, value in vars(module).items()} == identities
    assert record(model, (x,), {}).failure == ""
    assert len(record(model, (x,), {}).events) == len(trace.events)  # a second recording finds what the first did
    # That the functions do what their names say, when they are called:
    other = copy.deepcopy(model)
    for module in other.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    y = x.clone()
    start = everything(other, y)
    other(y)
    torch_state = torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    assert torch_state is (name != "grad_mode")
    if name == "grad_mode":
        return
    with pytest.raises(AssertionError):
        assert_same(everything(other, y), start)


@pytest.mark.parametrize("name", ATTRIBUTE_CHANGES)
def test_attributes_that_forward_changes_close_the_module(name):
    trace = recorded(changing(CHANGES[name]), torch.rand(5, 3))
    attribute = ATTRIBUTE_CHANGES[name]
    assert trace.frames[0].poison.startswith("forward changes self.")
    assert attribute is None or trace.frames[0].poison == f"forward changes self.{attribute}"


def test_only_the_module_that_changes_is_closed():
    model = nn.Sequential(nn.Linear(3, 3), changing(counter))
    trace = recorded(model, torch.rand(5, 3))
    assert {frame.path: bool(frame.poison) for frame in trace.frames} == {"": False, "0": False, "1": True}


def test_a_forward_on_the_instance_is_kept_and_marked():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    own = model[0].forward = lambda x: x * 3
    trace = recorded(model, torch.ones(1, 2))
    assert names(trace) == ["mul", "relu"]
    assert vars(model[0])["forward"] is own
    assert "replaced on the instance" in trace.frames[1].poison


def test_methods_besides_forward_and_modules_in_lists():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden = [nn.Linear(2, 2)]

        def forward(self, x):
            return self.other(self.hidden[0](x))

        def other(self, x):
            return x + 1

    trace = recorded(Two(), torch.ones(1, 2))
    assert names(trace) == ["linear", "add"]
    assert [frame.path for frame in trace.frames] == [""]
    assert [v.name for v in trace.values if v.origin == "attribute"] == ["hidden.0.weight", "hidden.0.bias"]


def test_scripted_modules_run_and_are_left_alone():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), torch.ones(1, 2))
    model = nn.Sequential(nn.Linear(2, 2), scripted)
    before = {**vars(model[1])}
    model[0].weight.data.fill_(0.5)
    x = torch.ones(1, 2)
    trace = recorded(model, x)
    assert vars(model[1]).keys() == before.keys()
    assert torch.equal(trace.values[trace.frames[0].out[0].value].tensor, model(x))


def test_inference_tensors_are_looked_at_without_version():
    with torch.inference_mode():
        weight = torch.ones(3)
    trace = recorded(model_of(lambda self, x: (x * weight).add_(1)), torch.ones(2, 3))
    assert [bool(event.mutated) for event in trace.events] == [False, True]
