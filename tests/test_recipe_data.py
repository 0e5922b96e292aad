"""Recipes as JSON, and back: the same recipe, or a sentence."""

import json

import pytest

from fxfuse.errors import FxfuseError
from fxfuse.graph import Recipe
from fxfuse.weights.recipe_data import recipe_from_data, recipe_to_data

RECIPES = [
    Recipe("packed.w", ("0.w", "1.w"), (3, 5), (1, 0), "cat"),
    Recipe("packed.w", ("0.w", "1.w"), (3, 5), (0, 1), "stack", "buffer", False),
    Recipe("packed.s", ("0.s", "1.s"), (), (), "stack"),
    Recipe("packed.w", ("0.w", "1.w"), (3, 5), (0, 1), "rows", own_shapes=((3, 5), (4, 5))),
    Recipe("packed.w", ("0.w", "1.w"), (4, 6), (1, 0), "padded", own_shapes=((3, 6), (4, 5)), requires_grad=False),
    Recipe("packed.w", ("0.w", "1.w"), (3, 5), (0, 1), "stack", own_shapes=((3, 5), (3, 5, 1))),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: f"{recipe.style}-{len(recipe.shape)}")
def test_a_recipe_comes_back_from_json(recipe):
    back = recipe_from_data(json.loads(json.dumps(recipe_to_data(recipe))))
    assert back == recipe
    assert hash(back) == hash(recipe)


GOOD = recipe_to_data(RECIPES[0])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"style": "exec"}, "corrupt"),
        ({"members": "ab"}, "corrupt"),
        ({"members": []}, "no members"),
        ({"members": ["a", 3]}, "corrupt"),
        ({"name": None}, "corrupt"),
        ({"shape": [3, "5"]}, "sizes"),
        ({"shape": [3, -5]}, "sizes"),
        ({"shape": [True, 5]}, "sizes"),
        ({"order": [0, 0]}, "orders dims"),
        ({"kind": "module"}, "corrupt"),
        ({"requires_grad": 1}, "neither true nor false"),
        ({"own_shapes": [[3, 5]], "style": "padded"}, "each of its 2 members"),
        ({"own_shapes": [[3, 5]], "style": "cat"}, "each of its 2 members"),
        ({"own_shapes": 3}, "sizes"),
        ({"colour": "red"}, "does not know"),
        ({"style": "rows"}, "rows"),
    ],
)
def test_a_corrupt_recipe_is_refused_with_a_sentence(change, said):
    with pytest.raises(FxfuseError, match=said):
        recipe_from_data({**GOOD, **change})


@pytest.mark.parametrize("name", ["name", "members", "shape", "order", "style"])
def test_a_recipe_that_lacks_something_is_refused(name):
    with pytest.raises(FxfuseError, match=f"no {name}"):
        recipe_from_data({key: value for key, value in GOOD.items() if key != name})


def test_something_else_is_refused():
    with pytest.raises(FxfuseError, match="list came"):
        recipe_from_data([GOOD])
