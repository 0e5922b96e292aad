"""Random numbers that decide nothing: ``if random.uniform(0, 1) < self.layerdrop`` where ``layerdrop`` is 0.

Comes in: calls of ``random.random`` and ``random.uniform`` while a model is recorded. Goes out: numbers that are drawn only where somebody
needs to know them. A comparison with a bound that the range of the draw decides needs not: whatever is drawn, its outcome is the same, and
nothing was drawn that a recording could depend on. Any other use draws the number, and is seen as a draw.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_lock = threading.Lock()
_here = threading.local()  # .recording: how many recordings this thread is in; other threads draw as they always did
_random, _uniform = random.random, random.uniform
_recordings = 0


class Drawn:
    """A number between ``low`` and ``high`` that is not drawn yet; a float in every other respect that Python knows.

    What is written in C and asks for the type itself does not take it: such a run is recorded again, without.

    >>> Drawn(lambda: 0.5, 0.0, 1.0) < 0.0, Drawn(lambda: 0.5, 0.0, 1.0) > 2, Drawn(lambda: 0.5, 0.0, 1.0) + 1
    (False, False, 1.5)
    """

    def __init__(self, draw: Callable[[], float], low: float, high: float) -> None:
        self.draw, self.low, self.high = draw, low, high
        self.value: float | None = None

    def number(self) -> float:
        """The number itself, drawn now."""
        if self.value is None:
            self.value = self.draw()
        return self.value

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return float

    def __getattr__(self, name: str) -> Any:
        return getattr(self.number(), name)

    def __lt__(self, other: Any) -> Any:
        return self._compared(other, False, lambda bound: bound <= self.low, lambda bound: bound > self.high, "__lt__")

    def __le__(self, other: Any) -> Any:
        return self._compared(other, False, lambda bound: bound < self.low, lambda bound: bound >= self.high, "__le__")

    def __gt__(self, other: Any) -> Any:
        return self._compared(other, True, lambda bound: bound < self.low, lambda bound: bound >= self.high, "__gt__")

    def __ge__(self, other: Any) -> Any:
        return self._compared(other, True, lambda bound: bound <= self.low, lambda bound: bound > self.high, "__ge__")

    def _compared(self, other: Any, below: bool, is_below: Any, is_above: Any, name: str) -> Any:
        """``below``: the outcome with a bound below every number that can be drawn; above all of them it is the other."""
        if type(other) in (int, float):
            if is_below(other):
                return below
            if is_above(other):
                return not below
        return getattr(self.number(), name)(other.number() if type(other) is Drawn else other)


def _forwarded(name: str) -> Callable[..., Any]:
    def method(self: Drawn, *args: Any) -> Any:
        return getattr(self.number(), name)(*(arg.number() if type(arg) is Drawn else arg for arg in args))

    return method


for _name in dir(float):
    if callable(getattr(float, _name)) and _name not in Drawn.__dict__ and _name not in (
        "__new__", "__init__", "__getattribute__", "__setattr__", "__delattr__", "__init_subclass__", "__subclasshook__", "__dir__",
        "__class__", "__getformat__", "__setformat__", "fromhex", "from_number",
    ):  # fmt: skip
        setattr(Drawn, _name, _forwarded(_name))


def _lazy_random() -> Any:
    return Drawn(_random, 0.0, 1.0) if getattr(_here, "recording", 0) else _random()


def _lazy_uniform(a: Any, b: Any) -> Any:
    plain = type(a) in (int, float) and type(b) in (int, float) and a <= b
    return Drawn(lambda: _uniform(a, b), a, b) if plain and getattr(_here, "recording", 0) else _uniform(a, b)


@contextmanager
def idle_draws_unseen(wanted: bool = True) -> Iterator[None]:
    """Within, if that is ``wanted``, ``random.random()`` and ``random.uniform(a, b)`` of this thread draw only where somebody asks."""
    global _recordings
    if not wanted:
        yield
        return
    with _lock:
        _recordings += 1
        random.random, random.uniform = _lazy_random, _lazy_uniform
    _here.recording = getattr(_here, "recording", 0) + 1
    try:
        yield
    finally:
        _here.recording -= 1
        with _lock:
            _recordings -= 1
            if not _recordings and random.random is _lazy_random:
                random.random = _random
            if not _recordings and random.uniform is _lazy_uniform:
                random.uniform = _uniform
