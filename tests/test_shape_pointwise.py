"""Shape 2: Linear and pointwise convolution are the same map; loops of either, and of both, are one launch (seeds/001)."""

import pytest
import torch
from torch import nn

import fxfuse
from checks import QUICK, assert_equal_models, assert_fused_equals, fresh, randn, randomized, untouched


class ConvPerGroup(nn.Module):
    """x [N, groups, C, L], a pointwise convolution per group."""

    def __init__(self, groups=3, cin=4, cout=5, bias=True):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(cin, cout, 1, bias=bias) for _ in range(groups))

    def forward(self, x):
        return torch.stack([conv(x[:, i]) for i, conv in enumerate(self.convs)], dim=1)


class LinearPerGroup(nn.Module):
    """x [N, groups, L, C], the same map with channels last."""

    def __init__(self, groups=3, cin=4, cout=5, bias=True):
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(cin, cout, bias=bias) for _ in range(groups))

    def forward(self, x):
        outs = []
        for i in range(len(self.linears)):
            outs.append(self.linears[i](x[:, i]))
        return torch.cat(outs, dim=-1)


class ConvOnPermuted(nn.Module):
    """The question's way: channels last outside, permuted for the convolution and back."""

    def __init__(self, groups=3, cin=4, cout=5, bias=True):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(cin, cout, kernel_size=1, bias=bias) for _ in range(groups))

    def forward(self, x):
        return torch.stack([conv(x[:, i].permute(0, 2, 1)).permute(0, 2, 1) for i, conv in enumerate(self.convs)], dim=1)


class Mixture(nn.Module):
    """Even groups by Linear, odd groups by Conv1d(k=1)."""

    def __init__(self, groups=4, cin=4, cout=5, bias=True):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Conv1d(cin, cout, 1, bias=bias) if i % 2 else nn.Linear(cin, cout, bias=bias) for i in range(groups))

    def forward(self, x):
        outs = []
        for i, layer in enumerate(self.layers):
            tensor = x[:, i]
            if isinstance(layer, nn.Conv1d):
                outs.append(layer(tensor.transpose(1, 2)).transpose(1, 2))
            else:
                outs.append(layer(tensor))
        return torch.stack(outs, dim=1)


