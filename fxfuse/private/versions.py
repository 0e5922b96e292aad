"""How often a tensor was written so far; views share the number.

Private: ``Tensor._version``, the counter by which autograd finds writes to what it saved. No public API tells of a write. Raises
RuntimeError for inference tensors, which do not count.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter

from torch import Tensor

version: Callable[[Tensor], int] = attrgetter("_version")
