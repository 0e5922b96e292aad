"""The versions of the modules that wrote a state dict, which ``load_state_dict`` reads for old checkpoints.

Private: the attribute ``_metadata`` of the OrderedDict that ``nn.Module.state_dict`` returns: ``{module path: {"version": ...}}``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any


def versions_of(state_dict: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What the state dict says of its modules; None where it is a plain mapping."""
    return getattr(state_dict, "_metadata", None)


def set_versions(state_dict: OrderedDict[str, Any], versions: Mapping[str, Any]) -> None:
    """Say it of another state dict."""
    state_dict._metadata = versions  # type: ignore[attr-defined]


def forget_version(state_dict: Any, path: str) -> None:
    """Say nothing of the module at ``path``."""
    getattr(state_dict, "_metadata", {}).pop(path, None)
