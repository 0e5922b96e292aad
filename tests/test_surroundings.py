"""What forward reads beside its arguments: a fused model follows a change of it as the loop does, and comes back when it is undone."""

from __future__ import annotations

import copy
import os
import pickle
import re
import sys
import types
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hazards import X, fuse
from settings_elsewhere import scaled
from torch import Tensor, nn

import fxfuse
from checks import QUICK, assert_close, assert_equal_models, mlp, model_of, randn, randomized

SCALE = 2.0
ACT = torch.tanh
TABLE: dict[str, Any] = {"scale": 2.0, "inner": {"offset": [1.0]}}
SETTINGS = types.SimpleNamespace(scale=2.0)


class Constants:
    """A class that serves as a namespace."""

    scale = 2.0


@dataclass
class Config:
    """What models hold as ``config``."""

    scale: float = 2.0
    name: str = "a"
    steps: list[float] = field(default_factory=lambda: [1.0, 3.0])


def act(out: Tensor) -> Tensor:
    return torch.tanh(out)


def other_act(out: Tensor) -> Tensor:
    return torch.sigmoid(out)


class Slotted:
    """An object without a ``__dict__``."""

    __slots__ = ("scale",)

    def __init__(self) -> None:
        self.scale = 2.0


class Loop(nn.Module):
    """A loop over networks, and a factor that lies somewhere."""

    factor = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(mlp() for _ in range(4))
        self.config, self.table, self.steps, self.held = Config(), {"scale": 2.0, "deep": {"scale": 2.0}}, [2.0, 5.0], ([2.0],)
        self.kinds, self.queue, self.array = {1, 2}, deque([2.0]), np.array([2.0, 3.0])
        self.log: list[Any] = []
        self.slotted = Slotted()

    def forward(self, x: Tensor) -> Tensor:
        out = torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1)
        return self.after(out)

    def after(self, out: Tensor) -> Tensor:
        return out


def made(after: Any) -> nn.Module:
    """A ``Loop`` of a class of its own, whose result goes through ``after(self, out)``."""
    return randomized(type("Made", (Loop,), {"after": after})())


def assert_follows(model: nn.Module, change: Any, back: Any, said: str) -> None:
    """A fused model follows ``change(model)`` by its loop, and takes the fast way again after ``back(model)``."""
    fused = fuse(model)
    trials = [(X, {}), (randn(3, 4, seed=8), {})]
    assert_equal_models(model, fused, trials)
    assert not fxfuse.report(fused).fallbacks
    for each in (model, fused):
        change(each)
    before = fuse_free(fused)
    assert not torch.equal(model(X), before), "the change makes no difference: nothing is tested"
    assert_equal_models(model, fused, trials)
    assert all(said in reason for reason in fxfuse.report(fused).fallbacks), fxfuse.report(fused).fallbacks
    assert fxfuse.report(fused).fallbacks
    for each in (model, fused):
        back(each)
    missed = sum(fxfuse.report(fused).fallbacks.values())
    assert_equal_models(model, fused, trials)
    assert sum(fxfuse.report(fused).fallbacks.values()) == missed, "once all is as it was, the program fits again"


def fuse_free(fused: nn.Module) -> Tensor:
    """What the program gives, whatever has changed."""
    (graph,) = fxfuse.graph(fused).values()
    found: Tensor = graph(X)[0]
    return found


