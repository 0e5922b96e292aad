"""Plans on disk: a small JSON file for each, in the user's cache directory.

Comes in: a key (``fingerprint``) and JSON's own types. Goes out: the same data, in this process or a later one. Whatever is not ours, or is
damaged, or cannot be read or written, is as if it were not there: a plan is measured anew then. Nothing here raises. ``FXFUSE_CACHE_DIR``
says where the files are, ``FXFUSE_CACHE=0`` that there are none.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

FORMAT = 1  # of the files; those of another are not read
MOST_BYTES = 1 << 18  # of one file
MOST_FILES = 2000
# What a process that was killed while it wrote has left.
STALE_SECONDS = 3600.0


def directory() -> Path | None:
    """Where plans are kept; None where caching is off. The rules of the platforms: XDG's, Apple's, Windows's.

    >>> import unittest.mock
    >>> with unittest.mock.patch.dict(os.environ, {"FXFUSE_CACHE_DIR": "somewhere", "FXFUSE_CACHE": "1"}):
    ...     directory()
    PosixPath('somewhere')
    >>> with unittest.mock.patch.dict(os.environ, {"FXFUSE_CACHE": "0"}):
    ...     directory() is None
    True
    """
    if os.environ.get("FXFUSE_CACHE", "").strip().lower() in ("0", "off", "false", "no"):
        return None
    given = os.environ.get("FXFUSE_CACHE_DIR")
    if given:
        return Path(given)
    try:
        if sys.platform == "win32":
            local = os.environ.get("LOCALAPPDATA")
            return (Path(local) if local else Path.home() / "AppData" / "Local") / "fxfuse" / "Cache"
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Caches" / "fxfuse"
        base = os.environ.get("XDG_CACHE_HOME", "")
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "fxfuse"
    except RuntimeError:  # nobody's home
        return None


def load(key: str) -> dict[str, Any] | None:
    """What was stored under ``key``; None where there is nothing, or nothing that can be read."""
    where = directory()
    if where is None:
        return None
    path = where / _name(key)
    try:
        with path.open("rb") as file:
            text = file.read(MOST_BYTES + 1)
        found = json.loads(text) if len(text) <= MOST_BYTES else None
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or found.get("format") != FORMAT or found.get("key") != key or not isinstance(found.get("plan"), dict):
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # the plans used least recently go first
    plan: dict[str, Any] = found["plan"]
    return plan


def store(key: str, plan: dict[str, Any]) -> None:
    """Keep ``plan`` under ``key``. Readers see the file before or the whole new one, never a part."""
    where = directory()
    if where is None:
        return
    try:
        text = json.dumps({"format": FORMAT, "key": key, "plan": plan}, allow_nan=False).encode()
        if len(text) > MOST_BYTES:
            return
        where.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(".tmp", "plan-", where)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(text)
            os.replace(temporary, where / _name(key))
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        _bounded(where)
    except (OSError, ValueError, TypeError):
        return


def refuse(key: str, reason: str) -> None:
    """Keep with the plan under ``key`` that its region is to stay as it is, and why; nothing where there is none."""
    plan = load(key) if key else None
    if plan is not None:
        store(key, {**plan, "refusal": reason})


def _name(key: str) -> str:
    return f"plan-{key}.json"


def _bounded(where: Path) -> None:
    """Remove the plans used least recently, once there are too many, and what was never finished. Nobody else's files."""
    ages: list[tuple[float, Path]] = []
    with os.scandir(where) as entries:
        for entry in entries:
            if not entry.name.startswith("plan-") or not entry.name.endswith((".json", ".tmp")):
                continue
            try:
                age = entry.stat().st_mtime
            except OSError:
                continue
            if entry.name.endswith(".json"):
                ages.append((age, Path(entry.path)))
            elif age < time.time() - STALE_SECONDS:
                _remove(Path(entry.path))
    if len(ages) > MOST_FILES:
        for _, path in sorted(ages)[: len(ages) - MOST_FILES + MOST_FILES // 10]:
            _remove(path)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
