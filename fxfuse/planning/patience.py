"""How long one call of ``optimize`` searches for faster forms: seconds, not minutes, however long a step of the model takes.

Comes in: that a search begins and ends, and what it leaves untimed. Goes out: whether the time is up. The forms found so far stay; every
form that is chosen is still held against the loop, which is no search.
"""

from __future__ import annotations

import time
from types import TracebackType

# Of all regions together. Small models take 1 to 5 of them.
SECONDS = 30.0


class Patience:
    """A number of seconds, which run while it is entered as a context."""

    def __init__(self, seconds: float | None = None) -> None:
        self.seconds = self.left = SECONDS if seconds is None else seconds
        self.untimed = 0  # candidates, about
        self._since: float | None = None

    def __enter__(self) -> Patience:
        self._since = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._since is not None
        self.left -= time.perf_counter() - self._since
        self._since = None

    @property
    def over(self) -> bool:
        """Is the time up?"""
        return self.left - (0.0 if self._since is None else time.perf_counter() - self._since) <= 0.0

    def fact(self) -> str | None:
        """A sentence for the report where something was left out."""
        if not self.untimed:
            return None
        what = "candidate was" if self.untimed == 1 else "candidates were"
        return f"the search for faster forms took its {self.seconds:g} s: about {self.untimed} {what} not timed"
