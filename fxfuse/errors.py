"""Every error that fxfuse raises itself. A model that does not fuse is no error: that is a refusal in the report."""

from __future__ import annotations


class FxfuseError(Exception):
    """Base of all errors raised by fxfuse."""


class HeldElsewhereError(FxfuseError):
    """A weight that would be packed is also held by an attribute of the model, which would keep the old one."""


class ArgumentError(FxfuseError, TypeError, ValueError):
    """fxfuse itself was called wrongly; the message says what was expected and what came."""


class ValidationError(FxfuseError):
    """Two models differ by more than rounding; the message names the worst tensor."""


class FallbackError(FxfuseError):
    """A call that a ``strict=True`` model would have answered through the original forward; the message says why."""


class StateDictError(FxfuseError, RuntimeError):
    """A state dict does not fit; the message names keys by the original's names."""


class ConvertError(FxfuseError):
    """A file cannot be read or written as asked; the message is one line that says what to do."""


class MissingPackageError(ConvertError):
    """A package that this needs is not installed; the message says which, and how to install it."""


class OptimizerError(FxfuseError):
    """An optimizer cannot go from one model to another; the message says which parameter or which rule of the optimizer is in the way."""
