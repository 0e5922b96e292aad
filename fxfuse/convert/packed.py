"""``.safetensors``: the packed weights, and in the file's metadata the manifest with their recipes.

Comes in: a fused model; a path. Goes out: the file; its tensors and its manifest.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxfuse.errors import ConvertError

from .manifest import manifest_of
from .packages import need

_KEY = "fxfuse"


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
    try:
        found: dict[str, Tensor] = library.load_file(str(path))
        return found
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise ConvertError(f"{path} is no readable .safetensors ({next(iter(str(error).splitlines()), '')}): is it complete?") from error


def read_manifest(path: Path) -> Any:
    """The manifest in a ``.safetensors``; None where it has none."""
    library = need("safetensors", "reading .safetensors")
    check_readable(path)
    try:
        with library.safe_open(str(path), framework="pt") as opened:
            text = (opened.metadata() or {}).get(_KEY)
        return None if text is None else json.loads(text)
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise ConvertError(f"{path} is no readable .safetensors ({next(iter(str(error).splitlines()), '')}): is it complete?") from error
