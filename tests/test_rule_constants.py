"""What differs from lane to lane besides weights: numbers, small tensors, indices, masks; and lanes of integers and complex numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checks
import fxfuse

LANES = 5
SCALES = [0.1, 2.0, 0.5, 0.5, -3.0]
POWERS = [1, 2, 3, 0.5, 2]
NUMPY = np.linspace(0.1, 0.9, LANES)
NUMPY32 = NUMPY.astype(np.float32)


class Lanes(nn.Module):
    """A Linear, something that differs, a Linear."""

    def __init__(self, between: Callable[[Tensor, int], Tensor], width: int = 4) -> None:
        super().__init__()
        self.first = nn.ModuleList(nn.Linear(3, width) for _ in range(LANES))
        self.last = nn.ModuleList(nn.Linear(width, 2) for _ in range(LANES))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for i in range(LANES):
            outputs.append(self.last[i](self.between(self.first[i](x), i)))
        return torch.stack(outputs, 1)


def assert_lanes(between: Callable[[Tensor, int], Tensor], **options: Any) -> nn.Module:
    """The whole loop is two Linears, whatever is between them."""
    return checks.assert_fused_equals(checks.randomized(Lanes(between)), checks.randn(4, 3), most_heavy=2, **checks.QUICK, **options)


NUMBERS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "scale": lambda y, i: y * SCALES[i],
    "scale from the left": lambda y, i: SCALES[i] * y,
    "whole numbers": lambda y, i: y / (i + 1),
    "zero is a lane too": lambda y, i: y + i,
    "numbers of both kinds": lambda y, i: y - POWERS[i],
    "from the other side": lambda y, i: SCALES[i] - y,
    "reciprocal": lambda y, i: SCALES[i] / (y * y + 1),
    "power": lambda y, i: (y * y + 1) ** POWERS[i],
    "power of a number": lambda y, i: (i + 1.5) ** y,
    "remainder": lambda y, i: torch.remainder(y, SCALES[i]),
    "clamp below": lambda y, i: y.clamp(min=-0.1 * i),
    "clamp to a window": lambda y, i: torch.clamp(y, -i, 0.5),
    "threshold": lambda y, i: torch.where(y > 0.1 * i, y, y * 0.3),
    "a mask of its own": lambda y, i: y.masked_fill(y < 0.1 * i, SCALES[i]),
    "the same mask, other numbers": lambda y, i: torch.where(y > 0, y, SCALES[i]),
    "lerp": lambda y, i: torch.lerp(y, y.tanh(), 0.1 * i),
    "numbers of numpy": lambda y, i: y * NUMPY[i] + NUMPY32[i],
    "two of them on one line": lambda y, i: y * SCALES[i] + (y * 2).tanh() * POWERS[i],
    "one after another": lambda y, i: ((y * SCALES[i]).tanh() / (i + 1) + i) * POWERS[i],
    "the same in all": lambda y, i: y * 2 - y * 3,
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(name: str) -> None:
    assert_lanes(NUMBERS[name], batches=(7,))


def test_numbers_on_one_shared_input() -> None:
    class Bands(nn.Module):
        """Fourier features of one input, a network per band."""

        def __init__(self) -> None:
            super().__init__()
            self.nets = nn.ModuleList(nn.Linear(6, 2) for _ in range(LANES))

        def forward(self, x: Tensor) -> Tensor:
            return sum(net(torch.cat([torch.sin(x * 2.0**k), torch.cos(x * 2.0**k)], -1)) for k, net in enumerate(self.nets))

    checks.assert_fused_equals(checks.randomized(Bands()), checks.randn(4, 3), most_heavy=1)


def test_numbers_survive_other_dtypes() -> None:
    model = Lanes(NUMBERS["scale"])
    fused = fxfuse.optimize(model, torch.randn(4, 3), objective="launches", strict=True)
    assert fxfuse.report(fused).validation is not None
    x = checks.randn(6, 3)
    wide = fused.double().half().double()
    same = model.double().half().double()
    checks.assert_close(wide(x).detach(), same(x).detach(), "after .double().half().double()")


def test_numbers_of_other_lines_are_other_lanes() -> None:
    class Unrolled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(3, 3) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            a = self.a(x[:, 0]) * 2
            b = self.b(x[:, 1]) * 2
            c = self.c(x[:, 2]) * 3
            return torch.cat([a, b, c], 1)

    fused = checks.assert_fused_equals(checks.randomized(Unrolled()), checks.randn(4, 3, 3), most_heavy=1)
    assert [(op.op, op.lanes) for op in fxfuse.report(fused).fused[0].ops] == [("linear", 3), ("mul", 2)]


def test_hashes_into_tables_of_unequal_size() -> None:
    class Hashed(nn.Module):
        sizes = (7, 11, 5, 13, 6)
        primes = (31, 43, 59, 61, 73)

        def __init__(self) -> None:
            super().__init__()
            self.tables = nn.ModuleList(nn.Embedding(size, 3) for size in self.sizes)

        def forward(self, ids: Tensor) -> Tensor:
            found = [table((ids * p + 1) % n) for table, p, n in zip(self.tables, self.primes, self.sizes, strict=True)]
            return torch.cat(found, -1)

    fused = checks.assert_fused_equals(checks.randomized(Hashed()), torch.randint(-99, 99, (4, 6)), most_heavy=1)
    assert "masked_fill" not in fxfuse.graph(fused)[""].code  # a remainder is inside of its table


class Tensors(nn.Module):
    """Small tensors that differ: elements of a Parameter, Parameters, buffers saved and not, plain tensors, made in forward."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.nets = nn.ModuleList(nn.Linear(3, 4) for _ in range(LANES))
        self.elements = nn.Parameter(torch.randn(LANES))
        self.rows = nn.Parameter(torch.randn(LANES, 4))
        self.single = nn.ParameterList(nn.Parameter(torch.randn(())) for _ in range(LANES))
        self.plain = [checks.randn(1, seed=20 + i)[0] for i in range(LANES)]
        for i in range(LANES):
            self.register_buffer(f"saved_{i}", torch.randn(4))
            self.register_buffer(f"temperature_{i}", torch.randn(()))
            if kind == "unsaved":
                self.register_buffer(f"unsaved_{i}", checks.randn(4, seed=30 + i), persistent=False)

    def scale(self, i: int) -> Tensor:
        if self.kind == "elements":
            return self.elements[i]
        if self.kind == "rows":
            return self.rows[i]
        if self.kind == "single":
            return self.single[i]
        if self.kind == "plain":
            return self.plain[i]
        if self.kind == "made":
            return torch.tensor(SCALES[i], dtype=torch.float64)
        return getattr(self, f"{self.kind}_{i}")

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([net(x) * self.scale(i) for i, net in enumerate(self.nets)])


