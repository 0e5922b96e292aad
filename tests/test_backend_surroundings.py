"""What is around a compiled call: hooks of saved tensors, computed weights, a compiled backward, a compiled training step."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_backend import nam
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import fxfuse
from checks import assert_close, randn, randomized

# What torch itself warns of while it traces is none of this file's.
pytestmark = [pytest.mark.usefixtures("fresh_dynamo"), pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")]


def backends() -> list[Any]:
    """The reference, fxfuse, and fxfuse without its check."""
    return ["aot_eager", fxfuse.backend("aot_eager"), fxfuse.backend("aot_eager", validate=False)]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_checkpoint_around_the_first_call(which: int) -> None:
    model, x = nam(), randn(6, 10).requires_grad_()
    call = torch.compile(model, backend=backends()[which])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fxfuse")
        checkpoint(call, x, use_reentrant=False).square().sum().backward()
    found, x.grad = x.grad, None
    model(x).square().sum().backward()
    assert_close(found, x.grad, "gradient of the input")


def test_hooks_see_what_is_kept_of_the_call_alone() -> None:
    model, seen = nam(), []
    call = torch.compile(model, backend=fxfuse.backend("aot_eager"))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: seen.append(tensor.shape) or tensor, lambda tensor: tensor):
        call(randn(6, 10))
        first = len(seen)
        call(randn(6, 10))
    assert first == len(seen) - first > 0


@pytest.mark.parametrize("compute", [lambda p, s: p * (1 + s), lambda p, s: p + s], ids=["product", "sum"])
def test_computed_weights(compute: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Weights with a history: compiling runs no backward through it."""
    gradients = []
    for backend in ("aot_eager", fxfuse.backend("aot_eager")):
        torch._dynamo.reset()
        model = nam()
        call = torch.compile(model, backend=backend)
        scale = torch.full((), 0.1, dtype=torch.float64, requires_grad=True)
        weights = {f"_orig_mod.{name}": compute(p, scale) for name, p in model.named_parameters()}
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="fxfuse")
            out = torch.func.functional_call(call, weights, (randn(6, 10),))
        assert scale.grad is None
        assert all(p.grad is None for p in model.parameters())
        out.square().sum().backward()
        gradients.append([scale.grad, *(p.grad for p in model.parameters())])
    for expected, found in zip(*gradients, strict=True):
        assert_close(found, expected, "gradient")


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compiled_backward(fullgraph: bool) -> None:
    """compiled autograd takes the hooks of packs into its one graph."""
    made = []
    for backend in ("aot_eager", fxfuse.backend("aot_eager")):
        torch._dynamo.reset()
        model, counter = nam(), CompileCounterWithBackend("eager")
        call = torch.compile(model, backend=backend)
        numbers = []
        for seed in range(3):
            for parameter in model.parameters():
                parameter.grad = None
            with compiled_autograd._enable(torch.compile(backend=counter, fullgraph=fullgraph)):
                call(randn(6, 10, seed=seed)).square().sum().backward()
            numbers.append(counter.frame_count)
        made.append((numbers, [p.grad for p in model.parameters()]))
    assert made[1][0] == made[0][0]
    for expected, found in zip(made[0][1], made[1][1], strict=True):
        assert_close(found, expected, "gradient")


def test_a_compiled_training_step() -> None:
    """Backward and optimizer in one compiled function: its hooks are no graphs of their own."""
    made = []
    for fused in (False, True):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        model = nam()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)

        def step(x: Tensor, model: nn.Module = model, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = model(x).square().mean()
            loss.backward()
            optimizer.step()
            return loss

        call = torch.compile(step, backend=fxfuse.backend(counter) if fused else counter)
        losses, graphs = [], []
        for seed in range(3):
            losses.append(call(randn(6, 10, seed=seed)).detach())
            graphs.append(counter.frame_count)
        made.append((graphs, losses))
    assert made[1][0] == made[0][0]
    for expected, found in zip(made[0][1], made[1][1], strict=True):
        assert_close(found, expected, "loss")


class Tables(nn.Module):
    """A table per column, its gradients sparse."""

    def __init__(self, kind: Any = nn.Embedding) -> None:
        super().__init__()
        self.tables = nn.ModuleList(kind(20, 4, sparse=True) for _ in range(5))
        self.heads = nn.ModuleList(nn.Linear(4, 3) for _ in range(5))

    def forward(self, ids: Tensor) -> Tensor:
        pairs = enumerate(zip(self.tables, self.heads, strict=True))
        return torch.cat([head(table(ids[:, i : i + 1]).flatten(1)) for i, (table, head) in pairs], 1)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("validate", [False, True])
def test_tables_with_sparse_gradients_stay(kind: Any, validate: bool) -> None:
    """Gradients of Parameters that stay are parts of their pack's, and those of a sparse one cannot be."""
    model = randomized(Tables(kind))
    ids = torch.randint(0, 20, (7, 5), generator=torch.Generator().manual_seed(1))
    model(ids).square().sum().backward()
    expected = [p.grad for p in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = None
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fxfuse")
        torch.compile(model, backend=fxfuse.backend("eager", validate=validate))(ids).square().sum().backward()
    for parameter, wanted in zip(model.parameters(), expected, strict=True):
        assert parameter.grad is not None
        assert wanted is not None
        assert parameter.grad.layout is wanted.layout
        assert_close(parameter.grad.to_dense(), wanted.to_dense(), "gradient")


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("options", [{}, {"tune_for": [7, 64]}], ids=["one plan", "sizes"])
def test_the_loop_of_packed_tables_with_sparse_gradients(kind: Any, options: dict[str, Any]) -> None:
    """A call that no program fits runs the loop on views of the packed tables, and trains."""
    model = randomized(Tables(kind))
    ids = torch.randint(0, 20, (7, 5), generator=torch.Generator().manual_seed(1))
    fused = fxfuse.optimize(model, ids, objective="time" if options else "launches", **options)
    if not options:
        assert fxfuse.report(fused).fused, fxfuse.report(fused)
    assert "fxfuse failed" not in str(fxfuse.report(fused))
    for given in (ids, ids.int()):
        for each in (model, fused):
            each.zero_grad()
            each(given).square().sum().backward()
        wanted = dict(model.named_parameters())
        for name, parameter in fxfuse.named_original_parameters(fused):
            assert parameter.grad is not None
            assert_close(parameter.grad.to_dense(), wanted[name].grad.to_dense(), name)
