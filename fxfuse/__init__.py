"""fxfuse: loops over small networks, fused into grouped convolutions, batched matmuls and wide layers; proved equal, never slower.

>>> import fxfuse
>>> callable(fxfuse.optimize)
True
"""

from .backend import backend, inductor_pass
from .checkpoint_format import checkpoint_format
from .distributed.shard_lanes import shard_lanes
from .errors import ArgumentError, FallbackError, FxfuseError, OptimizerError, StateDictError, ValidationError
from .freeze import freeze, unfreeze
from .fused import graphs as graph
from .fused import unfuse
from .migrate import migrate_optimizer
from .optimize import explain, optimize
from .packing import load_original_state_dict, named_original_parameters, original_named_parameters, original_state_dict
from .report import Report
from .store import get_report as report
from .validate import Validation, verify

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "FallbackError",
    "FxfuseError",
    "OptimizerError",
    "Report",
    "StateDictError",
    "Validation",
    "ValidationError",
    "backend",
    "checkpoint_format",
    "explain",
    "freeze",
    "graph",
    "inductor_pass",
    "load_original_state_dict",
    "migrate_optimizer",
    "named_original_parameters",
    "optimize",
    "original_named_parameters",
    "original_state_dict",
    "report",
    "shard_lanes",
    "unfreeze",
    "unfuse",
    "verify",
]