@pytest.mark.parametrize("kind", ["elements", "rows", "single", "plain", "made", "saved", "temperature", "unsaved"])
def test_small_tensors(kind: str) -> None:
    model, x = checks.randomized(Tensors(kind)), checks.randn(4, 3)
    if kind == "unsaved":  # a checkpoint does not carry them
        fused = fxfuse.optimize(model, x, objective="launches", strict=True)
        assert fxfuse.report(fused).fused
        checks.assert_equal_models(model, fused, [((checks.randn(7, 3),), {})])
    else:
        checks.assert_fused_equals(model, x, most_heavy=1, batches=(7,), **checks.QUICK)


# -- indices and masks -------------------------------------------------------------------------------------------------------------------


class Indexed(nn.Module):
    """Lanes that index: their own values or a shared tensor, by their own indices or shared ones."""

    def __init__(self, index: Callable[[Indexed, Tensor, int], Tensor]) -> None:
        super().__init__()
        self.index = index
        self.nets = nn.ModuleList(nn.Linear(3, 6) for _ in range(LANES))
        self.table = nn.Parameter(torch.randn(7, 6))
        generator = torch.Generator().manual_seed(5)
        for i in range(LANES):
            self.register_buffer(f"order_{i}", torch.randperm(6, generator=generator))
            self.register_buffer(f"rows_{i}", torch.randint(-7, 7, (2, 3), generator=generator))
            self.register_buffer(f"mask_{i}", torch.rand(6, generator=generator) > 0.5)
        self.register_buffer("shared_order", torch.tensor([3, -1, 0]))
        self.register_buffer("places", torch.randint(4, (LANES, 4, 6), generator=generator))

    def own(self, name: str, i: int) -> Tensor:
        return getattr(self, f"{name}_{i}")

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.index(self, net(x), i) for i, net in enumerate(self.nets)], 1)


