"""Operators as objects: their types, names and schemas.

Private: ``torch._ops.OpOverload``, ``OpOverloadPacket`` (the types of ``torch.ops.aten.add.Tensor`` and ``torch.ops.aten.add``) and
``HigherOrderOperator`` (of ``torch.ops.higher_order.cond``), their
``_schema`` and names, and the namespaces in which torch's C functions live. ``torch.library`` only registers ops.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

__all__ = ["C_FUNCTIONS", "NN_FUNCTIONS", "HigherOrderOperator", "OpOverload", "OpOverloadPacket", "op_name", "schema_of"]

NN_FUNCTIONS = torch._C._nn.__name__  # where F.gelu and its like are found by name

# Namespaces of C functions that compute on tensors, and hold nothing else that can be called.
C_FUNCTIONS: dict[str, Any] = {
    "torch": torch._C._VariableFunctions,
    **{space.__name__: space for space in (getattr(torch._C, name) for name in ("_nn", "_special", "_linalg", "_fft"))},
}


def schema_of(overload: Any) -> Any:
    """The schema of an overload: ``arguments`` (name, type, default, alias info), ``returns``, ``is_mutable``.

    >>> [argument.name for argument in schema_of(torch.ops.aten.relu.default).arguments]
    ['self']
    """
    return overload._schema


def op_name(op: OpOverload | OpOverloadPacket) -> str:
    """The name below ``torch.ops``.

    >>> op_name(torch.ops.aten.add.Tensor), op_name(torch.ops.aten.add)
    ('aten::add.Tensor', 'aten::add')
    """
    if isinstance(op, OpOverload):
        return f"{op._schema.name}.{op._overloadname}"
    return str(op._qualified_op_name)
