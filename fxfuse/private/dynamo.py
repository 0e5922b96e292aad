"""What a backend needs of torch.compile: other backends by name, and stand-ins for inputs that dynamo's graph does not have.

Private: ``torch._dynamo``: ``lookup_backend``, ``exc.RestartAnalysis``, ``compiled_autograd._disable``; ``torch._C._dynamo.eval_frame``;
``torch._inductor``: ``compile_fx`` with ``config_patches``, ``list_mode_options``, ``config.get_config_copy``; ``torch._guards``:
``detect_fake_mode``, ``TracingContext.tensor_to_context``;
``HigherOrderOperator``; the attribute ``_dynamo_source`` of placeholders, ``grapharg`` in their
``meta``, and the names ``_dynamo_static_input_type`` and ``_param_name_to_source``, by which AOTAutograd knows weights.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.fx
from torch import Tensor
from torch.utils.weak import TensorWeakRef

Compiler = Callable[..., Callable[..., Any]]
_STATIC = "_dynamo_static_input_type"
_SOURCE = "_dynamo_source"
_PARAMETERS = "_param_name_to_source"


def attributes_of_users(tensor: Tensor) -> list[str]:
    """The names of the attributes set on ``tensor``, without the mark that ``torch.compile`` leaves on weights and buffers.

    >>> import torch._dynamo
    >>> tensor = torch.zeros(1)
    >>> torch._dynamo.mark_static_address(tensor)
    >>> tensor.label = "weight"
    >>> attributes_of_users(tensor)
    ['label']
    """
    return [name for name in tensor.__dict__ if name != _STATIC]


def is_dynamos(error: Exception) -> bool:
    """Does dynamo speak to itself by this exception (trace once more, otherwise)? Then it is no failure of whoever sees it pass."""
    from torch._dynamo.exc import RestartAnalysis

    return isinstance(error, RestartAnalysis)


def run_as_they_are(*functions: Callable[..., Any]) -> None:
    """dynamo does not compile these by themselves where they are called in a frame that it watches, as hooks are in a compiled training
    step. What it traces may still call them. dynamo itself is not imported."""
    frames: Any = torch._C._dynamo.eval_frame
    skipped = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.DEFAULT)
    for function in functions:
        frames.set_code_exec_strategy(function.__code__, skipped)


def without_compiling(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, of which dynamo compiles nothing, whoever calls it."""
    if "torch._dynamo" not in sys.modules:
        return function
    apart: Callable[..., Any] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return apart


@contextmanager
def without_compiled_autograd() -> Iterator[None]:
    """Within, a backward is not compiled, whatever the caller has asked for."""
    from torch._dynamo import compiled_autograd

    with compiled_autograd._disable():
        yield


def backend_named(name: str) -> Compiler:
    """The backend of that name. Raises ``torch._dynamo.exc.InvalidBackend`` where there is none."""
    from torch._dynamo import lookup_backend

    found: Compiler = lookup_backend(name)
    return found


