"""Where the loops are: in loops, in methods, in plain lists, in submodules; each model with the launches that one forward may make.

Nothing is validated by fxfuse itself here, so that a wrong rewrite shows as wrong numbers.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxfuse
from checks import QUICK, Cases, assert_case, assert_equal_models, assert_heavy, mlp, randn, randomized

CASES = Cases()
case = CASES.case
X = randn(5, 4)


class Nets(nn.Module):
    def __init__(self, inputs: int = 1, outputs: int = 1, n: int = 4):
        super().__init__()
        self.nets = nn.ModuleList(mlp(inputs, outputs=outputs) for _ in range(n))


class Nam(Nets):
    def forward(self, x):
        return sum(net(x[:, i : i + 1]) for i, net in enumerate(self.nets))


# -- loops in loops ---------------------------------------------------------------------------------------------------------------


@case(heavy=2, total=6)
class EnsembleOfNams(nn.Module):
    def __init__(self):
        super().__init__()
        self.members = nn.ModuleList(Nam() for _ in range(3))

    def forward(self, x):
        return torch.stack([member(x) for member in self.members]).mean(0)


@case(heavy=2, total=5)
class EnsembleOfEnsembles(nn.Module):
    """Three levels deep, all joins are sums."""

    def __init__(self):
        super().__init__()
        self.groups = nn.ModuleList(nn.ModuleList(Nam() for _ in range(2)) for _ in range(2))

    def forward(self, x):
        return sum(sum(nam(x) for nam in group) for group in self.groups)


class Stacked(Nets):
    def forward(self, x):
        out = torch.empty_like(x)
        for i, net in enumerate(self.nets):
            out[:, i : i + 1] = net(x[:, i : i + 1])
        return out


@case(heavy=2, total=5)
class EnsembleOfSliceWrites(nn.Module):
    def __init__(self):
        super().__init__()
        self.members = nn.ModuleList(Stacked() for _ in range(3))

    def forward(self, x):
        return [member(x) for member in self.members]


@case(randn(5, 6), heavy=5, total=14)
class ExpertsPerTask(nn.Module):
    """CGC: experts of each task and shared ones, a gate and a tower per task."""

    def __init__(self, tasks=3, own=2, shared=2):
        super().__init__()
        self.task_experts = nn.ModuleList(nn.ModuleList(mlp(6, outputs=4) for _ in range(own)) for _ in range(tasks))
        self.shared_experts = nn.ModuleList(mlp(6, outputs=4) for _ in range(shared))
        self.gates = nn.ModuleList(nn.Linear(6, own + shared) for _ in range(tasks))
        self.towers = nn.ModuleList(mlp(4) for _ in range(tasks))

    def forward(self, x):
        shared = [expert(x) for expert in self.shared_experts]
        outs = []
        for experts, gate, tower in zip(self.task_experts, self.gates, self.towers):
            outputs = torch.stack([expert(x) for expert in experts] + shared, dim=1)
            weights = F.softmax(gate(x), dim=-1).unsqueeze(1)
            outs.append(tower(torch.bmm(weights, outputs).squeeze(1)))
        return outs


class Cgc(nn.Module):
    """One level of PLE: its inputs and outputs are one tensor per task and one shared."""

    def __init__(self, width, tasks=2, own=2):
        super().__init__()
        self.tasks = tasks
        self.experts = nn.ModuleList(
            nn.ModuleList(nn.Sequential(nn.Linear(width, 4), nn.LayerNorm(4), nn.ReLU()) for _ in range(own)) for _ in range(tasks + 1)
        )
        self.gates = nn.ModuleList(nn.Linear(width, 2 * own) for _ in range(tasks))
        self.shared_gate = nn.Linear(width, own * (tasks + 1))

    def forward(self, xs):
        outs = [[e(xs[t]) for e in self.experts[t]] for t in range(self.tasks + 1)]
        result = []
        for t in range(self.tasks):
            weights = torch.softmax(self.gates[t](xs[t]), 1).unsqueeze(-1)
            result.append((weights * torch.stack(outs[t] + outs[-1], 1)).sum(1))
        weights = torch.softmax(self.shared_gate(xs[-1]), 1).unsqueeze(-1)
        result.append((weights * torch.stack([o for group in outs for o in group], 1)).sum(1))
        return result


@case(randn(5, 6), heavy=9, total=45)
class ProgressiveExtraction(nn.Module):
    """PLE, two levels."""

    def __init__(self):
        super().__init__()
        self.levels = nn.ModuleList([Cgc(6), Cgc(4)])
        self.towers = nn.ModuleList(nn.Linear(4, 1) for _ in range(2))

    def forward(self, x):
        hs = [x] * 3
        for level in self.levels:
            hs = level(hs)
        return [tower(h) for tower, h in zip(self.towers, hs)]


@case(randn(5, 4, 3), heavy=3, total=10)
class TwoStages(nn.Module):
    """A loop after a loop: the second reads the join of the first."""

    def __init__(self):
        super().__init__()
        self.first = nn.ModuleList(nn.Linear(3, 2) for _ in range(4))
        self.mix = nn.Linear(8, 8)
        self.second = nn.ModuleList(nn.Linear(2, 1) for _ in range(4))

    def forward(self, x):
        h = torch.cat([net(x[:, i]) for i, net in enumerate(self.first)], 1)
        h = torch.relu(self.mix(h))
        return torch.cat([net(part) for net, part in zip(self.second, h.chunk(4, 1))], 1)


# -- partial agreement ------------------------------------------------------------------------------------------------------------


@case(heavy=2, total=7)
class PrefixOnly(nn.Module):
    """Equal first layers, then other activations and heads."""

    def __init__(self):
        super().__init__()
        self.stems = nn.ModuleList(nn.Linear(4, 6) for _ in range(4))
        self.heads = nn.ModuleList(nn.Linear(6, 1) for _ in range(4))
        self.acts = [torch.relu, torch.tanh, torch.relu, torch.sigmoid]

    def forward(self, x):
        hs = [act(stem(x)) for act, stem in zip(self.acts, self.stems)]
        return torch.cat([head(h) for head, h in zip(self.heads, hs)], 1)


@case((randn(5, 4), randn(5, 3, 4, seed=2)), heavy=5, total=10)
class SuffixOnly(nn.Module):
    """Modalities with encoders of their own kind, then equal heads."""

    def __init__(self):
        super().__init__()
        self.table = nn.Linear(4, 6)
        self.series = nn.Conv1d(3, 6, 4)
        self.heads = nn.ModuleList(mlp(6) for _ in range(2))

    def forward(self, x, s):
        encoded = [self.table(x).relu(), self.series(s).squeeze(-1).relu()]
        return sum(head(e) for head, e in zip(self.heads, encoded))


@case(heavy=4, total=14)
class TwoKinds(nn.Module):
    """Lanes of two widths, mixed."""

    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleList(mlp(1, hidden) for hidden in (6, 8, 6, 8))

    def forward(self, x):
        return torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1)


@case(heavy=4, total=10)
class OneDeeper(nn.Module):
    """One network has a layer more than the others."""

    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleList(mlp() for _ in range(3))
        self.nets.append(nn.Sequential(nn.Linear(1, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 1)))

    def forward(self, x):
        return torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1)


@case(heavy=2, total=8)
class LastLaneScaled(Nets):
    """One lane is treated further before it is joined."""

    def forward(self, x):
        outs = [net(x[:, i : i + 1]) for i, net in enumerate(self.nets)]
        outs[-1] = outs[-1] * 2.0
        return torch.cat(outs, 1)


# -- layer by layer ---------------------------------------------------------------------------------------------------------------


@case(heavy=3, total=8)
class LayerMajor(nn.Module):
    """deepxde's PFNN: a list of layers, each a list with one Linear per output."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            [
                nn.ModuleList([nn.Linear(4, 6) for _ in range(3)]),
                nn.ModuleList([nn.Linear(6, 6) for _ in range(3)]),
                nn.ModuleList([nn.Linear(6, 1) for _ in range(3)]),
            ]
        )

    def forward(self, x):
        x = [torch.tanh(net(x)) for net in self.layers[0]]
        for layer in self.layers[1:-1]:
            x = [torch.tanh(net(h)) for net, h in zip(layer, x)]
        return torch.cat([net(h) for net, h in zip(self.layers[-1], x)], dim=1)