INSIDE: dict[str, tuple[Any, Any, Any, str]] = {
    "an attribute of a configuration": (
        lambda s, out: out * s.config.scale, lambda m: setattr(m.config, "scale", 7.0), lambda m: setattr(m.config, "scale", 4.0 / 2),
        "config.scale was changed after fusing",
    ),
    "an attribute in a slot": (
        lambda s, out: out * s.slotted.scale, lambda m: setattr(m.slotted, "scale", 7.0), lambda m: setattr(m.slotted, "scale", 2.0),
        "slotted.scale was changed after fusing",
    ),
    "a list in a configuration": (
        lambda s, out: out * s.config.steps[1], lambda m: m.config.steps.__setitem__(1, 7.0), lambda m: m.config.steps.__setitem__(1, 3.0),
        "config.steps was changed after fusing",
    ),
    "an attribute by a name that is computed": (
        lambda s, out: out * getattr(s.config, "sca" + "le"), lambda m: setattr(m.config, "scale", 7.0),
        lambda m: setattr(m.config, "scale", 2.0), "config was changed after fusing",
    ),
    "a dict": (
        lambda s, out: out * s.table["scale"], lambda m: m.table.update(scale=7.0), lambda m: m.table.update(scale=2.0),
        "table was changed after fusing",
    ),
    "a dict in a dict": (
        lambda s, out: out * s.table["deep"]["scale"], lambda m: m.table["deep"].update(scale=7.0),
        lambda m: m.table["deep"].update(scale=2.0), "table was changed after fusing",
    ),
    "a key that is new": (
        lambda s, out: out * s.table.get("new", 1.0), lambda m: m.table.update(new=7.0), lambda m: m.table.pop("new"),
        "table was changed after fusing",
    ),
    "a list": (
        lambda s, out: out * s.steps[0], lambda m: m.steps.__setitem__(0, 7.0), lambda m: m.steps.__setitem__(0, 2.0),
        "steps was changed after fusing",
    ),
    "a list in a tuple": (
        lambda s, out: out * s.held[0][0], lambda m: m.held[0].__setitem__(0, 7.0), lambda m: m.held[0].__setitem__(0, 2.0),
        "held was changed after fusing",
    ),
    "a set": (
        lambda s, out: out * len(s.kinds), lambda m: m.kinds.add(7), lambda m: m.kinds.discard(7), "kinds was changed after fusing",
    ),
    "a deque": (
        lambda s, out: out * s.queue[0], lambda m: m.queue.appendleft(7.0), lambda m: m.queue.popleft(), "queue was changed after fusing",
    ),
    "an array": (
        lambda s, out: out * float(s.array[0]), lambda m: m.array.__setitem__(0, 7.0), lambda m: m.array.__setitem__(0, 2.0),
        "array was changed after fusing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", INSIDE)
def test_what_lies_in_attributes(what: str) -> None:
    after, change, back, said = INSIDE[what]
    assert_follows(made(after), change, back, said)


def test_what_lies_in_a_lane() -> None:
    class Scaled(nn.Module):
        def __init__(self, at: int) -> None:
            super().__init__()
            self.net, self.config = mlp(), Config(scale=1.0 + at)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) * self.config.scale

    nets = nn.ModuleList(Scaled(i) for i in range(4))
    model = randomized(model_of(lambda s, x: torch.cat([n(x[:, i : i + 1]) for i, n in enumerate(s.nets)], 1), nets=nets))
    assert_follows(
        model, lambda m: setattr(m.nets[2].config, "scale", 9.0), lambda m: setattr(m.nets[2].config, "scale", 3.0), "nets.2.config.scale"
    )


def test_what_forward_does_not_read_may_change() -> None:
    model = made(lambda s, out: out * s.config.scale)
    fused = fuse(model, strict=True)
    fused.log.append(1.0)
    fused.config.name = "b"
    fused.table["scale"] = 9.0
    assert_close(fused(X), model(X), "the result")


def _set(name: str, value: Any) -> None:
    globals()[name] = value


