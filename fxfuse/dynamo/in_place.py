"""A graph rewritten in its place: the same inputs and results, packs stacked of the weights at every call.

Comes in: a graph, numbers for its inputs, the settings. Goes out: nothing, and the graph is another; or a ``Refusal``, and it is as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor

from fxfuse.graph import Refusal
from fxfuse.recording.trace import MOST_NUMBERS
from fxfuse.running.for_compilers import biases_apart_here

from .checked import rewritten_or_refused
from .rewrite import Rewritten
from .settings import Settings
from .written import Written, write


def fuse_in_place(graph: torch.fx.Graph, examples: Sequence[Any], settings: Settings) -> Refusal | None:
    """Fuse the loops of ``graph``; why not, where it stays."""
    placeholders = graph.find_nodes(op="placeholder")
    made = rewritten_or_refused(graph, examples, settings)
    if isinstance(made, Refusal):
        return made
    captured, rewritten = made
    large = next((n for n, t in rewritten.constants.items() if t.numel() > MOST_NUMBERS), None)
    if large is not None or rewritten.program.guard.autocast is not None:
        what = f"needs the tensor {large}" if large is not None else "spells out autocast's casts"
        return Refusal(f"the fused form {what}, which a pass cannot add; torch.compile(backend='fxfuse') can")
    written = write(captured, rewritten, outside=(), every=True)
    if settings.inner == "inductor":
        biases_apart_here(written.graph)
    _replace(graph, written, rewritten, placeholders)
    return None


def _replace(graph: torch.fx.Graph, written: Written, rewritten: Rewritten, placeholders: list[torch.fx.Node]) -> None:
    for node in reversed(list(graph.nodes)):
        if node.op != "placeholder":
            graph.erase_node(node)
    known: dict[torch.fx.Node, Any] = {}
    for number, node in enumerate(n for n in written.graph.nodes if n.op == "placeholder"):
        constant = number - len(placeholders)
        known[node] = placeholders[number] if constant < 0 else _spelled_out(graph, rewritten.constants[written.constants[constant]])
    for node in written.graph.nodes:
        if node.op == "output":
            graph.output(torch.fx.map_arg(node.args[0], known.__getitem__))
        elif node.op != "placeholder":
            known[node] = graph.node_copy(node, known.__getitem__)


def _spelled_out(graph: torch.fx.Graph, tensor: Tensor) -> torch.fx.Node:
    return graph.call_function(torch.tensor, (tensor.tolist(),), {"dtype": tensor.dtype, "device": tensor.device})
