"""The records of a ``.pt2`` as torch's own reader finds them, and the names of the folders in it.

Private: ``torch._C.PyTorchFileReader``, which ``torch.export.load`` and ``torch.load`` read with, and the constants of its archive.
Another zip reader might find other records in a file that was made to fool it.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.export.pt2_archive import constants

AOTINDUCTOR, CONSTANTS, MODELS = constants.AOTINDUCTOR_DIR, constants.CONSTANTS_DIR, constants.MODELS_DIR
SAMPLES, WEIGHTS = constants.SAMPLE_INPUTS_DIR, constants.WEIGHTS_DIR
FORMAT = constants.ARCHIVE_FORMAT_PATH


class Records:
    """The records of a zip that torch wrote, by name without the archive's own folder."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._reader: Any = torch._C.PyTorchFileReader(os.fspath(path))
        self.names: list[str] = list(self._reader.get_all_records())

    def read(self, name: str) -> bytes:
        """The bytes of a record."""
        found: bytes = self._reader.get_record(name)
        return found

    def size(self, name: str) -> int:
        """How many bytes a record has."""
        return int(self._reader.get_record_size(name))
