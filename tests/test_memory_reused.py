"""Activations written over what they read, where autograd allows it; nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxfuse
from checks import assert_fused_equals, model_of, randn, randomized

ACTIVATIONS = {
    "relu": torch.relu, "F.relu": F.relu, "tanh": torch.tanh, "F.tanh": F.tanh, "sigmoid": torch.sigmoid, "exp": torch.exp,
    "method": lambda y: y.tanh(),
}  # fmt: skip
PRODUCERS = {
    "linear": lambda y, other: y, "sum": lambda y, other: y + other, "product": lambda y, other: y * other,
    "difference": lambda y, other: y - other, "norm": lambda y, other: F.layer_norm(y, (3,)),
    "matmul": lambda y, other: y @ other.mT @ other,
}  # fmt: skip


def lanes(lane: Any) -> nn.Module:
    """Four networks of two layers with ``lane(first layer's result, the input)`` between them."""
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([second(lane(first(x), x)) for first, second in zip(self.first, self.second, strict=True)])

    layers = lambda: nn.ModuleList(nn.Linear(3, 3) for _ in range(4))  # noqa: E731
    return randomized(model_of(forward, first=layers(), second=layers()))


def called(fused: nn.Module) -> list[str]:
    (graph,) = fxfuse.graph(fused).values()
    return [str(getattr(node.target, "__name__", node.target)) for node in graph.graph.nodes]


@pytest.mark.parametrize("producer", PRODUCERS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_in_the_memory_of_what_nothing_else_reads(activation, producer):
    model = lanes(lambda y, x: ACTIVATIONS[activation](PRODUCERS[producer](y, x)))
    fused = assert_fused_equals(model, randn(5, 3), batches=(4,), tune=False)
    assert any(name in ("relu_", "tanh_", "sigmoid_", "exp_") for name in called(fused)), called(fused)


@pytest.mark.parametrize(
    "lane",
    [
        lambda y, x: torch.tanh(y) + y,  # the argument is read again
        lambda y, x: torch.tanh(torch.sin(y)),  # a backward of cos(y), whose own result is free: no product, left alone
        lambda y, x: torch.tanh(torch.softmax(y, -1)),  # softmax needs its result
        lambda y, x: torch.tanh(torch.sigmoid(torch.exp(y)).sqrt()),  # so does sqrt
        lambda y, x: torch.tanh((y > 0).mul(2)).to(y.dtype) * y,  # whole numbers: the result is of another dtype
    ],
    ids=["read again", "no product", "softmax", "sqrt", "dtype"],
)
def test_not_where_it_is_needed(lane):
    fused = assert_fused_equals(lanes(lane), randn(5, 3), batches=(4,), tune=False)
    assert "tanh_" not in called(fused)


def test_second_derivatives():
    model = lanes(lambda y, x: torch.tanh(y))
    fused = fxfuse.optimize(model, randn(5, 3), objective="launches", tune=False)
    assert "tanh_" in called(fused)
    found = []
    for each in (model, fused):
        x = randn(4, 3, seed=3).requires_grad_()
        (slope,) = torch.autograd.grad(each(x).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(slope.pow(2).sum(), x)[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_of_a_view_it_is_the_memory_before_the_view(activation):
    """Layers on one input are one wide layer, whose result is a view of lanes: the activation comes first, in its memory."""
    model = lanes(lambda y, x: ACTIVATIONS[activation](y))
    fused = assert_fused_equals(model, randn(5, 3), batches=(4, 1), tune=False, lowering="auto", objective="time")
    names = called(fused)
    written = next(i for i, name in enumerate(names) if name in ("relu_", "tanh_", "sigmoid_", "exp_"))
    assert names.index("linear") < written < names.index("unflatten"), names


@pytest.mark.parametrize(
    "lane", [lambda y, x: torch.tanh(y) + y, lambda y, x: torch.softmax(torch.tanh(y) * y.exp(), -1)], ids=["sum", "exp"]
)
def test_of_a_view_that_is_read_again_it_stays_behind(lane):
    fused = assert_fused_equals(lanes(lane), randn(5, 3), batches=(4,), tune=False, objective="time")
    assert not {"tanh_", "exp_"} & set(called(fused))


def test_all_kinds_of_views_between():
    """The pass alone, on graphs: through one view and several, not through a slice."""
    from fxfuse.passes.tidy import tidy

    views = {
        "none": [], "unflatten": [(torch.unflatten, 1, (3, 2))], "turned": [(torch.unflatten, 1, (3, 2)), (torch.transpose, 0, 1)],
        "flat": [(torch.flatten, 0, 1)], "permuted": [(torch.unsqueeze, 0), (torch.permute, (2, 0, 1))],
    }  # fmt: skip
    for name, chain in {**views, "slice": [(torch.narrow, 1, 0, 2)]}.items():
        graph = torch.fx.Graph()
        x = graph.placeholder("x")
        x.meta["val"] = torch.zeros(4, 6)
        node = graph.call_function(torch.mul, (x, 3.0))
        node.meta["val"] = torch.zeros(4, 6)
        for function, *args in chain:
            value = function(node.meta["val"], *args)
            node = graph.call_function(function, (node, *args))
            node.meta["val"] = value
        value = node.meta["val"]
        node = graph.call_function(torch.tanh, (node,))
        node.meta["val"] = value.clone()
        graph.output(node)
        given = randn(4, 6)
        expected = torch.fx.GraphModule({}, graph)(given)
        tidy(graph)
        graph.lint()
        targets = [each.target for each in graph.nodes if each.op == "call_function"]
        assert torch.equal(torch.fx.GraphModule({}, graph)(given), expected), name
        if name != "slice":
            assert targets.index(torch.tanh_) == 1, (name, targets)
        else:
            assert targets == [torch.mul, torch.narrow, torch.tanh]


def test_indices_of_other_tables_are_marked_in_place():
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([table(x[:, i]) for i, table in enumerate(self.tables)])

    model = randomized(model_of(forward, tables=nn.ModuleList(nn.Embedding(6, 3) for _ in range(4))))
    x = torch.randint(6, (5, 4), generator=torch.Generator().manual_seed(1))
    fused = assert_fused_equals(model, x, batches=(4,), tune=False, objective="launches")
    assert "masked_fill_" in called(fused)
    before = x.clone()
    x[2, 1] = 6
    with pytest.raises(IndexError):
        fused(x)
    x[2, 1] = before[2, 1]
    assert torch.equal(x, before)
    assert torch.equal(fused(x), model(x))


def test_not_where_the_index_is_read_again():
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        out = []
        for i, table in enumerate(self.tables):
            moved = x[:, i] + 1
            filled = moved.masked_fill(moved == 3, 0)
            out.append(table(filled) * moved.unsqueeze(-1))
        return torch.stack(out)

    model = randomized(model_of(forward, tables=nn.ModuleList(nn.Embedding(6, 3) for _ in range(4))))
    x = torch.randint(5, (5, 4), generator=torch.Generator().manual_seed(1))
    fused = assert_fused_equals(model, x, batches=(4,), tune=False, objective="launches")
    assert "masked_fill" in called(fused)
