"""Shape 1, feature networks: one small network per column of the input, as neural additive models have them (seeds/000)."""

import functools
import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxfuse
from checks import QUICK, assert_fused_equals, randn, randomized


def feature_network(hidden=3, bias=True, act=nn.ReLU):
    return nn.Sequential(nn.Linear(1, hidden, bias=bias), act(), nn.Linear(hidden, 1, bias=bias))


def columns_first(x):
    columns = x.unsqueeze(-1)
    return [columns[:, i] for i in range(columns.shape[1])]


# Each gives the columns of x [N, n] as [N, 1], the way people cut them off.
PIECES = {
    "x[:, i:i+1]": lambda x: (x[:, i:i + 1] for i in range(x.shape[1])),
    "x[:, i].unsqueeze(-1)": lambda x: (x[:, i].unsqueeze(-1) for i in range(x.size(1))),
    "x[:, i, None]": lambda x: (x[:, i, None] for i in range(x.shape[-1])),
    "x[:, i].view(-1, 1)": lambda x: (x[:, i].view(-1, 1) for i in range(x.shape[1])),
    "x[..., i].reshape(len(x), 1)": lambda x: (x[..., i].reshape(len(x), 1) for i in range(x.shape[1])),
    "x[:, [i]]": lambda x: (x[:, [i]] for i in range(x.shape[1])),
    "x.unsqueeze(-1)[:, i]": lambda x: (x.unsqueeze(-1)[:, i] for i in range(x.shape[1])),
    "columns = x.unsqueeze(-1); columns[:, i]": columns_first,
    "x.chunk(n, dim=1)": lambda x: x.chunk(x.shape[1], dim=1),
    "torch.split(x, 1, dim=1)": lambda x: torch.split(x, 1, dim=1),
    "x.split([1] * n, dim=-1)": lambda x: x.split([1] * x.shape[1], dim=-1),
    "x.unbind(1)": lambda x: (column.unsqueeze(1) for column in x.unbind(1)),
    "x.unsqueeze(2).unbind(dim=1)": lambda x: x.unsqueeze(2).unbind(dim=1),
    "x.select(1, i)": lambda x: (x.select(1, i)[:, None] for i in range(x.shape[1])),
    "torch.select(x.unsqueeze(-1), 1, i)": lambda x: (torch.select(x.unsqueeze(-1), 1, i) for i in range(x.shape[1])),
    "x.narrow(1, i, 1)": lambda x: (x.narrow(1, i, 1) for i in range(x.shape[1])),
    "for column in x.t()": lambda x: (column.unsqueeze(-1) for column in x.t()),
}


def write_columns(model, x, ys):
    out = torch.zeros(x.shape[0], x.shape[1], dtype=x.dtype)
    for i, y in enumerate(ys):
        out[:, i] = y.squeeze(-1)
    return out


def write_slices_of_new_zeros(model, x, ys):
    out = x.new_zeros(x.size(0), len(model.nets))
    for i, y in enumerate(ys):
        out[:, i:i + 1] = y
    return out


def write_into_empty(model, x, ys):
    out = torch.empty(len(x), len(model.nets), 1, dtype=x.dtype, device=x.device)
    for i, y in enumerate(ys):
        out[:, i, :] = y
    return out


def write_into_zeros_like(model, x, ys):
    out = torch.zeros_like(x)
    for i, y in enumerate(ys):
        out[..., i] = y[..., 0]
    return out


def write_rows_first(model, x, ys):
    out = x.new_empty((len(model.nets), x.shape[0]))
    for i, y in enumerate(ys):
        out[i] = y[:, 0]
    return out.t()


def add_into_columns(model, x, ys):
    out = torch.zeros(x.shape[0], len(model.nets), dtype=x.dtype)
    for i, y in enumerate(ys):
        out[:, i] += y[:, 0]
    return out


def append_then_cat(model, x, ys):
    outputs = []
    for y in ys:
        outputs.append(y)
    return torch.cat(outputs, dim=1)


def growing_cat(model, x, ys):
    out = None
    for y in ys:
        out = y if out is None else torch.cat((out, y), dim=-1)
    return out