OUTSIDE: dict[str, tuple[Any, Any, Any, str]] = {
    "a global": (lambda s, out: out * SCALE, lambda: _set("SCALE", 7.0), lambda: _set("SCALE", 2.0), "the global SCALE"),
    "a dict that is global": (
        lambda s, out: out * TABLE["scale"], lambda: TABLE.update(scale=7.0), lambda: TABLE.update(scale=2.0), "the global TABLE",
    ),
    "a list in a dict that is global": (
        lambda s, out: out * TABLE["inner"]["offset"][0], lambda: TABLE["inner"]["offset"].__setitem__(0, 7.0),
        lambda: TABLE["inner"]["offset"].__setitem__(0, 1.0), "the global TABLE",
    ),
    "an object that is global": (
        lambda s, out: out * SETTINGS.scale, lambda: setattr(SETTINGS, "scale", 7.0), lambda: setattr(SETTINGS, "scale", 2.0),
        "the global SETTINGS.scale",
    ),
    "a class as a namespace": (
        lambda s, out: out * Constants.scale, lambda: setattr(Constants, "scale", 7.0), lambda: setattr(Constants, "scale", 2.0),
        "Constants.scale",
    ),
    "an attribute of the model's class": (
        lambda s, out: out * s.factor, lambda: setattr(Loop, "factor", 7.0), lambda: setattr(Loop, "factor", 2.0), "Loop.factor",
    ),
    "a function that is replaced": (
        lambda s, out: act(out), lambda: _set("act", other_act), lambda act=act: _set("act", act), "the global act",
    ),
    "a function of torch's that is replaced": (
        lambda s, out: ACT(out), lambda: _set("ACT", torch.sigmoid), lambda: _set("ACT", torch.tanh), "the global ACT",
    ),
    "the environment": (
        lambda s, out: out * float(os.environ.get("FXFUSE_TEST_SCALE", "2")), lambda: os.environ.update(FXFUSE_TEST_SCALE="7"),
        lambda: os.environ.pop("FXFUSE_TEST_SCALE"), "environ",
    ),
    "a global of a helper elsewhere": (
        lambda s, out: scaled(out), lambda: scaled.__globals__.update(FACTOR=7.0), lambda: scaled.__globals__.update(FACTOR=2.0),
        "the global FACTOR",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", OUTSIDE)
def test_what_lies_outside(what: str) -> None:
    after, change, back, said = OUTSIDE[what]
    changed: list[int] = []

    def once(how: Any) -> Any:  # the two models share it
        def do(model: nn.Module) -> None:
            changed.append(0)
            if len(changed) % 2:
                how()

        return do

    try:
        assert_follows(made(after), once(change), once(back), said)
    finally:
        if len(changed) == 2:
            back()


def test_variables_of_outer_functions() -> None:
    scale, held = 2.0, [3.0]

    def after(self: nn.Module, out: Tensor) -> Tensor:
        return out * scale * held[0]

    model = made(after)
    fused = fuse(model)
    held[0] = 5.0
    assert_close(fused(X), model(X), "a list")
    held[0], scale = 3.0, 7.0
    assert_close(fused(X), model(X), "a number")
    assert fxfuse.report(fused).fallbacks == {"after: held was changed after fusing": 1, "after: scale was changed after fusing": 1}


def test_a_default_that_is_changed() -> None:
    def after(self: nn.Module, out: Tensor, table: dict[str, float] = {"scale": 2.0}) -> Tensor:  # noqa: B006
        return out * table["scale"]

    model = made(after)
    fused = fuse(model)
    assert after.__defaults__ is not None
    after.__defaults__[0]["scale"] = 7.0
    assert_close(fused(X), model(X), "the result")


def test_a_method_replaced_on_its_class() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.net(x))

    nets = nn.ModuleList(Net() for _ in range(4))
    model = randomized(model_of(lambda s, x: torch.cat([n(x[:, i : i + 1]) for i, n in enumerate(s.nets)], 1), nets=nets))
    fused = fuse(model)
    Net.forward = lambda self, x: torch.sigmoid(self.net(x))  # type: ignore[method-assign]
    assert_close(fused(X), model(X), "the result")
    assert fxfuse.report(fused).fallbacks == {"Net.forward was changed after fusing": 1}


def test_copies_know_what_was_recorded() -> None:
    """A copy made after the change is as much behind as the model that it was copied from; each follows its own."""
    model = randomized(Scaling())
    fused = fuse(model)
    early = copy.deepcopy(fused)
    fused.config.scale = model.config.scale = 7.0
    for late in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert_close(late(X), model(X), "a copy made afterwards")
        late.config.scale = 2.0
        assert_close(late(X), early(X), "put back")
    assert not fxfuse.report(early).fallbacks
    assert_close(early(X) * 3.5, model(X), "the copy made before has a configuration of its own")


class Scaling(Loop):
    """A class that pickle finds."""

    def after(self, out: Tensor) -> Tensor:
        return out * self.config.scale * SCALE


def test_a_saved_model_compares_globals_too() -> None:
    model = randomized(Scaling())
    saved = pickle.dumps(fuse(model))
    try:
        _set("SCALE", 7.0)
        loaded = pickle.loads(saved)
        assert_close(loaded(X), model(X), "the result")
        assert fxfuse.report(loaded).fallbacks == {"the global SCALE was changed after fusing": 1}
    finally:
        _set("SCALE", 2.0)


def test_strict_says_so() -> None:
    model = made(lambda s, out: out * s.config.scale)
    fused = fuse(model, strict=True)
    fused(X)
    fused.config.scale = 7.0
    with pytest.raises(fxfuse.FallbackError, match=r"config\.scale was changed after fusing"):
        fused(X)


def test_methods_follow_too() -> None:
    class Both(Loop):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.config.scale

        def predict(self, x: Tensor) -> Tensor:
            return torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1) - self.config.scale

    model = randomized(Both())
    fused = fuse(model, methods=["predict"])
    assert_close(fused.predict(X), model.predict(X), "before")
    assert not fxfuse.report(fused).fallbacks
    fused.config.scale = model.config.scale = 7.0
    assert_close(fused.predict(X), model.predict(X), "predict")
    assert_close(fused(X), model(X), "forward")


