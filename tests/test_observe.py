"""Recording often enough: what is free, what is held to its size, what depends on the data, and how many runs that takes."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from checks import model_of
from fxfuse.models.collector import paused
from fxfuse.recording import observe as module_under_test
from fxfuse.recording.observe import observe, observe_modes, second_batch
from fxfuse.recording.tracer import record


@pytest.fixture
def recordings(monkeypatch):
    """``(rows, training)`` of every recording that is made."""
    made = []

    def counting(model, args, kwargs, *rest):
        made.append((args[0].shape[0] if args and isinstance(args[0], torch.Tensor) and args[0].dim() else None, model.training))
        return record(model, args, kwargs, *rest)

    monkeypatch.setattr(module_under_test, "record", counting)
    return made


def lanes(n=3):
    def forward(self, x):
        return sum(net(x[:, i : i + 1]) for i, net in enumerate(self.nets))

    return model_of(forward, nets=nn.ModuleList(nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1)) for _ in range(n)))


def free(observation, value=0):
    return observation.dynamic.get(value, frozenset())


X = torch.rand(20, 3)


# One mode.


def test_the_batch_is_free_everywhere():
    observation = observe(lanes(), (X,), {})
    trace = observation.trace
    assert not observation.failure
    assert not observation.fixed
    for number, value in enumerate(trace.values):
        expected = frozenset() if value.origin == "attribute" else frozenset({0})
        assert free(observation, number) == expected
    assert observation.flags == (True,) * len([*lanes().modules()])


@pytest.mark.parametrize("size", range(65))
def test_the_second_batch_differs_and_so_do_halves_and_parity(size):
    other = second_batch(size)
    assert 0 < other != size
    assert other <= 2 * size + 1
    assert size < 2 or size // 2 != other // 2


def test_a_loop_over_the_batch_is_held_to_its_size_and_the_layer_inside_is_not():
    def forward(self, x):
        x = self.layer(x)
        return torch.stack([x[i] for i in range(int(x.shape[0]))])

    observation = observe(model_of(forward, layer=nn.Linear(3, 2)), (X,), {})
    root, layer = observation.trace.frames
    assert [*observation.fixed] == [root.index]
    assert observation.fixed[root.index].reason == "one run calls __getitem__, another stack"
    assert not root.poison
    assert not layer.poison
    assert free(observation, layer.leaves[0].value) == frozenset({0})


def test_a_branch_on_the_data_closes_the_module_and_not_the_layer_inside():
    def forward(self, x):
        x = self.layer(x)
        return x * 2 if x[0, 0].item() == self.first else x + 2

    model = model_of(forward, layer=nn.Linear(3, 2), first=0.0)
    model.first = model.layer(X)[0, 0].item()
    observation = observe(model, (X,), {})
    root, layer = observation.trace.frames
    assert root.poison.startswith("its steps depend on the data: one run calls")
    assert root.place is not None
    assert not layer.poison
    assert free(observation, layer.leaves[0].value) == frozenset({0})


def test_a_forward_that_insists_on_its_size_is_held_to_it():
    def forward(self, x):
        assert x.shape[0] == 20, "twenty rows"
        return self.layer(x)

    observation = observe(model_of(forward, layer=nn.Linear(3, 2)), (X,), {})
    assert observation.fixed[0].reason == "the forward fails at batch size 11: AssertionError: twenty rows"
    assert not observation.dynamic
    assert not observation.trace.frames[0].poison


def test_a_forward_that_fails_is_a_failure():
    def forward(self, x):
        return self.layer(x, x)

    observation = observe(model_of(forward, layer=nn.Linear(3, 2)), (X,), {})
    assert observation.failure.startswith("TypeError")


def test_inputs_without_a_batch(recordings):
    observation = observe(model_of(lambda self, x: self.layer(x * 2), layer=nn.Linear(1, 2)), (torch.tensor(3.0).view(()),), {})
    assert observation.failure
    observation = observe(model_of(lambda self, x: x * 2), (torch.tensor(3.0),), {})
    assert not observation.failure
    assert not observation.dynamic
    assert not observation.fixed
    branch = observe(model_of(lambda self, x: x * 2 if x == 3.0 else x + 1), (torch.tensor(3.0),), {})
    assert "depend on the data" in branch.trace.frames[0].poison


# Two modes.


def test_a_model_without_modes_is_recorded_twice(recordings):
    model = lanes()
    train, evaluated = observe_modes(model, (X,), {}, (True, False))
    assert recordings == [(20, True), (11, False)]
    assert evaluated.same_as is train
    assert train.same_as is None
    assert evaluated.trace is train.trace
    assert evaluated.dynamic is train.dynamic
    assert (set(train.flags), set(evaluated.flags)) == ({True}, {False})
    alone = observe(model, (X,), {})
    assert alone.dynamic == train.dynamic
    assert not train.fixed
    assert all(module.training for module in model.modules())


def test_the_order_of_modes_is_kept(recordings):
    model = lanes().eval()
    evaluated, train = observe_modes(model, (X,), {}, (False, True))
    assert recordings == [(20, False), (11, True)]
    assert (set(evaluated.flags), set(train.flags)) == ({False}, {True})
    assert train.same_as is evaluated
    assert not any(module.training for module in model.modules())


def dropout_of_flag(self, x):
    return F.dropout(x, 0.5, self.training)


def reads_the_flag_for_nothing(self, x):
    self.training  # noqa: B018
    return x * 2


def by_closure():
    def inner(module, x):
        return (lambda: x * 2 if module.training else 2 * x)()

    return inner


def sized_in_train(self, x):
    return torch.cat(x.chunk(int(x.shape[0]) // 20 if self.training else 1))


ASKING = {
    "dropout": dropout_of_flag, "for nothing": reads_the_flag_for_nothing, "closure": by_closure(), "sized in train": sized_in_train,
    "wrapped": torch.no_grad()(reads_the_flag_for_nothing),
}  # fmt: skip


@pytest.mark.parametrize("name", ASKING)
def test_a_model_that_asks_for_its_mode_is_recorded_in_each(name, recordings):
    train, evaluated = observe_modes(model_of(ASKING[name]), (X,), {}, (True, False))
    assert sorted(set(recordings)) == [(11, False), (11, True), (20, False), (20, True)]
    assert evaluated.same_as is None
    assert train.trace is not evaluated.trace
    assert free(evaluated) == frozenset({0})


def test_what_one_run_in_each_mode_would_have_missed():
    """chunk(20 // 20) and chunk(1) are the same steps, chunk(11 // 20) is an error."""
    train, evaluated = observe_modes(model_of(sized_in_train), (X,), {}, (True, False))
    assert train.fixed
    assert not train.dynamic
    assert free(evaluated) == frozenset({0})


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm1d(3)])
def test_layers_that_depend_on_the_mode_are_recorded_in_each(layer, recordings):
    train, evaluated = observe_modes(nn.Sequential(nn.Linear(3, 3), layer), (X,), {}, (True, False))
    assert len(recordings) == 4
    assert sorted(set(recordings)) == [(11, False), (11, True), (20, False), (20, True)]
    assert evaluated.same_as is None
    assert free(train) == free(evaluated) == frozenset({0})


