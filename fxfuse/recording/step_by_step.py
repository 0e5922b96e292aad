"""Python functions of torch that hide their steps from a recorder, opened.

Comes in: a function of torch that hands itself whole to a ``TorchFunctionMode``, and its arguments. Goes out: the same code without that
hand-over, so that the recorder sees each step: the very arithmetic of the original, masks, checks and all. None for every other call.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

_HIDING = (nn.functional.multi_head_attention_forward,)


def _hands_over_nothing(tensors: Any) -> bool:
    return False


def step_by_step(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any] | None:
    """``function`` with globals of its own, in which no argument overrides torch functions; None where some argument may do so."""
    if function not in _HIDING or any(isinstance(a, Tensor) and type(a) not in (Tensor, nn.Parameter) for a in (*args, *kwargs.values())):
        return None
    space = {**function.__globals__, "has_torch_function": _hands_over_nothing}
    made = types.FunctionType(function.__code__, space, function.__name__, function.__defaults__, function.__closure__)
    made.__kwdefaults__ = function.__kwdefaults__
    return made
