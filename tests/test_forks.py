"""Where lanes come apart, as people write it: each model with the heavy launches and the launches of all kinds that one forward may make.

Nothing is validated by fxfuse itself here, so that a wrong rewrite shows as wrong numbers.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxfuse
from checks import QUICK, Cases, assert_case, assert_equal_models, mlp, randn, randomized

CASES = Cases()
case = CASES.case


class Nets(nn.Module):
    def __init__(self, inputs: int = 2, outputs: int = 3, n: int = 4):
        super().__init__()
        self.nets = nn.ModuleList(mlp(inputs, outputs=outputs) for _ in range(n))


# -- ways to slice ----------------------------------------------------------------------------------------------------------------


@case(randn(5, 8), heavy=2, total=4)
class Chunk(Nets):
    def forward(self, x):
        return torch.cat([net(part) for net, part in zip(self.nets, x.chunk(4, dim=-1))], 1)


@case(randn(5, 8), heavy=2, total=4)
class SplitSizes(Nets):
    def forward(self, x):
        parts = torch.split(x, [2, 2, 2, 2], dim=1)
        return torch.stack([self.nets[i](parts[i]) for i in range(4)])


@case(randn(5, 4, 2), heavy=2, total=4)
class Unbind(Nets):
    def forward(self, x):
        return torch.stack([net(column) for net, column in zip(self.nets, torch.unbind(x, 1))], 1)


@case(randn(5, 4, 2), heavy=2, total=4)
class SelectMethod(Nets):
    def forward(self, x):
        return sum(net(x.select(1, i)) for i, net in enumerate(self.nets))


@case(randn(5, 8), heavy=2, total=4)
class Narrow(Nets):
    def forward(self, x):
        return torch.cat([net(x.narrow(-1, 2 * i, 2)) for i, net in enumerate(self.nets)], dim=-1)


@case(randn(5, 8), heavy=2, total=4)
class ReshapedFirst(Nets):
    def forward(self, x):
        x = x.view(x.size(0), 4, -1)
        return torch.stack([net(x[:, i, :]) for i, net in enumerate(self.nets)], dim=1)


@case(randn(5, 8), heavy=2, total=4)
class Strided(Nets):
    """``x[:, i::4]``: polyphase."""

    def forward(self, x):
        return torch.cat([net(x[:, i::4]) for i, net in enumerate(self.nets)], 1)


@case(randn(5, 9), heavy=2, total=5)
class StridedRemainder(Nets):
    """``x[:, i:8:4]``: strided, not to the end."""

    def forward(self, x):
        return torch.cat([net(x[:, i:8:4]) for i, net in enumerate(self.nets)], 1)


@case(randn(5, 4, 2), heavy=2, total=5)
class PermutedSelect(Nets):
    """An order list."""

    order = (2, 0, 3, 1)

    def forward(self, x):
        return torch.stack([self.nets[i](x[:, j]) for i, j in enumerate(self.order)], 1)


@case(randn(5, 8), heavy=2, total=5)
class PermutedSlices(Nets):
    order = (2, 0, 3, 1)

    def forward(self, x):
        return torch.cat([net(x[:, 2 * j : 2 * j + 2]) for net, j in zip(self.nets, self.order)], 1)


@case(randn(5, 8), heavy=2, total=5)
class IndexLists(Nets):
    """Every network gets columns of its own choice, by a list of positions."""

    groups = ([0, 3], [1, 7], [2, 5], [3, 4])

    def forward(self, x):
        return torch.cat([net(x[:, group]) for net, group in zip(self.nets, self.groups)], 1)


@case(randn(5, 8), heavy=2, total=9)
class IndexBuffers(Nets):
    """The same with index tensors held as buffers."""

    def __init__(self):
        super().__init__()
        for i, group in enumerate(([0, 3], [1, 7], [2, 5], [3, 4])):
            self.register_buffer(f"group_{i}", torch.tensor(group))

    def forward(self, x):
        return torch.cat([net(x[:, getattr(self, f"group_{i}")]) for i, net in enumerate(self.nets)], 1)


@case(randn(5, 8), heavy=2, total=9)
class IndexSelect(Nets):
    def __init__(self):
        super().__init__()
        self.register_buffer("groups", torch.tensor([[0, 3], [1, 7], [2, 5], [3, 4]]))

    def forward(self, x):
        return torch.cat([net(x.index_select(1, self.groups[i])) for i, net in enumerate(self.nets)], 1)


@case(randn(5, 3, 10), heavy=2, total=6)
class Windows(nn.Module):
    """Overlapping windows of a sequence, each with a convolution of its own (ATCNet)."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(3, 4, 3) for _ in range(4))
        self.dense = nn.ModuleList(nn.Linear(20, 2) for _ in range(4))

    def forward(self, x):
        outs = []
        for i in range(4):
            h = F.elu(self.convs[i](x[:, :, i : i + 7]))
            outs.append(self.dense[i](h.flatten(1)))
        return torch.mean(torch.stack(outs, 0), dim=0)


