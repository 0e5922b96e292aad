"""Registered buffers that forward assigns (``self.center = 0.9 * self.center + ...``): as in the original after every step, or refused."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hazards import fuse, handled, refused
from torch import Tensor, nn

import checks
import fxfuse
from checks import randn, randomized
from fxfuse.launches import count
from fxfuse.weights import packing

X = randn(5, 4)


def assert_same_state(fused: nn.Module, model: nn.Module, where: str) -> None:
    """Every buffer of the original, saved or not, as it is found in both; and nothing with a history."""
    checks.assert_same_buffers(fused, model, where)
    saved = fxfuse.original_state_dict(fused)
    assert [*saved] == [*model.state_dict()]
    for name, want in model.named_buffers():
        path, _, own = name.rpartition(".")
        got = getattr(fused.get_submodule(path), own)
        assert (got.shape, got.dtype, got.requires_grad) == (want.shape, want.dtype, want.requires_grad), name
        checks.assert_close(got.double(), want.double(), f"{where}: {name}")
    assert not any(buffer.requires_grad for buffer in fused.buffers())


def assert_same_steps(model: nn.Module, fused: nn.Module, *, lr: float = 1e-3) -> None:
    """Training, evaluation, two forwards before one backward, and training again: outputs, gradients, buffers."""
    for each in (model, fused):
        each.train()
    optimizers = [torch.optim.SGD(each.parameters(), lr) for each in (model, fused)]
    for step in range(6):
        xs = [randn(3 + step, 4, seed=10 * step + n) for n in range(2 if step in (2, 5) else 1)]
        if step == 3:
            for each in (model, fused):
                each.eval()
            with torch.no_grad():
                checks.assert_close(fused(xs[0]), model(xs[0]), "output in eval mode")
            assert_same_state(fused, model, "after eval mode")
            for each in (model, fused):
                each.train()
        outs = []
        for each, optimizer in zip((model, fused), optimizers, strict=True):
            optimizer.zero_grad()
            given = [x.clone().requires_grad_() for x in xs]
            out = [each(x) for x in given]
            sum(one.square().mean() for one in out).backward()  # type: ignore[union-attr]
            optimizer.step()
            outs.append([*(one.detach() for one in out), *(x.grad for x in given)])
        for number, (want, got) in enumerate(zip(*outs, strict=True)):
            checks.assert_close(got, want, f"step {step}: result {number}", 1e-9)
        assert_same_state(fused, model, f"step {step}")
    weights = fxfuse.original_state_dict(fused)
    for name, parameter in model.named_parameters():
        checks.assert_close(weights[name], parameter.detach(), name, 1e-9)
    assert not fxfuse.report(fused).fallbacks


class Around(nn.Module):
    """Four networks, and buffers of the module around them; ``forward`` is the test's."""

    def __init__(self, forward: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)) for _ in range(4))
        self.own = forward
        self.register_buffer("center", torch.zeros(4, 3))
        self.register_buffer("other", torch.zeros(4, 3), persistent=False)
        self.register_buffer("square", torch.zeros(3, 3))
        self.register_buffer("other_square", torch.zeros(3, 3))
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("seen", torch.tensor(0))

    def forward(self, x: Tensor) -> Any:
        return self.own(self, x)


def hidden(self: Any, x: Tensor) -> Tensor:
    return torch.stack([net(x) for net in self.nets], 1)


def detached(self: Any, x: Tensor) -> Tensor:
    h = hidden(self, x)
    self.center = self.center * 0.9 + 0.1 * h.mean(0).detach()
    return h - self.center


def untracked(self: Any, x: Tensor) -> Tensor:
    h = hidden(self, x)
    with torch.no_grad():
        self.center = torch.lerp(self.center, h.mean(0), 0.1)
        self.steps = self.steps + 1
        self.seen = self.seen + x.shape[0]
    return h * self.center / self.steps


