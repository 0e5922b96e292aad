"""Graphs as plain data: ``torch.fx.Graph`` and ``graph.Program`` to something that pickle takes, and back.

Comes in: a graph whose call targets are importable (torch functions and methods, operators, ``torch.ops`` overloads,
functions of any module). Goes out: lists and tuples of strings, numbers and torch's own picklable values, without code.
"""

from __future__ import annotations

import dataclasses
import numbers
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx

from fxfuse.errors import FxfuseError
from fxfuse.graph import Guard, Place, Program, Store
from fxfuse.private import pytree
from fxfuse.private.schemas import NN_FUNCTIONS, OpOverload, OpOverloadPacket, op_name

from .known_functions import known_function
from .over_lanes import OverLanes

_NAMESPACES = ("torch", "torch.nn.functional", NN_FUNCTIONS, "torch.special", "torch.linalg", "torch.fft", "operator", "math", "builtins")
_LEAF = pytree.tree_flatten(0)[1]
# The values that calls of a graph may be given, beside nodes, containers and functions.
_VALUES: tuple[type, ...] = (str, bytes, int, float, complex, bool, type(None), type(Ellipsis), range)
_VALUES += (torch.Size, torch.dtype, torch.device, torch.layout, torch.memory_format)
_NUMBERS = (bool, int, float, complex)  # as dtypes
_MEMORY_FORMATS = (torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.channels_last_3d)
_KEPT_META = (str, int, float, bool, Place, type(None))


@dataclass(frozen=True)
class NodeRef:
    """Stands for a node in the arguments of another one."""

    name: str


@dataclass(frozen=True)
class Target:
    """A function by name: ``Target("torch", "add")``, ``Target("torch.ops", "aten::add.Tensor")``."""

    module: str
    name: str


@dataclass(frozen=True)
class _OverLanes:
    func: Target
    in_dims: Any
    keywords: tuple[str, ...]


@dataclass(frozen=True)
class _Slice:
    parts: tuple[Any, Any, Any]  # python < 3.14 cannot pickle a slice in protocol 2, and its parts may hold nodes


@dataclass(frozen=True)
class _MemoryFormat:
    name: str


def target_to_data(function: Any) -> Any:
    """Name a function so that ``target_from_data`` finds the same object. Raises ``FxfuseError`` where it is none of those it finds.

    >>> target_to_data(torch.relu)
    Target(module='torch', name='relu')
    """
    if isinstance(function, OverLanes):
        return _OverLanes(target_to_data(function.func), function.in_dims, function.keywords)
    if isinstance(function, OpOverload | OpOverloadPacket):
        return Target("torch.ops", op_name(function))
    name = getattr(function, "__name__", None)
    if name is not None:
        candidates = [Target(str(getattr(function, "__module__", None)), getattr(function, "__qualname__", name))]
        candidates.extend(Target(space, name) for space in _NAMESPACES)
        candidates.append(Target("torch", f"Tensor.{name}"))
        owner = getattr(function, "__objclass__", None)
        if owner is not None:  # methods and slot wrappers: Tensor.__getitem__, or a property's __get__
            candidates.append(Target(owner.__module__, f"{owner.__qualname__}.{name}"))
        for target in candidates:
            try:
                if target_from_data(target) is function:
                    return target
            except FxfuseError:
                continue
    bound = getattr(function, "__self__", None)  # Tensor.shape.__get__
    if bound is not None and name == "__get__" and hasattr(torch.Tensor, getattr(bound, "__name__", "")):
        return Target("torch", f"Tensor.{bound.__name__}.__get__")
    raise FxfuseError(f"a graph that calls {function!r} cannot be saved: it is none of torch's operations")


def target_from_data(target: Any) -> Any:
    """The function that ``target_to_data`` named. Raises ``FxfuseError`` for the name of anything else; imports and calls nothing."""
    if isinstance(target, _OverLanes):
        return OverLanes(target_from_data(target.func), target.in_dims, target.keywords)
    if not isinstance(target, Target):
        raise FxfuseError(f"a saved program may not call a {type(target).__name__}")
    return known_function(target.module, target.name)


def _encode(value: Any) -> Any:
    if isinstance(value, torch.fx.Node):
        return NodeRef(value.name)
    if isinstance(value, slice):
        return _Slice((_encode(value.start), _encode(value.stop), _encode(value.step)))
    if isinstance(value, torch.Size):
        return value
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(_encode(item) for item in value)
    if isinstance(value, list):
        return [_encode(item) for item in value]
    if isinstance(value, dict):
        return {key: _encode(item) for key, item in value.items()}
    if callable(value) and not isinstance(value, type):
        return target_to_data(value)
    if isinstance(value, torch.memory_format):  # an older pickle protocol does not know it
        return _MemoryFormat(str(value).removeprefix("torch."))
    if not isinstance(value, int) and isinstance(value, numbers.Integral):  # of numpy
        return int(value)
    return value


def _decode(value: Any, nodes: dict[str, torch.fx.Node]) -> Any:
    if isinstance(value, NodeRef):
        return nodes[value.name]
    if isinstance(value, _Slice):
        start, stop, step = (_decode(part, nodes) for part in value.parts)
        return slice(start, stop, step)
    if isinstance(value, Target):
        return target_from_data(value)
    if isinstance(value, _MemoryFormat):
        found = {str(each): each for each in _MEMORY_FORMATS}.get(f"torch.{value.name}")
        if found is None:
            raise FxfuseError(f"a saved program names an unknown memory format, {value.name!r}")
        return found
    if type(value) is tuple:
        return tuple(_decode(item, nodes) for item in value)
    if type(value) is list:
        return [_decode(item, nodes) for item in value]
    if type(value) is dict:
        return {key: _decode(item, nodes) for key, item in value.items()}
    # Graphs become source text, in which an object of another class writes what it likes.
    if not isinstance(value, _VALUES) and not any(value is number for number in _NUMBERS):
        raise FxfuseError(f"a saved program may not hold a {type(value).__name__}")
    return value