@case(randn(5, 12), heavy=2, total=5)
class WindowsByStride(Nets):
    def __init__(self):
        super().__init__(inputs=6)

    def forward(self, x):
        return torch.cat([net(x[:, s : s + 6]) for net, s in zip(self.nets, range(0, 8, 2))], 1)


@case(randn(5, 12), heavy=2, total=4)
class Unfold(Nets):
    def __init__(self):
        super().__init__(inputs=6)

    def forward(self, x):
        windows = x.unfold(1, 6, 2)
        return torch.cat([net(windows[:, i]) for i, net in enumerate(self.nets)], 1)


@case(randn(5, 8), heavy=2, total=4)
class HorizontalSplit(Nets):
    def forward(self, x):
        return torch.hstack([net(part) for net, part in zip(self.nets, torch.hsplit(x, 4))])


@case(randn(5, 6), heavy=3, total=5)
class WideThenLanes(nn.Module):
    """One wide layer, split into heads."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(6, 12)
        self.nets = nn.ModuleList(mlp(3, outputs=2) for _ in range(4))

    def forward(self, x):
        return [net(h) for net, h in zip(self.nets, self.stem(x).split(3, -1))]


@case(randn(5, 8), heavy=2, total=6)
class LeaveOneOut(nn.Module):
    """Every network sees all columns but its own."""

    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleList(mlp(7) for _ in range(8))

    def forward(self, x):
        return torch.cat([net(torch.cat([x[:, :i], x[:, i + 1 :]], dim=1)) for i, net in enumerate(self.nets)], 1)


@case(randn(5, 8), heavy=2, total=6)
class WithShared(nn.Module):
    """Every network gets its own column and a shared context."""

    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleList(mlp(5) for _ in range(4))

    def forward(self, x):
        context = x[:, 4:]
        return torch.cat([net(torch.cat([x[:, i : i + 1], context], -1)) for i, net in enumerate(self.nets)], -1)


# -- unequal widths ---------------------------------------------------------------------------------------------------------------


@case(randn(5, 11), heavy=3, total=8)
class UnequalWidths(nn.Module):
    """Groups of other widths: the first layers are filled up to one width."""

    widths = (2, 3, 2, 1, 3)

    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleList(
            nn.Sequential(nn.Linear(w, 6), nn.ReLU(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1)) for w in self.widths
        )

    def forward(self, x):
        outs, at = [], 0
        for net, w in zip(self.nets, self.widths):
            outs.append(net(x[:, at : at + w]))
            at += w
        return torch.cat(outs, dim=1)


@case(randn(5, 11), heavy=4, total=8, refused="proj.1 stays out of the lanes next to it: input [5, 3] against [5, 4]")
class UnequalSplit(nn.Module):
    widths = (4, 3, 4)

    def __init__(self):
        super().__init__()
        self.proj = nn.ModuleList(nn.Linear(w, 6) for w in self.widths)
        self.out = nn.ModuleList(nn.Linear(6, 2) for _ in self.widths)
        self.norm = nn.LayerNorm(2)

    def forward(self, x):
        hs = [torch.relu(p(part)) for p, part in zip(self.proj, x.split(list(self.widths), dim=1))]
        return self.norm(sum(o(h) for o, h in zip(self.out, hs)))


# -- different inputs -------------------------------------------------------------------------------------------------------------


@case(tuple(randn(5, 3, seed=s) for s in range(3)), heavy=2, total=5)
class PositionalInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleList(mlp(3, outputs=2) for _ in range(3))

    def forward(self, a, b, c):
        return torch.stack([net(x) for net, x in zip(self.nets, (a, b, c))], 1)


@case(({name: randn(5, 3, seed=i) for i, name in enumerate(("price", "volume", "spread", "age"))},), heavy=2, total=5)
class DictInputs(nn.Module):
    """``inputs[name]`` (TFT's variable selection)."""

    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleDict({name: mlp(3, outputs=2) for name in ("price", "volume", "spread", "age")})

    def forward(self, inputs):
        return torch.cat([net(inputs[name]) for name, net in self.nets.items()], dim=-1)


@case(({f"agent_{i}": randn(5, 3, seed=i) for i in range(3)},), heavy=2, total=6)
class Agents(nn.Module):
    """Multi-agent policies: a dict of observations in, a dict of actions out."""

    def __init__(self):
        super().__init__()
        self.policies = nn.ModuleDict({f"agent_{i}": mlp(3, outputs=2) for i in range(3)})

    def forward(self, observations):
        return {name: torch.tanh(self.policies[name](x)) for name, x in observations.items()}


@case(([randn(5, 3, seed=i) for i in range(4)],), heavy=2, total=5)
class ListInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleList(mlp(3, outputs=2) for _ in range(4))

    def forward(self, xs):
        return [net(x) for net, x in zip(self.nets, xs)]


@case(([randn(5, 3, seed=i) for i in range(4)],), heavy=4, total=10)
class ListInputsTwice(nn.Module):
    """The same inputs feed two loops: they are stacked once."""

    def __init__(self):
        super().__init__()
        self.values = nn.ModuleList(mlp(3, outputs=2) for _ in range(4))
        self.weights = nn.ModuleList(mlp(3, 5, outputs=1) for _ in range(4))

    def forward(self, xs):
        values = torch.stack([net(x) for net, x in zip(self.values, xs)], 1)
        weights = torch.cat([net(x) for net, x in zip(self.weights, xs)], 1).softmax(1)
        return (values * weights.unsqueeze(-1)).sum(1)


@case(randn(5, 6), heavy=2, total=4)
class SharedInput(Nets):
    def __init__(self):
        super().__init__(inputs=6)

    def forward(self, x):
        return torch.cat([net(x) for net in self.nets], 1)


# -- pairs ------------------------------------------------------------------------------------------------------------------------


@case(randn(5, 6, 4), heavy=1, total=5)
class BilinearPairs(nn.Module):
    """FiBiNET, ``bilinear_type="interaction"``: a Linear per pair, applied to one field, times the other."""

    def __init__(self):
        super().__init__()
        self.bilinear = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in itertools.combinations(range(6), 2))

    def forward(self, inputs):
        inputs = torch.split(inputs, 1, dim=1)
        p = [torch.mul(bilinear(v[0]), v[1]) for v, bilinear in zip(itertools.combinations(inputs, 2), self.bilinear)]
        return torch.cat(p, dim=1)


