"""What dynamo does with a model, and fxfuse with dynamo's graphs: open sizes, modes, graph breaks, recompilations, failures."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
import torch.nn.functional as F
from compiling import Counting, assert_same_step, compiled
from test_backend import _columns, nam, norms
from torch import nn
from torch._dynamo import lookup_backend
from torch._dynamo.testing import CompileCounterWithBackend

import fxfuse
from checks import assert_close, mlp, model_of, randn, randomized

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
X = randn(5, 10)


def graphs_of(model, calls, **keywords):
    """How many graphs dynamo makes of these calls, without fxfuse and with it; that results agree, and that all are fused."""
    numbers = []
    for fused in (False, True):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        backend = fxfuse.backend(counter) if fused else counter
        call = torch.compile(model, backend=backend, **keywords)
        for x in calls:
            torch.testing.assert_close(call(x), model(x), rtol=1e-10, atol=1e-12)
        numbers.append(counter.frame_count)
    return numbers


@pytest.mark.parametrize("dynamic", [None, True])
def test_batch_sizes_compile_no_more_often_than_with_any_backend(dynamic):
    plain, fused = graphs_of(nam(), [randn(n, 10) for n in (5, 9, 4, 17, 3)], dynamic=dynamic)
    assert fused == plain == (2 if dynamic is None else 1)


def test_mark_dynamic():
    model = nam()
    call, counting = compiled(model, fullgraph=True)
    x = randn(6, 10)
    torch._dynamo.mark_dynamic(x, 0)
    call(x)
    for n in (3, 12, 7):
        assert_same_step(model, call, randn(n, 10))
    assert len(counting.graphs) == 2  # with and without a gradient for the input
    assert counting.heavy(0) == counting.heavy(1) == 1


def test_open_sizes_through_aot_autograd():
    model = nam()
    call = torch.compile(model, backend=fxfuse.backend("aot_eager"), dynamic=True, fullgraph=True)
    for n in (6, 3, 12):
        assert_same_step(model, call, randn(n, 10))


def test_two_open_sizes():
    def forward(self, x, y):
        return torch.cat([net(x[:, :, i : i + 1]) for i, net in enumerate(self.nets)], 2).sum(1), y * x.shape[1]

    model = randomized(model_of(forward, nets=nn.ModuleList(mlp() for _ in range(9))))
    call, counting = compiled(model, dynamic=True)
    for batch, length in ((4, 7), (3, 5), (8, 2)):
        assert_same_step(model, call, (randn(batch, length, 9), randn(batch, 3)))
    assert len(counting.graphs) == 1
    assert counting.heavy() == 1


def test_numbers_that_dynamo_leaves_open_at_first():
    """With ``dynamic=True`` a momentum is an input, until AOTAutograd needs it: then dynamo comes again."""
    model = norms(9)
    counting = Counting(lookup_backend("aot_eager"))
    call, _ = compiled(model, counting, dynamic=True, fullgraph=True)
    for rows in (5, 8):
        assert_same_step(model, call, randn(rows, 4))
    assert counting.heavy() == 1


def test_a_loop_over_an_open_size_stays_open_or_stays():
    """A loop over the columns of x, of which dynamo leaves no number open: recompiled for each, as without fxfuse."""

    def forward(self, x):
        return torch.cat([self.net(x[:, i : i + 1]) for i in range(x.shape[1])], 1)

    model = randomized(model_of(forward, net=mlp()))
    plain, fused = graphs_of(model, [randn(5, n) for n in (9, 11, 12)])
    assert plain == fused


def test_mode_changes():
    nets = (nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.5), nn.Linear(4, 1)) for _ in range(9))
    model = randomized(model_of(_columns, nets=nn.ModuleList(nets)))
    call, counting = compiled(model, fullgraph=True)
    model.eval()
    assert_same_step(model, call, randn(5, 9))
    model.train()
    torch.manual_seed(0)
    first, second = call(randn(5, 9)), call(randn(5, 9))
    assert not torch.equal(first, second)
    for training in (False, True, False):
        model.train(training)
        call(randn(5, 9))
    assert len(counting.graphs) == 3  # eval with a gradient for the input, train, eval without
    assert all(counting.heavy(i) == 1 for i in range(3))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own
def test_graph_breaks():
    def forward(self, x):
        first = torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.firsts)], 1)
        torch._dynamo.graph_break()
        return torch.cat([net(first[:, i : i + 1]) for i, net in enumerate(self.seconds)], 1)

    model = randomized(model_of(forward, firsts=nn.ModuleList(mlp() for _ in range(9)), seconds=nn.ModuleList(mlp() for _ in range(9))))
    call, counting = compiled(model)
    assert_same_step(model, call, randn(5, 9))
    assert len(counting.graphs) == 2
    assert counting.heavy(0) == counting.heavy(1) == 1


def test_a_compiled_model_inside_a_compiled_model():
    inner = nam()
    inner_call, inner_counting = compiled(inner)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner
            self.heads = nn.ModuleList(nn.Linear(10, 2) for _ in range(9))

        def forward(self, x):
            y = inner_call(x)
            return torch.stack([head(y) for head in self.heads])

    outer = randomized(Outer())
    call, counting = compiled(outer)
    x = X.clone()
    torch.testing.assert_close(call(x), torch.stack([head(inner(x)) for head in outer.heads]), rtol=1e-10, atol=1e-12)
    assert len(counting.graphs) + len(inner_counting.graphs) >= 1


def one_warning(call, match):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = call()
    told = [str(w.message) for w in caught if "fxfuse" in str(w.message)]
    assert len(told) == 1, told
    assert match in told[0]
    return out


def test_a_failure_inside_costs_no_compilation(monkeypatch):
    def fails(*args, **keywords):
        raise ZeroDivisionError("of all things")

    monkeypatch.setattr("fxfuse.dynamo.checked.rewrite", fails)
    model = nam()
    call, counting = compiled(model)
    out = one_warning(lambda: call(X), "fxfuse failed (ZeroDivisionError: of all things)")
    torch.testing.assert_close(out, model(X), rtol=1e-10, atol=1e-12)
    assert counting.heavy() == 20


def test_a_wrong_rewrite_is_found(monkeypatch):
    from fxfuse.dynamo import check

    write = check.write

    def wrong(*args, **keywords):
        written = write(*args, **keywords)
        node = next(n for n in written.graph.nodes if getattr(n.target, "__name__", "") == "relu_")
        node.target = torch.tanh
        return written

    monkeypatch.setattr("fxfuse.dynamo.check.write", wrong)
    model = nam()
    call, _ = compiled(model, validate=True)
    out = one_warning(lambda: call(X), "undone: the rewritten form differs")
    torch.testing.assert_close(out, model(X), rtol=1e-10, atol=1e-12)


def test_an_inner_backend_that_fails_on_the_fused_graph_gets_dynamos():
    def inner(graph, inputs):
        if sum(node.op == "call_function" for node in graph.graph.nodes) < 20:
            raise NotImplementedError("baddbmm")
        return graph.forward

    model = nam()
    call = torch.compile(model, backend=fxfuse.backend(inner))
    out = one_warning(lambda: call(X), "it fails on the fused one (NotImplementedError: baddbmm)")
    torch.testing.assert_close(out, model(X), rtol=1e-10, atol=1e-12)


def test_a_write_into_an_input_is_left_or_right():
    def forward(self, x):
        x.add_(1)
        return torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1)

    model = randomized(model_of(forward, nets=nn.ModuleList(mlp() for _ in range(9))))
    call = torch.compile(model, backend=fxfuse.backend("aot_eager"))
    one, two = randn(5, 9), randn(5, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(call(one), model(two), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(one, two)


def test_results_that_are_inputs_and_views():
    def forward(self, x):
        out = torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1)
        return x, out, out[:, 1:], out

    model = randomized(model_of(forward, nets=nn.ModuleList(mlp() for _ in range(9))))
    call = torch.compile(model, backend=fxfuse.backend("aot_eager"))
    x = randn(5, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given, out, view, again = call(x)
    assert given is x
    assert out is again
    torch.testing.assert_close(out, model(x)[1], rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        out[0, 2] = 7.0
    assert view[0, 1] == 7.0


def test_a_model_that_fxfuse_has_optimized():
    x = randn(5, 10)
    for inner in ("eager", "aot_eager"):
        model = nam()
        fused = fxfuse.optimize(model, x, tune=False)
        assert fxfuse.report(fused).fused
        call = torch.compile(fused, backend=inner, fullgraph=True)
        assert_same_step(fused, call, x)
        for n in (3, 8):
            torch.testing.assert_close(call(randn(n, 10)), model(randn(n, 10)), rtol=1e-10, atol=1e-12)
        assert not fxfuse.fused.regions(fused)[""].fallbacks
        torch._dynamo.reset()
    call = torch.compile(fused, backend=fxfuse.backend("eager"), fullgraph=True)
    torch.testing.assert_close(call(x), model(x), rtol=1e-10, atol=1e-12)


def test_a_model_that_fuses_at_its_first_call():
    model = nam()
    twin = nam()
    fused = fxfuse.optimize(model, tune=False)
    fused(X)
    call = torch.compile(fused, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(call(X), twin(X), rtol=1e-10, atol=1e-12)


def test_logs_tell_what_was_done(caplog):
    model = nam()
    call, _ = compiled(model)
    with caplog.at_level(logging.INFO, "fxfuse"):
        call(X)
    said = "\n".join(r.getMessage() for r in caplog.records if r.name.startswith("fxfuse"))
    assert "10 lanes of linear as one" in said
    assert "rewritten and checked" in said


def test_dropout_in_lanes_draws_for_every_lane():
    def forward(self, x):
        return torch.stack([F.dropout(net(x), 0.5, self.training) for net in self.nets])

    model = randomized(model_of(forward, nets=nn.ModuleList(nn.Linear(4, 50) for _ in range(9))))
    call, counting = compiled(model)
    out = call(randn(20, 4))
    masks = out.detach() == 0
    assert 0.4 < masks.double().mean() < 0.6
    assert all(not torch.equal(masks[0], mask) for mask in masks[1:])
    assert counting.heavy() == 1


def test_inner_backends_by_name_and_function():
    for inner in ("eager", "aot_eager", Counting()):
        torch._dynamo.reset()
        model = nam()
        torch.testing.assert_close(torch.compile(model, backend=fxfuse.backend(inner))(X), model(X), rtol=1e-10, atol=1e-12)


def test_more_classes_than_dynamo_compiles_one_function_for():
    """Each fused class has a forward of its own: dynamo gives up on one that it has compiled for eight classes."""
    torch._dynamo.reset()
    for number in range(torch._dynamo.config.recompile_limit + 2):

        class Nets(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.nets = nn.ModuleList(mlp(1, outputs=1) for _ in range(4))

            def forward(self, x):
                return torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1)

        model = randomized(Nets())
        fused = fxfuse.optimize(model, X, objective="launches", tune=False)
        assert fxfuse.report(fused).fused
        assert_close(torch.compile(fused, backend="eager", fullgraph=True)(X), model(X), f"class {number}")


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleList(nn.Linear(3, 4) for _ in range(9))
        self.register_buffer("count", torch.ones((), dtype=torch.float64))

    def forward(self, x):
        return torch.stack([net(x) for net in self.nets], 1) * (self.count + 1)


def test_another_trace_that_dynamo_asks_for_is_no_failure(recwarn):
    """A buffer of one float64 number becomes one of Python's in a second trace, which the inner backend's compiler asks for."""
    model = randomized(Counter())
    counting = Counting(lookup_backend("aot_eager"))
    call = torch.compile(model, backend=fxfuse.backend(counting, lowering="bmm"), fullgraph=True)
    for count in (1.0, 5.0):
        model.count.fill_(count)
        assert_close(call(randn(5, 3)), model(randn(5, 3)), f"count {count}")
    assert len(counting.graphs) == 2
    assert counting.heavy() == 1
    assert not [str(w.message) for w in recwarn if "fxfuse" in str(w.message)]
