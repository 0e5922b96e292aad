"""Does the rewritten graph give what dynamo's gives?

Comes in: a ``Captured`` and what was made of it. Goes out: a ``Validation``: outputs, gradients of inputs and weights, and buffers, in float64
and with other weights, on the given inputs and on others of every open size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxfuse.difference import Validation
from fxfuse.quiet import quiet
from fxfuse.validate import validate
from fxfuse.widen import widened

from .captured import Captured, Slot, Step, steps_of
from .rewrite import Rewritten, apart, other_data
from .written import write


class Rejoined(Captured):
    """The rewritten graph as a model with the weights of the original."""

    def __init__(self, captured: Captured, rewritten: Rewritten) -> None:
        torch.nn.Module.__init__(self)
        self.training = captured.training
        written = write(captured, rewritten, outside=(), every=True)
        nodes = [node for node in written.graph.nodes if node.op == "placeholder"]
        slots = [Slot(n, s.weight, s.input, s.place) for n, s in zip(nodes, captured.slots, strict=False)]
        for node, name in zip(nodes[len(slots) :], written.constants, strict=True):
            slots.append(Slot(node, weight=f"constants.{name}"))
        self.slots, self.given, self.symbols = slots, captured.given, captured.symbols
        self.steps = steps_of(written.graph)
        self.autocast = rewritten.program.guard.autocast
        wide = widened(written.graph)
        self.wide_slots = [Slot(n, s.weight, s.input, s.place) for n, s in zip(wide.nodes, slots, strict=False)]
        self.wide_steps = steps_of(wide)
        self.recorded = _widest(captured.given, captured.weights().values())
        weights = captured.weights()
        weights.update({f"constants.{name}": rewritten.constants[name] for name in written.constants})
        self.hold(weights, saved=lambda name: not name.startswith("constants."))

    def copied(self, made: Any) -> None:
        made.autocast, made.wide_slots, made.wide_steps, made.recorded = self.autocast, self.wide_slots, self.wide_steps, self.recorded

    def forward(self, *tensors: Tensor) -> Any:
        """The rewritten graph, with autocast off where it is spelled out; in float64 with what it spells out widened."""
        wide = self.recorded is not torch.float64 and _widest(tensors, self.weights().values()) is torch.float64
        slots, steps = (self.wide_slots, self.wide_steps) if wide else (self.slots, self.steps)
        if self.autocast is None:
            return self.run(slots, steps, tensors)
        with torch.autocast(self.autocast[0], enabled=False):
            return self.run(slots, steps, tensors)


def _widest(*groups: Any) -> torch.dtype | None:
    found = {t.dtype for group in groups for t in group if t.is_floating_point() or t.is_complex()}
    return torch.float64 if found & {torch.float64, torch.complex128} else None


def check(captured: Captured, rewritten: Rewritten) -> Validation:
    """The rewritten graph held against dynamo's."""
    given = apart(captured.given)
    examples = [(given, {}), *((tensors, {}) for tensors in rewritten.examples)]
    if len(examples) == 1:
        examples.append((other_data(given), {}))
    with quiet(), torch.inference_mode(False), torch.enable_grad():
        return validate(captured, Rejoined(captured, rewritten), examples, modes=("given",), must_run=1)