INDEXING: dict[str, Callable[[Indexed, Tensor, int], Tensor]] = {
    "own columns": lambda m, y, i: y[..., m.own("order", i)],
    "own columns, spelled out": lambda m, y, i: y[:, :, m.own("order", i)],
    "shared columns": lambda m, y, i: y[..., m.shared_order],
    "own rows": lambda m, y, i: y.transpose(0, 2)[m.own("order", i)],
    "rows of a shared table": lambda m, y, i: y.sum() * m.table[m.own("rows", i)],
    "columns of a shared table": lambda m, y, i: y.sum() * m.table[:, m.own("order", i) - 1],
    "two indices": lambda m, y, i: y[:, m.shared_order, m.own("order", i)[:3]],
    "two indices apart": lambda m, y, i: y[m.shared_order, :, m.own("order", i)[:3]],
    "two shared indices apart": lambda m, y, i: y[m.shared_order, :, m.shared_order],
    "a number between": lambda m, y, i: y[:, 0, m.own("order", i)],
    "a new dim before": lambda m, y, i: y[None, :, 1:3, m.own("order", i)],
    "a matrix of indices": lambda m, y, i: y[:, :, m.own("rows", i) % 6],
    "shared table, indices apart": lambda m, y, i: y.sum() * m.table.expand(3, 7, 6)[m.shared_order - 1, :, m.own("order", i)[:3]],
    "index_select": lambda m, y, i: y.index_select(2, m.own("order", i)),
    "index_select in the middle": lambda m, y, i: y.index_select(1, m.own("order", i) % 4),
    "index_select shared": lambda m, y, i: torch.index_select(y, 1, m.shared_order % 4),
    "index_select of a shared table": lambda m, y, i: y.sum() * m.table.index_select(0, m.own("order", i)),
    "gather": lambda m, y, i: y.gather(1, m.places[i].expand(y.shape[0], 4, 6)),
    "gather, index from the lane": lambda m, y, i: torch.gather(y, -1, y.argsort(-1)),
    "take_along_dim": lambda m, y, i: torch.take_along_dim(y, y.argsort(1), 1),
    "one_hot": lambda m, y, i: y * F.one_hot(m.own("order", i), 6).sum(0),
    "mask": lambda m, y, i: y * m.own("mask", i),
    "masked_fill": lambda m, y, i: y.masked_fill(m.own("mask", i), -1.0),
    "masked_fill, a number each": lambda m, y, i: y.masked_fill(m.own("mask", i), SCALES[i]),
    "masked_fill of a tensor each": lambda m, y, i: y.masked_fill(m.own("mask", i), m.table[i, 0].detach()),
    "where": lambda m, y, i: torch.where(m.own("mask", i), y, m.table[i]),
    "where of ints": lambda m, y, i: y * torch.where(m.own("mask", i), i + 1, m.own("order", i)),
    "bool arithmetic": lambda m, y, i: y * (m.own("mask", i) & (y > 0) | ~m.own("mask", i)).int(),
}


@pytest.mark.parametrize("name", INDEXING)
def test_indexing(name: str) -> None:
    apart = name in ("two indices apart", "two shared indices apart")
    model = checks.randomized(Indexed(INDEXING[name]))
    x = checks.randn(4, 4, 3)
    if name.startswith(("own rows", "two indices apart", "two shared")):
        checks.assert_fused_equals(model, x, batches=(6,), most_heavy=1, specialised=apart, **checks.QUICK)
    else:
        checks.assert_fused_equals(model, x, batches=(6,), most_heavy=1, **checks.QUICK)


@pytest.mark.parametrize("name", ["own columns", "rows of a shared table", "index_select", "gather", "one_hot"])
def test_an_index_out_of_range_raises(name: str) -> None:
    model = checks.randomized(Indexed(INDEXING[name]))
    x = checks.randn(4, 4, 3)
    fused = fxfuse.optimize(model, x, objective="launches", strict=True, **checks.QUICK)
    assert fxfuse.report(fused).fused
    for each in (model, fused):
        with torch.no_grad():
            for buffer in ("order_2", "rows_2"):
                getattr(each, buffer).view(-1)[1] = 8
            each.places[2, 1] = 8
        with pytest.raises((IndexError, RuntimeError)):
            each(x)


# -- bilinear ------------------------------------------------------------------------------------------------------------------------------


