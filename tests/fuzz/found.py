"""What fuzzing found, made small, each as the literal that it printed: once wrong, now right or refused."""

from __future__ import annotations

from typing import Any

FOUND: dict[str, dict[str, Any]] = {}