def read_before(self: Any, x: Tensor) -> Tensor:
    """Its values are saved for a backward that comes after they are overwritten."""
    h = hidden(self, x)
    out = torch.tanh(h) * self.center / (1 + self.center.exp().sum())
    self.center = h.detach().mean(0)
    return out


def while_training(self: Any, x: Tensor) -> Tensor:
    """The center of DINO (Caron et al., 2021)."""
    h = hidden(self, x)
    out = F.log_softmax((h - self.center) / 0.3, -1)
    if self.training:
        self.center = self.center * 0.9 + h.detach().mean(0) * 0.1
    return out


def while_evaluating(self: Any, x: Tensor) -> Tensor:
    h = hidden(self, x)
    if not self.training:
        self.other = h.detach().amax(0)
    return h * self.other


def twice(self: Any, x: Tensor) -> Tensor:
    h = hidden(self, x)
    self.center = self.center + h.detach().mean(0)
    first = h * self.center
    self.center = self.center / (1 + self.center.abs().sum())
    return first + h * self.center


def several(self: Any, x: Tensor) -> Tensor:
    h = hidden(self, x)
    self.steps = self.steps + 1
    self.other = 0.9 * self.other + 0.1 * h.detach().std(0)
    self.center = self.center + (h.detach().mean(0) - self.center) / self.steps
    self.square = 0.5 * self.square + h.detach().flatten(0, 1).t() @ h.detach().flatten(0, 1)
    return (h - self.center) / (self.other + 1) @ self.square


def handed_on(self: Any, x: Tensor) -> Tensor:
    """One buffer gets the tensor that the other has held."""
    h = hidden(self, x)
    self.other = self.center
    self.center = h.detach().mean(0)
    return h * self.other + self.center


def handed_on_at_last(self: Any, x: Tensor) -> Tensor:
    h = hidden(self, x)
    before = self.center
    self.center = h.detach().mean(0)
    self.other = before
    return h * self.other + self.center


def exchanged(self: Any, x: Tensor) -> Tensor:
    h = hidden(self, x)
    self.center, self.other = self.other + h.detach().mean(0), self.center * 0.5
    return h + self.center - self.other


def swapped(self: Any, x: Tensor) -> Tensor:
    h = hidden(self, x)
    self.square, self.other_square = self.other_square, self.square
    return h @ self.square


def a_view_of_itself(self: Any, x: Tensor) -> Tensor:
    h = hidden(self, x)
    self.center = self.center.add(h.detach().mean(0)).view(3, 4).view(4, 3)
    self.other = self.other.view(12).view(4, 3)
    return h - self.center.flip(0) * (1 + self.other)


def moved_on(self: Any, x: Tensor) -> Tensor:
    """A queue."""
    h = hidden(self, x)
    self.center = torch.cat([self.center[1:], h.detach().mean((0, 1)).unsqueeze(0)])
    return h - self.center.sum(0)


def written_and_assigned(self: Any, x: Tensor) -> Tensor:
    h = hidden(self, x)
    with torch.no_grad():
        self.center.mul_(0.9)
        self.center = self.center + h.mean(0)
        self.center.clamp_(-0.3, 0.4)
        self.center[0] = 0.25
        self.other = self.other + self.center
        self.other.data.mul_(0.5)
    return h - self.center + self.other


def in_place_alone(self: Any, x: Tensor) -> Tensor:
    """``+=`` sets the name to the very tensor."""
    h = hidden(self, x)
    self.steps += 1
    self.seen += 1
    self.center *= 0.9
    self.center += h.detach().mean(0)
    return h - self.center / self.steps


def assigned_back(self: Any, x: Tensor) -> Tensor:
    h = hidden(self, x)
    kept = self.center
    self.center = h.detach().mean(0)
    out = h * self.center
    self.center = kept
    return out - self.center


def before_it_is_read(self: Any, x: Tensor) -> Tensor:
    h = hidden(self, x)
    self.center = torch.full_like(self.center, 2.0) * h.detach().mean()
    return h * self.center


