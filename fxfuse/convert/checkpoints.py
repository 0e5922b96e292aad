"""Checkpoints by name: ``.safetensors``, and ``.pt`` without running what a pickle says.

Comes in: a path. Goes out: its tensors by name; or the file, for tensors.
"""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxfuse.errors import ConvertError, StateDictError
from fxfuse.private.state_dicts import set_versions, versions_of
from fxfuse.weights.saved_recipes import noted, unpacked

from .archives import TRUST, check_zip
from .packed import read_tensors, save_tensors

_EXTRA = "_extra_state"  # the name under which modules save what is no Parameter and no buffer, of any kind
_WRAPPERS = ("state_dict", "model_state_dict", "model")  # under which training scripts keep it


def read_weights(path: str | os.PathLike[str], *, allow_pickle: bool = False) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name: ``.safetensors``, else a ``torch.save`` file, read weights-only.

    Tensors stay on the disk until they are read, where the format allows that; they come to the CPU. A dict with the state dict under
    ``state_dict`` or ``model`` is opened. Raises ``ConvertError`` for files that are missing, unreadable, truncated or hold pickled code
    (which runs with ``allow_pickle=True``).
    """
    state = read_state(path, allow_pickle=allow_pickle)
    _tensors_only(state, Path(path))
    return state


def read_state(path: str | os.PathLike[str], *, allow_pickle: bool = False) -> OrderedDict[str, Any]:
    """A checkpoint's state dict as ``read_weights`` reads it, with what modules keep as extra state and is no tensor, and with the versions
    of modules where the file knows them."""
    path = Path(path)
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no file" if path.exists() else "not there"
        raise ConvertError(f"{path} is {what}: give a checkpoint, .safetensors or .pt")
    try:
        if path.suffix.lower() == ".safetensors":
            return OrderedDict(read_tensors(path))
        return _named(_load(path, allow_pickle), path)
    except OSError as error:
        raise ConvertError(f"{path} cannot be read: {error.strerror or error}") from error


def write_weights(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a checkpoint: ``.safetensors``, or (by any other ending) as ``torch.save`` does, with the versions of modules that it has."""
    if path.suffix.lower() == ".safetensors":
        save_tensors(tensors, path, {"format": "pt"})
    else:
        state = OrderedDict((name, _dense(value)) for name, value in tensors.items())
        versions = versions_of(tensors)
        if versions is not None:
            set_versions(state, versions)
        torch.save(state, path)


def _dense(tensor: Tensor) -> Tensor:
    """In memory of its own size: of a view torch would save all that it is a view of."""
    alone = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if alone else tensor.clone(memory_format=torch.contiguous_format)


def _load(path: Path, allow_pickle: bool) -> Any:
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"
    if zipped:
        check_zip(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        if not allow_pickle:
            raise ConvertError(f"{path} is no whole checkpoint of tensors only, and its pickle could run code; {TRUST}") from error
    except (OSError, MemoryError):
        raise
    except Exception as error:
        if "data.pkl" in str(error):  # a .pt2, or any other zip
            raise ConvertError(f"{path} is a zip file that holds no checkpoint: give what torch.save(model.state_dict()) wrote") from error
        raise ConvertError(f"{path} is no readable checkpoint ({_line(error)}): is it complete?") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=False, mmap=zipped)
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise ConvertError(f"{path} is no readable checkpoint ({_line(error)}): is it complete?") from error


def original_weights(path: Path) -> OrderedDict[str, Tensor]:
    """The original's tensors by name, of a ``torch.save`` file of a fused model's ``state_dict()``, which carries its recipes.

    It is read weights-only. Raises ``ConvertError`` for a file that is none, or whose recipes are missing, or do not fit.
    """
    found = _unwrapped(_load(path, False))
    _named(found, path)  # looks at it
    if not noted(found):
        raise ConvertError(f"{path} holds no recipes: give a folder or a .safetensors that fxfuse wrote, or torch.save(fused.state_dict())")
    try:
        return unpacked(found)
    except StateDictError as error:
        raise ConvertError(f"{path}: {error}") from error


def _unwrapped(found: Any) -> Any:
    """The state dict in what training scripts save."""
    inner = (found[name] for name in _WRAPPERS if isinstance(found, Mapping) and isinstance(found.get(name), Mapping))
    return next(inner, found)


def _named(found: Any, path: Path) -> OrderedDict[str, Any]:
    if isinstance(found, torch.nn.Module):
        found = found.state_dict()
    found = _unwrapped(found)
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        raise ConvertError(f"{path} holds a {type(found).__name__}, no tensors by name: save model.state_dict()")
    extra = {name: value for name, value in found.items() if name.rpartition(".")[2] == _EXTRA}
    _tensors_only({name: value for name, value in found.items() if name not in extra}, path)
    named = OrderedDict(found)
    versions = versions_of(found)
    if versions is not None:  # by which modules tell how old a checkpoint is
        set_versions(named, versions)
    return named


def _tensors_only(found: Mapping[str, Any], path: Path) -> None:
    odd = next((name for name, value in found.items() if not isinstance(value, Tensor)), None)
    if odd is not None:
        raise ConvertError(f"{path} holds a {type(found[odd]).__name__} under {odd!r}, no tensor: save model.state_dict() alone")


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:300]
