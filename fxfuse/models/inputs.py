"""Fresh inputs made from a model's example inputs.

Comes in: the positional and keyword arguments of one call, nested as the user likes. Goes out: arguments of the same structure with
other data or another batch size, another floating dtype, or plain clones. Integers are never invented: an index that the
example did not hold may lie outside an embedding table. The global random state is neither read nor changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from fxfuse.private.pytree import tree_flatten, tree_leaves, tree_unflatten

T = TypeVar("T")

_COMPLEX = {torch.float16: torch.complex32, torch.float32: torch.complex64, torch.float64: torch.complex128}


def tensors_in(args: Any, kwargs: Any = None) -> list[Tensor]:
    """Every tensor object among the arguments, once, in the order of a flattened call.

    >>> x = torch.zeros(2)
    >>> len(tensors_in((x, [x, 3], {"y": torch.ones(1)})))
    2
    """
    seen: dict[int, Tensor] = {id(t): t for t in tree_leaves((args, kwargs or {})) if isinstance(t, Tensor)}
    return list(seen.values())


def batch_size(args: Any, kwargs: Any = None) -> int | None:
    """Dim 0 of the first tensor that has dims; ``None`` if there is no such tensor.

    >>> batch_size((torch.tensor(1.0),), {"x": torch.zeros(5, 3)})
    5
    """
    return next((t.shape[0] for t in tensors_in(args, kwargs) if t.ndim >= 1), None)


def clone_inputs(tree: T, *, requires_grad: bool | None = None) -> T:
    """Deep clones with the same sizes, strides, dtype and device; leaves that were one tensor stay one tensor.

    ``requires_grad``: ``None`` keeps each leaf's flag, ``True`` sets it on every floating and complex leaf, ``False`` on none. The
    clones are autograd leaves. Two different tensors that share memory (a view and its base) are separate afterwards.

    >>> x = torch.zeros(2, 3).t()
    >>> y, z = clone_inputs((x, x), requires_grad=True)
    >>> y is z, y.stride(), y.requires_grad
    (True, (1, 3), True)
    """

    def clone(tensor: Tensor) -> Tensor:
        wanted = tensor.requires_grad if requires_grad is None else requires_grad
        return _finish(_copy_of(tensor, tensor.dtype), wanted)

    return _mapped(tree, clone)


def to_dtype(tree: T, dtype: torch.dtype) -> T:
    """Cast floating tensors to ``dtype`` (complex ones to its complex partner), strides, aliasing and ``requires_grad`` kept.

    Tensors that have the dtype already, integers, and everything that is no tensor are passed through as they are.

    >>> [t.dtype for t in to_dtype([torch.zeros(1), torch.zeros(1, dtype=torch.int64)], torch.float64)]
    [torch.float64, torch.int64]
    """

    def cast(tensor: Tensor) -> Tensor:
        wanted = wider(tensor.dtype, dtype)
        return tensor if wanted == tensor.dtype else _finish(_copy_of(tensor, wanted), tensor.requires_grad)

    return _mapped(tree, cast)


def wider(dtype: torch.dtype, floating: torch.dtype) -> torch.dtype:
    """What ``dtype`` becomes when floating numbers become ``floating``: integers stay, complex numbers follow."""
    if dtype.is_complex:
        return _COMPLEX.get(floating, dtype)
    return floating if dtype.is_floating_point else dtype


def resample(
    args: Any, kwargs: Any = None, *, batch: int | None = None, seed: int = 0, keep_integers: bool = False
) -> tuple[Any, dict[str, Any]]:
    """Arguments like the example's with other data and ``batch`` rows (``None``: as many as before).

    Every tensor whose dim 0 equals ``batch_size`` is resampled, all by the same rows, so that a row of several tensors stays
    together: integers and booleans take the drawn rows; floating and complex tensors a convex mixture of two drawn rows, which
    stays inside the example's hull, yet differs from every row of it. With one row, or none shared, they are scaled by 0.5 to
    1 instead. Integer tensors without the batch dim are kept. Dtype, device, ``requires_grad``, memory format, expanded
    dims, and which leaves are the same tensor stay as they were. ``keep_integers``: so do all integers and booleans. Returns
    ``(args, kwargs)``. Raises ``ValueError`` for a negative ``batch``, or for rows asked of an example that has none.

    >>> (x, i), _ = resample((torch.eye(4), torch.arange(4)), {}, batch=6, seed=1)
    >>> x.shape, i.shape, bool((x.sum(1) - 1).abs().max() < 1e-6), bool((x.gather(1, i[:, None]) >= 0.2).all())
    (torch.Size([6, 4]), torch.Size([6]), True, True)
    """
    rows = batch_size(args, kwargs)
    if batch is not None and batch < 0:
        raise ValueError(f"a batch size of 0 or more was expected, {batch} came")
    if rows == 0 and batch:
        raise ValueError(f"{batch} rows were asked for, but the example has none to draw from")
    draw = _Draw.make(rows, rows if batch is None else batch, seed)

    def fresh(tensor: Tensor) -> Tensor:
        if keep_integers and not (tensor.is_floating_point() or tensor.is_complex()):
            return tensor.clone()
        return _finish(_resampled(tensor, draw), tensor.requires_grad)

    return _mapped((args, dict(kwargs or {})), fresh)


def shaken(tree: T, eps: float, random: torch.Generator) -> T:
    """Floating and complex leaves multiplied, element by element, by 1 + u * eps with u uniform in -2..2; the rest as it is.

    >>> float((shaken(torch.ones(9), 1e-3, torch.Generator().manual_seed(0)) - 1).abs().max()) < 2.1e-3
    True
    """

    def shake(tensor: Tensor) -> Tensor:
        if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.layout is not torch.strided:
            return tensor
        u = torch.rand(tensor.shape, generator=random, dtype=torch.float64) * 4 - 2
        values = _scaled(tensor.detach(), 1 + eps * u)
        return _finish(_like(tensor, values), tensor.requires_grad)

    return _mapped(tree, shake)


@dataclass
class _Draw:
    """Which rows are drawn, and how they are mixed: the same for every tensor of one call."""

    rows: int | None
    count: int
    first: Tensor  # [count] int64
    second: Tensor  # [count] int64, another row than ``first``
    share: Tensor  # [count] float64 of ``first``, in 0.25..0.75
    scale: Tensor  # [max(count, 1)] float64, in 0.5..1

    @classmethod
    def make(cls, rows: int | None, count: int | None, seed: int) -> _Draw:
        random = torch.Generator().manual_seed(seed)
        count = count or 0
        first = torch.randint(max(rows or 0, 1), (count,), generator=random)
        second = first
        if rows is not None and rows > 1:
            second = (first + 1 + torch.randint(rows - 1, (count,), generator=random)) % rows
        share = torch.rand(count, generator=random, dtype=torch.float64) * 0.5 + 0.25
        scale = torch.rand(max(count, 1), generator=random, dtype=torch.float64) * 0.5 + 0.5
        return cls(rows, count, first, second, share, scale)


def _resampled(tensor: Tensor, draw: _Draw) -> Tensor:
    tensor = tensor.detach()
    exact = not (tensor.is_floating_point() or tensor.is_complex())
    batched = draw.rows is not None and tensor.ndim >= 1 and tensor.shape[0] == draw.rows
    if tensor.layout is not torch.strided:  # sparse: rows cannot be drawn cheaply
        return tensor.clone() if exact else tensor * float(draw.scale[0])
    if not batched:
        return _like(tensor, tensor if exact else _scaled(tensor, draw.scale[0]))
    if draw.count == 0:
        return _like(tensor, tensor[:0])
    first, second = (index.to(tensor.device) for index in (draw.first, draw.second))
    source = tensor[first]
    if exact:
        return _like(tensor, source)
    if draw.rows == 1 or tensor.stride(0) == 0:  # every row is the same row: a mixture would change nothing
        same = draw.rows != 1
        return _like(tensor, _scaled(source, draw.scale[0] if same else _column(draw.scale, source)))
    return _like(tensor, _mixed(source, tensor[second], _column(draw.share, source)))


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 1))


def _scaled(tensor: Tensor, scale: Tensor) -> Tensor:
    exact = torch.complex128 if tensor.is_complex() else torch.float64
    return (tensor.to(exact) * scale.to(tensor.device)).to(tensor.dtype)


def _mixed(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    exact = torch.complex128 if first.is_complex() else torch.float64
    a, b, share = first.to(exact), second.to(exact), share.to(first.device)
    mixed = a * share + b * (1 - share)
    if not mixed.is_complex():
        mixed = mixed.clamp(torch.minimum(a, b), torch.maximum(a, b))  # rounding may not leave the hull
    # inf - inf: a mask of both signs; one of the two rows' values is as good
    return torch.where(mixed.isnan(), a, mixed).to(first.dtype)


def _mapped(tree: T, change: Callable[[Tensor], Tensor]) -> T:
    leaves, spec = tree_flatten(tree)
    done: dict[int, Tensor] = {}
    for leaf in leaves:
        if isinstance(leaf, Tensor) and id(leaf) not in done:
            done[id(leaf)] = change(leaf)
    result: T = tree_unflatten([done[id(leaf)] if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)
    return result


def _finish(tensor: Tensor, requires_grad: bool) -> Tensor:
    return tensor.requires_grad_(requires_grad and (tensor.is_floating_point() or tensor.is_complex()))


def _copy_of(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    tensor = tensor.detach()
    return _like(tensor, tensor, dtype) if tensor.layout is torch.strided else tensor.to(dtype, copy=True)


def _like(model: Tensor, values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A fresh tensor that holds ``values``, laid out in memory as ``model`` is; they may differ in dim 0 only.

    Expanded dims (stride 0) stay expanded: their values must be constant. Memory that overlaps otherwise becomes contiguous.
    """
    if type(model) not in (Tensor, torch.nn.Parameter) or model.is_conj() or model.is_neg():
        return values.to(dtype or values.dtype, copy=True)
    expanded = [d for d in range(model.ndim) if model.stride(d) == 0 and model.shape[d] > 1]
    kept = values
    for d in expanded:
        kept = kept.narrow(d, 0, min(1, kept.shape[d]))
    stride = _strides(model, kept)
    if stride is None:
        out = torch.empty(kept.shape, dtype=dtype or values.dtype, device=model.device)
    else:
        out = torch.empty_strided(tuple(kept.shape), stride, dtype=dtype or values.dtype, device=model.device)
    out.copy_(kept)
    return out.expand(values.shape).detach() if expanded and values.numel() else out


