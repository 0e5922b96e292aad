"""What ``fxfuse.backend(...)`` and ``torch.compile(..., options={...})`` may say.

Comes in: keywords, the options and the mode of ``torch.compile``. Goes out: ``Settings``, and the inner backend as a function; or an
``ArgumentError`` that says what was expected and what came.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch

from fxfuse.errors import ArgumentError
from fxfuse.private.dynamo import Compiler, backend_named, inductor, is_setting, mode_settings


@dataclass(frozen=True)
class Settings:
    """How to compile; see ``fxfuse.backend`` for what each means."""

    inner: Any = "inductor"  # a name, or a backend
    min_lanes: int = 2
    lowering: Literal["auto", "grouped_conv", "bmm"] = "auto"
    tune: bool = False
    validate: bool = True
    freeze: bool = False
    mode: str | None = None  # Inductor's
    others: tuple[tuple[str, Any], ...] = ()  # options of the inner backend

    def __post_init__(self) -> None:
        if not isinstance(self.inner, str) and not callable(self.inner):
            raise ArgumentError(f"inner must be the name of a backend or a backend, {self.inner!r} came")
        if self.inner == "fxfuse":
            raise ArgumentError('inner="fxfuse" would call itself: name the backend that is to compile what fxfuse writes')
        if isinstance(self.inner, str) and self.inner not in ("inductor", "eager", "aot_eager"):
            names = torch.compiler.list_backends(exclude_tags=())
            if self.inner not in names:
                raise ArgumentError(f"inner={self.inner!r} names no backend of torch.compile; there are {', '.join(names)}")
        if self.lowering not in ("auto", "grouped_conv", "bmm"):
            raise ArgumentError(f"lowering must be one of 'auto', 'grouped_conv', 'bmm'; {self.lowering!r} came")
        for name in ("tune", "validate", "freeze"):
            if not isinstance(getattr(self, name), bool):
                raise ArgumentError(f"{name} must be True or False, {getattr(self, name)!r} came")
        if not isinstance(self.min_lanes, int) or isinstance(self.min_lanes, bool) or self.min_lanes < 2:
            raise ArgumentError(f"min_lanes must be a whole number of at least 2, {self.min_lanes!r} came")

    def with_options(self, mode: str | None, options: dict[str, Any] | None) -> Settings:
        """These settings, with what ``torch.compile`` was given. Options of Inductor go to it; unknown ones are an error."""
        own = {field.name for field in fields(Settings)} - {"mode", "others"}
        given = dict(options or {})
        mine = {name: given.pop(name) for name in list(given) if name in own}
        made = replace(self, **mine)
        if made.inner == "inductor":
            unknown = [name for name in given if not is_setting(name)]
            if unknown:
                names, known = ", ".join(map(repr, unknown)), ", ".join(sorted(own))
                raise ArgumentError(f"backend fxfuse has no option {names}, and Inductor has none; its own: {known}")
        elif given and callable(made.inner):
            raise ArgumentError(f"backend fxfuse has no option {', '.join(map(repr, given))}; its own: {', '.join(sorted(own))}")
        if mode in (None, "default"):
            mode = made.mode
        return replace(made, mode=mode, others=(*made.others, *given.items()))

    def compiler(self) -> Compiler:
        """The inner backend."""
        others = dict(self.others)
        if self.inner == "inductor":
            settings = mode_settings(self.mode) if self.mode else {}
            return inductor({**settings, **{name.replace("-", "_"): value for name, value in others.items()}})
        found: Compiler = backend_named(self.inner) if isinstance(self.inner, str) else self.inner
        keywords = {**({"mode": self.mode} if self.mode else {}), **({"options": others} if others else {})}
        return found if not keywords else lambda graph, inputs: found(graph, inputs, **keywords)
