"""Checkpoints that do not fit change nothing.

Comes in: a model and a state dict. Goes out: the model with that state, or, where anything raises, the model bit for bit as it was, and
the error. ``nn.Module.load_state_dict`` writes what fits before it raises over the rest; packed weights would be lanes of two models.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fxfuse.models.determinism import same_bits
from fxfuse.models.sharded import own_share

from .saved_recipes import noted, packs_in, unpacked

NAME = "load_state_dict"


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Where the block raises, the Parameters and buffers of ``model`` are afterwards the same objects with the same bits.

    Needs a second copy of them meanwhile.

    >>> import contextlib
    >>> layer = nn.Linear(2, 3)
    >>> before = layer.bias.clone()
    >>> with contextlib.suppress(ValueError), all_or_nothing(layer):
    ...     _ = torch.nn.init.zeros_(layer.bias)
    ...     raise ValueError
    >>> bool((layer.bias == before).all())
    True
    """
    stores: list[dict[str, Any]] = [store for module in model.modules() for store in (module._parameters, module._buffers)]
    held = [dict(store) for store in stores]
    tensors = {id(tensor): tensor for store in held for tensor in store.values() if tensor is not None}
    saved = [(tensor, tensor.data, tensor.requires_grad, _values(tensor)) for tensor in tensors.values()]
    try:
        yield
    except BaseException:
        for store, before in zip(stores, held, strict=True):
            if list(store) != list(before) or any(store[name] is not tensor for name, tensor in before.items()):
                store.clear()
                store.update(before)
        with torch.no_grad():
            for tensor, data, requires_grad, values in saved:
                if tensor.data_ptr() != data.data_ptr() or tensor.dtype != data.dtype or tensor.shape != data.shape:
                    tensor.data = data
                if values is not None and not same_bits(own_share(tensor), values):
                    own_share(tensor.data).copy_(values)
                if tensor.requires_grad is not requires_grad:
                    tensor.requires_grad_(requires_grad)
        raise


def _values(tensor: Tensor) -> Tensor | None:
    return None if tensor.is_meta else own_share(tensor.detach()).clone()


def refitted(model: nn.Module, *args: Any) -> tuple[Any, ...]:
    """The arguments of ``load_state_dict``; a state dict of a model that was fused in another way comes by the original's names.

    Plans differ with the machine that measured, and with options.
    """
    notes = noted(args[0]) if args else {}
    if not notes:
        return args
    states = {path: module.__dict__["_fxfuse"] for path, module in model.named_modules() if "_fxfuse" in module.__dict__}
    mine = {path: {recipe.name for recipe in state.plan.recipes} for path, state in states.items() if state.packing == "packed"}
    return args if mine == {path: packs_in(note) for path, note in notes.items()} else (unpacked(args[0]), *args[1:])


class Loader:
    """Stands in for ``load_state_dict`` on a model above fused regions, whose class stays its own."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self.model
        with all_or_nothing(model):
            return getattr(type(model), NAME)(model, *refitted(model, *args), **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Loader:
        return Loader(copy.deepcopy(self.model, memo))

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Loader, (self.model,)


def loads_whole(model: nn.Module) -> None:
    """From here on ``model.load_state_dict`` is all or nothing."""
    model.__dict__.setdefault(NAME, Loader(model))


def loads_as_before(model: nn.Module) -> None:
    """Undo ``loads_whole``."""
    if isinstance(model.__dict__.get(NAME), Loader):
        del model.__dict__[NAME]
