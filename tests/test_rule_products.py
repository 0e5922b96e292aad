"""Products written by hand: with computed operands, and with Parameters of every rank; distances and small linear algebra."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from small_ops import LAYOUTS, Ops, assert_ops_fuse
from torch import Tensor, nn

import checks

PRODUCTS: Ops = {
    "gram": lambda x: x @ x.transpose(1, 2),
    "bmm": lambda x: torch.bmm(x, x.mT),
    "4d": lambda x: (lambda y: y @ y.mT)(x.reshape(-1, 2, 2, 6)),
    "vector": lambda x: torch.matmul(x, x.mean((0, 1))),
    "mm": lambda x: torch.mm(x.flatten(0, 1).t(), x.flatten(0, 1)),
    "mv": lambda x: torch.mv(x[0], x[0, 0]),
    "dot": lambda x: torch.dot(x.flatten(), x.flatten()),
    "vdot": lambda x: torch.vdot(x.flatten(), x.flatten()),
    "outer": lambda x: torch.outer(x[:, 0, 0], x[0, 0]),
    "inner": lambda x: torch.inner(x, x.mean((0, 1))),
    "inner 2": lambda x: torch.inner(x, x.mean(0)),
    "einsum": lambda x: torch.einsum("bij,bkj->bik", x, x),
    "ellipsis": lambda x: torch.einsum("...ij,...kj->...ik", x, x),
    "implicit": lambda x: torch.einsum("bij,bkj", x, x),
    "trace": lambda x: torch.einsum("bii->b", x[..., :4]),
    "diagonal": lambda x: torch.einsum("bii->bi", x[..., :4]),
    "tensordot": lambda x: torch.tensordot(x, x.mean(0), dims=([2], [1])),
    "tensordot 1": lambda x: torch.tensordot(x, x.mean(0).t(), dims=1),
    "tensordot 0": lambda x: torch.tensordot(x.mean(0), x.mean((0, 1)), dims=0),
    "addmm": lambda x: torch.addmm(x.mean((0, 1)), x.flatten(0, 1), x[0].t() @ x[0]),
    "addmm scaled": lambda x: torch.addmm(x[0], x[0], x[0].t() @ x[0], beta=0.5, alpha=2),
    "addmm beta 0": lambda x: torch.addmm(x[0], x[0], x[0].t() @ x[0], beta=0),
    "addmm number": lambda x: torch.addmm(x.mean(), x[0], x[0].t() @ x[0]),
    "baddbmm": lambda x: torch.baddbmm(x.sum(-1, keepdim=True), x, x.mT),
    "baddbmm scaled": lambda x: torch.baddbmm(x.sum(-1, keepdim=True), x, x.mT, beta=0.3, alpha=0.7),
    "baddbmm bias": lambda x: torch.baddbmm(x.mean(0, keepdim=True)[..., :4], x, x.mT),
    "baddbmm row": lambda x: torch.baddbmm(x[0, 0, :4], x, x.mT),
    "addr": lambda x: torch.addr(x[:, 0], x[:, 0, 1], x[0, 0]),
    "addbmm": lambda x: torch.addbmm(x.mean(0)[:, :4], x, x.mT),
    "addbmm scaled": lambda x: torch.addbmm(x[0, :, :4], x, x.mT, beta=2, alpha=0.5),
    "addmv": lambda x: torch.addmv(x[0, :, 0], x[0], x[0, 1]),
    "addmv scaled": lambda x: torch.addmv(x[0, :, 0], x[0], x[0, 1], alpha=3),
    "linear": lambda x: F.linear(x, x.mean(0)),
    "linear bias": lambda x: F.linear(x, x.mean(0), x.mean((0, 2))),
    "linear 1d": lambda x: F.linear(x[0, 0], x[0]),
    "chain": lambda x: x @ x.mean(0).t() @ x.mean(0),
    "scaled": lambda x: (x @ x.mT / 6**0.5).softmax(-1) @ x,
    "scores": lambda x: torch.matmul(x.unsqueeze(1), x.mT.unsqueeze(1)).squeeze(1),
}
DISTANCES: Ops = {
    "cosine": lambda x: F.cosine_similarity(x, x * 2 + 1, dim=-1),
    "module": lambda x: nn.CosineSimilarity(dim=1)(x, x.flip(1)),
    "cosine 1": lambda x: F.cosine_similarity(x, x.flip(1)),
    "all pairs": lambda x: F.cosine_similarity(x.unsqueeze(1), x.unsqueeze(2), dim=-1),
    "to one": lambda x: F.cosine_similarity(x, x[0, 0], dim=-1),
    "pairwise": lambda x: F.pairwise_distance(x, x * 2),
    "manhattan": lambda x: nn.PairwiseDistance(p=1)(x, x.flip(1)),
    "keep": lambda x: F.pairwise_distance(x, x * 2, keepdim=True),
    "cdist": lambda x: torch.cdist(x, x.flip(1) + 1),
    "cdist 1": lambda x: torch.cdist(x, x.flip(1) + 1, p=1),
    "cdist to all": lambda x: torch.cdist(x, x[0] + 1),
    "cross": lambda x: torch.cross(x[..., :3], x[..., 3:], dim=-1),
    "cross 1": lambda x: torch.cross(x[:, :3], x[:, 1:], dim=1),
    "linalg cross": lambda x: torch.linalg.cross(x[..., :3], x[..., 3:]),
    "inv": lambda x: torch.linalg.inv(x[..., :4] + 5 * torch.eye(4, dtype=x.dtype)),
    "det": lambda x: torch.linalg.det(x[..., :4]),
    "solve": lambda x: torch.linalg.solve(x[..., :4] + 5 * torch.eye(4, dtype=x.dtype), x),
    "matrix_exp": lambda x: torch.matrix_exp(x[..., :4]),
    "cholesky": lambda x: torch.linalg.cholesky(x @ x.mT + torch.eye(4, dtype=x.dtype)),
    "power": lambda x: torch.linalg.matrix_power(x[..., :4], 2),
    "logdet": lambda x: torch.logdet(x @ x.mT + torch.eye(4, dtype=x.dtype)),
    "slogdet": lambda x: torch.linalg.slogdet(x[..., :4])[1],
    "eigenvalues": lambda x: torch.linalg.eigvalsh(x @ x.mT),
    "singular": lambda x: torch.linalg.svdvals(x),
    "matrix norm": lambda x: torch.linalg.matrix_norm(x, ord=1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_products_of_activations(layout: str) -> None:
    assert_ops_fuse(PRODUCTS, (4, 6), layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_distances_and_matrices(layout: str) -> None:
    assert_ops_fuse(DISTANCES, (4, 6), layout)


class Weighted(nn.Module):
    """Lanes that multiply by a Parameter of their own, as papers' code writes it."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor], weight: tuple[int, ...], shared: bool, lanes: int = 4) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.empty(weight)) for _ in range(lanes))
        self.product, self.shared = product, shared

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.product(x if self.shared else x[:, i], w) for i, w in enumerate(self.weights)], 1)


