"""Graphs for compilers: biases of batched products apart, and gradients in the order of the weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compiling import Counting, compiled, lie_together
from test_backend import COMPILER
from torch import Tensor, nn

import fxfuse
from checks import model_of, randn, randomized
from fxfuse.functional import product_and_bias
from fxfuse.running.for_compilers import biases_apart, biases_apart_here

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
X = randn(5, 36)


def columns(self: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([net(x[:, 4 * i : 4 * i + 4]) for i, net in enumerate(self.nets)], 1)


def networks() -> nn.Module:
    return randomized(model_of(columns, nets=nn.ModuleList(nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3)) for _ in range(9))))


def calls(graph: torch.fx.Graph) -> list[str]:
    return [getattr(node.target, "__name__", str(node.target)) for node in graph.nodes if node.op != "placeholder"]


def product(dtype: torch.dtype | None, *args: Any, **kwargs: Any) -> torch.fx.Graph:
    graph = torch.fx.Graph()
    made = graph.call_function(torch.baddbmm, (*(graph.placeholder(name) for name in ("bias", "x", "w")), *args), kwargs)
    if dtype is not None:
        made.meta["val"] = torch.zeros(2, 3, 5, dtype=dtype)
    graph.output(made)
    return graph


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
def test_a_product_and_an_addition_of_its_own(dtype: torch.dtype) -> None:
    b, x, w = randn(2, 1, 5).to(dtype), randn(2, 3, 4).to(dtype), randn(2, 4, 5).to(dtype)
    expected, rtol = torch.baddbmm(b, x, w), 1e-5 if dtype is torch.float32 else 1e-12
    for apart, found in ((biases_apart, ["product_and_bias"]), (biases_apart_here, ["bmm", "add"])):
        graph = product(dtype)
        assert apart(graph)
        assert calls(graph) == [*found, "output"]
        torch.testing.assert_close(torch.fx.GraphModule({}, graph)(b, x, w), expected, rtol=rtol, atol=1e-12)
        assert not apart(graph)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_adds_before_it_rounds(dtype: torch.dtype) -> None:
    graph = product(dtype)
    assert not biases_apart_here(graph)
    assert calls(graph) == ["baddbmm", "output"]
    b, x, w = randn(2, 1, 5).to(dtype), randn(2, 3, 4).to(dtype), randn(2, 4, 5).to(dtype)
    assert torch.equal(product_and_bias(b, x, w), torch.baddbmm(b, x, w))


@pytest.mark.parametrize("kwargs", [{"beta": 2}, {"alpha": 0.5}, {"out_dtype": torch.float32}])
def test_what_scales_its_parts_stays(kwargs: dict[str, Any]) -> None:
    graph = product(torch.float32, **kwargs)
    assert not biases_apart(graph)
    assert not biases_apart_here(graph)


def test_a_graph_of_unknown_dtype_stays() -> None:
    assert not biases_apart_here(product(None))


def test_a_fused_model_is_traced_with_its_biases_apart() -> None:
    model = networks()
    fused = fxfuse.optimize(model, X, objective="launches", tune=False)
    counting = Counting()
    call = torch.compile(fused, backend=counting, fullgraph=True)
    torch.testing.assert_close(call(X), model(X), rtol=1e-12, atol=1e-12)
    assert calls(counting.graphs[0].graph).count("bmm") == 2
    assert "baddbmm" not in calls(counting.graphs[0].graph)
    half = randomized(networks()).to(torch.bfloat16)
    fused = fxfuse.optimize(half, X.to(torch.bfloat16), objective="launches", tune=False)
    call = torch.compile(fused, backend=counting, fullgraph=True)
    assert torch.equal(call(X.to(torch.bfloat16)), fused(X.to(torch.bfloat16)))
    assert calls(counting.graphs[-1].graph).count("baddbmm") == 2


@pytest.mark.parametrize("call_under", [torch.enable_grad, torch.no_grad])
def test_under_autocast(call_under: Any) -> None:
    model = networks().float()
    x = X.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused = fxfuse.optimize(model, x, objective="launches", tune=False)
        counting = Counting()
        call = torch.compile(fused, backend=counting, fullgraph=True)
        with call_under():
            torch.testing.assert_close(call(x), fused(x), rtol=0, atol=0)


def test_gradients_are_views_of_one_packed_gradient() -> None:
    """Also where the graph reads the weights in another order than theirs: as they are laid out, so that autograd keeps them."""
    model = networks()
    call, _ = compiled(model, lowering="bmm")
    for _ in range(2):
        model.zero_grad()
        call(X).square().sum().backward()
        for layer in (0, 2):
            weights = [net[layer].weight for net in model.nets]
            assert [w.grad.stride() for w in weights] == [w.stride() for w in weights]
            assert len({w.grad.untyped_storage().data_ptr() for w in weights}) == 1
            assert lie_together(*weights)
    found = [parameter.grad for parameter in model.parameters()]
    for gradient, expected in zip(found, torch.autograd.grad(model(X).square().sum(), list(model.parameters())), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


@COMPILER
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Inductor's own
def test_what_inductor_is_given() -> None:
    from torch._inductor.utils import run_and_get_code

    model = networks().requires_grad_(False)
    call = torch.compile(model, backend=fxfuse.backend(lowering="bmm"))
    out, sources = run_and_get_code(call, X)
    torch.testing.assert_close(out, model(X), rtol=1e-10, atol=1e-12)
    assert any("extern_kernels.bmm" in source for source in sources)
    assert not any("extern_kernels.baddbmm" in source for source in sources)
