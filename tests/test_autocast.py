"""Under ``torch.autocast`` a fused model takes the fast way: the original's dtypes, its values up to bfloat16's rounding, gradients."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxfuse
from checks import QUICK, mlp, model_of, randn, randomized
from fxfuse.building import adapt
from fxfuse.errors import FallbackError
from fxfuse.functional import autocast_to
from fxfuse.fused import regions
from fxfuse.launches import count
from fxfuse.private.pytree import tree_leaves, tree_map_only
from fxfuse.weights import packing

BF16 = torch.bfloat16


def single(value: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t.float() if t.is_floating_point() else t, value)


def fuse(model: nn.Module, x: Any, **options: Any) -> nn.Module:
    return fxfuse.optimize(model, x, **{"objective": "launches", **QUICK, **options})


def ran(model: nn.Module, x: Any, dtype: torch.dtype | None = BF16) -> tuple[list[Tensor], list[Tensor | None], dict[str, Tensor | None]]:
    """Outputs, gradients of the inputs, gradients by the original's names, of one call under autocast."""
    args = tree_map_only(Tensor, lambda t: t.detach().clone().requires_grad_(t.is_floating_point()), x if isinstance(x, tuple) else (x,))
    model.zero_grad()
    with torch.autocast("cpu", dtype=dtype or BF16, enabled=dtype is not None):
        out = model(*args)
    outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
    sum((leaf.float() * torch.linspace(0.5, 1.5, leaf.numel()).view(leaf.shape)).sum() for leaf in outputs if leaf.requires_grad).backward()
    inputs = [leaf.grad for leaf in tree_leaves(args) if isinstance(leaf, Tensor) and leaf.requires_grad]
    return [leaf.detach() for leaf in outputs], inputs, packing.original_gradients(model)


def assert_close(got: Tensor | None, want: Tensor | None, what: str, tolerance: float) -> None:
    if got is None or want is None:
        assert got is want, f"{what}: {got} against {want}"
        return
    assert got.dtype is want.dtype, f"{what}: {got.dtype}, the original's is {want.dtype}"
    assert got.shape == want.shape, what
    if want.numel() and want.dtype.is_floating_point:
        error = (got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)
        assert error <= tolerance, f"{what}: {error:.3g} of its norm apart"
    else:
        assert torch.equal(got, want), what


def assert_same(model: nn.Module, fused: nn.Module, x: Any, tolerance: float = 0.03) -> None:
    (outs, inputs, weights), (want_outs, want_inputs, want_weights) = ran(fused, x), ran(model, x)
    for index, (got, want) in enumerate(zip(outs, want_outs, strict=True)):
        assert_close(got, want, f"output {index}", tolerance)
        assert got.stride() == want.stride(), f"output {index}: {got.stride()} against {want.stride()}"
    for index, (one, other) in enumerate(zip(inputs, want_inputs, strict=True)):
        assert_close(one, other, f"gradient of input {index}", 2 * tolerance)
    assert list(weights) == list(want_weights)
    scale = max(grad.double().norm() for grad in want_weights.values() if grad is not None)
    for name, grad in want_weights.items():
        if grad is None or grad.double().norm() > 0.02 * scale:  # smaller ones are mostly rounding
            assert_close(weights[name], grad, f"gradient of {name}", 2 * tolerance)


def assert_fast(model: nn.Module, x: Any, heavy: int, batches: tuple[int, ...] = (3, 9), **options: Any) -> nn.Module:
    """The fast way in both modes, on other data and batch sizes, from one fused model."""
    model, x = randomized(model).float(), single(x)
    fused = fuse(model, x, **options)
    assert fxfuse.report(fused).fused, fxfuse.report(fused)
    for training in (True, False):
        model.train(training)
        fused.train(training)
        for rows in (len(tree_leaves(x)[0]), *batches):
            generator = torch.Generator().manual_seed(rows)
            drawn = torch.randint(len(tree_leaves(x)[0]), (rows,), generator=generator)
            assert_same(model, fused, tree_map_only(Tensor, lambda t, drawn=drawn: t[drawn] * 1, x))
    assert not fxfuse.report(fused).fallbacks, fxfuse.report(fused).fallbacks
    args = x if isinstance(x, tuple) else (x,)
    with torch.autocast("cpu", dtype=BF16):
        assert count(lambda: fused(*args)).heavy <= heavy
    return fused


