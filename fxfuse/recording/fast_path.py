"""What ``nn.MultiheadAttention`` returns from its fast path lies in rows; step by step, as it is recorded, it does not.

Comes in: a recorded call of a module, and its result. Goes out: the result, laid out as in a call that nobody records. In eval mode
under ``no_grad`` torch computes self-attention in one private kernel, unless a mode listens. The numbers are equal to rounding; the
strides differ, and what follows passes them on. Where forward itself is under ``no_grad`` that is so in every call. Where its caller is,
it differs from call to call: ``in_rows_without_grad`` says which results lie in rows then. (Where all weights are frozen the fast path is
taken with grad on, too: those are left as they are recorded.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxfuse.models.containers import opened
from fxfuse.models.determinism import preserved_state
from fxfuse.models.inputs import clone_inputs
from fxfuse.models.module_tree import all_modules
from fxfuse.private.pytree import tree_flatten
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


def in_rows_without_grad(
    module: nn.Module, args: Any, kwargs: Any, strides: Sequence[Any], root: nn.Module, flags: Sequence[bool]
) -> list[bool]:
    """Of each result, whether a call under ``no_grad`` lays it out in rows, while ``strides`` (as recorded, with grad) are others.

    ``strides``: of the flattened results, None where one is no tensor. ``flags``: the modes of all modules of ``root``, in which
    ``module`` is, when it was recorded. Its forward runs once more; nothing of it stays changed.
    """
    with preserved_state(root), torch.no_grad(), DisableTorchFunction():
        for each, training in zip(all_modules(root), flags, strict=True):
            each.training = training
        if not has_fast_path(module):
            return [False] * len(strides)
        args, kwargs = clone_inputs((args, kwargs), requires_grad=False)
        leaves = tree_flatten(opened(type(module).forward(module, *args, **kwargs)))[0]
    if len(leaves) != len(strides):
        return [False] * len(strides)
    tensors = [leaf if isinstance(leaf, Tensor) and leaf.layout is torch.strided else None for leaf in leaves]
    return [
        tensor is not None and recorded is not None and tensor.stride() != recorded and tensor.is_contiguous()
        for tensor, recorded in zip(tensors, strides, strict=True)
    ]


def has_fast_path(model: nn.Module) -> bool:
    """May a call of ``model`` lay its results out in another way while a mode listens?"""
    return any(isinstance(module, nn.MultiheadAttention) and not module.training for module in model.modules())


def holds_attention(model: nn.Module) -> bool:
    """May it do so in one of its modes?"""
    return any(isinstance(module, nn.MultiheadAttention) for module in model.modules())


def attends(module: nn.Module, root: nn.Module, flags: Sequence[bool]) -> bool:
    """May ``module`` take the fast path where the modules of ``root`` are in these modes? Of an empty batch that gives no weights."""
    inside = {id(each) for each in module.modules() if isinstance(each, nn.MultiheadAttention)}
    return any(id(each) in inside and not training for each, training in zip(all_modules(root), flags, strict=True))
