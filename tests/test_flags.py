"""What results say of themselves: ``requires_grad``, ``is_leaf``, views; as the original's, whoever calls."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from checks import assert_equal_models, model_of, randn, randomized
from fxfuse.private.pytree import tree_leaves

X = randn(5, 6)


def hidden(self: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([net(x) for net in self.nets], 1)


def overwritten(self: nn.Module, x: Tensor) -> Any:
    h = hidden(self, x)
    h.copy_(h.detach() * 2)
    return h


def overwritten_lanes(self: nn.Module, x: Tensor) -> Any:
    hs = [net(x) for net in self.nets]
    for h in hs:
        h.copy_(h.detach().flip(1))
    return torch.stack(hs)


def overwritten_by_slices(self: nn.Module, x: Tensor) -> Any:
    hs = [net(x) for net in self.nets]
    for h in hs:
        d = h.detach()
        h[:, 0:2] = d[:, 0:2] * 2
        h[:, 2:] = d[:, :3].tanh()
    return hs


def overwritten_as_a_whole(self: nn.Module, x: Tensor) -> Any:
    hs = [net(x) for net in self.nets]
    for h in hs:
        h[:, 0:5] = h.detach() * 2
    return torch.stack(hs)


def filled(self: nn.Module, x: Tensor) -> Any:
    out = torch.zeros(x.shape[0], 20, dtype=x.dtype)
    for i, net in enumerate(self.nets):
        out[:, 5 * i : 5 * i + 5] = net(x).detach()
    return out


def views_without_grad(self: nn.Module, x: Tensor) -> Any:
    hs = [net(x) for net in self.nets]
    h = torch.cat(hs, 1)
    with torch.no_grad():
        return hs[0][:, :2], h.view(-1), h, [each.clone() for each in hs]


def flagged(self: nn.Module, x: Tensor) -> Any:
    h = hidden(self, x)
    return h.detach().requires_grad_(), h.data


def flagged_and_used(self: nn.Module, x: Tensor) -> Any:
    h = hidden(self, x).detach().clone().requires_grad_()
    return h * 2, h


def lanes_seen_without_grad(self: nn.Module, x: Tensor) -> Any:
    out = []
    for net in self.nets:
        h = net(x)
        with torch.no_grad():
            out.append(h.t())
    return out


def views_of_views_without_grad(self: nn.Module, x: Tensor) -> Any:
    out = []
    for net in self.nets:
        h = net(x)
        with torch.no_grad():
            out += [h.t().t(), h[:, 1:4].t()[1:].unsqueeze(0), h.t().chunk(2)[1], h.t().unbind(0)[1]]
    return out


def pieces_without_grad(self: nn.Module, x: Tensor) -> Any:
    hs = [net(x) for net in self.nets]
    with torch.no_grad():
        first, second = hs[0].t()[1:].chunk(2)
        rows = list(hs[1].t())[:2]
    return torch.cat(hs, 1), first, second, rows


def itself_without_grad(self: nn.Module, x: Tensor) -> Any:
    """What lies in rows is handed back with its history, ``no_grad`` or not; a copy would have none."""
    out = []
    for net in self.nets:
        h = net(x)
        with torch.no_grad():
            h = h.contiguous()
        out.append(h)
    return out


def parts_seen_without_grad(self: nn.Module, x: Tensor) -> Any:
    hs = [net(x) for net in self.nets]
    with torch.no_grad():
        parts = [h[:, 1:3] for h in hs] + [hs[0].view(-1)]
    return parts, torch.stack(hs)


FORWARDS: dict[str, Callable[..., Any]] = {
    f.__name__: f
    for f in (
        overwritten, overwritten_lanes, overwritten_by_slices, overwritten_as_a_whole, filled, views_without_grad, flagged,
        flagged_and_used, lanes_seen_without_grad, parts_seen_without_grad, views_of_views_without_grad, itself_without_grad,
        pieces_without_grad,
    )
}  # fmt: skip


# Their results are leaves that take gradients themselves, or views that say so and have no history.
LEAVES = frozenset(("flagged", "flagged_and_used", "lanes_seen_without_grad", "views_of_views_without_grad"))


@pytest.mark.parametrize("name", FORWARDS)
def test_flags_of_results(name: str) -> None:
    model = randomized(model_of(FORWARDS[name], nets=nn.ModuleList(nn.Linear(6, 5) for _ in range(4))))
    fused = fxfuse.optimize(model, X, objective="launches", tune=False, validate=False)
    assert fxfuse.report(fused).fused
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        for requires_grad in (False, True):
            flags = []
            for each in (model, fused):
                with context():
                    out = tree_leaves(each(X.clone().requires_grad_(requires_grad)))
                flags.append([(leaf.requires_grad, leaf.is_leaf, leaf._is_view()) for leaf in out])
            assert flags[0] == flags[1], (context.__name__, requires_grad)
    if name not in LEAVES:
        assert_equal_models(model, fused, [(X, {}), (randn(3, 6), {})])
    assert not fxfuse.report(fused).fallbacks


def test_verification_compares_gradients_beside_a_sparse_result() -> None:
    """Backward may start at it."""
    model = model_of(lambda self, x, adj: (self.net(torch.sparse.mm(adj, x)), adj), net=nn.Linear(6, 5)).double()
    x, adj = X.double(), torch.eye(5, dtype=torch.float64).to_sparse()
    found = fxfuse.verify(model, copy.deepcopy(model), (x, adj))
    assert found.ok
    assert any(d.kind == "input gradient" for d in found.differences)


class _Seen(nn.Linear):
    def __init__(self, tracked: bool) -> None:
        super().__init__(6, 5)
        self.tracked = tracked

    def forward(self, x: Tensor) -> Any:
        h = super().forward(x)
        with torch.set_grad_enabled(self.tracked):
            seen = h.t()
        return seen, (h * h).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_verification_tells_a_history_from_a_flag(dtype: torch.dtype) -> None:
    """Both results say that they need a gradient; backward may start at one of them."""
    bare, tracked = _Seen(False).to(dtype), _Seen(True).to(dtype)
    tracked.load_state_dict(bare.state_dict())
    x = X.to(dtype)
    assert bare(x)[0].requires_grad is tracked(x)[0].requires_grad is True
    assert fxfuse.verify(bare, copy.deepcopy(bare), x).ok
    found = fxfuse.verify(bare, tracked, x)
    assert not found.ok
    assert any(d.name == "output[0]" and "has a history, the original's has none" in d.note for d in found.differences)


def test_validation_finds_a_flag_that_only_the_example_as_given_shows() -> None:
    """With inputs that need gradients both results need one."""

    class Other(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.ones((), dtype=x.dtype, requires_grad=True)

    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.ones((), dtype=x.dtype)

    result = fxfuse.verify(Plain(), Other(), X)
    assert not result.ok
    assert "requires_grad is True, in the original False" in result.reason
    assert fxfuse.verify(Plain(), Plain(), X).ok


class SlicedUntracked(nn.Module):
    """Lanes that scale a view made under ``no_grad``, which has its base's flag and no history."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList(nn.Parameter(randn(3, seed=seed)) for seed in range(3))

    def forward(self, x: Tensor) -> Tensor:
        out = []
        for scale in self.scales:
            with torch.no_grad():
                part = x[:, ::2]
            out.append((part * scale).tanh())
        return torch.stack(out)


