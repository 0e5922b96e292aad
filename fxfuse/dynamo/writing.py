"""Which calls of dynamo's graphs write into a tensor that they are given.

Comes in: a node. Goes out: yes or no, by the names of torch's calls.
"""

from __future__ import annotations

import torch.fx

_WRITERS = frozenset(("setitem", *(f"i{name}" for name in "add sub mul truediv floordiv mod pow and or xor lshift rshift matmul".split())))


def writes_first(node: torch.fx.Node) -> bool:
    """Does the call write its first argument, or the one named ``out``?"""
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", str(node.target))
    in_place = name.endswith("_") and not name.endswith("__")
    return bool(node.args) and (in_place or name in _WRITERS or bool(node.kwargs.get("inplace")) or "out" in node.kwargs)
