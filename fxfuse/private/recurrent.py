"""The second list of Parameters that nn.LSTM, nn.GRU and nn.RNN keep for their kernels.

Private: ``_flat_weights``, ``_flat_weight_refs``, ``_flat_weights_names``, ``_init_flat_weights`` of ``nn.RNNBase``. Its forward reads the
list, not the Parameters; a module whose Parameters are views of a pack has to list those views.
"""

from __future__ import annotations

from typing import Any

from torch import nn

LISTS = ("_flat_weights", "_flat_weight_refs")


def listing() -> dict[str, property]:
    """Class attributes that list the weights as they are found under their names, at every read."""

    def weights(self: Any) -> list[Any]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    def refs(self: Any) -> list[None]:
        return [None] * len(self._flat_weights_names)

    def set_refs(self: Any, value: Any) -> None:
        self.__dict__["_flat_weight_refs"] = []  # nn.LSTM's __getstate__ deletes it from the dict: it has to be there

    return dict(zip(LISTS, (property(weights, lambda self, value: None), property(refs, set_refs)), strict=True))


def forget(module: nn.RNNBase) -> None:
    """Drop an instance's own lists, which would hide those of its class."""
    module.__dict__.pop("_flat_weights", None)
    module.__dict__["_flat_weight_refs"] = []


def relist(module: nn.RNNBase) -> None:
    """Give a module that has its Parameters back its own lists again."""
    if "_flat_weights" not in module.__dict__:
        module._init_flat_weights()
