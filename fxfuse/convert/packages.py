"""The optional packages of conversion, imported where they are needed.

Comes in: a package's name. Goes out: the module, or ``MissingPackageError`` that says how to install it.
"""

from __future__ import annotations

import importlib
from typing import Any

from fxfuse.errors import MissingPackageError


def need(name: str, what: str) -> Any:
    """Import ``name``, which ``what`` needs.

    >>> need("no_such_package", "writing dreams")
    Traceback (most recent call last):
    ...
    fxfuse.errors.MissingPackageError: writing dreams needs no_such_package, which is not installed: pip install 'fxfuse[convert]'
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise MissingPackageError(f"{what} needs {package}, which is not installed: pip install 'fxfuse[convert]'") from error