def _meta(meta: dict[str, Any]) -> dict[str, Any]:
    """What of a node's meta is worth saving: places, names, shapes as text; never tensors or live objects."""
    return {key: value for key, value in meta.items() if isinstance(value, _KEPT_META)}


def graph_to_data(graph: torch.fx.Graph) -> list[dict[str, Any]]:
    """A graph as a list of nodes, each a dict of picklable values.

    >>> graph = torch.fx.Graph()
    >>> _ = graph.output([graph.call_function(torch.relu, (graph.placeholder("x"),))])
    >>> print(graph_from_data(graph_to_data(graph)).python_code("self").src.strip().splitlines()[-1].strip())
    return [relu]
    """
    return [
        {
            "op": node.op,
            "name": node.name,
            "target": target_to_data(node.target) if node.op == "call_function" else node.target,
            "args": _encode(tuple(node.args)),
            "kwargs": _encode(dict(node.kwargs)),
            "meta": _meta(node.meta),
        }
        for node in graph.nodes
    ]


def graph_from_data(data: list[dict[str, Any]]) -> torch.fx.Graph:
    """The graph that ``graph_to_data`` wrote."""
    graph = torch.fx.Graph()
    nodes: dict[str, torch.fx.Node] = {}
    for item in data:
        target = target_from_data(item["target"]) if item["op"] == "call_function" else _checked_name(item["op"], item["target"])
        args, kwargs = _decode(item["args"], nodes), _decode(item["kwargs"], nodes)
        if target is getattr and not _is_property(args, kwargs):
            raise FxfuseError("a saved program may read properties of tensors only")
        node = graph.create_node(item["op"], target, args, kwargs, item["name"])
        node.meta.update(_meta(item["meta"]))
        nodes[item["name"]] = node
    return graph


def _checked_name(op: str, target: Any) -> str:
    """The target of a node that is no function. It becomes source text."""
    ways = {"placeholder": str.isidentifier, "output": str.isidentifier, "call_method": _is_method, "get_attr": _is_path}
    if not isinstance(target, str) or not {**ways, "call_module": _is_path}.get(op, str.isspace)(target):
        raise FxfuseError(f"a saved program may not have a {op} of {target!r}")
    return target


def _is_method(name: str) -> bool:
    return name.isidentifier() and callable(getattr(torch.Tensor, name, None))


def _is_path(name: str) -> bool:
    return not any(sign in name for sign in "\"\\\n\r")


def _is_property(args: Any, kwargs: Any) -> bool:
    plain = len(args) == 2 and not kwargs and isinstance(args[0], torch.fx.Node) and isinstance(args[1], str)
    return plain and args[1][:1] != "_" and hasattr(torch.Tensor, args[1])


def _spec_to_data(spec: Any) -> Any:
    # a TreeSpec pickles, with a FutureWarning for each of its leaves
    return None if spec.is_leaf() else (spec.type, spec.context, [_spec_to_data(child) for child in spec.children()])


def _spec_from_data(data: Any) -> Any:
    if data is None:
        return _LEAF
    kind, context, children = data
    if kind not in pytree.SUPPORTED_NODES or not _is_plain(context):
        raise FxfuseError(f"a saved program may not make a {getattr(kind, '__name__', kind)} of {context!r}")
    return pytree.TreeSpec(kind, context, [_spec_from_data(child) for child in children])


def _is_plain(context: Any) -> bool:
    """Keys, and the classes of containers: what makes a container again calls such a class, and nothing else."""
    if isinstance(context, type):
        return issubclass(context, tuple | dict | list) or dataclasses.is_dataclass(context)
    if type(context) in (tuple, list):
        return all(map(_is_plain, context))
    return not callable(context)


def program_to_data(program: Program) -> dict[str, Any]:
    """A program as picklable data."""
    return {
        "graph": graph_to_data(program.graph),
        "guard": program.guard,
        "in_spec": _spec_to_data(program.in_spec),
        "out_spec": _spec_to_data(program.out_spec),
        "tracked": program.tracked,
        "outside": program.outside,
        "viewed": program.viewed,
        "stores": [(store.module, store.name, _spec_to_data(store.spec)) for store in program.stores],
    }


def program_from_data(data: dict[str, Any]) -> Program:
    """The program that ``program_to_data`` wrote. Raises ``FxfuseError`` for anything else; runs nothing that the data names."""
    try:
        return _program(data)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise FxfuseError(f"the saved program is corrupt ({type(error).__name__}: {error})") from error


def _program(data: dict[str, Any]) -> Program:
    if not isinstance(data["guard"], Guard):
        raise FxfuseError("the saved program is corrupt: it has no guard")
    specs = _spec_from_data(data["in_spec"]), _spec_from_data(data["out_spec"])
    stores = tuple(Store(module, name, _spec_from_data(spec)) for module, name, spec in data.get("stores", ()))
    outside, viewed = (tuple(map(int, data.get(name, ()))) for name in ("outside", "viewed"))
    return Program(graph_from_data(data["graph"]), data["guard"], *specs, stores, bool(data.get("tracked", False)), outside, viewed)
