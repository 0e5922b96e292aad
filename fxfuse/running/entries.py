"""Ways into a model: its forward, and other methods that hold loops (``training_step``, ``critic.q1_forward``).

Comes in: the ``methods`` argument of ``optimize``. Goes out: ``Entry``s, each a call of the model to record, fuse and compare. A method is
recorded through ``Call``, a module whose forward calls it, so that the stages need not know of methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxfuse.errors import ArgumentError

INSIDE = "self"  # the name of the model in a Call: what a recording says of its tensors reads as the method's own source does
FORWARD = "forward"


@dataclass(frozen=True)
class Entry:
    """One way in and an example of a call. ``name``: ``"forward"``, or the dotted path of a method."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def is_method(self) -> bool:
        return self.name != FORWARD

    def root(self, model: nn.Module) -> nn.Module:
        """What to call: the model, or a module that calls its method."""
        return Call(model, self.name) if self.is_method else model

    def place(self, path: str) -> tuple[str, str]:
        """Of a module path in a recording of ``root``: the path in the model, and which of that module's methods it is."""
        if not self.is_method:
            return path, FORWARD
        if not path:
            owner, _, method = self.name.rpartition(".")
            return owner, method
        return path.partition(".")[2], FORWARD

    def frame_path(self, path: str, method: str) -> str:
        """The way back: the path in the recording."""
        if not self.is_method:
            return path
        if (path, method) == self.place(""):
            return ""
        return f"{INSIDE}.{path}" if path else INSIDE

    def region(self, model: nn.Module, frame_path: str) -> nn.Module:
        """The module whose forward is the recorded call: for a method's own body, its owner seen through that method."""
        path, method = self.place(frame_path)
        owner = model.get_submodule(path)
        return owner if method == FORWARD else _seen_through(owner, method)


class Call(nn.Module):
    """``forward`` is a method of the model inside."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.add_module(INSIDE, model)
        self.__dict__["training"] = model.training
        self.name = name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        owner, _, method = self.name.rpartition(".")
        model = self._modules[INSIDE]
        assert model is not None
        return getattr(model.get_submodule(owner), method)(*args, **kwargs)


def _seen_through(owner: nn.Module, method: str) -> nn.Module:
    """The same module under a class whose forward is ``method``: it shares all state, and the method still runs on the owner itself."""
    cls: Any = type(owner)
    seen: Any = type(cls)(cls.__name__, (cls,), {"forward": lambda self, *args, **kwargs: getattr(owner, method)(*args, **kwargs)})
    made = object.__new__(seen)
    made.__dict__ = owner.__dict__
    return made  # type: ignore[no-any-return]


def make_entries(model: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]] | None, methods: Any) -> list[Entry]:
    """The forward, where there are inputs for it, and then the methods. Raises ``ArgumentError``."""
    entries = [Entry(FORWARD, *inputs)] if inputs is not None else []
    if methods is None:
        return entries
    if not isinstance(methods, (list, tuple, dict)) or not all(isinstance(name, str) for name in methods):
        raise ArgumentError("methods must be a list of method names, or a dict {name: example arguments}")
    for name in methods:
        if name == FORWARD:
            raise ArgumentError("methods: forward is meant by example_inputs; leave it out")
        owner_path, _, attribute = name.rpartition(".")
        try:
            owner = model.get_submodule(owner_path)
        except AttributeError as error:
            raise ArgumentError(f"methods: the model has no module {owner_path}") from error
        if not callable(getattr(type(owner), attribute, None)):
            raise ArgumentError(f"methods: {type(owner).__name__} has no method {attribute}")
        if isinstance(methods, dict):
            args, kwargs = _example(name, methods[name])
        elif inputs is None:
            raise ArgumentError(f"methods: {name} needs example arguments: give example_inputs, or methods={{{name!r}: arguments}}")
        else:
            args, kwargs = inputs
        entries.append(Entry(name, args, kwargs))
    return entries


def _example(name: str, given: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(given, torch.Tensor):
        return (given,), {}
    if isinstance(given, tuple):
        if len(given) == 2 and isinstance(given[0], tuple) and isinstance(given[1], dict) and all(isinstance(k, str) for k in given[1]):
            return given[0], dict(given[1])
        return given, {}
    raise ArgumentError(f"methods: the example of {name} must be a tensor, a tuple of arguments, or (args, kwargs)")
