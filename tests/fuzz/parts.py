"""What generated models use besides torch: operands of the rules' samples, hooks, a dataclass, an autograd Function, a subclass."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import torch
from rule_samples import SAMPLES
from torch import Tensor, nn


def drawn(op: str, number: int, operand: int) -> Tensor:
    """Numbers for an operand of a sample, from torch's own generator."""
    generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    numbers = SAMPLES[op][number].operands[operand]
    return numbers.draw(numbers.shape, generator)


def pieces(result: Any) -> list[Tensor]:
    """The tensors that a call returned, as real floating numbers."""
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
    return [torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf for leaf in leaves]


@dataclass
class Out:
    """A result with names."""

    first: Any
    rest: Any


Pair = namedtuple("Pair", "first rest")


class Record(OrderedDict):
    """A dict of the user's own, as model outputs are."""


class Straight(torch.autograd.Function):
    """Rounded forward, straight through backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x * 4) / 4

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 0.5


class Scaled(nn.Linear):
    """A Linear with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0.5 + x.sum(-1, keepdim=True)


class Halved(nn.Module):
    """What a parametrization computes."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * 0.5


def forward_hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out * 2


def watching_hook(module: nn.Module, args: Any, out: Tensor) -> None:
    """Looks on, and changes nothing."""


def pre_hook(module: nn.Module, args: Any) -> Any:
    return tuple(arg * 0.5 if isinstance(arg, Tensor) else arg for arg in args)


def backward_hook(module: nn.Module, grad_in: Any, grad_out: Any) -> Any:
    return tuple(None if g is None else g * 3 for g in grad_in)


def gradient_hook(grad: Tensor) -> Tensor:
    return grad * 2