@case(heavy=5, total=12)
class SharedThenParallel(nn.Module):
    """PFNN with shared layers before the parallel ones."""

    def __init__(self):
        super().__init__()
        self.shared = nn.ModuleList([nn.Linear(4, 6), nn.Linear(6, 6)])
        self.parallel = nn.ModuleList(nn.ModuleList(nn.Linear(6, 6) for _ in range(3)) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(6, 1) for _ in range(3))

    def forward(self, x):
        for layer in self.shared:
            x = torch.tanh(layer(x))
        hs = [x] * 3
        for layer in self.parallel:
            hs = [torch.tanh(layer[i](hs[i])) for i in range(3)]
        return torch.cat([f(h) for f, h in zip(self.out, hs)], dim=1)


@case(heavy=2, total=6)
class ByKind(nn.Module):
    """All first layers in one list, all last layers in another, biases as parameters."""

    def __init__(self):
        super().__init__()
        self.w1 = nn.ParameterList(nn.Parameter(torch.randn(1, 6)) for _ in range(4))
        self.b1 = nn.ParameterList(nn.Parameter(torch.randn(6)) for _ in range(4))
        self.w2 = nn.ParameterList(nn.Parameter(torch.randn(6, 1)) for _ in range(4))

    def forward(self, x):
        hidden = [torch.relu(x[:, i : i + 1] @ self.w1[i] + self.b1[i]) for i in range(4)]
        return torch.cat([h @ w for h, w in zip(hidden, self.w2)], dim=1)