# name -> product, shape of a lane's input after the batch, shape of its weight
WEIGHTED: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "x @ w": (lambda x, w: x @ w, (6,), (6, 3)),
    "3d @ w": (lambda x, w: x @ w, (4, 6), (6, 3)),
    "4d @ w": (lambda x, w: torch.matmul(x, w), (2, 4, 6), (6, 3)),
    "x @ v": (lambda x, w: x @ w, (6,), (6,)),
    "3d @ v": (lambda x, w: x @ w, (4, 6), (6,)),
    "w @ 3d": (lambda x, w: w @ x, (6, 4), (3, 6)),
    "v @ 3d": (lambda x, w: w @ x, (6, 4), (6,)),
    "3d @ 3d": (lambda x, w: x @ w, (4, 6), (1, 6, 3)),
    "4d @ heads": (lambda x, w: x @ w, (2, 4, 6), (2, 6, 3)),
    "w @ 4d": (lambda x, w: w @ x, (2, 6, 4), (2, 3, 6)),
    "mm": (lambda x, w: torch.mm(x, w), (6,), (6, 3)),
    "mv": (lambda x, w: torch.mv(x, w), (6,), (6,)),
    "transposed": (lambda x, w: x @ w.t(), (6,), (3, 6)),
    "linear": (lambda x, w: F.linear(x, w), (4, 6), (3, 6)),
    "einsum": (lambda x, w: torch.einsum("bi,io->bo", x, w), (6,), (6, 3)),
    "quadratic": (lambda x, w: torch.einsum("bi,ij,bj->b", x, w, x), (6,), (6, 6)),
    "tensordot": (lambda x, w: torch.tensordot(x, w, dims=([1], [0])), (6, 2), (6, 3)),
    "outer": (lambda x, w: torch.outer(x, w), (), (3,)),
    "addmm": (lambda x, w: torch.addmm(w[0], x, w, alpha=0.5), (6,), (6, 6)),
    "sum of products": (lambda x, w: (x * w).sum(-1), (4, 6), (4, 6)),
    "cdist": (lambda x, w: torch.cdist(x, w), (6,), (5, 6)),
    "cosine": (lambda x, w: F.cosine_similarity(x.unsqueeze(1), w, dim=-1), (6,), (5, 6)),
    "gate": (lambda x, w: torch.where(x > 0, x, w), (6,), ()),
    "lerp": (lambda x, w: torch.lerp(x, x.flip(-1), w.sigmoid()), (6,), ()),
    "mixture": (lambda x, w: (x.unsqueeze(-1) * w.softmax(0)).sum(1), (6,), (6, 3)),
    "row of weights": (lambda x, w: x * w.expand_as(x), (4, 6), (6,)),
    "scan": (lambda x, w: torch.cumsum(x * w, dim=1), (4, 6), (6,)),
    "highest": (lambda x, w: torch.max(x, w), (4, 6), (6,)),
}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", WEIGHTED)
def test_products_with_parameters(name: str, shared: bool) -> None:
    product, given, weight = WEIGHTED[name]
    model = checks.randomized(Weighted(product, weight, shared))
    checks.assert_fused_equals(model, checks.randn(5, *(() if shared else (4,)), *given), batches=(1, 3), **checks.QUICK)


