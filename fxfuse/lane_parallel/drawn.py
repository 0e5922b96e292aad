"""Random inputs for a recorded program, of the shapes that its guard asks for.

Comes in: a guard, a number of rows, a seed. Goes out: one value for each flattened input; equal on every process for an equal seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxfuse.graph import Guard, TensorGuard

ROWS = (5, 3, 8, 16, 2)  # batch sizes to try, in this order: a model may refuse some of them
_MOST = 4096  # rows that are drawn


def free_rows(guard: Guard) -> bool:
    """Does the program take any batch size?"""
    return any(isinstance(leaf, TensorGuard) and None in leaf.shape for leaf in guard.leaves)


def rows_to_try(guard: Guard) -> list[int]:
    """Batch sizes to try; those next to its bounds first, where the program is for a range of sizes.

    >>> from fxfuse.graph import SizeCheck
    >>> rows_to_try(Guard((TensorGuard((None,), torch.float32, torch.device("cpu")),), (0,), (SizeCheck(0, 0, ">", 64),)))[:3]
    [65, 66, 64]
    """
    near = [check.bound + more for check in guard.sizes for more in (1, 2, 0, -1) if 1 < check.bound + more <= _MOST]
    return list(dict.fromkeys([*near, *ROWS])) if free_rows(guard) else [ROWS[0]]


class Drawn:
    """One stream of random tensors. ``wide``: floating ones in float64, whatever was recorded.

    >>> a, b = Drawn(0, True).inputs(Guard((TensorGuard((None, 2), torch.float32, torch.device("cpu")), ("constant", 3)), (0, 1)), 4)
    >>> a.shape, a.dtype, b
    (torch.Size([4, 2]), torch.float64, 3)
    """

    def __init__(self, seed: int, wide: bool) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.wide = wide

    def tensor(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, positive: bool = False) -> Tensor:
        """Normal numbers (``positive``: uniform in 0.5 to 1.5); of integers and booleans 0 and 1, which are rows of any table."""
        if not (dtype.is_floating_point or dtype.is_complex):
            return torch.randint(0, 2, list(shape), generator=self.generator).to(device, dtype)
        if positive:
            made = torch.rand(list(shape), generator=self.generator, dtype=torch.float64) + 0.5
        else:
            made = torch.randn(list(shape), generator=self.generator, dtype=torch.complex128 if dtype.is_complex else torch.float64)
        return made.to(device, torch.float64 if self.wide and dtype.is_floating_point else dtype)

    def inputs(self, guard: Guard, rows: int) -> list[Any]:
        """A value for each leaf: a tensor with ``rows`` in its free dims, a constant, or an earlier one where both were the same."""
        given: list[Any] = []
        for leaf, same in zip(guard.leaves, guard.same, strict=True):
            if not isinstance(leaf, TensorGuard):
                given.append(leaf[1])
            elif same != len(given):
                given.append(given[same])
            else:
                given.append(self.tensor([rows if n is None else n for n in leaf.shape], leaf.dtype, leaf.device))
        return given