# -- modules used twice, held anywhere --------------------------------------------------------------------------------------------


@case((randn(5, 4), randn(5, 4, seed=2)), heavy=2, total=9)
class TwoLoops(Nets):
    """A siamese pair: every network is called in two loops."""

    def forward(self, a, b):
        left = torch.cat([net(a[:, i : i + 1]) for i, net in enumerate(self.nets)], 1)
        right = torch.cat([net(b[:, i : i + 1]) for i, net in enumerate(self.nets)], 1)
        return (left - right).abs()


@case((randn(5, 2, 4, 6), randn(5, 2, 4, 6, seed=2)), heavy=3, total=17)
class TwoLoopsOfBlocks(nn.Module):
    """The same with convolutions, norms and learned slopes."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv1d(2, 3, 3), nn.PReLU(3), nn.LayerNorm(4), nn.Conv1d(3, 1, 4)) for _ in range(4)
        )

    def encode(self, x):
        return torch.cat([block(x[:, :, i]) for i, block in enumerate(self.blocks)], 2)

    def forward(self, a, b):
        return self.encode(a) * self.encode(b)


@case((randn(5, 4), randn(5, 4, seed=2), randn(5, 4, seed=3)), heavy=2, total=12)
class ThreeLoopsOneWithout(Nets):
    """Three loops, the last over two of the networks only."""

    def forward(self, a, b, c):
        outs = [net(x[:, i : i + 1]) for x in (a, b) for i, net in enumerate(self.nets)]
        return torch.cat(outs + [self.nets[i](c[:, i : i + 1]) for i in (1, 3)], 1)


@case(heavy=4, total=10)
class TwoLoopsInSeries(Nets):
    """The second loop reads what the first made, through the same networks."""

    def forward(self, x):
        for _ in range(2):
            x = torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1)
        return x


@case(heavy=4, total=12)
class SomeUsedAgain(Nets):
    """Two of the networks run again outside of the loop."""

    def forward(self, x):
        out = torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1)
        return out, self.nets[0](out[:, :1]) + self.nets[2](out[:, 2:3])


@case(heavy=2, total=6)
class Getattr(nn.Module):
    """CANINE: modules held by ``setattr`` under numbered names."""

    def __init__(self):
        super().__init__()
        for i in range(4):
            setattr(self, f"net_{i}", mlp())

    def forward(self, x):
        return sum(getattr(self, f"net_{i}")(x[:, i : i + 1]) for i in range(4))


@case(heavy=2, total=6)
class PlainList(nn.Module):
    """Registered one by one, and held in a plain list besides."""

    def __init__(self):
        super().__init__()
        self.all = []
        for i in range(4):
            net = mlp()
            self.add_module(f"net{i}", net)
            self.all.append(net)

    def forward(self, x):
        return torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.all)], 1)


@case(heavy=2, total=6)
class PlainDict(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (mlp() for _ in range(4))
        self.table = {"a": (self.a, 0), "b": (self.b, 1), "c": (self.c, 2), "d": (self.d, 3)}

    def forward(self, x):
        return {name: net(x[:, [at]]) for name, (net, at) in self.table.items()}


@case(heavy=2, total=6)
class Functional(nn.Module):
    """Weights are passed to a function."""

    def __init__(self):
        super().__init__()
        shapes = {"w": (6, 1), "b": (6,), "v": (1, 6)}
        self.weights = nn.ParameterDict({f"{kind}{i}": nn.Parameter(torch.randn(*shapes[kind])) for i in range(4) for kind in shapes})

    @staticmethod
    def run(x, w, b, v):
        return F.linear(F.relu(F.linear(x, w, b)), v)

    def forward(self, x):
        p = self.weights
        return torch.cat([self.run(x[:, i : i + 1], p[f"w{i}"], p[f"b{i}"], p[f"v{i}"]) for i in range(4)], 1)


@case(heavy=2, total=6)
class FunctionalCall(nn.Module):
    """``torch.func.functional_call`` on one template, with the parameters of each member."""

    def __init__(self):
        super().__init__()
        self.members = nn.ModuleList(mlp(4) for _ in range(3))

    def forward(self, x):
        template = self.members[0]
        outs = [torch.func.functional_call(template, dict(member.named_parameters()), (x,)) for member in self.members]
        return torch.stack(outs)


@case(heavy=2, total=6)
class Slices(nn.Module):
    """One weight tensor of all lanes, indexed by lane."""

    def __init__(self):
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.randn(4, 6, 1)), nn.Parameter(torch.randn(4, 6))
        self.w2 = nn.Parameter(torch.randn(4, 1, 6))

    def forward(self, x):
        outs = []
        for i in range(4):
            h = torch.relu(F.linear(x[:, i : i + 1], self.w1[i], self.b1[i]))
            outs.append(F.linear(h, self.w2[i]))
        return torch.cat(outs, 1)


# -- regions below a top level that cannot be traced ------------------------------------------------------------------------------


class Untraceable(nn.Module):
    """A branch on data at the top; the loop is in a submodule."""

    def __init__(self):
        super().__init__()
        self.body = Stacked()
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        if x.sum() > 0:
            x = x * 2
        return self.head(self.body(x))


class UntraceableDeep(nn.Module):
    """Two loops under a top that prints and reads values, one of them two levels down."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(Stacked(), nn.Tanh())
        self.block = nn.ModuleDict({"inner": nn.Sequential(nn.Linear(4, 4), Nam())})

    def forward(self, x):
        scale = float(x.detach().abs().max())
        h = self.stem(x / scale)
        if h.mean().item() > 1e6:
            raise ValueError("diverged")
        return self.block["inner"](h) * scale


