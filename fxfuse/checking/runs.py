"""Run a model once and keep all that a caller could see of it.

Comes in: a model (fused or plain) and the arguments of one call. Goes out: ``Run``: output leaves by name, gradients of inputs and of
parameters by the original's names, buffers, the exception if there was one, and why a fused model did not answer itself.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fxfuse.fused import regions
from fxfuse.models.determinism import DefaultFloat64, Derandomized, preserved_state
from fxfuse.models.inputs import clone_inputs, shaken, to_dtype, wider
from fxfuse.models.unregistered import hidden_parameters, unregistered
from fxfuse.private.pytree import tree_leaves
from fxfuse.private.versions import version
from fxfuse.recording.draws import FollowedDraws
from fxfuse.recording.fast_path import has_fast_path
from fxfuse.running.region import RegionState
from fxfuse.weights.lane import by_original_name
from fxfuse.weights.packing import original_gradients, original_named_parameters

from .saved_memory import Saved
from .shared_memory import sharing


@dataclass
class Run:
    """What one call gave. Tensors are detached; an output's ``requires_grad`` is kept in ``flags``."""

    outputs: dict[str, Any] = field(default_factory=dict)
    flags: dict[str, bool] = field(default_factory=dict)
    bare: set[str] = field(default_factory=set)  # outputs that say that they need a gradient, and have no history (views under no_grad)
    sharing: dict[str, str] = field(default_factory=dict)  # outputs that lie in the memory of an input or of another output
    inputs: dict[str, tuple[bool, Tensor]] = field(default_factory=dict)  # after the call: (was written to, value)
    input_gradients: dict[str, Tensor | None] = field(default_factory=dict)
    parameter_gradients: dict[str, Tensor | None] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    unsaved: dict[str, Tensor] = field(default_factory=dict)  # buffers that are in no state dict; a fused model may have others
    error: BaseException | None = None
    fallbacks: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)  # of the fused regions, by path
    missed: Counter[str] = field(default_factory=Counter)  # of those, the ones that ran the loop
    precisions: set[torch.dtype] = field(default_factory=set)  # narrower than float64, seen in results of ops
    undefined: set[str] = field(default_factory=set)  # random ops that ran with real random numbers
    drawn: int = 0  # random numbers that forward asked for
    usual_strides: bool = True  # False: a mode listened, and torch's attention may have laid its results out in another way


