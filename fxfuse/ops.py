"""One spelling for every torch call.

Comes in: a recorded callable with its arguments (``F.relu(x, inplace=True)``, ``x.relu()``, ``torch.relu(x)``). Goes out: an ``Op`` and
its arguments in the order of the operator's schema, so that equal computations compare equal. The schema names the arguments and
``torch.Tag.pointwise`` says what is elementwise: there is no table by hand beyond the few functions that no schema knows.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .private.schemas import schema_of

# Elementwise functions of torch.nn.functional, and dunders of Tensor, that no operator schema of that name describes.
_POINTWISE_WITHOUT_SCHEMA = frozenset(
    "softsign tanhshrink logsigmoid log_sigmoid hardswish __rdiv__ __rpow__ __rfloordiv__ floor_divide "
    "float double half bfloat16 long int short char byte bool cfloat cdouble where complex polar real imag conj "
    "resolve_conj get_real get_imag autocast_to".split()
)
_RANDOM_WITHOUT_SCHEMA = frozenset(
    "dropout1d dropout2d dropout3d feature_alpha_dropout gumbel_softmax fractional_max_pool2d fractional_max_pool3d "
    "fractional_max_pool2d_with_indices fractional_max_pool3d_with_indices".split()
)
_DUNDERS = {
    "__add__": "add", "__radd__": "add", "__sub__": "sub", "__rsub__": "rsub", "__mul__": "mul", "__rmul__": "mul", "__truediv__": "div",
    "__div__": "div", "__matmul__": "matmul", "__pow__": "pow", "__neg__": "neg", "__abs__": "abs", "__floordiv__": "floor_divide",
    "__mod__": "remainder", "__eq__": "eq", "__ne__": "ne", "__lt__": "lt", "__le__": "le", "__gt__": "gt", "__ge__": "ge",
    "__and__": "bitwise_and", "__or__": "bitwise_or", "__xor__": "bitwise_xor", "__invert__": "bitwise_not", "__rdiv__": "__rdiv__",
    "__rtruediv__": "__rdiv__",
    "true_divide": "div", "divide": "div", "multiply": "mul", "subtract": "sub", "negative": "neg", "absolute": "abs", "greater": "gt",
    "less": "lt", "swapaxes": "transpose", "swapdims": "transpose", "moveaxis": "movedim", "concat": "cat", "concatenate": "cat",
    "clip": "clamp",
}  # fmt: skip
_GETTERS = {"T": "t", "mT": "mT", "H": "H", "mH": "mH", "real": "real", "imag": "imag", "data": "detach"}
_VARIADIC = frozenset("view reshape permute expand broadcast_to repeat tile flip new_zeros new_ones new_empty new_full".split())
_FACTORIES = frozenset("zeros ones empty rand randn".split())
# Of ops that may drop on their own: where they do not, they draw nothing.
_DROPS: dict[str, tuple[str, str]] = {
    "scaled_dot_product_attention": ("dropout_p", ""),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), ("dropout", "train")),
}
_NOISE = frozenset({"_stacklevel", "inplace"})
# Views of some layouts, copies of others.
MAY_COPY = frozenset({"reshape", "flatten", "contiguous", "ravel", "reshape_as"})
_MISSING = inspect.Parameter.empty


@dataclass(frozen=True)
class Op:
    """A torch function in its canonical spelling; callable with its arguments in the order of ``names``."""

    name: str
    overload: str
    names: tuple[str, ...]
    defaults: tuple[Any, ...] = field(compare=False, hash=False)
    keyword_only: frozenset[str] = field(compare=False, hash=False)
    pointwise: bool = field(compare=False)
    func: Callable[..., Any] = field(compare=False, hash=False)
    random: bool = field(default=False, compare=False)

    @property
    def __name__(self) -> str:
        return self.name

    def invocation(self, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The shortest call of ``func`` that means the same: defaults are left out."""
        given = list(zip(self.names, args, self.defaults, strict=True))
        keywords = {n: a for n, a, d in given if n in self.keyword_only and not _same(a, d)}
        positional = [(n, a, d) for n, a, d in given if n not in self.keyword_only]
        while positional and _same(positional[-1][1], positional[-1][2]):
            positional.pop()
        return tuple(a for _, a, _ in positional), keywords

    def __call__(self, *args: Any) -> Any:
        positional, keywords = self.invocation(args)
        return self.func(*positional, **keywords)


def _same(value: Any, default: Any) -> bool:
    if default is _MISSING:
        return False
    return value is default or (type(value) is type(default) and not isinstance(value, torch.fx.Node) and bool(value == default))