def _strides(model: Tensor, values: Tensor) -> tuple[int, ...] | None:
    """``model``'s strides for ``values``' sizes; ``None`` where the model's own memory overlaps."""
    old, new = list(model.shape), list(values.shape)
    stride = list(model.stride())
    if old and old[0] <= 1 < new[0]:  # a stride of one row says nothing: rows go outside
        inner = 1 + sum((n - 1) * s for n, s in zip(old[1:], stride[1:], strict=True) if n > 0)
        stride[0] = max(stride[0], inner)
    result = list(stride)
    reach = 1  # the smallest stride that does not overlap what lies inside
    for d in sorted((d for d in range(len(new)) if new[d] > 1), key=lambda d: stride[d]):
        grown = stride[d]
        if d != 0 and old and old[0] > 0 and new[0] != old[0] and stride[d] > stride[0] > 0 and old[0] > 1:
            grown = -(-stride[d] * new[0] // old[0])  # a dim outside of the batch moves with the batch's size
        if grown < reach:
            if new == old or (d != 0 and stride[d] <= stride[0]):
                return None
            grown = reach
        result[d] = grown
        reach = grown * (new[d] - 1) + reach if grown else reach
    return tuple(result)


def other_variations(args: Any, kwargs: Any, *, first_too: bool) -> list[tuple[int, tuple[int, ...]]]:
    """``(dim, leaf numbers)`` of tensors to vary together, without the first size of dim 0, which ``resample`` varies.

    First by the size of dim 0; then, for tensors of three and more dims, each further dim (a batch that stands second, a length), and
    for rows of integers how many there are in a row: words of a sentence, with whatever has as many (its mask). Numbers in a row are
    features, which nothing takes more of.
    ``first_too``: also the tensors of the first size, one at a time, where there are several.

    >>> other_variations((torch.zeros(3, 2), torch.zeros(5), torch.zeros(5, 1)), {}, first_too=False)
    [(0, (1, 2))]
    >>> other_variations((torch.zeros(3, 7).long(), torch.zeros(3, 7), torch.zeros(3, 4)), {}, first_too=False)
    [(1, (0, 1))]
    """
    leaves = tree_flatten((args, kwargs))[0]
    by_size: dict[tuple[int, int], list[int]] = {}
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            for dim in range(leaf.dim()):
                if leaf.shape[dim]:
                    by_size.setdefault((dim, leaf.shape[dim]), []).append(index)

    def a_size(dim: int, indices: list[int]) -> bool:
        return not dim or any(leaves[i].dim() > 2 or not (leaves[i].is_floating_point() or leaves[i].is_complex()) for i in indices)

    groups = sorted((item for item in by_size.items() if a_size(item[0][0], item[1])), key=lambda item: item[0][0])
    found = [(dim, tuple(group)) for (dim, _), group in groups[1:]]
    if first_too and groups and len(groups[0][1]) > 1:
        found.extend((0, (index,)) for index in groups[0][1])
    return found


def vary(
    args: Any, kwargs: Any, chosen: tuple[int, ...], size: Callable[[int], int], *, dim: int = 0, seed: int
) -> tuple[Any, dict[str, Any]]:
    """Fresh inputs in which the leaves ``chosen`` have ``size(before)`` entries in ``dim`` and all others as many as before."""
    leaves, spec = tree_flatten((args, kwargs))
    others, _ = resample(tuple(leaves), {}, batch=None, seed=seed)
    picked = tuple(leaves[index].movedim(dim, 0) for index in chosen)
    changed, _ = resample(picked, {}, batch=size(picked[0].shape[0]), seed=seed + 1)
    fresh = list(others)
    for index, leaf in zip(chosen, changed, strict=True):
        fresh[index] = leaf.movedim(0, dim)
    result: tuple[Any, dict[str, Any]] = tree_unflatten(fresh, spec)
    return result