def test_a_train_method_of_its_own_is_called_for_each_run(recordings):
    def train(self, mode=True):
        nn.Module.train(self, mode)
        self.factor = 2.0 if mode else 3.0
        return self

    def forward(self, x):
        return x * self.factor

    model = model_of(forward, train, factor=2.0)
    one, other = observe_modes(model, (X,), {}, (True, False))
    assert len(recordings) == 4
    assert [o.trace.events[0].args[1] for o in (one, other)] == [2.0, 3.0]
    assert not one.fixed
    assert not other.fixed
    assert model.factor == 2.0


def test_flags_that_are_neither_are_a_mode_of_their_own(recordings):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model[1].eval()
    train, evaluated, given = observe_modes(model, (X,), {}, (True, False))
    assert given.flags == (True, True, False)
    assert [module.training for module in model.modules()] == [True, True, False]
    assert given.same_as is None
    ops = [[event.kwargs["training"] for event in o.trace.events if event.func.__name__ == "batch_norm"] for o in (train, evaluated, given)]
    assert ops == [[True], [False], [False]]


def test_a_frozen_lane_costs_one_run_more_where_modes_do_not_matter(recordings):
    model = lanes()
    model.nets[1].eval()
    train, evaluated, given = observe_modes(model, (X,), {}, (True, False))
    assert recordings == [(20, True), (11, False), (11, True)]
    assert evaluated.same_as is given.same_as is train
    assert given.flags not in (train.flags, evaluated.flags)


def test_a_model_that_fails_in_one_mode():
    def forward(self, x):
        if not self.training:
            raise RuntimeError("trains only")
        return x * 2

    train, evaluated = observe_modes(model_of(forward), (X,), {}, (True, False))
    assert not train.failure
    assert free(train) == frozenset({0})
    assert evaluated.failure == "RuntimeError: trains only"


def test_nothing_of_the_model_changes():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)).double()
    model[2].eval()
    x = X.double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state, kept = torch.get_rng_state(), x.clone()
    observe_modes(model, (x,), {}, (True, False))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, kept)
    assert [module.training for module in model.modules()] == [True, True, True, False]
    assert all(parameter.grad is None for parameter in model.parameters())


# The garbage collector.


def test_the_collector_is_paused_and_comes_back(monkeypatch):
    seen = []
    monkeypatch.setattr(module_under_test, "record", lambda *args: seen.append(gc.isenabled()) or record(*args))
    assert gc.isenabled()
    observe(lanes(), (X,), {})
    assert gc.isenabled()
    assert seen == [False, False]
    with pytest.raises(KeyError), paused():
        raise KeyError
    assert gc.isenabled()
    with paused(), paused():
        pass
    assert gc.isenabled()
    gc.disable()
    try:
        with paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