def op_name(func: Callable[..., Any]) -> str:
    """The canonical name of a recorded callable: ``"add"`` for ``Tensor.__radd__``, ``"relu"`` for ``F.relu``."""
    name = str(getattr(func, "__name__", type(func).__name__))
    if name == "__get__":
        attribute = str(getattr(func, "__self__", func).__name__)
        return _GETTERS.get(attribute, f"get_{attribute}")
    return _DUNDERS.get(name, name)


# What torch takes besides its own names, for those who come from numpy.
_NUMPY_NAMES = {"axis": "dim", "keepdims": "keepdim"}


def canonical(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Op, tuple[Any, ...]]:
    """The ``Op`` of a call and its arguments in schema order, defaults filled in.

    ``args`` may hold anything in the place of a tensor; what counts for choosing the overload is which are numbers, lists, strings.
    """
    name = op_name(func)
    if name in _VARIADIC and len(args) > 2 and all(not isinstance(a, (tuple, list)) for a in args[1:]):
        args = (args[0], tuple(args[1:]))
    if name in _FACTORIES and args and all(not isinstance(a, (tuple, list)) for a in args):
        args = (tuple(args),)
    if name == "einsum" and args and isinstance(args[0], str):
        operands = tuple(args[1]) if len(args) == 2 and isinstance(args[1], (tuple, list)) else tuple(args[1:])
        return Op(name, "python", ("equation", "operands"), (_MISSING, _MISSING), frozenset(), False, func), (args[0], operands)
    signature = _signature(func)
    if signature is not None:
        return _from_signature(signature, args, kwargs)
    found = _match(name, tuple(_kind(a) for a in args), tuple((k, _kind(v)) for k, v in kwargs.items()))
    if found is None and not _NUMPY_NAMES.keys().isdisjoint(kwargs):
        kwargs = {_NUMPY_NAMES.get(key, key): value for key, value in kwargs.items()}
        found = _match(name, tuple(_kind(a) for a in args), tuple((k, _kind(v)) for k, v in kwargs.items()))
    if found is None:
        names = tuple(f"arg{i}" for i in range(len(args))) + tuple(kwargs)
        op = Op(name, "?", names, (_MISSING,) * len(names), frozenset(kwargs), name in _POINTWISE_WITHOUT_SCHEMA, func)
        return op, (*args, *kwargs.values())
    overload, names, defaults, keyword_only, pointwise, random = found
    values = dict(zip(names, args, strict=False))
    values.update({("input" if k == "input" or k == "self" else k): v for k, v in kwargs.items()})
    if name in _DROPS:
        p, flag = _DROPS[name]
        random = bool(values.get(p, 0)) and bool(values.get(flag, True))
    op = Op(name, overload, names, defaults, keyword_only, pointwise or name in _POINTWISE_WITHOUT_SCHEMA, func, random)
    return op, tuple(values.get(n, d) for n, d in zip(names, defaults, strict=True))


@functools.cache
def _signature(func: Callable[..., Any]) -> tuple[tuple[str, ...], dict[str, Any], Op] | None:
    """The parameters of a Python function, their defaults, and its ``Op``; None for builtins and for variadic functions."""
    if not inspect.isfunction(func):
        return None
    try:
        # F.max_pool2d takes *args: it picks one of two functions by return_indices, whose parameters are the same.
        signature = inspect.signature(getattr(torch.nn.functional, f"{func.__name__}_with_indices", func))
    except (TypeError, ValueError):
        return None
    kinds = {p.kind for p in signature.parameters.values()}
    if kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
        return None
    kept = [p for p in signature.parameters.values() if p.name not in _NOISE]
    names = tuple("input" if p.name == "self" else p.name for p in kept)
    # An argument that stands after one we leave out can only be passed by its name.
    until = next((i for i, p in enumerate(signature.parameters.values()) if p.name in _NOISE), len(names))
    keyword_only = [p.kind is inspect.Parameter.KEYWORD_ONLY for p in kept]
    by_name = frozenset(n for i, n in enumerate(names) if i >= until or keyword_only[i])
    name = op_name(func)
    pointwise, random = _tags(name)
    op = Op(
        name, "python", names, tuple(p.default for p in kept), by_name, pointwise or name in _POINTWISE_WITHOUT_SCHEMA, func, random
    )
    return tuple(signature.parameters), {n: p.default for n, p in signature.parameters.items()}, op


