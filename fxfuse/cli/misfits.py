"""What of a checkpoint does not fit a model, in a sentence that says what to do.

Comes in: names with the tensors of a model and of a file. Goes out: the sentence; empty where all fits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .meta import few

# What wrappers put into the names of the model inside: who does, and where the model is.
_DATA_PARALLEL, _COMPILED = "module.", "_orig_mod."
_WRAPPED = (
    ((_DATA_PARALLEL,), "DataParallel and DistributedDataParallel write them", "model.module.state_dict()"),
    ((_COMPILED,), "torch.compile writes them", "model._orig_mod.state_dict()"),
    ((_DATA_PARALLEL, _COMPILED), "wrappers write them", "the state dict of the model inside"),
)


def misfits(missing: Iterable[str], unknown: Iterable[str], shapes: Iterable[str] = (), *, has: int = 0) -> str:
    """Of names: those that the file lacks, those that the model does not know (``has``: of how many), shapes in words.

    >>> misfits(["a.weight"], ["module.a.weight"], has=1).partition(" (")[0]
    'its names begin with module.'
    >>> misfits(["a.weight"], ["b"], has=3)
    'it lacks a.weight; it has b, unknown to the model'
    """
    missing, unknown, shapes = list(missing), list(unknown), list(shapes)
    renamed = _renamed(missing, unknown, has)
    if renamed:  # and what is left shows when the names are right
        return renamed
    parts = [f"it lacks {few(missing)}" if missing else ""]
    parts.append(f"it has {few(unknown)}, unknown to the model" if unknown else "")
    parts.append(few(shapes))
    return "; ".join(filter(None, parts))


def shapes_apart(own: Mapping[str, Any], state: Mapping[str, Any]) -> list[str]:
    """Where both have a tensor of a name, and of different shapes."""
    return [
        f"{name} is {list(state[name].shape)}, the model has {list(value.shape)}"
        for name, value in own.items()
        if isinstance(value, Tensor) and isinstance(state.get(name), Tensor) and value.shape != state[name].shape
    ]


def dtypes_apart(own: Mapping[str, Any], state: Mapping[str, Any]) -> list[str]:
    """Where the file's numbers are of another kind than the model's: torch would cast complex numbers, masks or quantized weights without
    a word. Buffers may be of any kind that the model's dtype holds exactly."""
    return [
        f"{name} is {_short(state[name].dtype)}, the model has {_short(value.dtype)}"
        for name, value in own.items()
        if isinstance(value, Tensor) and isinstance(state.get(name), Tensor) and _kind(value.dtype) != _kind(state[name].dtype)
        and (isinstance(value, nn.Parameter) or not _exact(state[name], value.dtype))
    ]  # fmt: skip


def _renamed(missing: list[str], unknown: list[str], has: int) -> str:
    """What every name of the file has more, or less, than the model's."""
    wanted = set(missing)
    if wanted and any(".packed." in f".{name}" for name in unknown):
        return "it holds packed weights of a fused model: fxfuse restore FILE -o OUT.safetensors writes them by the original's names"
    if not wanted or not unknown or len(unknown) < has:
        return ""
    for inserted, who, where in _WRAPPED:
        if all(any(part in name for name in unknown) for part in inserted) and wanted & {_without(name, inserted) for name in unknown}:
            begin = all(name.startswith(inserted) for name in unknown)
            return f"its names {'begin with' if begin else 'have'} {' and '.join(inserted)} ({who}): save {where}, or rename them"
    prefixes = {name.partition(".")[0] for name in unknown}
    if len(prefixes) == 1 and wanted & {name.partition(".")[2] for name in unknown}:
        return f"its names begin with {prefixes.pop()}.: save the state dict of the inner model"
    prefixes = {name.partition(".")[0] for name in missing}
    if len(prefixes) == 1 and set(unknown) & {name.partition(".")[2] for name in missing}:
        return f"the model's names begin with {prefixes.pop()}., those of the file do not: give the inner model, or rename them"
    return ""


def _without(name: str, inserted: tuple[str, ...]) -> str:
    for part in inserted:
        name = name.removeprefix(part) if part == _DATA_PARALLEL else name.replace(part, "")
    return name


def _kind(dtype: torch.dtype) -> str:
    if dtype is torch.bool:
        return "bool"
    if dtype.is_complex:
        return "complex"
    if dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        return "floating"
    return "few bits" if dtype.is_floating_point or "int" not in _short(dtype) or "q" in _short(dtype) else "integer"


def _exact(value: Tensor, dtype: torch.dtype) -> bool:
    try:
        return torch.equal(value.to(dtype).to(value.dtype), value)
    except RuntimeError:
        return False


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
