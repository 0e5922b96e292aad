"""A checkpoint into a model, a part of it at a time: every key must fit.

Comes in: a model, on the meta device or not; the path of a checkpoint. Goes out: the model with the checkpoint's values. A large file is
mapped anew for every part of it, so that what was read does not stay in memory beside the model.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxfuse.convert.packed import PART
from fxfuse.private.state_dicts import set_versions, versions_of

from .failure import CommandError, said


def load_weights(model: nn.Module, path: str, allow_pickle: bool) -> None:
    """Load a checkpoint into the model; every key must fit. Raises ``CommandError``.

    Values are copied into the model's own tensors, in its dtypes, as ``load_state_dict`` does it: who else holds these sees them, also
    where they were on the meta device. Tied ones stay tied.
    """
    from fxfuse import convert

    def read() -> dict[str, Tensor]:
        return convert.read_weights(Path(path), allow_pickle=allow_pickle)

    state = read()
    own = model.state_dict(keep_vars=True)
    misfits = _misfits(own, state)
    if misfits:
        raise CommandError(f"{path} does not fit the model: {misfits}")
    parts = [list(state)] if _loads_in_its_own_way(model) else list(_parts(state, list(own)))
    meta = {name: value for name, value in own.items() if isinstance(value, Tensor) and value.is_meta}
    tied, dtypes = _tied(meta), {name: value.dtype for name, value in meta.items()}
    copied = [[name for name in names if name not in dtypes] for names in parts]
    versions = versions_of(state)
    del own, meta, state

    def load(values: dict[str, Tensor], *, assign: bool = False) -> None:
        given = OrderedDict(values)
        if versions is not None:
            set_versions(given, versions)
        model.load_state_dict(given, strict=False, assign=assign)

    try:
        made: dict[str, Tensor] = {}
        for names in parts if dtypes else ():
            state = read()
            made.update((name, state[name].to(dtypes[name], copy=True)) for name in names if name in dtypes)
            del state
        if made:  # all at once: a module that finds one of its tensors missing may make up another
            _fill(load, made, model, tied)
        for names in filter(None, copied):
            state = read()
            load({name: state[name] for name in names})
            del state
    except CommandError:
        raise
    except Exception as error:
        raise CommandError(f"{path} cannot be loaded into the model: {said(error)}") from None


def _fill(load: Callable[..., None], values: dict[str, Tensor], model: nn.Module, tied: list[list[str]]) -> None:
    """Give tensors of the meta device their values: within the very tensors, so that whoever else holds them has these too."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        load(values, assign=True)
        return
    except RuntimeError as error:
        if "swap" not in str(error):
            raise
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    load(values, assign=True)  # somebody holds a weak reference: other tensors take their places, tied where those were
    for names in tied:
        _tie(model, names)


def _loads_in_its_own_way(model: nn.Module) -> bool:
    """Does a module of it load by hooks, or by code of its own? These have to see the whole checkpoint at once."""
    for module in model.modules():
        hooks = vars(module).get("_load_state_dict_pre_hooks"), vars(module).get("_load_state_dict_post_hooks")
        own = [cls for cls in type(module).__mro__ if "_load_from_state_dict" in vars(cls)]
        if any(hooks) or not own[0].__module__.startswith("torch.nn."):
            return True
    return False


def _parts(state: Mapping[str, Tensor], order: list[str]) -> Iterator[list[str]]:
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
        size += state[name].nbytes if state[name].layout is torch.strided else 0
        module = prefix
    yield part


def _tied(own: Mapping[str, Any]) -> list[list[str]]:
    """The names of one tensor, where it has several (what a module saves as its extra state is no name of it)."""
    names: dict[int, list[str]] = {}
    for name, value in own.items():
        names.setdefault(id(value), []).append(name)
    return [each for each in names.values() if len(each) > 1 and not any(name.endswith("_extra_state") for name in each)]


def _tie(model: nn.Module, names: list[str]) -> None:
    """One tensor under all names again: the last one's, which is what copying into the one tensor would have left in it."""
    *others, last = [(model.get_submodule(path), name) for path, _, name in (each.rpartition(".") for each in names)]
    for module, name in others:
        setattr(module, name, getattr(*last))


def _misfits(own: Mapping[str, Any], state: Mapping[str, Tensor]) -> str:
    """Which keys and shapes are others than the model's, in a few words."""
    missing = [name for name in own if name not in state]
    unknown = [name for name in state if name not in own]
    shapes = [
        f"{name} is {list(state[name].shape)}, the model has {list(own[name].shape)}"
        for name in own
        if name in state and isinstance(own[name], Tensor) and own[name].shape != state[name].shape
    ]
    parts = []
    if missing:
        parts.append(f"it lacks {_few(missing)}")
    if unknown:
        parts.append(f"it has {_few(unknown)}, unknown to the model")
    if shapes:
        parts.append(_few(shapes))
    prefixes = {name.split(".")[0] for name in unknown}
    if missing and len(unknown) == len(state) and len(prefixes) == 1 and {n.partition(".")[2] for n in unknown} & set(missing):
        parts.append(f"its names begin with {prefixes.pop()}.: save the state dict of the inner model")
    return "; ".join(parts)


def _few(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