def run(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    mode: str,
    gradients: bool = True,
    requires_grad: bool | None = True,
    dtype: torch.dtype | None = None,
    cotangents: torch.dtype = torch.float32,
    seed: int = 0,
    shake: float = 0.0,
    buffers: bool = True,
    attributes: Sequence[tuple[str, str]] = (),
    follow: bool = False,
) -> Run:
    """Call ``model`` on clones of the arguments and, with ``gradients``, backward from random cotangents.

    ``mode``: "train", "eval", or "given" for the flags as they are. ``requires_grad``: as in ``inputs.clone_inputs``. ``dtype``: float64
    casts the inputs and lets factories make float64; None leaves both alone. The cotangents depend on ``seed`` and on the outputs'
    order only, and are rounded to the dtype ``cotangents``, so that a float64 run of the same call sees equal numbers;
    ``shake`` then moves each by up to twice that fraction. Random ops give fixed numbers. ``buffers=False`` leaves buffers out.
    ``attributes``: (module path, name) of attributes that forward sets; what it set them to counts as outputs. ``follow``: count only
    the random numbers that reach a result.
    Model state (buffers, flags, ``grad`` of parameters) and random state are as before afterwards. Exceptions are kept, not raised.
    """
    result = Run()
    args, kwargs = to_dtype((args, kwargs), dtype) if dtype is not None else (args, kwargs)
    args, kwargs = clone_inputs((args, kwargs), requires_grad=requires_grad if gradients else False)
    named = [*named_leaves(args, "input"), *named_leaves(kwargs, "input")]
    inputs = {name: leaf for name, leaf in named if isinstance(leaf, Tensor)}
    versions = {name: version(leaf) for name, leaf in inputs.items()}
    hidden = hidden_parameters(model, unregistered(model))
    saved = {p: p.grad for p in [*model.parameters(), *hidden.values()]}
    fused = regions(model)
    before, missed = _fallbacks(model, fused), _missed(fused)
    held = [vars(model.get_submodule(path)).get(name) for path, name in attributes]
    random = FollowedDraws() if follow else Derandomized()
    with preserved_state(model), torch.set_grad_enabled(gradients):
        for p in saved:
            p.grad = None
        try:
            if mode != "given":
                model.train(mode == "train")
            result.usual_strides = dtype is not torch.float64 or not has_fast_path(model)
            with _precise(dtype), random, _counted(fused, result.calls):
                out = model(*args, **kwargs)
                leaves = dict(named_leaves(out, "output"))
                for (path, name), value in zip(attributes, held, strict=True):
                    now = vars(model.get_submodule(path)).get(name)
                    if now is not value:
                        leaves.update(named_leaves(now, f"attribute {path}.{name}" if path else f"attribute {name}"))
                result.flags = {n: leaf.requires_grad for n, leaf in leaves.items() if isinstance(leaf, Tensor)}
                result.bare = {n for n, leaf in leaves.items() if isinstance(leaf, Tensor) and leaf.requires_grad and not has_history(leaf)}
                result.drawn = random.reaching(t for t in [*leaves.values(), *inputs.values(), *model.buffers()] if isinstance(t, Tensor))
                seen = {**inputs, **{n: leaf for n, leaf in leaves.items() if isinstance(leaf, Tensor)}}
                result.sharing = sharing(seen)
                # Copied before backward: a model may hand out a tensor that it goes on to write.
                result.outputs = {n: _kept(leaf) if isinstance(leaf, Tensor) else leaf for n, leaf in leaves.items()}
            if gradients:
                ends = [leaf for n, leaf in leaves.items() if isinstance(leaf, Tensor) and leaf.requires_grad and n not in result.bare]
                starts = _cotangents(ends, cotangents, seed, shake)  # outside of ``random``, which would fix them and note their dtype
                # Backward draws no numbers itself; only the backward of an op that was fixed may have to be fixed as well.
                with _precise(dtype), random if random.needed else nullcontext():
                    torch.autograd.backward(ends, starts)
            result.inputs = {n: (version(leaf) != versions[n], leaf.detach()) for n, leaf in inputs.items()}
            if gradients:
                result.input_gradients = {n: leaf.grad for n, leaf in inputs.items() if leaf.requires_grad and leaf.is_leaf}
                gradients_now = {**_gradients(model, fused), **{name: p.grad for name, p in hidden.items()}}
                result.parameter_gradients = gradients_now  # owned by this run: ``grad`` was None before
            if buffers:
                result.buffers = _buffers(model)
                result.unsaved = {n: _kept(b) for n, b in model.named_buffers() if n not in result.buffers}
        except Exception as error:  # whatever the user's model raises is a result
            result.error = error.with_traceback(None)
        finally:
            for p, grad in saved.items():
                p.grad = grad
    result.fallbacks, result.missed = _fallbacks(model, fused) - before, _missed(fused) - missed
    result.precisions, result.undefined = random.precisions, random.undefined
    return result


def has_history(tensor: Tensor) -> bool:
    """Can backward start at ``tensor``, which says that it needs a gradient? Not at a view that was made under ``no_grad``.

    >>> x = torch.ones(2, requires_grad=True)
    >>> with torch.no_grad():
    ...     view = x[:1]
    >>> view.requires_grad, has_history(view), has_history(x), has_history(2 * x)
    (True, False, True, True)
    """
    if tensor.grad_fn is not None or tensor.layout is not torch.strided or tensor.is_nested or not tensor._is_view():
        return True
    with torch.enable_grad():
        viewed = tensor.view_as(tensor)
    return viewed.grad_fn is not None and viewed.grad_fn.next_functions[0][0] is not None


def results_saved(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, mode: str) -> set[str] | None:
    """The results, by the names that ``run`` gives them, that lie in memory which autograd keeps for backward, and in that of no input.

    None where forward raises. Arguments, ``mode`` and what stays as before: as in ``run``.
    """
    args, kwargs = clone_inputs((args, kwargs), requires_grad=True)
    inputs = {name: leaf for name, leaf in [*named_leaves(args, "input"), *named_leaves(kwargs, "input")] if isinstance(leaf, Tensor)}
    with preserved_state(model), torch.enable_grad(), Derandomized():
        try:
            if mode != "given":
                model.train(mode == "train")
            with Saved() as saved:
                out = model(*args, **kwargs)
            leaves = {name: leaf for name, leaf in named_leaves(out, "output") if isinstance(leaf, Tensor)}
            of_inputs = {name for name, first in sharing({**inputs, **leaves}).items() if first in inputs}
            return saved.among(leaves) - of_inputs
        except Exception:  # what a call raises is told where it is compared; some calls work under no such watch
            return None


