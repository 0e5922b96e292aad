"""Freeze lanes by the original's names.

Comes in: a model, fused or not, and patterns of names. Goes out: the model, in place, with those parameters out of training: bit-equal from
then on, also under weight decay and momentum. A frozen lane of a pack is a part of its own (``fxfuse.optimizers.cut``) with
``requires_grad=False``; optimizers that hold the pack go on with its parts.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

from torch import nn

from fxfuse.errors import ArgumentError

from .models.live_optimizers import holding
from .optimizers.cut import cut
from .optimizers.migrate import collect, place
from .optimizers.places import Place, places
from .running.region import RegionState


def freeze(model: nn.Module, *patterns: str) -> list[str]:
    """Stop training the parameters whose original names match any of ``patterns`` (``*``, ``?``, ``[...]``); returns their names.

    Works before and after the optimizer was made: live optimizers go on with what is left. Copies and saved models stay frozen; a loaded
    state dict changes values only. Freeze before wrapping in DDP or FSDP. Raises ``ArgumentError`` where nothing matches, and
    ``OptimizerError`` where a live optimizer that is not elementwise holds a pack that would have to be cut.

    >>> freeze(nn.Linear(2, 3), "b*")
    ['bias']
    """
    return _set(model, patterns, False)


def unfreeze(model: nn.Module, *patterns: str) -> list[str]:
    """The way back: train these again, with the optimizer state that they had. Arguments, result and errors as of ``freeze``."""
    return _set(model, patterns, True)


def _set(model: nn.Module, patterns: tuple[str, ...], trained: bool) -> list[str]:
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise ArgumentError("freeze needs patterns of original names, as in freeze(fused, 'nets.3.*')")
    found = places(model)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in found):
            known = ", ".join([*found][:4])
            raise ArgumentError(f"no parameter matches {pattern!r}; the names are {known}{', ...' if len(found) > 4 else ''}")
    names = [name for name in found if any(fnmatchcase(name, pattern) for pattern in patterns)]
    cuts = _cuts(found, set(names))
    if cuts:
        holders = {id(where.holder) for where in found.values() if where.recipe is not None and _is_cut(where, cuts)}
        live = [each for each in holding(model) if any(id(p) in holders for group in each.param_groups for p in group["params"])]
        collected = [(each, collect(each, model)) for each in live]
        for state, starts in cuts.values():
            cut(state, starts)
        for optimizer, had in collected:
            place(had, optimizer, model)
    now = places(model)
    for name in names:
        now[name].holder.requires_grad_(trained)
        if not trained:
            now[name].holder.grad = None
    return names


def _cuts(found: dict[str, Place], names: set[str]) -> dict[int, tuple[RegionState, dict[str, list[int]]]]:
    packs: dict[int, list[tuple[int, bool, Place]]] = {}
    for name, where in found.items():
        if where.recipe is not None:
            packs.setdefault(id(where.holder), []).append((where.index, name in names, where))
    cuts: dict[int, tuple[RegionState, dict[str, list[int]]]] = {}
    for lanes in packs.values():
        lanes.sort(key=lambda lane: lane[0])
        starts = [b[0] for a, b in pairwise(lanes) if a[1] != b[1]]
        where = lanes[0][2]
        if starts and where.state is not None and where.recipe is not None:
            cuts.setdefault(id(where.state), (where.state, {}))[1][where.recipe.name] = starts
    return cuts


def _is_cut(where: Place, cuts: dict[int, Any]) -> bool:
    return where.state is not None and where.recipe is not None and where.recipe.name in cuts.get(id(where.state), (None, {}))[1]


