"""What a ``.pt2`` would run when it is loaded, found before it is loaded.

Comes in: the path of a ``.pt2``. Goes out: nothing, or ``ConvertError`` that says which payload is refused. In torch 2.13
(``torch/export/pt2_archive/_package.py``, ``torch/_export/serde/serialize.py``, ``torch/export/_unlift.py``), these can run code:

- pickles: records under ``data/weights/`` and ``data/constants/`` that their config marks ``use_pickle``, both folders' older ``.pt``,
  ``data/sample_inputs/*.pt`` (all read weights-only first, and fully when that fails, or at once), and the ``serialized_*`` records of
  files of torch 2.7 and older;
- objects: constants named ``custom_obj*`` (a class's own unpickling) and ``opaque_obj*`` (``pickle.loads``);
- machine code: ``data/aotinductor/``;
- the program's text, in which names become source and expressions are evaluated: see ``program_text``.
"""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import torch

from fxfuse.errors import ConvertError
from fxfuse.private.pt2_archives import AOTINDUCTOR, CONSTANTS, FORMAT, MODELS, SAMPLES, WEIGHTS, Records

from .archives import TRUST, check_zip
from .program_text import check_program

_OLD = "serialized_"  # torch 2.7 and older: serialized_state_dict.pt and so on, at the top of the zip
_OLD_PROGRAM = "serialized_exported_program.json"
_OBJECTS = ("custom_obj", "opaque_obj")


def inspect_pt2(path: Path, *, allow_pickle: bool = False) -> None:
    """Raise ``ConvertError`` where ``path`` is no whole ``.pt2``, or holds what would run code and not ``allow_pickle``."""
    zipped = check_zip(path)
    old = [name for name in zipped if name.rpartition("/")[2].startswith(_OLD)]
    records = _records(path, bool(old))
    modern = records is not None and FORMAT in records.names
    if modern and records is not None and records.read(FORMAT) != b"pt2":
        raise ConvertError(f"{path} is no .pt2: its format is another")
    if not modern and _OLD_PROGRAM not in old:
        raise ConvertError(f"{path} is no .pt2 that torch.export wrote: write it again")
    if allow_pickle:
        return
    try:
        if modern and old:
            raise ConvertError(f"{path} holds two programs, one of an older format, which torch could read instead; {TRUST}")
        if modern and records is not None:
            _check_names(path, zipped, records)
            _modern(path, records)
        else:
            _old(path)
    except ConvertError:
        raise
    except MemoryError:
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")
        raise ConvertError(f"{path} is corrupt ({type(error).__name__}: {reason[:300]}): write it again") from error


def _records(path: Path, old: bool) -> Records | None:
    """The records as torch's reader finds them; None for an older file, which ``zipfile`` reads."""
    try:
        return Records(path)
    except RuntimeError as error:
        if old:
            return None
        raise ConvertError(f"{path} is no .pt2 that torch.export wrote, or is cut off: write it again") from error


def _check_names(path: Path, zipped: list[str], records: Records) -> None:
    """torch takes the first name's folder for the archive's."""
    root = zipped[0].partition("/")[0]
    if sorted(zipped) != sorted(f"{root}/{name}" for name in records.names):
        raise ConvertError(f"{path} holds other names for torch than for a zip reader: it is no file that torch wrote; {TRUST}")


def _modern(path: Path, records: Records) -> None:
    for name in records.names:
        if name.startswith(AOTINDUCTOR) or name.endswith((".so", ".dll", ".dylib")):
            raise ConvertError(f"{path} holds machine code ({name}), which loading runs; {TRUST}")
        if name.startswith((WEIGHTS, CONSTANTS, SAMPLES)) and name.endswith(".pt"):
            _pickle(path, name, records.read(name))
        elif name.startswith((WEIGHTS, CONSTANTS)) and name.endswith(".json"):
            _config(path, name, records)
        elif name.startswith(MODELS):
            check_program(path, json.loads(records.read(name)))


def _config(path: Path, name: str, records: Records) -> None:
    folder = name[: name.rindex("/") + 1]
    for entry, payload in json.loads(records.read(name))["config"].items():
        record = payload["path_name"]
        if not isinstance(record, str) or "/" in record or "\\" in record:
            raise ConvertError(f"{path}: {entry} names a record in another folder, {record!r}; {TRUST}")
        if folder == CONSTANTS and record.startswith(_OBJECTS):
            raise ConvertError(f"{path}: the constant {entry} is an object of a class ({record}), whose unpickling runs code; {TRUST}")
        if payload.get("use_pickle"):
            _pickle(path, folder + record, records.read(folder + record))
        elif records.size(folder + record) == 0:  # torch makes zeros of the sizes that are claimed
            sizes = [size.get("as_int") for size in payload["tensor_meta"]["sizes"]]
            if not any(size == 0 for size in sizes):
                raise ConvertError(f"{path}: {entry} claims {sizes} elements and has none: it is made to fill the memory")


def _pickle(path: Path, name: str, data: bytes) -> None:
    """Refuse a pickle that does not load weights-only."""
    if not data:
        return
    if data[:2] == b"PK":
        check_zip(data, f"{path}: {name}")
    try:
        torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:
        raise ConvertError(f"{path}: {name} is a pickle that holds more than tensors, and could run code; {TRUST}") from error


def _old(path: Path) -> None:
    """Read by ``zipfile``, as torch does these."""
    with zipfile.ZipFile(path) as opened:
        for name in opened.namelist():
            base = name.rpartition("/")[2]
            if base == _OLD_PROGRAM:
                check_program(path, json.loads(opened.read(name)))
            elif base.startswith(_OLD):
                _pickle(path, name, opened.read(name))
