"""The architectures of transformers: every configuration class and the first model class that is made from it.

Comes in: the package's own tables. Goes out: ``Subject``s. Each is shrunk until it builds with few parameters and a call runs in float64;
if it never does, in float32. Nothing is downloaded.
"""

from __future__ import annotations

import functools
import inspect
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from census.inputs import Recipe, recipes
from census.shrink import attempts, small
from census.subject import Inputs, Prepared, Subject, Tell
from zoo.registry import as_double, randomized, silence

MOST_PARAMETERS = 40_000_000
MOST_SECONDS = 2.0  # of one forward
MOST_SEARCH = 8.0  # for sizes that fit
DTYPE = re.compile(r"dtype|[Ff]loat|[Dd]ouble|BFloat|scalar type")
ROWS, LENGTH = 3, 7


def subjects() -> list[Subject]:
    """All of them, by name; two names of one model and configuration are one."""
    import transformers.models.llama.modeling_llama  # what all models need is loaded once, not in the process of each
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    assert transformers
    tables = [getattr(modeling_auto, name) for name in vars(modeling_auto) if name.startswith("MODEL_") and name.endswith("MAPPING_NAMES")]
    models: dict[str, str] = {}
    for table in sorted(tables, key=lambda table: table is not modeling_auto.MODEL_MAPPING_NAMES):
        for name, classes in table.items():
            models.setdefault(name, classes if isinstance(classes, str) else classes[0])
    found: dict[tuple[str, str], Subject] = {}
    for name, model in sorted(models.items()):
        if name in CONFIG_MAPPING_NAMES:
            found.setdefault((CONFIG_MAPPING_NAMES[name], model), Subject(name, "transformers", functools.partial(_prepare, name, model)))
    return list(found.values())


def _prepare(name: str, model: str, tell: Tell) -> Prepared:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    configuration, cls = CONFIG_MAPPING[name], getattr(transformers, model, None) or _class(name, model)
    tell({"model": model})
    said, built = "", False
    start = time.perf_counter()
    for label, config in _configurations(configuration):
        if time.perf_counter() - start > MOST_SEARCH:
            break
        if isinstance(config, Exception):
            said = said or _said(config)
            continue
        heard = ""
        for dtype, experts in ((torch.float64, None), (torch.float64, "eager"), (torch.float32, None)):
            if heard and not DTYPE.search(heard):
                break
            config._experts_implementation = experts
            build = functools.partial(_build, cls, config, dtype)
            try:
                with torch.device("meta"):
                    parameters = sum(p.numel() for p in cls(config).parameters())
                if parameters > MOST_PARAMETERS:
                    raise LookupError(f"{parameters:,} parameters")
                made = build()
            except Exception as error:  # somebody's constructor, with sizes it was not made for
                said = said if built else _said(error)
                break
            built = True
            tell({"built": True})
            recipe = _first(made, dtype, recipes(made))
            if isinstance(recipe, Recipe):
                names = [name for name, _ in recipe.chosen]
                facts = {"ran": True, "shrink": label, "dtype": str(dtype), "parameters": parameters, "inputs": names}
                return Prepared(build, functools.partial(_inputs, recipe, dtype), facts, _others(made, recipe, dtype))
            heard = recipe
            said = recipe or said
    raise LookupError(said or "no configuration was made")


def _class(name: str, model: str) -> Any:
    import importlib

    from transformers.models.auto.configuration_auto import model_type_to_module_name

    return getattr(importlib.import_module(f"transformers.models.{model_type_to_module_name(name)}"), model)


def _configurations(cls: type) -> Iterator[tuple[str, Any]]:
    """Each shrink that gives something new; an exception where a configuration refuses its sizes."""
    seen: set[str] = set()
    for label, groups in attempts():
        try:
            config = small(cls, groups)
            text = repr(config)
        except Exception as error:
            yield label, error
            continue
        if text not in seen:
            seen.add(text)
            yield label, config


def _build(cls: Callable[[Any], nn.Module], config: Any, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = randomized(cls(config))
    silence(model)
    model.requires_grad_(True)
    return (as_double(model) if dtype is torch.float64 else model).train()


def _inputs(recipe: Recipe, dtype: torch.dtype, rows: int, length: int, seed: int) -> Inputs:
    made = recipe.make(rows, length, seed)
    return (), {name: value.to(dtype) if value.is_floating_point() else value for name, value in made.items()}


def _others(model: nn.Module, recipe: Recipe, dtype: torch.dtype) -> tuple[Callable[[], Inputs], ...]:
    """A call in which the last words of the first row are padding, and one that asks for all hidden states, where forward takes these."""
    def masked() -> Inputs:
        args, kwargs = _inputs(recipe, dtype, ROWS, LENGTH, 6)
        mask = torch.ones(kwargs["input_ids"].shape, dtype=torch.int64)
        mask[0, -2:] = 0
        return args, {**kwargs, "attention_mask": mask}

    def states() -> Inputs:
        args, kwargs = _inputs(recipe, dtype, ROWS, LENGTH, 7)
        return args, {**kwargs, "output_hidden_states": True}

    names = [name for name, _ in recipe.chosen]
    taken = inspect.signature(type(model).forward).parameters
    masks = "attention_mask" in taken and "input_ids" in names and "attention_mask" not in names
    lists = "output_hidden_states" in taken or any(p.kind is p.VAR_KEYWORD for p in taken.values())
    return (*([masked] if masks else []), *([states] if lists else []))


def _first(model: nn.Module, dtype: torch.dtype, tried: Iterator[Recipe]) -> Recipe | str:
    """The first recipe that the model answers, in both modes; else what it said to the first."""
    said = ""
    for recipe in tried:
        try:
            _, kwargs = _inputs(recipe, dtype, ROWS, LENGTH, 0)
            for training in (True, False):
                start = time.perf_counter()
                with torch.no_grad():
                    out = model.train(training)(**kwargs)
                if any(torch.isnan(leaf).any() for leaf in tree_flatten(out)[0] if isinstance(leaf, torch.Tensor)):
                    raise ArithmeticError("gives nan")
                if time.perf_counter() - start > MOST_SECONDS:
                    return "a forward takes too long"
        except Exception as error:  # whatever a model says to arguments that it does not like
            said = said or _said(error)
            continue
        return recipe
    return said


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
