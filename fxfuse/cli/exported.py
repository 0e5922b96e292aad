"""A program of torch.export as a module that is written in torch's own functions, so that its loops can be found.

Comes in: the module of an exported program, whose graph calls ATen operators. Goes out: an ``nn.Module`` with the same parameters under
the same names, whose forward calls ``F.linear``, ``torch.cat`` and so on. An operator without such a function is called as it is.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.node import map_aggregate

from fxfuse.private import exported as private
from fxfuse.private.pytree import tree_flatten, tree_unflatten
from fxfuse.private.schemas import OpOverload, op_name, schema_of

_END = (1 << 63) - 1
# Operators whose function in torch.nn.functional takes its arguments by other names or in another order: theirs -> the function's.
_RENAMED: dict[str, tuple[Callable[..., Any], dict[str, str]]] = {
    "embedding": (F.embedding, {"weight": "weight", "indices": "input", "padding_idx": "padding_idx"}),
    "batch_norm": (F.batch_norm, {n: n for n in "input running_mean running_var weight bias training momentum eps".split()}),
    "instance_norm": (
        F.instance_norm, {n: n for n in "input running_mean running_var weight bias use_input_stats momentum eps".split()},
    ),
    "layer_norm": (F.layer_norm, {n: n for n in "input normalized_shape weight bias eps".split()}),
    "group_norm": (F.group_norm, {n: n for n in "input num_groups weight bias eps".split()}),
    "dropout": (F.dropout, {"input": "input", "p": "p", "train": "training"}),
    "feature_dropout": (F.dropout2d, {"input": "input", "p": "p", "train": "training"}),
    "alpha_dropout": (F.alpha_dropout, {"input": "input", "p": "p", "train": "training"}),
    "rms_norm": (F.rms_norm, {n: n for n in "input normalized_shape weight eps".split()}),
}  # fmt: skip


class Exported(nn.Module):
    """An exported program; each one is an instance of a class of its own, that has ``run`` over the flat inputs. ``static``: it is for
    inputs of one size only."""

    def __init__(self, module: torch.fx.GraphModule, in_spec: Any, out_spec: Any) -> None:
        super().__init__()
        for name, child in module.named_children():
            if name != private.GUARDS:
                self.add_module(name, child)
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            self.register_parameter(name, parameter)
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            self.register_buffer(name, buffer)
        self.in_spec, self.out_spec, self.keywords = in_spec, out_spec, private.keywords(in_spec)
        self.static = not _has_free_sizes(module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the exported model's forward took and gave."""
        flat, spec = tree_flatten((args, {name: kwargs[name] for name in self.keywords if name in kwargs}))
        if spec != self.in_spec:
            raise TypeError(f"the exported program takes other arguments: {self.in_spec}")
        return tree_unflatten(list(self.run(*flat)), self.out_spec)  # type: ignore[operator]


def in_torch_functions(module: nn.Module) -> nn.Module:
    """The exported program's module, spelled in torch's functions; any other module as it is.

    >>> program = torch.export.export(nn.Linear(2, 3), (torch.zeros(4, 2),))
    >>> module = in_torch_functions(program.module())
    >>> [name for name, _ in module.named_parameters()], module(torch.zeros(4, 2)).shape
    (['weight', 'bias'], torch.Size([4, 3]))
    """
    specs = private.specs(module) if isinstance(module, torch.fx.GraphModule) else None
    if specs is None or not isinstance(module, torch.fx.GraphModule):
        return module
    code = _respelled(module).python_code("self")
    scope = dict(code.globals)
    exec(compile(code.src, "<exported>", "exec"), scope)
    own = {"run": scope["forward"], "forward": _forward(module, specs[0]), "__module__": __name__}
    made = type("Exported", (Exported,), own)(module, *specs)
    assert isinstance(made, nn.Module)
    return made


def _forward(module: torch.fx.GraphModule, in_spec: Any) -> Callable[..., Any]:
    """``Exported.forward`` with the names that the program's arguments have: what is written of it has them too."""

    def forward(self: Exported, *args: Any, **kwargs: Any) -> Any:
        return Exported.forward(self, *args, **kwargs)

    keywords = private.keywords(in_spec)
    names = [name for name in inspect.signature(module.forward).parameters if name not in keywords]
    kinds = [*((name, inspect.Parameter.POSITIONAL_ONLY) for name in names), *((name, inspect.Parameter.KEYWORD_ONLY) for name in keywords)]
    if len(names) == private.positional(in_spec) and "self" not in (*names, *keywords):
        parameters = [inspect.Parameter(name, kind) for name, kind in (("self", inspect.Parameter.POSITIONAL_ONLY), *kinds)]
        forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return forward


