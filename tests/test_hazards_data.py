"""Forwards that depend on data, sizes, chance, or on what was called before: right on what was not recorded, or refused with a line."""

from __future__ import annotations

import copy
import itertools
import math
import random
import time
from collections import Counter, deque
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hazards import Nets, X, fuse
from torch import Tensor, nn

import fxfuse
from checks import assert_close, randn, randomized

HERE = "test_hazards_data.py:"


class Loop(Nets):
    """``after`` and ``lane`` are where each test puts its hazard."""

    def lane(self, net: nn.Module, x: Tensor, i: int) -> Tensor:
        return net(x[:, i : i + 1])

    def after(self, out: Tensor, x: Tensor) -> Any:
        return out

    def forward(self, x: Tensor) -> Any:
        return self.after(torch.cat([self.lane(net, x, i) for i, net in enumerate(self.nets)], 1), x)


def with_after(after: Any) -> nn.Module:
    return randomized(type("Model", (Loop,), {"after": after})())


def with_lane(lane: Any) -> nn.Module:
    return randomized(type("Model", (Loop,), {"lane": lane})())


def seeded(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def answer(model: nn.Module, x: Tensor, seed: int) -> Any:
    """What a call gives: a tensor, or the words of the exception."""
    seeded(seed)
    try:
        return model(x)
    except Exception as error:
        return type(error)


def right(model: nn.Module, fused: nn.Module, rows: tuple[int, ...] = (1, 2, 3, 4, 8, 12), draws: int = 2) -> None:
    """The same answers, sizes and data and chance that no recording saw."""
    for n, draw in itertools.product(rows, range(draws)):
        x = randn(n, 4, seed=97 * n + draw) + (draw - 0.5) * 3
        got, want = answer(fused, x, n + draw), answer(model, x, n + draw)
        if isinstance(want, Tensor):
            assert_close(got, want, f"{n} rows, draw {draw}")
        else:
            assert got is want, (got, want)


def outcome(
    model: nn.Module, reason: str | tuple[str, ...] | None, rows: tuple[int, ...] = (1, 2, 3, 4, 8, 12), line: bool = True
) -> nn.Module:
    """``reason``: None where it fuses; else a sentence of the report, with a line of this file."""
    fused = fuse(model, X)
    report = fxfuse.report(fused)
    if reason is None:
        assert report.fused, report
    elif isinstance(reason, tuple):  # one of these
        texts = [str(refusal) for refusal in report.refused] + report.facts
        assert any(each in text and (HERE in text or not line) for text in texts for each in reason), texts
    else:
        texts = [str(refusal) for refusal in report.refused] + report.facts
        assert any(reason in text and (HERE in text or not line) for text in texts), texts
    right(model, fused, rows)
    return fused



def halved(out: Tensor) -> Tensor:
    while out.abs().max() > 0.5:
        out = out / 2
    return out


OTHERS = "its steps depend on the data: {} is called with other arguments in two runs"
GIVES = OTHERS + ": what {}() gives depends on the data"

# -- data -----------------------------------------------------------------------------------------------------------------------------

DATA = {
    "if": (lambda self, out, x: out * 2 if x.sum() > 0 else out, "reads tensor data into Python (bool)"),
    "if of a lane": (lambda self, out, x: out if (out[:, 0] > 0).any() else out * 3, "reads tensor data into Python (bool)"),
    "while": (lambda self, out, x: halved(out), "reads tensor data into Python (bool)"),
    "item": (lambda self, out, x: out * x.max().item(), OTHERS.format("mul")),
    "float": (lambda self, out, x: out * float(x.mean()), OTHERS.format("mul")),
    "tolist": (lambda self, out, x: out * sum(x[0].tolist()), OTHERS.format("mul")),
    "numpy": (lambda self, out, x: out * torch.as_tensor(np.tanh(x.detach().numpy())), OTHERS.format("tensor")),
    "nonzero": (lambda self, out, x: out[(x[:, 0] > 0).nonzero()[:, 0]],
                GIVES.format("__getitem__", "nonzero")),
    "boolean mask": (lambda self, out, x: out[x[:, 0] > 0], "makes a tensor whose size depends on the data (getitem)"),
    "masked_select": (lambda self, out, x: torch.masked_select(out, x > 0) * 1,
                      GIVES.format("mul", "masked_select")),
    "where of one argument": (lambda self, out, x: out[torch.where(x[:, 0] > 0)], "makes a tensor whose size depends on the data (where)"),
    "unique": (lambda self, out, x: out.sum() + x.sign().unique().sum(),
               GIVES.format("sum", "unique")),
    "index of a list": (lambda self, out, x: out * [1.0, 2.0, 3.0][int(x.argmax()) % 3], "reads tensor data into Python (int)"),
    "max in Python": (lambda self, out, x: out * max(x[0]), OTHERS.format("gt")),
    "repeat_interleave": (lambda self, out, x: out.repeat_interleave((x[:, 0] > 0).long() + 1, 0),
                          "makes a tensor whose size depends on the data (repeat_interleave)"),
    "assert": (lambda self, out, x: out if not torch.isnan(x).any() else None, "reads tensor data into Python (bool)"),
    "a mask write": (lambda self, out, x: out.masked_fill(x > 0, 0.0), None),
    "where of three": (lambda self, out, x: torch.where(x > 0, out, -out), None),
    "a sort": (lambda self, out, x: out.gather(1, x.argsort(1)), None),
}  # fmt: skip


@pytest.mark.parametrize("name", DATA)
def test_data_after_the_loop(name: str) -> None:
    after, reason = DATA[name]
    outcome(with_after(after), reason)


DATA_LANES = {
    "if": lambda self, net, x, i: net(x[:, i : i + 1]) * (2 if x[0, i] > 0 else 1),
    "skipped lane": lambda self, net, x, i: net(x[:, i : i + 1]) if x[:, i].mean() > 0 else torch.zeros_like(x[:, :1]),
    "item": lambda self, net, x, i: net(x[:, i : i + 1]) * x[0, i].item(),
}


@pytest.mark.parametrize("name", DATA_LANES)
def test_data_in_the_lanes(name: str) -> None:
    outcome(with_lane(DATA_LANES[name]), ("its steps depend on the data: ", "reads tensor data into Python (bool)"))


class Sparse(nn.Module):
    """Mixture of experts: each runs on its rows only, and not at all where it has none."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        out, route = torch.zeros_like(x), (x * 10).long().sum(1) % 3
        for i, expert in enumerate(self.experts):
            chosen = torch.nonzero(route == i).flatten()
            if chosen.numel():
                out = out.index_add(0, chosen, expert(x[chosen]))
        return out


def test_sparse_experts() -> None:
    outcome(randomized(Sparse()), "its steps depend on the data: flatten is called with other arguments in two runs: what nonzero() gives")


# -- sizes ----------------------------------------------------------------------------------------------------------------------------

SIZES = {
    "a branch": lambda self, out, x: out * (1 if x.shape[0] > 3 else 2),
    "parity": lambda self, out, x: out if x.shape[0] % 2 else -out,
    "a loop over rows": lambda self, out, x: torch.stack([out[i] * i for i in range(x.shape[0])]),
    "len": lambda self, out, x: out * len(x),
    "a loop over len": lambda self, out, x: sum(out[i] * (i + 1) for i in range(len(x))),
    "size()": lambda self, out, x: out / x.size()[0],
    "size(0)": lambda self, out, x: out.reshape(x.size(0) * 2, 2),
    "a slice of half": lambda self, out, x: out[: x.shape[0] // 2],
    "ceil": lambda self, out, x: out[: math.ceil(x.shape[0] / 2)],
    "int": lambda self, out, x: out * int(x.shape[0]),
    "numpy's product": lambda self, out, x: out.reshape(int(np.prod(x.shape))),
    "numpy's array of sizes": lambda self, out, x: out / float(np.array(x.shape).sum()),
    "math.sqrt": lambda self, out, x: out / math.sqrt(x.shape[0]),
    "squared": lambda self, out, x: out * x.shape[0] ** 2,
    "min": lambda self, out, x: out[: min(x.shape[0], 4)],
    "a list of that many": lambda self, out, x: out * torch.tensor([float(i) for i in range(x.shape[0])], dtype=out.dtype)[:, None],
    "arange": lambda self, out, x: out * torch.arange(x.shape[0], dtype=out.dtype)[:, None],
    "divmod": lambda self, out, x: out * sum(divmod(x.shape[0], 3)),
    "bit tricks": lambda self, out, x: out * (1 << x.shape[0].bit_length()),
    "a table by size": lambda self, out, x: out * {1: 2.0, 2: 3.0}.get(x.shape[0], 4.0),
    "its text": lambda self, out, x: out * len(str(x.shape[0])),
    "chunk": lambda self, out, x: torch.cat([c.sum(0) for c in out.chunk(2)]),
    "split": lambda self, out, x: torch.stack([s.sum(0) for s in out.split(2)]),
    "zip of rows": lambda self, out, x: sum(a * b.sum() for a, b in zip(out, x)),
    "recursion": lambda self, out, x: out if x.shape[0] < 3 else self.after(out * 2, x[::2]),
    "numel": lambda self, out, x: out / x.numel(),
    "an odd row more": lambda self, out, x: out if x.shape[0] % 2 == 0 else torch.cat([out, out[-1:]]),
    "batch of one": lambda self, out, x: out.squeeze(0),
    "raises": lambda self, out, x: out.view(-1, 8),
    "a range with a step": lambda self, out, x: torch.stack([out[i] for i in range(0, x.shape[0], 2)]),
    "chunks of rows": lambda self, out, x: torch.cat([out[i : i + 8].cumsum(0) for i in range(0, x.shape[0], 8)]),
    "chunks counted": lambda self, out, x: torch.cat([c.cumsum(0) for c in (out[8 * i : 8 * i + 8] for i in range(math.ceil(len(x) / 8)))]),
    "while there are rows": lambda self, out, x: sum(
        out[i : i + 8].cumsum(0).sum() for i in itertools.takewhile(lambda i: i < len(x), range(0, 99, 8))
    ),
    "a bit": lambda self, out, x: out if x.shape[0] & 1 else out * 2,
    "half, compared": lambda self, out, x: out if x.shape[0] / 2 > 1 else out * 2,
    "its root, compared": lambda self, out, x: out if math.sqrt(x.shape[0]) > 1.9 else out * 2,
    "its square, compared": lambda self, out, x: out if x.shape[0] ** 2 > 10 else out * 2,
    "int, compared": lambda self, out, x: out if int(x.shape[0]) > 3 else out * 2,
    "float, compared": lambda self, out, x: out if float(len(x)) > 3 else out * 2,
    "its bits, compared": lambda self, out, x: out if x.shape[0].bit_length() > 2 else out * 2,
    "its text, compared": lambda self, out, x: out if str(x.shape[0]) not in ("1", "2") else out * 2,
    "a formatted key": lambda self, out, x: out * {"n1": 2.0, "n2": 3.0}.get(f"n{x.shape[0]}", 4.0),
    "in a tuple": lambda self, out, x: out * 2 if x.shape[0] in (1, 2) else out,
    "in a set": lambda self, out, x: out * 2 if x.shape[0] in {1, 2} else out,
    "in a range": lambda self, out, x: out * 2 if x.shape[0] in range(3) else out,
    "the shape, compared": lambda self, out, x: out * 2 if x.shape == (2, 4) else out,
    "the shape, a key": lambda self, out, x: out * {(1, 4): 2.0, (2, 4): 3.0}.get(tuple(x.shape), 4.0),
    "the larger": lambda self, out, x: out * max(x.shape[0], 4),
    "reversed": lambda self, out, x: torch.stack([out[i] for i in reversed(range(x.shape[0]))]),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name: str) -> None:
    """They fuse for what they are right for; every other size is answered as before."""
    model = with_after(SIZES[name])
    fused = fuse(model, X)
    right(model, fused)
    report = fxfuse.report(fused)
    assert report.fused or report.refused
    for reason in report.fallbacks:
        assert reason.startswith("input 0 has s"), reason  # "shape (2, 4), recorded (5, 4)", "size 2 in dim 0, recorded > 3"


UNSEEN = {
    "a remainder as an index": lambda self, out, x: out * (2.0, 3.0, 4.0)[x.shape[0] % 3],
    "numpy, compared": lambda self, out, x: out if np.prod(x.shape) > 12 else out * 2,
    "a list by its size": lambda self, out, x: out * ([2.0] * 2 + [3.0] * 97)[x.shape[0]],
    "a slice of a list": lambda self, out, x: sum(([out] * 4)[: x.shape[0]]),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_sizes_that_are_read_unseen(name: str) -> None:
    """Nothing tells a recording of these: the validation at other sizes does."""
    model = with_after(UNSEEN[name])
    fused = fuse(model, X, validate=True)
    right(model, fused)
    assert fxfuse.report(fused).fused or "the rewritten form differs" in str(fxfuse.report(fused))


def test_a_loop_over_rows_says_so() -> None:
    fused = outcome(with_after(SIZES["a loop over rows"]), "is fused for the recorded sizes only: ")
    assert fxfuse.report(fused).fallbacks["input 0 has shape (2, 4), recorded (5, 4)"] == 2


# -- chance ---------------------------------------------------------------------------------------------------------------------------


class Holding(Loop):
    """Generators that the model holds."""

    def __init__(self) -> None:
        super().__init__()
        self.python, self.numpy = random.Random(3), np.random.default_rng(4)
        self.older = np.random.RandomState(5)


CHANCE = {
    "random.random": (lambda self, out, x: out * 2 if random.random() < 0.5 else out, "random"),
    "random.choice": (lambda self, out, x: out * random.choice([1.0, 2.0]), "random"),
    "random.sample of lanes": (lambda self, out, x: out[:, random.sample(range(4), 2)], "random"),
    "random.shuffle": (lambda self, out, x: out[:, sorted(range(4), key=lambda _: random.random())], "random"),
    "np.random.rand": (lambda self, out, x: out * 2 if np.random.rand() < 0.5 else out, "numpy.random"),
    "np.random.randint": (lambda self, out, x: out[:, np.random.randint(4)], "numpy.random"),
}


@pytest.mark.parametrize("name", CHANCE)
def test_chance_outside_of_torch(name: str) -> None:
    after, source = CHANCE[name]
    line = after.__code__.co_firstlineno
    fused = outcome(with_after(after), f"draws random numbers outside of torch ({source}) ({HERE}{line})")
    assert not fxfuse.report(fused).fused


@pytest.mark.parametrize(("name", "source"), [("python", "random"), ("numpy", "numpy.random"), ("older", "numpy.random")])
def test_generators_of_the_model(name: str, source: str) -> None:
    def after(self: Any, out: Tensor, x: Tensor) -> Tensor:
        return out * 2 if getattr(self, name).random() < 0.5 else out

    model = randomized(type("Model", (Holding,), {"after": after})())
    twin = copy.deepcopy(model)
    fused = fuse(model, X)
    assert f"draws random numbers outside of torch ({source})" in str(fxfuse.report(fused))
    for n in range(8):  # drawn from the model's own generator: recording has not moved it
        assert_close(fused(X), twin(X), f"call {n}")


TORCH_CHANCE = {
    "torch.rand": (lambda self, out, x: out * 2 if torch.rand(1) < 0.5 else out, "reads tensor data into Python (bool)"),
    "torch.randint": (lambda self, out, x: out[:, int(torch.randint(4, ()))], "reads tensor data into Python (int)"),
    "torch.randperm": (lambda self, out, x: out[torch.randperm(len(x)).tolist()], "reads tensor data into Python (tolist)"),
    "layer drop": (lambda self, out, x: out if torch.empty(1).uniform_().item() > 0.5 else out * 0, "reads tensor data into Python (item)"),
}


@pytest.mark.parametrize("name", TORCH_CHANCE)
def test_chance_of_torch(name: str) -> None:
    after, reason = TORCH_CHANCE[name]
    outcome(with_after(after), reason)


def test_only_the_layer_that_draws_stays_a_call() -> None:
    class Dropping(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 0 if random.random() < 0.3 else x

    class Model(Loop):
        def __init__(self) -> None:
            super().__init__()
            self.drop = Dropping()

        def after(self, out: Tensor, x: Tensor) -> Tensor:
            return self.drop(out)

    fused = outcome(randomized(Model()), "drop stays a call of its own: draws random numbers outside of torch (random)")
    assert fxfuse.report(fused).fused
    assert not fxfuse.report(fused).fallbacks


# -- what a call leaves for the next one ------------------------------------------------------------------------------------------------

TOTAL = 0
SEEN: list[Any] = []
TABLE: dict[str, float] = {"scale": 2.0}
BY_SIZE: dict[int, Tensor] = {}


def counted(out: Tensor) -> Tensor:
    global TOTAL
    TOTAL += 1
    return out * 2 if TOTAL % 7 == 0 else out


class ClassCounter(Loop):
    calls = 0

    def after(self, out: Tensor, x: Tensor) -> Tensor:
        type(self).calls += 1
        return out if ClassCounter.calls % 7 else out * 2


class ClassList(Loop):
    history: ClassVar[list[Any]] = []

    def after(self, out: Tensor, x: Tensor) -> Tensor:
        self.history.append(len(self.history))
        return out if len(self.history) % 7 else out * 2


def appends(self: Any, out: Tensor, x: Tensor) -> Tensor:
    SEEN.append(float(len(SEEN)))
    return out if len(SEEN) % 7 else out * 2


def counts_in_a_closure() -> Any:
    calls, kept = 0, deque([0])

    def after(self: Any, out: Tensor, x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        kept.append(kept.pop() + 1)
        return out if (calls + kept[0]) % 7 else out * 2

    return after


@pytest.mark.parametrize(("name", "make", "reason"), [
    ("a global number", lambda: with_after(lambda self, out, x: counted(out)), "forward changes the global TOTAL"),
    ("a global list", lambda: with_after(appends), "forward changes the global SEEN"),
    ("a number of the class", lambda: randomized(ClassCounter()), "forward changes ClassCounter.calls"),
    ("a list of the class", lambda: randomized(ClassList()), "forward changes ClassList.history"),
    ("a closure", lambda: with_after(counts_in_a_closure()), "forward changes calls of an outer function"),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_state_outside_of_the_model(name: str, make: Any, reason: str) -> None:
    model = make()
    before = TOTAL, list(SEEN), ClassCounter.calls, list(ClassList.history)
    fused = fuse(model, X)
    assert (TOTAL, SEEN, ClassCounter.calls, ClassList.history) == before  # recording leaves no trace
    texts = [str(refusal) for refusal in fxfuse.report(fused).refused]
    assert any(text.startswith(reason) and HERE in text for text in texts), texts
    for n in range(15):  # each call counts one on for both
        got = fused(X)
        assert any(torch.equal(got, want) for want in (Nets.forward(model, X), Nets.forward(model, X) * 2)), n


def test_a_global_that_is_only_read() -> None:
    fused = outcome(with_after(lambda self, out, x: out * TABLE["scale"] + len(SEEN) * 0), None)
    assert not fxfuse.report(fused).refused


def test_a_global_cache_that_is_filled_once() -> None:
    def after(self: Any, out: Tensor, x: Tensor) -> Tensor:
        if x.shape[1] not in BY_SIZE:
            BY_SIZE[x.shape[1]] = torch.arange(float(x.shape[1]), dtype=torch.float64)
        return out * BY_SIZE[x.shape[1]]

    model = with_after(after)
    right(model, fuse(model, X))
    BY_SIZE.clear()


class Counting(Loop):
    """Attributes that forward changes: a number, a list, a Counter, a tensor with a history, a buffer that is given one."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.calls, self.log, self.counter, self.last = how, 0, [], Counter(), None
        self.register_buffer("running", torch.zeros(4))

    def after(self, out: Tensor, x: Tensor) -> Tensor:
        if self.how == "calls":
            self.calls += 1
            return out * (self.calls % 3 + 1)
        if self.how == "log":
            self.log.append(out.sum())
            return out + len(self.log)
        if self.how == "counter":
            self.counter["calls"] += 1
            return out + self.counter["calls"]
        if self.how == "last":
            before, self.last = self.last, out
            return out if before is None else out + before.mean()
        self.running = self.running * 0.9 + out.mean(0) * 0.1
        return out - self.running


@pytest.mark.parametrize("how", ["calls", "log", "counter", "last", "running"])
def test_attributes_that_forward_changes(how: str) -> None:
    model = randomized(Counting(how))
    fused, twin = fuse(model, X), copy.deepcopy(model)
    texts = [str(refusal) for refusal in fxfuse.report(fused).refused]
    said = f"forward assigns self.{how} a tensor with a gradient history" if how == "running" else f"forward changes self.{how} ({HERE}"
    assert any(text.startswith(said) and HERE in text for text in texts), texts
    for n in range(5):
        x = randn(5, 4, seed=n)
        assert_close(fused(x), twin(x), f"call {n}")
    assert_close(fxfuse.original_state_dict(fused)["running"], twin.running, "the buffer")


DEADLINE = [float("inf")]
TIMES = {
    "a factor": lambda self, out, x: out * (time.perf_counter() * 1e3 % 7 + 1),
    "a filled tensor": lambda self, out, x: out + torch.full_like(out, time.time()),
    "a deadline that all recordings met": lambda self, out, x: out * 2 if time.time() < DEADLINE[0] else out,
}


@pytest.mark.parametrize("name", TIMES)
def test_the_time(name: str) -> None:
    DEADLINE[0] = float("inf")
    model = with_after(TIMES[name])
    fused = fuse(model, X)
    assert "asks for the time (" in str(fxfuse.report(fused))
    one = fused(X)
    DEADLINE[0] = 0.0
    time.sleep(0.002)
    assert not torch.equal(fused(X), one)
