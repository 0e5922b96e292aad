"""The containers that a ``.pt2`` names, checked: torch puts them together again, by code of whoever registered their classes.

Comes in: a spec as parsed JSON (``type``, ``context``, ``children_spec``). Goes out: the keys in it, to be checked as names; or
``ConvertError``. Let through are tuples, lists, dicts, and what this process itself has registered for files (``torch.utils._pytree``,
``torch.export.register_dataclass``): named tuples, dataclasses and dicts of classes, whose keys are read as plain data. A context that is
an object is refused: torch imports the module that it names.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fxfuse.errors import ConvertError
from fxfuse.private.pytree import reads_plain_data, serialized_name, serialized_type

from .archives import TRUST

_TREE = ("builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict")
_NAMED = "collections.namedtuple"


def strings(path: Path, spec: Any) -> Iterator[str]:
    """The strings among the keys of a spec and of all specs in it. Raises ``ConvertError``."""
    kind, context = spec["type"], spec["context"]
    if kind == _NAMED or (kind not in _TREE and _is_named(kind) and context == kind):
        if not _is_named(context):
            _unknown(path, context)
    else:
        if kind is not None and kind not in _TREE and not _is_plain(kind):
            _unknown(path, kind)
        yield from _keys(path, json.loads(context) if isinstance(context, str) else context)
    for child in spec["children_spec"]:
        yield from strings(path, child)


def _keys(path: Path, key: Any) -> Iterator[str]:
    if isinstance(key, list):
        for each in key:
            yield from _keys(path, each)
    elif isinstance(key, str):
        yield key
    elif key is not None and type(key) not in (int, bool, float):
        raise ConvertError(f"{path}: its program has a container with the key {str(key)[:80]}, which could run code; {TRUST}")


def _registered(name: Any) -> Any:
    found = serialized_type(name) if isinstance(name, str) else None
    return found if isinstance(found, type) and serialized_name(found) == name else None


def _is_named(name: Any) -> bool:
    kind = _registered(name)
    return kind is not None and issubclass(kind, tuple) and hasattr(kind, "_fields")


def _is_plain(name: Any) -> bool:
    kind = _registered(name)
    return kind is not None and (dataclasses.is_dataclass(kind) or issubclass(kind, dict)) and reads_plain_data(kind)


def _unknown(path: Path, name: Any) -> None:
    what = f"{path}: its program takes or returns a container of the class {str(name)[:80]!r}, which nothing has registered here for files"
    raise ConvertError(f"{what}, and which could run code: import the package that does (torch.export.register_dataclass) first; {TRUST}")
