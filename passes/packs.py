"""What is packed: the recipes that all programs of a region share.

Comes in: names of weights. Goes out: ``Packs``, which knows in which pack each is, and how a new one is called.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from fxfuse.graph import Recipe


@dataclass
class Packs:
    """The weights packed so far, shared by all programs of one region."""

    recipes: dict[tuple[str, ...], Recipe] = field(default_factory=dict)
    where: dict[str, tuple[Recipe, int]] = field(default_factory=dict)  # member -> its recipe and lane
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    unpackable: dict[str, str] = field(default_factory=dict)  # member -> why it must stay as it is
    kinds: dict[str, Literal["parameter", "buffer"]] = field(default_factory=dict)  # of the members that may be packed
    holder: str = "packed"
    members_stay: bool = False  # Parameters of their own, whose gradients are parts of the pack's
    in_own_order: bool = False  # these lie in the pack as they are read; else whoever makes the pack orders it

    def stored(self, order: tuple[int, ...]) -> tuple[int, ...]:
        """The order in which a pack is stored that is read in ``order``: this one, but where members lie in it, which tools flatten."""
        return tuple(range(len(order))) if self.in_own_order else order

    def name(self, members: tuple[str, ...]) -> str:
        """A readable name for the pack: the members' common path, without the part that differs from lane to lane."""
        split = [member.split(".") for member in members]
        width = min(len(parts) for parts in split)
        common = [
            parts[0] for parts in zip(*(s[:width] for s in split), strict=True) if len(set(parts)) == 1
        ]  # fmt: skip
        last = split[0][-1]
        if not common or common[-1] != last:
            common.append(last)
        base = ".".join([self.holder, *common])
        taken = {recipe.name for recipe in self.recipes.values()}
        name, count = base, 1
        while name in taken or any(t.startswith(name + ".") or name.startswith(t + ".") for t in taken):
            count += 1
            stem = [str(count)] if len(common) == 1 else [*common[:-2], f"{common[-2]}_{count}"]
            name = ".".join([self.holder, *stem, last])
        return name
