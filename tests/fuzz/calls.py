"""One call of a model and all that its caller can see of it; two of them compared.

The numbers of the original are the truth. What counts as rounding is what the original itself does when its weights and inputs change by
a few roundings (``Noise``), and never more than a thousandth of a tensor's size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

import fxfuse
from checks import own_gradients, plain
from fxfuse.checking.runs import has_history
from fxfuse.weights import packing

RTOL = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.2}
FLOOR = 1e-2  # of numbers about 1: what a norm makes of rows that are all alike is pure rounding
CHAOS = 1e-3  # an original that moves by more than this share of a tensor when its last bits change tells nothing


# What the original raises and a fused model may answer: writes that autograd refuses (it makes none of them), sizes of -1 beside a 0.
BENIGN = (
    "modified by an inplace operation", "being modified inplace", "in-place operation", "modified inplace",
    "cannot reshape tensor of 0 elements",
)  # fmt: skip


@dataclass
class Seen:
    """What a call gave: an error, or numbers by name."""

    error: str = ""
    spec: Any = None
    numbers: dict[str, Tensor | None] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)  # all that is not numbers: dtypes, strides, flags, other leaves


def parameter_gradients(model: nn.Module, fused: bool) -> dict[str, Tensor | None]:
    """By the original's names."""
    return packing.original_gradients(model) if fused else own_gradients(model)


def buffers(model: nn.Module, fused: bool) -> dict[str, Tensor]:
    """Buffers by the original's names; of a fused model also what its state dict says of them."""
    named = dict(model.named_buffers())
    return {**named, **fxfuse.original_state_dict(model)} if fused else named


def look(
    model: nn.Module, args: Any, kwargs: Any, *, fused: bool, grad: bool = True, write: int | None = None, scale: float = 1.0
) -> Seen:
    """Call it, go backward from random numbers, and note everything. ``write``: into which of the outputs the caller writes before that."""
    seen = Seen()
    model.zero_grad(set_to_none=True)
    given = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    try:
        with torch.set_grad_enabled(grad):
            leaves, seen.spec = tree_flatten(plain(model(*args, **kwargs)))
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            if write is not None:
                writable = [t for t in tensors if _inexact(t)]
                if writable:
                    writable[write % len(writable)].mul_(0.5)
            for index, leaf in enumerate(leaves):
                if not isinstance(leaf, Tensor):
                    seen.facts[f"output {index}"] = leaf
                    continue
                seen.numbers[f"output {index}"] = leaf.detach().clone()
                flag = "without a history" if leaf.requires_grad and not has_history(leaf) else leaf.requires_grad
                seen.facts[f"output {index}"] = (tuple(leaf.shape), leaf.dtype, flag, _steps(leaf))
            if grad:
                _backward(tensors, scale)
    except Exception as error:  # what the original raises, the fused model is to raise as well
        seen.error = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return seen
    for index, tensor in enumerate(given):
        seen.numbers[f"input {index} after the call"] = tensor.detach().clone()
        if grad:
            seen.numbers[f"gradient of input {index}"] = tensor.grad if tensor.is_leaf else None
    if grad:
        seen.numbers.update((f"gradient of {name}", value) for name, value in parameter_gradients(model, fused).items())
    seen.numbers.update((f"buffer {name}", value.detach().clone()) for name, value in buffers(model, fused).items())
    return seen


def _steps(tensor: Tensor) -> tuple[int, ...] | None:
    """Strides where they can be seen; those of a view with gaps are not promised."""
    if not tensor.numel():
        return ()
    steps = [(step, size) for step, size in zip(tensor.stride(), tensor.shape) if size > 1]
    filled = 1
    for step, size in sorted(steps):
        if step != filled:
            return None
        filled *= size
    return tuple(step for step, _ in steps)


def _same_facts(got: Any, want: Any) -> bool:
    if isinstance(want, tuple) and isinstance(got, tuple) and len(want) == len(got) == 4:  # what ``look`` notes of a tensor
        return got[:3] == want[:3] and (want[3] is None or got[3] == want[3])
    return type(got) is type(want) and bool(got == want)


def _backward(outputs: list[Tensor], scale: float) -> None:
    generator = torch.Generator().manual_seed(7)
    ends, starts = [], []
    for output in outputs:
        drawn = torch.randn(output.shape, generator=generator, dtype=torch.float64) * scale
        if output.requires_grad and has_history(output):
            ends.append(output)
            starts.append(drawn.to(output.dtype))
    if ends:
        torch.autograd.backward(ends, starts)


