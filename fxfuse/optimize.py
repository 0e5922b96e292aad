"""The front door: ``optimize``, and ``explain``, which only says what that would do.

Comes in: a model, example inputs, options, as users give them. Goes out: what the pipeline makes of it, and its optimizers moved along.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any, Literal

from torch import nn

from .errors import ArgumentError, OptimizerError
from .failure import failed
from .models.live_optimizers import holding, parameter_ids, unwrapped
from .models.quiet import quiet
from .optimizers.migrate import collect, place
from .options import make_inputs, make_options
from .pipeline import run_entries
from .report import Report
from .running.entries import make_entries
from .store import get_report


def optimize(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    example_kwargs: dict[str, Any] | None = None,
    methods: Any = None,
    mode: Literal["train", "infer"] = "train",
    objective: Literal["time", "launches"] = "time",
    lowering: Literal["auto", "grouped_conv", "bmm"] = "auto",
    tune: bool = True,
    tune_for: Any = None,
    max_memory: int | None = None,
    validate: bool = True,
    strict: bool = False,
    min_lanes: int = 2,
    inplace: bool = False,
    cache: bool = True,
    progress: bool = True,
    optimizer: Any = None,
) -> nn.Module:
    """A model that computes the same as ``model``, its loops over small networks fused.

    Args:
        model: any module. It is not modified, unless ``inplace``.
        example_inputs: a tensor or a tuple of positional arguments, as the model is called; any shapes, dtypes, device. Without inputs
            the model fuses at its first call, on that call's inputs, and shares ``model``'s Parameters (an optimizer built before stays
            valid): slower in training than packed Parameters, see the README.
        example_kwargs: keyword arguments of the call. Alone, they count as inputs.
        methods: other methods that hold loops, by name (``"training_step"``, ``"critic.q1_forward"``): a list, called with the example
            inputs, or a dict of each one's own example (a tensor, a tuple, or ``(args, kwargs)``), with which ``example_inputs`` may
            be left out. They share the packed weights with forward.
        mode: what is timed: "train" forward and backward, "infer" the forward. The result is right in both.
        objective: "time" fuses what measures faster; "launches" fuses everything that is legal, whatever its time.
        lowering: "auto" chooses by measurement; "grouped_conv" and "bmm" force that form where it exists.
        tune: measure candidates; False takes what a static model of costs calls fastest, the loop where that is it, and runs nothing.
        tune_for: a batch size, or example inputs, to time at instead of ``example_inputs``. Of a list, ranges of sizes may get plans of
            their own over one pack, the loop among them; a region that loses at one of them stays as it is.
        max_memory: bytes that a fused region may allocate at its peak; one that needs more is computed in chunks of lanes, or stays a loop.
        validate: prove outputs, input gradients and every parameter gradient equal, in float64, on data and batch sizes not seen before.
        strict: a call that does not fit what was recorded raises ``FallbackError``; otherwise it runs the original forward.
        min_lanes: the fewest lanes worth fusing.
        inplace: rewrite ``model`` itself.
        cache: keep what was measured in the user's cache directory, and use it for an equal model on an equal machine, which is then
            compared but not timed. ``FXFUSE_CACHE_DIR`` names another directory; ``FXFUSE_CACHE=0`` turns it off for a whole process.
        progress: show a bar on standard error while candidates are timed, where that is a terminal and takes over a second.
        optimizer: one of ``model``'s Parameters, which goes over to the result (``fxfuse.migrate_optimizer``), or a list of such.

    Returns an instance of ``model``'s class. Raises ``ArgumentError`` for wrong arguments; a model that cannot be recorded, or has no loop,
    comes back working, with the reason in ``fxfuse.report``.

    Method: the SLP vectorizer's (isomorphic scalar ops packed, chosen by cost) with batching rules as in ``vmap``; see the README.

    >>> import torch
    >>> class Nets(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.nets = nn.ModuleList(nn.Linear(1, 4) for _ in range(8))
    ...     def forward(self, x):
    ...         return torch.cat([net(x[:, i:i + 1]) for i, net in enumerate(self.nets)], 1)
    >>> fast = optimize(Nets(), torch.randn(5, 8), objective="launches")
    >>> [op.op for op in get_report(fast).fused[0].ops]
    ['linear']
    """
    given = [] if optimizer is None else [*optimizer] if isinstance(optimizer, (list, tuple)) else [optimizer]
    optimizers = [unwrapped(each) for each in given]
    collected = [collect(each, model) for each in optimizers] if isinstance(model, nn.Module) else []
    holders: list[Any] = []
    before: set[int] = set()
    try:
        options = make_options(
            model, mode=mode, objective=objective, lowering=lowering, tune=tune, tune_for=tune_for, max_memory=max_memory,
            validate=validate, strict=strict, min_lanes=min_lanes, inplace=inplace, cache=cache, progress=progress,
            packing="packed",
        )  # fmt: skip
        inputs = make_inputs(example_inputs, example_kwargs)
        entries = make_entries(model, inputs, methods)
        if not entries:
            from .lazy import fuse_at_first_call

            return fuse_at_first_call(model, options, inplace)
        holders = [each for each in holding(model) if not any(each is known for known in optimizers)]
        before = parameter_ids(model)
        result = run_entries(model, entries, options, inplace)
    except (ArgumentError, OptimizerError, MemoryError):
        raise
    except Exception as error:
        result = failed(model, error, Report(type(model).__name__), inplace)
        for each, had in zip(optimizers, collected, strict=True):
            place(had, each, result)
        return result
    for each, had in zip(optimizers, collected, strict=True):
        place(had, each, result)
    try:
        left = _holding_lost(holders, before, result)
    except Exception:  # a look at what somebody else holds must not cost the result
        left = []
    if left:
        warnings.warn(
            f"{' and '.join(left)} holds Parameters of the model that was given to fxfuse.optimize: it would not train the fused model. "
            "Call fxfuse.migrate_optimizer(optimizer, model, fused), or fxfuse.optimize(model, x, optimizer=optimizer). Or: "
            "Build the optimizer from fused.parameters(), or call fxfuse.optimize(model) without inputs, which keeps the Parameters.",
            UserWarning,
            stacklevel=2,
        )
    return result


def _holding_lost(holders: list[Any], before: set[int], result: nn.Module) -> list[str]:
    """The optimizers, by class, that hold Parameters which the result has no more; all of them where that cannot be found out."""
    if not holders:
        return []
    try:
        lost = before - parameter_ids(result)
    except Exception:  # the model is fused and verified: a warning too many is the smaller harm
        lost = before
    return [type(each).__name__ for each in holders if any(id(p) in lost for group in each.param_groups for p in group["params"])]


def explain(model: nn.Module, example_inputs: Any = None, **keywords: Any) -> Report:
    """What ``optimize`` would do with the same arguments: its report. Nothing is changed.

    >>> import torch
    >>> explain(nn.Linear(2, 2), torch.randn(3, 2), tune=False).fused
    []
    """
    unknown = sorted(keywords.keys() - inspect.signature(optimize).parameters.keys())
    if unknown:
        raise TypeError(f"explain() got an unexpected keyword argument {unknown[0]!r}")
    keywords.pop("inplace", None)  # as where it is not given: nothing is changed
    if example_inputs is None and keywords.get("example_kwargs") is None and not isinstance(keywords.get("methods"), dict):
        from .errors import ArgumentError

        raise ArgumentError("explain needs example_inputs (a tensor or a tuple) or example_kwargs; none came")
    with quiet(UserWarning):
        return get_report(optimize(model, example_inputs, **keywords))
