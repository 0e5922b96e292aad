"""fxfuse: loops over small networks, fused into grouped convolutions, batched matmuls and wide layers; proved equal, never slower.

>>> import fxfuse
>>> callable(fxfuse.optimize)
True
"""

from .backend import backend, inductor_pass
from .errors import ArgumentError, FallbackError, FxfuseError, StateDictError, ValidationError
from .fused import graphs as graph
from .fused import unfuse
from .optimize import explain, optimize
from .packing import load_original_state_dict, original_named_parameters, original_state_dict
from .report import Report
from .store import get_report as report
from .validate import Validation, verify

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "FallbackError",
    "FxfuseError",
    "Report",
    "StateDictError",
    "Validation",
    "ValidationError",
    "backend",
    "explain",
    "graph",
    "inductor_pass",
    "load_original_state_dict",
    "optimize",
    "original_named_parameters",
    "original_state_dict",
    "report",
    "unfuse",
    "verify",
]
