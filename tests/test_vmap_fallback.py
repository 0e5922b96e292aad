"""Ops without a rule of their own, inside lanes: one ``torch.vmap`` call over all lanes, or a refusal that says why."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checks
import fxfuse
from fxfuse.recording.batching_rules import MissingRule, batched_or_raise
from fxfuse.running.over_lanes import OverLanes
from fxfuse.running.serialize import target_from_data, target_to_data


class Lanes(nn.Module):
    """A Linear per lane, and a function of what it gives."""

    def __init__(self, function: Callable[[Tensor], Tensor], lanes: int = 6, width: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, width) for _ in range(lanes))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.function(layer(x)) for layer in self.layers])


def matrices(h: Tensor) -> Tensor:
    """One well-conditioned matrix per row."""
    return h[:, :, None] * h[:, None, :] + torch.eye(h.shape[-1], dtype=h.dtype)


def written(h: Tensor) -> Tensor:
    """A buffer that each lane fills in pieces of its own."""
    out = torch.zeros(h.shape[0], 5, dtype=h.dtype)
    out[:, 1] = h[:, 0]
    out[:, 3] = h[:, 2] * 2
    return out


def both_outputs(h: Tensor) -> Tensor:
    values, pivots = torch.linalg.lu_factor(matrices(h))
    return values * (pivots[..., None] + 1)


def named_outputs(h: Tensor) -> Tensor:
    found = torch.linalg.lu_factor(matrices(h) + h[..., None])
    return found.LU.sum(-1) + h.gather(-1, found.pivots.long() - 1)


def gram(h: Tensor) -> Tensor:
    return torch.linalg.multi_dot([h.T, h, h.T])


def swallowed(h: Tensor) -> Tensor:
    return torch.kron(h[0], h[1]).reshape(4, 4)


def symmetric(h: Tensor) -> Tensor:
    return h.T @ h + torch.eye(h.shape[-1], dtype=h.dtype)


def labels(h: Tensor) -> Tensor:
    return torch.zeros(h.shape[0], dtype=torch.int64)


COVERED: dict[str, Callable[[Tensor], Tensor]] = {
    "linalg_lu_factor": both_outputs,
    "linalg_solve": lambda h: torch.linalg.solve(matrices(h), h),  # vectors: a case that the op's rule hands over
    "linalg_solve_ex": lambda h: torch.linalg.solve_ex(symmetric(h), h.T)[0],
    "linalg_solve_triangular": lambda h: torch.linalg.solve_triangular(torch.tril(symmetric(h)), h.T, upper=False),
    "cholesky_solve": lambda h: torch.cholesky_solve(h.T, torch.linalg.cholesky(symmetric(h))),
    "linalg_householder_product": lambda h: torch.linalg.householder_product(matrices(h), h),
    "linalg_multi_dot": gram,
    "linalg_vecdot": lambda h: torch.linalg.vecdot(h, h + 1),
    "kron": swallowed,
    "block_diag": lambda h: torch.block_diag(h, 2 * h),
    "cartesian_prod": lambda h: torch.cartesian_prod(h[0], h[1]),
    "index_add": lambda h: h.index_add(1, torch.tensor([2, 2]), h[:, :2]),
    "scatter": lambda h: h.scatter(1, h.argsort(-1), h * 2),
    "scatter_add": lambda h: torch.ones_like(h).scatter_add(1, h.argsort(-1) // 2, h),
    "slice_scatter": lambda h: h.slice_scatter(h[:, :2] * 2, 1, 2, 4),
    "diagonal_scatter": lambda h: (h.T @ h).diagonal_scatter(h[0]),
    "trapezoid": lambda h: torch.trapezoid(h, dim=-1),
    "gradient": lambda h: torch.gradient(h, dim=1)[0],
    "cross_entropy": lambda h: F.cross_entropy(h, labels(h), label_smoothing=0.1),
    "nll_loss": lambda h: F.nll_loss(h.log_softmax(-1), labels(h)),
    "cosine_embedding_loss": lambda h: F.cosine_embedding_loss(h, h * 2 + 1, torch.ones(h.shape[0], dtype=h.dtype)),
    "multilabel_soft_margin_loss": lambda h: F.multilabel_soft_margin_loss(h, (h > 0).double()),
}
# Of ops that have rules: that between such, too, nothing is left in pieces.
RULED: dict[str, Callable[[Tensor], Tensor]] = {
    "topk": lambda h: torch.topk(h, 2, dim=-1).values * (torch.topk(h, 2, dim=-1).indices + 1),
    "cummax": lambda h: torch.cummax(h, 1)[0],
    "inv": lambda h: torch.linalg.inv(matrices(h)),
    "tensordot": lambda h: torch.tensordot(h, h, dims=([1], [1])).sum(),
    "index by data": lambda h: h[torch.arange(h.shape[0]), h.argmax(-1)],
    "index_write": written,
    "complex": lambda h: torch.fft.ifft(torch.fft.fft(h) * (1 + 2j)).real,
    "var_mean": lambda h: torch.cat(torch.var_mean(h, dim=-1, keepdim=True), -1),
    "addbmm": lambda h: torch.addbmm(h.T @ h, h[:, :, None], h[:, None, :]),
}


@pytest.mark.parametrize("name", [*COVERED, *RULED])
def test_an_op_runs_once_for_all_lanes(name: str) -> None:
    model, x = checks.randomized(Lanes((COVERED | RULED)[name])), checks.randn(6, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns where vmap loops
        fused = checks.assert_fused_equals(model, x, most_heavy=None, batches=(2, 9), **checks.QUICK)
    ((_, program),) = fxfuse.graph(fused).items()
    # Nothing is left in pieces: what the loop did per lane is done for all, but for taking lanes that leave one by one.
    assert not [node for node in program.graph.nodes if node.target is torch.unbind]
    by_vmap = {op.op for op in fxfuse.report(fused).fused[0].ops if op.lowering == "vmap"}
    assert by_vmap == ({name} if name in COVERED else set())


@pytest.mark.parametrize("lanes", [2, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lane_counts_and_dtypes(lanes: int, dtype: torch.dtype) -> None:
    model = checks.randomized(Lanes(named_outputs, lanes)).to(dtype)
    x = checks.randn(5, 3).to(dtype)
    fused = fxfuse.optimize(model, x, objective="launches", strict=True)
    assert ("linalg_lu_factor", lanes, "vmap") in {(op.op, op.lanes, op.lowering) for op in fxfuse.report(fused).fused[0].ops}
    assert fxfuse.report(fused).validation.ok
    checks.assert_close(fused(x), model(x), "output", rtol=1e-5 if dtype is torch.float32 else 1e-12)


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(4, 4, dtype=torch.complex128)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([torch.linalg.solve_ex(w, x)[0].abs() for w in self.weights], 1)


def test_complex_lanes() -> None:
    torch.manual_seed(3)
    model = Complex()
    x = torch.randn(4, 2, dtype=torch.complex128)
    fused = fxfuse.optimize(model, x, objective="launches", strict=True)
    report = fxfuse.report(fused)
    assert [op.lowering for op in report.fused[0].ops if op.op.startswith("linalg_solve")] == ["vmap"]
    got, want = (torch.autograd.grad(m(x).square().sum(), list(m.parameters())) for m in (fused, model))
    assert torch.allclose(fused(x), model(x), rtol=1e-12)
    (packed,) = got
    assert torch.allclose(packed, torch.stack(list(want)), rtol=1e-10)


def test_gradients_of_gradients() -> None:
    model, x = checks.randomized(Lanes(COVERED["linalg_solve"])), checks.randn(4, 3).requires_grad_()
    fused = fxfuse.optimize(model, x.detach(), objective="launches", tune=False)
    second = []
    for each in (model, fused):
        (first,) = torch.autograd.grad(each(x).square().sum(), x, create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), x)[0])
    checks.assert_close(second[1], second[0], "second derivative")


class Picked(nn.Module):
    """One output of some lanes is used outside of them: lanes leave by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 4) for _ in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = [torch.linalg.lu_factor(matrices(layer(x))) for layer in self.layers]
        return torch.stack([f.LU for f in found[:3]]), found[3].LU[..., 0] * found[0].pivots


