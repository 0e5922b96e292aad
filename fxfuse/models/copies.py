"""Copies of modules, as ``copy.deepcopy`` makes them, in a tenth of its time.

Comes in: a model. Goes out: ``sharing_copy``: a copy with the same Parameters and its own everything else, to record on;
``independent_copy``: a copy that shares nothing. Ordinary modules (most have no copying of their own) are copied attribute by
attribute, everything unusual by ``copy.deepcopy`` with the same memo, so that aliases and cycles come out as they went in. One thing is
added: a tensor that is no leaf of autograd (hidden state kept as an attribute), at which deepcopy raises, is copied detached.
"""

from __future__ import annotations

import copy
import copyreg
import types
from collections import OrderedDict
from typing import Any, TypeVar

import torch
from torch import nn

from fxfuse.private.torch_function import DisableTorchFunction

from .side_by_side import move_buffers_apart

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")

# Types of values that deepcopy returns as they are, or that cannot be changed.
_ATOMIC: frozenset[type] = frozenset(
    [
        *(type(None), type(Ellipsis), type(NotImplemented), bool, int, float, complex, str, bytes, range, type, property),
        *(types.FunctionType, types.BuiltinFunctionType),
        *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format),
    ]
)


def sharing_copy(model: M) -> M:
    """A copy of ``model`` with the same Parameters and its own buffers, attributes and submodules.

    Buffers that lie side by side in one memory have memory of their own in the copy.

    Raises what ``copy.deepcopy`` raises for what cannot be copied (a lock, an open file).

    >>> model = nn.Linear(2, 2)
    >>> sharing_copy(model).weight is model.weight
    True
    """
    copied = copy_with(model, {id(parameter): parameter for parameter in model.parameters()})
    move_buffers_apart(copied)
    return copied


def independent_copy(model: M) -> M:
    """A copy of ``model`` that shares nothing with it: what ``copy.deepcopy(model)`` gives.

    Like that, it leaves out the ``grad`` of Parameters and the attributes set on them. Raises what deepcopy raises.

    >>> model = nn.Linear(2, 2)
    >>> other = independent_copy(model)
    >>> other.weight is model.weight, bool((other.weight == model.weight).all())
    (False, True)
    """
    return copy_with(model, {})


def copy_ordinary(module: M, memo: dict[int, Any]) -> M:
    """``copy.deepcopy(module, memo)`` for a module that is copied attribute by attribute, whatever its class says. See ``ordinary``."""
    copier = _Copier(memo)
    made: Any = copier.shell(module)
    copier.fill(module)
    result: M = made
    return result


def copy_with(model: M, memo: dict[int, Any]) -> M:
    """A copy of ``model`` in which what ``memo`` names by its id is replaced by what it says, as in ``copy.deepcopy``."""
    copier = _Copier(memo)
    # All ordinary modules exist before any attribute is copied: what deepcopy meets in the attributes, it finds in the memo.
    # What lies inside an unusual module is left to that.
    shells: list[nn.Module] = []
    pending: list[nn.Module | None] = [model]
    while pending:
        module = pending.pop()
        if module is not None and id(module) not in memo and copier.ordinary(type(module)):
            copier.shell(module)
            shells.append(module)
            pending.extend(module._modules.values())
    for module in shells:
        copier.fill(module)
    return copier.copy(model)


class _Copier:
    def __init__(self, memo: dict[int, Any]) -> None:
        self.memo = memo
        self.classes: dict[type, bool] = {}

    def ordinary(self, cls: type) -> bool:
        known = self.classes.get(cls)
        if known is None:
            known = self.classes[cls] = ordinary(cls)
        return known

    def shell(self, module: nn.Module) -> nn.Module:
        """The copy of an ordinary module, still without attributes."""
        made = self.memo[id(module)] = object.__new__(type(module))
        return made

    def fill(self, module: nn.Module) -> None:
        """Give the copy of an ordinary module its attributes."""
        memo = self.memo
        target = memo[id(module)].__dict__
        for name, value in module.__dict__.items():
            kind = type(value)
            if name == "_compiled_call_impl":  # nn.Module.__getstate__ drops it
                continue
            if kind in _ATOMIC:
                target[name] = value
            elif kind is OrderedDict and not value and id(value) not in memo:  # hooks, of which there are ten in every module
                target[name] = memo[id(value)] = OrderedDict()
            else:
                target[name] = self.copy(value)

    def copy(self, value: T) -> T:
        """``copy.deepcopy(value, memo)``, but for tensors that are no leaves."""
        kind: Any = type(value)
        if kind in _ATOMIC:
            return value
        memo, key = self.memo, id(value)
        if key in memo:
            found: T = memo[key]
            return found
        source: Any = value
        made: Any
        if kind is dict or kind is OrderedDict:
            if kind is OrderedDict and source.__dict__:
                made = copy.deepcopy(source, memo)
            else:
                made = memo[key] = kind()
                for name, item in source.items():
                    made[self.copy(name)] = self.copy(item)
        elif kind is list:
            made = memo[key] = []
            for item in source:
                made.append(self.copy(item))
        elif kind is tuple:
            items = tuple([self.copy(item) for item in source])
            if key in memo:  # a tuple that holds itself, by way of a list
                made = memo[key]
            else:
                same = all(a is b for a, b in zip(items, source, strict=True))
                made = source if same else items
                memo[key] = made
        elif kind is set and all(type(item) in _ATOMIC for item in source):
            made = memo[key] = set(source)
        elif issubclass(kind, torch.Tensor):
            made = self.tensor(source)
        elif issubclass(kind, nn.Module) and self.ordinary(kind):
            made = self.shell(source)
            self.fill(source)
        else:
            made = copy.deepcopy(source, memo)
        result: T = made
        return result

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        with DisableTorchFunction():
            leaf = tensor.is_leaf
        if leaf:
            return copy.deepcopy(tensor, self.memo)
        # Its history belongs to a call that is over; the copy starts anew, as a leaf that asks for no gradient.
        made = self.memo[id(tensor)] = tensor.detach().clone()
        return made


_COPYING = ("__deepcopy__", "__reduce_ex__", "__reduce__", "__getstate__", "__getnewargs__", "__getnewargs_ex__")
_STANDARD = {name: getattr(nn.Module, name, None) for name in _COPYING}  # __getstate__ is the instance's __dict__, less what was compiled


def ordinary(cls: type) -> bool:
    """Is ``__dict__`` all that there is to an instance, and does nothing but nn.Module have a say in its copying?

    >>> ordinary(nn.Linear), ordinary(nn.LSTM)
    (True, False)
    """
    if any(getattr(cls, name, None) is not _STANDARD[name] for name in _COPYING):
        return False
    if getattr(cls, "__new__") is not object.__new__ or cls in copyreg.dispatch_table or _slot_names(cls):  # noqa: B009
        return False
    setstate = getattr(cls, "__setstate__", None)
    # Those of torch.nn supply attributes that old pickles lack: an object that is copied has them.
    return setstate is nn.Module.__setstate__ or str(getattr(setstate, "__module__", "")).startswith("torch.nn.modules.")


def _slot_names(cls: type) -> list[str]:
    """The attributes that instances keep outside of their ``__dict__``, as copy and pickle find them."""
    names: list[str] = copyreg._slotnames(cls)  # type: ignore[attr-defined]
    return names
