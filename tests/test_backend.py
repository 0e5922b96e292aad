"""``torch.compile(model, backend="fxfuse")``: one loop of every kind is fused, and computes what the model computes.

The inner backend is "eager" in most tests, so that what is compared is what fxfuse wrote; a few go through AOTAutograd and Inductor.
"""

from __future__ import annotations

import shutil
import warnings

import pytest
import torch
import torch.nn.functional as F
from compiling import Counting, assert_same_step, compiled, lie_together
from torch import nn

import fxfuse
from checks import mlp, model_of, randn, randomized

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler, and g++ is not there")


def _columns(self, x):
    out = torch.zeros(x.shape[0], len(self.nets), dtype=x.dtype)
    for i in range(len(self.nets)):
        out[:, i] = self.nets[i](x[:, i : i + 1]).squeeze(-1)
    return out


def nam(lanes: int = 10, **layers: int) -> nn.Module:
    return randomized(model_of(_columns, nets=nn.ModuleList(mlp(**layers) for _ in range(lanes))))


def _rows(self, x):
    return torch.stack([conv(x[:, :, h, :]) for h, conv in enumerate(self.convs)], dim=2)


def _shared(self, x):
    return torch.cat([self.conv(x[:, i : i + 1]) for i in range(x.shape[1])], dim=1)


def _experts(self, x):
    gates = torch.softmax(self.gate(x), 1)
    return sum(gates[:, i : i + 1] * expert(x) for i, expert in enumerate(self.experts))


def _normed(self, x):
    return torch.stack([net(x) for net in self.nets])


def norms(lanes: int) -> nn.Module:
    nets = (nn.Sequential(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3), nn.ReLU()) for _ in range(lanes))
    return randomized(model_of(_normed, nets=nn.ModuleList(nets)))


def _listed(self, x):
    return {"heads": [head(x) for head in self.heads], "rows": x.shape[0]}


def _tables(self, words):
    return torch.cat([table(words[:, i]) for i, table in enumerate(self.tables)], 1)


CASES = {
    "networks per column": (lambda: nam(), randn(5, 10), 1),
    "a convolution per row": (
        lambda: randomized(model_of(_rows, convs=nn.ModuleList(nn.Conv1d(3, 4, 3, padding=1) for _ in range(9)))), randn(5, 3, 9, 8), 1
    ),
    "one convolution for all channels": (lambda: randomized(model_of(_shared, conv=nn.Conv1d(1, 2, 3))), randn(5, 6, 8), 1),
    "experts and a gate": (
        lambda: randomized(model_of(_experts, gate=nn.Linear(4, 9), experts=nn.ModuleList(mlp(4, outputs=3) for _ in range(9)))),
        randn(5, 4), 2,
    ),
    "BatchNorm": (
        lambda: norms(9),
        randn(5, 4), 1,
    ),
    "heads in a list": (lambda: randomized(model_of(_listed, heads=nn.ModuleList(nn.Linear(4, 3) for _ in range(9)))), randn(5, 4), 1),
    "embedding tables": (
        lambda: randomized(model_of(_tables, tables=nn.ModuleList(nn.Embedding(5 + i, 3) for i in range(9)))),
        torch.randint(5, (4, 9), generator=torch.Generator().manual_seed(1)), 0,
    ),
    "unequal widths": (
        lambda: randomized(model_of(_listed, heads=nn.ModuleList(nn.Linear(4, 2 + i % 3) for i in range(9)))), randn(5, 4), 1
    ),
}  # fmt: skip


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", CASES)
def test_loops(name, training):
    make, x, heavy = CASES[name]
    model = make().train(training)
    call, counting = compiled(model, validate=True)
    assert_same_step(model, call, x)
    assert_same_step(model, call, x)  # and once more, over the weights where they lie now
    assert counting.heavy() == heavy
    with torch.no_grad():
        torch.testing.assert_close(call(x), model(x), rtol=1e-10, atol=1e-12)
    with torch.inference_mode():
        torch.testing.assert_close(call(x), model(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["networks per column", "BatchNorm", "embedding tables", "experts and a gate"])
def test_through_aot_autograd(name):
    make, x, _ = CASES[name]
    model = make()
    call = torch.compile(model, backend=fxfuse.backend("aot_eager"), fullgraph=True)
    for _ in range(2):
        assert_same_step(model, call, x)
    with torch.no_grad():
        torch.testing.assert_close(call(x), model(x), rtol=1e-10, atol=1e-12)


@COMPILER
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Inductor's own
@pytest.mark.parametrize("name", ["networks per column", "BatchNorm"])
def test_through_inductor(name):
    make, x, _ = CASES[name]
    model = make()
    call = torch.compile(model, backend=fxfuse.backend(), fullgraph=True)
    for _ in range(2):
        assert_same_step(model, call, x)


def test_few_lanes_are_stacked_at_every_call():
    model = nam(3)
    call, _ = compiled(model)
    for _ in range(2):
        assert_same_step(model, call, randn(5, 3))
    assert not lie_together(*(net[0].weight for net in model.nets))


def test_running_statistics_of_few_lanes():
    model = norms(3)
    call, _ = compiled(model)
    for _ in range(2):
        assert_same_step(model, call, randn(5, 4))


def test_autocast():
    model = nam().float()
    x = randn(5, 10).float()
    call, counting = compiled(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(x)
        actual = call(x)
        assert counting.heavy() == 1
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02)
    torch.testing.assert_close(call(x), model(x), rtol=1e-5, atol=1e-5)
    assert len(counting.graphs) == 2


def test_autocast_inside():
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1)

    model = randomized(model_of(forward, nets=nn.ModuleList(mlp() for _ in range(9)))).float()
    x = randn(5, 9).float()
    call, counting = compiled(model)
    torch.testing.assert_close(call(x), model(x), rtol=0.02, atol=0.02)
    assert call(x).dtype is torch.bfloat16
    assert counting.heavy() == 1


def test_no_grad_inside():
    def forward(self, x):
        with torch.no_grad():
            first = torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1)
        return first * self.scale

    model = randomized(model_of(forward, nets=nn.ModuleList(mlp() for _ in range(9)), scale=nn.Parameter(torch.ones(9))))
    call, counting = compiled(model)
    assert_same_step(model, call, randn(5, 9))
    assert counting.heavy() == 1


def test_a_model_without_a_loop_goes_to_the_inner_backend_as_it_is():
    model = randomized(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    given = []
    call = torch.compile(model, backend=lambda graph, inputs: given.append(graph) or fxfuse.backend(Counting())(graph, inputs))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same_step(model, call, randn(5, 3))
    assert len(given) == 1


@COMPILER
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Inductor's own
def test_right_where_inductors_own_group_batch_fusion_is_wrong():
    """Its rule for dropout drops positional arguments: in eval mode, lanes lose half of their numbers."""

    def forward(self, x):
        return torch.stack([F.dropout(net(x), 0.5, self.training) for net in self.nets], 1)

    model = randomized(model_of(forward, nets=nn.ModuleList(nn.Linear(4, 3) for _ in range(9)))).eval()
    call = torch.compile(model, backend="fxfuse" if "fxfuse" in torch.compiler.list_backends() else fxfuse.backend())
    x = randn(5, 4)
    torch.testing.assert_close(call(x), model(x), rtol=1e-10, atol=1e-12)
