"""What a fused model returns is the caller's, as what the original returned: it may be written to, viewed, and has the same strides."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxfuse
from checks import QUICK, assert_close, model_of, randn, randomized

LAST = {
    "relu": F.relu, "softmax": lambda y: y.softmax(-1), "gelu": F.gelu, "product": lambda y: y * 2,
}  # fmt: skip
JOINS = {
    "stack": lambda ys: torch.stack(ys, 1), "stack first": lambda ys: torch.stack(ys), "cat": lambda ys: torch.cat(ys, 1),
    "view": lambda ys: torch.cat(ys, 1).unsqueeze(1), "two": lambda ys: (torch.stack(ys, 1), torch.stack(ys[::-1], 1)),
    "with a lane": lambda ys: [torch.stack(ys, 1), ys[1]], "prod": lambda ys: ys[0] * ys[1],
    "maximum": lambda ys: torch.maximum(ys[0], ys[1]), "part of a stack": lambda ys: torch.stack(ys, 1)[:, :, :1],
    "part of a cat": lambda ys: torch.cat(ys, 1)[:, 1:], "column": lambda ys: torch.stack(ys)[:, :, 1],
    "parts": lambda ys: (lambda z: [z[:, 0], z[:, 2]])(torch.stack(ys, 1)),
}  # fmt: skip


def linears(forward, inputs, outputs, lanes=3):
    return randomized(model_of(forward, nets=nn.ModuleList(nn.Linear(inputs, outputs) for _ in range(lanes))))


def written(model, x, index):
    """Outputs and gradients where the caller writes into one of the outputs."""
    x = x.clone().requires_grad_()
    out = model(x)
    out = list(out) if isinstance(out, (list, tuple)) else [out]
    out[index % len(out)].mul_(0.5)
    sum((o * torch.arange(o.numel()).view_as(o)).sum() for o in out).backward()
    return [o.detach() for o in out], x.grad


@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("last", LAST)
def test_the_caller_may_write_into_a_join(last, join):
    function, joined = LAST[last], JOINS[join]
    model = linears(lambda self, x: joined([function(net(x[:, i])) for i, net in enumerate(self.nets)]), 3, 2)
    x = randn(4, 3, 3)
    fused = fxfuse.optimize(model, x, objective="launches", **QUICK)
    assert fxfuse.report(fused).fused
    for rows in (1, 6):
        y = randn(rows, 3, 3, seed=rows)
        for index in (0,) if join == "with a lane" else (0, -1):  # a lane itself may be what its last op kept
            for got, want in zip(*(written(m, y, index)[0] for m in (fused, model)), strict=True):
                assert_close(got, want, "output")
            assert_close(written(fused, y, index)[1], written(model, y, index)[1], "gradient")


@pytest.mark.parametrize("last", [F.gelu, torch.tanh, lambda y: y * 2])
def test_a_join_lies_in_rows_whatever_the_strides_of_the_input(last):
    model = model_of(lambda self, x: torch.stack([last(part) for part in x.chunk(3, 1)], 1))
    fused = fxfuse.optimize(model, randn(4, 6), objective="launches", **QUICK)
    assert fxfuse.report(fused).fused
    for x in (randn(4, 6), randn(6, 4).t(), randn(4, 12)[:, ::2], randn(1, 6).expand(4, 6)):
        assert fused(x).is_contiguous()
        assert_close(fused(x).view(4, -1), model(x).view(4, -1), "output")


def test_an_interleaved_join_lies_in_rows():
    def forward(self, x):
        out = torch.ones(x.shape[0], 3, dtype=x.dtype)
        for i, net in enumerate(self.nets):
            out[:, i::3] = net(x[:, i : i + 1])
        return out

    model = linears(forward, 1, 1)
    fused = fxfuse.optimize(model, randn(5, 3), objective="launches", **QUICK)
    assert fxfuse.report(fused).fused
    assert fused(randn(5, 3)).stride() == (3, 1)


def test_of_one_row_the_strides_of_more_cannot_be_told():
    for joined in (lambda ys: torch.stack(ys, -1), lambda ys: torch.cat(ys, 1)):
        model = linears(lambda self, x, joined=joined: joined([net(x) for net in self.nets]), 2, 1, lanes=2)
        fused = fxfuse.optimize(model, randn(1, 2), objective="launches", **QUICK)
        assert fused(randn(7, 2)).stride() == model(randn(7, 2)).stride()


class Scaled(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor, self.dropout = factor, nn.Dropout(0.5)

    def forward(self, x):
        return torch.tanh(self.dropout(x) * self.factor)


class Unregistered(nn.Module):
    """Modules without weights in a plain list: ``train`` does not reach them, attributes of theirs are read."""

    def __init__(self, deep):
        super().__init__()
        plain = [Scaled(i + 1.0) for i in range(3)]
        self.plain = {"all": plain} if deep else plain
        self.nets = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))

    def lanes(self):
        return self.plain["all"] if isinstance(self.plain, dict) else self.plain

    def forward(self, x):
        return torch.stack([after(net(x)) for after, net in zip(self.lanes(), self.nets)])


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy])
def test_flags_and_attributes_of_modules_that_nobody_registers(deep, copied):
    model, x = randomized(Unregistered(deep)).eval(), randn(4, 2)
    for each in model.lanes():
        each.eval()
    fused = copied(fxfuse.optimize(model, x, objective="launches", **QUICK)).eval()
    assert fxfuse.report(fused).fused
    assert torch.allclose(fused(x), model(x), rtol=1e-12)
    assert not fxfuse.report(fused).fallbacks
    for each in (model, fused):
        each.lanes()[1].factor = 10.0
    assert torch.allclose(fused(x), model(x), rtol=1e-12)
    fused.lanes()[0].train()
    assert not torch.equal(fused(x), fused(x))  # its dropout draws


def test_a_parameter_that_shares_another_ones_memory_still_does():
    model, x = linears(lambda self, x: torch.stack([n(x) for n in self.nets]), 2, 2, lanes=4), randn(3, 2)
    model.nets[2].weight.data = model.nets[0].weight.data
    fused = fxfuse.optimize(model, x, objective="launches", **QUICK)
    assert fused.nets[2].weight.data_ptr() == fused.nets[0].weight.data_ptr() != model.nets[0].weight.data_ptr()
    for each in (model, fused):
        each(x).square().sum().backward()
        with torch.no_grad():
            for p in each.parameters():
                p -= 0.1 * p.grad
    assert torch.allclose(fused(x), model(x), rtol=1e-12)


@pytest.mark.parametrize("rows", [0, 1, 4])
def test_no_rows_through_the_grouped_convolution(rows):
    model = linears(lambda self, x: torch.stack([n(x) for n in self.nets]), 2, 2)
    fused = fxfuse.optimize(model, randn(4, 2), objective="launches", lowering="grouped_conv", **QUICK)
    assert_close(fused(randn(rows, 2)), model(randn(rows, 2)), "output")


def test_an_expanded_input_that_forward_would_write_to():
    def forward(self, x):
        x.data.mul_(1)  # raises
        return torch.stack([net(x) for net in self.nets])

    refused = fxfuse.report(fxfuse.optimize(linears(forward, 2, 2), randn(1, 2).expand(4, 2), **QUICK)).refused
    assert "more than one element of the written-to tensor" in str(refused[0])
    assert "please report" not in str(refused[0])


def test_equal_computations_are_two_tensors():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.nets = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))

        def forward(self, x):
            pooled = [[F.avg_pool1d(part, 2, 1) for part in x.unbind(1)] for _ in range(2)]
            total = x.sum(1)
            return pooled, [net(total) for net in self.nets], total, total

    torch.manual_seed(0)
    model, x = Twice().double(), torch.randn(4, 3, 2, dtype=torch.float64)
    fused = fxfuse.optimize(model, x, objective="launches", tune=False)
    assert fxfuse.report(fused).fused
    (first, second), _, total, again = fused(x)
    kept = [part.clone() for part in second]
    for part in first:
        part.zero_()
    assert all(torch.equal(a, b) for a, b in zip(kept, second))
    assert total is again or total.data_ptr() == again.data_ptr()  # one tensor given twice is one


AFTER = {
    "sort": lambda y: y.sort(1), "values": lambda y: y.sort(1).values, "topk": lambda y: y.topk(2, 1), "cummax": lambda y: y.cummax(1)[0],
    "frexp": torch.frexp, "zeros and": lambda y: torch.zeros_like(y) + y, "both": lambda y: (y, y + torch.zeros_like(y)),
    "aminmax": lambda y: y.aminmax(dim=1, keepdim=True), "split": lambda y: [part.exp() for part in y.split([1, 2], 1)],
}  # fmt: skip


@pytest.mark.parametrize("after", AFTER)
def test_what_follows_a_join_lies_as_it_did(after):
    """The join of columns is a view that lies the other way round, which many ops pass on."""
    model = linears(lambda self, x: AFTER[after](torch.cat([net(x) for net in self.nets], 1)), 6, 1)
    x = randn(5, 6)
    fused = fxfuse.optimize(model, x, objective="launches", strict=True)
    assert fxfuse.report(fused).fused, fxfuse.report(fused)
    pairs = list(zip(*(torch.utils._pytree.tree_leaves(each(x)) for each in (fused, model)), strict=True))
    assert [got.stride() for got, _ in pairs] == [want.stride() for _, want in pairs]
    for got, want in pairs:
        assert_close(got.double(), want.double(), after)
    memory = [{out.untyped_storage().data_ptr() for out in torch.utils._pytree.tree_leaves(each(x))} for each in (fused, model)]
    assert len(memory[0]) == len(memory[1]), "results share memory that did not"
    given = [x.clone().requires_grad_() for _ in range(2)]
    for each, start in zip((fused, model), given, strict=True):
        sum((out * torch.arange(out.numel()).view_as(out)).sum() for out in torch.utils._pytree.tree_leaves(each(start))).backward()
    assert_close(given[0].grad, given[1].grad, "gradient")


def written_part(ys, x):
    h = torch.cat(ys, 1)[:, :2]
    h += x[:, 0, :2]
    return h


def part_without_grad(ys, x):
    with torch.no_grad():
        return [y[:, :2] for y in ys]


PARTS = {
    "slices": lambda ys, x: [y[:, :2] for y in ys], "columns": lambda ys, x: [y.relu().unbind(-1)[0].unsqueeze(1) for y in ys],
    "written": written_part, "of a stack": lambda ys, x: torch.stack(ys, 1)[:, :, 1:3], "without grad": part_without_grad,
    "expanded": lambda ys, x: torch.cat(ys, 1).unsqueeze(1).expand(-1, 2, -1), "chunks": lambda ys, x: [y.chunk(2, 1)[0] for y in ys],
    "of a sum": lambda ys, x: sum(ys)[:, 1:], "every other": lambda ys, x: {"all": ys[0][:, ::2], "total": sum(ys).t()[1:]},
}  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_a_result_that_skips_memory_skips_as_much(part):
    model = linears(lambda self, x: PARTS[part]([net(x[:, i]) for i, net in enumerate(self.nets)], x), 3, 4)
    fused = fxfuse.optimize(model, randn(5, 3, 3), objective="launches", **QUICK)
    assert fxfuse.report(fused).fused
    for x in (randn(5, 3, 3), randn(7, 3, 3, seed=2)):
        pairs = list(zip(*(torch.utils._pytree.tree_leaves(each(x)) for each in (fused, model)), strict=True))
        assert [got.stride() for got, _ in pairs] == [want.stride() for _, want in pairs]
        for got, want in pairs:
            assert_close(got, want, part)
    assert not fxfuse.report(fused).fallbacks


def test_parts_of_what_is_computed_twice_are_of_two_tensors():
    def forward(self, x):
        twice = [[net(x[:, i]) for i, net in enumerate(self.nets)] for _ in range(2)]
        return twice[0][0][:, :2], twice[1][0][:, :2], twice[1][1], twice[0][1][:, 1:], torch.stack(twice[0])

    model, x = linears(forward, 3, 4), randn(4, 3, 3)
    fused = fxfuse.optimize(model, x, objective="launches", **QUICK)
    assert fxfuse.report(fused).fused
    assert len({out.untyped_storage().data_ptr() for out in fused(x)}) == 5


class Equal(nn.Module):
    """Results that are equal, and yet as many tensors; in eval mode dropout gives back what it got."""

    def __init__(self) -> None:
        super().__init__()
        self.drops = nn.ModuleList(nn.Dropout(0.2) for _ in range(3))
        self.nets = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        return torch.stack([net(x) for net in self.nets]), [drop(x * 1) for drop in self.drops]


def test_equal_results_are_tensors_of_their_own() -> None:
    model, x = Equal().double().eval(), torch.randn(2, 4, dtype=torch.float64)
    fused = fxfuse.optimize(model, x, objective="launches", validate=False)
    assert fxfuse.report(fused).fused
    with torch.no_grad():
        _, several = fused(x)
    for i, one in enumerate(several):
        one.fill_(7.0)
        assert all(torch.equal(other, x) for other in several[i + 1 :])


class WithInput(nn.Module):
    """Gives its input back through calls that copy it in some layouts, and in others do not."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.how = how

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.cat([net(x) for net in self.nets], 1)
        return y, x.contiguous() if self.how == "whole" else x.contiguous()[:, :2]


