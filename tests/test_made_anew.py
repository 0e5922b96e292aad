"""Tensors that forward makes where no recording sees it (``torch.FloatTensor([0.5])``): as good as their numbers, where these stay."""

import random

import numpy
import pytest
import torch
from torch import nn
from torch.autograd import Variable

import fxfuse
from checks import QUICK, assert_fused_equals, mlp, model_of, randn, randomized


def columns(self, x):
    return torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1)


def made(forward):
    return randomized(model_of(forward, nets=nn.ModuleList(mlp() for _ in range(4))))


MAKERS = {
    "FloatTensor": lambda x: torch.sqrt(torch.FloatTensor([0.5]).to(x.device)),  # as TabNet's GLU blocks do
    "Tensor of numbers": lambda x: torch.Tensor([1.0, 2.0, 3.0, 4.0]),
    "DoubleTensor": lambda x: torch.DoubleTensor([0.1]),
    "LongTensor": lambda x: torch.LongTensor([1, 2, 3, 4]),
    "from_numpy": lambda x: torch.from_numpy(numpy.linspace(0.0, 1.0, 4)),
    "Variable": lambda x: Variable(torch.ones(1) * 2),
    "in every lane": lambda x: torch.stack([torch.FloatTensor([i + 0.1])[0] for i in range(4)]),
}


@pytest.mark.parametrize("name", MAKERS)
def test_the_same_numbers_in_every_run(name):
    make = MAKERS[name]
    assert_fused_equals(made(lambda self, x: columns(self, x) * make(x)), randn(5, 4), heavy=2, **QUICK)


def test_in_float32_and_float64():
    model = made(lambda self, x: columns(self, x) * torch.sqrt(torch.FloatTensor([0.5]).to(x.device))).float()
    fused = fxfuse.optimize(model, torch.randn(5, 4), objective="launches", tune=False)
    report = fxfuse.report(fused)
    assert report.fused
    assert report.validation.ok
    assert report.validation.proved


RANDOM = {
    "numpy": lambda: torch.from_numpy(numpy.random.randn(4)),
    "random": lambda: torch.DoubleTensor([random.random() for _ in range(4)]),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_numbers_are_not_the_same_though_a_recording_starts_from_one_state(name):
    fused = fxfuse.optimize(made(lambda self, x: columns(self, x) * RANDOM[name]()), randn(5, 4), objective="launches", **QUICK)
    report = fxfuse.report(fused)
    assert not report.fused
    assert "a tensor made where recording cannot see it" in str(report.refused[0])
    x = randn(3, 4)
    assert not torch.equal(fused(x), fused(x))


def test_numbers_of_the_data_are_not_the_same():
    def forward(self, x):
        return columns(self, x) * torch.DoubleTensor([float(x.detach().sum())])

    model = made(forward)
    fused = fxfuse.optimize(model, randn(5, 4), objective="launches", **QUICK)
    assert not fxfuse.report(fused).fused
    assert torch.equal(fused(randn(7, 4)), model(randn(7, 4)))


def test_an_attribute_that_is_set_later_makes_other_numbers():
    model = made(lambda self, x: columns(self, x) * torch.DoubleTensor([self.factor]))
    model.factor = 2.0
    fused = fxfuse.optimize(model, randn(5, 4), objective="launches", **QUICK)
    assert fxfuse.report(fused).fused
    for each in (model, fused):
        each.factor = 3.0
    x = randn(3, 4)
    assert torch.allclose(fused(x), model(x), rtol=1e-12)


def test_indices_held_by_the_lanes_follow_what_is_loaded():
    class Picking(nn.Module):
        def __init__(self, index):
            super().__init__()
            self.net = nn.Linear(2, 1)
            self.register_buffer("index", torch.tensor(index))

        def forward(self, x):
            return self.net(x[:, self.index])

    def forward(self, x):
        return torch.cat([net(x) for net in self.nets], 1)

    def picking(shift):
        return randomized(model_of(forward, nets=nn.ModuleList(Picking([(i + shift) % 4, (i + 2) % 4]) for i in range(4))), seed=shift)

    model, other = picking(0), picking(1)
    fused = assert_fused_equals(model, randn(5, 4), heavy=1, **QUICK)
    assert fxfuse.report(fused).launches[1] <= 3
    fused.load_state_dict(other.state_dict())
    assert torch.allclose(fused(randn(3, 4)), other(randn(3, 4)), rtol=1e-12)