def never_read(self: Any, x: Tensor) -> Tensor:
    h = hidden(self, x)
    self.center = h.detach().mean(0)
    self.seen = torch.tensor(7)
    return h


def in_other_ways(self: Any, x: Tensor) -> Tensor:
    h = hidden(self, x)
    setattr(self, "center", h.detach().mean(0))  # noqa: B010
    self._buffers["other"] = self.other + 1
    self.register_buffer("steps", self.steps + 2)
    return h - self.center + self.other * self.steps


def as_a_buffer(self: Any, x: Tensor) -> Tensor:
    h = hidden(self, x)
    self.center = nn.Buffer(self.center + h.detach().mean(0))
    return h - self.center


def old_one_returned_inside(self: Any, x: Tensor) -> Tensor:
    """The tensor before goes on as it was."""
    h = hidden(self, x)
    before = self.center
    row = before[1]
    self.center = h.detach().mean(0) + before
    return h * row + before.sum()


ASSIGNED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    f.__name__: f
    for f in (
        detached, untracked, read_before, while_training, while_evaluating, twice, several, handed_on, handed_on_at_last, exchanged,
        swapped, a_view_of_itself, moved_on, written_and_assigned, in_place_alone, assigned_back, before_it_is_read, never_read,
        in_other_ways, as_a_buffer, old_one_returned_inside,
    )
}  # fmt: skip


@pytest.mark.parametrize("name", ASSIGNED)
def test_buffers_of_the_module_around_the_loop(name: str) -> None:
    model = randomized(Around(ASSIGNED[name]))
    fused = handled(model, 2 + 2 * (name == "several") + (name == "swapped"), X)
    assert not any("one after the other" in each.reason for each in fxfuse.report(fused).refused)
    assert_same_steps(model, fuse(model, X))


class Lane(nn.Module):
    """A layer with statistics of its own; ``forward`` is the test's."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.own = forward
        self.register_buffer("center", torch.zeros(3))
        self.register_buffer("table", torch.zeros(2, 3), persistent=False)
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.own(self, x)


class Lanes(nn.Module):
    def __init__(self, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(Lane(forward) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([net(x) for net in self.nets], 1)


def lane_average(self: Any, x: Tensor) -> Tensor:
    h = self.layer(x)
    out = h * self.center
    with torch.no_grad():
        self.center = torch.lerp(self.center, h.mean(0), 0.1)
        self.steps = self.steps + 1
    return out + h


def lane_while_training(self: Any, x: Tensor) -> Tensor:
    h = self.layer(x)
    if self.training:
        self.center = self.center * 0.9 + 0.1 * x.mean() + h.detach().mean(0)
        self.table = torch.stack([self.table[1], self.center])
    return torch.tanh(h - self.center) * self.table.sum(0)


def lane_handed_on(self: Any, x: Tensor) -> Tensor:
    h = self.layer(x)
    self.table = torch.cat([self.center.unsqueeze(0), self.table[:1]])
    self.center = h.detach().mean(0)
    return h + self.table.mean(0) * self.center


def lane_in_place(self: Any, x: Tensor) -> Tensor:
    h = self.layer(x)
    self.steps += 1
    self.center += h.detach().mean(0)
    self.center = self.center / self.steps
    return h - self.center


PER_LANE = {f.__name__: f for f in (lane_average, lane_while_training, lane_handed_on, lane_in_place)}


@pytest.mark.parametrize("name", PER_LANE)
def test_buffers_of_every_lane(name: str) -> None:
    forward = PER_LANE[name]
    if name == "lane_while_training":  # the input would give the center a history

        def forward(self: Any, x: Tensor) -> Tensor:
            h = lane_while_training(self, x.detach())
            return h + self.layer(x)

    model = randomized(Lanes(forward))
    fused = handled(model, 2, X)
    assert count(lambda: fused(X)).total < count(lambda: model(X)).total / 2
    assert_same_steps(model, fuse(model, X))


@pytest.mark.parametrize("options", [{"objective": "launches"}, {"mode": "train"}, {"mode": "infer"}], ids=["launches", "train", "infer"])
def test_neither_model_has_run_when_it_comes_back(options: dict[str, str]) -> None:
    model = randomized(Lanes(lane_average))
    held, before = model.nets[1].center, copy.deepcopy(model.state_dict())
    fused = fxfuse.optimize(model, X, cache=False, **options)
    assert model.nets[1].center is held
    for name, tensor in before.items():
        assert torch.equal(model.state_dict()[name], tensor)
        assert torch.equal(fxfuse.original_state_dict(fused)[name], tensor)
    for seed in range(2):
        checks.assert_close(fused(randn(5, 4, seed=seed)), model(randn(5, 4, seed=seed)), "output")
    assert_same_state(fused, model, "afterwards")


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", ["around", "lanes"])
def test_where_nobody_asks_for_gradients(kind: str, context: Any) -> None:
    model = randomized(Around(several) if kind == "around" else Lanes(lane_average))
    fused = fuse(model, X)
    for seed in range(3):
        x = randn(6, 4, seed=seed)
        with context():
            checks.assert_close(fused(x), model(x), "output")
    assert_same_state(fused, model, "afterwards") if context is torch.no_grad else checks.assert_same_buffers(fused, model, "afterwards")
    assert not fxfuse.report(fused).fallbacks


class Twice(nn.Module):
    """A module that is called twice, and a buffer of a submodule that this one assigns."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Around(detached)

    def forward(self, x: Tensor) -> Tensor:
        first = self.inner(x)
        self.inner.other = self.inner.other + first.detach().mean(0)
        return first + self.inner(x * 2) * self.inner.other


