"""``.aoti.pt2``: a package compiled by AOTInductor, where there is a C++ compiler.

Comes in: a fused model; a path. Goes out: the package; the callable in it. The package holds machine code, which loading it runs.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxfuse.errors import ConvertError
from fxfuse.private.aotinductor import compile_package, load_package, mapping_writer

from .archives import check_zip
from .program import Example, export, silent

_written: set[str] = set()  # by this process: what it compiled itself it may load


def write_aoti(model: nn.Module, example: Example, path: Path, *, static: bool) -> list[str]:
    """Compile and write. Raises ``ConvertError`` where there is no compiler, torch lacks the writer, or it fails."""
    wanted = os.environ.get("CXX", "g++")
    if not (shutil.which(wanted) or shutil.which("clang++")):
        raise ConvertError(f"AOTInductor needs a C++ compiler, and {wanted} is not there: install one, or write a .pt2")
    if mapping_writer() is None:
        raise ConvertError(f"torch {torch.__version__} has no writer for packages of AOTInductor that fxfuse knows: write a .pt2")
    notes: list[str] = []
    program = export(model, example, static=static, notes=notes)
    with silent():
        try:
            compile_package(program, path)
        except (OSError, MemoryError):
            raise
        except Exception as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), "")
            raise ConvertError(f"AOTInductor cannot compile the model ({type(error).__name__}: {reason[:300]}): write a .pt2") from error
    _written.add(_digest(path))
    return [*notes, "for this kind of processor and this version of torch"]


def load_aoti(path: Path, *, allow_pickle: bool = False) -> Any:
    """The compiled model. It is machine code: refused unless ``allow_pickle``, or written by this very process."""
    names = check_zip(path)
    if not any("/aotinductor/" in name for name in names):
        raise ConvertError(f"{path} is no package of AOTInductor: write it again")
    if not allow_pickle and _digest(path) not in _written:
        raise ConvertError(f"{path} holds machine code, which loading runs; allow_pickle=True (--allow-pickle) runs it")
    with silent():
        try:
            return load_package(path)
        except Exception as error:
            reason = next(iter(str(error).splitlines()), "")
            raise ConvertError(f"{path} cannot be loaded ({type(error).__name__}: {reason[:300]}): write it again") from error


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