def compare(got: Seen, want: Seen, noise: Callable[[], dict[str, float]], narrow: bool) -> list[str]:
    """What differs, in words. ``narrow``: the model computes in float32 somewhere inside."""
    if want.error or got.error:
        if bool(want.error) == bool(got.error) or (want.error and any(words in want.error for words in BENIGN)):
            return []
        return [f"raises {got.error}" if got.error else f"answers where the original raises {want.error}"]
    if got.spec != want.spec:
        return [f"returns {got.spec}, the original {want.spec}"]
    facts = ((name, got.facts.get(name), fact) for name, fact in want.facts.items())
    found = [f"{name} is {mine}, the original's {fact}" for name, mine, fact in facts if not _same_facts(mine, fact)]
    largest = _largest(want)
    apart: dict[str, float] = {}
    for name, value in want.numbers.items():
        if name not in got.numbers:
            found.append(f"{name} is missing")
            continue
        difference, allowed = _apart(got.numbers[name], value, largest[_kind(name)], narrow)
        if difference is None:
            found.append(f"{name}: {_shape(got.numbers[name])}, the original has {_shape(value)}")
        elif not difference <= allowed:
            apart[name] = difference
    if apart:
        moved = noise()
        for name, difference in apart.items():
            value = want.numbers[name]
            size = max(_size(value), 1e-300) if value is not None else 1.0
            if moved.get(name, 0.0) > CHAOS * size or difference <= 1000 * moved.get(name, 0.0):
                continue
            found.append(f"{name}: {difference:.3g} apart, of {size:.3g}; rounding moves it by {moved.get(name, 0.0):.1g}")
    return found


def distances(one: Seen, other: Seen) -> dict[str, float]:
    """How far two calls of the original are apart, by name; infinitely far where they cannot be compared."""
    if one.error or other.error:
        return {} if one.error and other.error else dict.fromkeys(one.numbers, float("inf"))
    found = {}
    for name, value in one.numbers.items():
        difference, _ = _apart(other.numbers.get(name), value, 0.0, False)
        found[name] = float("inf") if difference is None else difference
    return found


def _apart(got: Tensor | None, want: Tensor | None, largest: float, narrow: bool) -> tuple[float | None, float]:
    """The largest difference (None: they cannot be compared) and what is allowed."""
    if got is None or want is None:
        only = want if got is None else got  # no gradient and a gradient of zeros are the same to gradient descent
        return (0.0 if only is None or not only.count_nonzero() else None), 0.0
    if got.shape != want.shape or got.dtype != want.dtype:
        return None, 0.0
    if not want.numel():
        return 0.0, 0.0
    if not _inexact(want):
        return (0.0 if torch.equal(got, want) else 1.0), 0.0
    a, b = _real(got), _real(want)
    same = (a == b) | (a.isnan() & b.isnan())
    if bool(same.all()):
        return 0.0, 0.0
    difference = torch.where(same, 0.0, (a - b).abs()).max().item()
    finite = b[b.isfinite()].abs()
    scale = finite.max().item() if finite.numel() else 0.0
    dtype = want.dtype.to_real() if want.is_complex() else want.dtype
    rtol = max(RTOL.get(dtype, 0.2), RTOL[torch.float32] if narrow else 0.0)
    return (float("inf") if difference != difference else difference), rtol * scale + rtol * 1e-4 * largest + rtol * FLOOR


def _largest(seen: Seen) -> dict[str, float]:
    """The largest number of each kind: a bias before a BatchNorm has a gradient of pure rounding, of the other gradients' size."""
    found: dict[str, float] = {}
    for name, value in seen.numbers.items():
        if value is not None and _inexact(value):
            found[_kind(name)] = max(found.get(_kind(name), 0.0), _size(value))
        found.setdefault(_kind(name), 0.0)
    return found


def _kind(name: str) -> str:
    return name.split()[0]


def _size(value: Tensor) -> float:
    real = _real(value) if _inexact(value) else value.double()
    real = real[real.isfinite()]
    return real.abs().max().item() if real.numel() else 0.0


def _real(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return torch.view_as_real(tensor.resolve_conj()).double() if tensor.is_complex() else tensor.double()


def _inexact(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _shape(value: Tensor | None) -> str:
    return "nothing" if value is None else f"{tuple(value.shape)} {value.dtype}"
