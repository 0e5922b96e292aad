"""Zip files that anybody may have made: whole, plain, and no larger than they look.

Comes in: a path, or the bytes of a zip inside another. Goes out: the names in it; or ``ConvertError``.
"""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

from fxfuse.errors import ConvertError

TRUST = "allow_pickle=True (--allow-pickle) loads it all the same: only where you trust whoever made it"


def check_zip(where: Path | bytes, name: str = "") -> list[str]:
    """The names in a zip as torch writes them: nothing compressed, nothing twice, no entry over another.

    torch stores tensors uncompressed, so that a file cannot hold more than its own size; one that claims to is made to fill the memory.
    Raises ``ConvertError`` where that is not so, or the file is no zip, or is cut off.
    """
    name = name or str(where)
    try:
        with zipfile.ZipFile(io.BytesIO(where) if isinstance(where, bytes) else where) as opened:
            entries = opened.infolist()
        size = len(where) if isinstance(where, bytes) else os.path.getsize(where)
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise ConvertError(f"{name} is no file that torch wrote, or is cut off ({error}): copy or write it again") from error
    names = [entry.filename for entry in entries]
    if not names:
        raise ConvertError(f"{name} is an empty zip: write it again")
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries):
        raise ConvertError(f"{name} is compressed, which torch never does: it may unpack to more than the memory; write it again")
    if sum(max(entry.file_size, entry.compress_size) for entry in entries) > size:
        raise ConvertError(f"{name} claims to hold more than its {size:,} bytes: it is cut off, or made to fill the memory")
    if len(set(names)) < len(names):
        raise ConvertError(f"{name} holds one name twice: it is no file that torch wrote")
    return names