def _respelled(module: torch.fx.GraphModule) -> torch.fx.Graph:
    graph = torch.fx.Graph()
    nodes: dict[torch.fx.Node, torch.fx.Node] = {}
    model, dtype = _dtype_of_inputs(module)
    own: list[torch.fx.Node] = []  # the node that is that dtype, where it is needed

    def copied(value: Any) -> Any:
        if isinstance(value, torch.fx.Node):
            return nodes[value]
        if value is not dtype or model not in nodes:
            return value
        if not own:
            own.append(graph.call_function(getattr, (nodes[model], "dtype")))
        return own[0]

    for node in module.graph.nodes:
        if node.op == "call_module" and node.target == private.GUARDS:
            continue
        if node.op == "output":
            graph.output(map_aggregate(node.args[0], copied))
            continue
        if node.op != "call_function":
            nodes[node] = graph.node_copy(node, copied)
            continue
        args, kwargs = map_aggregate(node.args, copied), map_aggregate(node.kwargs, copied)
        nodes[node] = _call(graph, node.target, list(args), dict(kwargs))
    return graph


def _has_free_sizes(module: torch.fx.GraphModule) -> bool:
    given = [node.meta.get("val") for node in module.graph.nodes if node.op == "placeholder"]
    return any(type(size) is not int for value in given if isinstance(value, Tensor) for size in value.shape)


def _dtype_of_inputs(module: torch.fx.GraphModule) -> tuple[torch.fx.Node | None, torch.dtype | None]:
    """The first input of floating numbers, and its dtype. Where the program names that dtype, the model may have said ``x.dtype``: so it
    is computed in the dtype that comes, and can be compared in float64."""
    for node in module.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, Tensor) and value.is_floating_point():
            return node, value.dtype
    return None, None


def _call(graph: torch.fx.Graph, target: Any, args: list[Any], kwargs: dict[str, Any]) -> torch.fx.Node:
    if not isinstance(target, OpOverload) or not op_name(target).startswith("aten::"):
        return graph.call_function(target, tuple(args), kwargs)
    name = op_name(target).removeprefix("aten::").split(".")[0]
    names = [argument.name for argument in schema_of(target).arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if name == "sym_size":
        return graph.call_method("size", (given["self"], given["dim"]))
    if name == "slice":
        return _slice(graph, given)
    if name == "copy_" and _is_piece(args[0]):
        return _write(graph, args[0], args[1])
    if name in _RENAMED:
        function, renamed = _RENAMED[name]
        return graph.call_function(function, (), {renamed[key]: value for key, value in given.items() if key in renamed})
    return graph.call_function(_function(name) or target, tuple(args), kwargs)


def _function(name: str) -> Callable[..., Any] | None:
    """The function or method of torch of an operator's name that takes its arguments in the operator's order."""
    for space in (F, torch, Tensor, torch.linalg, torch.special):
        found = getattr(space, name, None)
        if callable(found) and not hasattr(found, "__code__"):  # C functions: their schema is the operator's
            return found  # type: ignore[no-any-return]
    return None


def _slice(graph: torch.fx.Graph, given: dict[str, Any]) -> torch.fx.Node:
    base, dim = given["self"], given.get("dim", 0)
    start, end, step = given.get("start") or 0, given.get("end"), given.get("step", 1)
    end = None if isinstance(end, int) and end == _END else end
    if isinstance(dim, int) and dim < 0:
        return graph.call_function(torch.ops.aten.slice.Tensor, (base, dim, start, end, step))
    if start == 0 and end is None and step == 1:
        return base  # type: ignore[no-any-return]
    return graph.call_function(operator.getitem, (base, (*[slice(None)] * dim, slice(start, end, step))))


def _is_piece(node: torch.fx.Node) -> bool:
    """Is this a slice that nothing but a write into it uses? (``out[:, i] = y`` is exported as ``out.select(1, i).copy_(y)``.)"""
    return node.op == "call_function" and node.target in (operator.getitem, torch.select) and not node.users


def _write(graph: torch.fx.Graph, piece: torch.fx.Node, value: Any) -> torch.fx.Node:
    index: list[Any] = []
    while _is_piece(piece) or (piece.target in (operator.getitem, torch.select) and piece.op == "call_function" and not piece.users):
        base, graph_index = piece.args[0], piece.args[1:]
        index.insert(0, _index(piece.target, graph_index))
        graph.erase_node(piece)
        assert isinstance(base, torch.fx.Node)
        piece = base
    for each in index[:-1]:
        piece = graph.call_function(operator.getitem, (piece, each))
    graph.call_function(operator.setitem, (piece, index[-1], value))
    return piece


def _index(target: Any, rest: tuple[Any, ...]) -> Any:
    return rest[0] if target is operator.getitem else (*[slice(None)] * rest[0], rest[1])
