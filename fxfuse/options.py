"""The arguments of ``fxfuse.optimize``, checked.

Comes in: what the caller gave. Goes out: ``Options``, or an ``ArgumentError`` that says what was expected and what came.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from .errors import ArgumentError


@dataclass(frozen=True)
class Options:
    """How to optimize; see ``fxfuse.optimize`` for what each means."""

    mode: Literal["train", "infer"] = "train"
    objective: Literal["time", "launches"] = "time"
    lowering: Literal["auto", "grouped_conv", "bmm"] = "auto"
    tune: bool = True
    tune_for: tuple[Any, ...] = ()  # batch sizes, or tuples of arguments
    max_memory: int | None = None
    validate: bool = True
    strict: bool = False
    min_lanes: int = 2
    packing: Literal["packed", "alias"] = "packed"
    cache: bool = True  # read and keep plans on disk
    progress: bool = True  # a bar in a terminal while candidates are timed
    large: bool = False  # a candidate, run, would hold all weights once more


_CHOICES = {"mode": ("train", "infer"), "objective": ("time", "launches"), "lowering": ("auto", "grouped_conv", "bmm")}


def make_options(model: Any, **given: Any) -> Options:
    """``Options`` of the keyword arguments of ``optimize``. Raises ``ArgumentError``."""
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be a torch.nn.Module, {_kind(model)} came")
    for name, choices in _CHOICES.items():
        if given[name] not in choices:
            raise ArgumentError(f"{name} must be one of {', '.join(map(repr, choices))}; {given[name]!r} came")
    given = {"cache": True, "progress": True, **given}
    for name in ("tune", "validate", "strict", "inplace", "cache", "progress"):
        if not isinstance(given[name], bool):
            raise ArgumentError(f"{name} must be True or False, {given[name]!r} came")
    if not isinstance(given["min_lanes"], int) or isinstance(given["min_lanes"], bool) or given["min_lanes"] < 2:
        raise ArgumentError(f"min_lanes must be a whole number of at least 2, {given['min_lanes']!r} came")
    memory = given["max_memory"]
    if memory is not None and (not isinstance(memory, (int, float)) or isinstance(memory, bool) or memory <= 0):
        raise ArgumentError(f"max_memory must be a positive number of bytes or None, {memory!r} came")
    given["max_memory"] = None if memory is None else int(memory)
    given["tune_for"] = _tune_for(given["tune_for"])
    del given["inplace"]
    return Options(**given)


def make_inputs(example_inputs: Any, example_kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """``(args, kwargs)`` of the example; None where neither was given."""
    if example_kwargs is not None and not isinstance(example_kwargs, dict):
        raise ArgumentError(f"example_kwargs must be a dict of keyword arguments, {_kind(example_kwargs)} came")
    if example_kwargs is not None and any(not isinstance(key, str) for key in example_kwargs):
        raise ArgumentError("example_kwargs must have the names of arguments as its keys")
    if example_inputs is None:
        return None if example_kwargs is None else ((), dict(example_kwargs))
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), dict(example_kwargs or {})
    if not isinstance(example_inputs, tuple):
        hint = "; pass a list of arguments as tuple(...)" if isinstance(example_inputs, list) else ""
        raise ArgumentError(f"example_inputs must be a tensor or a tuple of the model's arguments, {_kind(example_inputs)} came{hint}")
    return example_inputs, dict(example_kwargs or {})


def _tune_for(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    items = value if isinstance(value, list) else [value]
    for item in items:
        if not isinstance(item, (int, torch.Tensor, tuple)) or isinstance(item, bool) or (isinstance(item, int) and item < 1):
            raise ArgumentError(
                f"tune_for must be a batch size, example inputs (a tensor or a tuple), or a list of those; {_kind(item)} came"
            )
    return tuple((item,) if isinstance(item, torch.Tensor) else item for item in items)


def _kind(value: Any) -> str:
    return f"{type(value).__name__} {value!r}"[:80] if isinstance(value, (int, float, str, bool)) else f"a {type(value).__name__}"
