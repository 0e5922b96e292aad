"""A checkpoint into a model, a part of it at a time: every key must fit.

Comes in: a model, on the meta device or not; the path of a checkpoint. Goes out: the model with the checkpoint's values. A large file is
mapped anew for every part of it, so that what was read does not stay in memory beside the model.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxfuse.convert.checkpoints import read_state
from fxfuse.convert.packed import PART
from fxfuse.private.state_dicts import set_versions, versions_of

from .failure import CommandError, said
from .meta import Given, few
from .misfits import dtypes_apart, misfits, shapes_apart


def load_weights(model: nn.Module, path: str, allow_pickle: bool) -> None:
    """Load a checkpoint into the model; every key must fit. Raises ``CommandError``.

    Values are copied into the model's own tensors, in its dtypes, as ``load_state_dict`` does it: who else holds these sees them, also
    where they were on the meta device. Tied ones stay tied. Where modules load in ways of their own (hooks, extra state), torch says what
    fits: they may rename, convert, and keep what is no tensor.
    """

    def read() -> OrderedDict[str, Any]:
        return read_state(Path(path), allow_pickle=allow_pickle)

    state = read()
    own = model.state_dict(keep_vars=True)
    ways = _own_ways(model)
    plain = {name: value for name, value in own.items() if not any(not way or name.startswith(f"{way}.") for way in ways)}
    _check(path, own, plain, state, bool(ways))
    parts = [list(state)] if ways else list(_parts(state, list(own)))
    versions = versions_of(state)
    del own, plain, state
    try:
        given = Given(model)
        for names in parts:
            state = read()
            part = OrderedDict((name, state[name]) for name in names)
            if versions is not None:
                set_versions(part, versions)
            missing, unknown = _load(model, part)
            if ways and (missing or unknown):
                raise CommandError(f"{path} does not fit the model: {misfits(missing, unknown, has=len(state))}")
            del state, part
        left = given.unwritten(model)
    except CommandError:
        raise
    except Exception as error:
        raise CommandError(f"{path} cannot be loaded into the model: {said(error)}") from None
    if left:
        raise CommandError(f"{path} leaves {few(left)} without values, which the model has on the meta device: make it with memory")


def _check(path: str, own: Mapping[str, Any], plain: Mapping[str, Any], state: Mapping[str, Any], ways: bool) -> None:
    """Raise ``CommandError`` where what loads as torch loads it, ``plain``, does not fit."""
    found = misfits(
        [name for name in own if name not in state] if not ways else (),
        [name for name in state if name not in own] if not ways else (),
        shapes_apart(plain, state), has=len(state),
    )  # fmt: skip
    if found:
        raise CommandError(f"{path} does not fit the model: {found}")
    odd = next((name for name in plain if isinstance(plain[name], Tensor) and not isinstance(state.get(name, plain[name]), Tensor)), None)
    if odd is not None:
        raise CommandError(f"{path} holds a {type(state[odd]).__name__} under {odd!r}, no tensor: save model.state_dict() alone")
    dtypes = dtypes_apart(plain, state)
    if dtypes:
        raise CommandError(f"{path} holds numbers of another kind than the model: {few(dtypes)}; convert them first, or give another file")


def _load(model: nn.Module, state: OrderedDict[str, Any]) -> tuple[list[str], list[str]]:
    """What was missing and what unknown, by torch."""
    if type(model).load_state_dict is not nn.Module.load_state_dict:
        model.load_state_dict(state)
        return [], []
    found = model.load_state_dict(state, strict=False)
    return list(found.missing_keys), list(found.unexpected_keys)


_PLAIN = ("_load_from_state_dict", "get_extra_state", "set_extra_state")  # as torch.nn has them; modules may have their own


def _own_ways(model: nn.Module) -> list[str]:
    """The paths of modules that load by hooks, or by code of their own. These have to see the whole checkpoint at once."""
    found = []
    for path, module in model.named_modules():
        hooks = vars(module).get("_load_state_dict_pre_hooks"), vars(module).get("_load_state_dict_post_hooks")
        names = _PLAIN if path else (*_PLAIN, "load_state_dict")
        owners = [next(cls for cls in type(module).__mro__ if name in vars(cls)) for name in names]
        if any(hooks) or not all(owner.__module__.startswith("torch.nn.") for owner in owners):
            found.append(path)
    return found


def _parts(state: Mapping[str, Any], order: list[str]) -> Iterator[list[str]]:
    """The names, in the model's order and in parts of about ``PART`` bytes; those of one module are not parted."""
    part: list[str] = []
    size = 0
    module = None
    for name in order:
        prefix = name.rpartition(".")[0]
        if part and size >= PART and prefix != module:
            yield part
            part, size = [], 0
        part.append(name)
        value = state[name]
        size += value.nbytes if isinstance(value, Tensor) and value.layout is torch.strided else 0
        module = prefix
    yield part
