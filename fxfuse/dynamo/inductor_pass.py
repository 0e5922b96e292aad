"""The same rewriting as a pass of Inductor's, for those who keep ``backend="inductor"``.

Comes in: the graph that Inductor is about to hand to AOTAutograd, which is dynamo's. Goes out: the same graph, in place, with its loops
fused and packs stacked of the weights at every call: a pass cannot give a graph other inputs.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
import torch.fx

import fxfuse
from fxfuse.private.dynamo import example_of

from .checked import tell
from .in_place import fuse_in_place
from .settings import Settings


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
    refusal = fuse_in_place(graph, [example_of(node) for node in graph.find_nodes(op="placeholder")], settings)
    if refusal is not None:
        tell(refusal)