def sum_and_bias(model, x, ys):
    return sum(ys) + model.bias


def running_sum(model, x, ys):
    out = 0
    for y in ys:
        out = out + y
    return out + model.bias


def running_sum_from_zeros(model, x, ys):
    out = torch.zeros(x.shape[0], 1, dtype=x.dtype)
    for y in ys:
        out += y
    return out


def first_then_add(model, x, ys):
    ys = list(ys)
    out = ys[0]
    for y in ys[1:]:
        out = torch.add(out, y)
    return out


def sum_of_squeezed(model, x, ys):
    return sum([y.squeeze(-1) for y in ys]).unsqueeze(-1) + model.bias


def additive_model(model, x, ys):
    """As dnamite and pytorch NAMs return it: the prediction and the parts."""
    parts = torch.cat(list(ys), dim=-1)
    return parts.sum(dim=-1) + model.bias, parts


JOINS = {
    "zeros, out[:, i] = y": write_columns,
    "new_zeros, out[:, i:i+1] = y": write_slices_of_new_zeros,
    "empty, out[:, i, :] = y": write_into_empty,
    "zeros_like, out[..., i] = y": write_into_zeros_like,
    "new_empty, out[i] = y": write_rows_first,
    "zeros, out[:, i] += y": add_into_columns,
    "stack(dim=0)": lambda model, x, ys: torch.stack(list(ys)),
    "stack(dim=1)": lambda model, x, ys: torch.stack(tuple(ys), dim=1),
    "stack(dim=-1)": lambda model, x, ys: torch.stack([*ys], dim=-1),
    "stack of squeezed": lambda model, x, ys: torch.stack([y.squeeze(1) for y in ys], 1),
    "cat(dim=1)": lambda model, x, ys: torch.cat(list(ys), dim=1),
    "cat(dim=0)": lambda model, x, ys: torch.cat(list(ys)),
    "cat, then sum": lambda model, x, ys: torch.cat(list(ys), -1).sum(-1, keepdim=True) + model.bias,
    "stack, then mean": lambda model, x, ys: torch.stack(list(ys)).mean(0),
    "append, then cat": append_then_cat,
    "growing cat": growing_cat,
    "sum(ys) + bias": sum_and_bias,
    "out = out + y": running_sum,
    "zeros, out += y": running_sum_from_zeros,
    "out = ys[0]; out = torch.add(out, y)": first_then_add,
    "sum of squeezed": sum_of_squeezed,
    "functools.reduce": lambda model, x, ys: functools.reduce(operator.add, ys) + model.bias,
    "prediction and parts": additive_model,
    "list": lambda model, x, ys: list(ys),
    "tuple": lambda model, x, ys: tuple(ys),
    "dict": lambda model, x, ys: {f"feature_{i}": y for i, y in enumerate(ys)},
}


class FeatureNetworks(nn.Module):
    def __init__(self, n, pieces, join, **network):
        super().__init__()
        self.nets = nn.ModuleList(feature_network(**network) for _ in range(n))
        self.bias = nn.Parameter(torch.zeros(1))
        self.pieces, self.join = PIECES[pieces], JOINS[join]

    def forward(self, x):
        return self.join(self, x, (net(piece) for net, piece in zip(self.nets, self.pieces(x))))


@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("pieces", PIECES)
def test_every_slice_and_join(pieces, join):
    model = randomized(FeatureNetworks(3, pieces, join))
    assert_fused_equals(model, randn(5, 3), heavy=2, **QUICK)


@pytest.mark.parametrize("lanes", [2, 3, 7, 16])
@pytest.mark.parametrize(("hidden", "bias", "act"), [
    (1, True, nn.ReLU), (3, False, nn.ReLU), (8, True, nn.Tanh), (5, True, nn.GELU), (4, False, nn.ELU), (6, True, nn.SiLU),
    (2, True, nn.LeakyReLU), (3, True, nn.Softplus), (3, True, nn.Identity), (4, True, nn.PReLU),
])
def test_widths_and_lanes(lanes, hidden, bias, act):
    model = randomized(FeatureNetworks(lanes, "x[:, i:i+1]", "zeros, out[:, i] = y", hidden=hidden, bias=bias, act=act))
    assert_fused_equals(model, randn(6, lanes), heavy=2, lowering="bmm")  # as products: sizes of 1 have forms that count as none


