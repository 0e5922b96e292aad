"""How a program of torch.export takes and gives what is nested.

Private: the attributes ``_in_spec`` and ``_out_spec`` of the module that ``ExportedProgram.module()`` gives, and the name ``_guards_fn`` of
the submodule that checks its inputs.
"""

from __future__ import annotations

from typing import Any

import torch.fx

GUARDS = "_guards_fn"


def specs(module: torch.fx.GraphModule) -> tuple[Any, Any] | None:
    """The structures of ``(args, kwargs)`` and of the result; None where ``module`` is no program of torch.export."""
    found = getattr(module, "_in_spec", None), getattr(module, "_out_spec", None)
    return None if None in found else found


def keywords(in_spec: Any) -> list[str]:
    """The names of the keyword arguments, in the program's order."""
    return list(in_spec.child(1).context) if hasattr(in_spec, "child") else list(in_spec.children_specs[1].context)


def positional(in_spec: Any) -> int:
    """How many positional arguments the program takes."""
    return int((in_spec.child(0) if hasattr(in_spec, "child") else in_spec.children_specs[0]).num_children)
