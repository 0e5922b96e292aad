"""Buffers that forward writes, and writes under ``no_grad``: averages, codebooks, target values. As values in the graph, or left alone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hazards import fuse, handled, refused
from torch import Tensor, nn

import checks
import fxfuse
from checks import QUICK, mlp, randn, randomized
from fxfuse.launches import count
from fxfuse.private.pytree import tree_leaves

X = randn(5, 4)


class Averages(nn.Module):
    """Four networks and a buffer with a row for each of them; ``forward`` is the test's."""

    def __init__(self, forward: Callable[[Averages, Tensor], Any], **buffers: Tensor) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)) for _ in range(4))
        self.own = forward
        self.register_buffer("average", torch.zeros(4, 3))
        self.register_buffer("steps", torch.zeros(()))
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Any:
        return self.own(self, x)


def moving_average(self: Averages, x: Tensor) -> Tensor:
    hs = [net(x) for net in self.nets]
    if self.training:
        with torch.no_grad():
            self.average.mul_(0.9).add_(torch.stack(hs).mean(1), alpha=0.1)
    return torch.stack(hs, 1)


def normalized(self: Averages, x: Tensor) -> Tensor:
    """The average is read before and after it is written."""
    hs = torch.stack([net(x) for net in self.nets], 1)
    before = hs - self.average
    self.steps += 1
    self.average.lerp_(hs.detach().mean(0), 0.1)
    self.average /= 1 - 0.9**self.steps
    return before + self.average


def by_rows(self: Averages, x: Tensor) -> Tensor:
    outs = []
    for i, net in enumerate(self.nets):
        h = net(x)
        with torch.no_grad():
            self.average[i] = 0.9 * self.average[i] + 0.1 * h.mean(0)
            self.average[i].clamp_(-0.5, 0.5)
        outs.append(h * self.average[i].sum())
    return torch.cat(outs, 1)


def last_input(self: Averages, x: Tensor) -> Tensor:
    out = torch.cat([net(x) for net in self.nets], 1)
    with torch.no_grad():
        self.average.copy_(x[:1].mean(1, keepdim=True).expand(4, 3))
    return out


def emptied(self: Averages, x: Tensor) -> Tensor:
    out = torch.cat([net(x) for net in self.nets], 1) + self.average.sum()
    self.average.zero_()
    self.steps.fill_(3.0)
    return out


def through_data(self: Averages, x: Tensor) -> Tensor:
    hs = torch.stack([net(x) for net in self.nets], 1)
    if self.training:
        self.average.data.mul_(0.9).add_(hs.mean(0), alpha=0.1)
    return hs - self.average


BUFFERS = {f.__name__: f for f in (moving_average, normalized, by_rows, last_input, emptied, through_data)}


@pytest.mark.parametrize("name", BUFFERS)
def test_a_buffer_of_the_loop_is_written(name: str) -> None:
    model = randomized(Averages(BUFFERS[name]))
    handled(model, 2, X)
    fused = fuse(model, X)  # counting launches has called the other once more
    for seed in range(3):  # training goes on, in copies too
        x = randn(6, 4, seed=seed)
        for each in (model, fused):
            each(x).square().sum().backward()
        checks.assert_same_buffers(fused, model, f"after step {seed}")
    copied = pickle.loads(pickle.dumps(fused)) if name == "moving_average" else fused
    with torch.no_grad():
        checks.assert_close(copied(X), model(X), "output of a copy")
    checks.assert_same_buffers(copied, model, "of a copy")


