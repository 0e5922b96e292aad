"""Shape 1 once more: networks with raw parameters, several loops and buffers at once, dropout, and the 384 launches that become 3."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxfuse
from checks import assert_equal_models, assert_fused_equals, assert_heavy, randn, randomized
from fxfuse import launches

# Custom feature nets with raw parameters.


class RawLinear(nn.Module):
    def __init__(self, hidden=4):
        super().__init__()
        self.w = nn.Parameter(torch.empty(1, hidden))
        self.b = nn.Parameter(torch.empty(hidden))
        self.v = nn.Parameter(torch.empty(hidden, 1))

    def forward(self, x):
        return torch.tanh(x @ self.w + self.b) @ self.v


class RawMatmul(RawLinear):
    def forward(self, x):
        return torch.matmul(torch.sigmoid(torch.addmm(self.b, x, self.w)), self.v)


class ExU(nn.Module):
    """The exp-centred unit of neural additive models, relu clamped at n, then a linear layer."""

    def __init__(self, units=4, n=1.0):
        super().__init__()
        self.w = nn.Parameter(torch.empty(1, units))
        self.b = nn.Parameter(torch.empty(1))
        self.n = n
        self.linear = nn.Linear(units, 1)

    def forward(self, x):
        hidden = F.relu((x - self.b) @ torch.exp(self.w))
        return self.linear(torch.clamp(hidden, 0, self.n))


class Scaled(nn.Module):
    """A scale and a shift of its own per feature, a buffer of its own, and F.linear on raw weights."""

    def __init__(self, hidden=3):
        super().__init__()
        self.register_buffer("mean", torch.zeros(1))
        self.scale = nn.Parameter(torch.ones(1))
        self.weight = nn.Parameter(torch.empty(hidden, 1))
        self.head = nn.Linear(hidden, 1)

    def forward(self, x):
        return self.head(F.softplus(F.linear((x - self.mean) * self.scale, self.weight)))


class RawNetworks(nn.Module):
    def __init__(self, kind, n=4):
        super().__init__()
        self.nets = nn.ModuleList(kind() for _ in range(n))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return sum(net(x[:, i:i + 1]) for i, net in enumerate(self.nets)) + self.bias


@pytest.mark.parametrize("kind", [RawLinear, RawMatmul, ExU, Scaled])
def test_raw_parameters(kind):
    assert_fused_equals(randomized(RawNetworks(kind)), randn(6, 4), heavy=2)


class ParameterLists(nn.Module):
    """No lane modules at all: weights in ParameterLists."""

    def __init__(self, n=4, hidden=3):
        super().__init__()
        self.weights = nn.ParameterList(torch.empty(hidden, 1) for _ in range(n))
        self.biases = nn.ParameterList(torch.empty(hidden) for _ in range(n))

    def forward(self, x):
        return torch.stack([F.linear(x[:, i:i + 1], w, b).relu() for i, (w, b) in enumerate(zip(self.weights, self.biases))], dim=1)


def test_parameter_lists():
    assert_fused_equals(randomized(ParameterLists()), randn(6, 4), heavy=1, lowering="bmm")


# Several loops, several buffers.


class TwoBuffers(nn.Module):
    """One loop fills two buffers with equal Linears: one launch, not two."""

    def __init__(self, n=4):
        super().__init__()
        self.mean = nn.ModuleList(nn.Linear(2, 3) for _ in range(n))
        self.spread = nn.ModuleList(nn.Linear(2, 3) for _ in range(n))

    def forward(self, x):
        mean, spread = x.new_zeros(x.shape[0], len(self.mean), 3), x.new_zeros(x.shape[0], len(self.mean), 3)
        for i in range(len(self.mean)):
            mean[:, i] = self.mean[i](x[:, i])
            spread[:, i] = F.softplus(self.spread[i](x[:, i]))
        return mean, spread


def test_two_buffers_are_one_launch():
    assert_fused_equals(randomized(TwoBuffers()), randn(6, 4, 2), heavy=1)


class SeasonalAndTrend(nn.Module):
    """DLinear with individual=True: a Linear over time per channel, for the season and for the trend."""

    def __init__(self, channels=5, seq_len=8, pred_len=3):
        super().__init__()
        self.pred_len, self.channels = pred_len, channels
        self.Linear_Seasonal = nn.ModuleList()
        self.Linear_Trend = nn.ModuleList()
        for _ in range(channels):
            self.Linear_Seasonal.append(nn.Linear(seq_len, pred_len))
            self.Linear_Trend.append(nn.Linear(seq_len, pred_len))

    def forward(self, x):
        trend_init = F.avg_pool1d(F.pad(x.permute(0, 2, 1), (2, 2), mode="replicate"), 5, stride=1)
        seasonal_init = x.permute(0, 2, 1) - trend_init
        seasonal_output = torch.zeros([seasonal_init.size(0), seasonal_init.size(1), self.pred_len], dtype=seasonal_init.dtype).to(x.device)
        trend_output = torch.zeros([trend_init.size(0), trend_init.size(1), self.pred_len], dtype=trend_init.dtype).to(x.device)
        for i in range(self.channels):
            seasonal_output[:, i, :] = self.Linear_Seasonal[i](seasonal_init[:, i, :])
            trend_output[:, i, :] = self.Linear_Trend[i](trend_init[:, i, :])
        return (seasonal_output + trend_output).permute(0, 2, 1)


def test_seasonal_and_trend():
    assert_fused_equals(randomized(SeasonalAndTrend()), randn(6, 8, 5), heavy=1)


class TwoLoops(nn.Module):
    """The second loop reads what the first one joined: two launches that cannot merge."""

    def __init__(self, n=4):
        super().__init__()
        self.first = nn.ModuleList(nn.Linear(2, 2) for _ in range(n))
        self.second = nn.ModuleList(nn.Linear(2, 2) for _ in range(n))

    def forward(self, x):
        x = torch.stack([layer(x[:, i]) for i, layer in enumerate(self.first)], dim=1)
        x = torch.relu(x - x.mean(dim=1, keepdim=True))
        return torch.stack([layer(x[:, i]) for i, layer in enumerate(self.second)], dim=1)


def test_two_loops():
    assert_fused_equals(randomized(TwoLoops()), randn(6, 4, 2), heavy=2)


class TwoWidths(nn.Module):
    """Every other network is wider: two lane sets, each fused by itself."""

    def __init__(self, n=6):
        super().__init__()
        widths = [3 + 2 * (i % 2) for i in range(n)]
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(1, width), nn.ReLU(), nn.Linear(width, 1)) for width in widths)

    def forward(self, x):
        return torch.cat([net(x[:, i:i + 1]) for i, net in enumerate(self.nets)], dim=1)


def test_two_widths():
    assert_fused_equals(randomized(TwoWidths()), randn(5, 6), heavy=2)


class FloatBuffer(nn.Module):
    """A float32 buffer for float64 values: the values written take the buffer's dtype."""

    def __init__(self, n=4):
        super().__init__()
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 1)) for _ in range(n))

    def forward(self, x):
        out = torch.zeros(x.shape[0], len(self.nets), dtype=torch.float32)
        for i, net in enumerate(self.nets):
            out[:, i] = net(x[:, i:i + 1]).squeeze(1)
        return out