@pytest.mark.parametrize(
    "how",
    [torch.get_num_threads, torch.is_anomaly_enabled, torch.initial_seed, torch.are_deterministic_algorithms_enabled],
    ids=lambda function: function.__name__,
)
def test_settings_that_nobody_guards(how: Any) -> None:
    fused = fuse(made(lambda s, out: out * (2.0 if how() else 1.0)))
    assert not fxfuse.report(fused).fused
    (refusal,) = map(str, fxfuse.report(fused).refused)
    assert refusal.startswith(f"asks torch for a setting that is not guarded ({how.__name__}) (test_surroundings.py:")


STRIDES = {
    "stride": lambda s, x: x * x.stride(0),
    "all strides": lambda s, x: x * x.stride()[0],
    "is_contiguous": lambda s, x: x if x.is_contiguous() else x * 2,
    "storage_offset": lambda s, x: x if x.storage_offset() == 0 else x * 2,
    "as_strided": lambda s, x: x.as_strided((5, 4), (4, 1)),
    "windows": lambda s, x: x.as_strided((x.shape[0], 2, 2), (x.stride(0), 2 * x.stride(1), x.stride(1))).flatten(1),
}


@pytest.mark.parametrize("how", STRIDES)
def test_how_an_input_lies_in_memory(how: str) -> None:
    before = STRIDES[how]

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        x = before(self, x)
        return torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1)

    model = randomized(model_of(forward, nets=nn.ModuleList(mlp() for _ in range(4))))
    fused = fuse(model)
    assert fxfuse.report(fused).fused
    assert_close(fused(X), model(X), "in rows")
    assert not fxfuse.report(fused).fallbacks
    whole = randn(9, 9, seed=3)
    for x in (whole[:5, 1:5], whole[:4, :5].t(), whole[2:7, :4], randn(45, seed=4)[25:].view(5, 4)):
        assert_close(fused(x), model(x), f"strides {x.stride()}, offset {x.storage_offset()}")
    assert all("does not lie in rows, and forward reads how it lies in memory" in said for said in fxfuse.report(fused).fallbacks)


