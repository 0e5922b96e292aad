"""One module during a recorded run, and the way back.

Comes in: a module. Goes out: ``WatchedModule``: its forward reports to the recorder, its hooks are off; afterwards attributes and
containers are as they were, and what the run had changed is named.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from functools import partial
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from fxfuse.private.module_hooks import HOOK_DICTS

from .assigned import WatchedBuffers, assigned_names
from .outside import is_generator
from .recorder import Recorder
from .torch_calls import PLAIN

_USUAL = frozenset(name for name, value in nn.Module().__dict__.items() if value == {} or value == set()) - {"_parameters", "_modules"}
_usual = itemgetter(*sorted(_USUAL))
_STORES = frozenset(nn.Module().__dict__)


class WatchedModule:
    """One module during a run: its forward reports to the recorder, its hooks are off; afterwards everything is as it was."""

    __slots__ = ("empty", "filled", "hooks", "module", "objects", "path", "values", "watched")

    def __init__(self, path: str, module: nn.Module, attributes: dict[int, str], generators: list[Any], watched: bool) -> None:
        self.path, self.module, self.watched = path, module, watched  # watched: assignments to its buffers are noted
        own = module.__dict__
        self.values = dict(own)
        self.empty: list[Any] = []  # containers
        usual: frozenset[str] = frozenset()  # containers that every module has and that are empty in most
        if own.keys() >= _USUAL and not any(found := _usual(own)):
            usual = _USUAL
            self.empty.extend(found)
        self.filled: list[tuple[str, Any, Any]] = []  # containers, and copies of them
        self.hooks: list[str] = []
        self.objects: list[tuple[str, Any]] = []  # what may hold more than is compared here: objects, containers of containers
        for name, value in own.items():
            kind = type(value)
            if kind in PLAIN or name in usual:
                continue
            if kind is OrderedDict or kind is dict or kind is set or isinstance(value, (list, dict, set, deque)):
                if not value:
                    self.empty.append(value)
                elif name in HOOK_DICTS:
                    self.hooks.append(name)
                else:
                    self.filled.append((name, value, kind(value) if kind in (dict, list, set) else list(_items(value))))
                    if name == "_parameters" or name == "_buffers":
                        for key, tensor in value.items():
                            if tensor is not None:
                                attributes.setdefault(id(tensor), f"{path}.{key}" if path else key)
            elif isinstance(value, Tensor):
                attributes.setdefault(id(value), f"{path}.{name}" if path else name)
            elif is_generator(value):
                generators.append(value)
            if name not in _STORES and not isinstance(value, (Tensor, nn.Module)):
                self.objects.append((name, value))

    def start(self, recorder: Recorder) -> None:
        own = self.module.__dict__
        if self.watched:
            own["_buffers"] = WatchedBuffers(own["_buffers"], partial(recorder.assign, self.path))
        if self.hooks:
            recorder.hooked.add(id(self.module))
        for name in self.hooks:
            own[name] = type(own[name])()
        if not isinstance(self.module, torch.jit.ScriptModule):
            replaced = own.get("forward")
            forward = type(self.module).forward.__get__(self.module) if replaced is None else replaced
            poison = "" if replaced is None else "its forward was replaced on the instance"
            watched = own["forward"] = partial(recorder.enter, self.path, self.module, forward, poison)
            watched.__wrapped__ = forward  # type: ignore[attr-defined]  # for inspect.signature(self.forward)

    def stop(self) -> tuple[str, dict[str, Any], set[str]]:
        """Put everything back. What else than an attribute was changed (a container, a Parameter), or nothing; the attributes; the names
        of registered buffers that were set. Of these, what the record explains is no change."""
        own, values = self.module.__dict__, self.values
        changed = ""
        attributes: dict[str, Any] = {}
        assigned: set[str] = set()
        watched = own.get("_buffers")
        if isinstance(watched, WatchedBuffers):
            assigned = set(assigned_names(watched, values["_buffers"]))
            changed = watched.unexplained()
            own["_buffers"] = values["_buffers"]
        for name in self.hooks:
            own[name] = values[name]
        if "forward" in values:
            own["forward"] = values["forward"]
        else:
            own.pop("forward", None)
        if len(own) != len(values) or not all(map(is_, own.values(), values.values())):
            attributes.update((name, value) for name, value in own.items() if values.get(name, values) is not value)
            attributes.update((name, None) for name in values.keys() - own.keys())
            own.clear()
            own.update(values)  # also in their order
        if any(self.empty):
            for name, value in values.items():
                if any(value is container for container in self.empty) and value:
                    changed = _changed_name(name, value, ())
                    value.clear()
        for name, value, before in self.filled:
            if not _same_items(value, before):
                if name == "_buffers":
                    assigned.update(assigned_names(value, dict(before)))
                changed = _changed_name(name, value, before)
                value.clear()
                getattr(value, "extend" if isinstance(value, (list, deque)) else "update")(before)
        return changed, attributes, assigned


def _items(container: Any) -> Any:
    return container.items() if isinstance(container, dict) else container


def _same_items(container: Any, before: Any) -> bool:
    """Does ``container`` hold the very objects that it held?"""
    if len(container) != len(before):
        return False
    if type(before) is dict:  # as they lie, which is as they were unless something changed
        return all(map(is_, container, before)) and all(map(is_, container.values(), before.values()))
    if type(before) is set:
        return all(item in before for item in container)
    if isinstance(container, dict):
        return all(key is a and value is b for (key, value), (a, b) in zip(container.items(), before, strict=True))
    return all(map(is_, container, before))


def _changed_name(name: str, container: Any, before: Any) -> str:
    """Of what is registered (a Parameter, a buffer, a submodule) its own name."""
    if name not in ("_parameters", "_buffers", "_modules"):
        return name
    old = dict(before)
    return next((key for key in {**container, **old} if container.get(key, container) is not old.get(key, old)), name)