@case(randn(5, 6, 4), heavy=1, total=5)
class BilinearEach(nn.Module):
    """``bilinear_type="each"``: a Linear per field, used by all pairs that start with it."""

    def __init__(self):
        super().__init__()
        self.bilinear = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(6))

    def forward(self, inputs):
        inputs = torch.split(inputs, 1, dim=1)
        p = [torch.mul(self.bilinear[i](inputs[i]), inputs[j]) for i, j in itertools.combinations(range(len(inputs)), 2)]
        return torch.cat(p, dim=1)


@case(randn(5, 6, 4), heavy=1, total=5)
class BilinearAll(nn.Module):
    """``bilinear_type="all"``: one Linear for all."""

    def __init__(self):
        super().__init__()
        self.bilinear = nn.Linear(4, 4, bias=False)

    def forward(self, inputs):
        inputs = torch.split(inputs, 1, dim=1)
        return torch.cat([torch.mul(self.bilinear(a), b) for a, b in itertools.combinations(inputs, 2)], dim=1)


@case(([randn(5, 1, 4, seed=i) for i in range(6)],), heavy=1, total=6)
class PairsOfList(nn.Module):
    """The fields come as a list of tensors: they are joined once, and the pairs picked from there."""

    def __init__(self):
        super().__init__()
        self.bilinear = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(15))

    def forward(self, fields):
        pairs = itertools.combinations(fields, 2)
        return torch.cat([lin(a) * b for lin, (a, b) in zip(self.bilinear, pairs)], dim=1)


