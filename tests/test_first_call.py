"""``fxfuse.optimize(model)``: fused at its first call, Parameters stay what they were for everyone who has them."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector, parametrizations, prune, vector_to_parameters
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fxfuse
from checks import assert_close, randn, randomized

# Forward-mode formulas are scripted by torch when they are first used, which it warns of.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

X = randn(5, 6, 3)
ROUNDING = 1e-13  # a bias before a norm has no gradient


class Lane(nn.Module):
    def __init__(self, width: int, norm: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, width), nn.Linear(width, 2)
        self.norm = nn.BatchNorm1d(width) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.tanh(self.norm(self.first(x))))
        return out


class Lanes(nn.Module):
    def __init__(self, widths: tuple[int, ...], norm: bool) -> None:
        super().__init__()
        self.nets = nn.ModuleList(Lane(width, norm) for width in widths)
        self.head = nn.Linear(2 * len(widths), 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.cat([net(x[:, i]) for i, net in enumerate(self.nets)], -1))
        return out


def pair(*, norm: bool = False, unequal: bool = False, called: bool = True) -> tuple[nn.Module, nn.Module]:
    """The original, and one that is set to fuse at its first call, which was already where it is ``called``."""
    model = randomized(Lanes((4, 5, 4, 6, 4, 5) if unequal else (4,) * 6, norm))
    lazy = fxfuse.optimize(copy.deepcopy(model), tune=False)
    if called:
        lazy.eval()(X)
        lazy.train()
        assert fxfuse.report(lazy).fused
    return model, lazy


def gradients(model: nn.Module, x: Tensor = X) -> list[Tensor | None]:
    model.zero_grad()
    model(x).square().sum().backward()
    return [parameter.grad for parameter in model.parameters()]


def assert_same(model: nn.Module, lazy: nn.Module, fallbacks: int = 0) -> None:
    expected, found = model(X), lazy(X)
    assert_close(found, expected, "output")
    for (name, _), a, b in zip(model.named_parameters(), gradients(model), gradients(lazy), strict=True):
        assert a is not None
        assert b is not None
        assert_close(b, a, name, floor=ROUNDING)
        assert b.stride() == a.stride(), name
    for name, buffer in model.named_buffers():
        assert_close(lazy.get_buffer(name), buffer, name)
    assert sum(fxfuse.report(lazy).fallbacks.values()) == fallbacks


def squared(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: model(x).square().sum()


# -- calls within something ------------------------------------------------------------------------------------------------------------

TRANSFORMS: dict[str, Callable[[nn.Module], Any]] = {
    "vmap": lambda m: torch.vmap(m)(X[None])[0],
    "grad": lambda m: torch.func.grad(squared(m))(X),
    "jacrev": lambda m: torch.func.jacrev(m)(X),
    "jvp": lambda m: torch.func.jvp(m, (X,), (X,))[1],
    "hessian": lambda m: torch.func.hessian(squared(m))(X),
    "dual": lambda m: tangent(lambda: m(forward_ad.make_dual(X, X))),
    "fake": lambda m: fake(m),
    "flops": lambda m: flops(m),
    "trace": lambda m: torch.jit.trace(m, X, check_trace=False)(X),
    "export": lambda m: torch.export.export(m, (X,)).module()(X),
}


def tangent(call: Callable[[], Tensor]) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(call()).tangent


def fake(model: nn.Module) -> Tensor:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        shape = model(mode.from_tensor(X)).shape
    return torch.zeros(shape)


def flops(model: nn.Module) -> Tensor:
    with FlopCounterMode(display=False):
        out: Tensor = model(X)
    return out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("unequal", [False, True])
@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("how", TRANSFORMS)
def test_calls_within_something(how: str, called: bool, unequal: bool) -> None:
    """The first ordinary call fuses, none before it raises, and later ones are right."""
    model, lazy = pair(called=called, unequal=unequal)
    expected, found = TRANSFORMS[how](model), TRANSFORMS[how](lazy)
    assert_close(found, expected, how)
    lazy(X)
    assert fxfuse.report(lazy).fused
    assert_same(model, lazy, fallbacks=int(how == "flops" and called))  # it hooks all modules


def test_weights_of_a_transform() -> None:
    model, lazy = pair()
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(net: nn.Module) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
        return lambda w, x: functional_call(net, w, (x,)).square().sum()

    def one(net: nn.Module) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
        return lambda w, x: loss(net)(w, x[None])

    for around in (lambda f: torch.func.grad(f)(weights, X), lambda f: torch.func.hessian(f)(weights, X)["head.weight"]):
        for name, a in around(loss(model)).items():
            assert_close(around(loss(lazy))[name], a, name)
    each = [torch.vmap(torch.func.grad(one(net)), (None, 0))(weights, X) for net in (model, lazy)]
    for name, a in each[0].items():
        assert_close(each[1][name], a, name)
    assert_same(model, lazy)


def test_an_ensemble_of_fused_models() -> None:
    pairs = [pair() for _ in range(3)]
    for number, (model, lazy) in enumerate(pairs):
        for parameter, other in zip(model.parameters(), lazy.parameters(), strict=True):
            parameter.data.mul_(1 + number)
            other.data.mul_(1 + number)
    base = pairs[0][1]
    weights, buffers = torch.func.stack_module_state([lazy for _, lazy in pairs])
    found = torch.vmap(lambda w, b: functional_call(base, (w, b), (X,)))(weights, buffers)
    for out, (model, _) in zip(found, pairs, strict=True):
        assert_close(out, model(X), "output")


def test_weights_with_tangents() -> None:
    model, lazy = pair()

    def call(net: nn.Module) -> Any:
        duals = {name: forward_ad.make_dual(p.detach() * 2, p.detach() * 0.3) for name, p in model.named_parameters()}
        return functional_call(net, duals, (X,))

    assert_close(tangent(lambda: call(lazy)), tangent(lambda: call(model)), "tangent")
    assert_same(model, lazy)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_first_call_that_is_compiled_fuses(fresh_dynamo: None, fullgraph: bool) -> None:
    model, lazy = pair(called=False)
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(lazy, backend=counter, fullgraph=fullgraph)
    for _ in range(2):
        expected, found = model(X), call(X)
        assert_close(found, expected, "output")
        found.square().sum().backward()
        expected.square().sum().backward()
    for (name, a), b in zip(model.named_parameters(), lazy.parameters(), strict=True):
        assert_close(b.grad, a.grad, name)
    assert fxfuse.report(lazy).fused
    assert counter.frame_count == 1
    (graph,) = counter.graphs
    assert len([node for node in graph.graph.nodes if "linear" in str(node.target)]) <= 1  # the head


@pytest.mark.filterwarnings("ignore")
def test_a_first_call_within_a_compiled_function_fuses(fresh_dynamo: None) -> None:
    model, lazy = pair(called=False)
    counter = CompileCounterWithBackend("aot_eager")

    def step(x: Tensor) -> Tensor:
        out: Tensor = lazy(2 * x).square().sum()
        return out

    call = torch.compile(step, backend=counter, fullgraph=True)
    for _ in range(2):
        assert_close(call(X), model(2 * X).square().sum(), "loss")
    assert fxfuse.report(lazy).fused
    assert counter.frame_count == 1
    assert_same(model, lazy)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16), nullcontext])
def test_contexts_of_the_first_call(context: Any) -> None:
    model, lazy = pair(called=False)
    with context():
        x = X.clone()  # in inference mode one that autograd does not take
        assert_close(lazy(x), model(x), "output", 0.05 if torch.is_autocast_enabled("cpu") else 1e-9)
    assert fxfuse.report(lazy).fused
    assert_same(model, lazy)


def test_signature() -> None:
    model, lazy = pair(called=False)
    assert inspect.signature(lazy.forward) == inspect.signature(model.forward)
    assert lazy.forward.__name__ == "forward"
    assert inspect.signature(copy.deepcopy(lazy).forward) == inspect.signature(model.forward)


# -- who else has the Parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unequal", [False, True])
def test_parameters_lie_as_they_did(unequal: bool) -> None:
    model, lazy = pair(unequal=unequal)
    for (name, a), b in zip(model.named_parameters(), lazy.parameters(), strict=True):
        assert (a.shape, a.stride()) == (b.shape, b.stride()), name
    assert_same(model, lazy)
    flat = parameters_to_vector(model.parameters()).detach()
    assert_close(parameters_to_vector(lazy.parameters()).detach(), flat, "vector")
    together = {p.untyped_storage().data_ptr() for p in lazy.nets.parameters()}
    assert len(together) < len(list(lazy.nets.parameters()))


@pytest.mark.parametrize("unequal", [False, True])
def test_optimizers_that_flatten(unequal: bool) -> None:
    model, lazy = pair(unequal=unequal, called=False)
    for net in (model, lazy):
        optimizer = torch.optim.LBFGS(net.parameters(), max_iter=3)

        def closure(net: nn.Module = net, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = squared(net)(X)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        for _ in range(3):
            optimizer.step(closure)
    assert_same(model, lazy)


@pytest.mark.parametrize("late", [False, True])
def test_a_flat_vector_that_the_parameters_are_views_of(late: bool) -> None:
    """As in evolution strategies: what is written to the vector is in the model."""
    model, lazy = pair(called=late)
    vectors = [parameters_to_vector(model.parameters()).detach().clone() for _ in range(2)]
    for net, vector in zip((model, lazy), vectors, strict=True):
        vector_to_parameters(vector, net.parameters())
    for step in range(3):
        for vector in vectors:
            vector.add_(0.1 * step)
        assert_same(model, lazy)


@pytest.mark.parametrize("late", [False, True])
def test_a_state_dict_that_is_held(late: bool) -> None:
    """It shares memory with the Parameters, as torch's does."""
    model, lazy = pair(called=late)
    held = lazy.state_dict()
    assert_same(model, lazy)
    for net in (model, lazy):
        torch.optim.SGD(net.parameters(), 0.1).step()
    for name, parameter in lazy.named_parameters():
        assert held[name].data_ptr() == parameter.data_ptr()
    assert_same(model, lazy)