# The loops themselves.


class OneSample(nn.Module):
    """The document's own code: x[:, i] is [1], and is taken for the one feature of a Linear because there is one sample."""

    def __init__(self, nof_features=2, bias=True):
        super().__init__()
        self.nof_features = nof_features
        self.feature_networks = nn.ModuleList()
        for _ in range(nof_features):
            self.feature_networks.append(
                nn.Sequential(
                    nn.Linear(in_features=1, out_features=3, bias=bias),
                    nn.Linear(in_features=3, out_features=3, bias=bias),
                    nn.Linear(in_features=3, out_features=1, bias=bias)
                ))

    def forward(self, input):
        output = torch.zeros(input.shape[0], self.nof_features, dtype=input.dtype)
        for feature_index in range(self.nof_features):  # Iterate over features
            output[:, feature_index] = self.feature_networks[feature_index](input[:, feature_index])
        return output


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("nof_features", [2, 5])
def test_one_sample(nof_features, bias):
    model = randomized(OneSample(nof_features, bias))
    assert_fused_equals(model, randn(1, nof_features), heavy=3, batches=(1,))
    fused = fxfuse.optimize(model, randn(1, nof_features), objective="launches")
    for each in (model, fused):  # the original refuses two samples; so must what stands for it
        with pytest.raises(RuntimeError):
            each(randn(2, nof_features))


class FeatureNN(nn.Module):
    """A custom feature net that takes x[:, i] and does its own unsqueeze."""

    def __init__(self, hidden=4):
        super().__init__()
        self.hidden = nn.Linear(1, hidden)
        self.out = nn.Linear(hidden, 1, bias=False)

    def forward(self, inputs):
        x = inputs.unsqueeze(1)
        x = F.relu(self.hidden(x))
        return self.out(x)


class LoopOverRange(nn.Module):
    def __init__(self, n=4):
        super().__init__()
        self.num_inputs = n
        self.feature_nns = nn.ModuleList([FeatureNN() for _ in range(n)])

    def forward(self, inputs):
        outputs = torch.zeros(inputs.shape[0], self.num_inputs, dtype=inputs.dtype)
        for i in range(self.num_inputs):
            outputs[:, i] = self.feature_nns[i](inputs[:, i]).squeeze(1)
        return outputs


class LoopOverShape(LoopOverRange):
    def forward(self, inputs):
        outputs = []
        for i in range(inputs.shape[1]):
            outputs.append(self.feature_nns[i](inputs[:, i]))
        return torch.cat(outputs, 1)


class LoopOverZip(LoopOverRange):
    def forward(self, inputs):
        return torch.cat([nn(column) for nn, column in zip(self.feature_nns, inputs.unbind(dim=1))], dim=-1)


class LoopOverEnumerate(LoopOverRange):
    def forward(self, inputs):
        out = inputs.new_zeros(inputs.shape[0], 1)
        for i, feature_nn in enumerate(self.feature_nns):
            out = out + feature_nn(inputs[:, i])
        return out


class LoopOverDict(LoopOverRange):
    """Networks by name in a ModuleDict, columns found through a dict of indices; outputs by name."""

    def __init__(self, n=4):
        super().__init__(n)
        self.columns = {f"column {i}": i for i in reversed(range(n))}
        self.feature_nns = nn.ModuleDict({name: FeatureNN() for name in self.columns})

    def forward(self, inputs):
        return {name: self.feature_nns[name](inputs[:, i]) for name, i in self.columns.items()}


class LoopWithHelper(LoopOverRange):
    """The loop calls a method; the sum is a second method's business."""

    def calc_outputs(self, inputs):
        return [self.feature_nns[i](inputs[:, i]) for i in range(self.num_inputs)]

    def forward(self, inputs):
        individual = self.calc_outputs(inputs)
        stacked = torch.stack(individual, dim=-1)
        return torch.sum(stacked, dim=-1), stacked