class Codebook(nn.Module):
    """Vectors that move to what is nearest to them (van den Oord et al., 2017, with moving averages)."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("vectors", torch.zeros(size, width))
        self.register_buffer("counts", torch.zeros(size))

    def forward(self, z: Tensor) -> Tensor:
        code = torch.cdist(z.detach(), self.vectors).argmin(1)
        if self.training:
            with torch.no_grad():
                chosen = F.one_hot(code, self.vectors.shape[0]).to(z.dtype)
                self.counts.mul_(0.9).add_(chosen.sum(0), alpha=0.1)
                self.vectors.mul_(0.9).add_(chosen.t() @ z / (self.counts.unsqueeze(1) + 1e-5), alpha=0.1)
        return z + (self.vectors[code] - z).detach()


class Quantizers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(6, 3) for _ in range(4))
        self.books = nn.ModuleList(Codebook(5, 3) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([book(m(x)) for m, book in zip(self.maps, self.books, strict=True)], 1)


def test_every_lane_writes_its_own_buffers() -> None:
    model, x = randomized(Quantizers()), randn(7, 6)
    fused = handled(model, 4, x)
    assert count(lambda: fused(x)).total < count(lambda: model(x)).total / 2
    fused = fuse(model, x)
    assert sum(not name.startswith("packed.index") for name, _ in fused.named_buffers()) == 2  # both are packed
    for seed in range(4):
        x = randn(7, 6, seed=seed)
        for each in (model, fused):
            each.zero_grad()
            each(x).square().sum().backward()
        checks.assert_same_buffers(fused, model, f"after step {seed}")
        checks.assert_close(fused(x), model(x), "output", 1e-9)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_buffers_are_written_where_nobody_asks_for_gradients(context: Any) -> None:
    model = randomized(Averages(moving_average))
    fused = fxfuse.optimize(model, X, objective="launches", **QUICK)
    assert fxfuse.report(fused).fused
    with context():
        for seed in range(3):
            x = randn(6, 4, seed=seed)
            checks.assert_close(fused(x), model(x), "output")
    checks.assert_same_buffers(fused, model, "afterwards")
    assert not fxfuse.report(fused).fallbacks


def part_returned(self: Averages, x: Tensor) -> Any:
    """A view of it: made when the buffer holds its new contents, which a graph writes at its end."""
    out = moving_average(self, x)
    return out, self.average[:1]


def returned(self: Averages, x: Tensor) -> Any:
    return moving_average(self, x), self.average


def returned_twice(self: Averages, x: Tensor) -> Any:
    """Held before it is written, and read afterwards."""
    average = self.average
    out = moving_average(self, x)
    return {"out": out - average, "average": average, "again": [self.average, self.average * 2, self.average.clone()]}


def with_history(self: Averages, x: Tensor) -> Tensor:
    """The written tensor keeps the history that it had: no graph says that."""
    outs = []
    for net in self.nets:
        h = net(x)
        with torch.no_grad():
            h.mul_(2.0)
        outs.append(h)
    return torch.cat(outs, 1)


def history_of_the_input(self: Averages, x: Tensor) -> Tensor:
    """As long as nobody asks for a gradient of the input, nothing of it shows."""
    y = x * 2
    with torch.no_grad():
        y.add_(1.0)
    return torch.cat([net(y) for net in self.nets], 1)


def view_of_history(self: Averages, x: Tensor) -> Tensor:
    h = torch.cat([net(x) for net in self.nets], 1)
    with torch.no_grad():
        h[:, 1:3].zero_()
    return h


def detached_from_history(self: Averages, x: Tensor) -> Tensor:
    h = torch.cat([net(x) for net in self.nets], 1)
    with torch.no_grad():
        h.detach().zero_()
    return h


def history_written_later(self: Averages, x: Tensor) -> Tensor:
    out = torch.zeros(x.shape[0], 3, dtype=x.dtype)
    for net in self.nets:
        out += net(x)
        with torch.no_grad():
            out.clamp_(max=0.5)
    return out


LEFT = {
    "part_returned": (part_returned, "changes average in forward"), "with_history": (with_history, "without gradient tracking"),
    "history_of_the_input": (history_of_the_input, "without gradient tracking"),
    "view_of_history": (view_of_history, "without gradient tracking"),
    "detached_from_history": (detached_from_history, "without gradient tracking"),
    "history_written_later": (history_written_later, "without gradient tracking"),
}  # fmt: skip


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("forward", [returned, returned_twice])
def test_a_buffer_that_is_written_and_returned(forward: Callable[[Averages, Tensor], Any], validate: bool) -> None:
    """The result is the buffer itself, with its new contents, as in the original."""
    model = randomized(Averages(forward))
    fused = fxfuse.optimize(model, X, objective="launches", tune=False, validate=validate)
    assert fxfuse.report(fused).fused
    model = copy.deepcopy(model)
    for training in (True, False):
        for rows in (5, 2):
            want, got = (tree_leaves(each.train(training)(randn(rows, 4, seed=rows))) for each in (model, fused))
            for index, (a, b) in enumerate(zip(got, want, strict=True)):
                checks.assert_close(a, b, f"output {index}")
            assert [a is fused.average for a in got] == [b is model.average for b in want]
            got[1].mul_(2)
            want[1].mul_(2)
            checks.assert_close(fused.average, model.average, "the buffer")
    assert not fxfuse.report(fused).fallbacks


@pytest.mark.parametrize("name", LEFT)
def test_what_has_no_form_as_a_value_is_left_alone(name: str) -> None:
    forward, reason = LEFT[name]
    refused(randomized(Averages(forward)), reason, X, line=False)


@pytest.mark.parametrize("options", [{"objective": "launches"}, {"objective": "time", "mode": "infer"}], ids=["launches", "time"])
@pytest.mark.parametrize("kind", ["buffer", "not saved", "attribute"])
def test_neither_model_has_run_when_it_comes_back(kind: str, options: dict[str, str]) -> None:
    def forward(self: Averages, x: Tensor) -> Tensor:
        hs = torch.stack([net(x) for net in self.nets])
        with torch.no_grad():
            self.own_average.mul_(0.9).add_(hs.mean(1))
        return hs

    model = Averages(forward)
    if kind == "attribute":
        model.own_average = torch.ones(4, 3)
    else:
        model.register_buffer("own_average", torch.ones(4, 3), persistent=kind == "buffer")
    model = randomized(model)
    model.own_average = torch.ones(4, 3, dtype=torch.float64)
    fused = fxfuse.optimize(model, X, cache=False, **options)
    for each in (model, fused):
        assert torch.equal(each.own_average, torch.ones(4, 3, dtype=torch.float64))
    for seed in range(2):
        checks.assert_close(fused(randn(5, 4, seed=seed)), model(randn(5, 4, seed=seed)), "output")
        checks.assert_close(fused.own_average, model.own_average, "average")


def test_a_buffer_under_two_names_is_left_alone() -> None:
    model = randomized(Averages(lambda self, x: moving_average(self, x) + self.second.sum()))
    model.second = model.average.view(12)
    refused(model, "changes second in forward", X, line=False)


def test_a_buffer_that_a_call_with_hooks_reads_too() -> None:
    class Shift(nn.Module):
        def forward(self, x: Tensor, by: Tensor) -> Tensor:
            return x + by

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nets = nn.ModuleList(mlp(4) for _ in range(4))
            self.state = Held()
            self.state.register_forward_hook(lambda module, args, out: None)

        def forward(self, x: Tensor) -> Tensor:
            out = torch.cat([net(x) for net in self.nets], 1)
            with torch.no_grad():
                self.state.held.add_(out.mean())
            return self.state(out)

    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("held", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            return x - self.held

    refused(randomized(Reads()), "changes state.held in forward, which state reads", X, line=False)


class Critics(nn.Module):
    """Values that train, and target values of the same networks (Fujimoto et al., 2018, as one forward)."""

    def __init__(self, targets: Callable[[list[Tensor]], Tensor]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 1), nn.LeakyReLU(0.1, inplace=True)) for _ in range(4)
        )
        self.targets = targets

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values = torch.cat([net(x) for net in self.nets], 1)
        with torch.no_grad():
            targets = self.targets([net(x) for net in self.nets])
        return values, targets


def written_places(values: list[Tensor]) -> Tensor:
    out = torch.empty(values[0].shape[0], 4, dtype=values[0].dtype)
    for i, value in enumerate(values):
        out[:, i : i + 1] = value
    return out.clamp_(-0.3, 0.4)


TARGETS: dict[str, tuple[Callable[[list[Tensor]], Tensor], int]] = {
    "all": (lambda values: torch.cat(values, 1), 2), "two": (lambda values: torch.min(values[0], values[1]), 4),
    "written": (written_places, 2), "sum": (lambda values: sum(values[1:], values[0].clone()).mul_(0.9).add_(values[0]), 2),
}  # fmt: skip


@pytest.mark.parametrize("name", TARGETS)
def test_target_values_with_layers_that_write_in_place(name: str) -> None:
    targets, heavy = TARGETS[name]
    model = randomized(Critics(targets))
    fused = handled(model, 2 * heavy, X)
    for each in (model, fused):
        assert not each(X)[1].requires_grad


def test_a_module_whose_write_has_no_form_as_a_value_stays_a_call() -> None:
    class Mixes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("held", torch.zeros(4, 2))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.held.unfold(0, 2, 2)[0].add_(x.mean())
            return x - self.held.sum()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nets = nn.ModuleList(mlp(4) for _ in range(4))
            self.mix = Mixes()

        def forward(self, x: Tensor) -> Tensor:
            return self.mix(torch.cat([net(x) for net in self.nets], 1))

    fused = handled(randomized(Model()), 2, X)
    assert "mix stays a call of its own: writes into a view made by unfold" in str(fxfuse.report(fused))


def spread(self: Averages, x: Tensor) -> Tensor:
    """The buffer's rows, copied by ``contiguous``, are needed for a backward that comes after they are written."""
    outs = []
    for i, net in enumerate(self.nets):
        row = self.average[i : i + 1].expand(x.shape[0], -1).contiguous()
        out = torch.tanh(net(x)) * (1.0 + row)
        self.average[i] = out.detach().mean(0)
        outs.append(out)
    return torch.cat(outs, 1)


