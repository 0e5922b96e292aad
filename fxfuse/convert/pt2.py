"""``.pt2``: a program of torch.export, for processes in which fxfuse is not installed.

Comes in: a fused model; a path. Goes out: the file, and the callable that it holds.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export.graph_signature import ConstantArgument

from fxfuse.errors import ConvertError
from fxfuse.private.pt2_writer import written_in_place

from .inspection import inspect_pt2
from .program import Example, export, register, silent
from .surviving import SurvivingFile


def write_pt2(model: nn.Module, example: Example, path: Path, *, static: bool) -> list[str]:
    """Write the program; what to say of it comes back."""
    notes: list[str] = []
    save(export(model, example, static=static, notes=notes), path)
    return notes


def save(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write an exported program to exactly this path."""
    texts = [spec.arg.value for spec in program.graph_signature.output_specs if isinstance(spec.arg, ConstantArgument)]
    text = next((value for value in texts if isinstance(value, str)), None)
    if text is not None:
        raise ConvertError(f"the model returns the text {text[:40]!r}, which torch.export.load cannot read: return tensors and numbers")
    with silent(), SurvivingFile(path) as file, written_in_place():
        try:
            torch.export.save(program, file)  # type: ignore[arg-type]  # says IO[bytes], and only writes
        except (OSError, MemoryError):
            raise
        except Exception as error:
            file.check()
            unnamed = re.search(r"No registered serialization name for <class '([^']+)'>", str(error))
            if unnamed:
                what = f"the model takes or returns a {unnamed[1]}, which has no name in files"
                raise ConvertError(f"{what}: {register(unnamed[1])}") from error
            reason = next(iter(str(error).splitlines()), "")
            raise ConvertError(f"torch.export cannot save the program ({type(error).__name__}: {reason[:300]})") from error
    file.check()


def load_pt2(path: Path, *, allow_pickle: bool = False) -> nn.Module:
    """The module of a ``.pt2``, called as the original. Raises ``ConvertError`` for a file that is none, or would run code."""
    inspect_pt2(path, allow_pickle=allow_pickle)
    with silent():
        try:
            return _tied(torch.export.load(path).module())
        except MemoryError:
            raise
        except Exception as error:
            reason = next(iter(str(error).splitlines()), "")
            raise ConvertError(f"{path} cannot be loaded ({type(error).__name__}: {reason[:300]}): write it again") from error


def _tied(module: nn.Module) -> nn.Module:
    """Parameters with several names are one each again, trained once: torch.export.load makes one of every name, over one memory."""
    first: dict[Any, nn.Parameter] = {}
    for name, value in list(module.named_parameters(remove_duplicate=False)):
        path, _, own = name.rpartition(".")
        same = first.setdefault((value.data_ptr(), value.dtype, value.shape, value.stride(), value.requires_grad), value)
        if value.numel() and same is not value:
            setattr(module.get_submodule(path), own, same)
    return module
