"""Two runs held against each other: what must be equal, what may differ, and where the first difference is said to be."""

import inspect

import pytest
import torch
from torch import nn

from checks import model_of
from fxfuse.recording.sizes import SizeOf
from fxfuse.recording.trace import Ref
from fxfuse.recording.tracer import record
from fxfuse.recording.unify import Unifier, _Different, interchangeable


def runs(model, *inputs):
    """A trace for each input."""
    found = []
    for each in inputs:
        found.append(record(model, each if isinstance(each, tuple) else (each,), {}))
        assert not found[-1].failure, found[-1].failure
    return found


def difference(model, *inputs):
    one, other = runs(model, *inputs)
    return Unifier(one, other).compare(one.frames[0], other.frames[0])


def dynamic(model, *inputs):
    """``{(value, dim), ...}``: what differs in size, after no difference was found."""
    one, other = runs(model, *inputs)
    unifier = Unifier(one, other)
    assert unifier.compare(one.frames[0], other.frames[0]) is None
    return {(value, dim) for value, dims in unifier.dynamic().items() for dim in dims}


def line_of(text):
    lines = [i for i, line in enumerate(inspect.getsource(inspect.getmodule(runs)).splitlines(), 1) if line.rstrip().endswith("# " + text)]
    assert len(lines) == 1
    return lines[0]


X, TALL, OTHER = torch.arange(12.0).view(4, 3) - 3, torch.arange(21.0).view(7, 3) - 3, -torch.arange(12.0).view(4, 3)


def test_sizes_that_differ_are_free_everywhere_they_go():
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    # 0: x, 1 and 2: the parameters, 3: linear, 4: relu
    assert dynamic(model, X, TALL) == {(0, 0), (3, 0), (4, 0)}
    assert dynamic(model, X, OTHER) == set()


def test_a_size_in_an_argument_is_free_when_it_is_tracked():
    assert dynamic(model_of(lambda self, x: x.view(x.shape[0] * 3)), X, TALL) == {(0, 0), (1, 0)}
    assert dynamic(model_of(lambda self, x: x.t().reshape(-1)), X, TALL) == {(0, 0), (1, 1), (2, 0)}


def test_a_size_turned_into_a_number_is_a_difference():
    found = difference(model_of(lambda self, x: x.view(int(x.shape[0]) * 3)), X, TALL)
    assert found.reason == "view is called with other arguments in two runs: 12 against 21"
    assert difference(model_of(lambda self, x: x.view(int(x.shape[0]) * 3)), X, OTHER) is None


def branch(self, x):
    if x.sum() > 0:
        return x * 2
    return x + 2


def loop(self, x):
    for _ in range(x.shape[0]):
        x = x + 1  # looped line
    return x


def chosen(self, x):
    return x * self.factors[int(x.sum() > 0)]


def pick(self, x):
    a, b = x * 2, x * 3
    return torch.stack([a, b if x[0, 0] < 0 else a])


def keyed(self, x):
    return torch.sum(x, **({"dim": 1} if x.sum() > 0 else {"dim": 1, "keepdim": False}))


def outputs(self, x):
    y = x * 2
    return y if x.sum() > 0 else (y, y)


def rank(self, x):
    return self.inner(x.sum(0) if x.sum() > 0 else x.sum((0, 1)))


def number(self, x):
    return x * (0.5 if x.sum() > 0 else 0.25)


def dtype(self, x):
    return x.to(torch.float64 if x.sum() > 0 else torch.float16)


def slices(self, x):
    return x[:, : 1 if x.sum() > 0 else 2]


UNEQUAL = {
    "branch": (branch, OTHER, "one run calls __mul__, another __add__"), "loop": (loop, TALL, "the number of operations differs"),
    "attribute": (chosen, OTHER, "is called with other arguments in two runs: factors.1 against factors.0"),
    "which of two": (pick, OTHER, "with other arguments"), "keywords": (keyed, OTHER, "with other arguments"),
    "structure": (outputs, OTHER, "its outputs differ"),
    "rank": (rank, OTHER, "with other arguments"), "number": (number, OTHER, "0.5 against 0.25"),
    "dtype": (dtype, OTHER, "torch.float64 against torch.float16"), "slices": (slices, OTHER, ": 1 against 2"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNEQUAL)
def test_runs_that_differ(name):
    forward, other, words = UNEQUAL[name]
    model = model_of(forward, factors=nn.ParameterList([nn.Parameter(torch.ones(3)) for _ in range(2)]), inner=nn.Identity())
    found = difference(model, X, other)
    assert found is not None
    for name in ("__mul__", "__add__"):
        words = words.replace(name, name.strip("_"))
    assert words in found.reason
    assert difference(model, X, X.clone()) is None


def test_the_first_difference_has_its_line():
    found = difference(model_of(loop), X, TALL)
    assert found.place.line == line_of("looped line")
    # the shorter run has 4 additions: the fifth of the other is where they part, and the last of the first is before it
    assert found.event == 3


def test_a_constant_is_the_same_object_or_a_difference():
    table = torch.ones(3)
    assert difference(model_of(lambda self, x: x + table), X, TALL) is None
    assert "recording cannot see it" in difference(model_of(lambda self, x: x + nn.Parameter(torch.ones(3))), X, TALL).reason


def test_two_tensors_are_never_one():
    """contiguous of a transposed row hands its argument back; of two rows it makes another tensor. Plainly called, it is a call."""

    def forward(self, x):
        y = x * 2
        return y.t().contiguous(memory_format=torch.contiguous_format) + 1

    one, two, three = (torch.ones(rows, 3) for rows in (1, 2, 3))
    assert difference(model_of(forward), one, two) is not None
    assert difference(model_of(forward), two, one) is not None
    assert difference(model_of(forward), two, three) is None
    plain = model_of(lambda self, x: (x * 2).t().contiguous() + 1)
    assert difference(plain, one, two) is difference(plain, two, one) is None


def test_writes_must_agree():
    def forward(self, x):
        y = x * 2
        z = y[:, 0]
        (y if x.sum() > 0 else z).fill_(1.0)
        return y

    assert difference(model_of(forward), X, OTHER) is not None


def test_foreign_arguments_are_equal_by_identity_or_value():
    nan = float("nan")
    assert difference(model_of(lambda self, x: x.nan_to_num(nan=nan)), X, OTHER) is None
    assert difference(model_of(lambda self, x: torch.zeros(3, device=torch.device("cpu")) + x), X, OTHER) is None
    generator = torch.Generator()
    assert difference(model_of(lambda self, x: x + torch.rand(3, generator=generator)), X, OTHER) is None


def test_frames_below_the_first_can_be_compared_alone():
    inner = nn.Linear(3, 3)
    model = model_of(lambda self, x: self.inner(x) if x.sum() > 0 else self.inner(x) * 2, inner=inner)
    one, other = runs(model, X, OTHER)
    assert Unifier(one, other).compare(one.frames[0], other.frames[0]) is not None
    assert Unifier(one, other).compare(one.frames[1], other.frames[1]) is None


# Train and eval: more must agree.


def modes(model, first=X, second=TALL):
    model.train()
    one = record(model, (first,), {})
    model.eval()
    other = record(model, (second,), {})
    assert not one.failure
    assert not other.failure
    return interchangeable(one, other)


def test_runs_in_two_modes_that_say_the_same():
    unifier = modes(nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1)))
    assert unifier is not None
    assert unifier.dynamic()[0] == frozenset({0})
    sized = modes(model_of(lambda self, x: x * 2 if x.shape[0] > 2 else x))
    assert sized is not None