def test_calls_of_one_module_and_buffers_of_another() -> None:
    model = randomized(Twice())
    handled(model, 4, X)
    assert_same_steps(model, fuse(model, X))


def test_a_region_below_the_top_that_is_called_once_or_twice() -> None:
    class Above(nn.Module):
        def __init__(self, calls: int) -> None:
            super().__init__()
            self.inner, self.calls = Around(read_before), calls

        def forward(self, x: Tensor) -> Tensor:
            out = self.inner(x)
            for _ in range(1, self.calls):
                out = out + self.inner(x + out.mean())
            return out * (2.0 if out.sum().item() > 1e9 else 3.0)  # the call around reads data: it stays as it is

    for calls in (1, 2):
        model = randomized(Above(calls))
        fused = handled(model, 2 * calls, X)
        assert fxfuse.report(fused).fused[0].path == "inner"
        assert_same_steps(model, fuse(model, X))


class Saved(Lanes):
    """Importable, as pickle needs it."""

    def __init__(self) -> None:
        super().__init__(lane_average)


def test_copies_files_and_unfused_models_go_on() -> None:
    model = randomized(Saved())
    fused = fuse(model, X)
    for each in (model, fused):
        each(X).sum().backward()
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    made = {"copy": copy.deepcopy(fused), "unfused": fxfuse.unfuse(fused), "loaded": torch.load(file, weights_only=False)}
    for name, each in made.items():
        twin = copy.deepcopy(model)
        assert [*each.state_dict()] == [*(model if name == "unfused" else fused).state_dict()]
        for seed in range(2):
            x = randn(4, 4, seed=seed)
            checks.assert_close(each(x), twin(x), f"{name}: output")
            for path in ("nets.0", "nets.4"):
                checks.assert_close(each.get_submodule(path).center, twin.get_submodule(path).center, f"{name}: {path}")
                assert torch.equal(each.get_submodule(path).steps, twin.get_submodule(path).steps)
    assert_same_state(fused, model, "the fused model itself")
    twin = copy.deepcopy(model)
    model(X)
    fused.load_state_dict(model.state_dict())
    assert_same_state(fused, model, "loaded by original names")
    fresh = fuse(randomized(Saved(), seed=3), X)
    fresh.load_state_dict(fused.state_dict())
    for mine, theirs in zip(fresh.nets, model.nets, strict=True):
        mine.table = theirs.table  # not saved
    for each in (model, fresh):
        each(X)
    assert_same_state(fresh, model, "loaded by packed names")


