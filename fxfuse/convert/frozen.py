"""A fused model in the form that is exported: no guards, no counters, no fallbacks; every region's forward is its program's graph.

Comes in: a fused model (or any other). Goes out: a copy of its module tree that shares its tensors and computes the same for calls like the
recorded ones. torch.export traces it: what ends up in the exported program is torch's operations on the packed weights, nothing of fxfuse.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from fxfuse import fused as fused_models
from fxfuse.graph import Program, TensorGuard
from fxfuse.models.copies import copy_with
from fxfuse.private.pytree import tree_flatten, tree_unflatten
from fxfuse.running.region import RegionState
from fxfuse.running.runtime import compile_graph, walk


def frozen(model: nn.Module) -> nn.Module:
    """The copy to export, in the training flags of ``model``, with its tensors.

    >>> layer = nn.Linear(2, 3)
    >>> frozen(layer).weight is layer.weight
    True
    """
    tensors: dict[int, Any] = {}
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            tensors.update((id(tensor), tensor) for tensor in store.values() if tensor is not None)
    copied = copy_with(model, tensors)
    kept: list[tuple[dict[str, Any], str]] = []
    for state in fused_models.regions(copied).values():
        _freeze(state, kept)
    if kept:
        copied.__dict__["forward"] = _leaving_nothing(copied.forward, kept)
    return copied


def _freeze(state: RegionState, kept: list[tuple[dict[str, Any], str]]) -> None:
    region: Any = state.region
    flags = state.flags()
    methods = {name: list(modes.get(flags, ())) for name, modes in state.plan.methods.items()}
    first = state.plan.programs.get(flags)
    methods["forward"] = [*([first] if first is not None else []), *methods.get("forward", [])]
    if isinstance(state.prepare(), str) and state.ready is None:
        methods = {name: [] for name in methods}  # changed since it was fused: the loop is what is right
    for name, programs in methods.items():
        original = getattr(region._fxfuse_base, name)
        runs = [_Frozen(state, program) for program in programs]
        region.__dict__[name] = _dispatching(region, original, runs)
        kept.extend((keeper, store.name) for run in runs for keeper, store in run.stores)


class _Frozen:
    """One program over the tensors of its region, which are looked up at each call: torch.export swaps them."""

    def __init__(self, state: RegionState, program: Program) -> None:
        self.program = program
        self.run, self.sources, self.modules = compile_graph(state.resolved(program), state.region, state.sources())
        self.stores = [(walk(state.region, store.module).__dict__, store) for store in program.stores]

    def fits(self, leaves: list[Any], spec: Any) -> bool:
        """Is this a call like the recorded one? Sizes that the program leaves free are not looked at: they may be symbols."""
        guard = self.program.guard
        if spec != self.program.in_spec or not all(map(_fits, guard.leaves, leaves)):
            return False
        return all(type(leaves[check.input].shape[check.dim]) is not int or _holds(leaves, check) for check in guard.sizes)

    def __call__(self, leaves: list[Any]) -> Any:
        autocast = self.program.guard.autocast
        given = (None, *leaves, *(source.fetch() for _, source in self.sources), *self.modules)
        if autocast is None:
            out = self.run(*given)
        else:
            with torch.autocast(autocast[0], enabled=False):
                out = self.run(*given)
        at = self.program.out_spec.num_leaves
        for keeper, store in self.stores:
            until = at + store.spec.num_leaves
            keeper[store.name] = tree_unflatten(list(out[at:until]), store.spec)
            at = until
        return tree_unflatten(list(out[: self.program.out_spec.num_leaves]), self.program.out_spec)


def _dispatching(region: Any, original: Callable[..., Any], runs: list[_Frozen]) -> Callable[..., Any]:
    """The method of a region: the first program that the call fits, else the loop as it was written, over views of the packs."""

    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        for leaves, spec in (tree_flatten(call) for call in _spellings(original, region, args, kwargs)):
            for run in runs:
                if run.fits(leaves, spec):
                    return run(leaves)
        return original(region, *args, **kwargs)

    del method.__wrapped__  # its signature has no self any more
    with suppress(TypeError, ValueError):
        parameters = list(inspect.signature(original).parameters.values())[1:]
        method.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return method


def _spellings(original: Callable[..., Any], region: Any, args: Any, kwargs: Any) -> list[tuple[Any, Any]]:
    """The call as it came, with every argument by position as far as that goes, and by name from each position on."""
    calls = [(args, kwargs)]
    with suppress(TypeError, ValueError):
        signature = inspect.signature(original)
        kinds = [p.kind for p in signature.parameters.values()]
        if inspect.Parameter.VAR_POSITIONAL in kinds or inspect.Parameter.VAR_KEYWORD in kinds:
            return calls
        bound = signature.bind(region, *args, **kwargs)
        for full in (False, True):
            if full:
                bound.apply_defaults()
            names = list(bound.arguments)[1:]
            values = [bound.arguments[name] for name in names]
            for split in range(len(names), -1, -1):
                calls.append((tuple(values[:split]), dict(zip(names[split:], values[split:], strict=True))))
    return calls


def _fits(fact: Any, leaf: Any) -> bool:
    if not isinstance(fact, TensorGuard):
        value = fact[1]
        return leaf is value or (type(leaf) is type(value) and not isinstance(leaf, Tensor) and bool(leaf == value))
    if not isinstance(leaf, Tensor) or leaf.ndim != len(fact.shape):
        return False
    dtypes = leaf.dtype == fact.dtype or (leaf.dtype.is_floating_point and fact.dtype.is_floating_point)
    return dtypes and all(size is None or size == own for size, own in zip(fact.shape, leaf.shape, strict=True))


_COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    ">=": int.__ge__, ">": int.__gt__, "<=": int.__le__, "<": int.__lt__, "==": int.__eq__, "!=": int.__ne__,
}  # fmt: skip


def _holds(leaves: list[Any], check: Any) -> bool:
    return _COMPARISONS[check.op](leaves[check.input].shape[check.dim], check.bound)


def _leaving_nothing(forward: Callable[..., Any], kept: list[tuple[dict[str, Any], str]]) -> Callable[..., Any]:
    """``forward``, after which the attributes that regions set are what they were: torch.export allows no new ones."""

    @functools.wraps(forward)
    def whole(*args: Any, **kwargs: Any) -> Any:
        before = [(owner, name, name in owner, owner.get(name)) for owner, name in kept]
        try:
            return forward(*args, **kwargs)
        finally:
            for owner, name, existed, value in before:
                if existed:
                    owner[name] = value
                else:
                    owner.pop(name, None)

    whole.__dict__.pop("__signature__", None)  # a signature that a function was given has self in it: that of the method counts
    return whole