def test_outputs_used_by_some_lanes_only() -> None:
    model, x = checks.randomized(Picked()), checks.randn(5, 3)
    fused = fxfuse.optimize(model, x, objective="launches")
    checks.assert_equal_models(model, fused, [(x, {}), (checks.randn(3, 3, seed=5), {})])
    assert ("linalg_lu_factor", "vmap") in [(op.op, op.lowering) for op in fxfuse.report(fused).fused[0].ops]


class Reordered(nn.Module):
    """Both outputs of one op come together in another order than the lanes'."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        values, places = zip(*[torch.linalg.lu_factor(matrices(layer(x))) for layer in self.layers], strict=True)
        return torch.cat([v * (p[..., None] + 1) for v, p in zip(values, places[::-1], strict=True)], 1)


def test_outputs_in_another_order() -> None:
    checks.assert_fused_equals(checks.randomized(Reordered()), checks.randn(5, 3), **checks.QUICK)


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "renorm": (lambda h: torch.renorm(h, 2, 0, 1.0), "torch has no batching rule for renorm"),
    "triplet_margin_loss": (lambda h: F.triplet_margin_loss(h, h + 1, 2 * h), "torch has no batching rule for triplet_margin_loss"),
    "masked_scatter": (lambda h: h.masked_scatter(h > 0, 2 * h), "torch has no batching rule for masked_scatter"),
    "linalg_lstsq": (lambda h: torch.linalg.lstsq(symmetric(h), h.T).solution, "torch.vmap does not take linalg_lstsq: "),
    "select_scatter": (lambda h: h.select_scatter(h.sum(1), 1, 1), "the gradient of select_scatter over lanes is wrong in torch"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_torch_refuses_stays_a_loop(name: str) -> None:
    function, sentence = REFUSED[name]
    model, x = checks.randomized(Lanes(function)), checks.randn(6, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused = fxfuse.optimize(model, x, objective="launches", tune=False)
    report = fxfuse.report(fused)
    ops = {op.op for op in report.fused[0].ops}
    assert "linear" in ops
    assert name not in ops
    assert any(str(refusal).startswith(sentence) for refusal in report.refused), str(report)
    checks.assert_equal_models(model, fused, [(x, {}), (checks.randn(4, 3, seed=9), {})])


def test_random_numbers_without_a_rule_are_drawn_lane_by_lane() -> None:
    model, x = checks.randomized(Lanes(lambda h: torch.binomial(h * 0 + 20, h.sigmoid()))), checks.randn(6, 3)
    fused = fxfuse.optimize(model, x, objective="launches", tune=False)
    assert {op.op for op in fxfuse.report(fused).fused[0].ops} == {"linear", "mul", "add", "sigmoid"}
    drawn = []
    for each in (model, fused):
        torch.manual_seed(5)
        drawn.append(each(x))
    assert torch.equal(*drawn)


def test_lanes_of_one_source_stay_views() -> None:
    """What launches nothing is not worth a call of its own."""
    model, x = checks.randomized(Lanes(lambda h: torch.diagonal(h @ h.T))), checks.randn(4, 3)
    fused = fxfuse.optimize(model, x, objective="launches", tune=False)
    assert {op.op for op in fxfuse.report(fused).fused[0].ops} == {"linear", "matmul"}
    checks.assert_equal_models(model, fused, [(x, {})])


class Factors(Lanes):
    def __init__(self) -> None:
        super().__init__(named_outputs)


@pytest.mark.parametrize("how", ["torch.compile", "compile"])
def test_compiles_in_one_graph(how: str) -> None:
    torch._dynamo.reset()
    model, x = checks.randomized(Factors()), checks.randn(6, 3)
    fused = fxfuse.optimize(model, x, objective="launches", tune=False, strict=True)
    if how == "compile":
        fused.compile(backend="eager", fullgraph=True)
        compiled: Any = fused
    else:
        compiled = torch.compile(fused, backend="eager", fullgraph=True)
    checks.assert_close(compiled(x), model(x), "compiled")
    compiled(x).square().sum().backward()
    model(x).square().sum().backward()
    for name, gradient in fxfuse.weights.packing.original_gradients(fused).items():
        checks.assert_close(gradient, dict(model.named_parameters())[name].grad, name)


def test_saves_and_loads() -> None:
    model, x = checks.randomized(Factors()), checks.randn(6, 3)
    fused = fxfuse.optimize(model, x, objective="launches", tune=False, strict=True)
    stream = io.BytesIO()
    torch.save(fused, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    assert torch.equal(loaded(x), fused(x))
    assert "linalg_lu_factor_over_lanes" in next(iter(fxfuse.graph(loaded).values())).code


def test_the_callable_travels_by_name() -> None:
    made = OverLanes(torch.topk, (0, None, None), ("largest",))
    again = target_from_data(target_to_data(made))
    x = checks.randn(3, 5)
    for one, other in zip(made(x, 2, False), again(x, 2, False), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(made(x, 2, False)[0], torch.topk(x, 2, 1, largest=False)[0])




def test_the_private_switch_still_does_what_it_did() -> None:
    x = checks.randn(3, 4)
    with pytest.raises(MissingRule, match="vander"), batched_or_raise():
        torch.vmap(torch.vander)(x)
    with batched_or_raise():
        assert torch.equal(torch.vmap(torch.sin)(x), x.sin())
    with pytest.raises(RuntimeError, match="size of tensor a"), batched_or_raise():
        torch.vmap(torch.add)(x, checks.randn(3, 5))
    # Afterwards, torch loops again, and says so.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(torch.vmap(torch.vander)(x), torch.stack([torch.vander(row) for row in x]))
