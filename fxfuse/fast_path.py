"""What ``nn.MultiheadAttention`` returns from its fast path lies in rows; step by step, as it is recorded, it does not.

Comes in: a recorded call of a module, and its result. Goes out: the result, laid out as in a call that nobody records. In eval mode
under ``no_grad`` torch computes self-attention in one private kernel, unless a mode listens. The numbers are equal to rounding; the
strides differ, and what follows passes them on. Where forward itself is under ``no_grad`` that is so in every call; where its caller is,
or weights are frozen, it differs from call to call, and is left as it is recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fxfuse.private.torch_function import DisableTorchFunction


def laid_out(module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any, out: Any) -> Any:
    """``out``, what the ``forward`` of ``module`` gave for these arguments.

    Runs with the recorder's mode on: a change of layout is a call that it sees.
    """
    if torch.is_grad_enabled() or module.training or getattr(forward, "__func__", None) is not nn.MultiheadAttention.forward:
        return out
    with DisableTorchFunction():
        same = forward(*args, **kwargs)[0].stride() == out[0].stride()
    return out if same else (out[0].contiguous(), *out[1:])


def has_fast_path(model: nn.Module) -> bool:
    """May a call of ``model`` lay its results out in another way while a mode listens?"""
    return any(isinstance(module, nn.MultiheadAttention) and not module.training for module in model.modules())