class Columns(nn.Module):
    """A network per column."""

    def __init__(self, lanes: int = 4, make: Any = mlp) -> None:
        super().__init__()
        self.nets = nn.ModuleList(make() for _ in range(lanes))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1)


class Shared(nn.Module):
    """Every lane reads the whole input."""

    def __init__(self, make: Any, join: Any = torch.stack) -> None:
        super().__init__()
        self.lanes = nn.ModuleList(make() for _ in range(3))
        self.join = join

    def forward(self, *xs: Any) -> Any:
        return self.join([lane(*xs) for lane in self.lanes])


@pytest.mark.parametrize("lowering", ["auto", "bmm", "grouped_conv"])
def test_networks_per_column(lowering: str) -> None:
    assert_fast(Columns(), randn(6, 4), 2, lowering=lowering, validate=True)


@pytest.mark.parametrize(("inputs", "hidden", "outputs"), [(1, 1, 1), (3, 5, 1), (2, 6, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_widths(inputs: int, hidden: int, outputs: int, bias: bool) -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(inputs, hidden, bias), nn.Tanh(), nn.Linear(hidden, outputs, bias))

    def forward(self: Any, x: Tensor) -> Tensor:
        return torch.stack([net(x[:, i]) for i, net in enumerate(self.nets)])

    assert_fast(model_of(forward, nets=nn.ModuleList(net() for _ in range(4))), randn(6, 4, inputs), 2)


LANES: dict[str, tuple[Any, Any, int]] = {
    "conv1d": (lambda: nn.Conv1d(2, 3, 3, padding=1), randn(4, 2, 7), 1),
    "conv2d and batch norm": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU()), randn(4, 2, 6, 6), 2),
    "conv transposed": (lambda: nn.ConvTranspose1d(2, 3, 3), randn(4, 2, 7), 1),
    "layer norm": (lambda: nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 2)), randn(4, 5), 3),
    "group norm": (lambda: nn.Sequential(nn.Conv1d(4, 4, 1), nn.GroupNorm(2, 4)), randn(4, 4, 5), 2),
    "embedding": (lambda: nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3)), torch.randint(9, (6, 2)), 2),
    "attention": (
        lambda: model_of(lambda self, x: self.att(x, x, x, need_weights=False)[0], att=nn.MultiheadAttention(8, 2, batch_first=True)),
        randn(3, 5, 8), 3,
    ),
    "softmax": (lambda: nn.Sequential(nn.Linear(5, 4), nn.Softmax(-1), nn.Linear(4, 4), nn.LogSoftmax(-1)), randn(6, 5), 2),
    "prelu": (lambda: nn.Sequential(nn.Linear(5, 4), nn.PReLU(4), nn.Linear(4, 2)), randn(6, 5), 2),
    "bilinear": (lambda: model_of(lambda self, x: self.b(x, x), b=nn.Bilinear(4, 4, 3)), randn(6, 4), 3),
}  # fmt: skip


@pytest.mark.parametrize("name", LANES)
def test_layers(name: str) -> None:
    make, x, heavy = LANES[name]
    assert_fast(Shared(make), x, heavy)


def written(*expressions: Any) -> nn.Module:
    """Lanes that are products written by hand, of a matrix and a vector each."""
    def lane() -> nn.Module:
        return model_of(expressions[0], w=nn.Parameter(torch.ones(5, 4)), b=nn.Parameter(torch.ones(4)))

    return Shared(lane, *expressions[1:])