def test_values_take_the_dtype_of_the_buffer():
    model = randomized(FloatBuffer())
    fused = assert_fused_equals(model, randn(6, 4), heavy=2, rtol_outputs=2e-7)  # one rounding to float32
    assert fused(randn(6, 4)).dtype == torch.float32


# Dropout.


class FeatureNN(nn.Module):
    def __init__(self, hidden, dropout):
        super().__init__()
        self.hidden = nn.Linear(1, hidden)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(hidden, 1, bias=False)

    def forward(self, inputs):
        return self.out(self.dropout(F.relu(self.hidden(inputs.unsqueeze(1)))))


class WithDropout(nn.Module):
    def __init__(self, n=16, hidden=64, p=0.25, feature_p=0.0):
        super().__init__()
        self.feature_nns = nn.ModuleList(FeatureNN(hidden, p) for _ in range(n))
        self.feature_dropout = nn.Dropout(feature_p)

    def forward(self, x):
        parts = torch.cat([net(x[:, i]) for i, net in enumerate(self.feature_nns)], dim=-1)
        return self.feature_dropout(parts).sum(-1)


@pytest.mark.parametrize("feature_p", [0.0, 0.1])
def test_dropout_in_eval_is_exact(feature_p):
    assert_fused_equals(randomized(WithDropout(6, 4, feature_p=feature_p)), randn(5, 6), heavy=2 if feature_p else 1, random_in_train=True)


