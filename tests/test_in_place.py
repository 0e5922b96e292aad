"""Writes inside of lanes that are no plain arithmetic: what has no functional form is refused, never taken for something else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxfuse
from checks import QUICK, assert_close, model_of, randn, randomized
from fxfuse.weights import packing

WRITES = {
    "unsqueeze_": lambda y, p: y.unsqueeze_(-1), "squeeze_": lambda y, p: y[:, :1].clone().squeeze_(), "t_": lambda y, p: y.t_(),
    "transpose_": lambda y, p: y.transpose_(0, 1), "detach_": lambda y, p: y.detach_() * p, "fill_": lambda y, p: y.fill_(p) * 2,
    "logical_not_": lambda y, p: y.logical_not_() + p, "ge_": lambda y, p: y.ge_(0.1) * p, "fill_ number": lambda y, p: y.fill_(2.0) * p,
    "unsqueeze_ back": lambda y, p: y.unsqueeze_(0).squeeze_(0) * p,
}  # fmt: skip


def lanes(lane):
    """Three Linears, each followed by ``lane(y, p)`` with a number of its own."""
    def forward(self, x):
        return torch.stack([lane(net(x), p) for net, p in zip(self.nets, self.p)])

    return randomized(model_of(
        forward, nets=nn.ModuleList(nn.Linear(2, 2) for _ in range(3)), p=nn.ParameterList(nn.Parameter(torch.ones(())) for _ in range(3))
    ))  # fmt: skip


@pytest.mark.parametrize("write", WRITES)
def test_a_tensor_made_another_in_place_is_right_or_refused(write):
    model = lanes(lambda y, p: WRITES[write](y, p) + p)
    fused = fxfuse.optimize(model, randn(4, 2), objective="launches", **QUICK)
    assert "please report" not in str(fxfuse.report(fused))
    found = []
    for each in (model, fused):
        x = randn(5, 2, seed=5).requires_grad_()
        out = each(x)
        (out * torch.arange(out.numel()).view_as(out)).sum().backward()
        found.append((out, x.grad, packing.original_gradients(each)))
    (out, grad, grads), (own, own_grad, own_grads) = found
    assert_close(own, out, "output")
    for name, got, want in [("the input", own_grad, grad), *((name, own_grads[name], value) for name, value in grads.items())]:
        assert got is None or want is None or torch.allclose(got, want, rtol=1e-10, atol=0), name
        only = got if want is None else want  # a lane of a pack has zeros where the loop has no gradient
        assert (got is None) == (want is None) or not only.any(), name


def test_no_rows_change_no_cumulative_statistics():
    norms = nn.ModuleList(nn.BatchNorm1d(2, momentum=None) for _ in range(3))
    model = randomized(model_of(lambda self, x: torch.stack([norm(x) for norm in self.nets]), nets=norms))
    fused = fxfuse.optimize(model, randn(4, 2), objective="launches", **QUICK)
    assert fxfuse.report(fused).fused
    for each in (model, fused):
        for rows in (5, 0, 3):
            each(randn(rows, 2, seed=rows))
    for name, want in model.state_dict().items():
        assert torch.allclose(fxfuse.original_state_dict(fused)[name], want, rtol=1e-12), name


class Squeezing(nn.Module):
    """Lanes that squeeze a tensor in place, before or after a loop inside them, and take a derivative."""

    def __init__(self, first, width):
        super().__init__()
        self.first = first
        self.maps = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
        self.inner = nn.ModuleList(Inner(width) for _ in range(2))

    def forward(self, x):
        return torch.stack([self.lane(net, inner, x) for net, inner in zip(self.maps, self.inner)])

    def lane(self, net, inner, x):
        h = net(x)
        if self.first:
            h.squeeze_()
        h = inner(h)
        if not self.first:
            h.squeeze_()
        with torch.enable_grad():
            z = h.detach().requires_grad_()
            return torch.autograd.grad((z * z.tanh()).sum(), z, create_graph=True)[0]


class Inner(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.nets = nn.ModuleList(nn.Linear(2, width) for _ in range(2))

    def forward(self, h):
        return torch.stack([net(h) for net in self.nets]).transpose(0, 1)


@pytest.mark.parametrize("width", [2, 1])
@pytest.mark.parametrize("first", [True, False])
def test_what_squeeze_has_changed_since(first, width):
    """In bfloat16 meta tensors stand in for values: made of the recorded shape, and of strides that have to belong to it."""
    model, x = randomized(Squeezing(first, width)).to(torch.bfloat16), torch.ones(1, 2, dtype=torch.bfloat16)
    fused = fxfuse.optimize(model, x, objective="launches", tune=False, cache=False)
    assert "squeeze_ makes another tensor of one in place" in str(fxfuse.report(fused))
    assert "fxfuse failed" not in str(fxfuse.report(fused))
    for rows in (1, 3):
        x = randn(rows, 2).to(torch.bfloat16)
        assert_close(fused(x), model(x), "output", rtol=0.05)
