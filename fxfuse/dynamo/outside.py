"""Packs that are made outside of the compiled graph: in which form, and whose members can lie in them.

Comes in: a recipe of the rewritten graph. Goes out: the recipe of the pack that is handed to the compiled graph, and whether the user's
Parameters may become views of it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from fxfuse.graph import Recipe


def outside_form(recipe: Recipe) -> Recipe:
    """The recipe of the same members, each in its own layout."""
    style: Literal["stack", "rows", "padded"] = "stack" if recipe.style == "cat" else recipe.style
    return replace(recipe, order=tuple(range(len(recipe.shape))), style=style)


def members_lie_whole(form: Recipe) -> bool:
    """Could every member be a view of the pack that lies as it did? Not between the zeros that fill up smaller ones."""
    return form.style != "padded" and not (form.style == "rows" and any(shape[1:] != form.shape[1:] for shape in form.own_shapes or ()))
