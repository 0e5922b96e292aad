"""How many bytes the processes of sharded regions move.

Comes in: calls of collectives, as they happen. Goes out: ``Traffic``, their number and bytes by kind. Bytes are those of the result that
each process has afterwards: the gathered tensor, or the sum. On the wire a ring moves ``(n - 1) / n`` of them for a gather and twice that
for a sum, per process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Traffic:
    """Calls and bytes: ``gather`` (lanes leave), ``sum`` (their sum leaves), ``gradients`` (of what enters the lanes, summed), ``weights``
    (gathered for a call or a checkpoint that needs all of them), ``average`` (of gradients over processes with other data)."""

    calls: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)


_open: list[Traffic] = []


@contextmanager
def traffic() -> Iterator[Traffic]:
    """What this process's sharded regions move within the block.

    >>> with traffic() as moved:
    ...     pass
    >>> moved.bytes.total()
    0
    """
    counted = Traffic()
    _open.append(counted)
    try:
        yield counted
    finally:
        _open.remove(counted)


def moved(kind: str, result: Tensor) -> None:
    """Count one collective that gives ``result``."""
    for counted in _open:
        counted.calls[kind] += 1
        counted.bytes[kind] += result.numel() * result.element_size()
