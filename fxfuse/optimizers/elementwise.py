"""Which optimizers may go from lanes to packs: those whose step treats every number of a parameter alike.

Comes in: an optimizer. Goes out: why it cannot, or which of its states are numbers of the whole parameter (a count of steps). Anything that
looks at a parameter as a whole (its norm, its rows, its rank) would do something else to a pack of many.
"""

from __future__ import annotations

from typing import Any

from torch import optim

# Exact classes (a subclass may step otherwise), each with the state keys that hold one number for the whole parameter.
_STEP = frozenset({"step"})
ELEMENTWISE: dict[type, frozenset[str]] = {
    optim.SGD: frozenset(),
    optim.NAdam: frozenset({"step", "mu_product"}),
    optim.ASGD: frozenset({"step", "eta", "mu"}),
    **dict.fromkeys(
        (optim.Adam, optim.AdamW, optim.Adagrad, optim.RMSprop, optim.Adadelta, optim.RAdam, optim.Adamax, optim.Rprop, optim.SparseAdam),
        _STEP,
    ),
}

_KNOWN = {
    "lbfgs": "it searches along all parameters as one vector",
    "adafactor": "it factors second moments over the rows and columns of each parameter",
    "muon": "it orthogonalizes each parameter as a matrix",
    "shampoo": "it preconditions each dim of a parameter",
    "soap": "it preconditions each dim of a parameter",
    "lamb": "it scales each parameter's step by norms of that parameter",
    "lars": "it scales each parameter's step by norms of that parameter",
}


def unsupported(optimizer: Any) -> str | None:
    """Why the optimizer cannot be migrated; None where it can.

    >>> import torch
    >>> unsupported(optim.LBFGS([torch.zeros(2, requires_grad=True)]))
    'LBFGS is not elementwise: it searches along all parameters as one vector'
    """
    kind = type(optimizer)
    if kind in ELEMENTWISE:
        return None
    for base in kind.__mro__:
        reason = _KNOWN.get(base.__name__.lower())
        if reason is not None:
            return f"{kind.__name__} is not elementwise: {reason}"
    return f"{kind.__name__} is not one of torch's elementwise optimizers: whether its step treats a pack as its lanes is not known"
