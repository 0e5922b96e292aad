"""What a forward does besides returning tensors: caches, lists and dicts that it fills, counters of other modules. It goes on doing so."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import checks
import fxfuse
from fxfuse.models.contents import Contents


class Cache:
    """Keys and values of the calls so far, as text models keep them."""

    def __init__(self):
        self.layers = []

    def update(self, x):
        self.layers.append(x.detach())
        return torch.cat(self.layers)


class Loop(nn.Module):
    """Three networks on one input, and something done to what it is given."""

    def __init__(self, change):
        super().__init__()
        self.nets, self.change = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), change

    def forward(self, x, held):
        self.change(held, x)
        return torch.stack([net(x) for net in self.nets], 1)


class Around(nn.Module):
    """Gives each call something new to fill, and returns what came of it."""

    def __init__(self, make, change):
        super().__init__()
        self.make, self.inner, self.tail = make, Loop(change), nn.ModuleList(nn.Linear(4, 2) for _ in range(3))

    def forward(self, x):
        held = self.make()
        y = self.inner(x, held)
        held = held.layers if isinstance(held, Cache) else held
        return y, list(held.values()) if isinstance(held, dict) else list(held), torch.stack([net(x) for net in self.tail])


CHANGES = {
    "cache": (Cache, lambda held, x: held.update(x)),
    "list": (list, lambda held, x: held.append(x * 2)),
    "dict": (dict, lambda held, x: held.setdefault("seen", x + 1)),
    "nested": (lambda: [[], []], lambda held, x: held[1].append(x * 3)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_call_fills_is_filled(name):
    model = checks.randomized(Around(*CHANGES[name]))
    x = checks.randn(5, 4)
    fused = fxfuse.optimize(model, x, objective="launches", tune=False)
    report = fxfuse.report(fused)
    assert not any("fxfuse failed" in str(each) for each in report.refused), str(report)
    assert any("that it was given" in str(each) for each in report.refused), str(report)
    for data in (x, checks.randn(2, 4, seed=5)):
        checks.assert_same_results(
            checks.run(fused, data, {}, fxfuse.weights.packing.original_gradients), checks.run(model, data, {}, checks.own_gradients), name
        )


@pytest.mark.parametrize("name", CHANGES)
def test_the_callers_own_is_filled_once_a_call_and_not_by_fusing(name):
    make, change = CHANGES[name]
    model = checks.randomized(Loop(change))
    held, other = make(), make()
    fused = fxfuse.optimize(model, (checks.randn(5, 4), held), objective="launches", tune=False)
    for seed in (1, 2):
        x = checks.randn(5, 4, seed=seed)
        checks.assert_close(fused(x, held), model(x, other), name)
        both = [torch.utils._pytree.tree_leaves(vars(each) if isinstance(each, Cache) else each) for each in (held, other)]
        assert len(both[0]) == len(both[1]) > 0
        for got, want in zip(*both):
            checks.assert_close(got, want, name)


class Counting(nn.Module):
    """A module that is only written to."""

    def __init__(self):
        super().__init__()
        self.count, self.cache = 0, Cache()


class Counts(nn.Module):
    def __init__(self, count):
        super().__init__()
        self.nets, self.stats, self.log, self.count = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), Counting(), {"rows": []}, count

    def forward(self, x):
        if self.count == "module":
            self.stats.count += 1
        elif self.count == "object":
            self.stats.cache.update(x)
        elif self.count == "nested":
            self.log["rows"].append(x.shape[0])
        else:
            self.nets[1].seen = getattr(self.nets[1], "seen", 0) + 1
        return torch.stack([net(x) for net in self.nets], 1)

    def counted(self):
        return self.stats.count, len(self.stats.cache.layers), self.log, getattr(self.nets[1], "seen", 0)


@pytest.mark.parametrize("count", ["module", "object", "nested", "lane"])
def test_counters_of_other_modules_go_on(count):
    model, x = checks.randomized(Counts(count)), checks.randn(5, 4)
    before = model.counted()
    fused = fxfuse.optimize(model, x, objective="launches", tune=False)
    assert model.counted() == before
    assert any("forward changes self." in str(each) for each in fxfuse.report(fused).refused)
    for _ in range(2):
        checks.assert_close(fused(x), model(x), count)
    assert fused.counted() == model.counted()


def test_the_neighbour_of_a_module_that_is_written_to_fuses():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = Counts("lane"), nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
            self.head = Loop(lambda held, x: None)

        def forward(self, x):
            return self.one(x), self.head(x, ())

    model = checks.randomized(Pair())
    fused = fxfuse.optimize(model, checks.randn(5, 4), objective="launches", tune=False)
    assert [plan.path for plan in fxfuse.report(fused).fused] == ["head"]


def test_contents_of_objects_in_each_other():
    inner = Cache()
    inner.layers.append(inner)
    outer = {"a": [inner, {1, 2}], "b": (inner, [3])}
    before = Contents((outer, 5, "text", torch.zeros(2)))
    assert before.changed() == ""
    outer["b"][1].append(4)
    assert before.changed() == "list"
    before.restore()
    outer["a"][1].add(7)
    assert before.changed() == "set"
    before.restore()
    inner.extra = 1
    assert before.changed() == "Cache"
    before.restore()
    assert before.changed() == ""
    assert outer == {"a": [inner, {1, 2}], "b": (inner, [3])}
    assert not hasattr(inner, "extra")