PRODUCTS = {
    "matmul": lambda self, x: (x @ self.w).relu(),
    "addmm": lambda self, x: torch.addmm(self.b, x, self.w),
    "einsum": lambda self, x: torch.einsum("bi,ij->bj", x, self.w) + self.b,
    "mv": lambda self, x: x @ self.w @ self.b,
    "a float32 sum": lambda self, x: (x @ self.w) + self.b,
    "addcmul": lambda self, x: torch.addcmul(self.b, x @ self.w, self.b),
    "kept in float32": lambda self, x: (x @ self.w).float().exp().sum(-1),
    "a loss per lane": lambda self, x: F.mse_loss(x @ self.w, (x @ self.w).detach() * 0.5 + self.b, reduction="none"),
    "a product of all": lambda self, x: torch.prod(x @ self.w, 1),
    "mixed cat": lambda self, x: torch.cat([x @ self.w, x], 1) * 2,
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_and_what_follows(name: str) -> None:
    assert_fast(written(PRODUCTS[name]), randn(6, 5), 3)


JOINS = {
    "list": list,
    "sum": sum,
    "mixed dtypes": lambda outs: (torch.stack(outs), torch.stack(outs).float().sum(0), [out.detach() for out in outs]),
    "dict": lambda outs: {str(i): out for i, out in enumerate(outs)},
}


@pytest.mark.parametrize("name", JOINS)
def test_joins(name: str) -> None:
    assert_fast(Shared(lambda: nn.Linear(5, 4), JOINS[name]), randn(6, 5), 1)


# -- autocast inside of forward -------------------------------------------------------------------------------------------------------


def casting(self: Any, x: Tensor) -> Tensor:
    outs = []
    for net in self.nets:
        with torch.autocast("cpu", dtype=BF16):
            outs.append(net(x))
    return torch.stack(outs) + x.sum()


def not_casting(self: Any, x: Tensor) -> Tensor:
    outs = []
    for net in self.nets:
        h = net[0](x)
        with torch.autocast("cpu", enabled=False):
            outs.append(net[2](net[1](h.float())))
    return torch.stack(outs)


def both(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=BF16):
        low = [net[0](x) for net in self.nets]
        with torch.autocast("cpu", enabled=False):
            high = [net[2](h.float().relu()) for net, h in zip(self.nets, low, strict=True)]
        return torch.stack([net[2](h) for net, h in zip(self.nets, low, strict=True)]) + torch.stack(high)


@pytest.mark.parametrize("forward", [casting, not_casting, both])
@pytest.mark.parametrize("outside", [False, True])
def test_autocast_inside(forward: Any, outside: bool) -> None:
    model = randomized(model_of(forward, nets=nn.ModuleList(mlp(5, 6, 2) for _ in range(3)))).float()
    x = single(randn(6, 5))
    fused = fuse(model, x, validate=True)
    assert fxfuse.report(fused).fused, fxfuse.report(fused)
    for batch in (x, single(randn(9, 5, seed=9))):
        got, want = ran(fused, batch, BF16 if outside else None), ran(model, batch, BF16 if outside else None)
        assert_close(got[0][0], want[0][0], "output", 0.02)
        for name, grad in want[2].items():
            assert_close(got[2][name], grad, name, 0.05)
    assert not fxfuse.report(fused).fallbacks
    with torch.autocast("cpu", dtype=BF16, enabled=outside):
        assert count(lambda: fused(x)).heavy <= 3


def test_autocast_as_a_decorator() -> None:
    @torch.autocast("cpu", dtype=BF16)
    def forward(self: Any, x: Tensor) -> Tensor:
        return torch.stack([net(x) for net in self.nets])

    model = randomized(model_of(forward, nets=nn.ModuleList(mlp(5, 6, 2) for _ in range(3)))).float()
    fused = fuse(model, single(randn(6, 5)))
    got, want = ran(fused, single(randn(3, 5)), None), ran(model, single(randn(3, 5)), None)
    assert_close(got[0][0], want[0][0], "output", 0.02)
    assert want[0][0].dtype is BF16
    assert not fxfuse.report(fused).fallbacks


# -- one fused model, many calls --------------------------------------------------------------------------------------------------------


def test_one_program_for_each_form_of_call() -> None:
    model, x = randomized(Columns()).float(), single(randn(6, 4))
    fused = fuse(model, x, strict=True)
    state = regions(fused)[""]
    assert not state.adapted  # made when it is needed
    for rows in (1, 2, 6, 10_000):
        batch = single(randn(rows, 4, seed=rows))
        assert_same(model, fused, batch)
        assert_close(fused(batch), model(batch), "without autocast", 1e-6)
    assert [len(programs) for programs in state.adapted.values()] == [1]
    half = x.to(BF16)  # what a layer in front of the region hands over
    assert_same(model, fused, half)
    assert [len(programs) for programs in state.adapted.values()] == [2]


def test_an_empty_batch_first() -> None:
    model, x = randomized(Columns()).float(), single(randn(6, 4))
    fused = fuse(model, x)
    with torch.autocast("cpu", dtype=BF16):
        assert fused(x[:0]).dtype is model(x[:0]).dtype is BF16
    assert_same(model, fused, x)
    with torch.autocast("cpu", dtype=BF16):
        assert fused(x[:0]).shape == (0, 4)
    assert fxfuse.report(fused).fallbacks == {"autocast is on for cpu": 1}


def test_autocast_in_float16_is_another_program() -> None:
    model, x = randomized(Columns()).float(), single(randn(6, 4))
    fused = fuse(model, x)
    assert_same(model, fused, x)
    with torch.autocast("cpu", dtype=torch.float16):
        got, want = fused(x), model(x)
    assert_close(got, want, "float16", 0.01)
    assert not fxfuse.report(fused).fallbacks


def test_autocast_leaves_float64_alone() -> None:
    model, x = randomized(Columns()), randn(6, 4)
    fused = fuse(model, x)
    with torch.autocast("cpu", dtype=BF16):
        got, want = fused(x), model(x)
    assert_close(got, want, "float64", 1e-12)
    assert not fxfuse.report(fused).fallbacks


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Any) -> None:
    model, x = randomized(Columns()).float().eval(), single(randn(6, 4))
    fused = fuse(model, x)
    with mode(), torch.autocast("cpu", dtype=BF16):
        for rows in (6, 3):
            batch = single(randn(rows, 4, seed=rows)) * 1
            assert_close(fused(batch), model(batch), "output", 0.02)
    assert not fxfuse.report(fused).fallbacks


