"""Chains of views come out in the fewest calls, and mean the same."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fxfuse.functional import drop_unused
from fxfuse.passes.views import shorten_views

Step = Callable[[torch.Tensor], tuple[Callable[..., Any], tuple[Any, ...]]]


def built(steps: list[tuple[Callable[..., Any], tuple[Any, ...]]], x: torch.Tensor) -> torch.fx.Graph:
    graph = torch.fx.Graph()
    node = graph.placeholder("x")
    node.meta["val"] = x
    for function, args in steps:
        value = function(node.meta["val"], *args)
        node = graph.call_function(function, (node, *args))
        node.meta["val"] = value
    graph.output(node)
    return graph


def run(graph: torch.fx.Graph, x: torch.Tensor) -> torch.Tensor:
    return torch.fx.GraphModule({}, graph)(x)


def calls(graph: torch.fx.Graph) -> int:
    return sum(node.op == "call_function" for node in graph.nodes)


@pytest.mark.parametrize(("steps", "fewest"), [
    ([(torch.transpose, (1, 2)), (torch.squeeze, (2,)), (torch.transpose, (0, 1))], 2),
    ([(torch.transpose, (0, 1)), (torch.transpose, (1, 0))], 0),
    ([(torch.unsqueeze, (0,)), (torch.squeeze, (0,))], 0),
    ([(torch.permute, ((2, 0, 1),)), (torch.permute, ((2, 0, 1),))], 1),
    ([(torch.movedim, (0, -1)), (torch.movedim, (-1, 0))], 0),
    ([(torch.unflatten, (0, (4, 1))), (torch.squeeze, (1,)), (torch.transpose, (0, 1))], 1),
])  # fmt: skip
def test_chain_is_what_it_amounts_to(steps: list[tuple[Callable[..., Any], tuple[Any, ...]]], fewest: int) -> None:
    x = torch.randn(4, 1, 3)
    graph = built(steps, x)
    expected = run(graph, x)
    shorten_views(graph)
    drop_unused(graph)
    assert calls(graph) == fewest
    assert torch.equal(run(graph, x), expected)


@pytest.mark.parametrize("seed", range(60))
def test_any_chain_means_the_same_and_is_no_longer(seed: int) -> None:
    draw = random.Random(seed)
    x = torch.randn(3, 1, 4, 2)
    value, steps = x, []
    for _ in range(draw.randint(1, 7)):
        rank = value.dim()
        ones = [d for d, size in enumerate(value.shape) if size == 1]
        options: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
            (torch.transpose, (draw.randrange(rank), draw.randrange(-rank, rank))),
            (torch.permute, (tuple(draw.sample(range(rank), rank)),)),
            (torch.movedim, (draw.randrange(-rank, rank), draw.randrange(-rank, rank))),
            (torch.unsqueeze, (draw.randrange(-rank - 1, rank + 1),)),
            (torch.unflatten, (draw.randrange(-rank, rank), (1, -1))),
            (torch.flatten, (0, 1)),
        ]
        if ones:
            options += [(torch.squeeze, (draw.choice(ones),)), (torch.squeeze, (tuple(ones),))]
        function, args = draw.choice([option for option in options if rank > 1 or option[0] is not torch.flatten])
        value = function(value, *args)
        steps.append((function, args))
    graph = built(steps, x)
    shorten_views(graph)
    drop_unused(graph)
    graph.lint()
    assert calls(graph) <= len(steps)
    assert torch.equal(run(graph, x), value)


def test_a_value_that_is_read_twice_stays() -> None:
    x = torch.randn(4, 1, 3)
    graph = torch.fx.Graph()
    first = graph.placeholder("x")
    first.meta["val"] = x
    turned = graph.call_function(torch.transpose, (first, 0, 2))
    turned.meta["val"] = x.transpose(0, 2)
    back = graph.call_function(torch.transpose, (turned, 0, 2))
    back.meta["val"] = x
    graph.output([turned, back])
    shorten_views(graph)
    drop_unused(graph)
    turned_now, back_now = run(graph, x)
    assert torch.equal(turned_now, x.transpose(0, 2))
    assert torch.equal(back_now, x)
