"""fxfuse: loops over small networks, fused into grouped convolutions, batched matmuls and wide layers; proved equal, never slower.

>>> import fxfuse
>>> callable(fxfuse.optimize)
True
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backend import backend, inductor_pass
    from .checking.validate import Validation, verify
    from .checkpoint_format import checkpoint_format
    from .errors import ArgumentError, FallbackError, FxfuseError, OptimizerError, StateDictError, ValidationError
    from .freeze import freeze, unfreeze
    from .fused import graphs as graph
    from .fused import unfuse
    from .lane_parallel.clipping import clip_grad_norm_
    from .lane_parallel.shard_lanes import shard_lanes
    from .optimize import explain, optimize
    from .optimizers.averages import migrate_average
    from .optimizers.migrate import migrate_optimizer
    from .optimizers.optimizer_state import load_original_optimizer_state_dict, original_optimizer_state_dict
    from .report import Report
    from .store import get_report as report
    from .weights.packing import load_original_state_dict, named_original_parameters, original_named_parameters, original_state_dict

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
    "clip_grad_norm_",
    "explain",
    "freeze",
    "graph",
    "inductor_pass",
    "load_original_optimizer_state_dict",
    "load_original_state_dict",
    "migrate_average",
    "migrate_optimizer",
    "named_original_parameters",
    "optimize",
    "original_named_parameters",
    "original_optimizer_state_dict",
    "original_state_dict",
    "report",
    "shard_lanes",
    "unfreeze",
    "unfuse",
    "verify",
]

# Where each name comes from. It is imported when it is first asked for: importing torch takes seconds, and ``fxfuse --help``, shell
# completion and Ctrl-C shall not wait for that.
_HOMES = {
    **dict.fromkeys(("backend", "inductor_pass"), "backend"),
    "checkpoint_format": "checkpoint_format",
    "clip_grad_norm_": "lane_parallel.clipping",
    **dict.fromkeys((name for name in __all__ if name.endswith("Error")), "errors"),
    **dict.fromkeys(("freeze", "unfreeze"), "freeze"),
    **dict.fromkeys(("graph", "unfuse"), "fused"),
    "migrate_average": "optimizers.averages",
    "migrate_optimizer": "optimizers.migrate",
    **dict.fromkeys(("explain", "optimize"), "optimize"),
    **dict.fromkeys(("load_original_optimizer_state_dict", "original_optimizer_state_dict"), "optimizers.optimizer_state"),
    **dict.fromkeys(("load_original_state_dict", "original_state_dict"), "weights.packing"),
    **dict.fromkeys(("named_original_parameters", "original_named_parameters"), "weights.packing"),
    "Report": "report",
    "report": "store",
    "shard_lanes": "lane_parallel.shard_lanes",
    **dict.fromkeys(("Validation", "verify"), "checking.validate"),
}
_OTHERWISE_CALLED = {"graph": "graphs", "report": "get_report"}


class _Package(ModuleType):
    """A package whose names are imported when they are asked for: the public ones, and its modules."""

    def __getattr__(self, name: str) -> Any:
        if name in _HOMES:
            value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), _OTHERWISE_CALLED.get(name, name))
            setattr(self, name, value)
            return value
        if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOMES and isinstance(value, ModuleType):
            return  # the module ``fxfuse.report`` was imported, which would hide the function of that name
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