def test_training_under_autocast() -> None:
    model = randomized(Columns()).float()
    fused = fuse(model, single(randn(6, 4)), strict=True)
    losses = []
    for each in (model, fused):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.05)
        for step in range(20):
            x = single(randn(8, 4, seed=step))
            with torch.autocast("cpu", dtype=BF16):
                loss = F.mse_loss(each(x), x.sin())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    for name, weight in fxfuse.original_state_dict(fused).items():
        assert_close(weight, model.state_dict()[name], name, 0.02)


def test_copies_saves_and_moves_make_their_own(tmp_path: Any) -> None:
    model, x = randomized(Columns()).float(), single(randn(6, 4))
    fused = fuse(model, x)
    assert_same(model, fused, x)
    copied = copy.deepcopy(fused)
    assert not regions(copied)[""].adapted
    assert_same(model, copied, x)
    torch.save(fused, tmp_path / "fused.pt")
    assert_same(model, torch.load(tmp_path / "fused.pt", weights_only=False), x)
    low = copy.deepcopy(model).to(BF16)
    assert_same(low, fused.to(BF16), x)
    assert not fxfuse.report(fused).fallbacks


def test_weights_that_stay_parameters() -> None:
    model, x = randomized(Columns()).float(), single(randn(6, 4))
    original = copy.deepcopy(model)
    fused = fxfuse.optimize(model, tune=False)
    fused(x)
    with torch.autocast("cpu", dtype=BF16):
        assert_close(fused(x), original(x), "output", 0.02)
    assert not fxfuse.report(fused).fallbacks