def test_assigned_from_outside() -> None:
    for made in (Lanes(lane_average), Around(untracked)):
        model = randomized(made)
        fused = fuse(model, X)
        for each in (model, fused):
            holder = each.nets[2] if isinstance(made, Lanes) else each
            holder.center = randn(*holder.center.shape, seed=4)
            each(X)
        assert_same_state(fused, model, "assigned from outside")
        assert_same_steps(model, fused)


@pytest.mark.parametrize("kind", ["around", "lanes"])
def test_a_call_that_falls_back_assigns_it_and_the_next_does_not(kind: str) -> None:
    """What the buffer was before is needed for the backward, in the loop as in the program, whichever runs next."""

    class Flag(Lanes if kind == "lanes" else Around):  # type: ignore[misc]
        twofold = False

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * 2 if self.twofold else x)

    model = randomized(Flag(lane_average if kind == "lanes" else read_before))
    fused = fuse(model, X)
    for step, flags in enumerate([(False, True), (True, False), (True, True), (False, False)]):
        for each in (model, fused):
            each.zero_grad()
            total = torch.zeros(())
            for n, flag in enumerate(flags):
                each.twofold = flag
                total = total + each(randn(5, 4, seed=step + n)).square().sum()
            total.backward()
        wanted = dict(model.named_parameters())
        for name, gradient in packing.original_gradients(fused).items():
            checks.assert_close(gradient, wanted[name].grad, f"step {step}: {name}")
        assert_same_state(fused, model, f"step {step}")
    assert sum(fxfuse.report(fused).fallbacks.values()) == 4


def lane_mean(self: Any, x: Tensor) -> Tensor:
    h = self.layer(x)
    self.center = self.center * 0.9 + 0.1 * h.detach().mean(0)
    return h - self.center


def lane_mean_of_another_dtype(self: Any, x: Tensor) -> Tensor:
    h = self.layer(x)
    self.center = h.detach().mean(0)
    return h - self.center


def test_under_autocast() -> None:
    for made in (Lanes(lane_mean), Around(while_training)):
        model = randomized(made).float()
        fused = fuse(model, X.float())
        for number in range(3):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                for each in (model, fused):
                    each.zero_grad()
                got, want = fused(X.float() + number), model(X.float() + number)
            assert got.dtype is want.dtype
            torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
            got.float().sum().backward()
        assert not fxfuse.report(fused).fallbacks, fxfuse.report(fused)  # by a program of its own
        for name, want in model.state_dict().items():
            torch.testing.assert_close(fxfuse.original_state_dict(fused)[name], want, rtol=2e-2, atol=2e-2)


def test_another_dtype_under_autocast_runs_the_loop() -> None:
    model = randomized(Lanes(lane_mean_of_another_dtype)).float()
    fused = fuse(model, X.float())
    for number in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got, want = fused(X.float() + number), model(X.float() + number)
        assert got.dtype is want.dtype
        assert torch.equal(got, want)
        for mine, theirs in zip(fused.nets, model.nets, strict=True):
            assert torch.equal(mine.center, theirs.center.float())
    assert any("forward assigns self.center a tensor of dtype" in reason for reason in fxfuse.report(fused).fallbacks)


@pytest.mark.parametrize("kind", ["around", "lanes"])
def test_under_torch_compile(kind: str) -> None:
    torch._dynamo.reset()
    model = randomized(Around(untracked) if kind == "around" else Lanes(lane_average))
    fused = fuse(model, X)
    made = torch.compile(fused, backend="aot_eager", fullgraph=True)
    for number in range(3):
        x = randn(5, 4, seed=number)
        got, want = made(x), model(x)
        checks.assert_close(got, want, f"call {number}")
        got.sum().backward()
        assert_same_state(fused, model, f"call {number}")


