"""What the census asks of a subject, and what it hears while a subject is examined."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Tell = Callable[[dict[str, Any]], None]  # facts found so far: they survive a subject that crashes or never ends


@dataclass(frozen=True)
class Prepared:
    """A model that runs: ``build()`` gives equal models each time, ``inputs(rows, length, seed)`` the arguments of a call."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int, int, int], Inputs]
    facts: dict[str, Any] = field(default_factory=dict)
    others: tuple[Callable[[], Inputs], ...] = ()  # calls with other arguments than the example's


@dataclass(frozen=True)
class Subject:
    """``prepare`` finds a small form of it that runs; raises ``LookupError`` where there is none."""

    name: str
    kind: str
    prepare: Callable[[Tell], Prepared]
