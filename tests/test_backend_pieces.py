"""Graphs that hold graphs: what is fused inside of them and around them, and what stays."""

from __future__ import annotations

import warnings

import pytest
import torch
from compiling import Counting, assert_same_step
from test_backend import COMPILER
from torch import nn
from torch._dynamo import lookup_backend
from torch._higher_order_ops import while_loop
from torch.utils.checkpoint import checkpoint

import fxfuse
from checks import mlp, randn, randomized

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
X = randn(5, 9)


class Columns(nn.Module):
    """A network per column."""

    def __init__(self, lanes: int = 9) -> None:
        super().__init__()
        self.nets = nn.ModuleList(mlp() for _ in range(lanes))
        self.last = nn.ModuleList(mlp() for _ in range(lanes))

    def columns(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1)

    def others(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.last)], 1)


class Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


class InCheckpoint(Columns):
    def forward(self, x):
        return checkpoint(self.columns, x, use_reentrant=False).sin()


class InAndAfterCheckpoint(Columns):
    def forward(self, x):
        return self.others(checkpoint(self.columns, x, use_reentrant=False))


class PerLaneCheckpoint(Columns):
    def forward(self, x):
        return torch.cat([checkpoint(net, x[:, i : i + 1], use_reentrant=False) for i, net in enumerate(self.nets)], 1)


class BeforeAndAfterFunction(Columns):
    def forward(self, x):
        return self.others(Round.apply(self.columns(x) * 3))


class BeforeCond(Columns):
    def forward(self, x):
        y = self.columns(x)
        return torch.cond(y.sum() > 0, lambda y: y * 2, lambda y: y - 1, (y,))


class InCond(Columns):
    def forward(self, x):
        return torch.cond(x.sum() > 0, self.columns, self.others, (x,))


class AroundWhileLoop(Columns):
    def forward(self, x):
        y = while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, self.others(y)), (torch.tensor(0), self.columns(x)))
        return y[1]


