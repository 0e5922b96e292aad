"""What can be written: by the ending of a path.

Comes in: a path. Goes out: its ``Kind``; and ``Written``, which says what was written.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Kind = Literal["pt2", "aoti", "onnx", "safetensors", "folder"]
_ENDINGS: tuple[tuple[str, Kind], ...] = ((".aoti.pt2", "aoti"), (".pt2", "pt2"), (".onnx", "onnx"), (".safetensors", "safetensors"))


@dataclass
class Written:
    """What ``write`` wrote: where, of which kind, how many bytes in all, and what the user should know of it."""

    path: Path
    kind: Kind
    bytes: int
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        text = f"{_NAMES[self.kind]}, {self.bytes:,} bytes"
        return "; ".join((text, *self.notes))


_NAMES: dict[Kind, str] = {
    "pt2": "a program of torch.export",
    "aoti": "a package compiled by AOTInductor",
    "onnx": "an ONNX model",
    "safetensors": "packed weights and their recipes",
    "folder": "a folder with model, weights, recipes and report",
}


def kind_of(path: Path) -> Kind:
    """The kind that the ending says; a folder where it says none.

    >>> kind_of(Path("net.aoti.pt2")), kind_of(Path("net.PT2")), kind_of(Path("net"))
    ('aoti', 'pt2', 'folder')
    """
    name = path.name.lower()
    return next((kind for ending, kind in _ENDINGS if name.endswith(ending)), "folder")


def size_of(path: Path) -> int:
    """The bytes of a file, or of all files in a folder."""
    return sum(each.stat().st_size for each in path.rglob("*") if each.is_file()) if path.is_dir() else path.stat().st_size