def named_leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Flatten what a forward returned, with readable names: ``output['loss'][0]``.

    Looks into tuples, lists, mappings, dataclasses and plain objects with attributes. Containers are yielded too, by type and
    length, so that two results of another structure have other leaves.
    """
    yield from _walk(value, name, set())


def _walk(value: Any, name: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Tensor) or value is None or isinstance(value, (bool, int, float, complex, str, bytes, type)):
        yield name, value
        return
    if id(value) in seen:
        yield name, "seen before"
        return
    seen = seen | {id(value)}
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, Mapping):
        yield f"{name} (keys)", (kind, tuple(map(repr, value)))
        for key, item in value.items():
            yield from _walk(item, f"{name}[{key!r}]", seen)
    elif isinstance(value, (tuple, list)):
        yield f"{name} (length)", (kind, len(value))
        for i, item in enumerate(value):
            yield from _walk(item, f"{name}[{i}]", seen)
    elif dataclasses.is_dataclass(value):
        yield f"{name} (type)", kind
        for part in dataclasses.fields(value):
            yield from _walk(getattr(value, part.name, None), f"{name}.{part.name}", seen)
    elif isinstance(value, nn.Module) or not hasattr(value, "__dict__") or callable(value):
        yield f"{name} (type)", kind
    else:
        yield f"{name} (type)", kind
        for key, item in vars(value).items():
            yield from _walk(item, f"{name}.{key}", seen)


def _cotangents(outputs: list[Tensor], coarse: torch.dtype, seed: int, shake: float) -> list[Tensor]:
    random, other = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1)
    cotangents = []
    for out in outputs:
        cotangent = torch.randn(out.shape, generator=random, dtype=torch.complex128 if out.is_complex() else torch.float64)
        cotangent = cotangent.to(wider(cotangent.dtype, coarse)).to(out.dtype)
        cotangents.append((shaken(cotangent, shake, other) if shake else cotangent).to(out.device))
    return cotangents


def _kept(tensor: Tensor) -> Tensor:
    """A copy that no later write reaches, strides kept where torch can."""
    return clone_inputs(tensor.detach(), requires_grad=False)


def coarsest(inputs: Any, model: nn.Module) -> torch.dtype:
    """The floating dtype with the largest eps among inputs and parameters: what the model computes in."""
    dtypes = {t.dtype for t in [*tree_leaves(inputs), *model.parameters()] if isinstance(t, Tensor) and t.is_floating_point()}
    usual = dtypes & {torch.float64, torch.float32, torch.float16, torch.bfloat16}
    return max(usual, key=lambda d: torch.finfo(d).eps) if usual else torch.get_default_dtype()


@contextmanager
def _precise(dtype: torch.dtype | None) -> Iterator[None]:
    """For float64 runs: float64 by default, and no autocast."""
    if dtype is not torch.float64:
        yield
        return
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(DefaultFloat64())
        yield


Regions = dict[str, RegionState]  # by path


def _fallbacks(model: nn.Module, fused: Regions) -> Counter[str]:
    counts: Counter[str] = Counter()
    for path, state in fused.items():
        for reason, number in state.fallbacks.items():
            counts[f"{path or type(model).__name__}: {reason}"] += number
    return counts


def _missed(fused: Regions) -> Counter[str]:
    """Calls of each region itself, not of another of its methods, that ran the loop."""
    counts: Counter[str] = Counter()
    for path, state in fused.items():
        others = tuple(f"{method}: " for method in state.plan.methods)
        counts[path] += sum(number for reason, number in state.fallbacks.items() if not (others and reason.startswith(others)))
    return counts


@contextmanager
def _counted(fused: Regions, calls: Counter[str]) -> Iterator[None]:
    """Counts the calls of the fused regions."""

    def counting(path: str) -> Callable[..., None]:
        def count(*_: Any) -> None:
            calls[path] += 1

        return count

    handles = [state.region.register_forward_pre_hook(counting(path)) for path, state in fused.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _gradients(model: nn.Module, fused: Regions) -> dict[str, Tensor | None]:
    """By the original's names. An original is asked itself: what finds lanes in packs must not be what says that none are missing."""
    return original_gradients(model) if fused else {name: p.grad for name, p in model.named_parameters()}


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """What is saved and is no parameter, by the original's names."""
    parameters = {n for n, _ in model.named_parameters(remove_duplicate=False)} | original_named_parameters(model).keys()
    with by_original_name():
        live = model.state_dict()
    return {n: _kept(t).contiguous() for n, t in live.items() if n not in parameters and isinstance(t, Tensor)}
