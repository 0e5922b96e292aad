"""Fuse at the first call.

Comes in: a model without example inputs. Goes out: a model of the same class that shares its Parameters and fuses itself on the inputs of
its first call. The Parameters stay registered under their names, in the same objects: an optimizer built before stays valid. Their
storages become views of one packed buffer, which costs the optimizer as many steps as before; packed Parameters (``optimize`` with
inputs) are one each.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import nn

from fxfuse.private.pytree import tree_map_only

from .models.exclusive import alone_now
from .options import Options
from .report import Report
from .store import set_report


class FirstCall:
    """Stands in for ``forward`` on the instance until the first call; then it fuses the model and is gone."""

    def __init__(self, model: nn.Module, options: Options) -> None:
        self.model, self.options = model, options

    def __deepcopy__(self, memo: dict[int, Any]) -> FirstCall:
        return FirstCall(copy.deepcopy(self.model, memo), self.options)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return _again, (self.model, self.options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self.model
        # Where another thread is fusing, this call runs as the model was written; it does not wait.
        with alone_now() as mine:
            if mine and model.__dict__.get("forward") is self:
                del model.__dict__["forward"]
                try:
                    self._fuse(args, kwargs)
                except BaseException:  # interrupted: the next call tries again
                    model.__dict__["forward"] = self
                    raise
        forward = model.forward
        return type(model).forward(model, *args, **kwargs) if forward is self else forward(*args, **kwargs)

    def _fuse(self, args: Any, kwargs: Any) -> None:
        from .pipeline import run

        # The call's own tensors belong to somebody's autograd graph: what is recorded and timed must not.
        inputs = tree_map_only(torch.Tensor, lambda t: t.detach().requires_grad_(t.requires_grad), (args, kwargs))
        with torch.enable_grad():
            run(self.model, inputs, self.options, inplace=True)


def _again(model: nn.Module, options: Options) -> FirstCall:
    return FirstCall(model, options)


def fuse_at_first_call(model: nn.Module, options: Options, inplace: bool) -> nn.Module:
    """``model``, or a copy that shares its Parameters and buffers, set to fuse at its first call."""
    result = model
    if not inplace:
        shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
        result = copy.deepcopy(model, shared)
    report = Report(type(model).__name__)
    report.notes.append("not called yet: it fuses at its first call")
    set_report(result, report)
    if "forward" in result.__dict__:
        report.notes.append("its forward was replaced on the instance: it stays as it is")
        return result
    result.__dict__["forward"] = FirstCall(result, dataclasses.replace(options, packing="alias"))
    return result
