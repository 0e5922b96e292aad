"""Recipes as data: what JSON holds of them, and back.

Comes in: ``graph.Recipe``. Goes out: a dict of strings, numbers and lists, in which a recipe is saved beside packed weights, and the recipe
that such a dict describes, checked: a file is written by anybody.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from fxfuse.errors import FxfuseError
from fxfuse.graph import Recipe

from .recipes import check

_STYLES = ("stack", "cat", "rows", "padded")
_KINDS = ("parameter", "buffer")
_NEEDED = ("name", "members", "shape", "order", "style")


def recipe_to_data(recipe: Recipe) -> dict[str, Any]:
    """A recipe as a dict that ``json.dumps`` takes; what is as by default is left out.

    >>> recipe_to_data(Recipe("packed.w", ("0.w", "1.w"), (3, 5), (1, 0), "cat"))
    {'name': 'packed.w', 'members': ['0.w', '1.w'], 'shape': [3, 5], 'order': [1, 0], 'style': 'cat'}
    """
    data: dict[str, Any] = {}
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        if field.name in _NEEDED or value != field.default:
            data[field.name] = _listed(value)
    return data


def recipe_from_data(data: Any) -> Recipe:
    """The recipe that ``recipe_to_data`` wrote. Raises ``FxfuseError`` for anything else.

    >>> recipe = Recipe("packed.w", ("0.w", "1.w"), (3,), (0,), "rows", own_shapes=((3,), (4,)))
    >>> recipe_from_data(recipe_to_data(recipe)) == recipe
    True
    """
    if not isinstance(data, dict):
        raise FxfuseError(f"a saved recipe is a table of names, a {type(data).__name__} came")
    known = {field.name for field in dataclasses.fields(Recipe)}
    odd = [str(name) for name in data if name not in known]
    lacking = [name for name in _NEEDED if name not in data]
    if odd or lacking:
        what = f"no {lacking[0]}" if lacking else f"{odd[0]}, which this version of fxfuse does not know"
        raise FxfuseError(f"a saved recipe has {what}")
    name, members, style, kind = data["name"], data["members"], data["style"], data.get("kind", "parameter")
    if not isinstance(name, str) or not _all(members, str) or style not in _STYLES or kind not in _KINDS:
        raise FxfuseError("a saved recipe is corrupt: its name, members, style or kind is of no such type")
    own = data.get("own_shapes")
    if not _sizes(data["shape"]) or not _sizes(data["order"]) or not (own is None or (isinstance(own, list) and all(map(_sizes, own)))):
        raise FxfuseError(f"the saved recipe of {name} is corrupt: its shapes are no lists of sizes")
    if type(data.get("requires_grad", True)) is not bool:
        raise FxfuseError(f"the saved recipe of {name} is corrupt: requires_grad is neither true nor false")
    recipe = Recipe(**{name: _tupled(value) for name, value in data.items()})
    if own is not None and (len(own) != len(members) or style == "cat"):
        raise FxfuseError(f"the saved recipe of {name} is corrupt: it needs the shape of each of its {len(members)} members")
    check(recipe)
    return recipe


def _all(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


def _sizes(value: Any) -> bool:
    return _all(value, int) and all(size >= 0 for size in value)


def _listed(value: Any) -> Any:
    return [_listed(item) for item in value] if isinstance(value, tuple) else value


def _tupled(value: Any) -> Any:
    return tuple(_tupled(item) for item in value) if isinstance(value, list) else value