def test_other_methods() -> None:
    class Model(Columns):
        def predict(self, x: Tensor, scale: float = 2.0) -> Tensor:
            return self.forward(x) * scale + torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1)

    model, x = randomized(Model()).float(), single(randn(6, 4))
    fused = fuse(model, x, methods=["predict"], validate=True)
    with torch.autocast("cpu", dtype=BF16):
        assert_close(fused.predict(x), model.predict(x), "predict", 0.02)
        assert_close(fused(x), model(x), "forward", 0.02)
    assert not fxfuse.report(fused).fallbacks


def test_two_threads() -> None:
    model, x = randomized(Columns()).float(), single(randn(6, 4))
    fused, found = fuse(model, x), []

    def call() -> None:
        with torch.autocast("cpu", dtype=BF16):
            found.append(fused(x).detach())

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with torch.autocast("cpu", dtype=BF16):
        want = model(x)
    for got in found:
        assert_close(got, want, "in a thread", 0.02)
    assert [len(programs) for programs in regions(fused)[""].adapted.values()] == [1]


def test_hooked_lanes_stay_calls_under_autocast() -> None:
    model, x = randomized(Columns()).float(), single(randn(6, 4))
    dtypes: list[torch.dtype] = []
    model.nets[1].register_forward_hook(lambda module, inputs, out: dtypes.append(out.dtype))
    fused = fuse(model, x, validate=True)
    dtypes.clear()
    assert_same(model, fused, x)
    assert dtypes == [BF16, BF16]  # once each, and not while the program was made
    assert not fxfuse.report(fused).fallbacks


def test_random_numbers_and_the_model_are_left_alone() -> None:
    model = randomized(Columns(make=lambda: nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)))).float()
    x = single(randn(6, 4))
    fused = fuse(model, x, validate=True)
    before = torch.get_rng_state()
    assert_same(model, fused, x)
    assert torch.equal(torch.get_rng_state(), before)
    for name, buffer in model.named_buffers():
        assert_close(fxfuse.original_state_dict(fused)[name], buffer, name, 0.02)


# -- what does not take the fast way, and why -------------------------------------------------------------------------------------------


def test_recurrent_networks_say_why() -> None:
    model = randomized(Shared(lambda: nn.GRU(3, 4, batch_first=True), lambda outs: torch.stack([o for o, _ in outs]))).float()
    x = single(randn(2, 5, 3))
    fused = fuse(model, x)
    assert fxfuse.report(fused).fused
    assert_same(model, fused, x)
    reasons = list(fxfuse.report(fused).fallbacks)
    said = "autocast is on for cpu, and autocast casts inside of gru, which a graph does not repeat ("
    assert all(reason.startswith(said) for reason in reasons), reasons


def test_a_wrong_program_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    real = adapt.vectorize

    def wrong(*args: Any) -> Any:
        made = real(*args)
        for node in made.graph.nodes:
            if node.target in (torch.relu, torch.relu_):
                node.target = torch.tanh
        return made

    monkeypatch.setattr(adapt, "vectorize", wrong)
    model, x = randomized(Columns()).float(), single(randn(6, 4))
    fused = fuse(model, x, validate=True)
    assert_same(model, fused, x)
    (reason,) = fxfuse.report(fused).fallbacks
    assert reason.startswith("autocast is on for cpu, and the rewritten form differs: "), reason
    with pytest.raises(FallbackError, match="autocast is on for cpu, and the rewritten form differs"), torch.autocast("cpu", dtype=BF16):
        fuse(model, x, strict=True, validate=True)(x)


def test_a_program_of_other_dtypes_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    real = adapt.vectorize

    def wide(*args: Any) -> Any:
        made = real(*args)
        output = next(node for node in made.graph.nodes if node.op == "output")
        with made.graph.inserting_before(output):
            output.args = ([made.graph.call_function(autocast_to, (leaf, torch.float32)) for leaf in output.args[0]],)
        return made

    monkeypatch.setattr(adapt, "vectorize", wide)
    model, x = randomized(Columns()).float(), single(randn(6, 4))
    fused = fuse(model, x, validate=True)
    assert_same(model, fused, x)
    (reason,) = fxfuse.report(fused).fallbacks
    assert "output is torch.float32, the loop's torch.bfloat16" in reason, reason


