"""``write`` and ``load``: by the ending of the path.

Comes in: a fused model, an example call, a path. Goes out: what was written; what was read, as a callable.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from fxfuse.errors import ConvertError

from .kinds import Written, kind_of, size_of
from .packed import write_packed
from .program import Example


def write(
    fused: nn.Module,
    original: nn.Module | None,
    example: Example,
    out: str | os.PathLike[str],
    *,
    static: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Written:
    """Write a model that ``fxfuse.optimize`` returned, in the mode (train or eval) that it is in, to exactly ``out``.

    Args:
        fused: the model; it stays as it is, and what is written shares nothing with it.
        original: not needed any more (None): what is exported is ``fused``.
        example: ``(args, kwargs)``, as the model is called. Its data are not used, its shapes and dtypes are.
        out: by its ending ``.pt2`` (torch.export), ``.onnx``, ``.safetensors`` (packed weights and recipes), ``.aoti.pt2`` (compiled by
            AOTInductor), else a folder with model, weights, recipes and the report.
        static: for the example's batch size only. Else dim 0 of every tensor with as many rows as the first one is free.
        progress: called with the name of each step before it begins.

    Raises ``ConvertError`` where the model cannot be written so, ``MissingPackageError`` where a package is missing, OSError of the disk.
    """
    path, kind = Path(out), kind_of(Path(out))
    (progress or _silent)({"aoti": "compiling", "safetensors": "writing"}.get(kind, "exporting"))
    notes: list[str] = []
    if kind == "safetensors":
        write_packed(fused, path)
    else:
        notes = _door(kind, "write")(fused, example, path, static=static)
    return Written(path, kind, size_of(path), notes)


def load(path: str | os.PathLike[str], *, allow_pickle: bool = False) -> Any:
    """The callable in a file or folder that ``write`` wrote, with the original's call signature.

    A ``.pt2`` that would run code when it is loaded (pickles in its weights, constants or sample inputs, expressions in its program),
    and compiled code (``.aoti.pt2``), is refused unless ``allow_pickle``. Raises ``ConvertError``, also for files that are missing,
    truncated or foreign, and for ``.safetensors``, which hold no program.
    """
    path, kind = Path(path), kind_of(Path(path))
    if not path.exists():
        raise ConvertError(f"{path} is not there")
    if path.is_dir() != (kind == "folder"):
        what = "a folder" if path.is_dir() else "a file"
        raise ConvertError(f"{path} is {what}: load reads .pt2, .onnx, .aoti.pt2, or a folder that fxfuse wrote")
    if kind == "safetensors":
        raise ConvertError(f"{path} holds weights and no program: fxfuse restore writes them as the original's checkpoint, for --weights")
    try:
        return _door("onnx", "load")(path) if kind == "onnx" else _door(kind, "load")(path, allow_pickle=allow_pickle)
    except OSError as error:
        raise ConvertError(f"{path} cannot be read: {error.strerror or error}") from error


def _door(kind: str, what: str) -> Callable[..., Any]:
    """``write_pt2`` and its like. Imported now: torch's exporters, and the compiler that they bring, take 80 MB and a second."""
    found: Callable[..., Any] = getattr(importlib.import_module(f".{kind}", __package__), f"{what}_{kind}")
    return found


def _silent(step: str) -> None:
    """For callers who do not want to be told."""
