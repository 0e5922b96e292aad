"""What passes between the processes of a sharded region: values that enter its lanes, and values that leave them.

Comes in: tensors, and the name under which ``groups`` knows the processes that share the lanes. Goes out: tensors, differentiable any
number of times. Outside of the lanes every process has the same values and the same gradients; inside, each has its own lanes. So what
enters is handed on as it is, and its gradient is summed; what leaves is gathered or summed, and its gradient is handed on, each process
taking its part: the operators f and g of Megatron-LM (Shoeybi et al., 2019), which are each other's transposes.

Collectives must come in one order on every process, backward too, where autograd reaches only what this process's lanes have read.
So what enters gives a token as well, a number that every later gather or sum takes: behind each of them autograd reaches all that entered.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .groups import group_of
from .in_step import about_to
from .traffic import moved


def _summed(tensors: Sequence[Tensor], group: str, kind: str) -> list[Tensor]:
    """The sums over the processes, in one call for each dtype."""
    results: list[Tensor] = list(tensors)
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        of = [index for index, tensor in enumerate(tensors) if tensor.dtype is dtype]
        flat = torch.cat([results[index].reshape(-1) for index in of])
        about_to(f"{kind} {flat.dtype} {flat.numel()}")
        moved(kind, flat)
        dist.all_reduce(flat, group=group_of(group))
        for index, part in zip(of, torch.split(flat, [results[index].numel() for index in of]), strict=True):
            results[index] = part.reshape(results[index].shape)
    return results


class _Enter(torch.autograd.Function):
    """Values as they are; the sum of their gradients. The last result is the token."""

    @staticmethod
    def forward(ctx: Any, group: str, token: Tensor | None, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.chained = group, token is not None
        return (*(value.view_as(value) for value in values), values[0].new_zeros(()))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        wanted = [index for index in range(len(grads) - 1) if ctx.needs_input_grad[2 + index]]
        given = [grads[index] for index in wanted]
        summed = dict(zip(wanted, _Sum.apply(ctx.group, "gradients", *given), strict=True)) if wanted else {}  # type: ignore[no-untyped-call]
        return (None, torch.zeros_like(grads[-1]) if ctx.chained else None, *(summed.get(index) for index in range(len(grads) - 1)))


class _Sum(torch.autograd.Function):
    """The sums over the processes; their gradients as they are."""

    @staticmethod
    def forward(ctx: Any, group: str, kind: str, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(_summed(values, group, kind))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return (None, None, *_Enter.apply(ctx.group, None, *grads)[:-1])  # type: ignore[no-untyped-call]


class _Gather(torch.autograd.Function):
    """The parts of all processes along one dim, ``starts`` of which says where each begins; of the gradient, this process's part."""

    @staticmethod
    def forward(ctx: Any, group: str, value: Tensor, dim: int, starts: tuple[int, ...]) -> Tensor:
        ctx.group, ctx.dim, ctx.starts = group, dim, starts
        processes = group_of(group)
        sizes = [stop - start for start, stop in itertools.pairwise(starts)]
        # The part with most lanes gives the shape that all send: gloo and NCCL gather equal shapes.
        shape = [*value.shape]
        shape[dim] = max(sizes)
        strides = value.stride()
        order = sorted(range(value.dim()), key=lambda d: -strides[d])  # the result lies in memory as the parts do
        laid = value.permute(order)
        if value.shape[dim] < shape[dim]:
            filled = laid.new_zeros([shape[d] for d in order])
            filled.narrow(order.index(dim), 0, value.shape[dim]).copy_(laid)
            laid = filled
        about_to(f"gather {value.dtype} {shape} {order}")
        parts = [laid.new_empty([shape[d] for d in order]) for _ in sizes]
        dist.all_gather(parts, laid.contiguous(), group=processes)
        at = order.index(dim)
        whole = torch.cat([part.narrow(at, 0, size) for part, size in zip(parts, sizes, strict=True)], at)
        moved("gather", whole)
        return whole.permute([order.index(d) for d in range(value.dim())])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, _Part.apply(ctx.group, grads[0], ctx.dim, ctx.starts), None, None  # type: ignore[no-untyped-call]


class _Part(torch.autograd.Function):
    """This process's part of a value that all have; of the gradient, all parts."""

    @staticmethod
    def forward(ctx: Any, group: str, value: Tensor, dim: int, starts: tuple[int, ...]) -> Tensor:
        ctx.group, ctx.dim, ctx.starts = group, dim, starts
        rank = dist.get_rank(group_of(group))
        return value.narrow(dim, starts[rank], starts[rank + 1] - starts[rank]).clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, _Gather.apply(ctx.group, grads[0], ctx.dim, ctx.starts), None, None  # type: ignore[no-untyped-call]


class _After(torch.autograd.Function):
    """A value as it is, that depends on a token: its gradient reaches it as a zero, so that what it stands for happens everywhere."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, token: Tensor) -> Tensor:
        ctx.like = (token.dtype, token.device)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return grads[0], torch.zeros((), dtype=ctx.like[0], device=ctx.like[1])


def _after(value: Tensor, token: Tensor | None) -> Tensor:
    if token is None or not token.requires_grad or not (value.is_floating_point() or value.is_complex()):
        return value
    result: Tensor = _After.apply(value, token)  # type: ignore[no-untyped-call]
    return result


def enter(group: str, token: Tensor | None, values: list[Tensor]) -> tuple[Tensor, ...]:
    """Floating values on their way into the lanes, and a token. Backward their gradients are summed over the processes, in one call."""
    entered: tuple[Tensor, ...] = _Enter.apply(group, token, *values)  # type: ignore[no-untyped-call]
    return entered


def gather(group: str, token: Tensor | None, value: Tensor, dim: int, starts: tuple[int, ...]) -> Tensor:
    """The lanes of all processes along ``dim``; backward each takes its own. ``starts``: where each process's part begins, and the end."""
    if not (value.is_floating_point() or value.is_complex()):
        with torch.no_grad():
            return _Gather.apply(group, value, dim, starts)  # type: ignore[no-untyped-call, no-any-return]
    gathered: Tensor = _Gather.apply(group, _after(value, token), dim, starts)  # type: ignore[no-untyped-call]
    return gathered


def reduce(group: str, token: Tensor | None, value: Tensor) -> Tensor:
    """The sum over the processes; backward the gradient as it is."""
    total: Tensor = _Sum.apply(group, "sum", _after(value, token))[0]  # type: ignore[no-untyped-call]
    return total


def common_seed() -> Tensor:
    """A number drawn from the generator that all processes have in the same state."""
    return torch.randint(0, 2**62, ())


class Apart:
    """``func`` with random numbers of this process's own: ``(seed, rank, number, *args, **kwargs)``.

    The generator that all processes have in one state is afterwards where it was.
    """

    def __init__(self, func: Callable[..., Any]) -> None:
        self.func = func
        self.__name__ = self.__qualname__ = f"{func.__name__.strip('_')}_apart"

    def __call__(self, seed: Tensor, rank: int, number: int, *args: Any, **kwargs: Any) -> Any:
        devices = {arg.device for arg in args if isinstance(arg, Tensor) and arg.device.type != "cpu"}
        kind = next(iter(devices)).type if devices else "cuda"
        with torch.random.fork_rng(devices=[device.index for device in devices], device_type=kind):
            torch.manual_seed((int(seed) + 1_000_003 * number + rank) % 2**63)
            return self.func(*args, **kwargs)
