"""Attributes that are set on a fused module and that none of its forwards reads: books that trainers keep.

Comes in: the names that the code of a region spells (``surroundings.Spelled``), a module and the name of an attribute that is set on it.
Goes out: may programs go on? Lightning notes at every step which hook it is in, accelerate that a model was prepared.
"""

from __future__ import annotations

from torch import nn

from .surroundings import Spelled

# What accelerate notes on the model that it prepares; no forward reads these, whatever names it makes up.
_OF_ACCELERATE = frozenset(("_is_accelerate_prepared", "_original_forward"))


def unread(spelled: Spelled | None, module: nn.Module, name: str) -> bool:
    """Does no code of the region read this attribute?

    Torch's own code is not among what is spelled: attributes of nn.Module, and those that modules of torch had, count as read.

    >>> layer = nn.Linear(2, 3)
    >>> unread(Spelled(frozenset({"scale"}), False), layer, "note"), unread(Spelled(frozenset({"scale"}), False), layer, "scale")
    (True, False)
    >>> unread(Spelled(frozenset(), False), layer, "in_features"), unread(Spelled(frozenset(), True), layer, "note")
    (False, False)
    """
    if name in _OF_ACCELERATE:
        return True
    if spelled is None or spelled.computed or name in spelled.names or hasattr(nn.Module, name):
        return False
    kind = type(module)
    existed = name in module.__dict__ or hasattr(kind, name)
    return not existed or not any(_of_torch(base) for base in kind.__mro__ if base is not nn.Module)


def _of_torch(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "torch"
