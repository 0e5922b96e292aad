"""Which of a region's tensors may be packed.

Comes in: a model and the path of a region. Goes out: the names (relative to the region) of tensors that must stay as they are, each
with the reason, and the kind (parameter or buffer) of those that may be packed.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from fxfuse.models.module_tree import named_modules
from fxfuse.models.unregistered import unregistered
from fxfuse.private.dynamo import attributes_of_users
from fxfuse.private.tensor_hooks import has_gradient_hooks, hook_stores


def unpackable(model: nn.Module, path: str) -> tuple[dict[str, str], dict[str, Literal["parameter", "buffer"]]]:
    """``({name: reason}, {name: kind})`` over all tensors that modules of the region hold."""
    prefix = f"{path}." if path else ""
    owners: dict[int, list[str]] = {}
    memory: dict[int, dict[int, str]] = {}  # address -> the tensors that begin there, each with a name
    found: dict[str, tuple[torch.Tensor, Literal["parameter", "buffer", "attribute"], nn.Module]] = {}
    for name, module in [*model.named_modules(remove_duplicate=False), *unregistered(model)]:
        stem = f"{name}." if name else ""
        stores: tuple[tuple[Literal["parameter", "buffer", "attribute"], dict[str, object]], ...] = (
            ("parameter", dict(module._parameters)),
            ("buffer", dict(module._buffers)),
            ("attribute", module.__dict__),
        )
        for kind, store in stores:
            for key, tensor in store.items():
                if isinstance(tensor, torch.Tensor):
                    owners.setdefault(id(tensor), []).append(stem + key)
                    if _has_address(tensor):
                        memory.setdefault(tensor.data_ptr(), {}).setdefault(id(tensor), stem + key)
                    if (stem + key).startswith(prefix):
                        found[(stem + key)[len(prefix) :]] = (tensor, kind, module)
    blocked: dict[str, str] = {}
    kinds: dict[str, Literal["parameter", "buffer"]] = {}
    for name, (tensor, kind, module) in found.items():
        reason = _reason(tensor, kind, module, name.rpartition(".")[2])
        outside = [o for o in owners[id(tensor)] if not o.startswith(prefix)]
        beside = memory.get(tensor.data_ptr(), {}) if _has_address(tensor) else {}
        if len(beside) > 1:
            reason = reason or f"it shares memory with {next(n for i, n in beside.items() if i != id(tensor))}"
        if outside:
            reason = reason or f"{prefix}{name} is shared with {outside[0]}"
        if reason:
            blocked[name] = reason
        elif kind != "attribute":
            kinds[name] = kind
    return blocked, kinds


def _has_address(tensor: torch.Tensor) -> bool:
    plain = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided
    return plain and tensor.numel() > 0 and not tensor.is_meta


def _reason(tensor: torch.Tensor, kind: str, module: nn.Module, key: str) -> str:
    if kind == "attribute":
        return "it is a plain attribute"
    if kind == "buffer" and key in module._non_persistent_buffers_set:
        return "it is a buffer that is not saved"
    if kind == "parameter" and type(tensor) is not nn.Parameter:
        return f"it is a {type(tensor).__name__}"
    if kind == "buffer" and type(tensor) is not torch.Tensor:
        return f"it is a {type(tensor).__name__}"
    if tensor.layout is not torch.strided or not tensor.is_leaf:
        return "it is no plain leaf tensor"
    if has_gradient_hooks(tensor):
        return "it has a gradient hook"
    if attributes := attributes_of_users(tensor):
        return f"it carries attributes ({', '.join(attributes)})"
    return ""


def carry_over(model: nn.Module, copied: nn.Module) -> None:
    """Give the Parameters of a copy what copy.deepcopy leaves out: attributes, gradient hooks, and memory that two of them share."""
    others = dict(named_modules(copied))
    done: set[int] = set()
    memory: dict[tuple[Any, ...], torch.Tensor] = {}
    for path, module in named_modules(model):
        for name, tensor in module._parameters.items():
            made = others[path]._parameters.get(name) if path in others else None
            if tensor is None or made is None or made is tensor or id(made) in done:
                continue
            done.add(id(made))
            if _has_address(tensor):
                first = memory.setdefault((tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()), made)
                if first is not made:
                    made.data = first.data
            made.__dict__.update(tensor.__dict__)
            hooks, late = ([*(store or {}).values()] for store in hook_stores(tensor))
            if not (hooks or late):
                continue
            made.requires_grad_()
            for hook in hooks:
                made.register_hook(hook)  # type: ignore[no-untyped-call]
            for hook in late:
                made.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
            made.requires_grad_(tensor.requires_grad)