def test_complex_products() -> None:
    class Spectral(nn.Module):
        """Complex weights stored as pairs of real numbers, one set per layer of a loop."""

        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList(nn.Parameter(torch.empty(4, 6, 2)) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            outputs = []
            for i, w in enumerate(self.weights):
                spectrum = torch.fft.rfft(x[:, i], dim=-1)
                mixed = torch.einsum("bk,kf->bf", spectrum, torch.view_as_complex(w))
                outputs.append(torch.fft.irfft(mixed, n=10, dim=-1) + torch.vdot(mixed[0], mixed[0]).real)
            return torch.stack(outputs, 1)

    checks.assert_fused_equals(checks.randomized(Spectral()), checks.randn(5, 3, 6), batches=(1, 3), **checks.QUICK)


class Triangles(nn.Module):
    """Each lane decomposes a Parameter of its own, of which torch reads one triangle: its pack must not exchange rows and columns."""

    def __init__(self) -> None:
        super().__init__()
        self.matrices = nn.ParameterList(nn.Parameter(checks.randn(4, 4, seed=i)) for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([torch.tanh(x * torch.linalg.eigvalsh(matrix).amax()) for matrix in self.matrices])


def test_a_triangle_of_a_parameter() -> None:
    checks.assert_fused_equals(Triangles().double(), checks.randn(5))
