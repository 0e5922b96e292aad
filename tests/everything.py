"""All that a caller could see of a model and of the process around it, to the bit: nothing of it may change while fxfuse works.

``everything(model)`` before and after; ``assert_unchanged`` says what differs, by name.
"""

from __future__ import annotations

import gc
import random
import sys
import warnings
from typing import Any

import numpy
import sympy  # noqa: F401  # torch imports it late, and it adds a filter of warnings of its own
import torch
from torch import Tensor, nn

HOOKS = [name for name in vars(nn.Module()) if "hook" in name]
OURS = ("_fxfuse_report",)  # what a model that comes back unfused may have more: its report


def bits(tensor: Tensor | None) -> Any:
    if tensor is None:
        return None
    plain = tensor.detach().resolve_conj().contiguous()
    return tensor.shape, tensor.dtype, tensor.stride(), plain.reshape(-1).view(torch.uint8).numpy().tobytes()


def of_tensor(tensor: Any) -> Any:
    if not isinstance(tensor, Tensor):
        return tensor
    grad = tensor.grad if tensor.is_leaf else None
    return {
        "object": id(tensor), "address": tensor.data_ptr(), "bits": bits(tensor), "requires_grad": tensor.requires_grad,
        "grad object": id(grad), "grad": bits(grad), "attributes": dict(tensor.__dict__), "class": type(tensor),
        "hooks": list(tensor._backward_hooks or ()), "hooks after": list(getattr(tensor, "_post_accumulate_grad_hooks", None) or ()),
    }


def of_value(value: Any) -> Any:
    if isinstance(value, Tensor):
        return of_tensor(value)
    if isinstance(value, (list, tuple)):
        return type(value), id(value), [of_value(item) for item in value]
    if isinstance(value, dict):
        return type(value), id(value), [(key, of_value(item)) for key, item in value.items()]
    return id(value)


def of_module(module: nn.Module) -> dict[str, Any]:
    own = {name: of_value(value) for name, value in vars(module).items() if name not in OURS}
    return {"class": type(module), "training": module.training, "names": list(own), **own}


def of_process() -> dict[str, Any]:
    state = numpy.random.get_state()
    return {
        "torch's random numbers": torch.get_rng_state().numpy().tobytes(), "python's random numbers": random.getstate(),
        "numpy's random numbers": (state[1].tobytes(), state[2:]), "default dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(), "inference mode": torch.is_inference_mode_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(), "threads": torch.get_num_threads(),
        "warnings filters": list(warnings.filters), "showwarning": warnings.showwarning,
        "trace": sys.gettrace(), "profile": sys.getprofile(),
        "recursion limit": sys.getrecursionlimit(), "collector": gc.isenabled(), "autocast": torch.is_autocast_enabled("cpu"),
        "modes": torch._C._len_torch_function_stack(), "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "Module.to": nn.Module.to, "Module.__call__": nn.Module.__call__, "anomaly": torch.is_anomaly_enabled(),
    }


def everything(model: nn.Module) -> dict[str, Any]:
    modules = {path: of_module(module) for path, module in model.named_modules(remove_duplicate=False)}
    return {"process": of_process(), **modules}


def assert_unchanged(before: dict[str, Any], after: dict[str, Any], where: str = "") -> None:
    found = list(_differences(before, after, ""))
    assert not found, f"{where}: changed: {'; '.join(found[:5])}"


def _differences(a: Any, b: Any, path: str) -> Any:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in {**a, **b}:
            if key not in a or key not in b:
                yield f"{path}.{key} {'came' if key in b else 'went'}"
            else:
                yield from _differences(a[key], b[key], f"{path}.{key}")
    elif a != b:
        yield f"{path}: {str(a)[:60]} became {str(b)[:60]}"
