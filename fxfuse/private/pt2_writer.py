"""Weights of a ``.pt2`` written from where they lie.

Private: ``_get_raw_tensor_bytes`` and ``PT2ArchiveWriter`` of ``torch.export.pt2_archive._package``, with which ``torch.export.save`` makes
a ``bytes`` of each tensor's memory before it writes it: a pack that is most of a model would be in memory twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


class _Memory:
    """A tensor's storage, in the place of its bytes."""

    def __init__(self, tensor: Tensor) -> None:
        self.storage = tensor.cpu().untyped_storage()


@contextlib.contextmanager
def written_in_place() -> Iterator[bool]:
    """Within, ``torch.export.save`` copies no weights; gives whether that is so in this torch."""
    try:
        from torch.export.pt2_archive import _package as package

        as_bytes, write = package._get_raw_tensor_bytes, package.PT2ArchiveWriter.write_bytes
    except (ImportError, AttributeError):
        yield False
        return

    def in_place(value: Tensor) -> Any:
        return _Memory(value) if type(value) in (Tensor, nn.Parameter) and value.data_ptr() else as_bytes(value)

    def write_bytes(writer: Any, name: str, data: Any) -> None:
        if isinstance(data, _Memory):
            writer.archive_file.write_record(name, data.storage, data.storage.nbytes())
        else:
            write(writer, name, data)

    package._get_raw_tensor_bytes, package.PT2ArchiveWriter.write_bytes = in_place, write_bytes  # type: ignore[assignment,method-assign]
    try:
        yield True
    finally:
        package._get_raw_tensor_bytes, package.PT2ArchiveWriter.write_bytes = as_bytes, write  # type: ignore[method-assign]