@case(randn(5, 5), heavy=2, total=6)
class PairNetworks(nn.Module):
    """A network on the columns i and j (NA2M, GA2M)."""

    def __init__(self):
        super().__init__()
        self.pairs = list(itertools.combinations(range(5), 2))
        self.nets = nn.ModuleList(mlp(2) for _ in self.pairs)

    def forward(self, x):
        return sum(net(torch.stack([x[:, i], x[:, j]], dim=1)) for net, (i, j) in zip(self.nets, self.pairs))


@case(randn(5, 5), heavy=2, total=5)
class PairNetworksByList(nn.Module):
    """The same by ``x[:, [i, j]]``."""

    def __init__(self):
        super().__init__()
        self.pairs = list(itertools.combinations(range(5), 2))
        self.nets = nn.ModuleList(mlp(2) for _ in self.pairs)

    def forward(self, x):
        out = x.new_zeros(x.shape[0], 1)
        for (i, j), net in zip(self.pairs, self.nets):
            out = out + net(x[:, [i, j]])
        return out


@case(randn(5, 4, 3), heavy=2, total=8)
class Embedded(nn.Module):
    """Two loops: the second reads what the first made, pair by pair."""

    def __init__(self):
        super().__init__()
        self.embed = nn.ModuleList(nn.Linear(3, 4) for _ in range(4))
        self.cross = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))

    def forward(self, x):
        e = [torch.tanh(lin(x[:, i])) for i, lin in enumerate(self.embed)]
        pairs = [lin(e[i]) * e[j] for lin, (i, j) in zip(self.cross, itertools.combinations(range(4), 2))]
        return torch.stack(pairs, 1)


@pytest.mark.parametrize("name", CASES)
def test_fork(name):
    assert_case(CASES[name])


class Rows(nn.Module):
    """A row each, of at least four: further rows are not read."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(3, 2, 3) for _ in range(4))

    def forward(self, x):
        return torch.stack([conv(x[:, :, i]) for i, conv in enumerate(self.convs)], 2)


def test_more_rows_than_lanes():
    model = randomized(Rows())
    fused = fxfuse.optimize(model, randn(5, 3, 4, 7), objective="launches", **QUICK)
    trials = [(randn(2, 3, rows, length, seed=rows), {}) for rows, length in ((4, 7), (4, 9), (6, 7))]
    assert_equal_models(model, fused, trials)
    with pytest.raises(IndexError):  # as the model itself
        fused(randn(2, 3, 3, 7))


def test_lists_next_to_numbers_and_free_sizes():
    """Lists that are no plain choice of columns: along the batch, beside an index, nested."""
    class Lists(Nets):
        def forward(self, x):
            parts = [net(x[[0, 2], 2 * i : 2 * i + 2]) + x[:, [[i, 0]]].sum() + x[1, [i]].sum() for i, net in enumerate(self.nets)]
            return torch.cat(parts, 1)

    model = randomized(Lists())
    fused = fxfuse.optimize(model, randn(5, 8), objective="launches", **QUICK)
    assert_equal_models(model, fused, [(randn(rows, 8, seed=rows), {}) for rows in (3, 5, 9)])
    with pytest.raises(IndexError):
        fused(randn(2, 8))


def test_a_list_of_columns_without_lanes():
    """What no lane is made of is picked by an index that the model holds, not by one made at each call."""
    class Columns(Nets):
        def forward(self, x):
            rest = torch.cat([x[:, :1], x[:, 3:]], 1) + x[:, [5, 0, 2, 2, 1, 7]]
            return torch.cat([net(x[:, 2 * i : 2 * i + 2]) for i, net in enumerate(self.nets)] + [rest], 1)

    model = randomized(Columns())
    fused = fxfuse.optimize(model, randn(5, 8), objective="launches", min_lanes=3, **QUICK)
    assert_equal_models(model, fused, [(randn(rows, 8, seed=rows), {}) for rows in (1, 5, 9)])
    assert "index_select" in str(next(iter(fxfuse.graph(fused).values())).graph)
    assert "pick_along" not in str(next(iter(fxfuse.graph(fused).values())).graph)
