"""Choose how to compute each lane set, and whether to, by measuring.

Comes in: a region with its prepared graph, and the options. Goes out: the rewritten program with the lowering of every bundle chosen, or a
``Refusal`` where the loop is faster. Candidates are timed against the region's own forward on the recorded inputs, in turn and by
medians; ``objective="launches"`` fuses all that is legal, ``tune=False`` takes the first lowering that the rules name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from . import recipes
from .determinism import preserved_state
from .graph import Refusal
from .inputs import clone_inputs
from .launches import Launches, count
from .memory import peak_bytes
from .options import Options
from .passes.emit import Packs
from .passes.vectorize import Prepared, Vectorized, vectorize
from .timing import medians

# A form must be this much faster than the loop to be worth the change: below, it is noise.
LEAST_GAIN = 1.02
# A layer of its own that becomes a region pays for the guard at every call.
GUARD_SECONDS = 6e-6


@dataclass
class Choice:
    """The outcome for one region. ``loop`` and ``fused`` are median seconds, ``peak`` bytes (loop, fused); None where not measured."""

    vectorized: Vectorized | None
    lowering: dict[Any, str]
    refusal: Refusal | None = None
    seconds: tuple[float, float] | None = None
    peak: tuple[int, int] | None = None
    tried: list[tuple[str, float]] = field(default_factory=list)


class Planner:
    """Plans one region: ``prepared`` is its graph in the mode that is timed."""

    def __init__(self, prepared: Prepared, region: nn.Module, packs: Packs, options: Options) -> None:
        self.prepared, self.region, self.packs, self.options = prepared, region, packs, options
        self.train = options.mode == "train"
        raw: tuple[Any, Any] = prepared.lifted.frame.raw or ((), {})
        self.args, self.kwargs = raw

    def plan(self) -> Choice:
        prefer = self._preferred()
        base = vectorize(self.prepared, self.packs, {}, prefer)
        if base is None:
            return Choice(None, {}, Refusal("nothing is left to fuse", self.prepared.lifted.place, self.prepared.lifted.frame.path))
        if self.options.objective == "launches":
            choice = self._fewest_launches(base, prefer)
        elif not self.options.tune:
            choice = Choice(base, {})
        else:
            choice = self._tuned(base, prefer)
        if self.options.max_memory is not None and choice.refusal is None:
            choice = self._within_memory(choice)
        return choice

    def _preferred(self) -> str:
        """The lowering asked for by name; for launches the product forms, one launch each."""
        if self.options.lowering == "grouped_conv":
            return "grouped_conv"
        return "baddbmm" if self.options.lowering == "bmm" or self.options.objective == "launches" else ""

    def _fewest_launches(self, base: Vectorized, prefer: str) -> Choice:
        """The lowerings that launch least, counted on one run each; refused only where the loop launches no more."""
        with preserved_state(self.region):
            loop = _launches(self._forward())
            best, least = base, _launches(self._program(base))
            lowering = {key: prefer if prefer in options else options[0] for key, options in base.choices.items()}
            if self.options.lowering == "auto" and self.options.tune:
                for key, options in base.choices.items():
                    for option in options:
                        other = vectorize(self.prepared, self.packs, {**lowering, key: option}, prefer) if option != lowering[key] else None
                        counted = _launches(self._program(other)) if other is not None else least
                        if other is not None and counted.total < least.total:
                            best, lowering, least = other, {**lowering, key: option}, counted
        choice = Choice(best, lowering)
        if least.total >= loop.total and least.heavy >= loop.heavy:
            frame = self.prepared.lifted.frame
            reason = f"left as a loop: packed launches {least.total} ops, the loop {loop.total}"
            choice.refusal = Refusal(reason, self.prepared.lifted.place, frame.path)
        return choice

    def _tuned(self, base: Vectorized, prefer: str) -> Choice:
        frame = self.prepared.lifted.frame
        if self.prepared.single and not base.choices:
            return Choice(base, {}, Refusal("a layer with one spelling", self.prepared.lifted.place, frame.path))
        loop = self._loop()
        best, lowering = base, {key: options[0] for key, options in base.choices.items()}
        if prefer:
            lowering = {key: prefer if prefer in options else options[0] for key, options in base.choices.items()}
        best_run = self._runner(best)
        tried: list[tuple[str, float]] = []
        loop_time, best_time = medians([loop, best_run], budget=0.4)
        tried.append((_describe(lowering), best_time))
        if self.options.lowering == "auto":
            for key, options in base.choices.items():
                for option in options:
                    if option == lowering[key]:
                        continue
                    other_lowering = {**lowering, key: option}
                    other = vectorize(self.prepared, self.packs, other_lowering, prefer)
                    if other is None:
                        continue
                    run = self._runner(other)
                    now, other_time = medians([best_run, run], budget=0.25)
                    tried.append((_describe(other_lowering), other_time))
                    if other_time < 0.97 * now:
                        best, best_run, lowering = other, run, other_lowering
            loop_time, best_time = medians([loop, best_run], budget=0.5)
        if self.prepared.single:
            best_time += GUARD_SECONDS + 0.03 * loop_time
        choice = Choice(best, lowering, seconds=(loop_time, best_time), tried=tried)
        if self.prepared.single and all(lowering[key] == options[0] for key, options in base.choices.items()):
            choice.refusal = Refusal("no other spelling of the layer is faster", self.prepared.lifted.place, frame.path)
        elif best_time * LEAST_GAIN > loop_time:
            ratio = loop_time / best_time
            batch = self._batch()
            where = f"{' at batch ' + str(batch) if batch is not None else ''} on {self._device()}"
            what = "forward and backward" if self.train else "inference"
            choice.refusal = Refusal(
                f"left as a loop: packed runs {ratio:.2f}x{where} ({what})", self.prepared.lifted.place, self.prepared.lifted.frame.path
            )
        return choice

    def _within_memory(self, choice: Choice) -> Choice:
        assert choice.vectorized is not None
        assert self.options.max_memory is not None
        used = peak_bytes(self._runner(choice.vectorized))
        if used > self.options.max_memory:
            choice.refusal = Refusal(
                f"left as a loop: packed needs {used} bytes at its peak, max_memory allows {self.options.max_memory}",
                self.prepared.lifted.place,
                self.prepared.lifted.frame.path,
            )
        return choice

    def measure_memory(self, choice: Choice) -> None:
        """Peak bytes of the loop and of the chosen form, in the mode that was asked for."""
        if choice.vectorized is not None:
            with preserved_state(self.region):
                choice.peak = (peak_bytes(self._loop()), peak_bytes(self._runner(choice.vectorized)))

    # -- what is timed ------------------------------------------------------------------------------------------------------------

    def _batch(self) -> int | None:
        for leaf in tree_flatten((self.args, self.kwargs))[0]:
            if isinstance(leaf, torch.Tensor) and leaf.dim():
                return int(leaf.shape[0])
        return None

    def _device(self) -> str:
        for leaf in tree_flatten((self.args, self.kwargs))[0]:
            if isinstance(leaf, torch.Tensor):
                return leaf.device.type
        return "cpu"

    def _inputs(self) -> tuple[Any, Any]:
        args, kwargs = clone_inputs((self.args, self.kwargs), requires_grad=False)
        leaves, spec = tree_flatten((args, kwargs))
        originals = tree_flatten((self.args, self.kwargs))[0]
        # A region inside a model gets activations, which need gradients where the model is trained.
        inner = self.prepared.lifted.frame.parent >= 0
        for leaf, original in zip(leaves, originals, strict=True):
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and self.train:
                leaf.requires_grad_(bool(original.requires_grad) or inner)
        rebuilt: tuple[Any, Any] = tree_unflatten(leaves, spec)
        return rebuilt

    def _forward(self) -> Callable[[], Any]:
        args, kwargs = self._inputs()
        forward = type(self.region).forward
        return lambda: forward(self.region, *args, **kwargs)

    def _loop(self) -> Callable[[], object]:
        return self._stepped(self._forward(), list(self.region.parameters()))

    def _program(self, vectorized: Vectorized) -> Callable[[], Any]:
        return self._compiled(vectorized)[0]

    def _runner(self, vectorized: Vectorized) -> Callable[[], object]:
        return self._stepped(*self._compiled(vectorized))

    def _compiled(self, vectorized: Vectorized) -> tuple[Callable[[], Any], list[torch.Tensor]]:
        """The candidate as a callable on the recorded inputs, and its trainable tensors."""
        root: dict[str, Any] = {}
        parameters: list[torch.Tensor] = []
        for node in vectorized.graph.nodes:
            if node.op == "call_module":
                root[str(node.target)] = self.region.get_submodule(str(node.target))
                parameters.extend(root[str(node.target)].parameters())
            elif node.op == "get_attr" and node.target not in root:
                tensor = self._tensor(str(node.target), vectorized.packs)
                root[str(node.target)] = tensor
                if tensor.requires_grad:
                    parameters.append(tensor)
        code = torch.fx.GraphModule(root, vectorized.graph)
        leaves = tree_flatten(self._inputs())[0]
        return lambda: code(*leaves), parameters

    def _tensor(self, target: str, packs: Packs) -> torch.Tensor:
        if target in packs.constants:
            return packs.constants[target]
        for recipe in packs.recipes.values():
            if recipe.name == target:
                with torch.no_grad():
                    packed = recipes.pack(recipe, [_walk(self.region, member) for member in recipe.members])
                return nn.Parameter(packed, requires_grad=recipe.requires_grad and (packed.is_floating_point() or packed.is_complex()))
        return _walk(self.region, target)

    def _stepped(self, forward: Callable[[], Any], parameters: list[torch.Tensor]) -> Callable[[], object]:
        """One measured step: the forward alone, or forward and backward to all parameters."""
        if not self.train:

            def infer() -> object:
                with torch.no_grad():
                    return forward()

            return infer
        wanted = [p for p in parameters if p.requires_grad]

        def train() -> object:
            with torch.enable_grad():
                outputs = [o for o in tree_flatten(forward())[0] if isinstance(o, torch.Tensor) and o.requires_grad]
                if not outputs:
                    return None
                return torch.autograd.grad(outputs, wanted, [torch.ones_like(o) for o in outputs], allow_unused=True) if wanted else None

        return train


def _launches(forward: Callable[[], Any]) -> Launches:
    return count(forward, bound=False)


def _walk(root: nn.Module, target: str) -> torch.Tensor:
    at: Any = root
    for part in target.split("."):
        at = getattr(at, part)
    assert isinstance(at, torch.Tensor)
    return at


def _describe(lowering: dict[Any, str]) -> str:
    """The lowerings as a person reads them: ``linear 32x32: baddbmm``."""
    words = []
    for key, name in lowering.items():
        name_of, shapes = (key[1], key[2]) if key[0] == "single" else (key[0], key[2])
        weight = "x".join(map(str, shapes[1] or ())) if len(shapes) > 1 else ""
        words.append(f"{name_of} {weight}: {name}" if weight else f"{name_of}: {name}")
    return ", ".join(dict.fromkeys(words)) or "as the rules name it"
