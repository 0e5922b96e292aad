"""A module that hands back what it was given, where its call stays a call.

Comes in: what its forward returned. Goes out: ``apart``: the same with views in place of the tensors that were there before the call.
What such a module gives at the next call may be another tensor (its hooks change it, or its own branches do), so that what follows
has to read the result of the call and not what went in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fxfuse.private.pytree import tree_map_only

_PLAIN = (Tensor, nn.Parameter)


def apart(out: Any, was_there: Callable[[Tensor], bool]) -> Any:
    """``out``, its tensors that ``was_there`` says are older than the call replaced by views of them.

    >>> x = torch.ones(2)
    >>> apart((x, None), lambda tensor: tensor is x)[0] is x
    False
    """

    def each(tensor: Tensor) -> Tensor:
        plain = type(tensor) in _PLAIN and tensor.layout is torch.strided and was_there(tensor)
        return tensor.view_as(tensor) if plain else tensor

    return tree_map_only(Tensor, each, out)
