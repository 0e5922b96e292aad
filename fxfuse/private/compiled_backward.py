"""When compiled autograd takes what a node of the backward has saved, which is before any hook of the node runs.

Private: ``_compiled_autograd_key`` of the nodes of ``torch.autograd.Function``, which torch calls on each of them just before that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

KEY = "_compiled_autograd_key"


def before_it_is_taken(node: Any, call: Callable[[], None]) -> None:
    """Have ``call`` called then; nothing where the node is not one of Python's, as those of torch's own ops, which tell nobody.

    >>> import torch
    >>> x = torch.ones(2, requires_grad=True)
    >>> before_it_is_taken((x * x).grad_fn, lambda: None)
    """
    of_torch = getattr(node, KEY, None)
    if of_torch is None:
        for behind, _ in node.next_functions:  # what is returned of a compiled graph may be a view that torch made of its result
            if hasattr(behind, KEY):
                before_it_is_taken(behind, call)
        return
    key = of_torch()  # now: a method of the node that is kept by the node would keep it, and what it saved

    def called() -> Any:
        call()
        return key

    setattr(node, KEY, called)
