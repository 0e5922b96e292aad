"""Does torch have a batching rule for this call?

Comes in: a block that calls ``torch.vmap``. Goes out: the same block, in which an op without a batching rule raises (``MissingRule`` by
name) instead of running lane by lane, which is what ``torch.vmap`` does otherwise, with a warning and no gain.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from fxfuse.private.vmap_fallback import without_vmap_fallback

_FALLBACK = re.compile(r"(\S+) hit the vmap fallback|Batching rule not implemented for ([\w:.]*\w)")


class MissingRule(Exception):
    """Torch has no batching rule for the op of this name."""


@contextmanager
def batched_or_raise() -> Iterator[None]:
    """Inside, ``torch.vmap`` raises ``MissingRule`` where it would loop over the lanes.

    >>> import torch
    >>> with batched_or_raise():
    ...     torch.vmap(torch.sin)(torch.zeros(2)).shape
    torch.Size([2])
    """
    try:
        with without_vmap_fallback():
            yield
    except RuntimeError as error:
        found = _FALLBACK.search(str(error))
        if found is None:
            raise
        raise MissingRule((found.group(1) or found.group(2)).removeprefix("aten::").partition(".")[0]) from error