LAYOUTS = {
    "rows": lambda seed: randn(5, 6, seed=seed),
    "transposed": lambda seed: randn(6, 5, seed=seed).t(),
    "expanded": lambda seed: randn(1, 6, seed=seed).expand(5, 6),
    "gaps": lambda seed: randn(5, 12, seed=seed)[:, ::2],
}


@pytest.mark.parametrize("how", ["whole", "part"])
@pytest.mark.parametrize("recorded", LAYOUTS)
def test_an_input_that_is_returned_as_it_lies(recorded: str, how: str) -> None:
    model = randomized(WithInput(how)).double()
    fused = fxfuse.optimize(model, LAYOUTS[recorded](1), objective="launches", tune=False)
    assert fxfuse.report(fused).fused, fxfuse.report(fused)
    for name, made in LAYOUTS.items():
        found = []
        for each in (model, fused):
            x = made(2)
            with torch.no_grad():
                joined, returned = each(x)
                before = x.clone()
                returned.fill_(7.0) if name != "expanded" or not same_memory(returned, x) else None
            found.append((joined, returned.stride(), same_memory(returned, x), torch.equal(before, x)))
        assert found[0][1:] == found[1][1:], name
        assert_close(found[1][0], found[0][0], name)


def same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


class Turned(nn.Module):
    """Lanes joined, and one or all of them given back as a view."""

    def __init__(self, all_of_them: bool) -> None:
        super().__init__()
        layers = [nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)) for _ in range(4)]
        self.nets = nn.ModuleList(layers)
        self.all_of_them = all_of_them

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        ys = [net(x) for net in self.nets]
        return torch.cat(ys, -1), [y.t() for y in (ys if self.all_of_them else ys[:1])]


@pytest.mark.parametrize("all_of_them", [True, False])
def test_a_view_of_a_lane_may_be_written(all_of_them: bool) -> None:
    model, x = randomized(Turned(all_of_them)).double(), randn(5, 3)
    fused = fxfuse.optimize(model, x, objective="launches", tune=False)
    assert fxfuse.report(fused).fused, fxfuse.report(fused)
    results = []
    for each in (model, fused):
        joined, turned = each(x)
        for i, one in enumerate(turned):
            one.mul_(2.0 + i)
        sum(y.pow(2).sum() for y in (joined, *turned)).backward()
        results.append([joined, *turned])
    for got, want in zip(results[1], results[0], strict=True):
        assert got.stride() == want.stride()
        assert_close(got, want, "written")
    wanted = dict(model.named_parameters())
    for name, parameter in fxfuse.named_original_parameters(fused):
        assert_close(parameter.grad, wanted[name].grad, name)
