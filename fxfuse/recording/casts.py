"""What autocast does to a torch call, as casts that a graph can hold.

Comes in: a call made under ``torch.autocast``. Goes out: its result, and the dtype to cast its tensors to so that the same call, with
autocast off, gives the same result. This is found by trying, not by a table: a call during which nothing was cast is as it is; else it is
repeated without autocast on tensors as they are, in autocast's dtype, and in float32, and the form that agrees bit for bit is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from fxfuse.models.determinism import same_bits
from fxfuse.private.autocast import autocast_on
from fxfuse.private.dispatch import CAST, BesideDynamo, WithoutDynamo, dynamo_is_imported
from fxfuse.private.pytree import tree_leaves, tree_map_only
from fxfuse.private.versions import version

_CAST = frozenset({torch.float32, torch.float16, torch.bfloat16})  # autocast leaves float64 alone


@contextmanager
def without_autocast() -> Iterator[None]:
    """Within, autocast is off for every kind of device."""
    with ExitStack() as stack:
        for kind, _ in autocast_on():
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def casts_not_kept() -> Iterator[None]:
    """Within, autocast casts a weight at every use, so that each shows."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


class Unrepeatable(Exception):
    """A call under autocast that no casts of its arguments explain."""


def to_cast(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Would autocast, casting to ``dtype``, cast this tensor?"""
    return tensor.dtype in _CAST and tensor.dtype is not dtype


class _Spy(WithoutDynamo):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.casts = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.casts = self.casts or func is CAST
        return func(*args, **kwargs) if kwargs else func(*args)


class _SpyBesideDynamo(BesideDynamo, _Spy):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_dispatch__(func, types, args, kwargs)


class Watched:
    """One call under autocast, run at once: its result ``out``. ``target()`` is asked afterwards."""

    def __init__(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs
        self.random = torch.get_rng_state()
        self.versions = self._versions()
        with (_SpyBesideDynamo if dynamo_is_imported() else _Spy)() as spy:
            self.out = func(*args, **kwargs)
        self.casts = spy.casts

    def target(self) -> torch.dtype | None:
        """The dtype to cast the arguments to; None: they stay as they are. Raises ``Unrepeatable``."""
        if not self.casts:
            return None
        if self.versions != self._versions():
            raise Unrepeatable
        after = torch.get_rng_state()
        try:
            for target in (None, *dict.fromkeys((*(dtype for _, dtype in autocast_on()), torch.float32))):
                if self._agrees(target):
                    return target
        finally:
            torch.set_rng_state(after)
        raise Unrepeatable

    def _versions(self) -> list[int]:
        return [version(t) for t in tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor) and not t.is_inference()]

    def _agrees(self, target: torch.dtype | None) -> bool:
        def cast(tensor: Tensor) -> Tensor:
            return tensor.to(target) if target is not None and to_cast(tensor, target) else tensor

        torch.set_rng_state(self.random)
        with without_autocast(), torch.no_grad():
            args, kwargs = tree_map_only(Tensor, cast, (self.args, self.kwargs))
            try:
                again = self.func(*args, **kwargs)
            except Exception:  # tensors of two dtypes that only a cast brings together
                return False
        pairs = list(zip(tree_leaves(self.out), tree_leaves(again), strict=True))
        return all(same_bits(one.detach(), other) if isinstance(one, Tensor) else one == other for one, other in pairs)