class MixtureOfNetworks(nn.Module):
    """Two layers and an activation, written once with Linear and once with Conv1d."""

    def __init__(self, groups=4, cin=3, hidden=6, cout=2):
        super().__init__()
        self.by_linear = nn.ModuleList(
            nn.Sequential(nn.Linear(cin, hidden), nn.ReLU(), nn.Linear(hidden, cout)) for _ in range(groups // 2))
        self.by_conv = nn.ModuleList(
            nn.Sequential(nn.Conv1d(cin, hidden, 1), nn.ReLU(), nn.Conv1d(hidden, cout, 1)) for _ in range(groups // 2))

    def forward(self, x):
        first = [net(x[:, i]) for i, net in enumerate(self.by_linear)]
        second = [net(x[:, len(first) + i].transpose(1, 2)).transpose(1, 2) for i, net in enumerate(self.by_conv)]
        return torch.cat([y.unsqueeze(1) for y in first + second], dim=1)


class Conv2dPerGroup(nn.Module):
    def __init__(self, groups=3, cin=4, cout=5, bias=True):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(cin, cout, kernel_size=(1, 1), bias=bias) for _ in range(groups))

    def forward(self, x):
        return torch.cat([conv(part) for conv, part in zip(self.convs, x.chunk(len(self.convs), dim=1))], dim=1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("cin", "cout"), [(4, 5), (1, 6), (6, 1), (1, 1)])
@pytest.mark.parametrize("groups", [2, 3, 8])
@pytest.mark.parametrize("kind", [ConvPerGroup, LinearPerGroup, ConvOnPermuted, Mixture])
def test_one_launch(kind, groups, cin, cout, bias):
    x = randn(5, groups, cin, 6) if kind is ConvPerGroup else randn(5, groups, 6, cin)
    assert_fused_equals(randomized(kind(groups, cin, cout, bias)), x, heavy=1, **QUICK)


@pytest.mark.parametrize("lowering", ["auto", "grouped_conv", "bmm"])
@pytest.mark.parametrize("kind", [ConvPerGroup, LinearPerGroup, ConvOnPermuted, Mixture])
def test_every_lowering(kind, lowering):
    groups = 4
    x = randn(5, groups, 4, 6) if kind is ConvPerGroup else randn(5, groups, 6, 4)
    assert_fused_equals(randomized(kind(groups)), x, heavy=1, lowering=lowering)


def test_lowering_is_what_was_asked_for():
    model, x = randomized(LinearPerGroup()), randn(5, 3, 6, 4)
    for lowering, call in (("grouped_conv", "conv"), ("bmm", "bmm")):
        fused = fxfuse.optimize(model, x, objective="launches", lowering=lowering, strict=True)
        targets = [str(node.target) for graph in fxfuse.graph(fused).values() for node in graph.graph.nodes if node.op == "call_function"]
        assert any(call in target for target in targets), f"{lowering}: {targets}"


def test_mixture_of_networks():
    assert_fused_equals(randomized(MixtureOfNetworks()), randn(5, 4, 6, 3), heavy=2)


@pytest.mark.parametrize("bias", [True, False])
def test_two_dims(bias):
    assert_fused_equals(randomized(Conv2dPerGroup(bias=bias)), randn(4, 12, 3, 5), heavy=1)


# A single layer: rewritten to the other only where that was measured faster, so no test says which.


class Pointwise(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return torch.relu(self.layer(x))


SINGLES = {
    "conv1d": (lambda: nn.Conv1d(8, 32, 1), (4, 8, 16)),
    "conv1d without bias": (lambda: nn.Conv1d(8, 32, 1, bias=False), (4, 8, 16)),
    "conv2d": (lambda: nn.Conv2d(8, 4, 1), (4, 8, 5, 6)),
    "linear": (lambda: nn.Linear(8, 32), (4, 16, 8)),
}


@pytest.mark.parametrize("single", SINGLES)
def test_a_single_layer_stays_right(single):
    make, shape = SINGLES[single]
    model, x = randomized(Pointwise(make())), randn(*shape)
    with untouched(model):
        fused = fxfuse.optimize(model, x, objective="time")
    assert isinstance(fused, Pointwise)
    report = fxfuse.report(fused)
    assert report.fused or report.refused, "the report says nothing of the layer"
    assert_equal_models(model, fused, [(x, {}), (fresh(x, 3, seed=2), {})])


# The thread's other question: how much do they differ, and where?


@pytest.fixture(scope="module")
def permuted():
    """A float32 model, its fused form and an input they have not seen."""
    model = randomized(ConvOnPermuted(groups=4, cin=8, cout=32)).float()
    x = randn(8, 4, 16, 8).float()
    return model, fxfuse.optimize(model, x, objective="launches", strict=True), randn(8, 4, 16, 8, seed=2).float()


def test_the_report_tells_rounding_from_a_mistake(permuted):
    """The same tensors in float64 differ by 1e-12 at the most; in float32 they may differ by rounding."""
    differences = fxfuse.report(permuted[1]).validation.differences
    for kind in ("output", "input gradient", "parameter gradient"):
        worst = {dtype: max(d.max_rel for d in differences if d.kind == kind and d.dtype == dtype) for dtype in ("float64", "float32")}
        assert worst["float64"] < 1e-12
        assert worst["float64"] <= worst["float32"] < 1e-5


@pytest.mark.parametrize("kind", ["output", "parameter gradient"])
def test_the_report_shows_rounding_of_outputs_and_gradients(permuted, kind):
    """Maximum, mean and a histogram that counts every number; and who of the two is nearer to float64."""
    report = fxfuse.report(permuted[1])
    shown = [rounding for rounding in report.to_dict()["validation"]["rounding"] if rounding["kind"] == kind]
    assert shown, f"no rounding of the {kind}s in the report"
    for rounding in shown:
        assert rounding["dtype"] == "float32"
        for against in ("fused_to_original", "original_to_float64", "fused_to_float64"):
            spread = rounding[against]
            assert sum(n for _, n in spread["histogram"]) == spread["count"] > 0
            assert 0 <= spread["mean"] <= spread["max"] < 1e-2
        assert rounding["original_to_float64"]["max"] > 0


def test_verify_measures_what_torch_measures(permuted):
    """The difference of the outputs that Validation names is the one that a person computes."""
    model, fused, x = permuted
    validation = fxfuse.verify(model, fused, x)
    assert validation.ok
    with torch.no_grad():
        worst = (model(x) - fused(x)).abs().max().item()
    named = [d.max_abs for d in validation.differences if d.kind == "output" and d.dtype == "float32"]
    assert worst in named
