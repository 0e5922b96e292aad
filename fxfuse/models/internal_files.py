"""Which source files are torch's, or ours.

Comes in: the name of a file. Goes out: ``is_internal``: a line of the model's is in none of these.
"""

from __future__ import annotations

import os

import torch

_TORCH = os.path.dirname(torch.__file__) + os.sep
_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
INTERNAL: dict[str, bool] = {}  # file -> is it torch's, or ours?


def is_internal(file: str) -> bool:
    """Is this file torch's or ours, or no file at all?"""
    known = INTERNAL.get(file)
    if known is None:
        known = INTERNAL[file] = os.path.abspath(file).startswith((_TORCH, _HERE)) or file.startswith("<")
    return known
