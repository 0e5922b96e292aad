"""Warnings of trial runs, unheard, in this thread alone.

Comes in: nothing. Goes out: ``quiet``: a context in which this thread warns of nothing. ``warnings.catch_warnings`` would not do: it
replaces the filters of the whole process, so that other threads' warnings are lost meanwhile, and where two threads leave it in another
order than they entered, one of them leaves the other's filters behind for good.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class _Here:
    """Stands where a warnings filter has the pattern of its message: it matches all that one thread says, until it is over."""

    def __init__(self) -> None:
        self.thread: int | None = threading.get_ident()

    def match(self, text: str) -> bool:
        return self.thread == threading.get_ident()


@contextmanager
def quiet(category: type[Warning] = Warning) -> Iterator[None]:
    """Within, warnings of this thread are dropped, whatever the filters say.

    >>> with quiet():
    ...     warnings.warn("unheard", stacklevel=1)
    """
    filters: list[Any] = warnings.filters  # type: ignore[assignment]
    here = _Here()
    entry = ("ignore", here, category, None, 0)
    filters.insert(0, entry)
    try:
        yield
    finally:
        here.thread = None  # somebody may have copied the list meanwhile, and put the copy back later: there it matches nothing any more
        now: list[Any] = warnings.filters  # type: ignore[assignment]
        for known in (filters, now):
            for at in [at for at, each in enumerate(known) if each is entry]:
                del known[at]
