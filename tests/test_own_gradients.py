"""Gradients of packs that reach their members in parts are nobody else's memory.

Autograd keeps a gradient as it is where nobody else has it, and it cannot see that parts of one tensor are two Parameters'. What then works
in place (clipping, ``zero_``, accumulation) would be done twice: the biases of a recurrent cell, a pack that is returned.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiling import Counting
from test_backend import COMPILER
from torch import Tensor, nn

import fxfuse
from checks import model_of, randn, randomized
from fxfuse.private.storages import own_memory

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
LANES, ROWS = 9, 5


def cells(self: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([cell(x[:, i : i + 1]) for i, cell in enumerate(self.cells)], 1)


def first_of_cells(self: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([cell(x[:, i : i + 1])[0] for i, cell in enumerate(self.cells)], 1)


def shifted(self: nn.Module, x: Tensor) -> Tensor:
    return torch.stack([shift + net(x[:, :3]) for net, shift in zip(self.nets, self.shifts, strict=True)])


def two_layers(self: nn.Module, x: Tensor) -> Tensor:
    return torch.stack([one(x[:, :3]) + two(x[:, :3]) for one, two in zip(self.nets, self.others, strict=True)])


def lanes(make: Callable[[], nn.Module]) -> nn.ModuleList:
    return nn.ModuleList(make() for _ in range(LANES))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "RNNCell": lambda: model_of(cells, cells=lanes(lambda: nn.RNNCell(1, 3))),
    "GRUCell": lambda: model_of(cells, cells=lanes(lambda: nn.GRUCell(1, 3))),
    "LSTMCell": lambda: model_of(first_of_cells, cells=lanes(lambda: nn.LSTMCell(1, 3))),
    "a Parameter added": lambda: model_of(
        shifted, nets=lanes(lambda: nn.Linear(3, 4)), shifts=nn.ParameterList(nn.Parameter(torch.zeros(ROWS, 4)) for _ in range(LANES))
    ),
    "two layers": lambda: model_of(two_layers, nets=lanes(lambda: nn.Linear(3, 4)), others=lanes(lambda: nn.Linear(3, 4))),
}


def hold(model: nn.Module, call: Callable[[Tensor], Tensor], reference: nn.Module) -> None:
    """Gradients worked on in place, and once more, as those of the reference."""
    x = randn(ROWS, LANES)
    for owner, forward in ((model, call), (reference, reference)):
        for parameter in owner.parameters():
            parameter.grad = None
        out = forward(x)
        given = torch.ones_like(out)
        out.backward(given)
        nn.utils.clip_grad_norm_(owner.parameters(), 0.1)
        for parameter in owner.parameters():
            assert parameter.grad is not None
            parameter.grad.mul_(3)
        assert given.eq(1).all()  # the caller's
        (forward(x) ** 2).sum().backward()
    for (name, parameter), wanted in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, wanted.grad, rtol=1e-10, atol=1e-10, msg=lambda said, name=name: f"{name}: {said}")


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", MODELS)
def test_the_backend(name: str, inner: str, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomized(MODELS[name]())
    reference = copy.deepcopy(model)
    monkeypatch.setattr("fxfuse.dynamo.compiled.worth_sharing", lambda *_: shared)
    counting = Counting(torch._dynamo.lookup_backend(inner))
    call = torch.compile(model, backend=fxfuse.backend(counting, lowering="bmm", validate=False))
    hold(model, call, reference)
    assert len([node for node in counting.graphs[0].graph.nodes if node.op != "placeholder"]) < 6 * LANES


@COMPILER
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Inductor's own
@pytest.mark.parametrize("name", ["RNNCell", "two layers"])
def test_the_pass(name: str) -> None:
    model = randomized(MODELS[name]())
    reference = copy.deepcopy(model)
    hold(model, torch.compile(model, options={"pre_grad_custom_pass": fxfuse.inductor_pass(lowering="bmm")}), reference)


@pytest.mark.parametrize("backend", ["", "aot_eager"])
@pytest.mark.parametrize("name", MODELS)
def test_parameters_that_stay(name: str, backend: str) -> None:
    model = randomized(MODELS[name]())
    reference = copy.deepcopy(model)
    held = [*model.parameters()]
    fused: Any = fxfuse.optimize(model, tune=False, lowering="bmm")
    fused(randn(ROWS, LANES))
    assert fxfuse.report(fused).fused
    assert all(one is other for one, other in zip(held, fused.parameters(), strict=True))
    hold(fused, torch.compile(fused, backend=backend) if backend else fused, reference)


@pytest.mark.parametrize("name", ["RNNCell", "a Parameter added"])
def test_several_backwards_at_once(name: str) -> None:
    """``vmap`` runs the hook on tensors without memory."""
    model = randomized(MODELS[name]())
    reference = copy.deepcopy(model)
    fused: Any = fxfuse.optimize(model, tune=False, lowering="bmm")
    x = randn(ROWS, LANES)
    fused(x)
    found = []
    for owner in (fused, reference):
        out = owner(x).sum(0).flatten()
        seeds = torch.eye(out.numel(), dtype=out.dtype)
        found.append(torch.autograd.grad(out, [*owner.parameters()], seeds, is_grads_batched=True))
    assert fxfuse.report(fused).fused
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_a_gradient_that_nobody_else_has_is_not_copied() -> None:
    kept: list[bool] = []

    def run(use: Callable[[Tensor], Any]) -> bool:
        x = torch.zeros(4, requires_grad=True)
        whole = x * 1
        addresses: list[int] = []
        whole.register_hook(lambda gradient: addresses.append(gradient.data_ptr()))
        whole.register_hook(own_memory)
        whole.register_hook(lambda gradient: addresses.append(gradient.data_ptr()))
        use(whole)
        kept.append(addresses[0] == addresses[1])
        return kept[-1]

    given, other = torch.ones(4), torch.zeros(4, requires_grad=True)
    assert run(lambda w: (w * 2).sum().backward())
    assert run(lambda w: torch.autograd.grad((w * other).sum(), other, retain_graph=True) and (w * other).sum().backward())
    assert not run(lambda w: w.backward(given))
    assert not run(lambda w: w.view(2, 2).backward(given.view(2, 2)))
    assert not run(lambda w: w.sum().backward())  # one number, as often as there are elements
    seen: list[Tensor] = []

    def kept_by_the_caller(w: Tensor) -> None:
        y = w * 1
        y.register_hook(lambda gradient: seen.append(gradient))
        (y * 2).sum().backward()

    run(kept_by_the_caller)
    assert seen[0].eq(2).all()