def test_memory_of_several_processes() -> None:
    model, lazy = pair()
    lazy.share_memory()
    assert_same(model, lazy)
    assert all(parameter.is_shared() for parameter in lazy.parameters())


def test_statistics_that_somebody_holds() -> None:
    """A program writes to statistics where they lie: the loop runs for as long as they must stay, and says why."""
    model, lazy = pair(norm=True, called=False)
    held = lazy.state_dict()
    for _ in range(3):
        assert_close(lazy(X), model(X), "output")
    assert fxfuse.report(lazy).fused
    (reason,) = fxfuse.report(lazy).fallbacks
    assert reason.endswith("is updated, and its members must stay where they are: another tensor holds its memory")
    for name, _ in model.named_buffers():
        assert_close(held[name], model.get_buffer(name), name)
        assert held[name].data_ptr() == lazy.get_buffer(name).data_ptr()
    del held
    for _ in range(16):  # it is asked less and less often
        lazy(X)
        model(X)
    before = sum(fxfuse.report(lazy).fallbacks.values())
    assert_same(model, lazy, fallbacks=before)


class Tables(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(4 + i, 2 + i % 3) for i in range(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([table(x[:, i]) for i, table in enumerate(self.tables)], -1)


def test_tables_of_unequal_rows() -> None:
    """Rows are filled up, and gathered; what fills them up stays zero through training."""
    words = torch.arange(30).view(5, 6) % 4
    model = randomized(Tables())
    lazy = fxfuse.optimize(copy.deepcopy(model), objective="launches", progress=False)
    for _ in range(3):
        for net in (model, lazy):
            optimizer = torch.optim.SGD(net.parameters(), 0.1, weight_decay=0.1)
            optimizer.zero_grad()
            net(words).square().sum().backward()
            optimizer.step()
        assert_close(lazy(words), model(words), "output")
    assert fxfuse.report(lazy).fused
    assert not fxfuse.report(lazy).fallbacks
    for (name, a), b in zip(model.named_parameters(), lazy.parameters(), strict=True):
        assert_close(b, a, name)
        assert b.is_contiguous()


def test_a_shape_that_changes_in_place() -> None:
    _, lazy = pair()
    weight = lazy.get_parameter("nets.2.first.weight")
    weight.data = weight.data[:2]
    with pytest.raises(RuntimeError, match="size of the tensor"):
        lazy(X)


# -- what else is done to a model ------------------------------------------------------------------------------------------------------


def pruned(net: nn.Module) -> None:
    prune.l1_unstructured(net.nets[2].first, "weight", amount=0.5)


def parametrized(net: nn.Module) -> None:
    torch.manual_seed(0)
    parametrizations.spectral_norm(net.nets[1].first)
    net.eval()


def replaced(net: nn.Module) -> None:
    net.nets[0].first.weight = nn.Parameter(randn(4, 3, seed=5))


def swapped(net: nn.Module) -> None:
    net.nets[0], net.nets[1] = net.nets[1], net.nets[0]


def assigned(net: nn.Module) -> None:
    net.load_state_dict({name: 2 * value for name, value in net.state_dict().items()}, assign=True)
    net.requires_grad_(True)


def emptied(net: nn.Module) -> None:
    saved = {name: value.clone() for name, value in net.state_dict().items()}
    net.to_empty(device="cpu").load_state_dict(saved)


def there_and_back(net: nn.Module) -> None:
    net.float().double()


CHANGES = [pruned, parametrized, replaced, swapped, assigned, emptied, there_and_back]


@pytest.mark.parametrize(("change", "unequal"), [(change, unequal) for change in CHANGES for unequal in {False, change is not swapped}])
@pytest.mark.parametrize("called", [False, True])
def test_changes(change: Callable[[nn.Module], None], called: bool, unequal: bool) -> None:
    model, lazy = pair(called=called, norm=True, unequal=unequal)
    for net in (model, lazy):
        change(net)
    for _ in range(2):
        assert_close(lazy(X), model(X), "output")
    for a, b in zip(gradients(model), gradients(lazy), strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert_close(b, a, "gradient", floor=ROUNDING)


@pytest.mark.parametrize("unequal", [False, True])
@pytest.mark.parametrize("frozen", [1, 6])
def test_frozen_lanes(frozen: int, unequal: bool) -> None:
    for called in (False, True):
        model, lazy = pair(called=called, unequal=unequal)
        for net in (model, lazy):
            for lane in list(net.nets)[:frozen]:
                lane.requires_grad_(False)
        for _ in range(2):
            for a, b in zip(gradients(model), gradients(lazy), strict=True):
                assert (a is None) == (b is None)
                if a is not None and b is not None:
                    assert_close(b, a, "gradient", floor=ROUNDING)
        for net in (model, lazy):
            net.requires_grad_(True)
        assert_same(model, lazy)


@pytest.mark.parametrize("called", [False, True])
def test_copies_on_disk(called: bool) -> None:
    model, lazy = pair(called=called, norm=True)
    file = io.BytesIO()
    torch.save(lazy, file)
    file.seek(0)
    made = [copy.deepcopy(lazy), pickle.loads(pickle.dumps(lazy)), torch.load(file, weights_only=False)]
    for each in made:
        assert_same(copy.deepcopy(model), each)
    assert_same(model, lazy)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant: bool) -> None:
    model, lazy = pair()
    found = []
    for net in (model, lazy):
        x = X.clone().requires_grad_()
        checkpoint(net, x, use_reentrant=reentrant).square().sum().backward()
        found.append([x.grad, *(parameter.grad for parameter in net.parameters())])
    for a, b in zip(*found, strict=True):
        assert_close(b, a, "gradient", floor=ROUNDING)


@pytest.mark.parametrize("unequal", [False, True])
def test_gradients_of_gradients(unequal: bool) -> None:
    model, lazy = pair(unequal=unequal)
    found = []
    for net in (model, lazy):
        weights = list(net.parameters())
        first = torch.autograd.grad(squared(net)(X), weights, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), weights, allow_unused=True))
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(b, a, "gradient", floor=ROUNDING)


