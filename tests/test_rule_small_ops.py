"""Softmax, scans, rolls, shape ops and pointwise ops inside lanes, as models write them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_ops import LAYOUTS, Ops, assert_ops_fuse
from torch import Tensor, nn

import fxfuse
from checks import QUICK, assert_equal_models, assert_fused_equals, mlp, model_of, randn, randomized

SCANS = "cumsum cumprod logcumsumexp argsort softmax log_softmax".split()

ALONG: Ops = {
    **{f"{name}({dim})": lambda x, name=name, dim=dim: getattr(torch, name)(x, dim=dim) for name in SCANS for dim in (-1, 1)},
    "method": lambda x: x.softmax(-1),
    "F": lambda x: F.softmax(x, dim=0),
    "softmin": lambda x: F.softmin(x, dim=1),
    "glu": lambda x: F.glu(x),
    "module": nn.Softmax(dim=1),
    "module glu": nn.GLU(1),
    "module log": nn.LogSoftmax(dim=-1),
    "diff": lambda x: x.diff(dim=-1),
    "diff 1": lambda x: torch.diff(x, n=2, dim=1),
    "roll": lambda x: x.roll(1, 1),
    "roll two": lambda x: torch.roll(x, (1, 2), (1, 2)),
    "roll all": lambda x: torch.roll(x, 2),
    "flip": lambda x: x.flip(-1),
    "flip two": lambda x: torch.flip(x, (1, 2)),
    "fliplr": lambda x: x.fliplr(),
    "flipud": lambda x: x.flipud(),
    "rot90": lambda x: torch.rot90(x, 1, (1, 2)),
    "interleave": lambda x: x.repeat_interleave(2, dim=1),
    "interleave -1": lambda x: torch.repeat_interleave(x, 3, -1),
    "interleave all": lambda x: torch.repeat_interleave(x.sum(0), 2),
    "windows": lambda x: x.unfold(2, 3, 1),
    "windows 1": lambda x: x.unfold(1, 2, 2),
    "windows -1": lambda x: x.unfold(dimension=-1, size=4, step=2).contiguous().flatten(2),
    "tril": lambda x: x.tril(),
    "triu": lambda x: torch.triu(x, 1),
    "diagonal": lambda x: x.diagonal(0, 1, 2),
    "diagonal -": lambda x: torch.diagonal(x, dim1=-2, dim2=-1),
    "diag_embed": lambda x: torch.diag_embed(x),
}
SHAPES: Ops = {
    "view": lambda x: x.view(x.shape[0], -1),
    "rows": lambda x: x.reshape(-1, 6),
    "view 4": lambda x: x.view(x.size(0), 2, 2, 6),
    "reshape": lambda x: x.reshape(-1, 6, 4),
    "permute": lambda x: x.permute(0, 2, 1),
    "mT": lambda x: x.mT,
    "flatten": lambda x: x.flatten(1),
    "flatten 0": lambda x: x.flatten(0, 1).unflatten(0, (-1, 4)),
    "Flatten": nn.Flatten(),
    "Unflatten": nn.Unflatten(1, (2, 2)),
    "unsqueeze": lambda x: x.unsqueeze(-1) * 2,
    "squeeze": lambda x: x[:, :1].squeeze(1),
    "expand": lambda x: x[:, :1].expand(-1, 5, -1),
    "expand_as": lambda x: x[:, :1].expand_as(x),
    "expand new": lambda x: x.unsqueeze(1).expand(-1, 3, -1, -1),
    "repeat": lambda x: x.repeat(1, 2, 1),
    "repeat 4": lambda x: x.repeat(2, 1, 1, 1),
    "tile": lambda x: x.tile(1, 1, 2),
    "tile 1": lambda x: torch.tile(x, (2,)),
    "tile 4": lambda x: x.tile((2, 1, 1, 1)),
    "cat": lambda x: torch.cat([x, x * 2], -1),
    "stack": lambda x: torch.stack([x, x.sin()], 1),
    "split": lambda x: sum(x.split(2, dim=1)),
    "swapdims": lambda x: x.swapdims(-1, -2),
    "chunk": lambda x: torch.cat(list(reversed(x.chunk(2, -1))), -1),
    "unbind": lambda x: sum(a * k for k, a in enumerate(x.unbind(1))),
    "tensor_split": lambda x: x.tensor_split(3, dim=-1)[1],
    "movedim": lambda x: x.movedim(1, -1),
    "moveaxis": lambda x: torch.moveaxis(x, -1, 1),
    "narrow": lambda x: x.narrow(1, 1, 2),
    "step": lambda x: x[:, ::2],
    "last": lambda x: x[:, -1],
    "ravel": lambda x: x.ravel().view(-1, 6),
    "broadcast_to": lambda x: torch.broadcast_to(x[:, :1], x.shape),
    "view_as": lambda x: x.view_as(x * 2),
    "reshape_as": lambda x: x.transpose(1, 2).reshape_as(x),
    "hstack": lambda x: torch.hstack([x, x]),
    "vstack": lambda x: torch.vstack([x, x * 2]),
    "dstack": lambda x: torch.dstack([x, x]),
    "column_stack": lambda x: torch.column_stack([x, x]),
    "concat": lambda x: torch.concat((x, x), dim=1),
    "contiguous": lambda x: x.transpose(1, 2).contiguous().view(x.shape[0], -1),
    "adjoint": lambda x: x.adjoint(),
    "T": lambda x: x.sum(1).T.T,
    "new_zeros": lambda x: torch.cat([x, x.new_zeros(x.shape[0], 2, 6)], 1),
    "zeros_like": lambda x: torch.cat([x, torch.zeros_like(x)], 1),
    "zeros": lambda x: torch.cat([x, torch.zeros(x.shape[0], 1, 6, dtype=x.dtype)], 1),
    "ones": lambda x: x + torch.ones(6, dtype=x.dtype),
    "arange": lambda x: x * torch.arange(6, dtype=x.dtype),
    "eye": lambda x: x[..., :4] + torch.eye(4, dtype=x.dtype),
}
POINTWISE: Ops = {
    "where": lambda x: torch.where(x > 0, x, 2 * x),
    "where number": lambda x: torch.where(x > 0, x, 0.0),
    "maximum": lambda x: torch.maximum(x, -x),
    "x.where": lambda x: x.where(x > 0, torch.zeros_like(x)),
    "where tensor": lambda x: torch.where(x > 0, x, torch.tensor(0.5)),
    "masked_fill": lambda x: x.masked_fill(x < 0, -1e9).softmax(-1),
    "causal": lambda x: x.masked_fill(torch.ones(4, 6).tril() == 0, -1.0),
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "clamp min": lambda x: x.clamp(min=0),
    "clamp to mean": lambda x: torch.clamp(x, min=x.mean(-1, True)),
    "lerp": lambda x: torch.lerp(x, x * 2, 0.3),
    "lerp tensor": lambda x: torch.lerp(x, x * 2, x.sigmoid()),
    "max of two": lambda x: torch.max(x, x * 0.5),
    "addcmul": lambda x: torch.addcmul(x, x, x, value=0.5),
    "addcdiv": lambda x: torch.addcdiv(x, x, x * x + 1),
    "min of two": lambda x: x.min(x * x),
    "eq": lambda x: x == x,
    "gt": lambda x: (x > 0.1).double() * x,
    "logical": lambda x: (x > 0) & (x < 1) | ~(x < 2),
    "remainder": lambda x: x % 0.7,
    "isclose": lambda x: torch.isclose(x, x.round(), atol=0.2),
    "long": lambda x: (3 * x).long(),
    "int": lambda x: (3 * x).int(),
    "bool": lambda x: x.relu().bool(),
    "type_as": lambda x: (x > 0).type_as(x),
    "to": lambda x: (x > 0).to(x),
    "to dtype": lambda x: x.to(torch.float32),
    "threshold": lambda x: F.threshold(x, 0.1, 20.0),
    "rrelu": lambda x: F.rrelu(x),
    "expit": lambda x: torch.special.expit(x),
    "times tensor": lambda x: x * torch.tensor(2.0),
    "times int tensor": lambda x: x * torch.tensor(3),
    "xlogy": lambda x: torch.special.xlogy(x, x * x + 1),
    "bucketize": lambda x: torch.bucketize(x, torch.tensor([-0.5, 0.0, 0.5], dtype=x.dtype)),
    "hypot": lambda x: torch.hypot(x, x + 1),
    "searchsorted": lambda x: torch.searchsorted(torch.tensor([-0.5, 0.0, 0.5], dtype=x.dtype), x),
    "rounding": lambda x: torch.div(x, 0.3, rounding_mode="floor"),
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "softplus": lambda x: F.softplus(x, beta=2),
    "rsub": lambda x: 1 - x,
    "power": lambda x: 2**x,
    "scale of all": lambda x: x / x.std(),
    "standardized": lambda x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-5).sqrt(),
    "mse": lambda x: F.mse_loss(x, x * 2),
    "mse none": lambda x: F.mse_loss(x, x * 2, reduction="none"),
    "l1": lambda x: F.l1_loss(x, x.flip(1), reduction="sum"),
    "huber": lambda x: F.huber_loss(x, x * 2, delta=0.3),
    "smooth": lambda x: F.smooth_l1_loss(x, x * 2, reduction="none"),
    "bce": lambda x: F.binary_cross_entropy(x.sigmoid(), (2 * x).sigmoid()),
    "logits": lambda x: F.binary_cross_entropy_with_logits(x, (2 * x).sigmoid()),
}
FAMILIES: dict[str, Any] = {"along": ALONG, "shapes": SHAPES, "pointwise": POINTWISE}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_small_ops(family: str, layout: str) -> None:
    assert_ops_fuse(FAMILIES[family], (4, 6), layout, random_in_train=family == "pointwise")


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.float16])
@pytest.mark.parametrize("name", ["minimum", "add", "div", "pow", "lt", "atan2"])
def test_numbers_of_another_dtype_in_plain_attributes_promote_as_in_the_loop(name, dtype):
    """A zero-dimensional tensor counts less in type promotion than the packed numbers would."""

    class Knots(nn.Module):
        def __init__(self):
            super().__init__()
            self.nets = nn.ModuleList(nn.Linear(2, 3) for _ in range(4))
            self.knots = [torch.tensor(i % 3 + 1).to(dtype) for i in range(4)]

        def forward(self, x):
            combine = getattr(torch, name)
            return torch.stack([combine(self.nets[i](x[:, i : i + 2]), self.knots[i]) for i in range(4)])

    model, x = Knots(), torch.rand(5, 6)
    fused = fxfuse.optimize(model, x, objective="launches", tune=False)
    assert fxfuse.report(fused).fused
    assert not fxfuse.report(fused).refused
    got, want = fused(x), model(x)
    assert got.dtype is want.dtype
    torch.testing.assert_close(got, want, equal_nan=True)


CASTS = {
    "dtype": lambda y: y.to(torch.float64, memory_format=torch.contiguous_format),
    "all by place": lambda y: y.to(torch.float64, False, True, memory_format=torch.preserve_format),
    "all by name": lambda y: y.to(dtype=torch.float64, memory_format=torch.contiguous_format),
    "device and dtype": lambda y: y.to("cpu", torch.float64, memory_format=torch.contiguous_format),
    "as another tensor": lambda y: y.to(y, memory_format=torch.contiguous_format),
    "clone": lambda y: y.clone(memory_format=torch.contiguous_format),
    "contiguous": lambda y: y.contiguous(memory_format=torch.contiguous_format),
}


@pytest.mark.parametrize("spelling", CASTS)
def test_memory_formats(spelling: str) -> None:
    """``Tensor.to`` takes it by name only, other than its schema says; in lanes and between two loops."""
    cast = CASTS[spelling]

    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.cat([net(cast(x[:, i : i + 1])) for i, net in enumerate(self.first)], 1)
        return torch.cat([net(cast(x)[:, i : i + 1]) for i, net in enumerate(self.second)], 1)

    model = model_of(forward, first=nn.ModuleList(mlp() for _ in range(4)), second=nn.ModuleList(mlp() for _ in range(4)))
    assert_fused_equals(randomized(model), randn(5, 4), heavy=4, **QUICK)


@pytest.mark.parametrize("how", ["to", "contiguous"])
def test_channels_last_in_lanes(how: str) -> None:
    """Fused or left as it is: in any case without a failure, and with equal numbers."""
    def forward(self: Any, x: Tensor) -> Tensor:
        def given(y: Tensor) -> Tensor:
            last = torch.channels_last
            return y.to(torch.float64, memory_format=last) if how == "to" else y.contiguous(memory_format=last)

        return torch.cat([net(given(x[:, 2 * i : 2 * i + 2])) for i, net in enumerate(self.nets)], 1)

    model = randomized(model_of(forward, nets=nn.ModuleList(nn.Conv2d(2, 3, 3) for _ in range(3))))
    x = randn(2, 6, 5, 5)
    fused = fxfuse.optimize(model, x, objective="launches", **QUICK)
    assert "fxfuse failed" not in str(fxfuse.report(fused))
    assert_equal_models(model, fused, [(x, {}), (randn(3, 6, 7, 7, seed=2), {})])
