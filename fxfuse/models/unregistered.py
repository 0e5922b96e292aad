"""Modules that a model holds in plain lists, tuples, dicts and attributes, where nobody registers them.

Comes in: a model. Goes out: those modules, each with its path: names of attributes, indices and keys, as ``runtime.walk`` follows
them. Their parameters are in no ``parameters()`` and no state dict of the model; whoever trains them takes them from the lists.
``Held``: what the lists held, because they tell nobody when that changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import nn

from .module_tree import bare, named_modules

_REGISTERED = ("_parameters", "_buffers", "_modules")
_DEEPEST = 3  # containers inside of containers


def unregistered(model: nn.Module, owners: Iterable[tuple[str, nn.Module]] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of every module that ``owners`` (all modules of the model) hold unregistered, once each.

    >>> class Hidden(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.nets = [nn.Linear(2, 3), nn.Linear(2, 3)]
    >>> [path for path, module in unregistered(Hidden())]
    ['nets.0', 'nets.1']
    """
    named = named_modules(model)
    known = {module for _, module in named}
    for path, owner in named if owners is None else owners:
        for name, value in list(vars(owner).items()):
            if name not in _REGISTERED and not bare(value):
                for way, found in _modules_in(value, _DEEPEST):
                    for below, module in named_modules(found):
                        if module not in known and not isinstance(module, torch.jit.ScriptModule):
                            known.add(module)
                            yield ".".join(part for part in (path, name, way, below) if part), module


def hidden_parameters(model: nn.Module, beside: Iterable[tuple[str, nn.Module]]) -> dict[str, nn.Parameter]:
    """The Parameters of the modules ``beside`` a model, ``unregistered(model)``, by path.

    Those where a key has a dot in it are left out: a path cannot say that.

    >>> hidden_parameters(nn.Linear(2, 3), [])
    {}
    """
    beside = list(beside)
    own = {id(parameter) for parameter in model.parameters()} if beside else set()
    found: dict[str, nn.Parameter] = {}
    for path, module in beside:
        for name, parameter in module._parameters.items() if _leads_to(model, path, module) else ():
            if parameter is not None and id(parameter) not in own:
                own.add(id(parameter))
                found[f"{path}.{name}"] = parameter
    return found


def _modules_in(value: Any, depth: int) -> Iterator[tuple[str, nn.Module]]:
    """Modules in nested containers, each with the way to it."""
    if isinstance(value, nn.Module):
        yield "", value
    elif depth and isinstance(value, list | tuple | dict):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            for way, module in _modules_in(item, depth - 1):
                yield f"{key}.{way}" if way else str(key), module


@dataclass(eq=False)
class Held:
    """Containers, and the very items that they held.

    >>> nets = [nn.ReLU(), nn.ReLU()]
    >>> held = Held([], {}).and_in(nets)
    >>> held.changed(), nets.append(nn.ReLU()), held.changed()
    (False, None, True)
    """

    containers: list[tuple[Any, list[Any]]]
    attributes: dict[str, tuple[nn.Module, Any]]  # by path of a plain attribute: whose it is, and what it was

    @staticmethod
    def on_the_way(root: nn.Module, paths: Iterable[str]) -> Held:
        """What lies on the way from ``root`` to unregistered modules: plain containers, and the children of those modules."""
        held, seen = Held([], {}), set()
        for path in paths:
            here: Any = root
            hidden = False
            so_far: list[str] = []
            for part in path.split("."):
                so_far.append(part)
                if isinstance(here, nn.Module) and not hidden and part not in here._modules:
                    hidden = True
                    held.attributes[".".join(so_far)] = (here, vars(here)[part])
                elif hidden and id(here) not in seen:
                    seen.add(id(here))
                    held.and_in(here._modules if isinstance(here, nn.Module) else here)
                here = _item(here, part)
        return held

    def and_in(self, container: Any) -> Held:
        """Also what this container holds."""
        self.containers.append((container, list(_items(container))))
        return self

    def changed(self) -> bool:
        """Does any of them hold something else now?"""
        for path, (owner, value) in self.attributes.items():
            if vars(owner).get(path.rpartition(".")[2]) is not value:
                return True
        return any(len(now) != len(before) or not all(map(is_, _items(now), before)) for now, before in self.containers)


def _leads_to(model: nn.Module, path: str, module: nn.Module) -> bool:
    here: Any = model
    try:
        for part in path.split("."):
            here = _item(here, part)
    except (LookupError, ValueError, StopIteration, TypeError, AttributeError):
        return False
    return here is module


def _items(container: Any) -> Any:
    return container.values() if isinstance(container, dict) else container


def _item(here: Any, part: str) -> Any:
    if isinstance(here, dict):
        return here[part] if part in here else here[next(key for key in here if str(key) == part)]
    if isinstance(here, list | tuple):
        return here[int(part)]
    item: Any = here._modules[part] if part in here._modules else vars(here)[part]
    return item
