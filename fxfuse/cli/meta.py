"""Tensors on the meta device, which have a shape and no memory: models are made so when their weights come from a file.

Comes in: a model. Goes out: the model with memory for what a checkpoint holds; what has none, in a sentence.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fxfuse.private.versions import version


class Given:
    """Memory for the model's Parameters and persistent buffers that have none, still to be written: ``unwritten`` tells what was not.

    Tied ones stay tied, and whoever else holds them has them too, unless somebody holds a weak reference.

    >>> layer = nn.Linear(2, 3, device="meta")
    >>> given = Given(layer)
    >>> layer.weight.device.type, given.unwritten(layer)
    ('cpu', ['weight', 'bias'])
    """

    def __init__(self, model: nn.Module) -> None:
        names: dict[int, list[str]] = {}
        own = {name: value for name, value in model.state_dict(keep_vars=True).items() if _is_held(model, name, value) and value.is_meta}
        for name, value in own.items():
            names.setdefault(id(value), []).append(name)
        self.written: dict[int, tuple[Tensor, int]] = {}
        for same in names.values():
            made = _with_memory(own[same[0]], model, same)
            self.written[id(made)] = made, version(made)

    def unwritten(self, model: nn.Module) -> list[str]:
        """The names of those that nothing was written to since."""
        own = model.state_dict(keep_vars=True)
        return [name for name, value in own.items() if id(value) in self.written and version(value) == self.written[id(value)][1]]


def without_memory(model: nn.Module) -> str:
    """What of the model is on the meta device, in a sentence that says what to do; empty where nothing is."""
    kept = set(model.state_dict(keep_vars=True))
    lacking = [name for name, value in _all_named(model) if value.is_meta]
    unsaved = [name for name in lacking if name not in kept]
    if unsaved:
        kind, them = ("buffers", "them") if len(unsaved) > 1 else ("the buffer", "it")
        return f"{kind} {few(unsaved)} on the meta device, which no checkpoint holds (persistent=False): make {them} on the CPU"
    return f"{few(lacking)} on the meta device, without values: make it on the CPU, or give its --weights" if lacking else ""


def few(names: list[str], most: int = 3) -> str:
    """The first names, and how many more."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _all_named(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _is_held(model: nn.Module, name: str, value: Any) -> bool:
    """Is it a Parameter or buffer of that name? Modules may save other things as well, and under other names."""
    path, _, own = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return False
    return module._parameters.get(own, module._buffers.get(own)) is value and isinstance(value, Tensor) and not is_lazy(value)


def _with_memory(tensor: Tensor, model: nn.Module, names: list[str]) -> Tensor:
    made: Any = torch.empty_like(tensor, device="cpu")
    if isinstance(tensor, nn.Parameter):
        made = nn.Parameter(made, requires_grad=tensor.requires_grad)
    made.__dict__.update(tensor.__dict__)
    try:
        torch.utils.swap_tensors(tensor, made)  # type: ignore[no-untyped-call]
        return tensor
    except RuntimeError:  # somebody holds a weak reference: another tensor takes its place, under all names
        for path, _, name in (each.rpartition(".") for each in names):
            setattr(model.get_submodule(path), name, made)
        found: Tensor = made
        return found
