"""What a caller may do with results, as with the original's: view them, write into them, find inputs, weights, each other through them."""

from __future__ import annotations

import itertools
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hazards import Nets, X, fuse
from torch import Tensor, nn
from torch.autograd import forward_ad

import fxfuse
from checks import assert_close, assert_equal_models, model_of, own_gradients, randn, randomized
from fxfuse.private.pytree import tree_leaves
from fxfuse.weights import packing


def addresses(tensor: Tensor) -> set[int]:
    """Where every element lies in memory."""
    offsets = torch.zeros(tensor.shape, dtype=torch.int64)
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        offsets = offsets + (torch.arange(size) * stride).view([-1 if d == dim else 1 for d in range(tensor.dim())])
    return {tensor.data_ptr() + offset * tensor.element_size() for offset in offsets.flatten().tolist()}


def dense(tensor: Tensor) -> bool:
    """Does it fill its memory, in some order of its dims?"""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def overlaps(model: nn.Module, x: Tensor, out: Any) -> list[tuple[str, ...]]:
    """Which outputs share elements with each other, with the input, or with a weight (by the original's name)."""
    leaves = {f"output {i}": leaf.detach() for i, leaf in enumerate(tree_leaves(out)) if isinstance(leaf, Tensor)}
    others = {"input": x.detach(), **{name: t.detach() for name, t in named_weights(model).items()}}
    places = {name: addresses(tensor) for name, tensor in {**leaves, **others}.items()}
    pairs = [*itertools.combinations(leaves, 2), *itertools.product(leaves, others)]
    return [(one, other) for one, other in pairs if places[one] & places[other]]


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers as the lanes see them: of a fused model, views of packs."""
    found = {}
    for index in range(4):
        for layer in (0, 2, 4):
            for name in ("weight", "bias"):
                found[f"nets.{index}.{layer}.{name}"] = getattr(model.nets[index][layer], name)
    return {**found, "table": model.table, "scale": model.scale}


class Model(Nets):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(3, 4))
        self.register_buffer("scale", torch.ones(4))

    def outs(self, x: Tensor) -> list[Tensor]:
        return [net(x[:, i : i + 1]) for i, net in enumerate(self.nets)]


RESULTS = {
    "lanes": lambda self, x: self.outs(x),
    "one lane twice": lambda self, x: (lambda outs: [*outs, outs[0]])(self.outs(x)),
    "all and its pieces": lambda self, x: (lambda out: (out, out[:, :1], out[:, 2]))(torch.cat(self.outs(x), 1)),
    "a stack and its lanes": lambda self, x: (lambda out: (out, *out.unbind(0)))(torch.stack(self.outs(x))),
    "lanes and their stack": lambda self, x: (lambda outs: (outs, torch.stack(outs)))(self.outs(x)),
    "a view of all": lambda self, x: (lambda out: (out, out.view(-1)))(torch.cat(self.outs(x), 1)),
    "a view of a lane": lambda self, x: [(out, out.view(-1)) for out in self.outs(x)],
    "a transposed view": lambda self, x: (lambda out: (out, out.t()))(torch.cat(self.outs(x), 1)),
    "the same twice": lambda self, x: (lambda out: (out, out))(torch.cat(self.outs(x), 1)),
    "detached": lambda self, x: (lambda out: (out, out.detach()))(torch.cat(self.outs(x), 1)),
    "detached lanes": lambda self, x: [(out, out.detach()) for out in self.outs(x)],
    "cloned": lambda self, x: (lambda out: (out, out.clone()))(torch.cat(self.outs(x), 1)),
    "the input": lambda self, x: (x, torch.cat(self.outs(x), 1)),
    "a slice of the input": lambda self, x: (x[:, 1:3], torch.cat(self.outs(x), 1)),
    "columns of the input": lambda self, x: [(x[:, i : i + 1], out) for i, out in enumerate(self.outs(x))],
    "the input's view": lambda self, x: (x.view(-1), x.t(), torch.cat(self.outs(x), 1)),
    "the input, contiguous": lambda self, x: (x.contiguous(), x.reshape(-1), torch.cat(self.outs(x), 1)),
    "the input, cast to what it is": lambda self, x: (x.to(torch.float64), x.double(), x.type_as(x), torch.cat(self.outs(x), 1)),
    "the input, dropped": lambda self, x: (F.dropout(x, 0.5, False), nn.Identity()(x), torch.cat(self.outs(x), 1)),
    "the input, expanded": lambda self, x: (x[:, :1].expand(-1, 3), torch.cat(self.outs(x), 1)),
    "the input, broadcast": lambda self, x: (torch.broadcast_to(x, (2, *x.shape)), torch.cat(self.outs(x), 1)),
    "a parameter": lambda self, x: (self.table, torch.cat(self.outs(x), 1)),
    "a row of a parameter": lambda self, x: (self.table[1], self.table.t(), torch.cat(self.outs(x), 1)),
    "a buffer": lambda self, x: (self.scale, self.scale[1:], torch.cat(self.outs(x), 1)),
    "a lane's weight": lambda self, x: (self.nets[1][2].weight, torch.cat(self.outs(x), 1)),
    "a piece of each lane's weight": lambda self, x: [(net[2].weight[0], out) for net, out in zip(self.nets, self.outs(x), strict=True)],
    "expanded": lambda self, x: torch.cat(self.outs(x), 1)[:, :1].expand(-1, 4),
    "permuted": lambda self, x: torch.stack(self.outs(x)).permute(2, 0, 1),
    "strided": lambda self, x: torch.cat(self.outs(x), 1)[:, ::2],
    "a row of a stack": lambda self, x: torch.stack(self.outs(x))[1],
    "a diagonal": lambda self, x: (lambda out: (out, out.diagonal()))(torch.cat(self.outs(x), 1)),
    "halves": lambda self, x: torch.cat(self.outs(x), 1).chunk(2, 1),
    "split and joined": lambda self, x: (lambda parts: (*parts, torch.cat(parts, 1)))(torch.cat(self.outs(x), 1).split(1, 1)),
    "written": lambda self, x: (lambda out: (out, out.select(1, 0).fill_(0.5)))(torch.cat(self.outs(x), 1)),
    "real and imaginary": lambda self, x: (lambda z: (z, z.real, torch.view_as_real(z)))(
        torch.complex(*torch.cat(self.outs(x), 1).chunk(2, 1))
    ),
}  # fmt: skip


@pytest.fixture(params=RESULTS, scope="module")
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    model = randomized(type("Result", (Model,), {"forward": RESULTS[request.param]})())
    fused = fuse(model)
    assert fxfuse.report(fused).fused, fxfuse.report(fused)
    return model, fused


@pytest.mark.parametrize("rows", [5, 3])
def test_strides_and_overlaps(pair: tuple[nn.Module, nn.Module], rows: int) -> None:
    x = randn(rows, 4, seed=rows)
    with torch.no_grad():
        got, want = pair[1](x), pair[0](x)
    weights = set().union(*(addresses(tensor.detach()) for tensor in pair[0].parameters()))
    for index, (one, other) in enumerate(zip(tree_leaves(got), tree_leaves(want), strict=True)):
        if not addresses(other) & weights:  # a weight is a view of its pack, which may be stored in another order
            assert one.stride() == other.stride(), f"output {index}: {one.stride()}, the original's {other.stride()}"
        assert (one is x) == (other is x), f"output {index} is the input itself in one of them"
        assert_close(one, other, f"output {index}")
    assert overlaps(pair[1], x, got) == overlaps(pair[0], x, want)
    assert not fxfuse.report(pair[1]).fallbacks


@pytest.mark.parametrize("which", [0, 1, -1])
def test_a_write_into_a_result(pair: tuple[nn.Module, nn.Module], which: int) -> None:
    """What else it changes, it changes as in the original, and so does the backward after it."""
    seen = []
    for model in pair:
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        x = X.clone()
        outs = [leaf for leaf in tree_leaves(model(x)) if isinstance(leaf, Tensor)]
        outs = outs if which < len(outs) else outs[:1] * (which + 1)
        said = ""
        try:
            with torch.set_grad_enabled(not outs[which].is_leaf):
                outs[which].mul_(2.0)
            loss = sum((out.abs() * (i + 1)).sum() for i, out in enumerate(outs))
            model.zero_grad()
            loss.backward()
        except RuntimeError as error:  # "a view of a leaf Variable that requires grad is being used in an in-place operation"
            said = type(error).__name__
        gradients = own_gradients(model) if model is pair[0] else fxfuse.weights.packing.original_gradients(model)
        gradients = {name: None if grad is None else grad.clone() for name, grad in gradients.items()}
        state = {name: tensor.clone() for name, tensor in fxfuse.original_state_dict(model).items()}
        seen.append((said, x, [out.detach().clone() for out in outs], gradients, state))
        model.load_state_dict(weights)
    (said, x, outs, gradients, state), (said2, x2, outs2, gradients2, state2) = seen
    if said:  # written into a view of which torch allows no writes: a fused one may be a tensor of its own
        return
    assert not said2
    assert_close(x2, x, "the input")
    for index, (one, other) in enumerate(zip(outs2, outs, strict=True)):
        assert_close(one, other, f"output {index}")
    for name, grad in gradients.items():
        assert_close(gradients2[name], grad, name)
    for name, tensor in state.items():
        assert_close(state2[name], tensor, name)


def test_a_view_by_the_caller(pair: tuple[nn.Module, nn.Module]) -> None:
    with torch.no_grad():
        for want, got in zip(*(tree_leaves(model(X)) for model in pair), strict=True):
            try:
                viewed = want.view(-1)
            except RuntimeError:
                continue
            if not isinstance(want, nn.Parameter):
                assert_close(got.view(-1), viewed, "viewed")


def from_steps(self: Any, x: Tensor) -> tuple[Any, ...]:
    """A channel-independent forecaster: channels are rows of the batch."""
    y = x.transpose(1, 2).reshape(-1, 4)
    return [net(y[:, i : i + 1]) for i, net in enumerate(self.nets)], y, x.transpose(1, 2).contiguous()


def from_channels(self: Any, x: Tensor) -> tuple[Any, ...]:
    parts = x.unbind(1)
    return [net(part.contiguous()[:, :1]) for net, part in zip(self.nets, parts, strict=True)], [part.contiguous() for part in parts]


def from_flat(self: Any, x: Tensor) -> tuple[Any, ...]:
    y = x.permute(0, 2, 1).flatten(0, 1)
    return [net(y[:, i : i + 1]) for i, net in enumerate(self.nets)], x[:, 0].reshape(-1), x[:, 1].ravel(), y.reshape_as(y.t())


def computed(self: Any, x: Tensor) -> tuple[Any, ...]:
    h = torch.stack([net(x[:, i]) for i, net in enumerate(self.wide)], 1)
    return h, h.transpose(1, 2).reshape(-1, 4), h[:, 0].t().contiguous()


def computed_and_written(self: Any, x: Tensor) -> tuple[Any, ...]:
    h = torch.stack([net(x[:, i]) for i, net in enumerate(self.wide)], 1)
    y = h.transpose(1, 2).reshape(-1, 4)
    y.mul_(2.0)
    return h, y


def input_written(self: Any, x: Tensor) -> tuple[Any, ...]:
    y = x.transpose(1, 2).reshape(-1, 4)
    out = [net(y[:, i : i + 1]) for i, net in enumerate(self.nets)]
    y[:, 0] = 1.0
    return out, y


class Steps(Model):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.ModuleList(nn.Linear(3, 3) for _ in range(4))


def steps(rows: int, order: tuple[int, ...] = (0, 1, 2), gaps: bool = False) -> Tensor:
    """``[rows, 4, 3]``, whose dims lie in memory in this order."""
    shape = (rows, 4, 3 + gaps)
    x = randn(*(shape[d] for d in order), seed=rows).permute(*(order.index(d) for d in range(3)))
    return x[..., :3]


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("rows", [2, 1])
@pytest.mark.parametrize("forward", [from_steps, from_channels, from_flat, computed, computed_and_written, input_written])
def test_copies_that_are_views_of_one_row(forward: Any, rows: int, validate: bool) -> None:
    model = randomized(type("Copies", (Steps,), {"forward": forward})())
    fused = fxfuse.optimize(model, steps(rows), objective="launches", tune=False, validate=validate)
    if (forward, rows) == (input_written, 1):
        assert [r.reason for r in fxfuse.report(fused).refused] == ["writes into its input (__setitem__)"]
        return
    assert fxfuse.report(fused).fused, fxfuse.report(fused)
    turned = [(2, (0, 2, 1)), (1, (0, 2, 1)), (3, (1, 0, 2))]
    for given in [(2,), (1,), (5,), *turned, (2, (0, 1, 2), True)]:
        one, other = steps(*given), steps(*given)
        with torch.no_grad():
            want, got = model(one), fused(other)
        for index, (a, b) in enumerate(zip(tree_leaves(got), tree_leaves(want), strict=True)):
            assert_close(a, b, f"output {index}")
            if forward is not input_written:
                assert a.stride() == b.stride() or 1 in a.shape, f"output {index} of {given}: {a.stride()}, the original's {b.stride()}"
        assert_close(other, one, "the input after the call")
        assert overlaps(model, other, got) == overlaps(model, one, want), given
    fallbacks = fxfuse.report(fused).fallbacks
    if forward in (computed_and_written, input_written):
        assert any("in dim 0, recorded" in reason for reason in fallbacks), fallbacks
    if forward in (from_steps, from_channels, from_flat):
        assert not fallbacks


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.RNN(3, 2, batch_first=True) for _ in range(3))

    def forward(self, x: Tensor) -> Any:
        outs = [net(x)[0] for net in self.nets]
        return outs, torch.stack(outs, 1), outs[0] + x[..., :2].mT.contiguous().mT


@pytest.mark.parametrize("validate", [False, True])
def test_the_order_of_dims_after_an_example_of_one_row(validate: bool) -> None:
    model = randomized(Recurrent())
    fused = fxfuse.optimize(model, randn(1, 4, 3), objective="launches", tune=False, validate=validate)
    assert fxfuse.report(fused).fused, fxfuse.report(fused)
    for rows in (1, 2, 5):
        x = randn(rows, 4, 3, seed=rows)
        with torch.no_grad():
            want, got = model(x), fused(x)
        for index, (a, b) in enumerate(zip(tree_leaves(got), tree_leaves(want), strict=True)):
            assert_close(a, b, f"output {index}")
            assert a.stride() == b.stride() or rows == 1, f"output {index}: {a.stride()}, the original's {b.stride()}"
    assert not fxfuse.report(fused).fallbacks


class PartViewed(nn.Module):
    """A part of the joined lanes, viewed anew: ``view`` gives one row the strides of rows without gaps, which those of more have."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Linear(3, 2) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([net(x) for net in self.nets], 1)[:, :4]
        return h.view(h.size(0), -1)


