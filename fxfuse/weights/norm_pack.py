"""Packs of LayerNorms are LayerNorms to those who ask, as trainers do that choose weight decay by the class of a module.

Comes in: the modules whose weights a pack holds. Goes out: the node that holds the pack. (transformers' Trainer gives no weight decay to
what lies in an ``nn.LayerNorm``; without this, fusing would change what it trains.)
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fxfuse.graph import Recipe

from .lane import Pack, Watch


class LayerNormPack(Pack, nn.LayerNorm):
    """Holds the weights of the LayerNorms of all lanes; ``normalized_shape`` and ``eps`` are those of one of them."""

    def __init__(self, watch: Watch, like: nn.LayerNorm) -> None:
        super().__init__(watch)
        for name in ("normalized_shape", "eps", "elementwise_affine"):
            setattr(self, name, getattr(like, name))
        for name in ("weight", "bias"):  # one of the two may lie in no pack
            self.register_parameter(name, None)

    def forward(self, input: Tensor) -> Tensor:
        """No call goes through a pack."""
        raise NotImplementedError("this holds the weights of LayerNorms that run together, and is not called itself")

    def extra_repr(self) -> str:
        """Nothing: one lane's shape would say little."""
        return ""


def norm_nodes(recipes: list[Recipe], owners: list[list[nn.Module]]) -> dict[str, nn.LayerNorm]:
    """The paths of the nodes that hold weights of LayerNorms only, below them too, each with one of these. ``owners``: of each
    recipe's members, the modules.
    """
    found: dict[str, nn.LayerNorm] = {}
    others: list[str] = []
    for recipe, modules in zip(recipes, owners, strict=True):
        first: Any = modules[0]
        if all(isinstance(module, nn.LayerNorm) for module in modules):
            found.setdefault(recipe.name.rpartition(".")[0], first)
        else:
            others.append(recipe.name)
    return {node: norm for node, norm in found.items() if not any(name.startswith(f"{node}.") for name in others)}
