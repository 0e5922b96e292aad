"""Buffers that forward writes or assigns, through ``torch.compile(model, backend="fxfuse")``: with gradients tracked and without."""

from __future__ import annotations

import copy

import pytest
import torch
from compiling import assert_same_step, compiled
from torch import nn

import fxfuse
from checks import assert_close, model_of, randn, randomized

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
LANES = 9


def _one_average(self, x):
    hidden = [net(x[:, i]) for i, net in enumerate(self.nets)]
    with torch.no_grad():
        self.mean.mul_(0.9).add_(torch.stack(hidden).mean((0, 1)), alpha=0.1)
    return torch.stack(hidden, 1) - self.mean


def _average_per_lane(self, x):
    out = []
    for i, net in enumerate(self.nets):
        y = net(x[:, i])
        with torch.no_grad():
            getattr(self, f"mean{i}").mul_(0.9).add_(0.1 * y.mean(0))
        out.append(y - getattr(self, f"mean{i}"))
    return torch.stack(out, 1)


def _rows_of_one_buffer(self, x):
    out = []
    for i, net in enumerate(self.nets):
        y = net(x[:, i])
        with torch.no_grad():
            self.means[i] = 0.9 * self.means[i] + 0.1 * y.mean(0)
        out.append(y - self.means[i])
    return torch.stack(out, 1)


def _one_average_assigned(self, x):
    hidden = [net(x[:, i]) for i, net in enumerate(self.nets)]
    out = torch.stack(hidden, 1) * self.mean
    self.mean = self.mean * 0.9 + 0.1 * torch.stack(hidden).detach().mean((0, 1))
    return out


def _assigned_per_lane(self, x):
    out = []
    for i, net in enumerate(self.nets):
        y = net(x[:, i])
        with torch.no_grad():
            setattr(self, f"mean{i}", torch.lerp(getattr(self, f"mean{i}"), y.mean(0), 0.1))
        out.append(y - getattr(self, f"mean{i}"))
    return torch.stack(out, 1)


def _a_result_written_too(self, x):
    """Not only the buffer is written: also what has a history, where the caller tracks it."""
    out = torch.zeros(x.shape[0], len(self.nets), 4, dtype=x.dtype)
    for i, net in enumerate(self.nets):
        out[:, i] = net(x[:, i]).relu_()
    with torch.no_grad():
        self.mean.lerp_(out.mean((0, 1)), 0.1)
    return out * self.mean


def lanes(forward, **buffers):
    model = model_of(forward, nets=nn.ModuleList(nn.Linear(3, 4) for _ in range(LANES)))
    for name, value in buffers.items():
        model.register_buffer(name, value)
    return randomized(model)


CASES = {
    "one average": lambda: lanes(_one_average, mean=randn(4, seed=5)),
    "an average per lane": lambda: lanes(_average_per_lane, **{f"mean{i}": randn(4, seed=20 + i) for i in range(LANES)}),
    "rows of one buffer": lambda: lanes(_rows_of_one_buffer, means=randn(LANES, 4, seed=5)),
    "a result written too": lambda: lanes(_a_result_written_too, mean=randn(4, seed=5)),
}
ASSIGNED = {
    "one average": lambda: lanes(_one_average_assigned, mean=randn(4, seed=5)),
    "an average per lane": lambda: lanes(_assigned_per_lane, **{f"mean{i}": randn(4, seed=20 + i) for i in range(LANES)}),
}
X = randn(5, LANES, 3)


@pytest.mark.parametrize("name", ASSIGNED)
def test_averages_are_assigned_and_the_loop_is_fused(name):
    """dynamo hands out what is assigned, and sets the buffers itself."""
    model = ASSIGNED[name]()
    call, counting = compiled(model, validate=True)
    for seed in range(3):
        assert_same_step(model, call, randn(5, LANES, 3, seed=seed))
    assert [counting.heavy(index) for index in range(len(counting.graphs))] == [1]
    with torch.no_grad():
        untracked(model, call)
    assert [counting.heavy(index) for index in range(len(counting.graphs))] == [1] * len(counting.graphs)
    assert_same_step(model, call, X)


@pytest.mark.parametrize("validate", [True, False], ids=["validated", "unseen"])
@pytest.mark.parametrize("name", CASES)
def test_averages_are_written_and_the_loop_is_fused(name, validate):
    model = CASES[name]()
    call, counting = compiled(model, validate=validate)
    for seed in range(3):
        assert_same_step(model, call, randn(5, LANES, 3, seed=seed))
    assert [counting.heavy(index) for index in range(len(counting.graphs))] == [1]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            untracked(model, call)
    assert [counting.heavy(index) for index in range(len(counting.graphs))] == [1] * len(counting.graphs)
    assert len(counting.graphs) > 1
    assert_same_step(model, call, X)


@pytest.mark.parametrize("name", CASES)
def test_through_aot_autograd(name):
    model = CASES[name]()
    call = torch.compile(model, backend=fxfuse.backend("aot_eager"), fullgraph=True)
    for seed in range(3):
        assert_same_step(model, call, randn(5, LANES, 3, seed=seed))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            untracked(model, call)
    assert_same_step(model, call, X)


@pytest.mark.parametrize("name", CASES)
def test_the_first_call_tracks_nothing(name):
    model = CASES[name]().eval()
    call, counting = compiled(model, validate=True)
    with torch.no_grad():
        untracked(model, call)
    assert counting.heavy() == 1


def untracked(model, call):
    """Calls without gradients: results and buffers are the model's, several times over."""
    twin = copy.deepcopy(model)
    for seed in range(3):
        x = randn(5, LANES, 3, seed=seed)
        torch.testing.assert_close(call(x), twin(x), rtol=1e-10, atol=1e-12)
        for (key, a), b in zip(model.named_buffers(), twin.buffers()):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=key)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(LANES))

    def forward(self, x):
        return torch.stack([net(x[:, i]) for i, net in enumerate(self.nets)])


@pytest.mark.parametrize("make", [CASES["an average per lane"], lambda: randomized(Normed())])
def test_optimize_after_compile(make):
    """The compiled call has moved the lanes' buffers side by side, and dynamo has marked them."""
    model = make()
    call, _ = compiled(model, validate=True)
    call(X)
    addresses = [buffer.data_ptr() for buffer in model.buffers()]
    fused = fxfuse.optimize(model, X, objective="launches", tune=False)
    assert fxfuse.report(fused).fused
    assert not fxfuse.report(fused).refused
    assert [buffer.data_ptr() for buffer in model.buffers()] == addresses
    for seed in range(3):
        x = randn(5, LANES, 3, seed=seed)
        assert_close(fused(x), model(x), "output")
    for name, tensor in fxfuse.original_state_dict(fused).items():
        assert_close(tensor, model.state_dict()[name], name)
