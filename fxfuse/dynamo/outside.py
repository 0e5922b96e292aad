"""Packs that are made outside of the compiled graph: in which form, and whose members can lie in them.

Comes in: a recipe of the rewritten graph. Goes out: the recipe of the pack that is handed to the compiled graph, whether the user's
Parameters could become views of it, and whether that is worth it.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fxfuse.graph import Recipe
from fxfuse.weights.shared import lie_in_rows

# A pack of so many members, or bytes, is worth sharing memory for. ``benchmarks/share_or_stack.py`` on a CPU: looking at members where
# they lie is never slower than stacking them in inference (8 of 128 bytes 0.9 of its time, 64 of 4 KiB 0.65, 16 of 64 KiB 0.2); in
# training its fixed cost of some 15 us outweighs the copy below 256 KiB or so, and is 1 % of a call. Stacked members are inputs of the
# compiled graph each, which Inductor compiles for: no difference at 8 lanes (14 against 15 s cold), 27 against 17 s at 32. Below these
# bounds nothing is gained, and the user's memory stays where it is.
SHARED_MEMBERS = 8
SHARED_BYTES = 1 << 18


def members_lie_whole(form: Recipe) -> bool:
    """Could every member be a view of the pack that lies as it did? Not between the zeros that fill up smaller ones."""
    return form.style != "padded" and lie_in_rows(form)


def worth_sharing(form: Recipe, members: Sequence[Tensor]) -> bool:
    """Is looking at the members where they lie better than stacking them at every call?"""
    size = sum(member.numel() * member.element_size() for member in members)
    return members_lie_whole(form) and (len(members) >= SHARED_MEMBERS or size >= SHARED_BYTES)
