"""Lanes of unequal sizes through ``torch.compile(model, backend="fxfuse")``: smaller members are filled up with zeros in the pack.

Between the zeros a member could only lie with other strides than its own, so that these packs share no memory with the Parameters.
"""

from __future__ import annotations

import copy
import time

import pytest
import torch
from compiling import assert_same_step, compiled, lie_together
from torch import nn

import fxfuse
from checks import mlp, model_of, randn, randomized

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def _tables(self, words):
    return torch.cat([table(words[:, i]) for i, table in enumerate(self.nets)], 1)


def _columns(self, x):
    return torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1)


def _heads(self, x):
    return [head(x) for head in self.nets]


def words(lanes):
    return torch.randint(4, (6, lanes), generator=torch.Generator().manual_seed(1))


def tables(rows, widths):
    return model_of(_tables, nets=nn.ModuleList(nn.Embedding(r, w) for r, w in zip(rows, widths)))


CASES = {
    "tables, few": (lambda: tables([5] * 6, [4, 4, 4, 5, 5, 5]), words(6), 1),
    "tables, few, the widest first": (lambda: tables([5] * 6, [6, 4, 4, 5, 5, 2]), words(6), 1),
    "tables of unequal rows and widths, few": (lambda: tables([5, 4, 7, 9, 5, 4], [4, 4, 3, 5, 5, 7]), words(6), 1),
    "tables, many": (lambda: tables([5] * 10, [4, 5] * 5), words(10), 1),
    "tables of unequal rows and widths, many": (lambda: tables(range(4, 16), [3, 5, 4] * 4), words(12), 1),
    "heads, few": (lambda: model_of(_heads, nets=nn.ModuleList(nn.Linear(4, 2 + i % 2) for i in range(4))), randn(5, 4), 1),
    "heads, many": (lambda: model_of(_heads, nets=nn.ModuleList(nn.Linear(4, 2 + i % 3) for i in range(9))), randn(5, 4), 1),
    "hidden widths, few": (lambda: model_of(_columns, nets=nn.ModuleList(mlp(hidden=3 + i % 2) for i in range(4))), randn(5, 4), 2),
    "hidden widths, many": (lambda: model_of(_columns, nets=nn.ModuleList(mlp(hidden=3 + i % 3) for i in range(10))), randn(5, 10), 2),
}


def made(name, training=True):
    make, x, heavy = CASES[name]
    return randomized(make()).train(training), x, heavy


def layers(counting):
    """Calls of layers in the last graph."""
    looked_up = [node for node in counting.graphs[-1].graph.nodes if getattr(node.target, "__name__", "") == "embedding"]
    return counting.heavy() + len(looked_up)


def same(call, model, x):
    with torch.no_grad():
        for a, b in zip([*call(x)], [*model(x)]):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("validate", [True, False], ids=["validated", "unseen"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", CASES)
def test_fused_and_equal(name, training, validate):
    model, x, heavy = made(name, training)
    strides = [p.stride() for p in model.parameters()]
    call, counting = compiled(model, validate=validate)
    for _ in range(3):
        assert_same_step(model, call, x)
    assert layers(counting) <= heavy < len(model.nets)
    assert len(counting.graphs) == 1
    assert [p.stride() for p in model.parameters()] == strides
    same(call, model, x)
    with torch.inference_mode():
        for a, b in zip([*call(x)], [*model(x)]):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_through_aot_autograd(name):
    model, x, _ = made(name)
    call = torch.compile(model, backend=fxfuse.backend("aot_eager", validate=False), fullgraph=True)
    for _ in range(2):
        assert_same_step(model, call, x)
    same(call, model, x)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", CASES)
def test_what_happens_to_the_weights_is_seen(name, inner):
    """Steps of an optimizer, loaded states (also assigned), and data that are set."""
    model, x, _ = made(name)
    twin, other = copy.deepcopy(model), randomized(copy.deepcopy(model), seed=8)
    call = torch.compile(model, backend=fxfuse.backend(inner, validate=False))
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.05) for m in (model, twin)]
    for _ in range(3):
        for optimizer, forward in zip(optimizers, (call, twin)):
            optimizer.zero_grad()
            sum(out.square().sum() for out in forward(x)).backward()
            optimizer.step()
        for (key, a), b in zip(model.named_parameters(), twin.parameters()):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=key)
        same(call, twin, x)
    for assign in (False, True):
        model.load_state_dict(copy.deepcopy((other if assign else twin).state_dict()), assign=assign)
        same(call, model, x)
        assert_same_step(model, call, x)
    last = [*model.parameters()][-1]
    last.data = randn(*last.shape, seed=9)
    same(call, model, x)
    assert_same_step(model, call, x)


@pytest.mark.parametrize("name", CASES)
def test_frozen(name):
    """Made once, in whatever form."""
    model, x, heavy = made(name, training=False)
    call, counting = compiled(model, freeze=True)
    for _ in range(2):
        same(call, model, x)
    assert layers(counting) <= heavy
    names = [str(node.target) for node in counting.graphs[-1].graph.nodes if node.op == "placeholder"]
    assert not [name for name in names if "parameters" in name]


@pytest.mark.parametrize("freeze", [False, True], ids=["stacked", "frozen"])
def test_the_copy_of_large_tables_counts(freeze, monkeypatch):
    """Where they are stacked at every call, as the loop reads a few rows of them; not where the pack is made once."""
    packed = []

    def slowly(recipe, members):
        packed.append(recipe.name)
        time.sleep(0.05)

    monkeypatch.setattr("fxfuse.dynamo.worth.pack", slowly)
    monkeypatch.setattr("fxfuse.dynamo.worth.SLOWER", 10.0)
    model = randomized(tables([2_000] * 8, [8, 6] * 4))
    call, counting = compiled(model, freeze=freeze)
    same(call, model, words(8))
    assert bool(packed) is not freeze
    assert layers(counting) == (1 if freeze else 8)


def test_tables_of_equal_widths_share_memory_still():
    model = randomized(tables(range(4, 14), [5] * 10))
    call, counting = compiled(model)
    assert_same_step(model, call, words(10))
    assert layers(counting) == 1
    assert lie_together(*model.parameters())
