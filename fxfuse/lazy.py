"""Fuse at the first call.

Comes in: a model without example inputs. Goes out: a model of the same class that shares its Parameters and fuses itself on the inputs of
its first call. The Parameters stay registered under their names, in the same objects: an optimizer built before stays valid. Their
storages become views of one packed buffer, which costs the optimizer as many steps as before; packed Parameters (``optimize`` with
inputs) are one each.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from contextlib import suppress
from functools import update_wrapper
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from fxfuse.private.dynamo import run_as_they_are, without_compiling
from fxfuse.private.ordinary import out_of_the_ordinary
from fxfuse.private.pytree import tree_leaves, tree_map_only
from fxfuse.private.while_traced import comptime, local_example, local_object, not_compiling, start_anew

from .errors import ArgumentError
from .failure import failed
from .models.exclusive import alone_now
from .models.first_call import Waiting
from .options import Options
from .report import Report
from .store import get_report, set_report

log = logging.getLogger(__name__)


class FirstCall(Waiting):
    """Stands in for ``forward`` on the instance until the first call; then it fuses the model and is gone. Asked for its signature, it
    gives that of forward. A call that is run by a transform of ``torch.func``, traced or exported runs as it is written: a later one fuses.
    """

    def __init__(self, model: nn.Module, options: Options) -> None:
        self.model, self.options = model, options
        self.tries = 3  # calls that may be no good to record, before the model stays as it is
        forward = type(model).forward
        update_wrapper(self, MethodType(forward, model), updated=())
        self.__code__ = getattr(forward, "__code__", None)  # torch.export reads it

    def __deepcopy__(self, memo: dict[int, Any]) -> FirstCall:
        return FirstCall(copy.deepcopy(self.model, memo), self.options)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return _again, (self.model, self.options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self.model
        if torch.compiler.is_dynamo_compiling():
            fuse_while_traced(self, args, kwargs)
            return type(model).forward(model, *args, **kwargs)
        without_compiling(self.attempt)(args, kwargs)
        forward = model.forward
        return type(model).forward(model, *args, **kwargs) if forward is self else forward(*args, **kwargs)

    def attempt(self, args: Any, kwargs: Any) -> None:
        """Fuse the model if this is a call to do so at; whatever fails, it is as it was."""
        try:
            self._attempt(args, kwargs)
        except (ArgumentError, MemoryError):
            raise
        except Exception as error:
            if self.model.__dict__.get("forward") is self:
                del self.model.__dict__["forward"]
            failed(self.model, error, Report(type(self.model).__name__), True)

    def _attempt(self, args: Any, kwargs: Any) -> None:
        model = self.model
        tensors = (*model.parameters(), *model.buffers())
        if out_of_the_ordinary(args, kwargs) or any(is_lazy(tensor) or tensor.is_meta for tensor in tensors):
            return
        if self.tries > 1 and any(isinstance(leaf, torch.Tensor) and not leaf.numel() for leaf in tree_leaves((args, kwargs))):
            self.tries -= 1  # what is recorded of an empty batch is good for that alone
            return
        # Where another thread is fusing, this call runs as the model was written; it does not wait.
        with alone_now() as mine:
            if mine and model.__dict__.get("forward") is self:
                del model.__dict__["forward"]
                try:
                    self.fuse(args, kwargs)
                except BaseException:  # interrupted: the next call tries again
                    model.__dict__["forward"] = self
                    raise
                from .pipeline import RAISES

                self.tries -= 1
                if self.tries and any(refusal.reason.startswith(RAISES) for refusal in get_report(model).refused):
                    model.__dict__["forward"] = self  # a mistake in the call, it seems

    def fuse(self, args: Any, kwargs: Any) -> None:
        """Fuse the model on the inputs of this call, whose forward this is no longer."""
        from .fused import settle
        from .pipeline import run

        # The call's own tensors belong to somebody's autograd graph: what is recorded and timed must not. Autograd takes none of those
        # that were made in inference mode.
        with torch.inference_mode(False), torch.enable_grad():
            inputs = tree_map_only(torch.Tensor, _apart, (args, kwargs))
            run(self.model, inputs, self.options, inplace=True)
        with suppress(Exception):  # it is fused, and they are stacked for a while longer
            settle(self.model)  # what was recorded held their memory


# dynamo then compiles the forward that is called there, as it finds it at later calls, too.
run_as_they_are(FirstCall.__call__, without_compiling)


def fuse_while_traced(first: FirstCall, args: Any, kwargs: Any) -> None:
    """In a call that dynamo traces: fuse beside the trace, which then begins anew; without inputs that are like the call's, not now."""
    comptime()(_fuse)


def _fuse(context: Any) -> None:
    try:
        first: FirstCall = local_object(context, "first")
        with not_compiling():
            args, kwargs = local_example(context, "args"), local_example(context, "kwargs")
    except Exception:  # an argument that is no tensor, number, or container of such, as torch says in many ways
        log.debug("a traced call is not fused", exc_info=True)
        return
    with not_compiling():
        first.attempt(tuple(args), dict(kwargs))
    if first.model.__dict__.get("forward") is first:
        return
    start_anew("a model was fused at its first call")


def _apart(tensor: torch.Tensor) -> torch.Tensor:
    own = tensor.clone() if tensor.is_inference() else tensor
    return own.detach().requires_grad_(tensor.requires_grad)


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
