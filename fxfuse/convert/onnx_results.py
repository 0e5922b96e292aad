"""What an ONNX model returns: tensors only, under names that a user knows.

Comes in: an exported program; the ONNX model made of it. Goes out: the program without results that are plain values, and those; the
model's outputs named by the keys of the dicts, or the places in the tuples, that the original returned.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from fxfuse.private.pytree import tree_flatten


def without_constants(program: torch.export.ExportedProgram) -> list[list[Any] | None]:
    """Take results that are plain values (numbers, None) out of the program; of each result None, or ``[its value]``.

    >>> class Two(torch.nn.Module):
    ...     def forward(self, x):
    ...         return {"y": x + 1, "layers": 3}
    >>> program = torch.export.export(Two(), (torch.zeros(2),))
    >>> without_constants(program), len(program.graph_signature.output_specs)
    ([None, [3]], 1)
    """
    signature = torch.export.graph_signature
    output = next(node for node in program.graph.nodes if node.op == "output")
    found: list[list[Any] | None] = []
    kept = []
    for spec, value in zip(program.graph_signature.output_specs, output.args[0], strict=True):
        constant = isinstance(spec.arg, signature.ConstantArgument)
        if spec.kind == signature.OutputKind.USER_OUTPUT:
            found.append([value] if constant else None)
        if not constant:
            kept.append((spec, value))
    if all(value is None for value in found):
        return found
    program.graph_signature.output_specs[:] = [spec for spec, _ in kept]
    call = program.module_call_graph[0].signature  # of the program as a whole
    assert call is not None
    call.outputs = [each for each in call.outputs if not isinstance(each, signature.ConstantArgument)]
    call.out_spec = tree_flatten(tuple(0 for value in found if value is None))[1]
    output.args = (tuple(value for _, value in kept),)
    program.graph_module.recompile()
    return found


def with_constants(tensors: list[Any], returned: list[list[Any] | None]) -> list[Any]:
    """All results in order.

    >>> with_constants(["y"], [None, [3]])
    ['y', 3]
    """
    left = iter(tensors)
    return [next(left) if value is None else value[0] for value in returned]


def name_results(model: Any, structure: Any, returned: list[list[Any] | None]) -> None:
    """Name the outputs of an ``onnx_ir`` model. Values inside that have such a name get another; inputs and weights keep theirs."""
    names = [name or "output" for name in _paths(structure, "")] if structure is not None else [f"output_{i}" for i in range(len(returned))]
    names = [name for name, value in zip(names, returned, strict=True) if value is None]
    graph = model.graph
    outputs = list(graph.outputs)
    fixed = {value.name for value in graph.inputs} | set(graph.initializers)
    names = [f"output_{name}" if name in fixed else name for name in names]
    own = {id(value) for node in graph for value in node.outputs}  # one that is an input or a weight is named already
    twice = len({id(value) for value in outputs}) != len(outputs)
    if twice or len(names) != len(outputs) or len(set(names) | fixed) != len(names) + len(fixed):
        return
    inner = [value for node in graph for value in node.outputs if not any(value is output for output in outputs)]
    used = {value.name for value in inner} | fixed | set(names)
    for value in inner:
        if value.name in names:
            number = next(i for i in range(len(used) + 1) if f"{value.name}_{i}" not in used)
            value.name = f"{value.name}_{number}"
            used.add(value.name)
    for value, name in zip(outputs, names, strict=True):
        if id(value) in own:
            value.name = name


def _paths(structure: Any, path: str) -> Iterator[str]:
    """Of each leaf: ``y`` of ``{"y": ...}``, ``output_0`` of a tuple, ``y.0`` of a list in a dict."""
    if structure == "*":
        yield path
        return
    kind, *parts = structure
    keys: list[Any] = list(range(len(parts)))
    if kind == "dict":
        keys, *parts = parts
    for key, part in zip(keys, parts, strict=True):
        alone = key if isinstance(key, str) else f"output_{key}"
        yield from _paths(part, f"{path}.{key}" if path else alone)
