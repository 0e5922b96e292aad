"""Lanes that stay apart, and the one sentence that says why: never silence."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxfuse
from checks import QUICK, mlp, model_of, randn, randomized, relative_error


def columns(self, x):
    return torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1)


def lanes(make, count=4):
    return nn.ModuleList(make(i) for i in range(count))


def between(make):
    """A Linear, what ``make(i)`` gives, a Linear."""
    return lanes(lambda i: nn.Sequential(nn.Linear(1, 6), make(i), nn.Linear(6, 1)))


def told(model, x, **options):
    """The refusals; the result is right."""
    fused = fxfuse.optimize(randomized(model), x, objective="launches", **{**QUICK, **options})
    with torch.no_grad():
        given = x if isinstance(x, tuple) else (x,)
        got, want = fused.eval()(*given), model.eval()(*given)
    for a, b in zip(got.values() if isinstance(got, dict) else [got], want.values() if isinstance(want, dict) else [want], strict=True):
        assert relative_error(a, b) <= 1e-10
    report = fxfuse.report(fused)
    assert all(refusal.place is not None for refusal in report.refused), str(report)
    return [refusal.reason for refusal in report.refused], report


NUMBERS = {
    "a slope each": (lambda i: nn.LeakyReLU(0.1 * i), "leaky_relu negative_slope 0.1 against 0.0"),
    "alpha of elu": (lambda i: nn.ELU(1.0 + i), "elu alpha 2.0 against 1.0"),
    "beta of softplus": (lambda i: nn.Softplus(i + 1), "softplus beta 2 against 1"),
    "bounds of hardtanh": (lambda i: nn.Hardtanh(-1.0, 1.0 + i), "hardtanh max_val 2.0 against 1.0"),
    "eps of a norm": (lambda i: nn.LayerNorm(6, eps=10.0 ** -(i + 3)), "layer_norm eps 0.001 against 0.0001"),
    "groups": (lambda i: nn.GroupNorm((1, 2, 3, 6)[i], 6), "group_norm num_groups 1 against 2"),
    "dims, three and one": (lambda i: nn.Softmax(int(i == 2)), "softmax dim 1 against 0"),
    "kind of gelu": (lambda i: nn.GELU("tanh" if i == 2 else "none"), "gelu approximate tanh against none"),
    "p of alpha dropout": (lambda i: nn.AlphaDropout(0.1 * (i + 1)), "alpha_dropout p 0.2 against 0.1"),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_differs(name):
    make, difference = NUMBERS[name]
    reasons, report = told(model_of(columns, nets=between(make)), randn(5, 4))
    assert len(reasons) == 1, str(report)
    assert reasons[0].endswith(difference)
    assert report.heavy[1] <= 6  # both Linears are lanes all the same


def test_an_argument_of_a_function_call():
    def forward(self, x):
        return torch.stack([F.normalize(net(x), p=i + 1.0) for i, net in enumerate(self.nets)])

    reasons, _ = told(model_of(forward, nets=lanes(lambda i: mlp(4, 5, 3))), randn(5, 4))
    assert reasons == ["lanes part at normalize p 2.0 against 1.0"]


def test_convolutions_with_dilations_of_their_own_are_no_lanes():
    def forward(self, x):
        return torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1)

    model = model_of(forward, nets=lanes(lambda i: nn.Conv1d(1, 2, 3, padding=i + 1, dilation=i + 1)))
    reasons, report = told(model, randn(5, 4, 12))
    assert reasons == ["nets.0 and nets.1 are no lanes of one loop: conv1d padding (1,) against (2,)"]
    assert not report.fused


def test_a_number_far_above_the_layer_that_it_keeps_apart():
    def forward(self, x):
        return torch.cat([net(F.celu(x[:, i : i + 1], 1.0 + i).tanh()) for i, net in enumerate(self.nets)], 1)

    reasons, _ = told(model_of(forward, nets=lanes(lambda i: nn.Linear(1, 3))), randn(5, 4))
    assert reasons == ["lanes part at celu alpha 2.0 against 1.0"]


def by_name(self, x):
    return {key: self.nets[key](value) for key, value in x.items()}


@pytest.mark.parametrize(
    ("forward", "x", "held"),
    [
        (by_name, ({key: randn(5, 3, seed=i) for i, key in enumerate("ab")},), {"nets": nn.ModuleDict({k: nn.Linear(3, 2) for k in "ab"})}),
        (lambda self, x, y: self.a(x) + self.b(y), (randn(5, 3), randn(5, 3, seed=2)), {"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)}),
        (
            lambda self, x, y: torch.cat([self.a(x), self.b(y)], 1), (randn(5, 3, 8), randn(5, 3, 8, seed=2)),
            {"a": nn.Conv1d(3, 2, 3), "b": nn.Conv1d(3, 2, 3)},
        ),
    ],
)  # fmt: skip
def test_two_lanes_on_inputs_of_their_own_save_nothing(forward, x, held):
    reasons, report = told(model_of(forward, **held), x)
    assert len(reasons) == 1
    assert reasons[0].endswith("in 2 lanes stays a loop: as one it saves 1 launch and takes 1 to join what goes in")
    assert not report.fused


def test_three_of_them_do():
    reasons, report = told(
        model_of(by_name, nets=nn.ModuleDict({key: nn.Linear(3, 2) for key in "abc"})),
        ({key: randn(5, 3, seed=i) for i, key in enumerate("abc")},),
    )
    assert not reasons
    assert report.heavy == (3, 1)


def test_lanes_that_save_nothing_beside_some_that_do():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.nets, self.a, self.b = lanes(lambda i: mlp()), nn.Linear(4, 9), nn.Linear(4, 9)

        def forward(self, x, y):
            return columns(self, x).sum() + self.a(x).sum() + self.b(y).sum()

    reasons, report = told(Model(), (randn(5, 4), randn(6, 4)))
    assert report.fused
    assert not any("no loop" in reason for reason in reasons)


def test_random_ops_that_no_rule_knows():
    def forward(self, x):
        outs = []
        for net in self.nets:
            h = net(x)
            outs.append(h + torch.binomial(torch.full_like(h, 5.0), h.sigmoid()) * 0)
        return torch.stack(outs)

    reasons, _ = told(model_of(forward, nets=lanes(lambda i: mlp(4, 5, 3))), randn(5, 4))
    assert reasons == ["binomial of 4 lanes stays as it is: it draws random numbers, and has no rule"]
