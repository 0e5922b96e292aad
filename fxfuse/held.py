"""Objects that a model holds and passes on (configurations of features): a copy of the model holds, and passes on, copies of them.

Comes in: the model that was recorded, and the guard of a program. Goes out: the guard with each such object named by where the model
holds it (``Held``), and, in a copy of the model, the object at that place (``Kept``). What is at one place in the recorded model is
at the same place in every copy; equal attributes would not do, because such objects may hold modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .graph import Guard, Program

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
_SKIPPED = frozenset(vars(nn.Module()))
_DEEPEST = 6  # containers inside of containers that are looked into
_DEEPEST_SEEN = 3  # objects inside of objects whose attributes are compared at a call
_MOST_SEEN = 100  # attributes of one
_MOST = 100_000  # objects that are looked at, in one model


@dataclass(frozen=True)
class Held:
    """Stands in a guard for the object that the model holds at this place."""

    module: str
    attribute: str
    keys: tuple[Any, ...] = ()  # into dicts, lists and tuples


@dataclass
class Kept:
    """An object that a guard asks for, and its attributes when the program was installed.

    >>> held = slice(1)
    >>> Kept.of(held).holds(held), Kept.of(held).holds(slice(1))
    (True, False)
    """

    value: Any
    attributes: dict[str, Any]

    @staticmethod
    def of(value: Any) -> Kept:
        """The object as it is now."""
        return Kept(value, {name: _seen(inner, _DEEPEST_SEEN) for name, inner in getattr(value, "__dict__", {}).items()})

    def holds(self, given: Any) -> bool:
        """Is ``given`` this object, with the attributes that it had?"""
        if given is not self.value:
            return False
        now, before = getattr(given, "__dict__", {}), self.attributes
        return len(now) == len(before) and all(name in now and _same(now[name], value) for name, value in before.items())


@dataclass(frozen=True, eq=False)
class _Seen:
    """A container or an object among the attributes, and what was in it."""

    value: Any
    inside: dict[Any, Any]


def _inside(value: Any) -> dict[Any, Any] | None:
    """What a container or an object holds, by key; None for what stands for itself."""
    if isinstance(value, (*_PLAIN, nn.Module, torch.Tensor, type)) or callable(value):
        return None
    if isinstance(value, dict):
        return value
    if isinstance(value, (list, tuple)):
        return dict(enumerate(value))
    return getattr(value, "__dict__", None)


def _seen(value: Any, depth: int) -> Any:
    inside = _inside(value) if depth else None
    if inside is None or len(inside) > _MOST_SEEN:
        return value
    return _Seen(value, {key: _seen(item, depth - 1) for key, item in inside.items()})


def _same(now: Any, before: Any) -> bool:
    if type(before) is _Seen:
        inside = _inside(now) or {}
        return now is before.value and inside.keys() == before.inside.keys() and all(_same(inside[k], v) for k, v in before.inside.items())
    return now is before or (type(now) is type(before) and isinstance(before, _PLAIN) and bool(now == before))


def kept(program: Program) -> Program:
    """The program, its guard asking of a caller's own objects that they are what they were."""
    leaves = tuple(
        (leaf[0], Kept.of(leaf[1])) if isinstance(leaf, tuple) and type(leaf[1]) is not Held and _inside(leaf[1]) is not None else leaf
        for leaf in program.guard.leaves
    )
    return replace(program, guard=replace(program.guard, leaves=leaves))


class Places:
    """Where a model holds its objects, looked up by identity."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = set(model.modules())
        self.found: dict[int, tuple[Any, Held]] = {}
        for path, module in model.named_modules():
            for name, value in vars(module).items():
                if name not in _SKIPPED and len(self.found) < _MOST:
                    self._look(value, Held(path, name))

    def _look(self, value: Any, held: Held) -> None:
        if isinstance(value, (*_PLAIN, nn.Module, torch.Tensor, type)) or id(value) in self.found:
            return
        self.found[id(value)] = value, held
        for key, item in _items(value) if len(held.keys) < _DEEPEST else ():
            self._look(item, replace(held, keys=(*held.keys, key)))

    def named(self, program: Program) -> Program:
        """The program, its guard asking for objects by where this model holds them."""
        leaves = tuple(self._leaf(leaf) for leaf in program.guard.leaves)
        same = all(a is b for a, b in zip(leaves, program.guard.leaves, strict=True))
        return program if same else replace(program, guard=replace(program.guard, leaves=leaves))

    def _leaf(self, leaf: Any) -> Any:
        value = leaf[1] if isinstance(leaf, tuple) else None
        found = self.found.get(id(value))
        if found is None or found[0] is not value or callable(value) or not self._follows(value, set()):
            return leaf
        return (leaf[0], found[1])

    def _follows(self, value: Any, seen: set[int]) -> bool:
        """False where a program may have read tensors out of the object by another way than the modules of the model."""
        if isinstance(value, nn.Module):
            return value in self.modules
        if isinstance(value, torch.Tensor):
            return False
        if isinstance(value, (*_PLAIN, type)) or id(value) in seen:
            return True
        seen.add(id(value))
        inside = [*getattr(value, "__dict__", {}).values(), *(item for _, item in _items(value))]
        return len(seen) < _MOST and all(self._follows(item, seen) for item in inside)


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict):
        yield from ((key, item) for key, item in value.items() if isinstance(key, (str, int)))
    elif isinstance(value, (list, tuple)):
        yield from enumerate(value)


def objects_in(model: nn.Module, programs: list[Program]) -> dict[Held, Kept]:
    """The objects that the guards of ``programs`` ask for, as ``model`` holds them."""
    found: dict[Held, Kept] = {}
    for held in {leaf[1] for program in programs for leaf in program.guard.leaves if _names_held(leaf)}:
        try:
            value: Any = getattr(model.get_submodule(held.module), held.attribute)
            for key in held.keys:
                value = value[key]
        except (AttributeError, KeyError, IndexError, TypeError):
            continue  # this copy holds it elsewhere: the guard misses
        found[held] = Kept.of(value)
    return found


def resolved(program: Program, objects: dict[Held, Kept]) -> Program:
    """The program, its guard asking for the objects themselves."""
    if not any(_names_held(leaf) for leaf in program.guard.leaves):
        return program
    leaves = tuple((leaf[0], objects.get(leaf[1], leaf[1])) if _names_held(leaf) else leaf for leaf in program.guard.leaves)
    guard: Guard = replace(program.guard, leaves=leaves)
    return replace(program, guard=guard)


def _names_held(leaf: Any) -> bool:
    return isinstance(leaf, tuple) and isinstance(leaf[1], Held)
