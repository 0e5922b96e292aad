"""Offline conversion: a fused model as a file that runs where fxfuse is not installed, and the way back.

Comes in: a model that ``fxfuse.optimize`` returned, and an example call. Goes out: ``write``: a ``.pt2``, ``.onnx``, ``.safetensors``,
``.aoti.pt2`` or a folder; ``load``: what was written, as a callable; ``restore``: the original's checkpoint.
"""

from .checkpoints import read_weights
from .doors import load, write
from .folder import restore
from .kinds import Written, kind_of

__all__ = ["Written", "kind_of", "load", "read_weights", "restore", "write"]