def _from_signature(
    signature: tuple[tuple[str, ...], dict[str, Any], Op], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Op, tuple[Any, ...]]:
    parameters, defaults, op = signature
    values = defaults | dict(zip(parameters, args, strict=False)) | kwargs
    given = tuple(values[n] for n in parameters if n not in _NOISE)
    if op.name == "pow" and isinstance(values.get("exponent"), (int, float)) and not op.pointwise:
        op = dataclasses.replace(op, pointwise=True)
    return op, given


@functools.cache
def _tags(name: str) -> tuple[bool, bool]:
    """(elementwise, random) of an operator by name, over all its overloads."""
    packet = getattr(torch.ops.aten, name, None)
    if packet is None:
        return False, name in _RANDOM_WITHOUT_SCHEMA
    tags = [set(getattr(packet, o).tags) for o in packet.overloads()]
    return any(torch.Tag.pointwise in t for t in tags), any(torch.Tag.nondeterministic_seeded in t for t in tags)


def _kind(value: Any) -> str:
    if value is None:
        return "None"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int) or (isinstance(value, torch.fx.Node) and _is_size(value)):
        return "int"
    if isinstance(value, (float, complex)):
        return "float"
    if isinstance(value, str):
        return "str"
    if isinstance(value, (tuple, list)):
        kinds = {_kind(v) for v in value}
        return "List[Tensor]" if "Tensor" in kinds else "List[int]" if kinds <= {"int", "bool"} else "List[float]"
    if isinstance(value, torch.dtype):
        return "dtype"
    if isinstance(value, torch.device):
        return "device"
    if isinstance(value, (torch.memory_format, torch.layout)):
        return "dtype"
    return "Tensor"


def _is_size(node: torch.fx.Node) -> bool:
    return isinstance(node.target, Op) and node.target.name.startswith("size")


def _fits(kind: str, declared: str) -> bool:
    if declared.startswith("Optional["):
        return kind == "None" or _fits(kind, declared[9:-1])
    if kind == "None":
        return False
    if declared == "Tensor":
        return kind == "Tensor"
    if declared in ("number", "Scalar"):
        return kind in ("int", "float", "bool")
    if declared == "float":
        return kind in ("float", "int")
    if declared == "int":
        return kind in ("int", "dtype")
    if declared in ("bool", "str"):
        return kind == declared
    if declared in ("Device",):
        return kind in ("device", "str")
    if declared in ("List[int]",):
        return kind in ("List[int]", "int")
    if declared in ("List[float]",):
        return kind in ("List[float]", "List[int]", "float")
    if declared.startswith(("List[Tensor]", "List[Optional[Tensor]]")):
        return kind in ("List[Tensor]",)
    return False


@functools.cache
def _match(
    name: str, positional: tuple[str, ...], keywords: tuple[tuple[str, str], ...]
) -> tuple[str, tuple[str, ...], tuple[Any, ...], frozenset[str], bool, bool] | None:
    """The first overload of ``aten::name`` that takes arguments of these kinds."""
    packet = getattr(torch.ops.aten, name, None)
    if packet is None:
        return None
    for overload_name in packet.overloads():
        overload = getattr(packet, overload_name)
        arguments = schema_of(overload).arguments
        names = ["input" if a.name == "self" else a.name for a in arguments]
        types = {n: str(a.type) for n, a in zip(names, arguments, strict=True)}
        given = dict(keywords)
        if "out" in names or len(positional) > len([a for a in arguments if not a.kwarg_only]) or not set(given) <= set(names):
            continue
        if not set(given).isdisjoint(names[: len(positional)]):  # x.var(-1, unbiased=False) is not var(unbiased)
            continue
        taken = dict(zip(names, positional, strict=False)) | given
        required = {n for n, a in zip(names, arguments, strict=True) if not a.has_default_value()}
        if not required <= set(taken) or not all(_fits(kind, types[n]) for n, kind in taken.items()):
            continue
        defaults = tuple(_default(a) if a.has_default_value() else _MISSING for a in arguments)
        tags = overload.tags
        return (
            overload_name,
            tuple(names),
            defaults,
            # Tensor.to takes it by name only, whatever its schema says.
            frozenset(n for n, a in zip(names, arguments, strict=True) if a.kwarg_only or n == "memory_format"),
            torch.Tag.pointwise in tags,
            torch.Tag.nondeterministic_seeded in tags,
        )
    return None


def _default(argument: Any) -> Any:
    value = argument.default_value
    return tuple(value) if isinstance(value, list) else value
