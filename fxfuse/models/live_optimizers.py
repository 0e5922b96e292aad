"""Optimizers that are alive and hold Parameters of a model.

Comes in: a model. Goes out: the optimizers that would be left behind if its Parameters were replaced: found among all live objects, in
attributes of the model, and through ``optimizers()`` of Lightning modules. Parameters of modules in plain lists and dicts count.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .module_tree import all_modules, bare
from .unregistered import unregistered

_WRAPPERS = frozenset(("AcceleratedOptimizer", "LightningOptimizer"))


def holding(model: nn.Module) -> list[Any]:
    """The optimizers, each once.

    >>> layer = nn.Linear(2, 3)
    >>> optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    >>> [type(each).__name__ for each in holding(layer)]
    ['SGD']
    """
    mine = parameter_ids(model)
    found: dict[int, Any] = {}
    for candidate in map(unwrapped, (*_alive(), *_in_attributes(model), *_of_lightning(model))):
        groups = getattr(candidate, "param_groups", None)
        if isinstance(groups, list) and any(id(p) in mine for group in groups if isinstance(group, dict) for p in group.get("params", ())):
            found[id(candidate)] = candidate
    return list(found.values())


def unwrapped(optimizer: Any) -> Any:
    """The optimizer itself, of which accelerate and Lightning hand out wrappers; anything else as it is."""
    while type(optimizer).__name__ in _WRAPPERS and isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def parameter_ids(model: nn.Module) -> set[int]:
    """The ids of all Parameters that a model holds, registered or not."""
    hidden = (parameter for _, module in unregistered(model) for parameter in module._parameters.values() if parameter is not None)
    return {id(parameter) for parameter in (*model.parameters(), *hidden)}


def _alive() -> Iterator[Any]:
    kinds: set[type] = set()
    pending: list[type] = [torch.optim.Optimizer]
    while pending:
        kinds.add(kind := pending.pop())
        pending.extend(kind.__subclasses__())
    return (each for each in gc.get_objects() if type(each) in kinds)


def _in_attributes(model: nn.Module) -> Iterator[Any]:
    for module in all_modules(model):
        for value in [value for value in module.__dict__.values() if not bare(value)]:
            yield from value if isinstance(value, (list, tuple)) else (value,)


def _of_lightning(model: nn.Module) -> Iterator[Any]:
    module: Any
    for module in all_modules(model):
        if any(base.__name__ == "LightningModule" for base in type(module).__mro__):
            try:
                found = module.optimizers(use_pl_optimizer=False)
            except Exception:  # no trainer yet
                continue
            yield from found if isinstance(found, (list, tuple)) else (found,)