class OneBranchOnly(nn.Module):
    """The submodule with the loop runs on some data only."""

    def __init__(self):
        super().__init__()
        self.body, self.other = Stacked(), nn.Linear(4, 4)

    def forward(self, x):
        return self.body(x) if x[0, 0] > 0 else self.other(x)


@pytest.mark.parametrize("name", CASES)
def test_structure(name):
    assert_case(CASES[name])


@pytest.mark.parametrize(("cls", "heavy"), [(Untraceable, 3), (UntraceableDeep, 5)])
def test_loops_below_a_top_level_that_cannot_be_traced(cls, heavy):
    model = randomized(cls())
    fused = fxfuse.optimize(model, X, objective="launches", **QUICK)
    report = fxfuse.report(fused)
    assert report.fused, str(report)
    assert any("tensor data" in str(r) or "depend" in str(r) for r in report.refused), str(report)
    assert_equal_models(model, fused, [(X, {}), (-X.abs(), {}), (X.abs(), {}), (randn(9, 4, seed=8), {}), (randn(1, 4, seed=9), {})])
    assert_heavy(fused, X, heavy)
    assert not fxfuse.report(fused).fallbacks


def test_loop_that_runs_on_some_data_only():
    model = randomized(OneBranchOnly())
    x = X.abs()
    fused = fxfuse.optimize(model, x, objective="launches", **QUICK)
    assert_equal_models(model, fused, [(x, {}), (-x, {}), (randn(9, 4, seed=8), {})])
    assert fxfuse.report(fused).refused
