"""Calls that give the same arguments in another way: ``f(x=x)`` for ``f(x, mask=None)``.

Comes in: a forward, how many arguments the recorded call gave by position and which by name, and the same of another call. Goes out: where
each argument of the recorded call is found in the other. Worked out once for each way of calling; then a call takes a microsecond, and
torch.compile can trace it, which it cannot do for ``inspect.signature``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Default:
    """An argument that the call leaves to its default."""

    value: Any


Place = int | str | Default  # by position, by name


@dataclass(frozen=True, eq=False)
class Spelling:
    """Where the arguments of the recorded call are in calls of another form."""

    positional: tuple[Place, ...]
    named: tuple[tuple[str, Place], ...]
    left_out: tuple[tuple[Place, Any], ...]  # given although the recorded call left them to this default

    def respelled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """The call as it was recorded; None where it gives another value than the recorded call's defaults."""
        for place, default in self.left_out:
            if _at(place, args, kwargs) is not default:
                return None
        return tuple([_at(place, args, kwargs) for place in self.positional]), {n: _at(place, args, kwargs) for n, place in self.named}


def _at(place: Place, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[place] if isinstance(place, int) else kwargs[place] if isinstance(place, str) else place.value


def spelling_of(forward: Callable[..., Any], recorded: tuple[int, Sequence[str]], called: tuple[int, Sequence[str]]) -> Spelling | None:
    """How a call (so many arguments by position, these names) gives what the recorded one did; ``forward`` takes ``self`` first.
    None where it is another call, or ``forward`` takes any number of arguments.

    >>> def forward(self, x, mask=None): ...
    >>> spelling_of(forward, (2, []), (0, ["x"])).respelled((), {"x": 5})
    ((5, None), {})
    >>> spelling_of(forward, (1, []), (1, ["mask"])).respelled((5,), {"mask": 6}) is None
    True
    """
    count, names = recorded
    places: dict[str, Place] = {name: name for name in called[1]}
    try:
        signature = inspect.signature(forward)
        bound = signature.bind(None, *range(called[0]), **places)
    except (TypeError, ValueError):
        return None
    parameters = signature.parameters
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters.values()):
        return None
    order = list(parameters)[1:]
    first = order[:count]
    if len(first) < count or set(first) & set(names) or not set(names) <= set(order):
        return None
    found: dict[str, Place] = {name: bound.arguments.get(name, Default(parameters[name].default)) for name in order}
    left_out = [name for name in order if name not in first and name not in names and name in bound.arguments]
    return Spelling(
        tuple(found[name] for name in first),
        tuple((name, found[name]) for name in names),
        tuple((found[name], parameters[name].default) for name in left_out),
    )


class Spellings:
    """Of each form of a call that came, its ``Spelling`` or None; each is an attribute of its own, so that dynamo guards that one alone."""

    def look_up(
        self, forward: Callable[..., Any], recorded: tuple[int, Sequence[str]], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Work out what is not known yet."""
        form = _form(args, kwargs)
        if not hasattr(self, form):
            setattr(self, form, spelling_of(forward, recorded, (len(args), tuple(kwargs))))

    def of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Spelling | None:
        """What was worked out."""
        found: Spelling | None = getattr(self, _form(args, kwargs), None)
        return found


def _form(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    return f"{len(args)} {' '.join(kwargs)}"
