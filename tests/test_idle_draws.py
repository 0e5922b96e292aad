"""Random numbers that decide nothing (LayerDrop of probability 0) do not keep a loop from fusing; those that may, do."""

import math
import random
import threading

import pytest
import torch
from torch import nn

import fxfuse
from checks import assert_fused_equals, mlp, model_of, randn, randomized
from fxfuse.recording.idle_draws import Drawn, idle_draws_unseen


def layers(draw, rate, compare):
    def forward(self, x):
        outs = []
        for i, net in enumerate(self.nets):
            drawn = draw()
            if self.training and compare(drawn, self.rate):
                continue
            outs.append(net(x[:, i : i + 1]))
        return sum(outs)

    return randomized(model_of(forward, nets=nn.ModuleList(mlp() for _ in range(4)), rate=rate))


DRAWS = {"uniform": lambda: random.uniform(0, 1), "random": lambda: random.random(), "wide": lambda: random.uniform(1, 3) - 0}


@pytest.mark.parametrize("draw", ["uniform", "random"])
@pytest.mark.parametrize("compare", [lambda a, b: a < b, lambda a, b: b > a, lambda a, b: not a >= b], ids=["less", "greater", "not"])
def test_a_layer_that_is_never_dropped(draw, compare):
    random.seed(3)
    before = random.getstate()
    fused = assert_fused_equals(layers(DRAWS[draw], 0.0, compare), randn(5, 4), heavy=2, tune=False)
    assert not fxfuse.report(fused).refused
    random.setstate(before)
    fxfuse.optimize(layers(DRAWS[draw], 0.0, compare), randn(5, 4), objective="launches", tune=False, validate=False)
    assert random.getstate() == before


@pytest.mark.parametrize(("draw", "rate"), [("uniform", 0.5), ("random", 1e-9), ("uniform", 0.999), ("wide", 0.0)])
def test_a_layer_that_may_be_dropped(draw, rate):
    model = layers(DRAWS[draw], rate, lambda a, b: a < b)
    fused = fxfuse.optimize(model, randn(5, 4), objective="launches", tune=False, validate=False)
    refused = [str(each) for each in fxfuse.report(fused).refused]
    assert not fxfuse.report(fused).fused
    assert any("draws random numbers outside of torch (random)" in text and "test_idle_draws.py" in text for text in refused), refused


def test_a_rate_that_is_changed_later():
    model = layers(DRAWS["uniform"], 0.0, lambda a, b: a < b)
    fused = fxfuse.optimize(model, randn(5, 4), objective="launches", tune=False)
    model.rate = fused.rate = 0.5
    for seed in range(8):
        results = []
        for each in (model, fused):
            random.seed(seed)
            results.append(each(randn(3, 4)))
        assert torch.equal(torch.as_tensor(results[0]), torch.as_tensor(results[1])) or torch.allclose(*results, rtol=1e-12)


def test_where_torch_asks_for_a_float():
    model = randomized(model_of(
        lambda self, x: torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1) * torch.tensor(random.random()),
        nets=nn.ModuleList(mlp() for _ in range(4)),
    ))  # fmt: skip
    fused = fxfuse.optimize(model, randn(5, 4), objective="launches", tune=False, validate=False)
    assert "draws random numbers outside of torch (random)" in str(fxfuse.report(fused).refused[0])


def test_whatever_else_is_asked_of_it_draws():
    for use in (float, math.sqrt, str, hash, bool, lambda d: d + 1, lambda d: d == 0.5, lambda d: d < 0.7, lambda d: d.hex()):
        calls = []
        drawn = Drawn(lambda calls=calls: calls.append(1) or 0.5, 0.0, 1.0)
        assert use(drawn) == use(0.5)
        assert calls == [1]
    assert isinstance(Drawn(lambda: 0.5, 0.0, 1.0), float)


def test_only_the_thread_that_records_draws_late():
    kinds = []
    with idle_draws_unseen():
        thread = threading.Thread(target=lambda: kinds.append(type(random.random())))
        thread.start()
        thread.join()
        kinds.append(type(random.random()))
    kinds.append(type(random.uniform(0, 1)))
    assert kinds == [float, Drawn, float]
