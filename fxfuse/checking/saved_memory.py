"""Which results lie in memory that autograd has kept for backward: who writes into one before that, is told so by backward, which raises.

Comes in: a call of a model. Goes out: the names of such results. What an op keeps is its own affair, but not what follows from it: where
an original has kept a copy of its own, a caller may write.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from .shared_memory import sharing

KEPT = "is kept for backward, which raises where a caller writes into it before; the original's may be written to"


class Saved(saved_tensors_hooks):
    """While it is entered, notes what autograd keeps; ``among`` says which of some tensors share memory with that.

    >>> import torch
    >>> x = torch.ones(2, requires_grad=True)
    >>> with Saved() as saved:
    ...     doubled, grown = 2 * x, x.exp()
    >>> saved.among({"x": x, "doubled": doubled, "grown": grown})
    {'grown'}
    """

    def __init__(self) -> None:
        self._kept: list[weakref.ref[Tensor]] = []
        super().__init__(self._keep, lambda tensor: tensor)

    def __enter__(self) -> Saved:  # type: ignore[override]
        super().__enter__()
        return self

    def _keep(self, tensor: Tensor) -> Tensor:
        kept = tensor.detach()  # not itself: a result that keeps itself never goes
        self._kept.append(weakref.ref(kept))  # memory of what is no longer in any graph may be another tensor's by now
        return kept

    def among(self, tensors: Mapping[str, Tensor]) -> set[str]:
        """The names of those of ``tensors`` that share memory with what is kept."""
        kept = {f"kept {i}": tensor for i, each in enumerate(self._kept) if (tensor := each()) is not None}
        return {name for name, first in sharing({**kept, **tensors}).items() if name in tensors and first in kept}