class Regions(Columns):
    @torch.compiler.nested_compile_region
    def one(self, net, x):
        return net(x)

    def forward(self, x):
        return torch.cat([self.one(net, x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1)


class RegionsAndCheckpoint(Regions):
    def forward(self, x):
        return checkpoint(self.others, super().forward(x), use_reentrant=False)


def heavy(graph: torch.fx.GraphModule) -> int:
    """Products in a graph and in all that it holds."""
    names = ("linear", "addcmul", "baddbmm", "bmm", "matmul", "addmm", "mm")
    modules = [m for m in graph.modules() if isinstance(m, torch.fx.GraphModule)]
    called = {id(m): m for m in modules if m is graph or any(getattr(graph, str(n.target), None) is m for n in graph.graph.nodes)}
    nodes = [node for module in called.values() for node in module.graph.nodes]
    return sum(getattr(node.target, "__name__", str(node.target)) in names for node in nodes if node.op == "call_function")


# the model, and its loops, each of 18 products: packed, the last layer may be a product or a sum
CASES = [
    (InCheckpoint, 1),
    (InAndAfterCheckpoint, 2),
    (BeforeAndAfterFunction, 2),
    (BeforeCond, 1),
    (Regions, 1),
    (RegionsAndCheckpoint, 2),
]


def compiled(model, inner="aot_eager", **keywords):
    counting = Counting(lookup_backend(inner))
    return torch.compile(model, backend=fxfuse.backend(counting), fullgraph=True, **keywords), counting


@pytest.mark.parametrize(("kind", "after"), CASES)
def test_what_is_fused(kind, after):
    model = randomized(kind())
    call, counting = compiled(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo's own
        warnings.filterwarnings("error", "fxfuse")
        for x in (X, -X):
            assert_same_step(model, call, x)
        with torch.no_grad():
            for x in (X, -X):
                torch.testing.assert_close(call(x), model(x), rtol=1e-10, atol=1e-12)
    assert all(after <= heavy(graph) <= 2 * after for graph in counting.graphs)


def test_branches_are_fused_where_no_gradient_is_asked_of_them():
    """With gradients, the weights' of both branches must lie alike in memory, also where one is zero: slices of a pack do not."""
    model = randomized(InCond())
    call, counting = compiled(model)
    with torch.no_grad():
        for x in (X, -X):
            torch.testing.assert_close(call(x), model(x), rtol=1e-10, atol=1e-12)
    assert 2 <= heavy(counting.graphs[0]) <= 4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for x in (X, -X):
            assert_same_step(model, call, x)
    assert heavy(counting.graphs[-1]) == 36


@pytest.mark.parametrize("kind", [*(kind for kind, _ in CASES), InCond])
def test_open_sizes(kind):
    model = randomized(kind())
    call, _ = compiled(model, dynamic=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what may not be fused with open sizes is right all the same
        for rows in (5, 3, 8):
            assert_same_step(model, call, randn(rows, 9))


def test_while_loop():
    model = randomized(AroundWhileLoop())
    call, counting = compiled(model)
    with torch.no_grad():
        for x in (X, -X):
            torch.testing.assert_close(call(x), model(x), rtol=1e-10, atol=1e-12)
    assert 2 <= heavy(counting.graphs[0]) <= 4


def test_a_checkpoint_per_lane_stays_and_says_why(caplog):
    model = randomized(PerLaneCheckpoint())
    call, counting = compiled(model)
    with caplog.at_level("INFO", "fxfuse"):
        assert_same_step(model, call, X)
    assert "calls tag_activation_checkpoint, which holds a graph of its own, and no piece of it can be fused: inside" in caplog.text
    assert heavy(counting.graphs[0]) == 18


def test_a_checkpoint_is_still_one():
    """What is inside is computed again in the backward, and not kept: fewer numbers are saved than without."""
    saved = {}
    for name, kind in (("kept", Columns), ("computed again", InCheckpoint)):
        model = randomized(kind())
        forward = torch.compile(model.columns if name == "kept" else model, backend=fxfuse.backend("aot_eager"))
        forward(randn(500, 9))
        total = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, total=total: total.append(t.numel()) or t, lambda t: t):
            forward(randn(500, 9))
        saved[name] = sum(total)
    assert saved["computed again"] < saved["kept"] / 2, saved


def test_a_piece_that_writes_to_what_it_is_given_stays(caplog):
    class Writes(Columns):
        def forward(self, x):
            out = torch.zeros_like(x)
            out = out + Round.apply(x)
            view = out[:, 1:]
            y = Round.apply(out)
            for i, net in enumerate(self.nets):
                out[:, i] = net(y[:, i : i + 1]).squeeze(1)
            return view, out

    model = randomized(Writes())
    call, _ = compiled(model)
    with caplog.at_level("INFO", "fxfuse"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same_step(model, call, X)
    assert "writes to memory that comes from outside" in caplog.text


def test_running_statistics_inside_and_outside():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.nets, self.last = (
                nn.ModuleList(nn.Sequential(nn.Linear(1, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 1)) for _ in range(9))
                for _ in range(2)
            )

        def forward(self, x):
            y = Round.apply(torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1) * 9)
            return torch.cat([net(y[:, i : i + 1]) for i, net in enumerate(self.last)], 1)

    model = randomized(Normed())
    call, counting = compiled(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for mode in (True, False, True):
            model.train(mode)
            for x in (X, -X):
                assert_same_step(model, call, x)
    for graph in counting.graphs:
        names = [getattr(node.target, "__name__", "") for node in graph.graph.nodes]
        assert names.count("batch_norm") == 2
        assert "linear" not in names


def test_a_view_of_statistics_that_a_later_piece_writes(caplog):
    class Viewed(Columns):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.ones(9, dtype=torch.float64))

        def forward(self, x):
            view = self.seen[1:]
            y = Round.apply(x * 3)
            self.seen.add_(y.detach().mean(0))
            return torch.cat([net(y[:, i : i + 1]) for i, net in enumerate(self.nets)], 1) + view.sum()

    model = randomized(Viewed())
    call, _ = compiled(model)
    with caplog.at_level("INFO", "fxfuse"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for x in (X, -X):
            assert_same_step(model, call, x)


def test_what_fails_in_a_piece_is_told(monkeypatch):
    monkeypatch.setattr("fxfuse.dynamo.checked.rewrite", lambda *args: 1 / 0)
    model = randomized(InCheckpoint())
    call, _ = compiled(model)
    with pytest.warns(UserWarning, match=r"fxfuse failed \(ZeroDivisionError"):
        out = call(X)
    torch.testing.assert_close(out, model(X), rtol=1e-10, atol=1e-12)


def test_autocast_between_the_pieces_is_left_alone():
    class Mixed(Columns):
        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = Round.apply(self.columns(x))
                return self.others(y)

    model = randomized(Mixed()).float()
    call, _ = compiled(model)
    with pytest.warns(UserWarning, match="_enter_autocast, which holds for several pieces"):
        out = call(X.float())
    expected = model(X.float())
    assert out.dtype == expected.dtype
    torch.testing.assert_close(out, expected, rtol=0.02, atol=0.02)


def test_an_inner_backend_that_fails_on_the_pieces_gets_dynamos():
    given = []

    def inner(graph, inputs):
        given.append(heavy(graph))
        if len(given) == 1:
            raise NotImplementedError("addcmul")
        return lookup_backend("aot_eager")(graph, inputs)

    model = randomized(InCheckpoint())
    call = torch.compile(model, backend=fxfuse.backend(inner))
    with pytest.warns(UserWarning, match=r"it fails on the fused one \(NotImplementedError: addcmul\)"):
        out = call(X)
    assert given == [1, 18]
    torch.testing.assert_close(out, model(X), rtol=1e-10, atol=1e-12)


@COMPILER
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute of a Tensor")  # Inductor's own, and dynamo's of cond
@pytest.mark.parametrize("kind", [InAndAfterCheckpoint, BeforeCond, RegionsAndCheckpoint])
def test_through_inductor(kind):
    model = randomized(kind())
    call, _ = compiled(model, "inductor")
    for x in (X, -X):
        assert_same_step(model, call, x)