class Pairs(nn.Module):
    """FiBiNET: a bilinear map for each pair of fields."""

    def __init__(self, outputs: int, bias: bool = True) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Bilinear(3, 3, outputs, bias=bias) for _ in range(10))
        self.pairs = [(i, j) for i in range(5) for j in range(i + 1, 5)]

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x[:, i], x[:, j]) for layer, (i, j) in zip(self.maps, self.pairs, strict=True)], 1)


class OneBilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Bilinear(3, 3, 2)
        self.nets = nn.ModuleList(nn.Linear(3, 3) for _ in range(4))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.map(net(x), x) for net in self.nets]


@pytest.mark.parametrize(("outputs", "bias"), [(1, True), (2, False), (5, True), (5, False)])
@pytest.mark.parametrize("shape", [(4, 5, 3), (4, 5, 2, 4, 3)])
def test_bilinear(outputs: int, bias: bool, shape: tuple[int, ...]) -> None:
    fused = checks.assert_fused_equals(checks.randomized(Pairs(outputs, bias)), checks.randn(*shape), batches=(1,), **checks.QUICK)
    assert ("bilinear", 10) in [(op.op, op.lanes) for op in fxfuse.report(fused).fused[0].ops]


def test_one_bilinear_for_all_lanes() -> None:
    checks.assert_fused_equals(checks.randomized(OneBilinear()), checks.randn(4, 3))


# -- other dtypes --------------------------------------------------------------------------------------------------------------------------


def complex_parameters(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.complex128)
    return model


class Spectral(nn.Module):
    """FITS: a complex Linear per channel, written into a complex buffer."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.upsampler = nn.ModuleList(nn.Linear(5, 7, dtype=torch.cfloat) for _ in range(channels))

    def forward(self, real: Tensor, imag: Tensor) -> Tensor:
        low = torch.complex(real, imag)
        high = torch.zeros(low.shape[0], 7, low.shape[2], dtype=low.dtype)
        for i in range(low.shape[2]):
            high[:, :, i] = self.upsampler[i](low[:, :, i])
        return high


class ComplexLanes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Linear(3, 3, dtype=torch.cfloat) for _ in range(3))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        parts = []
        for i, net in enumerate(self.nets):
            z = net(torch.complex(x[:, i], y[:, i]))
            parts.append(torch.cat([z.real * 2, z.imag, z.abs(), z.angle(), (z * z.conj()).real], -1))
        return torch.stack(parts, 1)


@pytest.mark.parametrize(("kind", "shape"), [(Spectral, (4, 5, 4)), (ComplexLanes, (4, 3, 3))])
def test_complex_lanes(kind: type[nn.Module], shape: tuple[int, ...]) -> None:
    model = complex_parameters(kind())
    x = (checks.randn(*shape), checks.randn(*shape, seed=2))
    fused = fxfuse.optimize(model, x, objective="launches", strict=True)
    report = fxfuse.report(fused)
    assert report.fused, str(report)
    assert fxfuse.launches.count(lambda: fused(*x)).heavy == 1
    for rows in (1, 6):
        args = tuple(checks.randn(rows, *shape[1:], seed=7 + k).requires_grad_() for k in range(2))
        results = []
        for each in (model, fused):
            each.zero_grad()
            out = torch.view_as_real(each(*args)) if kind is Spectral else each(*args)
            (out * checks.randn(*out.shape, seed=9)).sum().backward()
            grads = fxfuse.weights.packing.original_gradients(each)
            results.append([out.detach(), *(args[k].grad for k in range(2)), *(torch.view_as_real(grads[n]) for n in grads)])
            for arg in args:
                arg.grad = None
        for k, (got, want) in enumerate(zip(results[1], results[0], strict=True)):
            checks.assert_close(got, want, f"tensor {k}")


def test_integer_lanes() -> None:
    class Votes(nn.Module):
        """Networks whose arg max is counted: integers and bools leave the lanes."""

        def __init__(self) -> None:
            super().__init__()
            self.nets = nn.ModuleList(nn.Linear(3, 4) for _ in range(LANES))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            scores = [net(x) for net in self.nets]
            bins = torch.stack([(s * 10).long() // (i + 2) + (s > 0).int() * i for i, s in enumerate(scores)])
            return torch.stack(scores), bins, torch.stack([(s > 0.1 * i) ^ (s > 1) for i, s in enumerate(scores)])

    checks.assert_fused_equals(checks.randomized(Votes()), checks.randn(4, 3), most_heavy=1)