def inductor(settings: dict[str, Any]) -> Compiler:
    """Inductor with these entries of its configuration patched."""

    def compiled(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx

        made: Any = compile_fx(graph, inputs, config_patches=dict(settings))
        run: Callable[..., Any] = made
        return run

    return compiled


def mode_settings(mode: str) -> dict[str, Any]:
    """Inductor's configuration for ``torch.compile(mode=...)``. Raises ``RuntimeError`` for a mode that it does not have."""
    from torch._inductor import list_mode_options

    return dict(list_mode_options(mode))


def is_setting(name: str) -> bool:
    """Does Inductor's configuration have an entry of this name?"""
    from torch._inductor import config

    return name.replace("-", "_") in config.get_config_copy()


def is_weight(placeholder: torch.fx.Node) -> bool:
    """Is this input of a graph a Parameter or buffer that a module holds?"""
    return bool((placeholder.meta.get("tensor_dict") or {}).get(_STATIC))


def is_wrapped_number(placeholder: torch.fx.Node) -> bool:
    """Is this input a Python number in a tensor? dynamo takes it out by ``item()``, and fixes it where a backend cannot do without."""
    return bool(getattr(placeholder.meta.get("grapharg"), "pass_arg_as_tensor", False))


def is_higher_order(target: Any) -> bool:
    """Is this a call that is given graphs (``checkpoint``, ``autograd.Function``, ``nested_compile_region``, ``cond``)?"""
    from torch._ops import HigherOrderOperator

    return isinstance(target, HigherOrderOperator)


def is_wanted_open(tensor: Tensor, dim: int) -> bool:
    """Was this size marked as dynamic, or has dynamo seen it change? True where it cannot be known."""
    from torch._guards import TracingContext
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    context = TracingContext.try_get()
    known = context.tensor_to_context.get(tensor) if context is not None else None  # type: ignore[no-untyped-call]
    sizes = getattr(known, "dynamic_sizes", None)
    return sizes is None or sizes[dim] is not DimDynamic.DUCK


def keep_source(made: torch.fx.Node, placeholder: torch.fx.Node | None) -> None:
    """Let AOTAutograd know ``made`` as the input that ``placeholder`` was; None: as a weight that no name of the user's leads to.

    dynamo's example of the input goes: it refers to the user's tensor, and dynamo clears its own graph's only.
    """
    made.meta.pop("grapharg", None)
    setattr(made, _SOURCE, getattr(placeholder, _SOURCE, None))
    if placeholder is None:
        made.meta["tensor_dict"] = {_STATIC: "unguarded"}


def keep_origin(made: torch.fx.GraphModule, graph: torch.fx.GraphModule) -> None:
    """Let AOTAutograd know ``made`` as the graph of dynamo's that it was made of."""
    made.meta.update(graph.meta)
    if hasattr(graph, _PARAMETERS):
        setattr(made, _PARAMETERS, dict(getattr(graph, _PARAMETERS)))


def stand_in(tensor: Tensor, inputs: list[Any]) -> Tensor:
    """A tensor without data like ``tensor``, all sizes fixed, in the mode that dynamo traced with; ``tensor`` where there was none."""
    from torch._guards import detect_fake_mode

    mode = detect_fake_mode(inputs)
    if mode is None:
        return tensor
    made: Tensor = mode.from_tensor(tensor, static_shapes=True)
    return made


def is_open(size: Any) -> bool:
    """Is this size symbolic, and not fixed to a number since?"""
    return isinstance(size, torch.SymInt) and not str(size).isdigit()


def example_of(placeholder: torch.fx.Node) -> Any:
    """What dynamo was given for this input: a tensor, or an open size; numbers of the same sizes where that is gone."""
    fake = placeholder.meta.get("example_value")
    found = getattr(placeholder.meta.get("grapharg"), "_example", None)
    if isinstance(found, TensorWeakRef):
        found = found()
    if isinstance(found, Tensor) or not isinstance(fake, Tensor):
        return found if found is not None else fake
    return random_example(fake)


def random_example(fake: Any) -> Any:
    """A tensor of random numbers with the sizes of ``fake`` (open ones as they are now), in its order, and its flags; an open size as a
    number; anything else as it is.
    """
    if isinstance(fake, torch.SymInt):
        return _hint(fake)
    if not isinstance(fake, Tensor):
        return fake
    made = torch.randn([_hint(size) for size in fake.shape], device=fake.device).to(fake.dtype)
    strides = [_hint(step) for step in fake.stride()]
    if made.numel() and [*made.stride()] != strides:
        held = 1 + sum((size - 1) * step for size, step in zip(made.shape, strides, strict=True))
        made = torch.randn(held, device=fake.device).to(fake.dtype).as_strided(made.shape, strides)
    if not fake.is_floating_point() and not fake.is_complex():
        made.zero_()  # an index that every table has
    if isinstance(fake, torch.nn.Parameter):
        return torch.nn.Parameter(made, requires_grad=fake.requires_grad)
    return made.requires_grad_(fake.requires_grad)


def _hint(size: Any) -> int:
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)
