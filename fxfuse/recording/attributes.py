"""Attributes that forward sets on modules: what was computed, kept to be looked at (``self.attention = scores``).

Comes in: a model about to be recorded, and which of its attributes an earlier recording saw change. Goes out: on the trace, every write of
them and every read, in order (``Touch``). What is written before it is read says nothing of the call before: a program gives it as one more
result and sets it afterwards. What is read first is state: the calls that read or write it stay calls of their own.

The watch is a descriptor on the module's class, which Python asks before it looks into the instance; the value lies where it always lay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from inspect import getattr_static
from typing import Any

import torch
from torch import nn

from fxfuse.models.containers import opened
from fxfuse.private.pytree import tree_flatten

from .sizes import SizeOf, SizeOp
from .trace import Frame, Key, Ref, Touch, Trace

_MISSING = object()
_PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, SizeOf, SizeOp)


class _Watching:
    """Stands on a class for the attribute ``name`` of its instances; tells of those in ``paths`` (by id)."""

    def __init__(self, name: str, before: Any, paths: dict[int, str], tell: Callable[[str, str, bool, Any], None]) -> None:
        self.name, self.before, self.paths, self.tell = name, before, paths, tell

    def __get__(self, module: Any, cls: Any = None) -> Any:
        if module is None:
            return self._of_class(module, cls)
        if id(module) in self.paths:
            self.tell(self.paths[id(module)], self.name, False, None)
        own = module.__dict__
        return own[self.name] if self.name in own else self._of_class(module, cls)

    def _of_class(self, module: Any, cls: Any) -> Any:
        if self.before is _MISSING:
            raise AttributeError(self.name)
        get = getattr(type(self.before), "__get__", None)
        return self.before if get is None else get(self.before, module, cls)

    def __set__(self, module: Any, value: Any) -> None:
        if id(module) in self.paths:
            self.tell(self.paths[id(module)], self.name, True, value)
        module.__dict__[self.name] = value

    def __delete__(self, module: Any) -> None:
        if id(module) in self.paths:
            self.tell(self.paths[id(module)], self.name, True, self)  # no value that a program could set
        if self.name not in module.__dict__:
            raise AttributeError(self.name)
        del module.__dict__[self.name]


@contextmanager
def watching(modules: dict[str, nn.Module], keys: Iterable[Key], tell: Callable[[str, str, bool, Any], None]) -> Iterator[None]:
    """Within, ``tell(path, name, is_write, value)`` is called for every read and write of these attributes."""
    by_class: dict[tuple[Any, str], dict[int, str]] = {}
    for path, name in keys:
        if path in modules:
            by_class.setdefault((type(modules[path]), name), {})[id(modules[path])] = path
    installed: list[tuple[Any, str, Any]] = []
    try:
        for (cls, name), paths in by_class.items():
            before = getattr_static(cls, name, _MISSING)
            if hasattr(type(before), "__set__"):
                continue  # a property: what it does is its own
            own = vars(cls).get(name, _MISSING)
            try:
                setattr(cls, name, _Watching(name, before, paths, tell))
            except (AttributeError, TypeError):
                continue
            installed.append((cls, name, own))
        yield
    finally:
        for cls, name, own in installed:
            if own is _MISSING:
                delattr(cls, name)
            else:
                setattr(cls, name, own)


def settle(trace: Trace, describe: Callable[[Any], Any], final: dict[Key, Any]) -> set[Key]:
    """After the run: say what each write wrote, and close the calls that keep state. The keys that only their writes explain.

    ``final``: what the attributes that changed hold at the end. Containers are described as they are then: ``self.maps = []`` comes before
    what is appended.
    """
    last = {touch.key: touch.value for touch in trace.touches if touch.write}
    explained = {key for key, value in final.items() if key in last and last[key] is value}
    written: set[Key] = set()
    state: set[Key] = set()
    for touch in trace.touches:
        if touch.write:
            written.add(touch.key)
            flat, touch.spec = tree_flatten(opened(touch.value))
            leaves = [describe(leaf) for leaf in flat]
            if all(_can_be_set(trace, leaf) for leaf in leaves):
                touch.leaves = leaves
            else:
                state.add(touch.key)
            touch.value = None
        elif touch.key not in written:
            state.add(touch.key)
    for touch in trace.touches:
        if touch.key in state and touch.frame >= 0:
            frame = trace.frames[touch.frame]
            if not frame.poison:
                how = "changes" if touch.write or touch.key in written else "reads what another call changes:"
                frame.poison, frame.place = f"forward {how} self.{touch.name}", touch.place or frame.place
    return explained


def _can_be_set(trace: Trace, leaf: Any) -> bool:
    if isinstance(leaf, Ref):
        return trace.values[leaf.value].origin in ("made", "input")
    return isinstance(leaf, _PLAIN)


def touches_in(trace: Trace, frame: Frame) -> list[Touch]:
    """The touches made in a call, and in calls inside it."""
    return [touch for touch in trace.touches if inside(trace, touch.frame, frame.index)]


def inside(trace: Trace, at: int, outer: int) -> bool:
    """Is the call ``at`` the call ``outer``, or made in it?"""
    while at >= 0 and at != outer:
        at = trace.frames[at].parent
    return at == outer


@contextmanager
def attributes_kept(model: nn.Module, keys: Iterable[Key]) -> Iterator[None]:
    """Afterwards these attributes are what they were: a trial run leaves none of its tensors with the model."""
    before: list[tuple[dict[str, Any], str, Any]] = []
    for path, name in keys:
        own = model.get_submodule(path).__dict__
        before.append((own, name, own.get(name, _MISSING)))
    try:
        yield
    finally:
        for own, name, value in before:
            if value is _MISSING:
                own.pop(name, None)
            else:
                own[name] = value
