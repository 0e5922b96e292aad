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

from fxfuse.graph import Guard, Program

from .module_tree import all_modules, named_modules

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
_SKIPPED = frozenset(vars(nn.Module()))
_DEEPEST = 6  # containers inside of containers that are looked into
_WATCHED = 3  # containers inside of an object, in which a change is noticed
_LARGE = 256  # items of one of them; in larger ones it is not
_MOST = 100_000  # objects that are looked at, in one model


@dataclass(frozen=True)
class Held:
    """Stands in a guard for the object that the model holds at this place."""

    module: str
    attribute: str
    keys: tuple[Any, ...] = ()  # into dicts, lists and tuples


@dataclass
class Kept:
    """An object that a guard asks for, and what was in it when the program was installed. ``or_equal``: an equal one is as good.

    >>> held = slice(1)
    >>> Kept.of(held).holds(held), Kept.of(held).holds(slice(1))
    (True, False)
    """

    value: Any
    inside: dict[tuple[Any, ...], Any]
    or_equal: bool = False

    @staticmethod
    def of(value: Any, or_equal: bool = False) -> Kept:
        """The object as it is now."""
        return Kept(value, dict(_inside(value, (), _WATCHED)), or_equal)

    def holds(self, given: Any) -> bool:
        """Is ``given`` this object, with the attributes that it had?"""
        if given is not self.value and not (self.or_equal and _equal(given, self.value)):
            return False
        count = 0
        for place, now in _inside(given, (), _WATCHED):
            count += 1
            before = self.inside.get(place, self)
            if not _same(now, before) and (given is self.value or not _equal(now, before)):
                return False
        return count == len(self.inside)


def _inside(value: Any, place: tuple[Any, ...], depth: int) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """What lies in an object, by place: attributes, the items of containers, the numbers of an array."""
    if type(value).__module__ == "numpy" and hasattr(value, "tobytes"):
        yield (*place, "numbers"), value.tobytes()
        return
    items = [*getattr(value, "__dict__", {}).items(), *_items(value)]
    for key, item in items if len(items) <= _LARGE or not place else ():
        yield (*place, key), item
        if depth and not isinstance(item, (*_PLAIN, torch.Tensor, nn.Module, type)) and not callable(item):
            yield from _inside(item, (*place, key), depth - 1)


def _equal(one: Any, other: Any) -> bool:
    try:
        return type(one) is type(other) and bool(one == other)
    except Exception:  # a value whose equality is not a bool is not known to be equal
        return False


def _same(now: Any, before: Any) -> bool:
    return now is before or (type(now) is type(before) and isinstance(before, _PLAIN) and bool(now == before))


class Places:
    """Where a model holds its objects, looked up by identity."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = set(all_modules(model))
        self.found: dict[int, tuple[Any, Held]] = {}
        for path, module in named_modules(model):
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
        if isinstance(value, (*_PLAIN, torch.Tensor)) or callable(value) or not isinstance(leaf, tuple):
            return leaf
        if found is None or found[0] is not value or not self._follows(value, set()):
            return (leaf[0], Kept.of(value, or_equal=True)) if _changeable(value) else leaf
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


def held_by_caller(program: Program) -> Program:
    """The program, its guard asking of the objects that callers hold that they are what they were."""

    def kept(leaf: Any) -> Any:
        if not isinstance(leaf, tuple) or isinstance(leaf[1], Kept) or not _changeable(leaf[1]):
            return leaf
        return leaf[0], Kept.of(leaf[1], or_equal=True)

    return replace(program, guard=replace(program.guard, leaves=tuple(kept(leaf) for leaf in program.guard.leaves)))


def _changeable(value: Any) -> bool:
    return hasattr(value, "__dict__") or (type(value).__module__ == "numpy" and hasattr(value, "tobytes"))


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
