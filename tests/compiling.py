"""Helpers of the tests of ``torch.compile(model, backend="fxfuse")``: compile a model, and hold its calls against the model's own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fxfuse
from checks import ROUNDING, as_args, assert_close


class Counting:
    """The inner backend "eager" (or ``inner``), which keeps the graphs it is given."""

    def __init__(self, inner: Callable[..., Any] | None = None) -> None:
        self.graphs: list[torch.fx.GraphModule] = []
        self.inner = inner

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs.append(graph)
        return graph.forward if self.inner is None else self.inner(graph, inputs)

    def heavy(self, index: int = -1) -> int:
        """Calls in a graph that multiply matrices or convolve."""
        names = ("linear", "addcmul", "baddbmm", "bmm", "matmul", "conv", "addmm", "mm")
        return sum(
            any(getattr(node.target, "__name__", str(node.target)).startswith(name) for name in names)
            for node in self.graphs[index].graph.nodes
            if node.op in ("call_function", "call_method")
        )


def compiled(model: Any, counting: Counting | None = None, **keywords: Any) -> tuple[Callable[..., Any], Counting]:
    """``model`` compiled by fxfuse over an inner backend that keeps its graphs; the tests compare, fxfuse need not."""
    counting = counting or Counting()
    own = {name: keywords.pop(name) for name in list(keywords) if name in ("min_lanes", "lowering", "tune", "validate", "freeze")}
    return torch.compile(model, backend=fxfuse.backend(counting, **{"validate": False, **own}), **keywords), counting


def step(model: nn.Module, call: Callable[..., Any], inputs: Any, seed: int = 3) -> tuple[list[Any], dict[str, Tensor | None]]:
    """Outputs of ``call``, gradients of its floating inputs, then those of the parameters of ``model``, of random cotangents."""
    leaves = tuple(t.clone().requires_grad_(t.is_floating_point()) if isinstance(t, Tensor) else t for t in as_args(inputs))
    for parameter in model.parameters():
        parameter.grad = None
    out = tree_leaves(call(*leaves))
    generator = torch.Generator().manual_seed(seed)
    ends = [o for o in out if isinstance(o, Tensor) and o.requires_grad]
    starts = [torch.randn(e.shape, generator=generator, dtype=torch.float64).to(e.dtype) for e in ends]
    torch.autograd.backward(ends, starts)
    gradients = {f"input {i}": t.grad for i, t in enumerate(leaves) if isinstance(t, Tensor)}
    gradients.update((name, None if p.grad is None else p.grad.clone()) for name, p in model.named_parameters())
    for parameter in model.parameters():
        parameter.grad = None
    return [o.detach() if isinstance(o, Tensor) else o for o in out], gradients


def assert_same_step(model: nn.Module, call: Callable[..., Any], inputs: Any, rtol: float = 1e-10) -> None:
    """``call`` gives what ``model`` gives: results, gradients, buffers."""
    twin = copy.deepcopy(model)
    expected, gradients = step(twin, twin, inputs)
    actual, found = step(model, call, inputs)
    assert len(actual) == len(expected)
    for index, (a, b) in enumerate(zip(actual, expected)):
        if isinstance(b, Tensor):
            assert_close(a, b, f"output {index}", rtol)
        else:
            assert a == b
    assert found.keys() == gradients.keys()
    given = [gradient.abs().max().item() for gradient in gradients.values() if gradient is not None and gradient.numel()]
    for name, gradient in gradients.items():  # some are zero but for rounding: those of what a norm takes away
        assert_close(found[name], gradient, f"gradient of {name}", rtol, floor=max(given, default=0.0) * ROUNDING)
    for (name, a), (_, b) in zip(model.named_buffers(), twin.named_buffers()):
        assert_close(a, b, name, rtol)


def lie_together(*tensors: Tensor) -> bool:
    """Do the tensors lie in one piece of memory?"""
    return len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