RELYING: dict[str, Callable[[Tensor], Tensor]] = {
    "a view of the input": lambda x: x.view(-1, 2).view(x.shape),
    "a view of a view": lambda x: x[1:].view(-1).mean() + x,
    "a view of what it computes": lambda x: x + torch.tanh(x).view(-1)[:1],
    "a view_as": lambda x: x.sin().view_as(torch.zeros(x.numel())).view(x.shape),
    "a view that is not used": lambda x: (x.view(-1), x)[1],
    "written through a view": lambda x: written(F.leaky_relu(x), lambda y: y.view(-1)),
    "written through a reshape": lambda x: written(F.leaky_relu(x), lambda y: y.reshape(-1)),
    "written through a flatten": lambda x: written(x * 2, torch.flatten),
    "seen through a reshape": lambda x: seen(x * 2),
    "seen through a torch.reshape by name": lambda x: seen(x * 2, lambda y: torch.reshape(input=y, shape=(-1,))),
    "written through a contiguous": lambda x: written(x * 2, torch.Tensor.contiguous),
}
# In every layout the same.
EASY: dict[str, Callable[[Tensor], Tensor]] = {
    "dims are split": lambda x: x.view(-1, 2, 2).flatten(1),
    "a dim more": lambda x: x.exp().view(-1, 1, 4, 1).flatten(1),
    "reshape": lambda x: x.reshape(-1).reshape(x.shape),
    "a column": lambda x: torch.cat([x[:, i].view(-1, 1) for i in range(4)], 1),
    "new memory": lambda x: (x @ torch.eye(4, dtype=x.dtype)).view(-1).view(x.shape),
}


def written(tensor: Tensor, look: Callable[[Tensor], Tensor]) -> Tensor:
    """Half of its numbers replaced through what may be a view of it."""
    look(tensor)[:2].fill_(0.5)
    return tensor


def seen(tensor: Tensor, look: Callable[[Tensor], Tensor] = lambda y: y.reshape(-1)) -> Tensor:
    """Its numbers through what may be a view of it, made before they change."""
    flat = look(tensor)
    tensor.mul_(0.5)
    return flat.view(-1, 4)


def relying(before: Callable[[Tensor], Tensor]) -> tuple[nn.Module, nn.Module]:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        x = before(x)
        return torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1)

    model = randomized(model_of(forward, nets=nn.ModuleList(mlp() for _ in range(4))))
    fused = fuse(model)
    assert fxfuse.report(fused).fused
    assert_close(fused(X), model(X), "in rows")
    return model, fused


@pytest.mark.parametrize("most", [0, 16], ids=["the loop", "a program of its own"])
@pytest.mark.parametrize("how", RELYING)
def test_views_and_writes_that_hang_on_the_layout(how: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxfuse.building.adapt._MOST_CALLS", most)
    model, fused = relying(RELYING[how])
    for x in (X, randn(5, 4, seed=3)):
        assert_close(fused(x), model(x), "in rows")
    assert not fxfuse.report(fused).fallbacks
    crooked, same = randn(4, 5, seed=3).t(), randn(4, 5, seed=3).t()
    try:
        want = model(crooked)
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=re.escape(str(error)[:60])):
            fused(same)
    else:
        assert_close(fused(same), want, "crooked")
    assert torch.equal(same, crooked)  # written through, or not
    if not most:
        assert "does not lie in rows, and forward views it" in " ".join(fxfuse.report(fused).fallbacks)


@pytest.mark.parametrize("how", EASY)
def test_views_that_any_layout_has(how: str) -> None:
    model, fused = relying(EASY[how])
    for x in (randn(4, 5, seed=3).t(), randn(9, 9, seed=3)[:5, 1:5], randn(1, 4, seed=2).expand(5, 4)):
        assert_close(fused(x), model(x), "crooked")
    assert not fxfuse.report(fused).fallbacks


def test_gaps_are_gone_after_the_first_computation() -> None:
    model, fused = relying(RELYING["a view of what it computes"])
    for x in (randn(9, 9, seed=3)[:5, 1:5], randn(1, 4, seed=2).expand(5, 4)):
        assert_close(fused(x), model(x), "with gaps")
    assert not fxfuse.report(fused).fallbacks