NO_HISTORY = "a result can need a gradient for a view under no_grad alone, and has none to give"


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("needs", [False, True])
def test_a_flag_without_a_history_is_refused(needs: bool, after: bool, before: bool, recorded: bool) -> None:
    """Whatever needs a gradient in the recording: the caller may change that of inputs, and freeze weights, at any time."""
    model, x = SlicedUntracked().requires_grad_(before), randn(5, 6)
    fused = fxfuse.optimize(model, x.clone().requires_grad_(recorded), objective="launches", validate=False)
    assert not fxfuse.report(fused).fused
    reasons = [refusal.reason for refusal in fxfuse.report(fused).refused if "test_flags.py:" in str(refusal.place)]
    assert NO_HISTORY in reasons, reasons
    for each in (model, fused):
        each.requires_grad_(after)
    x = x.clone().requires_grad_(needs)
    assert fused(x).requires_grad is model(x).requires_grad is (needs or after)


def assert_equal_flags(model: nn.Module, fused: nn.Module) -> None:
    """Whatever the caller has need a gradient."""
    for weights in (True, False):
        for inputs in (True, False):
            flags = []
            for each in (model, fused):
                out = each.requires_grad_(weights)(X.clone().requires_grad_(inputs))
                flags.append([leaf.requires_grad for leaf in tree_leaves(out)])
            assert flags[0] == flags[1], (weights, inputs)


