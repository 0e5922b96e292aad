"""A folder with all of it: ``model.pt2``, ``weights.safetensors``, ``recipes.json``, ``report.json``, ``report.txt``.

Comes in: a fused model; a folder. Goes out: the files; the program, with the folder's weights in it; the original's checkpoint.
The weights may be trained further, in the program's own names, and saved over ``weights.safetensors``.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fxfuse.errors import ConvertError
from fxfuse.store import get_report

from .checkpoints import original_weights, write_weights
from .manifest import original_of, stored_as
from .packed import TensorFile, read_manifest, write_packed
from .program import Example

MODEL, WEIGHTS, RECIPES = "model.pt2", "weights.safetensors", "recipes.json"


def write_folder(model: nn.Module, example: Example, path: Path, *, static: bool) -> list[str]:
    """Write all files; what to say of them comes back."""
    from .pt2 import write_pt2  # here: ``restore`` needs none of torch's exporters

    path.mkdir(exist_ok=True)
    notes = write_pt2(model, example, path / MODEL, static=static)
    manifest = write_packed(model, path / WEIGHTS)
    (path / RECIPES).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    report = get_report(model)
    (path / "report.json").write_text(report.to_json() + "\n", encoding="utf-8")
    (path / "report.txt").write_text(f"{report}\n", encoding="utf-8")
    return notes


def load_folder(path: Path, *, allow_pickle: bool = False) -> nn.Module:
    """The program of a folder, with the weights that lie beside it."""
    from .pt2 import load_pt2

    if not (path / MODEL).is_file():
        raise ConvertError(f"{path} is no folder that fxfuse wrote: it has no {MODEL}")
    if not (path / WEIGHTS).is_file():  # those in the program may be older
        raise ConvertError(f"{path} has no {WEIGHTS}: put it there again, or load {path / MODEL}, with the weights of its conversion")
    module = load_pt2(path / MODEL, allow_pickle=allow_pickle)
    _copy_into(module.state_dict(), TensorFile(path / WEIGHTS), path)
    return module


def _copy_into(own: dict[str, Tensor], weights: TensorFile, path: Path) -> None:
    manifest = _manifest(path)
    names: dict[str, list[str]] = {}
    for name, value in own.items():
        stored = stored_as(manifest, name, weights)
        if weights.shapes.get(stored) != tuple(value.shape):
            raise ConvertError(f"{path / WEIGHTS} does not fit {MODEL}: {name} is missing or of another shape")
        names.setdefault(stored, []).append(name)
    for stored, start, part in weights.parts():
        for name in names.get(stored, ()):
            (own[name][start : start + len(part)] if part.ndim else own[name]).copy_(part)


def restore(folder: str | Path, out: str | Path) -> None:
    """Write the packed weights of a folder (or one ``.safetensors``, or ``torch.save(fused.state_dict())``) as the original's, bit for bit.

    ``out`` ends in ``.safetensors`` or ``.pt``. Names, order, shapes, tied names and (in a ``.pt``) the versions of modules are the
    original's, dtypes those of the packed weights. Raises ``ConvertError`` where the folder was not written by fxfuse, or its weights do
    not fit its recipes.
    """
    folder, out = Path(folder), Path(out)
    if folder.is_dir() and not os.access(folder, os.R_OK | os.X_OK):
        raise ConvertError(f"{folder} cannot be read: no permission")
    if out.suffix.lower() not in (".safetensors", ".pt"):
        raise ConvertError(f"{out} must end in .safetensors or .pt")
    weights = folder / WEIGHTS if folder.is_dir() else folder
    if not weights.is_file():
        what = f"has no {WEIGHTS}" if folder.is_dir() else "is no file" if folder.exists() else "is not there"
        raise ConvertError(f"{folder} {what}: give a folder or a .safetensors that fxfuse wrote, or a .pt of fused.state_dict()")
    state = _original(folder, weights)
    if not state:
        raise ConvertError(f"{folder} names no tensor of the original: its model has no weights, or its recipes are not whole")
    write_weights(state, out)


def _original(folder: Path, weights: Path) -> OrderedDict[str, Tensor]:
    if weights.suffix.lower() in (".pt", ".pth"):
        return original_weights(weights)
    manifest = _manifest(folder)
    if manifest is None:
        raise ConvertError(f"{folder} holds no recipes: give a folder or a .safetensors that fxfuse wrote")
    return original_of(manifest, TensorFile(weights), copied=True)


def _manifest(folder: Path) -> Any:
    """Of ``recipes.json``, which stays when the weights beside it are written anew; else the one in the weights."""
    if folder.is_dir() and (folder / RECIPES).is_file():
        try:
            return json.loads((folder / RECIPES).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConvertError(f"{folder / RECIPES} cannot be read: {error.strerror or error}") from error
        except ValueError as error:
            raise ConvertError(f"{folder / RECIPES} cannot be read ({error}): write the folder again") from error
    return read_manifest(folder / WEIGHTS if folder.is_dir() else folder)
