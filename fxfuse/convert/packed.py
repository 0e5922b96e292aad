"""``.safetensors``: the packed weights, and in the file's metadata the manifest with their recipes.

Comes in: a fused model; a path. Goes out: the file; its tensors and its manifest.
"""

from __future__ import annotations

import contextlib
import json
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxfuse.errors import ConvertError

from .manifest import manifest_of
from .packages import need

_KEY = "fxfuse"
PART = 1 << 24  # bytes of a file that are read before what was read of it is let go of


def write_packed(model: nn.Module, path: Path) -> dict[str, Any]:
    """Write the fused model's state dict, each tensor once; the manifest comes back."""
    manifest = manifest_of(model)
    tensors = {name: value.detach() for name, value in model.state_dict().items() if name not in manifest["same"]}
    save_tensors(tensors, path, {"format": "pt", _KEY: json.dumps(manifest)})
    return manifest


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write tensors to a ``.safetensors``; those that are not dense in memory, or share it with others, as copies of their own."""
    library = need("safetensors.torch", "writing .safetensors")
    need("numpy", "writing .safetensors")  # which the library does not ask for before it writes
    odd = next((name for name, value in tensors.items() if value.layout is not torch.strided or value.is_quantized or value.is_meta), None)
    if odd is not None:
        raise ConvertError(f"{odd} is sparse, quantized or on the meta device, which .safetensors cannot hold: write a .pt2")
    copied = _overlapping(tensors)
    own = {
        name: value.clone(memory_format=torch.contiguous_format) if name in copied else value.resolve_conj().resolve_neg().contiguous()
        for name, value in tensors.items()
    }
    path.touch()  # with the rights that this user's files have; the library makes it readable for nobody else
    rights = stat.S_IMODE(path.stat().st_mode)
    try:
        library.save_file(own, str(path), metadata=metadata)
        path.chmod(rights)
    except (OSError, MemoryError):
        raise
    except Exception as error:
        number = getattr(error, "errno", None)
        if number or "I/O" in str(error) or "os error" in str(error).lower():
            raise OSError(_errno(str(error)), str(error)) from error
        raise ConvertError(f"the weights cannot be written as .safetensors ({next(iter(str(error).splitlines()), '')})") from error


def _overlapping(tensors: dict[str, Tensor]) -> set[str]:
    """Tensors that share memory with another one: they are written as copies. Lanes that lie side by side in a pack share none."""
    spans: dict[tuple[Any, int], list[tuple[int, int, str]]] = {}
    for name, value in tensors.items():
        if value.numel() and value.is_contiguous():
            start = value.data_ptr()
            spans.setdefault((value.device, value.untyped_storage().data_ptr()), []).append((start, start + value.nbytes, name))
    found: set[str] = set()
    for span in spans.values():
        until = 0
        for start, end, name in sorted(span):
            if start < until:
                found.add(name)
            until = max(until, end)
    return found


def _errno(text: str) -> int:
    digits = "".join(ch for ch in text.rpartition("os error")[2] if ch.isdigit())
    return int(digits) if digits else 5


def check_readable(path: Path) -> None:
    """Raise ``ConvertError`` with the system's reason where a file cannot be opened: safetensors says of any that it is not there."""
    try:
        path.open("rb").close()
    except OSError as error:
        raise ConvertError(f"{path} cannot be read: {error.strerror or error}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors``, mapped into memory. Raises ``ConvertError`` for a file that is none."""
    library = need("safetensors.torch", "reading .safetensors")
    check_readable(path)
    with _understood(path):
        found: dict[str, Tensor] = library.load_file(str(path))
        return found


@contextlib.contextmanager
def _understood(path: Path) -> Iterator[None]:
    """What the library raises, as ``ConvertError``."""
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise ConvertError(f"{path} is no readable .safetensors ({next(iter(str(error).splitlines()), '')}): is it complete?") from error


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a ``.safetensors`` by name, each read (mapped) when it is asked for, and kept by nobody else.

    Raises ``ConvertError`` for a file that is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.library = need("safetensors", "reading .safetensors")
        check_readable(path)
        with _understood(path), self._opened() as opened:
            self.shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118  # no mapping

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        with _understood(self.path), self._opened() as opened:
            found: Tensor = opened.get_tensor(name)
            return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def parts(self) -> Iterator[tuple[str, int, Tensor]]:
        """All tensors in parts of ``PART`` bytes at most (one row at the least): name, number of the first row, rows.

        The file is mapped anew after that many bytes: pages that were read stay in memory as long as their mapping.
        """
        opened, left = self._opened(), PART
        for name, shape in self.shapes.items():
            start, rows = 0, shape[0] if shape else 1
            while start < max(rows, 1):
                with _understood(self.path):
                    if left <= 0:
                        opened, left = self._opened(), PART
                    part = opened.get_tensor(name)
                    if shape and rows:
                        part = part[start : start + max(1, left * rows // max(1, part.nbytes))]
                left -= part.nbytes
                yield name, start, part
                start += len(part) if shape and rows else 1
                del part

    def _opened(self) -> Any:
        return self.library.safe_open(str(self.path), framework="pt")


def read_manifest(path: Path) -> Any:
    """The manifest in a ``.safetensors``; None where it has none."""
    library = need("safetensors", "reading .safetensors")
    check_readable(path)
    with _understood(path):
        with library.safe_open(str(path), framework="pt") as opened:
            text = (opened.metadata() or {}).get(_KEY)
        return None if text is None else json.loads(text)
