"""Does the rewritten graph give what dynamo's gives?

Comes in: a ``Captured`` and what was made of it. Goes out: a ``Validation``: outputs, gradients of inputs and weights, and buffers, in
float64 and with other weights, on the given inputs and on others of every open size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fxfuse.checking.difference import Validation
from fxfuse.checking.validate import Example, validate
from fxfuse.models.quiet import quiet

from .call import without_autocast
from .captured import Captured, Slot
from .rewrite import Rewritten, apart, other_data
from .written import write


class Rejoined(Captured):
    """The rewritten graph as a model with the weights of the original."""

    more = ("autocast",)

    def __init__(self, captured: Captured, rewritten: Rewritten) -> None:
        torch.nn.Module.__init__(self)
        written = write(captured, rewritten, outside=(), every=True)
        nodes = [node for node in written.graph.nodes if node.op == "placeholder"]
        self.training, self.tracked, self.given, self.symbols = captured.training, captured.tracked, captured.given, captured.symbols
        self.slots = [replace(slot, node=node) for node, slot in zip(nodes, captured.slots, strict=False)]
        self.slots += [Slot(n, f"constants.{name}") for n, name in zip(nodes[len(self.slots) :], written.constants, strict=True)]
        casts = rewritten.program.guard.autocast
        self.autocast = None if casts is None else casts[0]
        constants = {f"constants.{name}": rewritten.constants[name] for name in written.constants}
        self.hold({**captured.weights(), **constants}, saved=lambda name: name not in constants)
        self.take(written.graph)

    def forward(self, *tensors: Tensor) -> Any:
        """The rewritten graph, with autocast off where it is spelled out."""
        with without_autocast(self.autocast):
            return super().forward(*tensors)


def check(captured: Captured, rewritten: Rewritten) -> Validation:
    """The rewritten graph held against dynamo's."""
    given = apart(captured.given)
    examples: list[Example] = [(given, {}), *((tensors, {}) for tensors in rewritten.examples)]
    if len(examples) == 1:
        examples.append((other_data(given), {}))
    # Float64 proves it; in float32 the two would be run once more to measure the rounding, which nobody reads here.
    tensors = [*given, *captured.weights().values()]
    narrow = any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in tensors)
    with quiet(), torch.inference_mode(False), torch.enable_grad():
        return validate(captured, Rejoined(captured, rewritten), examples, modes=("given",), must_run=1, own_dtype=narrow)