def test_dropout_in_train_has_the_same_distribution():
    """The masks are other ones, so moments are compared: mean and variance over many draws, and that rows draw independently."""
    model = randomized(WithDropout())
    x = randn(1, 16).expand(20_000, 16).contiguous()
    fused = fxfuse.optimize(model, x[:8], objective="launches", strict=True)
    assert fxfuse.report(fused).fused
    model.train()
    fused.train()
    torch.manual_seed(0)
    with torch.no_grad():
        expected, actual = model(x), fused(x)
    error = expected.std() / len(x) ** 0.5  # of each mean
    assert abs(actual.mean() - expected.mean()) < 5 * 2**0.5 * error
    assert 0.95 < (actual.var() / expected.var()).item() < 1.05  # the standard error of this ratio is 0.014
    halves = [out[::2] * out[1::2] for out in (expected - expected.mean(), actual - actual.mean())]
    assert all(abs(half.mean()) < 5 * half.std() / len(half) ** 0.5 for half in halves)  # rows draw their own masks


class Parts(WithDropout):
    def forward(self, x):
        return torch.cat([net(x[:, i]) for i, net in enumerate(self.feature_nns)], dim=-1)


def test_dropout_lanes_draw_their_own_masks():
    """With all weights one and no negative input, what a lane lets through depends on its mask alone: lanes must differ."""
    parts = Parts(n=4, hidden=8, p=0.5).double()
    with torch.no_grad():
        for parameter in parts.parameters():
            parameter.fill_(1.0)
    x = torch.ones(4000, 4, dtype=torch.float64)
    fused = fxfuse.optimize(parts, x[:8], objective="launches", strict=True).train()
    assert fxfuse.report(fused).fused
    with torch.no_grad():
        out = fused(x)
    correlation = torch.corrcoef(out.t()) - torch.eye(4, dtype=out.dtype)
    assert correlation.abs().max() < 0.1  # five standard errors are 0.08
    assert torch.isclose(out.mean(), torch.tensor(16.0, dtype=out.dtype), rtol=0.02)  # 8 units of 2, half of them kept, doubled


# The figure that the project promises.


class Network128(nn.Module):
    def __init__(self, n=128, hidden=32):
        super().__init__()
        self.nets = nn.ModuleList(
            nn.Sequential(nn.Linear(1, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1)) for _ in range(n))

    def forward(self, x):
        out = torch.zeros(x.shape[0], len(self.nets), dtype=x.dtype)
        for i in range(len(self.nets)):
            out[:, i] = self.nets[i](x[:, i:i + 1]).squeeze(-1)
        return out


def test_384_launches_become_3():
    model = randomized(Network128())
    x = randn(64, 128)
    before = launches.count(lambda: model(x))
    assert (before.heavy, before.bound) == (384, 3)
    fused = fxfuse.optimize(model, x, objective="launches", strict=True)
    assert_heavy(fused, x, 3)
    (graph,) = fxfuse.graph(fused).values()
    readable = graph.print_readable(print_output=False)
    assert "test_shape_custom_networks.py" in readable, f"no source line of the loop in:\n{readable}"
    assert "self.nets[i](x[:, i:i + 1])" in readable
    assert_equal_models(model, fused, [(x, {}), (randn(10, 128, seed=5), {})])