def test_hooks_of_parameters() -> None:
    model, lazy = pair()
    seen: list[list[str]] = []
    for net in (model, lazy):
        told: list[str] = []
        for name, parameter in net.named_parameters():
            parameter.register_hook(lambda g, name=name, told=told: told.append(name) or 2 * g)
            parameter.register_post_accumulate_grad_hook(lambda p, name=name, told=told: told.append(f"{name} has it"))
        seen.append(told)
    assert_same(model, lazy)
    assert sorted(seen[0]) == sorted(seen[1])


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_to_empty_leaves_what_the_program_alone_reads(packed: bool, meta: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, lazy = pair(unequal=True)
    fused = fxfuse.optimize(model, X, objective="launches", progress=False) if packed else lazy
    assert bool(dict(fused.named_buffers())) is packed
    saved = fxfuse.original_state_dict(fused)
    if meta:
        fused.to("meta")
    with monkeypatch.context() as anything:
        empty = torch.empty_like
        anything.setattr(torch, "empty_like", lambda like, **how: empty(like, **how).fill_(torch.nan if like.is_floating_point() else -1))
        fused.to_empty(device="cpu")
    fxfuse.load_original_state_dict(fused, saved)
    for name, parameter in fused.named_parameters():
        assert parameter.isfinite().all(), name
    assert_close(fused(X), model(X), "output")


@pytest.mark.parametrize("packed", [False, True])
def test_moves_of_what_was_moved_in_inference_mode(packed: bool) -> None:
    model, lazy = pair(unequal=True)
    fused = fxfuse.optimize(model, X, objective="launches", progress=False) if packed else lazy
    with torch.inference_mode():
        fused.float().double().to_empty(device="cpu")
        fxfuse.load_original_state_dict(fused, model.state_dict())
    fused.to(torch.float64)
    with torch.no_grad():
        assert_close(fused(X), model(X), "output")


# -- when it fuses, and with what --------------------------------------------------------------------------------------------------------


def test_a_call_that_raises_is_no_first_call() -> None:
    model, lazy = pair(called=False)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        lazy(X[:, :, :2])
    lazy(X)
    assert_same(model, lazy)
    assert fxfuse.report(lazy).fused


def test_a_model_that_always_raises_is_looked_at_no_more_than_thrice(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    run = fxfuse.lazy.FirstCall.fuse
    monkeypatch.setattr(fxfuse.lazy.FirstCall, "fuse", lambda *args: looked.append(1) or run(*args))
    _, lazy = pair(called=False)
    for _ in range(5):
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            lazy(X[:, :, :2])
    assert len(looked) == 3


def test_an_empty_batch_is_no_first_call() -> None:
    model, lazy = pair(called=False)
    assert_close(lazy(X[:0]), model(X[:0]), "output")
    lazy(X)
    assert_same(model, lazy)
    assert fxfuse.report(lazy).fused


def test_parameters_without_a_shape() -> None:
    class Shapeless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nets = nn.ModuleList(nn.LazyLinear(4) for _ in range(6))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([net(x[:, i]) for i, net in enumerate(self.nets)], -1)

    model = Shapeless().double()
    given = fxfuse.optimize(model, X)
    (refusal,) = fxfuse.report(given).refused
    assert refusal.reason.startswith("it has tensors without a shape yet")
    lazy = fxfuse.optimize(model, objective="launches")
    expected = lazy(X)
    assert not fxfuse.report(lazy).fused
    assert_close(lazy(X), expected, "output")
    assert fxfuse.report(lazy).fused


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (randomized(Lanes((4,) * 6, norm=False), seed=seed) for seed in (1, 2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.a(x) + self.b(x)
        return out


@pytest.mark.parametrize("inputs", [False, True])
def test_a_part_that_waits_is_fused_with_the_whole(inputs: bool) -> None:
    model = Whole()
    parted = copy.deepcopy(model)
    parted.a = fxfuse.optimize(parted.a, objective="launches")
    fused = fxfuse.optimize(parted, X, objective="launches", progress=False) if inputs else fxfuse.optimize(parted, objective="launches")
    for _ in range(2):
        assert_close(fused(X), model(X), "output")
    assert not fxfuse.report(fused).refused
    assert fxfuse.report(fused).fused
    assert_close(parted.a(X), model.a(X), "the part by itself")  # which waits as before
    assert fxfuse.report(parted.a).fused


def test_averages_made_before() -> None:
    """They go through the buffers of both at once: what only a program reads is none."""
    words = torch.arange(30).view(5, 6) % 4
    models = [randomized(nn.Sequential(Tables(), nn.BatchNorm1d(18))) for _ in range(2)]
    models[1][0] = fxfuse.optimize(models[1][0], objective="launches")
    averages = [torch.optim.swa_utils.AveragedModel(model) for model in models]
    for _ in range(3):
        for model, average in zip(models, averages, strict=True):
            model(words).square().sum().backward()
            torch.optim.SGD(model.parameters(), 0.01).step()
            average.update_parameters(model)
    assert fxfuse.report(models[1][0]).fused
    for a, b in zip(averages[0].parameters(), averages[1].parameters(), strict=True):
        assert_close(b, a, "average")
    for model, average in zip(models, averages, strict=True):
        for (name, a), b in zip(model.named_buffers(), average.module.buffers(), strict=True):
            assert_close(b, a, name)


@pytest.mark.filterwarnings("ignore")
def test_a_trace_under_no_grad_keeps_the_parameters() -> None:
    model, lazy = pair()
    with torch.no_grad():
        lazy(X)
        traced = torch.jit.trace(lazy, X, check_trace=False)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    other = {name: 2 * value for name, value in model.state_dict().items()}
    loaded.load_state_dict(other)
    model.load_state_dict(other)
    assert_close(loaded(X), model(X), "output")


def without_a_bias(net: nn.Module) -> None:
    net.nets[2].first.bias = None


def a_buffer_for_a_parameter(net: nn.Module) -> None:
    weight = net.nets[2].first.weight.detach() * 2
    del net.nets[2].first.weight
    net.nets[2].first.register_buffer("weight", weight)


def plain_tensors_for_parameters(net: nn.Module) -> None:
    for lane in net.nets:
        weight = lane.first.weight.detach() * 2
        del lane.first.weight
        lane.first.weight = weight



def swapped_tensors(net: nn.Module) -> None:
    torch.utils.swap_tensors(net.nets[0].first.weight, net.nets[1].first.weight)


KINDS = [without_a_bias, a_buffer_for_a_parameter, plain_tensors_for_parameters, swapped_tensors]


@pytest.mark.parametrize("change", KINDS)
def test_members_of_another_kind(change: Callable[[nn.Module], None]) -> None:
    model, lazy = pair()
    for net in (model, lazy):
        net(X).sum().backward()
        change(net)
    for _ in range(2):
        assert_close(lazy(X), model(X), "output")
    for a, b in zip(gradients(model), gradients(lazy), strict=True):
        assert_close(b, a, "gradient")
    for reason in fxfuse.report(lazy).fallbacks:
        assert "is None now" in reason or "is no parameter any more" in reason


@pytest.mark.parametrize("packed", [False, True])
def test_a_lane_that_is_registered_once_more(packed: bool) -> None:
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nets = nn.ModuleList(nn.Linear(3, 2) for _ in range(6))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = sum(net(x[:, 0]) for net in self.nets)  # type: ignore[assignment]
            return out

    model = randomized(Sums())
    fused = fxfuse.optimize(copy.deepcopy(model), *([X] if packed else []), objective="launches", progress=False)
    assert_close(fused(X), model(X), "output")
    for net in (model, fused):
        net.nets.append(net.nets[0])
    assert_close(fused(X), model(X), "with one once more")
    (reason,) = fxfuse.report(fused).fallbacks
    assert reason == "a submodule was registered once more, or under another name"


@pytest.mark.parametrize("unequal", [False, True])
def test_a_copy_that_is_first_called_on_fake_tensors(unequal: bool) -> None:
    """Parameters do not move into a buffer without numbers, and no index without them is kept."""
    model, lazy = pair(unequal=unequal)
    copied = copy.deepcopy(lazy)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        assert copied(mode.from_tensor(X)).shape == (5, 1)
    assert_close(copied(X), model(X), "output")
    assert_same(model, copied)


def test_another_default_device() -> None:
    model, lazy = pair(unequal=True)
    copied = copy.deepcopy(lazy)
    with torch.device("meta"):
        assert_close(copied(X), model(X), "output")
    assert_same(model, copied)


@pytest.mark.parametrize("called", [False, True])
def test_other_buffers_within_a_transform(called: bool) -> None:
    """Where they lie cannot be asked there."""
    model, lazy = pair(norm=True)
    model.eval(), lazy.eval()
    if called:
        lazy(X)
    found = []
    for each in (model, lazy):
        weights = {name: p.detach().clone() for name, p in each.named_parameters()}
        buffers = {name: 2 * b if b.is_floating_point() else b.clone() for name, b in each.named_buffers()}
        found.append(torch.func.grad(lambda w, m=each, b=buffers: functional_call(m, (w, b), (X,)).square().sum())(weights))
    for name, grad in found[0].items():
        assert_close(found[1][name], grad, name)