@pytest.mark.parametrize("most", [0, 16], ids=["the loop", "a program of its own"])
@pytest.mark.parametrize("how", [how for how in RELYING if how.startswith(("written", "seen")) and not how.endswith("a view")])
def test_writes_into_what_was_a_copy_in_the_recording(how: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxfuse.building.adapt._MOST_CALLS", most)

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        x = RELYING[how](x)
        return torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1)

    model = randomized(model_of(forward, nets=nn.ModuleList(mlp() for _ in range(4))))
    fused = fuse(model, randn(4, 5, seed=3).t())
    assert fxfuse.report(fused).fused
    assert_close(fused(randn(4, 5, seed=4).t()), model(randn(4, 5, seed=4).t()), "as recorded")
    assert not fxfuse.report(fused).fallbacks
    for make in (X.clone, lambda: randn(9, 9, seed=3)[:5, 1:5]):
        x, same = make(), make()
        assert_close(fused(same), model(x), "in order")
        assert torch.equal(same, x)
    if not most:
        assert "in another order than recorded, and forward views it, or writes into what was" in " ".join(fxfuse.report(fused).fallbacks)


def test_an_example_that_does_not_lie_in_rows() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        x = (x.mT * 2).view(-1).view(4, -1).mT
        return torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1)

    model = randomized(model_of(forward, nets=nn.ModuleList(mlp() for _ in range(4))))
    x = randn(4, 5, seed=3).t()
    fused = fuse(model, x)
    assert_close(fused(x), model(x), "as recorded")
    assert not fxfuse.report(fused).fallbacks


def test_strides_follow_sizes() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        steps = (x.stride(0), x.stride(1), x.stride(1), x.stride(2))
        x = x.as_strided((x.shape[0], x.shape[1] - 1, 2, 4), steps).sum(2)
        return torch.cat([net(x[..., i : i + 1]) for i, net in enumerate(self.nets)], 2)

    model = randomized(model_of(forward, nets=nn.ModuleList(mlp() for _ in range(4))))
    fused = fuse(model, randn(5, 7, 4))
    assert fxfuse.report(fused).fused
    assert_equal_models(model, fused, [(randn(*shape, 4, seed=2), {}) for shape in [(5, 7), (3, 7), (5, 9), (2, 3)]])


def test_strides_of_what_is_computed() -> None:
    def after(self: nn.Module, out: Tensor) -> Tensor:
        return out.as_strided((2, 2), (4, 1))

    assert "reads memory by strides of a tensor that it computes (as_strided)" in str(fxfuse.report(fuse(made(after))))
    fused = fuse(made(lambda s, out: out * out.t().stride(0)))
    assert "reads the strides of a tensor that does not lie in rows" in str(fxfuse.report(fused))


@pytest.mark.parametrize("how", ["requires_grad", "is_leaf", "grad_fn"])
def test_whether_a_weight_is_trained(how: str) -> None:
    def after(self: nn.Module, out: Tensor) -> Tensor:
        return out * (2.0 if getattr(self.nets[0][0].weight, how) else 1.0)

    model = made(after)
    fused = fuse(model)
    for each in (model, fused):
        each.requires_grad_(False)
    assert_close(fused(X), model(X), "frozen")
    assert f"asks whether a tensor tracks gradients ({how})" in str(fxfuse.report(fused))


def test_a_reshape_that_copies_at_some_sizes_only() -> None:
    model = made(lambda s, out: out.reshape(2, -1))
    x = randn(6, 4)
    fused = fuse(model, x)
    assert fxfuse.report(fused).fused
    for rows in (6, 2, 4, 8):
        x = randn(rows, 4, seed=rows)
        assert fused(x).stride() == model(x).stride()
        fused(x).view(-1)


