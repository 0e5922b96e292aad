"""Packages compiled by AOTInductor.

Private by their names: ``torch._inductor.aot_compile`` and ``aoti_load_package``, ``_package_aoti_files`` and
``PT2ArchiveWriter`` of ``torch.export.pt2_archive._package``.
"""

from __future__ import annotations

import functools
import gc
import os
import sys
from typing import Any

import torch


@functools.cache
def mapping_writer() -> Any:
    """The class of writers that map the files that they copy into the archive; torch's own reads each whole, twice.

    None in a torch that has no such writer, or keeps it elsewhere. (Imported here: all else of ``fxfuse.convert`` works there.)
    """
    try:
        from torch.export.pt2_archive._package import PT2ArchiveWriter, _package_aoti_files  # noqa: F401  # both are needed
    except ImportError:
        return None

    class MappingWriter(PT2ArchiveWriter):
        def write_file(self, name: str, file_path: str) -> None:
            size = os.path.getsize(file_path)
            if not size:
                super().write_file(name, file_path)
                return
            mapped: Any = torch.UntypedStorage.from_file(file_path, False, size)
            self.archive_file.write_record(name, mapped, size)

    return MappingWriter


def compile_package(program: torch.export.ExportedProgram, path: str | os.PathLike[str]) -> None:
    """Compile an exported program for this machine and write the package; the path has to end in ``.pt2``.

    In two steps, as ``torch._inductor.aoti_compile_and_package`` does in one: the weights that the first has serialized are let go before
    the second reads its files. They are appended to the machine code: through the linker they would be there once more.
    """
    from torch._inductor import aot_compile
    from torch.export.pt2_archive._package import _package_aoti_files

    args, kwargs = program.example_inputs
    graph = program.module(check_guards=False)
    options = {"aot_inductor.package": True, "aot_inductor.force_mmap_weights": sys.platform != "win32"}
    files = aot_compile(graph, args, kwargs, options=options)
    del graph
    gc.collect()
    with mapping_writer()(os.fspath(path)) as writer:
        _package_aoti_files(writer, files)  # type: ignore[arg-type]


def load_package(path: str | os.PathLike[str]) -> Any:
    """The callable in a package. Its machine code runs."""
    return torch._inductor.aoti_load_package(os.fspath(path))