@pytest.mark.parametrize("validate", [False, True])
def test_gaps_between_rows_after_an_example_of_one_row(validate: bool) -> None:
    model = randomized(PartViewed())
    fused = fxfuse.optimize(model, randn(1, 3), objective="launches", tune=False, validate=validate)
    assert fxfuse.report(fused).fused, fxfuse.report(fused)
    for rows in (1, 2, 5):
        x = randn(rows, 3, seed=rows)
        assert_close(fused(x), model(x), "output")
        assert fused(x).stride() == model(x).stride()
    assert not fxfuse.report(fused).fallbacks


class Attending(nn.Module):
    """What follows the layer has no weights: lanes that are frozen, and have no layer of the others' kind, share it with them."""

    def __init__(self, layers: bool) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Linear(4, 4) for _ in range(4)) if layers else [nn.Identity()] * 4

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        out = []
        for net, x in zip(self.nets, xs, strict=True):
            h = net(x)
            out.append(torch.softmax(h @ h.mT, -1) @ h)
        return out


@pytest.mark.parametrize("validate", [False, True])
@pytest.mark.parametrize("layers", [True, False])
def test_a_result_needs_a_gradient_where_the_original_s_does(layers: bool, validate: bool) -> None:
    model = randomized(Attending(layers))
    for net in list(model.nets)[1:3]:
        net.requires_grad_(False)

    def given(*tracked: int) -> list[Tensor]:
        return [randn(3, 4, seed=i).requires_grad_(i in tracked) for i in range(4)]

    fused = fxfuse.optimize(model, (given(),), objective="launches", tune=False, validate=validate)
    assert fxfuse.report(fused).fused
    for mode in (True, False):
        for tracked in ((), (2,), (0, 1), (0, 1, 2, 3)):
            want, got = model.train(mode)(given(*tracked)), fused.train(mode)(given(*tracked))
            assert [t.requires_grad for t in got] == [t.requires_grad for t in want], tracked
            for lane, (a, b) in enumerate(zip(got, want, strict=True)):
                assert_close(a, b, f"lane {lane}")
    with torch.no_grad():
        assert not any(t.requires_grad for t in fused(given(0)))
    again = pickle.loads(pickle.dumps(fused))
    assert [t.requires_grad for t in again(given(2))] == [t.requires_grad for t in model(given(2))]
    assert not fxfuse.report(fused).fallbacks


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is")  # torch's own, for derivatives in forward mode
def test_a_frozen_lane_s_result_has_its_gradients() -> None:
    model = randomized(Attending(True))
    model.nets[1].requires_grad_(False)
    model.nets[2].requires_grad_(False)
    fused = fxfuse.optimize(model, ([randn(3, 4, seed=i) for i in range(4)],), objective="launches", tune=False)
    seen = []
    for each in (model, fused):
        xs = [randn(3, 4, seed=i).requires_grad_(i == 1) for i in range(4)]
        each(xs)[1].square().sum().backward()
        seen.append(xs[1].grad)
    assert_close(seen[1], seen[0], "input gradient")
    tangents = []
    for each in (model, fused):  # forward mode needs no flag of the input's
        with forward_ad.dual_level():
            xs = [forward_ad.make_dual(randn(3, 4, seed=i), randn(3, 4, seed=9)) for i in range(4)]
            tangents.append([forward_ad.unpack_dual(out).tangent for out in each(xs)])
    for lane, (a, b) in enumerate(zip(*tangents, strict=True)):
        assert_close(b, a, f"tangent {lane}")
    for each in (model, fused):  # trained again
        fxfuse.unfreeze(each, "nets.1.*")
    for each in (model, fused):
        each([randn(3, 4, seed=i) for i in range(4)])[1].square().sum().backward()
    assert_close(packing.original_gradients(fused)["nets.1.weight"], model.nets[1].weight.grad, "gradient")


