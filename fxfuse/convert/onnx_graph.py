"""A program of torch.export in operators that torch's ONNX exporter knows.

Comes in: an exported program, which is changed in place. Goes out: the same program. An operator that copies what a view would show
(``aten.select_copy``) becomes the view and a copy of it: the exporter has no translation for the one, and one for each of the others.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx

_aten = torch.ops.aten
_VIEWS: dict[Any, Any] = {
    _aten.select_copy.int: _aten.select.int,
    _aten.unbind_copy.int: _aten.unbind.int,
    _aten.split_copy.Tensor: _aten.split.Tensor,
    _aten.split_with_sizes_copy.default: _aten.split_with_sizes.default,
    _aten.narrow_copy.default: _aten.narrow.default,
    _aten.slice_copy.Tensor: _aten.slice.Tensor,
    _aten.expand_copy.default: _aten.expand.default,
    _aten.permute_copy.default: _aten.permute.default,
    _aten.transpose_copy.int: _aten.transpose.int,
    _aten.squeeze_copy.dim: _aten.squeeze.dim,
    _aten.unsqueeze_copy.default: _aten.unsqueeze.default,
    _aten.view_copy.default: _aten.view.default,
}


def copies_as_views(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Rewrite the copying operators.

    >>> class First(torch.nn.Module):
    ...     def forward(self, x):
    ...         return torch.select_copy(x, 1, 0)
    >>> program = copies_as_views(torch.export.export(First(), (torch.zeros(2, 3),)))
    >>> [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    ['aten.select.int', 'aten.clone.default']
    """
    graph = program.graph
    for node in list(graph.nodes):
        view = _VIEWS.get(node.target) if node.op == "call_function" else None
        if view is None:
            continue
        node.target = view
        whole = not isinstance(node.meta.get("val"), (list, tuple))
        for piece in [node] if whole else [user for user in node.users if user.target is operator.getitem]:
            with graph.inserting_after(piece):
                copied = graph.call_function(_aten.clone.default, (piece,))
            copied.meta = dict(piece.meta)
            piece.replace_all_uses_with(copied, delete_user_cb=lambda user, copied=copied: user is not copied)
            _rename(program, piece.name, copied.name)
    program.graph_module.recompile()
    return program


def _rename(program: torch.export.ExportedProgram, old: str, new: str) -> None:
    """In the program's signature, which names its results."""
    for spec in program.graph_signature.output_specs:
        if spec.arg.name == old:
            spec.arg.name = new
