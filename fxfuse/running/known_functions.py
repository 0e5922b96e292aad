"""The functions that a saved program may call: torch's operations on tensors, fxfuse's own, arithmetic. Nothing else is found by its name.

Comes in: a module's name and a name in it, as a file spells them. Goes out: the function. A name of anything else (``os.system``,
``builtins.eval``, ``torch.load``) is refused, no module is imported, and nothing is called.
"""

from __future__ import annotations

import builtins
import math
import operator
import sys
from types import BuiltinFunctionType, FunctionType, GetSetDescriptorType, MethodDescriptorType, WrapperDescriptorType
from typing import Any

import torch

from fxfuse.errors import FxfuseError
from fxfuse.private.schemas import C_FUNCTIONS, OpOverload, OpOverloadPacket

_ARITHMETIC = ("abs", "min", "max", "round", "sum", "len", "pow", "divmod", "int", "float", "bool", "tuple", "list", "slice", "getattr")
_PYTHON = frozenset(("torch.nn.functional", "torch.functional", "torch.nn.init"))  # whose own functions compute on tensors
_OURS = ("fxfuse.passes.", "fxfuse.functional")
_SPACES = ("torch", "torch.nn.functional", "torch.special", "torch.linalg", "torch.fft", "torch.functional", "torch.nn.init")


def known_function(module: str, name: str) -> Any:
    """The function of this name. Raises ``FxfuseError`` where it is none that a program may call.

    >>> known_function("torch", "relu") is torch.relu
    True
    >>> known_function("os", "system")
    Traceback (most recent call last):
    ...
    fxfuse.errors.FxfuseError: a saved program may not call os.system
    """
    found = _find(module, name) if isinstance(module, str) and isinstance(name, str) else None
    if found is None:
        raise FxfuseError(f"a saved program may not call {module}.{name}")
    return found


def _find(module: str, name: str) -> Any:
    if module == "torch.ops":
        return _operator(name)
    if module in ("operator", "_operator"):
        found = vars(operator).get(name)
        return found if isinstance(found, BuiltinFunctionType) and name != "call" else None
    if module == "math":
        found = vars(math).get(name)
        return found if isinstance(found, BuiltinFunctionType) else None
    if module == "builtins":
        return getattr(builtins, name) if name in _ARITHMETIC else None
    if (module, name) == ("torch.autograd", "grad"):
        return torch.autograd.grad
    if name.startswith(("Tensor.", "TensorBase.")):
        return _method(name.partition(".")[2])
    if module.startswith(_OURS):
        found = vars(sys.modules[module]).get(name) if module in sys.modules else None
        return found if isinstance(found, FunctionType) and str(found.__module__).startswith(_OURS) else None
    if module in C_FUNCTIONS or (module in _SPACES and module in sys.modules):
        found = getattr(sys.modules.get(module) or C_FUNCTIONS[module], name, None)
        return found if _computes(found) else None
    return None


def _operator(name: str) -> Any:
    space, _, rest = name.partition("::")
    op, _, overload = rest.partition(".")
    if not all(part.isidentifier() for part in (space, op, overload or "default")):
        return None
    try:
        packet: Any = getattr(getattr(torch.ops, space), op)
        found = getattr(packet, overload) if overload else packet
    except (AttributeError, RuntimeError):
        return None
    return found if isinstance(packet, OpOverloadPacket) and isinstance(found, OpOverload | OpOverloadPacket) else None


def _method(name: str) -> Any:
    """A method of tensors, or the reading of one of their properties."""
    name, _, rest = name.partition(".")
    found = next((vars(cls)[name] for cls in torch.Tensor.__mro__[:-1] if name in vars(cls)), None)
    if rest == "__get__" and isinstance(found, GetSetDescriptorType | property):
        return found.__get__
    callable_ = isinstance(found, FunctionType | MethodDescriptorType | WrapperDescriptorType)
    return getattr(torch.Tensor, name) if callable_ and not rest else None


def _computes(found: Any) -> bool:
    """Is this one of torch's operations, and not ``torch.load``, a class or a module that torch's namespace holds too?"""
    if isinstance(found, FunctionType):
        return found.__module__ in _PYTHON
    name = getattr(found, "__name__", "")
    return isinstance(found, BuiltinFunctionType) and any(getattr(space, name, None) is found for space in C_FUNCTIONS.values())
