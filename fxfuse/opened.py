"""Python functions of torch that hide their steps from a recorder, opened.

Comes in: a function of torch that hands itself whole to a ``TorchFunctionMode``. Goes out: the same code without that hand-over, so that the
recorder sees each step: the very arithmetic of the original, masks, checks and all. None for every other function.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from torch.nn import functional


def _hands_over_nothing(tensors: Any) -> bool:
    return False


def _opened(function: Any) -> Callable[..., Any]:
    """``function`` with globals of its own, in which no argument ever overrides torch functions."""
    space = {**function.__globals__, "has_torch_function": _hands_over_nothing}
    made = types.FunctionType(function.__code__, space, function.__name__, function.__defaults__, function.__closure__)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


OPENED: dict[Callable[..., Any], Callable[..., Any]] = {
    functional.multi_head_attention_forward: _opened(functional.multi_head_attention_forward)
}
