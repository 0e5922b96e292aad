"""The checks themselves: they must notice a swapped lane, a lost bias, a wrong gradient, a touched original."""

import copy

import pytest
import torch
from torch import nn

from checks import assert_close, assert_equal_models, own_gradients, randn, randomized, relative_error, untouched


class Rows(nn.Module):
    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleList(nn.Linear(2, 3) for _ in range(3))

    def forward(self, x):
        return torch.stack([net(x[:, i]) for i, net in enumerate(self.nets)], dim=1)


def compare(model, other):
    assert_equal_models(model, other, [(randn(5, 3, 2), {})], gradients=own_gradients)


def test_equal_models_pass():
    model = randomized(Rows())
    compare(model, copy.deepcopy(model))


def swap_lanes(model):
    model.nets[0], model.nets[1] = model.nets[1], model.nets[0]


def lose_a_bias(model):
    with torch.no_grad():
        model.nets[2].bias.zero_()


def scale_a_gradient(model):
    model.nets[1].weight.register_hook(lambda grad: grad * (1 + 1e-9))


def freeze_a_lane(model):
    model.nets[1].requires_grad_(False)


@pytest.mark.parametrize("damage", [swap_lanes, lose_a_bias, scale_a_gradient, freeze_a_lane])
def test_damage_is_noticed(damage):
    model = randomized(Rows())
    other = copy.deepcopy(model)
    damage(other)
    with pytest.raises(AssertionError):
        compare(model, other)


def test_nan_is_never_close():
    with pytest.raises(AssertionError):
        assert_close(torch.tensor([float("nan")]), torch.tensor([1.0]), "nan")
    with pytest.raises(AssertionError):
        assert_close(torch.tensor([1.0]), torch.tensor([float("nan")]), "nan")


def test_error_is_relative_to_the_largest_number():
    assert relative_error(torch.tensor([100.0, 1.0]), torch.tensor([100.0, 2.0])) == 0.01


@pytest.mark.parametrize("touch", [
    lambda m: m.eval(), lambda m: m.nets[0].requires_grad_(False), lambda m: m.nets[0].bias.data.add_(1), lambda m: torch.rand(1),
    lambda m: setattr(m.nets[0], "bias", nn.Parameter(m.nets[0].bias.data)), lambda m: setattr(m, "seen", 1),
    lambda m: m.register_forward_hook(lambda *a: None),
])
def test_a_touched_original_is_noticed(touch):
    model = randomized(Rows())
    with pytest.raises(AssertionError), untouched(model):
        touch(model)
