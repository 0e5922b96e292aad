"""What a region's loop and its candidates cost by the static model, at the recorded sizes.

Comes in: a prepared graph, and whether a backward is asked for. Goes out: seconds that rank them (``cost``); nothing runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.fx

from fxfuse.passes.vectorize import Prepared, Vectorized

from .cost import emitted_seconds, loop_seconds


@dataclass(frozen=True)
class Estimator:
    """``inner``: the region's inputs are activations of a model around it, which need gradients. ``compiled``: by Inductor, later on."""

    device: str  # the kind
    train: bool
    inner: bool
    compiled: bool = False

    def program(self, prepared: Prepared, candidate: Vectorized) -> float:
        """Seconds of one step of a rewritten program."""
        originals = prepared.lifted.graph.nodes
        held = {str(node.target): bool(node.meta.get("requires_grad")) for node in originals if node.op == "get_attr"}
        held.update((recipe.name, recipe.requires_grad) for recipe in candidate.packs.recipes.values())
        given = iter([node for node in originals if node.op == "placeholder"])
        needs: dict[torch.fx.Node, bool] = {}
        for node in candidate.graph.nodes:
            if node.op == "placeholder":
                needs[node] = self._input(next(given))
            elif node.op == "get_attr":
                needs[node] = held.get(str(node.target), False)
        return emitted_seconds(candidate.graph, self.device, needs if self.train else None, self.compiled)

    def loop(self, prepared: Prepared) -> float:
        """Seconds of one step of the loop."""
        needs: dict[torch.fx.Node, bool] = {}
        for node in prepared.lifted.graph.nodes:
            if node.op == "placeholder":
                needs[node] = self._input(node)
            elif node.op == "get_attr":
                needs[node] = bool(node.meta.get("requires_grad"))
        return loop_seconds(prepared.lifted.graph, self.device, needs if self.train else None, self.compiled)

    def _input(self, node: torch.fx.Node) -> bool:
        dtype = node.meta.get("dtype")
        return self.inner and dtype is not None and bool(dtype.is_floating_point)