def halves_written(self: nn.Module, x: Tensor) -> Any:
    """What a view under ``no_grad`` is made to is written into memory of the model's own."""
    with torch.no_grad():
        part = x[:, :5]
    out = x.new_zeros(x.shape[0], 20)
    for i, net in enumerate(self.nets):
        out[:, 5 * i : 5 * i + 5] = net(x).detach() * part
    return out


def another_result(self: nn.Module, x: Tensor) -> Any:
    """The first result needs a gradient for the weights, the second for nothing but the view."""
    with torch.no_grad():
        part = x[:, :5]
    return hidden(self, x), part * 2


def view_of_a_weight(self: nn.Module, x: Tensor) -> Any:
    with torch.no_grad():
        row = self.nets[0].weight[0]
    return torch.cat([net(x).detach() * row[:5] for net in self.nets], 1)


def view_of_a_view(self: nn.Module, x: Tensor) -> Any:
    with torch.no_grad():
        part = x[:, :5].t()
    return torch.stack([net(x).detach() * part.t() for net in self.nets])


def older_view(self: nn.Module, x: Tensor) -> Any:
    """A view taken before its base is written."""
    out = x.new_zeros(x.shape[0], 20)
    first = out[:, :5]
    with torch.no_grad():
        part = x[:, :5]
    for i, net in enumerate(self.nets):
        out[:, 5 * i : 5 * i + 5] = net(x).detach() * part
    return first * 2


def no_cover(self: nn.Module, x: Tensor) -> Any:
    """What is only as large as the input has no flag of its own."""
    with torch.no_grad():
        part = x[:, :5]
    return torch.stack([net(x).detach() + (torch.zeros_like(x)[:, :5] + part) for net in self.nets])


def shaped_as_the_input(self: nn.Module, x: Tensor) -> Any:
    """What is shaped, or cast, as the input has no flag of the input's."""
    with torch.no_grad():
        part = x.view(-1)
    return [net(part.view_as(x)) for net in self.nets], [net(part.reshape_as(x).to(x).type_as(x)) for net in self.nets]


UNTRACED = [shaped_as_the_input, halves_written, another_result, view_of_a_weight, view_of_a_view, older_view, no_cover]


@pytest.mark.parametrize("forward", UNTRACED, ids=lambda f: str(f.__name__))
def test_every_way_of_such_a_flag_is_refused(forward: Callable[..., Any]) -> None:
    model = randomized(model_of(forward, nets=nn.ModuleList(nn.Linear(6, 5) for _ in range(4))))
    fused = fxfuse.optimize(model, X, objective="launches", validate=False)
    assert NO_HISTORY in [refusal.reason for refusal in fxfuse.report(fused).refused], fxfuse.report(fused)
    assert_equal_flags(model, fused)


def features(self: nn.Module, x: Tensor) -> Any:
    """Computed under ``no_grad``, and a view of that: no flag is there to carry."""
    with torch.no_grad():
        part = (x * 2)[:, 1:6]
    return torch.cat([net(x) * part for net in self.nets], 1)


def reshaped_targets(self: nn.Module, x: Tensor) -> Any:
    with torch.no_grad():
        targets = [net(x).reshape(-1) for net in self.nets]
    return torch.stack(targets) * 2


def view_of_a_buffer(self: nn.Module, x: Tensor) -> Any:
    with torch.no_grad():
        scale = self.scale[1:6]
    return torch.cat([net(x) * scale for net in self.nets], 1)


