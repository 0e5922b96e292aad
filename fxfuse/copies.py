"""Copies of modules.

Comes in: a model. Goes out: ``sharing_copy``: a copy with the same Parameters and its own everything else, to record on.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn


def sharing_copy(model: nn.Module) -> nn.Module:
    """A copy of ``model`` with the same Parameters and its own buffers, attributes and submodules.

    >>> model = nn.Linear(2, 2)
    >>> sharing_copy(model).weight is model.weight
    True
    """
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    return copy.deepcopy(model, memo)