def test_a_compiled_model_follows() -> None:
    """dynamo guards what the comparison reads, and compiles again."""
    model = randomized(Scaling())
    fused = fuse(model)
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    assert_close(compiled(X), model(X), "before")
    model.config.scale = fused.config.scale = 7.0
    assert_close(compiled(X), model(X), "after")


@pytest.mark.parametrize("hook", ["profile", "trace"])
def test_somebodys_profiler_stays(hook: str) -> None:
    """What ran is noted all the same, and the profiler sees what it would see."""
    seen: list[str] = []
    model = randomized(Scaling())
    switch, ask = (sys.setprofile, sys.getprofile) if hook == "profile" else (sys.settrace, sys.gettrace)
    before = ask()

    def note(frame: Any, event: str, arg: Any) -> None:
        seen.append(frame.f_code.co_name)

    switch(note)  # type: ignore[arg-type]
    try:
        fused = fuse(model)
        assert ask() is note
    finally:
        switch(before)
    assert "optimize" in seen
    try:
        _set("SCALE", 7.0)
        assert_close(fused(X), model(X), "the result")
    finally:
        _set("SCALE", 2.0)


SEEN: list[int] = []


class Counting(nn.Module):
    """Keeps books of its own, and of the module's: it stays a call, in which both go on."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.calls, self.config, self.log = mlp(4, 6, 4), 0, Config(), {"calls": 0}

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.log = {"calls": self.calls}
        SEEN.append(1)
        return self.net(x) * (self.log["calls"] + len(SEEN)) * self.config.scale


def test_what_a_call_that_stays_changes_is_its_own_affair() -> None:
    class Holding(Loop):
        def __init__(self) -> None:
            super().__init__()
            self.counting = Counting()

        def after(self, out: Tensor) -> Tensor:
            return self.counting(out) * self.config.scale

    model = randomized(Holding())
    fused = fuse(model, strict=True)
    assert fxfuse.report(fused).fused
    for n in range(3):
        x = randn(5, 4, seed=n)
        model.counting.calls, before = fused.counting.calls, list(SEEN)
        got = fused(x)
        SEEN[:] = before
        assert_close(got, model(x), f"call {n}")
    fused.counting.config.scale = model.counting.config.scale = 5.0
    model.counting.calls, before = fused.counting.calls, list(SEEN)
    got = fused(X)
    SEEN[:] = before
    assert_close(got, model(X), "its configuration is read when it is called")
    SEEN.clear()


class AskingInference(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Linear(3, 2) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 2 if torch.is_inference_mode_enabled() else x
        return torch.cat([net(x) for net in self.nets], 1)


class AskingGrad(AskingInference):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 3 if torch.is_grad_enabled() else x
        return torch.cat([net(x) for net in self.nets], 1)


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("kind", [AskingInference, AskingGrad])
def test_modes_of_torch_that_forward_asks_for(kind: type[nn.Module], validate: bool) -> None:
    model, x = kind().double(), torch.randn(4, 3, dtype=torch.float64)
    fused = fxfuse.optimize(model, x, objective="launches", tune=False, validate=validate)
    assert not fxfuse.report(fused).fused
    for switch in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with switch():
            assert torch.equal(fused(x), model(x)), switch


def test_what_torch_itself_sets_in_the_environment_is_no_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its compiler notes where its cache is, when it is first imported: in a forward that it takes a derivative in, for one."""
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        scale = float(os.environ.get("FXFUSE_TEST_SCALE", "2"))
        return torch.cat([net(x) for net in self.nets], 1) * scale

    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    model = randomized(model_of(forward, nets=nn.ModuleList(nn.Linear(4, 3) for _ in range(3))))
    fused = fxfuse.optimize(model, randn(5, 4), objective="launches", **QUICK)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    fused(randn(5, 4))
    assert not fxfuse.report(fused).fallbacks
    monkeypatch.setenv("FXFUSE_TEST_SCALE", "7")
    assert_close(fused(randn(5, 4)), model(randn(5, 4)), "another environment")