@pytest.mark.parametrize("validate", [True, False])
def test_a_copy_of_a_buffer_that_is_written_afterwards(validate: bool) -> None:
    model, other = randomized(Averages(spread, average=randn(4, 3))), X + 1.0
    fused = fxfuse.optimize(model, X, objective="launches", tune=False, validate=validate)
    assert fxfuse.report(fused).fused, fxfuse.report(fused)
    for each in (model, fused):
        (each(X) * each(other)).sum().backward()
    checks.assert_close(fused.average, model.average, "average")
    wanted = dict(fxfuse.named_original_parameters(model))
    for name, parameter in fxfuse.named_original_parameters(fused):
        checks.assert_close(parameter.grad, wanted[name].grad, name)
    assert not fxfuse.report(fused).fallbacks


def test_a_call_that_falls_back_keeps_lanes_apart() -> None:
    """What one lane has read is needed for its backward; the next lane writes its own buffer, in the same pack."""

    class Lane(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)
            self.register_buffer("mean", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(x)
            self.mean += h.detach().mean(0)
            return h * self.mean

    class Model(nn.Module):
        twofold = False

        def __init__(self) -> None:
            super().__init__()
            self.nets = nn.ModuleList(Lane() for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([net(x * 2 if self.twofold else x) for net in self.nets], 1)

    model = randomized(Model())
    fused = fuse(model, X)
    for seed, twofold in enumerate((False, True, False)):
        for each in (model, fused):
            each.zero_grad()
            each.twofold = twofold
            each(randn(4, 4, seed=seed)).square().sum().backward()
        checks.assert_same_buffers(fused, model, f"step {seed}")
        wanted = dict(fxfuse.named_original_parameters(model))
        for name, parameter in fxfuse.named_original_parameters(fused):
            checks.assert_close(parameter.grad, wanted[name].grad, name)
    assert sum(fxfuse.report(fused).fallbacks.values()) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.long])
def test_single_numbers_under_torch_compile(dtype: torch.dtype) -> None:
    """AOTAutograd loses a ``copy_`` into a floating buffer without dims, which the original does not make."""

    def counting(self: Averages, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.seen += 1
        return torch.cat([net(x) for net in self.nets], 1) / self.seen

    torch._dynamo.reset()
    model = randomized(Averages(counting, seen=torch.tensor(0, dtype=dtype)))
    fused = fxfuse.optimize(model, X, objective="launches", tune=False)
    assert fxfuse.report(fused).fused, fxfuse.report(fused)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    for number in range(1, 4):
        x = randn(5, 4, seed=number)
        got, want = compiled(x), model(x)
        checks.assert_close(got, want, f"call {number}")
        got.sum().backward()
        assert torch.equal(fused.seen, model.seen)
