"""A file that fails late: what cannot be written is remembered, not raised.

Comes in: a path. Goes out: ``SurvivingFile``, to be given to a writer that must not be interrupted. torch's zip writer is one: an error
of the disk in the middle of an archive reaches its destructor, which ends the whole process.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any


class SurvivingFile(io.RawIOBase):
    """A binary file for writing. After the first ``OSError`` nothing more is written; ``check`` raises it.

    >>> with SurvivingFile(Path("/dev/full")) as file:
    ...     written = file.write(b"lost")
    ...     print(type(file.error).__name__)
    OSError
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.error: OSError | None = None
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115  # closed by close()

    def writable(self) -> bool:
        """True."""
        return True

    def write(self, data: Any) -> int:
        """All of ``data`` written, or, after a failure, none of it; its number of bytes either way."""
        view = memoryview(data).cast("B")
        done = 0
        while self.error is None and done < len(view):
            try:
                done += self._file.write(view[done:]) or 0
            except OSError as error:
                self.error = error
        return len(view)

    def seekable(self) -> bool:
        """True: torch winds a file back when it has written it, for whoever wants to read it."""
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        """As of any file."""
        return self._file.seek(offset, whence)

    def close(self) -> None:
        """Close the file; an error in that is remembered too."""
        if not self.closed:
            try:
                self._file.close()
            except OSError as error:
                self.error = self.error or error
            super().close()

    def check(self) -> None:
        """Raise what kept the file from being written whole."""
        if self.error is not None:
            raise self.error
