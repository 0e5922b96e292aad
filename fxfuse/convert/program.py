"""A fused model as a program of torch.export.

Comes in: a fused model and an example call. Goes out: a ``torch.export.ExportedProgram`` of torch's operations on packed weights, whose
batch dimension is free unless ``static``.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fxfuse.errors import ConvertError
from fxfuse.models import inputs as fresh
from fxfuse.models.quiet import quiet
from fxfuse.private.pytree import tree_leaves

from .containers import in_plain_containers
from .frozen import frozen

Example = tuple[tuple[Any, ...], dict[str, Any]]


def export(model: nn.Module, example: Example, *, static: bool, notes: list[str] | None = None) -> torch.export.ExportedProgram:
    """The program of the mode (train or eval) that ``model`` is in; it shares the model's tensors.

    Dim 0 of every tensor with as many rows as the first one is free, unless ``static``. To ``notes`` is added for what sizes and mode it
    is, and what else is other than in the model. Raises ``ConvertError`` with torch.export's
    reason where the model cannot be exported.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise ConvertError("the model is one of torch.jit, which torch.export does not take: give the model that it was made from")
    args, kwargs = fresh.clone_inputs(example, requires_grad=False)
    rows = fresh.batch_size(args, kwargs)
    if not static and rows is not None and rows < 2:  # torch.export takes a size of 1 for a constant
        args, kwargs = fresh.resample(args, kwargs, batch=3) if rows else (args, kwargs)
    free = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    rows = None if static else fresh.batch_size(args, kwargs)
    batched = {}
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor) and leaf.ndim and rows and leaf.shape[0] == rows:
            batched[id(leaf)] = leaf
    for leaf in batched.values():
        free[leaf] = {0: torch.export.Dim.DYNAMIC}
    ready, changed = frozen(model), dict[str, str]()
    ready.__dict__["forward"] = _each_named(in_plain_containers(ready.forward, changed), kwargs)
    with silent(), deterministic_state():
        try:
            shapes = free.dynamic_shapes(ready, args, kwargs) if batched else None  # type: ignore[no-untyped-call]
            with contextlib.redirect_stderr(io.StringIO()):  # where it prints the whole program when it fails
                program = torch.export.export(ready, args, kwargs, dynamic_shapes=shapes, strict=False)
        except MemoryError:
            raise
        except Exception as error:
            raise ConvertError(_sentence(error, static)) from error
    if notes is not None:
        notes += ["for this batch size only" if static else "for any batch size", f"of the {'train' if model.training else 'eval'} mode"]
        notes += [f"{name} is returned as a plain {kind}" for name, kind in sorted(changed.items())]
    return program


def _each_named(forward: Callable[..., Any], kwargs: dict[str, Any]) -> Callable[..., Any]:
    """``forward`` with a signature that names each keyword that its ``**kwargs`` takes: torch.export looks for their free sizes by name."""
    with contextlib.suppress(TypeError, ValueError):
        signature = inspect.signature(forward)
        own = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
        if len(own) < len(signature.parameters):
            more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in kwargs if name not in signature.parameters]
            forward.__signature__ = inspect.Signature([*own, *more])  # type: ignore[attr-defined]
    return forward


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """What torch's exporters warn of and log is about how they are written, not about the user's model."""
    before = logging.root.manager.disable
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


@contextlib.contextmanager
def deterministic_state() -> Iterator[None]:
    """Tracing draws no random numbers that the caller would miss."""
    with torch.random.fork_rng(devices=[]):
        yield


def register(name: str) -> str:
    """What to do about a class of containers that files cannot name."""
    short = name.rpartition(".")[2]
    how = f'torch.export.register_dataclass({short}, serialized_type_name="{name}")'
    return f"register it where it is defined ({how} for a dataclass), or return a tuple or a dict"


def _sentence(error: Exception, static: bool) -> str:
    """torch.export's reason in one line."""
    unknown = re.search(r"Found <class '([^']+)'> in output, which is not a known type", str(error))
    if unknown:
        return f"the model returns a {unknown[1]}, which torch.export does not know: {register(unknown[1])}"
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip(" \t-*") for line in str(error).splitlines()]
    lines = [line for line in lines if line]
    telling = re.compile(r"data-dependent|specialized|specializ|constraint|Unsupported|not supported|Could not|cannot|missing|violat", re.I)
    reason = next((line for line in lines if telling.search(line)), lines[0] if lines else type(error).__name__)
    sizes = not static and re.search(r"specializ|constraints? violat|dynamic shape|marked .* dynamic", str(error), re.I)
    advice = ": its batch size is fixed; convert it with --static (static=True)" if sizes else ""
    where = "torch.export cannot export the model" if not sizes else "the model cannot be exported for any batch size"
    return f"{where} ({type(error).__name__}: {reason[:300]}){advice}"
