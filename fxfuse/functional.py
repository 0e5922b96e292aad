"""Functions that stand for what Python does in place or in pieces, so that a graph can hold it.

Comes in: tensors. Goes out: new tensors; nothing is written in place but running statistics. They are what the passes write into
graphs besides torch's own functions; ``op_of`` wraps one as an ``Op``.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch.autograd.forward_ad import unpack_dual

from .models.determinism import derandomized
from .ops import Op
from .private.asserts import assert_async


def drop_unused(graph: torch.fx.Graph) -> None:
    """Remove what nothing reads. Calls of closed modules stay, their hooks and state are somebody's business; updates of buffers too."""
    for node in reversed(graph.nodes):  # (``eliminate_dead_code`` checks the whole graph first)
        if not node.users and node.op not in ("placeholder", "output", "call_module") and not node.meta.get("update"):
            graph.erase_node(node)


# Dtypes in which a product may be rounded before something is added to it.
WHOLE = (torch.float32, torch.float64, torch.complex64, torch.complex128)


def product_and_bias(bias: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``torch.baddbmm``, as a product and an addition where that rounds alike: in half precision only ``baddbmm`` adds before it rounds.

    >>> product_and_bias(torch.ones(1), torch.ones(1, 2, 3), torch.ones(1, 3, 2))
    tensor([[[4., 4.],
             [4., 4.]]])
    """
    if left.dtype in WHOLE:
        return torch.bmm(left, right) + bias
    return torch.baddbmm(bias, left, right)


def index_write(base: torch.Tensor, index: Any, value: Any) -> torch.Tensor:
    """``base`` with ``base[index] = value`` done on a copy.

    >>> index_write(torch.zeros(2, 2), (slice(None), 0), torch.ones(2))
    tensor([[1., 0.],
            [1., 0.]])
    """
    copy = base.clone()
    copy[index] = value
    return copy


def index_write_(base: torch.Tensor, index: Any, value: Any) -> torch.Tensor:
    """``index_write`` into ``base`` itself, which nothing else reads.

    >>> index_write_(torch.zeros(2, 2), (slice(None), 0), torch.ones(2))
    tensor([[1., 0.],
            [1., 0.]])
    """
    base[index] = value
    return base


def sum_of(tensors: list[torch.Tensor]) -> torch.Tensor:
    """``tensors[0] + tensors[1] + ...``, from left to right.

    >>> sum_of([torch.ones(2), torch.ones(2)])
    tensor([2., 2.])
    """
    return functools.reduce(torch.add, tensors)


def prod_of(tensors: list[torch.Tensor]) -> torch.Tensor:
    """``tensors[0] * tensors[1] * ...``, from left to right.

    >>> prod_of([torch.ones(2), torch.full((2,), 3.0)])
    tensor([3., 3.])
    """
    return functools.reduce(torch.mul, tensors)


def min_of(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The smallest of all, place by place.

    >>> min_of([torch.ones(2), torch.zeros(2)])
    tensor([0., 0.])
    """
    return functools.reduce(torch.minimum, tensors)


def max_of(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The largest of all, place by place.

    >>> max_of([torch.ones(2), torch.zeros(2)])
    tensor([1., 1.])
    """
    return functools.reduce(torch.maximum, tensors)


def slice_along(tensor: torch.Tensor, dim: int, start: int, stop: int, step: int) -> torch.Tensor:
    """``tensor[start:stop:step]`` in dimension ``dim``.

    >>> slice_along(torch.arange(6), 0, 1, 6, 2)
    tensor([1, 3, 5])
    """
    return tensor[(slice(None),) * dim + (slice(start, stop, step),)]


def pick_along(tensor: torch.Tensor, dim: int, positions: tuple[int, ...]) -> torch.Tensor:
    """``tensor[[2, 0]]`` in dimension ``dim``: a list of positions, in any order.

    >>> pick_along(torch.arange(6), 0, (5, 0, 5))
    tensor([5, 0, 5])
    """
    return torch.index_select(tensor, dim, torch.tensor(positions, device=tensor.device))


def autocast_to(input: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A cast that nobody wrote: autocast's, or back to float32 where its results are written. In float64 it is left out.

    >>> autocast_to(torch.ones(1), torch.bfloat16).dtype
    torch.bfloat16
    """
    return input.to(dtype)


def dropout_each(input: torch.Tensor, keep: torch.Tensor, scale: torch.Tensor, own: int) -> torch.Tensor:
    """Dropout of lanes in front, each with its own probability of keeping an entry, and scale of what is kept. Each entry of the first
    ``own`` dims is kept or dropped as a whole.

    >>> dropout_each(torch.ones(2, 3), torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0]), 2)
    tensor([[1., 1., 1.],
            [0., 0., 0.]])
    """
    lanes = (-1, *((1,) * (input.dim() - 1)))
    ones = (1,) * (input.dim() - own)
    kept = torch.bernoulli(keep.reshape(lanes).expand(*input.shape[:own], *ones))
    if derandomized():  # as a dropout's there, this mask keeps all
        kept = torch.ones_like(kept)
    return input * (kept * scale.reshape(lanes))


def drawn(base: torch.Tensor, name: str, numbers: tuple[Any, ...]) -> torch.Tensor:
    """What ``base.normal_(0, 1)`` leaves in ``base``, as a tensor of its own; ``name`` is "normal".

    >>> drawn(torch.zeros(2), "uniform", (3.0, 3.0))
    tensor([3., 3.])
    """
    made: torch.Tensor = getattr(torch.empty_like(base), f"{name}_")(*numbers)
    return made


def casting(given: torch.dtype, slot: torch.dtype) -> Callable[..., torch.Tensor]:
    """How a value of the one dtype is written into a tensor of the other: what autocast narrowed is widened again, which no comparison in
    float64 needs; any other cast is part of what forward computes.

    >>> casting(torch.bfloat16, torch.float32) is autocast_to, casting(torch.float64, torch.float32) is autocast_to
    (True, False)
    """
    floating = given.is_floating_point and slot.is_floating_point
    return autocast_to if floating and torch.finfo(given).bits < torch.finfo(slot).bits else torch.Tensor.to


def as_slot(value: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
    """``value`` broadcast and cast as ``slot[...] = value`` would: the shape and dtype of ``slot``.

    >>> as_slot(torch.ones(1, 1, 3, dtype=torch.float64), torch.zeros(2, 3)).shape
    torch.Size([2, 3])
    """
    while value.dim() > slot.dim() and value.shape[0] == 1:
        value = value.squeeze(0)
    return value.to(slot.dtype).expand_as(slot)


def gradient_in_rows(input: torch.Tensor) -> torch.Tensor:
    """A gradient in rows: how autograd lays one out hangs on what it was added up from, which packing changes.

    >>> gradient_in_rows(torch.ones(3, 2).t()).stride()
    (3, 1)
    """
    return input.contiguous()


def own_leaf(input: torch.Tensor, requires_grad: bool) -> torch.Tensor:
    """A leaf of its own over the memory of ``input``: what ``requires_grad_`` makes of a tensor without a history.

    >>> own_leaf(torch.ones(2), True).requires_grad
    True
    """
    return input.detach().requires_grad_(requires_grad)


def flagged(input: torch.Tensor, requires_grad: bool) -> torch.Tensor:
    """``own_leaf`` where the caller's inputs give ``input`` no history; with one, a view of its own, which keeps it.

    >>> x = torch.ones(2, requires_grad=True)
    >>> flagged(x.detach(), True).is_leaf, flagged(x * 2, True).is_leaf
    (True, False)
    """
    if requires_grad and input.requires_grad:
        return input.view_as(input)
    return own_leaf(input, requires_grad)


def untracked_view(input: torch.Tensor) -> torch.Tensor:
    """A view made under ``no_grad``. No gradient goes through it; it says that it needs one where ``input`` does, as torch's views do.

    >>> x = torch.ones(2, requires_grad=True) * 2
    >>> y = untracked_view(x)
    >>> y.requires_grad, y.is_leaf, y.data_ptr() == x.data_ptr()
    (True, True, True)
    """
    with torch.no_grad():
        return input.view_as(input)


def cumulative_batch_norm(
    input: torch.Tensor,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    counter: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """``F.batch_norm`` in train mode; the running statistics, in place, are averages of all ``counter`` batches so far (momentum None).

    ``counter`` holds one number for all channels, or one per lane, whose channels lie next to each other.

    >>> mean, var = torch.tensor([4.0]), torch.ones(1)
    >>> _ = cumulative_batch_norm(torch.tensor([[0.0], [2.0]]), mean, var, torch.tensor(3), None, None, 1e-5)
    >>> mean
    tensor([3.])
    """
    mean, var = running_mean.new_zeros(2, running_mean.numel()).unbind(0)
    out = torch.nn.functional.batch_norm(input, mean, var, weight, bias, True, 1.0, eps)
    if not input.numel():  # of no rows there are no statistics
        return out
    wide = torch.promote_types(running_mean.dtype, torch.float32)
    share = counter.detach().to(wide).reciprocal().reshape(-1, 1)
    for running, own in zip((running_mean, running_var), (mean, var), strict=True):
        kept = running.data.view(share.shape[0], -1)  # .data: as in F.batch_norm itself, no write that autograd counts
        lanes = own.view(share.shape[0], -1)
        if wide is running.dtype:
            kept.lerp_(lanes, share)
        else:
            kept.copy_(torch.lerp(kept.to(wide), lanes.to(wide), share))
    return out
def in_rows_without_grad(input: torch.Tensor) -> torch.Tensor:
    """What torch's fast path of attention returns lies in rows, and it is taken where no gradients are asked for.

    >>> x = torch.zeros(2, 3).t()
    >>> in_rows_without_grad(x).stride(), torch.no_grad()(in_rows_without_grad)(x).stride()
    ((1, 3), (2, 1))
    """
    return input if torch.is_grad_enabled() else input.contiguous()


def numbers_like(bits: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Numbers of the dtype of ``like``. They are kept as the bits of float64, as integers, which a model's ``.half()`` leaves as they are.

    >>> numbers_like(torch.tensor([0.1], dtype=torch.float64).view(torch.int64), torch.zeros(1))
    tensor([0.1000])
    """
    return bits.view(torch.float64).to(like.dtype)


def bag_offsets(offsets: torch.Tensor, indices: torch.Tensor, lane: torch.Tensor) -> torch.Tensor:
    """Where the bags of all lanes begin in the lanes' indices laid end to end: ``[G, B]`` and ``[G, n]`` to ``[G * B]``.

    Offsets that ``embedding_bag`` refuses of a lane alone are refused here (RuntimeError; on a GPU a device assert, not waited for): in
    one long run they would point into another lane. ``lane`` is ``[[0], [1], ...]``.

    >>> bag_offsets(torch.tensor([[0, 2], [0, 1]]), torch.zeros(2, 3), torch.tensor([[0], [1]]))
    tensor([0, 2, 3, 4])
    """
    length = indices.shape[1]
    if not offsets.is_meta and offsets.shape[1]:
        inside = (offsets.clamp(0, length) == offsets).all()
        assert_async(inside > offsets[:, 0].any(), f"the bags of a lane have to begin at 0 and within its {length} indices")
    return torch.add(offsets, lane, alpha=length).flatten()


def ragged_bags(indices: list[torch.Tensor], offsets: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lanes with unequal numbers of indices, laid end to end: the rows that they mean in one table, and where all bags begin.

    ``rows``: ``[2, G]``, each lane's first row and its last; an index outside becomes -1, which every look-up refuses. ``offsets``:
    ``[G, B]``.

    >>> ragged_bags([torch.tensor([0, 1]), torch.tensor([2])], torch.tensor([[0, 1], [0, 1]]), torch.tensor([[0, 5], [4, 9]]))
    (tensor([0, 1, 7]), tensor([0, 1, 2, 3]))
    """
    counts = [index.shape[0] for index in indices]
    first, last = torch.cat([rows[:, lane : lane + 1].expand(2, count) for lane, count in enumerate(counts)], 1).unbind()
    found = torch.cat(indices) + first
    if not offsets.is_meta and offsets.shape[1]:
        limit = offsets.new_tensor([[0] * len(counts), counts])
        most = torch.cat([limit[0].unsqueeze(1), limit[1].unsqueeze(1).expand(-1, offsets.shape[1] - 1)], 1)
        inside = (offsets.clamp(limit[0, 0], most) == offsets).all()
        assert_async(inside, "the bags of a lane have to begin at 0 and within the indices of the lane")
    begins = offsets + offsets.new_tensor([0, *itertools.accumulate(counts)][:-1]).unsqueeze(1)
    return found.masked_fill(found != found.clamp(first, last), -1), begins.flatten()


def tracked_as(result: torch.Tensor, sources: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """``result``, without its history where none of ``sources`` has one.

    >>> trained, given = torch.ones(2, requires_grad=True), torch.ones(2)
    >>> tracked_as(trained * 2, (given,)).requires_grad, tracked_as(trained * 2, (given, trained)).requires_grad
    (False, True)
    """
    if not result.requires_grad or any(source.requires_grad for source in sources):
        return result
    if not torch.compiler.is_compiling() and unpack_dual(result).tangent is not None:  # type: ignore[no-untyped-call]
        return result  # ``detach`` would drop the tangent too
    return result.detach()


_WRAPPED: dict[Callable[..., Any], Op] = {}


def op_of(function: Callable[..., Any], name: str = "", pointwise: bool = False) -> Op:
    """``function`` as an ``Op``, its arguments in their own order.

    Torch's builtins have no signature to look at: wrap them with ``passes.ops.canonical`` instead.
    """
    op = _WRAPPED.get(function)
    if op is None:
        parameters = list(inspect.signature(function).parameters.values())
        names = tuple(p.name for p in parameters)
        op = Op(name or function.__name__, "fxfuse", names, tuple(p.default for p in parameters), frozenset(), pointwise, function)
        _WRAPPED[function] = op
    return op