class LoopByAttributeName(LoopOverRange):
    def __init__(self, n=4):
        super().__init__(n)
        del self.feature_nns
        for i in range(n):
            setattr(self, f"feature_nn_{i}", FeatureNN())

    def forward(self, inputs):
        return sum(getattr(self, f"feature_nn_{i}")(inputs[:, i]) for i in range(self.num_inputs))


class LoopInWhile(LoopOverRange):
    def forward(self, inputs):
        out, i = [], 0
        while i < len(self.feature_nns):
            out += [self.feature_nns[i](inputs[:, i])]
            i += 1
        return torch.hstack(out)


@pytest.mark.parametrize("loop", [
    LoopOverRange, LoopOverShape, LoopOverZip, LoopOverEnumerate, LoopOverDict, LoopWithHelper, LoopByAttributeName, LoopInWhile,
])
def test_every_loop(loop):
    summed = loop in (LoopOverEnumerate, LoopByAttributeName)  # there the last layers and their sum are one dot or product
    assert_fused_equals(randomized(loop()), randn(6, 4), heavy=1 if summed else 2)


class InsideABiggerModel(nn.Module):
    """The loop is a child's; what stands around it must not change."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.features = LoopOverRange(4)
        self.head = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x):
        return self.head(torch.relu(self.features(self.norm(x))))


def test_inside_a_bigger_model():
    fused = assert_fused_equals(randomized(InsideABiggerModel()), randn(6, 4), heavy=5)  # LayerNorm, 2 of the loop, 2 of the head
    assert isinstance(fused.features, LoopOverRange)


class WideFeatures(nn.Module):
    """Columns come in groups: x[:, 3*i : 3*(i+1)]."""

    def __init__(self, n=4, width=3, out=2):
        super().__init__()
        self.width = width
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(width, 6), nn.ReLU(), nn.Linear(6, out)) for _ in range(n))

    def forward(self, x):
        return torch.cat([net(x[:, i * self.width:(i + 1) * self.width]) for i, net in enumerate(self.nets)], dim=1)


@pytest.mark.parametrize(("n", "width", "out"), [(4, 3, 2), (2, 5, 1), (7, 2, 4)])
def test_groups_of_columns(n, width, out):
    assert_fused_equals(randomized(WideFeatures(n, width, out)), randn(5, n * width), heavy=2)


class ColumnsInAnotherOrder(nn.Module):
    """Lane i reads column (3 * i) % n and the last one twice: no tiling of x, a gather."""

    def __init__(self, n=5):
        super().__init__()
        self.order = [(3 * i) % n for i in range(n)] + [n - 1]
        self.nets = nn.ModuleList(feature_network() for _ in self.order)

    def forward(self, x):
        return torch.cat([net(x[:, i:i + 1]) for net, i in zip(self.nets, self.order)], dim=1)


def test_columns_in_another_order():
    assert_fused_equals(randomized(ColumnsInAnotherOrder()), randn(6, 5), heavy=2)


class SeparateInputs(nn.Module):
    """One tensor per feature, as a list of arguments."""

    def __init__(self, n=3):
        super().__init__()
        self.nets = nn.ModuleList(feature_network() for _ in range(n))

    def forward(self, *columns):
        return torch.cat([net(column) for net, column in zip(self.nets, columns)], dim=1)


def test_separate_inputs():
    assert_fused_equals(randomized(SeparateInputs()), tuple(randn(6, 1, seed=i) for i in range(3)), heavy=2)


class ThreeDims(nn.Module):
    """x [N, T, n]: a column per time step and feature."""

    def __init__(self, n=3):
        super().__init__()
        self.nets = nn.ModuleList(feature_network() for _ in range(n))

    def forward(self, x):
        return torch.cat([net(x[:, :, i:i + 1]) for i, net in enumerate(self.nets)], dim=2)


def test_three_dims():
    assert_fused_equals(randomized(ThreeDims()), randn(6, 4, 3), heavy=2)
