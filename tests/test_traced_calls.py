"""``torch.compile(fxfuse.optimize(model, x))``: what the region does between calls is done beside dynamo's trace.

The compiled graph holds the packed program, not the loop, whatever was done to the model before the first call: another mode, a cast, a
copy; under autocast; however the call gives its arguments. Where the loop is traced, the report says so.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from compiling import Counting, step
from torch import Tensor, nn

import fxfuse
from checks import model_of, randn, randomized
from fxfuse.weights.packing import original_gradients

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
LANES, X = 6, randn(5, 24)


def close(got: Any, expected: Any, bound: float = 1e-12) -> None:
    torch.testing.assert_close(got, expected, rtol=bound, atol=bound)


def columns(self: nn.Module, x: Tensor, scale: Any = None) -> Tensor:
    y = torch.cat([net(x[:, 4 * i : 4 * i + 4]) for i, net in enumerate(self.nets)], 1)
    return y if scale is None else y * scale


def networks() -> nn.Module:
    nets = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)) for _ in range(LANES))
    return randomized(model_of(columns, nets=nets))


def other_flags(model: nn.Module) -> nn.Module:
    for module in model.modules():
        module.training = not module.training
    return model


def loaded(model: nn.Module) -> nn.Module:
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    return model


def noted(model: nn.Module) -> nn.Module:
    model.nets.note = "an attribute of the user's"  # type: ignore[assignment, union-attr]
    return model


def buffered(model: nn.Module) -> nn.Module:
    model.register_buffer("more", torch.ones(1))
    return model


def all_frozen(model: nn.Module) -> nn.Module:
    fxfuse.freeze(model, "*")
    return model


CHANGES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "nothing": lambda m: m, "eval": nn.Module.eval, "train, eval": lambda m: m.train().eval(), "other flags": other_flags,
    "a cast": lambda m: m.to(torch.float64), "a move": lambda m: m.to("cpu"), "frozen": lambda m: m.requires_grad_(False),
    "a copy": copy.deepcopy, "an attribute": noted, "a buffer": buffered, "assigned weights": loaded,
    "freeze": all_frozen,
}  # fmt: skip


@pytest.mark.parametrize("mode", ["train", "infer"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_the_program_is_traced_whatever_was_done_before(change: str, training: bool, mode: Any) -> None:
    model = networks().train(training)
    fused = CHANGES[change](fxfuse.optimize(model, X, mode=mode, tune=False, validate=False))
    counting = Counting()
    got = torch.compile(fused, backend=counting, fullgraph=True)(X)
    close(got.detach(), model(X).detach())
    assert counting.heavy() == 2
    assert not fxfuse.report(fused).fallbacks


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_so_is_it_exported(change: str, strict: bool) -> None:
    model = networks().eval()
    fused = CHANGES[change](fxfuse.optimize(model, X, tune=False, validate=False))
    exported = torch.export.export(fused, (X,), strict=strict)
    products = [node for node in exported.graph.nodes if "mm" in str(node.target) or "linear" in str(node.target)]
    assert len(products) == 2
    close(exported.module(check_guards=False)(X).detach(), model(X).detach())
    with torch.no_grad():
        for _ in range(2):
            close(fused(X), model(X))
    assert not fxfuse.report(fused).fallbacks


@pytest.mark.parametrize("strict", [True, False])
def test_so_is_a_method_that_an_exported_model_calls(strict: bool) -> None:
    def double(self: nn.Module, x: Tensor) -> Tensor:
        return 2 * torch.cat([net(x[:, 4 * i : 4 * i + 4]) for i, net in enumerate(self.nets)], 1)

    model: Any = networks().eval()
    type(model).double_of = double
    fused: Any = fxfuse.optimize(model, X, methods={"double_of": X}, tune=False).to(torch.float64)
    outer = model_of(lambda self, x: self.inner.double_of(x), inner=fused)
    exported = torch.export.export(outer, (X,), strict=strict)
    assert len([node for node in exported.graph.nodes if "mm" in str(node.target) or "linear" in str(node.target)]) == 2
    close(exported.module(check_guards=False)(X).detach(), model.double_of(X).detach())
    with torch.no_grad():
        close(fused.double_of(X), model.double_of(X))
    assert not fxfuse.report(fused).fallbacks


def test_it_is_ready_once_optimized() -> None:
    for training in (True, False):
        for mode in ("train", "infer"):
            fused = fxfuse.optimize(networks().train(training), X, mode=mode, tune=False)  # type: ignore[arg-type]
            assert fused.__dict__["_fxfuse"].ready is not None


def test_a_mode_that_changes_between_calls_is_compiled_once_each() -> None:
    model = networks().eval()
    fused = fxfuse.optimize(model, X, tune=False)
    counting = Counting()
    call = torch.compile(fused, backend=counting, fullgraph=True)
    for _ in range(3):
        for training in (False, True):
            fused.train(training)
            close(call(X).detach(), model(X).detach())
    assert [counting.heavy(i) for i in range(len(counting.graphs))] == [2, 2]
    assert not fxfuse.report(fused).fallbacks


CALLS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "by name": lambda f, x: f(x=x), "with a default given": lambda f, x: f(x, None),
    "by names in another order": lambda f, x: f(scale=None, x=x),
}  # fmt: skip


@pytest.mark.parametrize("how", CALLS)
def test_calls_that_give_the_same_arguments_in_another_way(how: str) -> None:
    model = networks()
    fused = fxfuse.optimize(model, X, tune=False)
    counting = Counting()
    call = torch.compile(fused, backend=counting, fullgraph=True)
    for x in (X, randn(7, 24, seed=2)):
        out, gradients = step(fused, lambda x: CALLS[how](call, x), x)
        expected, wanted = step(model, lambda x: CALLS[how](model, x), x)
        close(out[0], expected[0])
        close(gradients["input 0"], wanted["input 0"])
    assert {counting.heavy(i) for i in range(len(counting.graphs))} == {2}
    assert not fxfuse.report(fused).fallbacks
    close(CALLS[how](fused, X).detach(), CALLS[how](model, X).detach())  # nor uncompiled
    assert not fxfuse.report(fused).fallbacks


def test_a_call_that_gives_other_values_runs_the_loop_and_says_so() -> None:
    model = networks()
    fused = fxfuse.optimize(model, X, tune=False)
    counting = Counting()
    call = torch.compile(fused, backend=counting, fullgraph=True)
    for scale in (2.0, randn(1, seed=4)):
        close(call(X, scale).detach(), model(X, scale).detach())
        close(call(x=X, scale=scale).detach(), model(X, scale).detach())
    assert all(counting.heavy(i) == 2 * LANES for i in range(len(counting.graphs)))
    said = fxfuse.report(fused).fallbacks
    assert said
    assert all("torch.compile" in reason for reason in said)
    assert any(reason.startswith("called with") for reason in said)


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_autocast_has_its_program_at_the_first_traced_call(mode: Any) -> None:
    model, x = networks().float().eval(), X.float()
    fused = fxfuse.optimize(model, x, mode=mode, tune=False)
    counting = Counting()
    call = torch.compile(fused, backend=counting, fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = call(x), model(x)
        assert got.dtype is expected.dtype is torch.bfloat16
        close(got, expected, 2e-2)
    assert counting.heavy() == 2
    names = [getattr(node.target, "__name__", str(node.target)) for node in counting.graphs[-1].graph.nodes]
    assert not {"stack", "unbind"} & {*names}  # each layer's pack is cast as it is, although both have one shape
    close(call(x).detach(), model(x).detach(), bound=1e-5)
    assert counting.heavy() == 2
    assert not fxfuse.report(fused).fallbacks


def test_autocast_inside_of_what_is_compiled() -> None:
    model, x = networks().float(), X.float()
    fused = fxfuse.optimize(model, x, tune=False)

    def loss(x: Tensor, net: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = net((2 * x).t().contiguous().t())  # computed, and in columns
        return y.float().square().mean()

    counting = Counting()
    call = torch.compile(loss, backend=counting, fullgraph=True)
    close(call(x, fused), loss(x, model), 2e-2)
    assert counting.heavy() == 2
    call(x, fused).backward()
    loss(x, model).backward()
    given = original_gradients(fused)
    for name, parameter in model.named_parameters():
        close(given[name], parameter.grad, 2e-2)
    assert not fxfuse.report(fused).fallbacks


def test_a_region_called_twice_in_one_graph_of_which_the_second_call_needs_a_program_of_its_own() -> None:
    model, x = networks().float(), X.float()
    fused = fxfuse.optimize(model, x, tune=False)

    def both(net: nn.Module, x: Tensor) -> Tensor:
        y = net(x)
        with torch.autocast("cpu", torch.bfloat16):
            return y + net(scale=None, x=x)

    counting = Counting()
    call = torch.compile(lambda x: both(fused, x), backend=counting, fullgraph=True)
    for _ in range(2):
        close(call(x), both(model, x), 2e-2)
    assert [counting.heavy(i) for i in range(len(counting.graphs))] == [4]
    assert not fxfuse.report(fused).fallbacks


def test_a_method_under_autocast() -> None:
    def double(self: nn.Module, x: Tensor) -> Tensor:
        return 2 * torch.cat([net(x[:, 4 * i : 4 * i + 4]) for i, net in enumerate(self.nets)], 1)

    model = networks().float()
    type(model).double_of = double  # type: ignore[attr-defined]
    x = X.float()
    fused: Any = fxfuse.optimize(model, x, methods={"double_of": x}, tune=False)
    counting = Counting()
    call = torch.compile(lambda x: fused.double_of(x), backend=counting, fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        close(call(x), model.double_of(x), 2e-2)  # type: ignore[operator]
    assert counting.heavy() == 2
    assert not fxfuse.report(fused).fallbacks


def test_an_open_batch_is_one_graph() -> None:
    model = networks().eval()
    fused = fxfuse.optimize(model, X, tune=False)
    counting = Counting()
    call = torch.compile(fused, backend=counting, fullgraph=True, dynamic=True)
    for rows in (5, 7, 9, 64):
        x = randn(rows, 24, seed=rows)
        close(call(x=x).detach(), model(x).detach())
    assert len(counting.graphs) == 1
    assert counting.heavy() == 2


def test_strict_raises_where_the_loop_would_be_traced() -> None:
    fused = fxfuse.optimize(networks(), X, tune=False, strict=True)
    with pytest.raises(Exception, match="would run its loop"):
        torch.compile(fused, backend="eager", fullgraph=True)(X, 2.0)


@dataclass
class Both:
    x: Tensor
    scale: Tensor


pytree.register_dataclass(Both)
CONTAINERS: dict[str, Callable[[Tensor], Any]] = {
    "dict": lambda x: {"x": x, "scale": x[:1]}, "OrderedDict": lambda x: OrderedDict(x=x, scale=x[:1]),
    "list": lambda x: [[None, x], x[:1], 3], "tuple": lambda x: ((x,), (x[:1], "a")), "dataclass": lambda x: Both(x, x[:1].clone()),
}  # fmt: skip


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("kind", CONTAINERS)
def test_arguments_in_containers(kind: str, by_name: bool) -> None:
    def scaled(self: nn.Module, o: Any) -> Tensor:
        x, scale = [leaf for leaf in pytree.tree_leaves(o) if isinstance(leaf, Tensor)] if not isinstance(o, Both) else (o.x, o.scale)
        return torch.cat([net(x[:, 4 * i : 4 * i + 4]) for i, net in enumerate(self.nets)], 1) * scale

    model, x = randomized(model_of(scaled, nets=networks().nets)).float(), X.float()
    given = CONTAINERS[kind](x)
    fused = fxfuse.optimize(model, (given,), tune=False)
    assert fxfuse.report(fused).fused
    counting = Counting()
    call = torch.compile(fused, backend=counting)
    for casts in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=casts):
            got, expected = (call(o=given), model(o=given)) if by_name else (call(given), model(given))
        close(got, expected, 2e-2 if casts else 1e-5)
        assert counting.heavy() == 2
    assert not fxfuse.report(fused).fallbacks


SPELLED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "two": lambda n, x: n(x=x) + n(x, None), "four": lambda n, x: n(x) + n(x, None) + n(x=x) + n(scale=None, x=x),
    "one of them the loop": lambda n, x: n(x=x) + n(x, 2.0),
}  # fmt: skip


@pytest.mark.parametrize("how", SPELLED)
def test_several_spellings_in_one_graph(how: str) -> None:
    model = networks()
    fused = fxfuse.optimize(model, X, tune=False)
    counting = Counting()
    call = torch.compile(lambda x: SPELLED[how](fused, x), backend=counting, fullgraph=True)
    for _ in range(2):
        close(call(X).detach(), SPELLED[how](model, X).detach())
    assert [counting.heavy(i) for i in range(len(counting.graphs))] == [{"two": 4, "four": 8}.get(how, 2 + 2 * LANES)]


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.nets = networks().nets

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        y = torch.cat([net(x[:, 4 * i : 4 * i + 4]) for i, net in enumerate(self.nets)], 1)  # type: ignore[arg-type, operator]
        return y if gate is None else y * gate


def twice(self: Any, x: Tensor) -> Tensor:
    return self.a(x) + self.a(x, gate=x.sigmoid())  # type: ignore[no-any-return]


def thrice(self: Any, x: Tensor) -> Tensor:
    return self.a(self.a(x), gate=x.sigmoid()) + self.a(x, None)  # type: ignore[no-any-return]


@pytest.mark.parametrize("compile_first", [False, True])
@pytest.mark.parametrize("forward", [twice, thrice])
def test_calls_of_several_forms_under_autocast(forward: Callable[..., Tensor], compile_first: bool) -> None:
    model, x = randomized(model_of(forward, a=Inner())).float(), X.float()
    fused = fxfuse.optimize(model, x, tune=False)
    counting = Counting()
    calls = [torch.compile(fused, backend=counting, fullgraph=True), fused]
    with torch.autocast("cpu", torch.bfloat16):
        for call in calls if compile_first else calls[::-1]:
            close(call(x), model(x), 4e-2)
    assert counting.heavy() == (4 if forward is twice else 6)
    assert not fxfuse.report(fused).fallbacks


def test_a_method_called_plainly_and_then_under_autocast_in_one_graph() -> None:
    def double(self: nn.Module, x: Tensor, scale: float = 2.0) -> Tensor:
        return scale * torch.cat([net(x[:, 4 * i : 4 * i + 4]) for i, net in enumerate(self.nets)], 1)

    model: Any = networks().float()
    type(model).double_of = double
    x = X.float()
    fused: Any = fxfuse.optimize(model, x, methods={"double_of": x}, tune=False, strict=True)

    def both(net: Any, x: Tensor) -> Tensor:
        y = net.double_of(x) + net.double_of(x=x)
        with torch.autocast("cpu", torch.bfloat16):
            return y + net.double_of(x, 2.0)  # type: ignore[no-any-return]

    counting = Counting()
    close(torch.compile(both, backend=counting, fullgraph=True)(fused, x), both(model, x), 4e-2)
    assert counting.heavy() == 6


def test_an_export_that_holds_the_loop_says_so() -> None:
    model = networks().float().eval()
    fused = fxfuse.optimize(model, X.float(), tune=False)
    torch.export.export(fused, (X.float(), 2.0), strict=False)
    assert [reason for reason in fxfuse.report(fused).fallbacks if reason.startswith("called with 2")]
    with torch.autocast("cpu", torch.bfloat16):
        torch.export.export(fused, (X.float(),), strict=False)
    assert "autocast is on for cpu" in fxfuse.report(fused).fallbacks


def test_arguments_that_are_objects() -> None:
    class Scale:
        by = 3.0

    def scaled(self: nn.Module, x: Tensor, scale: Any) -> Tensor:
        return torch.cat([net(x[:, 4 * i : 4 * i + 4]) for i, net in enumerate(self.nets)], 1) * scale.by

    model = randomized(model_of(scaled, nets=networks().nets))
    fused = fxfuse.optimize(model, X, example_kwargs={"scale": Scale()}, tune=False)
    got = torch.compile(fused, backend="eager")(X, scale=Scale())
    close(got.detach(), model(X, scale=Scale()).detach())
