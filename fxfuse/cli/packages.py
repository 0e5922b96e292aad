"""Optional packages: which of those that a command needs are missing, and how to install them."""

from __future__ import annotations

import importlib.util

from fxfuse.errors import MissingPackageError


def sentence(who: str, *names: str) -> str:
    """What to tell a user who lacks some of the packages; empty where all are there.

    >>> sentence("this", "json"), sentence("fxfuse dream", "json", "no_such_package")
    ('', "fxfuse dream needs no_such_package, which is not installed: pip install 'fxfuse[convert]'")
    """
    lacking = [name for name in names if not _there(name)]
    if not lacking:
        return ""
    return f"{who} needs {' and '.join(lacking)}, which {'is' if len(lacking) == 1 else 'are'} not installed: pip install 'fxfuse[convert]'"


def need(who: str, *names: str) -> None:
    """Raise ``MissingPackageError`` where one of the packages is missing."""
    lacking = sentence(who, *names)
    if lacking:
        raise MissingPackageError(lacking)


def _there(name: str) -> bool:
    """Without importing it, which for some takes a second."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # by a finder that forbids it; by a module that was put in its place
        return False
