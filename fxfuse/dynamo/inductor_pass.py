"""The same rewriting as a pass of Inductor's, for those who keep ``backend="inductor"``.

Comes in: the graph that Inductor is about to hand to AOTAutograd, which is dynamo's. Goes out: the same graph, in place, with its loops
fused and packs stacked of the weights at every call: a pass cannot give a graph other inputs.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
import torch.fx
from torch import Tensor

import fxfuse
from fxfuse.graph import Refusal
from fxfuse.private.dynamo import example_of
from fxfuse.trace import MOST_NUMBERS

from .compiled import rewritten_or_refused, tell
from .rewrite import Rewritten
from .settings import Settings
from .written import Written, write


def identity(settings: Settings) -> str:
    """Equal for equal settings of one state of this package: what Inductor's caches go by."""
    found = hashlib.sha256(repr((settings, torch.__version__)).encode())
    for folder, _, files in sorted(os.walk(Path(fxfuse.__file__).parent, followlinks=True)):
        for file in sorted(files):
            if file.endswith(".py"):
                found.update(Path(folder, file).read_bytes())
    return found.hexdigest()


def rewrite_in_place(graph: torch.fx.Graph, settings: Settings) -> None:
    """Fuse the loops of ``graph``. One that cannot be fused stays as it is, with one warning that says why."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    made = rewritten_or_refused(graph, [example_of(node) for node in placeholders], settings)
    if isinstance(made, Refusal):
        tell(made)
        return
    captured, rewritten = made
    large = next((n for n, t in rewritten.constants.items() if t.numel() > MOST_NUMBERS), None)
    if large is not None or rewritten.program.guard.autocast is not None:
        what = f"needs the tensor {large}" if large is not None else "spells out autocast's casts"
        tell(Refusal(f"the fused form {what}, which a pass cannot add; torch.compile(backend='fxfuse') can"))
        return
    _replace(graph, write(captured, rewritten, outside=(), every=True), rewritten, placeholders)


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
