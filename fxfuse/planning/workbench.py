"""What the planner measures: a region's loop and its candidates, as callables on one set of inputs.

Comes in: a region (the original module), the inputs of one of its calls, and whether training or inference is asked for. Goes out:
callables that take one step, the forward alone or forward and backward to all parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch import nn

from fxfuse.models.containers import opened
from fxfuse.models.inputs import clone_inputs
from fxfuse.passes.packs import Packs
from fxfuse.passes.vectorize import Vectorized
from fxfuse.private.pytree import tree_flatten, tree_unflatten
from fxfuse.running.runtime import graph_module, walk
from fxfuse.running.weight_views import evaluate
from fxfuse.weights import recipes

Case = tuple[tuple[Any, ...], dict[str, Any]]


class RaisesError(Exception):
    """A candidate raised where the original answers; inside the planner only."""


class Workbench:
    """Runs a region and its candidates on ``case``. ``inner``: inside a model a region's inputs are activations, which need gradients."""

    def __init__(self, region: nn.Module, case: Case, train: bool, inner: bool) -> None:
        self.region, self.case, self.train, self.inner = region, case, train, inner

    @property
    def batch(self) -> int | None:
        """The size of dim 0 of the first tensor."""
        return next((int(leaf.shape[0]) for leaf in self._tensors() if leaf.dim()), None)

    @property
    def numel(self) -> int:
        """Elements of all tensors that come in."""
        return sum(leaf.numel() for leaf in self._tensors())

    @property
    def device(self) -> str:
        """The kind of device of the first tensor."""
        return next((leaf.device.type for leaf in self._tensors()), "cpu")

    def _tensors(self) -> list[torch.Tensor]:
        return [leaf for leaf in tree_flatten(self.case)[0] if isinstance(leaf, torch.Tensor)]

    def forward(self) -> Callable[[], Any]:
        """The region's own forward, as it is."""
        args, kwargs = self._inputs()
        forward = type(self.region).forward
        return lambda: forward(self.region, *args, **kwargs)

    def loop(self) -> Callable[[], object]:
        """One step of the original."""
        return self._stepped(self.forward(), list(self.region.parameters()))

    def program(self, candidate: Vectorized) -> Callable[[], Any]:
        """A candidate's forward, as it is."""
        return self._compiled(candidate)[0]

    def step(self, candidate: Vectorized) -> Callable[[], object]:
        """One step of a candidate."""
        return self._stepped(*self._compiled(candidate))

    def _inputs(self) -> Any:
        leaves, spec = tree_flatten(clone_inputs(self.case, requires_grad=False))
        for leaf, original in zip(leaves, tree_flatten(self.case)[0], strict=True):
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and self.train:
                leaf.requires_grad_(bool(original.requires_grad) or self.inner)
        return tree_unflatten(leaves, spec)

    def _compiled(self, candidate: Vectorized) -> tuple[Callable[[], Any], list[torch.Tensor]]:
        """A candidate as a callable on the inputs, and its trainable tensors."""
        root: dict[str, Any] = {}
        parameters: list[torch.Tensor] = []
        for node in candidate.graph.nodes:
            if node.op == "call_module":
                root[str(node.target)] = self.region.get_submodule(str(node.target))
                parameters.extend(root[str(node.target)].parameters())
            elif node.op == "get_attr" and node.target not in root:
                tensor = self._tensor(str(node.target), candidate.packs)
                root[str(node.target)] = tensor
                if tensor.requires_grad:
                    parameters.append(tensor)
        graph = candidate.graph
        if not self.train and not candidate.tracked:  # made once, not at every call
            with torch.no_grad():
                graph = evaluate(graph, root)
        code = graph_module(root, graph)
        leaves = tree_flatten(self._inputs())[0]

        def run() -> Any:
            try:
                return code.forward(*leaves)  # a call of the module would print what it raises
            except (RuntimeError, TypeError, ValueError, IndexError) as error:  # no candidate; other regions may still have some
                said = str(error).strip().splitlines()[:1]
                raise RaisesError(f"packed, it raises {': '.join([type(error).__name__, *said])}") from error

        return (torch.enable_grad()(run) if candidate.tracked else run), parameters

    def _tensor(self, target: str, packs: Packs) -> torch.Tensor:
        if target in packs.constants:
            return packs.constants[target]
        for recipe in packs.recipes.values():
            if recipe.name == target:
                with torch.no_grad():
                    packed = recipes.pack(recipe, [walk(self.region, member) for member in recipe.members])
                return nn.Parameter(packed, requires_grad=recipe.requires_grad and (packed.is_floating_point() or packed.is_complex()))
        found: torch.Tensor = walk(self.region, target)
        return found

    def _stepped(self, forward: Callable[[], Any], parameters: list[torch.Tensor]) -> Callable[[], object]:
        if not self.train:

            def infer() -> object:
                with torch.no_grad():
                    return forward()

            return infer
        wanted = [parameter for parameter in parameters if parameter.requires_grad]
        # As in training, gradients live until the next step begins. Were all memory free after each step, glibc would hand it back to the
        # system, and the next step would pay for its pages again: a third of the time of a loop that keeps 200 MiB.
        gradients: list[Any] = []

        def train() -> object:
            gradients.clear()
            with torch.enable_grad():
                outputs = [o for o in tree_flatten(opened(forward()))[0] if isinstance(o, torch.Tensor) and o.requires_grad]
                if not outputs or not wanted:
                    return None
                gradients.extend(torch.autograd.grad(outputs, wanted, [torch.ones_like(o) for o in outputs], allow_unused=True))
                return None

        return train

    def trains(self) -> bool:
        """Does a backward of the original work at all? (One that writes into what autograd saved runs forward, and raises here.)"""
        try:
            self.loop()()
        except RuntimeError:
            return False
        return True