def view_of_detached(self: nn.Module, x: Tensor) -> Any:
    d = x.detach()
    with torch.no_grad():
        part = d[:, 1:6]
    return torch.cat([net(x) * part for net in self.nets], 1)


def view_of_made(self: nn.Module, x: Tensor) -> Any:
    ones = torch.ones(x.shape[0], 7, dtype=x.dtype)
    with torch.no_grad():
        part = ones[:, 1:6]
    return torch.cat([net(x) * part for net in self.nets], 1)


def returned_as_it_is(self: nn.Module, x: Tensor) -> Any:
    with torch.no_grad():
        part = x[:, :5]
    return hidden(self, x), part


def in_rows_already(self: nn.Module, x: Tensor) -> Any:
    with torch.no_grad():
        x = x.contiguous()
    return torch.stack([net(x) * x[:, :5] for net in self.nets])


def only_compared(self: nn.Module, x: Tensor) -> Any:
    with torch.no_grad():
        part = x[:, :5]
    return torch.cat([net(x) * (part > 0) for net in self.nets], 1)


def detached_again(self: nn.Module, x: Tensor) -> Any:
    with torch.no_grad():
        part = x[:, :5]
    return torch.cat([net(x) * part.detach() for net in self.nets], 1)


def covered(self: nn.Module, x: Tensor) -> Any:
    """The networks need a gradient for the input wherever the view says that it does."""
    with torch.no_grad():
        part = x[:, :5].t()
    return torch.stack([net(x) * part.t() for net in self.nets])


def written_and_covered(self: nn.Module, x: Tensor) -> Any:
    with torch.no_grad():
        part = x[:, :5]
    out = x.new_zeros(x.shape[0], 20)
    for i, net in enumerate(self.nets):
        out[:, 5 * i : 5 * i + 5] = net(x) + part
    return out


KEPT = [
    covered, written_and_covered, features, reshaped_targets, view_of_a_buffer, view_of_detached, view_of_made, returned_as_it_is,
    only_compared, detached_again, in_rows_already,
]  # fmt: skip


@pytest.mark.parametrize("forward", KEPT, ids=lambda f: str(f.__name__))
def test_views_that_carry_no_flag_fuse(forward: Callable[..., Any]) -> None:
    model = randomized(model_of(forward, nets=nn.ModuleList(nn.Linear(6, 5) for _ in range(4))))
    model.register_buffer("scale", randn(6))
    fused = fxfuse.optimize(model, X, objective="launches", validate=False)
    assert fxfuse.report(fused).fused, fxfuse.report(fused)
    assert_equal_models(model, fused, [(X, {}), (randn(3, 6), {})])
    assert_equal_flags(model, fused)
    assert not fxfuse.report(fused).fallbacks


def test_what_is_copied_without_grad_in_another_order_has_no_history() -> None:
    """Of an input in rows ``contiguous`` is the input, of another a copy, which no gradient goes through."""
    model = randomized(model_of(in_rows_already, nets=nn.ModuleList(nn.Linear(6, 5) for _ in range(4))))
    fused = fxfuse.optimize(model, X, objective="launches", validate=False)
    for x in (X, randn(6, 5).t(), randn(10, 6)[::2]):
        gradients = []
        for each in (model, fused):
            given = x.clone(memory_format=torch.preserve_format).requires_grad_()
            each(given).sum().backward()
            gradients.append(given.grad)
        assert (gradients[0] is None) is (gradients[1] is None) is (x.stride() == (1, 5))


def test_views_of_numbers_that_take_no_gradient_fuse() -> None:
    def forward(self: nn.Module, index: Tensor) -> Any:
        with torch.no_grad():
            first = index[:, 0]
        return torch.stack([table(first) for table in self.tables])

    model = randomized(model_of(forward, tables=nn.ModuleList(nn.Embedding(9, 5) for _ in range(4))))
    index = torch.arange(12).reshape(4, 3) % 9
    fused = fxfuse.optimize(model, index, objective="launches", validate=False)
    assert fxfuse.report(fused).fused, fxfuse.report(fused)
    assert_equal_models(model, fused, [(index, {})])