RETURNED = {
    "one": lambda self: self.nets[1].weight, "all": lambda self: [net.weight for net in self.nets],
    "detached": lambda self: self.nets[0].weight.detach(), "rows": lambda self: self.nets[2].weight[:2],
    "bias": lambda self: {"bias": self.nets[3].bias},
}  # fmt: skip


@pytest.mark.parametrize("name", RETURNED)
def test_a_weight_that_forward_returns_is_the_parameter_itself(name):
    """Whoever gets it finds a leaf, with its gradient, and may write into it."""
    def forward(self, x):
        return torch.cat([net(x) for net in self.nets], 1), RETURNED[name](self)

    model = randomized(model_of(forward, nets=nn.ModuleList(nn.Linear(4, 5) for _ in range(4))))
    fused = fuse(model, X)
    assert fxfuse.report(fused).fused
    assert_equal_models(model, fused, [(X, {})])
    seen = []
    for each in (model, fused):
        out, returned = each(X)
        leaves = tree_leaves(returned)
        each.zero_grad()
        out.square().sum().backward()
        with torch.no_grad():
            leaves[0].mul_(0.5)
        flags = [(leaf.is_leaf, leaf.requires_grad, type(leaf), leaf.stride()) for leaf in leaves]
        seen.append((flags, leaves[0].grad if leaves[0].is_leaf else None))
    assert seen[0][0] == seen[1][0]
    assert_close(seen[1][1], seen[0][1], "gradient of what was returned")
    assert_close(fused(X)[0], model(X)[0], "after a write into it")
