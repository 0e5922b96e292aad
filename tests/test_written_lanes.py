"""Lanes' results that are changed in place after the loop, or inside it once they are in a list: as if each were written where it lies."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxfuse
from checks import QUICK, assert_fused_equals, mlp, model_of, randn, randomized


def columns(self, x):
    return [net(x[:, i : i + 1]) for i, net in enumerate(self.nets)]


WRITES = {}


def case(heavy=2, total=None):
    def note(function):
        WRITES[function.__name__] = (function, heavy, total)
        return function

    return note


@case(total=6)
def zeroed_in_the_loop(self, x):
    outs = []
    for i, net in enumerate(self.nets):
        y = net(x[:, i : i + 1])
        outs.append(y)
        y.zero_()
    return torch.cat(outs, 1) + x


@case(total=6)
def filled_in_the_loop(self, x):
    outs = []
    for i, net in enumerate(self.nets):
        outs.append(net(x[:, i : i + 1]))
        outs[-1].fill_(0.5)
    return torch.cat(outs, 1) * x


@case(total=6)
def added_to_in_the_loop(self, x):
    outs = []
    for i, net in enumerate(self.nets):
        y = net(x[:, i : i + 1])
        outs.append(y)
        y.add_(1).mul_(2)
    return torch.cat(outs, 1)


@case()
def a_row_of_the_stack(self, x):
    out = torch.stack(columns(self, x))
    out[1].add_(1)
    return out


@case()
def every_row_of_the_stack(self, x):
    out = torch.stack(columns(self, x))
    for i in range(4):
        out[i].mul_(i + 2)
    return out


@case()
def a_row_zeroed(self, x):
    out = torch.stack(columns(self, x))
    out[2].zero_()
    return out.sum(0)


@case()
def rows_by_augmented_assignment(self, x):
    out = torch.stack(columns(self, x))
    out[2] += 1
    out[0] *= x[:, :1]
    return out


@case()
def columns_clamped(self, x):
    out = torch.cat(columns(self, x), 1)
    out[:, 0].clamp_(min=0)
    out[:, 1:3].mul_(0.5)
    return out


@case()
def one_of_a_list(self, x):
    outs = columns(self, x)
    outs[1].mul_(2)
    return outs


@case()
def one_of_a_list_zeroed(self, x):
    outs = columns(self, x)
    outs[3].zero_()
    return outs


@case()
def after_they_were_joined(self, x):
    outs = columns(self, x)
    joined = torch.cat(outs, 1)
    for out in outs:
        out.relu_()
    return joined + torch.cat(outs, 1)


@case()
def the_join_itself(self, x):
    out = torch.stack(columns(self, x), 1)
    out.sub_(out.detach().mean(1, keepdim=True))
    return out


@case()
def where_a_mask_holds(self, x):
    out = torch.cat(columns(self, x), 1)
    out.masked_fill_(x < 0, 0.0)
    return out


@case()
def by_inplace_functions(self, x):
    outs = columns(self, x)
    for out in outs:
        F.leaky_relu(out, 0.2, inplace=True)
    return torch.cat(outs, 1)


@case()
def a_view_of_each(self, x):
    outs = []
    for out in columns(self, x):
        out.view(-1).add_(1)
        outs.append(out)
    return torch.cat(outs, 1)


@pytest.mark.parametrize("name", WRITES)
def test_written_after(name):
    forward, heavy, total = WRITES[name]
    model = randomized(model_of(forward, nets=nn.ModuleList(mlp() for _ in range(4))))
    fused = assert_fused_equals(model, randn(5, 4), heavy=heavy, **QUICK)
    report = fxfuse.report(fused)
    assert total is None or report.launches[1] <= total, str(report)
