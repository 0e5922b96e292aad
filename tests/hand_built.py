"""Regions planned by hand, for tests of packing and running alone: nothing here looks for lanes.

Comes in: sizes. Goes out: a model in its users' style, whose lanes all have different random weights, and its RegionPlan.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fxfuse.graph import Guard, Program, Recipe, RegionPlan, TensorGuard


class FeatureNets(nn.Module):
    """n networks ``Linear(1, h), ReLU, Linear(h, 1)``, one per column, joined by ``cat`` and read by a head."""

    def __init__(self, n: int = 5, hidden: int = 4) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(1, hidden), nn.ReLU(), nn.Linear(hidden, 1)) for _ in range(n))
        self.head = nn.Linear(n, 2)
        self.register_buffer("scale", torch.rand(n))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        columns = [net(x[:, i : i + 1]) for i, net in enumerate(self.nets)]
        return self.head(torch.cat(columns, 1) * self.scale)


class Model(nn.Module):
    """A model around the region, with layers before and after it in the state dict."""

    def __init__(self, n: int = 5, hidden: int = 4) -> None:
        super().__init__()
        self.before = nn.Linear(n, n)
        self.core = FeatureNets(n, hidden)
        self.after = nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.core(self.before(x)))


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Different random values in every parameter and every floating buffer."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) + 0.1)
    return model


def specs(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> tuple[Any, Any]:
    """The pytree specs of a call and of its result."""
    return pytree.tree_flatten((args, kwargs))[1], pytree.tree_flatten(result)[1]


def feature_plan(path: str = "core", n: int = 5, hidden: int = 4, dtype: torch.dtype = torch.float64, cat: bool = False) -> RegionPlan:
    """The plan of ``FeatureNets``: stored transposed in the second layer, concatenated in the first where asked."""
    style = "cat" if cat else "stack"
    recipes = [
        Recipe("packed.nets.0.weight", tuple(f"nets.{i}.0.weight" for i in range(n)), (hidden, 1), (0, 1), style),
        Recipe("packed.nets.0.bias", tuple(f"nets.{i}.0.bias" for i in range(n)), (hidden,), (0,), style),
        Recipe("packed.nets.2.weight", tuple(f"nets.{i}.2.weight" for i in range(n)), (1, hidden), (1, 0), "stack"),
        Recipe("packed.nets.2.bias", tuple(f"nets.{i}.2.bias" for i in range(n)), (1,), (0,), "cat"),
    ]

    def program() -> Program:
        graph = torch.fx.Graph()
        x = graph.placeholder("x")
        w0, b0, w2, b2 = (graph.get_attr(recipe.name) for recipe in recipes)
        hw, hb, scale = (graph.get_attr(name) for name in ("head.weight", "head.bias", "scale"))
        order = graph.get_attr("packed.index_0")
        lanes = graph.call_method("unsqueeze", (graph.call_method("t", (graph.call_function(torch.index_select, (x, 1, order)),)), -1))
        w0 = graph.call_function(torch.reshape, (w0, (n, 1, hidden)))
        b0 = graph.call_function(torch.reshape, (b0, (n, 1, hidden)))
        hid = graph.call_function(torch.relu, (graph.call_function(torch.baddbmm, (b0, lanes, w0)),))
        b2 = graph.call_function(torch.reshape, (b2, (n, 1, 1)))
        out = graph.call_method("squeeze", (graph.call_function(torch.baddbmm, (b2, hid, w2)), -1))
        out = graph.call_function(torch.mul, (graph.call_method("t", (out,)), scale))
        graph.output([graph.call_function(torch.nn.functional.linear, (out, hw, hb))])
        leaf = TensorGuard((None, n), dtype, torch.device("cpu"))
        in_spec, out_spec = specs((0,), {}, 0)
        return Program(graph, Guard((leaf,), (0,), generic_dtype=True), in_spec, out_spec)

    modules = 3 + 4 * n  # region, nets, n * (sequential, linear, relu, linear), head
    return RegionPlan(path, recipes, {(flag,) * modules: program() for flag in (True, False)}, {"packed.index_0": torch.arange(n)})
