"""What a region knows of the processes that share its lanes.

Comes in: what ``shard_lanes`` decided. Goes out: ``Sharding``, which lies in the region's state, and its sentences for the report.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False)
class Sharding:
    """One region's lanes over ``world`` processes: this one is number ``rank`` of them.

    ``sharded``: packed names of which each process holds its share; ``whole``: those that stay whole, and why; ``gathered``: those of
    ``sharded`` that programs gather at each call, and why. ``moved``: what one forward moves: ("gather", "sum" or "weights", shape; None is
    a size that is free).
    """

    world: int
    rank: int
    sharded: frozenset[str]
    whole: dict[str, str] = field(default_factory=dict)
    gathered: dict[str, str] = field(default_factory=dict)
    moved: list[tuple[str, tuple[int | None, ...], int]] = field(default_factory=list)  # and bytes of an element

    def __deepcopy__(self, memo: dict[int, Any]) -> Sharding:
        return self

    def sentences(self) -> list[str]:
        """For the report."""
        number = len(self.sharded) - len(self.gathered)
        lines = [f"lanes are divided among {self.world} processes: of {number} packed tensors each process holds its lanes"]
        if not self.sharded:
            lines = [f"lanes stay whole on each of {self.world} processes"]
        for kind, shape, size in self.moved:
            fixed = size
            for n in shape:
                fixed *= 1 if n is None else n
            said = " x ".join("rows" if n is None else str(n) for n in shape) or "one number"
            per = " per row" if None in shape else ""
            does = {"gather": "gathers", "sum": "sums", "weights": "gathers weights"}[kind]
            lines.append(f"forward {does} {said} over processes: {fixed} bytes{per}")
        lines += [f"{name} is held in shares, and gathered at each call: {reason}" for name, reason in self.gathered.items()]
        lines += [f"{name} stays whole on every process: {reason}" for name, reason in self.whole.items()]
        return lines