# -- what is refused ---------------------------------------------------------------------------------------------------------------------


def assigning(change: Callable[[Any, Tensor, Tensor], Any], self: Any, x: Tensor) -> Any:
    h = hidden(self, x)
    out = change(self, x, h)
    return h if out is None else out


def another_shape(self: Any, x: Tensor, h: Tensor) -> None:
    self.center = self.center.sum(0) + h.detach().mean()


def another_dtype(self: Any, x: Tensor, h: Tensor) -> None:
    self.seen = self.seen + h.detach().abs().mean().float() * 0


def other_strides(self: Any, x: Tensor, h: Tensor) -> None:
    self.square = (self.square + h.detach().mean()).t()


def with_history(self: Any, x: Tensor, h: Tensor) -> Tensor:
    before = self.center.detach()
    self.center = before * 0.9 + 0.1 * h.mean(0)
    return h - self.center


def history_of_the_input(self: Any, x: Tensor, h: Tensor) -> None:
    self.steps = self.steps + x.mean()


def an_input(self: Any, x: Tensor, h: Tensor) -> None:
    self.steps = x.detach()[0, 0]


def a_weight(self: Any, x: Tensor, h: Tensor) -> None:
    self.square = self.nets[0][2].weight.detach().view(18)[:9].view(3, 3)


def one_for_two(self: Any, x: Tensor, h: Tensor) -> None:
    self.center = self.other = self.center + h.detach().mean(0)


def a_view_for_another(self: Any, x: Tensor, h: Tensor) -> None:
    self.center = h.detach().mean(0)
    self.other = self.center.view(12).view(4, 3)


def no_longer_saved(self: Any, x: Tensor, h: Tensor) -> None:
    self.center = nn.Buffer(self.center + h.detach().mean(0), persistent=False)


def handed_out(self: Any, x: Tensor, h: Tensor) -> Any:
    self.center = self.center + h.detach().mean(0)
    return h, self.center


def kept_elsewhere(self: Any, x: Tensor, h: Tensor) -> None:
    self.center = self.last = self.center + h.detach().mean(0)


def set_to_none(self: Any, x: Tensor, h: Tensor) -> Tensor:
    self.seen = None
    return h


SIZED = "forward assigns self.sized a tensor whose size follows the input's"
REFUSED = {
    "another_shape": (another_shape, "forward assigns self.center a tensor of shape [3], which was [4, 3]"),
    "another_dtype": (another_dtype, "forward assigns self.seen a tensor of dtype torch.float32, which was torch.int64"),
    "other_strides": (other_strides, "forward assigns self.square a tensor of strides (1, 3), which had (3, 1)"),
    "with_history": (with_history, "forward assigns self.center a tensor with a gradient history; with detach()"),
    "history_of_the_input": (history_of_the_input, "forward assigns self.steps a tensor with a gradient history where the input"),
    "an_input": (an_input, "forward assigns self.steps an input, or a view of one"),
    "a_weight": (a_weight, "forward assigns self.square what shares its memory with nets.0.2.weight"),
    "one_for_two": (one_for_two, "a tensor that another buffer is assigned, too, or a view of it"),
    "a_view_for_another": (a_view_for_another, "a tensor that another buffer is assigned, too, or a view of it"),
    "no_longer_saved": (no_longer_saved, "forward changes self._non_persistent_buffers_set"),
    "handed_out": (handed_out, "forward assigns self.center a tensor that it hands out, too"),
    "kept_elsewhere": (kept_elsewhere, "forward assigns self.center a tensor that it hands out, too"),
    "set_to_none": (set_to_none, "forward changes self.seen"),
}  # fmt: skip