def no_grad_in_eval(self, x):
    with torch.set_grad_enabled(self.training):
        return x * 2


def compares_in_eval(self, x):
    if not self.training and x.shape[0] > 5:
        return x * 2
    return x * 2


def compares_more_in_eval(self, x):
    return x * 2 if x.shape[0] > (1 if self.training else 2) else x


def other_outcome(self, x):
    return x * 2 if x.shape[0] == 4 else 2 * x


def passes_the_flag(self, x):
    return self.inner(x, self.training)


def reads_dtype_in_eval(self, x):
    return x * 2 if self.training or x.dtype is torch.float32 else x


def reads_data_in_eval(self, x):
    if not self.training:
        float(x.sum())
    return x * 2


def changes_in_eval(self, x):
    self.count = 0 if self.training else 1
    return x * 2


def another_module(self, x):
    return self.one(x) if self.training else self.two(x)


NOT_INTERCHANGEABLE = [
    no_grad_in_eval, compares_in_eval, compares_more_in_eval, other_outcome, passes_the_flag, reads_dtype_in_eval, reads_data_in_eval,
    changes_in_eval, another_module,
]  # fmt: skip


@pytest.mark.parametrize("forward", NOT_INTERCHANGEABLE)
def test_runs_in_two_modes_that_do_not(forward):
    """Where possible, the operations are the same: the two runs are told apart by what else they show."""
    model = model_of(forward, inner=model_of(lambda self, x, flag: x + 1), one=nn.ReLU(), two=nn.ReLU(), count=0)
    assert modes(model) is None
    one, other = record(model.train(), (X,), {}), record(model, (TALL,), {})
    if forward is not other_outcome:
        assert interchangeable(one, other) is not None
    if forward not in (reads_data_in_eval, no_grad_in_eval):
        model.train()
        one = record(model, (X,), {})
        other = record(model.eval(), (TALL,), {})
        assert Unifier(one, other).compare(one.frames[0], other.frames[0]) is None


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm1d(3), nn.RReLU()])
def test_layers_that_depend_on_the_mode(layer):
    assert modes(nn.Sequential(nn.Linear(3, 3), layer)) is None


def test_failures_are_interchangeable_with_nothing():
    def forward(self, x):
        assert x.shape[0] == 4
        return x * 2

    model = model_of(forward)
    good, bad = record(model, (X,), {}), record(model, (TALL,), {})
    assert bad.failure
    assert interchangeable(good, good) is not None
    assert interchangeable(good, bad) is None
    assert interchangeable(bad, bad) is None


def test_the_map_covers_values_of_all_frames():
    one = record(nn.Sequential(nn.Linear(3, 2), nn.ReLU()), (X,), {})
    unifier = interchangeable(one, one)
    assert unifier.values == {number: number for number in range(len(one.values))}
    unifier.same((Ref(0), SizeOf(1, 0)), (Ref(0), SizeOf(1, 0)))
    with pytest.raises(_Different):
        unifier.same(SizeOf(1, 0), SizeOf(1, 1))


def test_unifying_is_one_step_for_each_argument(monkeypatch):
    """Steps, not seconds: twice the layers, twice the comparisons."""
    counts = []
    for layers in (20, 40):
        model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(layers)])
        one, other = runs(model, X, TALL)
        calls = []
        original = Unifier.same
        monkeypatch.setattr(Unifier, "same", lambda self, a, b, original=original, calls=calls: calls.append(a) or original(self, a, b))
        assert Unifier(one, other).compare(one.frames[0], other.frames[0]) is None
        monkeypatch.undo()
        counts.append(len(calls))
    assert counts[1] - 4 == 2 * (counts[0] - 4)


def test_a_method_and_its_function_are_one_operation():
    def forward(self, x):
        return x.mul(2) if x.sum() > 0 else torch.mul(x, 2)

    assert difference(model_of(forward), X, OTHER) is None
