"""From a command line to a model that can be called: source, weights, dtype, device, inputs, and one call to see that they fit.

Comes in: SOURCE and ``Asked``. Goes out: ``Subject``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from fxfuse.models.determinism import preserved_state
from fxfuse.models.inputs import to_dtype
from fxfuse.private.pytree import tree_map_only

from . import codes
from .exported import in_torch_functions
from .failure import CommandError, said
from .meta import without_memory
from .options import Asked
from .source import load_source
from .specs import DTYPES, Call, make_inputs
from .weights import load_weights

T = TypeVar("T")


@dataclass
class Subject:
    """A model and the arguments of one call that it answers."""

    name: str
    model: nn.Module
    call: Call


def prepare(source: str, asked: Asked, stage: Callable[[str], None] = lambda name: None) -> Subject:
    """The model that a command is about, in the mode asked for, and its inputs. Raises ``CommandError``."""
    device = checked_device(asked.device)
    call = placed(make_inputs(asked.inputs, seed=asked.seed), asked, device)
    stage("loading the model")
    model = ready(source, asked, device)
    if not isinstance(model, nn.Module):
        raise CommandError(f"{source} can be run and compared, not fused: give the model it was written from")
    answer(model, call, source)  # before it is respelled: an exported program checks sizes that it was not exported for
    return Subject(source, in_torch_functions(model), call)


def ready(source: str, asked: Asked, device: torch.device) -> Any:
    """The model that ``source`` names, with its weights, dtype, device and mode; what is no ``nn.Module`` is given as it is."""
    model = load_source(source, asked.args, seed=asked.seed, allow_pickle=asked.allow_pickle)
    if not isinstance(model, nn.Module):
        if asked.weights is not None:
            raise CommandError(f"{source} has its weights inside: leave --weights out", codes.USAGE)
        return model
    if asked.weights is not None:
        if not asked.weights.strip():  # Path("") is the current folder
            raise CommandError("--weights is empty: give a checkpoint, .safetensors or .pt", codes.USAGE)
        load_weights(model, asked.weights, asked.allow_pickle)
    lacking = without_memory(model)
    if lacking:
        raise CommandError(f"{source} has {lacking}")
    try:
        model.to(device=device, dtype=DTYPES[asked.dtype] if asked.dtype else None)
    except Exception as error:
        raise CommandError(f"{source} cannot be moved to {asked.dtype or ''} {device}: {said(error)}") from None
    return set_mode(model, asked.mode == "train")


def set_mode(model: nn.Module, training: bool) -> nn.Module:
    """``model.train(training)``; a model of torch.export has the mode it was exported in, and refuses."""
    try:
        return model.train(training)
    except NotImplementedError:
        return model


def checked_device(name: str) -> torch.device:
    """The device of that name, if this machine has it. Raises ``CommandError``."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except Exception:
        raise CommandError(f"--device {name} is not there on this machine: use cpu, or one that torch lists here", codes.USAGE) from None
    if device.type == "meta":
        raise CommandError("--device meta computes nothing: use cpu", codes.USAGE)
    return device


def placed(call: Call, asked: Asked, device: torch.device) -> Call:
    """The arguments on the device and, where asked for, in the dtype."""
    call = cast(Call, tree_map_only(Tensor, lambda t: t.to(device), call))
    return to_dtype(call, DTYPES[asked.dtype]) if asked.dtype else call


def answer(model: Callable[..., Any], call: Call, source: str) -> Any:
    """What the model answers; nothing of it stays changed. Raises ``CommandError`` where it does not take the inputs."""
    args, kwargs = call
    parts = [model] if isinstance(model, nn.Module) else []
    try:
        with preserved_state(*parts), torch.no_grad():
            return model(*args, **kwargs)
    except Exception as error:
        raise CommandError(f"{source} cannot be called with {described(call)}: {said(error)}; check --inputs") from None


def described(call: Call) -> str:
    """The arguments in words.

    >>> described(((torch.zeros(2, 3),), {"n": 1}))
    'float32[2,3], n=1'
    """
    args, kwargs = call
    return ", ".join([*map(_value, args), *(f"{name}={_value(value)}" for name, value in kwargs.items())]) or "no arguments"


def _value(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{','.join(map(str, value.shape))}]"
    return repr(value) if isinstance(value, (int, float, bool, str, type(None))) else type(value).__name__