def said_with_a_line(fused: nn.Module, reason: str) -> bool:
    return any(reason in str(each) and "(test_assigned_buffers.py:" in str(each) for each in fxfuse.report(fused).refused)


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_form_is_refused(name: str) -> None:
    change, reason = REFUSED[name]
    model = randomized(Around(partial(assigning, change)))
    fused = refused(model, reason, X, line=False)
    assert said_with_a_line(fused, reason) or reason.startswith("forward changes"), fxfuse.report(fused)


def test_a_buffer_as_large_as_the_batch_is_refused() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        h = hidden(self, x)
        self.sized = h.detach().sum((1, 2))
        return h

    model = Around(forward)
    model.register_buffer("sized", torch.zeros(5))
    fused = refused(randomized(model), SIZED, X, line=False, rows=(3, 5, 7))
    assert said_with_a_line(fused, SIZED)


def test_a_buffer_under_two_names_is_refused() -> None:
    model = randomized(Around(detached))
    model.register_buffer("second", model.center.view(12))
    reason = "forward assigns self.center another tensor, and the one before shares its memory with second"
    fused = refused(model, reason, X, line=False)
    assert said_with_a_line(fused, "shares its memory with second")


def test_a_call_with_hooks_that_reads_it() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.around = Around(detached)
            self.state = Held(self.around)
            self.state.register_forward_hook(lambda module, args, out: None)

        def forward(self, x: Tensor) -> Tensor:
            return self.state(self.around(x))

    class Held(nn.Module):
        def __init__(self, held: nn.Module) -> None:
            super().__init__()
            self.held = (held,)

        def forward(self, x: Tensor) -> Tensor:
            return x - self.held[0].center

    reason = "forward assigns self.around.center, whose very tensor state reads or hands on"
    model = randomized(Reads())
    fused = fuse(model, X)
    assert said_with_a_line(fused, reason), fxfuse.report(fused)
    assert_same_steps(model, fused)


def test_a_module_whose_assignment_has_no_form_stays_a_call() -> None:
    class Mixes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("held", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            before = self.held
            self.held = x.detach().mean((0, 1)).float().double()[:3].clone() if x.sum() > -1e9 else self.held
            return x - before * self.held

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nets = nn.ModuleList(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)) for _ in range(4))
            self.mix = Mixes()

        def forward(self, x: Tensor) -> Tensor:
            return self.mix(hidden(self, x))

    model = randomized(Model())
    fused = handled(model, 2, X)
    assert "mix stays a call of its own" in str(fxfuse.report(fused))
    assert_same_steps(model, fuse(model, X))


# -- checked against the original ----------------------------------------------------------------------------------------------------------


def test_validation_finds_a_lost_assignment(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxfuse.passes.assigning import Assigning
    from fxfuse.passes.updating import Updating

    monkeypatch.setattr(Assigning, "_renew_buffers", Updating._renew_buffers)
    for model in (Around(detached), Lanes(lane_average)):
        fused = fxfuse.optimize(randomized(model), X, objective="launches", tune=False)
        assert not fxfuse.report(fused).fused
        assert re.search("buffer.*center", str(fxfuse.report(fused)), re.DOTALL)


@pytest.mark.parametrize("forward", [read_before, handed_on_at_last])
def test_validation_finds_a_tensor_that_is_overwritten_too_early(forward: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from fxfuse.passes.assigning import Assigning

    monkeypatch.setattr(Assigning, "_looked_at", lambda self: set())
    fused = fxfuse.optimize(randomized(Around(forward)), X, objective="launches", tune=False)
    assert not fxfuse.report(fused).fused, fxfuse.report(fused)


def test_validated_as_a_user_gets_it() -> None:
    for model in (Around(several), Around(handed_on), Lanes(lane_average), nn.Sequential(nn.Linear(4, 4), Lanes(lane_handed_on))):
        model = randomized(model)
        fused = fxfuse.optimize(model, X, objective="launches", cache=False)
        assert fxfuse.report(fused).fused, fxfuse.report(fused)
