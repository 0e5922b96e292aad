"""Weights by the original's names: state dicts, parameters and gradients of a model, fused or not.

Comes in: a model. Goes out: what the original model would have answered: ``original_state_dict``,
``original_named_parameters``, ``original_gradients``; and the way in, ``load_original_state_dict``. The arithmetic of packing
(``pack``, ``unpack``) is in ``fxfuse.weights.recipes``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxfuse.distributed.packs import whole
from fxfuse.errors import StateDictError
from fxfuse.models.sharded import gathered, is_sharded, shared_as
from fxfuse.private.state_dicts import set_versions, versions_of

from .all_or_nothing import all_or_nothing
from .lane import Pack, Slot, by_original_name, lane_info
from .lane_parameter import lane_parameter
from .recipes import lane_view, pack, packed_shape, unpack
from .saved_recipes import noted, unpacked

__all__ = [
    "load_original_state_dict",
    "named_original_parameters",
    "original_gradients",
    "original_named_parameters",
    "original_state_dict",
    "pack",
    "packed_shape",
    "unpack",
]


def original_state_dict(model: nn.Module | Mapping[str, Any]) -> OrderedDict[str, Any]:
    """The ``state_dict()`` that the original model would give: its names in its order, tied names and buffers included.

    Instead of a model, a state dict that ``torch.save(fused.state_dict())`` wrote will do, in any process: it carries the recipes (which
    formats of tensors only, safetensors and torch.distributed.checkpoint, leave out; then ``StateDictError`` is raised).

    Tensors are detached, contiguous copies in the model's dtypes and on its devices. Works on any module, fused or not. Where weights are
    sharded over processes (FSDP2), every process calls it, and gets all of them whole.

    >>> list(original_state_dict(nn.Linear(2, 3)))
    ['weight', 'bias']
    """
    if isinstance(model, Mapping):
        odd = next((key for key in model if "packed" in str(key).split(".") and not noted(model)), None)
        if odd is not None:
            raise StateDictError(
                f"the state dict has packed names ({odd}) and carries no recipes: load it into the fused model, "
                "or save with torch.save(fused.state_dict()), or by the original's names"
            )
        return unpacked(model)
    with by_original_name():
        live = model.state_dict()
    saved: OrderedDict[str, Any] = OrderedDict()
    for name, value in live.items():
        saved[name] = gathered(value.detach()).clone(memory_format=torch.contiguous_format) if _plain(value) else value
    metadata = versions_of(live)
    if metadata is not None:
        packs = {path for path, module in model.named_modules() if isinstance(module, Pack)}
        set_versions(saved, OrderedDict((k, v) for k, v in metadata.items() if k not in packs))
    return saved


def _plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided


def load_original_state_dict(model: nn.Module, state_dict: Mapping[str, Any], strict: bool = True) -> Any:
    """Load a state dict by the original's names, exactly; nothing is written where anything does not fit.

    Values are copied into the model's tensors (dtype and device stay the model's). With ``strict=False`` missing and
    unexpected names are left alone; mis-shaped ones are errors still. Returns what ``Module.load_state_dict`` returns. Raises
    ``StateDictError`` that lists missing, unexpected and mis-shaped names.

    >>> layer = nn.Linear(2, 3)
    >>> load_original_state_dict(layer, original_state_dict(layer))
    <All keys matched successfully>
    """
    if not isinstance(state_dict, Mapping):
        raise StateDictError(f"a state dict is a mapping of names to tensors, a {type(state_dict).__name__} came")
    with by_original_name(), torch.no_grad():
        expected = model.state_dict()
    missing = [name for name in expected if name not in state_dict]
    unexpected = [name for name in state_dict if name not in expected]
    problems = []
    if strict and missing:
        problems.append(f"missing: {', '.join(missing)}")
    if strict and unexpected:
        problems.append(f"unexpected: {', '.join(unexpected)}")
    for name, value in state_dict.items():
        target = expected.get(name)
        if isinstance(target, Tensor) and not isinstance(value, Tensor):
            problems.append(f"{name} is a {type(value).__name__}, the model has a tensor of shape {tuple(target.shape)}")
        elif isinstance(target, Tensor) and tuple(target.shape) != tuple(value.shape):
            problems.append(f"{name} has shape {tuple(value.shape)}, the model has {tuple(target.shape)}")
    if problems:
        packed = set(model.state_dict()) - set(expected)
        if packed.intersection(state_dict):
            problems.append("it has the names of a fused model's packs: fused.load_state_dict takes these")
        raise StateDictError(f"the state dict does not fit {type(model).__name__}: " + "; ".join(problems))
    given = OrderedDict((name, value) for name, value in state_dict.items() if name in expected)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in given and is_sharded(tensor):
            given[name] = shared_as(given[name], tensor)
    versions = versions_of(state_dict)
    if versions is not None:
        set_versions(given, versions)
    with all_or_nothing(model):
        result = model.load_state_dict(given, strict=False)
    return type(result)(missing, unexpected)


def original_named_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter of the original by its name, in its order: views of the pack for packed ones, else the Parameter.

    A tied parameter comes once, by its first name, as in ``named_parameters()``. Views are differentiable to the pack.

    >>> {name: tuple(p.shape) for name, p in original_named_parameters(nn.Linear(2, 3)).items()}
    {'weight': (3, 2), 'bias': (3,)}
    """
    return {
        name: lane_parameter(value) if isinstance(value, Slot) and not torch.compiler.is_compiling() else _viewed(value)
        for name, value in each_parameter(model)
    }


def named_original_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """``named_parameters()`` of the original: pairs of name and tensor, whose ``grad`` is the lane's share of the pack's gradient.

    >>> [name for name, _ in named_original_parameters(nn.Linear(2, 3))]
    ['weight', 'bias']
    """
    yield from original_named_parameters(model).items()


def _viewed(value: Slot | Tensor) -> Tensor:
    return value.view() if isinstance(value, Slot) else value


def original_gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """The gradient of every parameter of the original by its name: a view of the packed gradient, or None without one.

    >>> original_gradients(nn.Linear(2, 3))
    {'weight': None, 'bias': None}
    """
    grads: dict[str, Tensor | None] = {}
    for name, value in each_parameter(model):
        if isinstance(value, Slot):
            grad = value.packed().grad
            grads[name] = None if grad is None else lane_view(value.recipe, whole(grad), value.index)
        else:
            grads[name] = value.grad
    return grads


def each_parameter(model: nn.Module) -> Iterator[tuple[str, Slot | Tensor]]:
    """Every parameter of the original by its name, in its order: where it lies in a pack, or the Parameter; a tied one once."""
    seen: set[Any] = set()
    for path, module in model.named_modules():
        info = lane_info(module)
        slots = {} if info is None else info.slots
        if isinstance(module, Pack):
            continue
        own = module._parameters
        order = [*(name for name in (info.parameters if info else ()) if name in slots or name in own)]
        order += [name for name in own if name not in order]
        for name in order:
            value: Slot | Tensor | None = slots.get(name, own.get(name))
            if value is None:
                continue
            key = (id(value.packed()), value.index) if isinstance(value, Slot) else id(value)
            if key not in seen:
                seen.add(key)
                yield f"{path}.{name}" if path else name, value