def test_a_failure_while_making_one_runs_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> Any:
        raise ZeroDivisionError("by hand")

    monkeypatch.setattr(adapt, "observe", fails)
    model, x = randomized(Columns()).float(), single(randn(6, 4))
    fused = fuse(model, x)
    for _ in range(3):
        assert_same(model, fused, x)
    reason = "autocast is on for cpu, and fxfuse failed (ZeroDivisionError: by hand); please report it"
    assert fxfuse.report(fused).fallbacks == {reason: 3}


def test_another_shape_says_so() -> None:
    model, x = randomized(Columns()).float(), single(randn(6, 4))
    fused = fuse(model, x)
    wide = single(randn(6, 5))
    assert_same(model, fused, wide)
    assert fxfuse.report(fused).fallbacks == {"input 0 has shape (6, 5), recorded (any, 4)": 1}


def test_a_region_behind_other_layers() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.inner, self.last = nn.Linear(3, 4), Columns(), nn.Linear(4, 2)

        def forward(self, x: Tensor, again: bool = False) -> Tensor:
            out = self.inner(self.stem(x).relu())
            return self.last(self.inner(out) if again else out)

    fused = assert_fast(Outer(), randn(6, 3), 4)
    assert list(regions(fused)) == ["inner"]
    model = fxfuse.unfuse(fused)
    with torch.autocast("cpu", dtype=BF16):
        assert_close(fused(single(randn(5, 3)), again=True), model(single(randn(5, 3)), again=True), "twice", 0.03)
    assert not fxfuse.report(fused).fallbacks


def test_a_model_fused_under_autocast() -> None:
    model, x = randomized(Columns()).float(), single(randn(6, 4))
    with torch.autocast("cpu", dtype=BF16):
        fused = fuse(model, x, validate=True)
    assert_same(model, fused, x)
    assert_close(fused(x), model(x), "without autocast", 1e-6)
    assert not fxfuse.report(fused).fallbacks


def test_nested_regions_of_the_caller() -> None:
    model, x = randomized(Columns()).float(), single(randn(6, 4))
    fused = fuse(model, x)
    with torch.autocast("cpu", dtype=BF16):
        low = fused(x)
        with torch.autocast("cpu", enabled=False):
            assert_close(fused(x), model(x), "switched off inside", 1e-6)
            with torch.autocast("cpu", dtype=torch.float16):
                assert fused(x).dtype is torch.float16
        assert_close(fused(x), low, "on again", 0.0)
    assert not fxfuse.report(fused).fallbacks
    assert not torch.is_autocast_enabled("cpu")


def test_an_exception_leaves_autocast_as_it_was() -> None:
    class Model(Columns):
        def forward(self, x: Tensor, rows: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x)[rows]

    model, x = randomized(Model()).float(), single(randn(6, 4))
    fused = fuse(model, (x, torch.tensor([0, 1])))
    with torch.autocast("cpu", dtype=BF16):
        fused(x, torch.tensor([2, 1]))
        with pytest.raises(IndexError):
            fused(x, torch.tensor([2, 99]))
        assert torch.is_autocast_enabled("cpu")
        assert fused(x, torch.tensor([2, 1])).dtype is BF16
    assert not fxfuse.report(fused).fallbacks


class UnequalBiases(nn.Module):
    """Every other lane has a bias: what reads all of them takes them in another order, by an index that the region holds."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(2, 4, bias=i % 2 == 0), nn.ReLU(), nn.Linear(4, 3)) for i in range(5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([net(x[:, 2 * i : 2 * i + 2]) for i, net in enumerate(self.nets)], 1)


def test_indices_of_a_program_made_under_autocast() -> None:
    torch.manual_seed(0)
    model = UnequalBiases()
    x = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    fused = fxfuse.optimize(model, x, objective="launches")
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fused(x), model(x), rtol=2e-2, atol=2e-2)
    assert not fxfuse.report(fused).fallbacks
