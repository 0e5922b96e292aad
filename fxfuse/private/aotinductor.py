"""Packages compiled by AOTInductor.

Private by its name: ``torch._inductor.aoti_compile_and_package`` and ``aoti_load_package``, which the documentation of torch names.
"""

from __future__ import annotations

import os
from typing import Any

import torch


def compile_package(program: torch.export.ExportedProgram, path: str | os.PathLike[str]) -> None:
    """Compile an exported program for this machine and write the package; the path has to end in ``.pt2``."""
    torch._inductor.aoti_compile_and_package(program, package_path=os.fspath(path))


def load_package(path: str | os.PathLike[str]) -> Any:
    """The callable in a package. Its machine code runs."""
    return torch._inductor.aoti_load_package(os.fspath(path))
