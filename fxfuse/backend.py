"""``torch.compile(model, backend="fxfuse")``: the loops fused, then everything through another backend.

Comes in: what ``torch.compile`` gives a backend, a graph of dynamo's and its inputs. Goes out: a function that runs it. ``fxfuse`` is the
backend that the entry point ``torch_dynamo_backends`` names; ``backend`` makes one with settings of its own. What they do is in ``dynamo``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch.fx

from .dynamo.settings import Settings


@dataclass(frozen=True)
class Backend:
    """A backend for ``torch.compile``. Two with equal settings are one to dynamo."""

    settings: Settings

    __name__ = "fxfuse"

    def __call__(
        self, graph: torch.fx.GraphModule, inputs: list[Any], *, mode: str | None = None, options: dict[str, Any] | None = None
    ) -> Callable[..., Any]:
        """Compile one graph of dynamo's."""
        from .dynamo.compiled import compiled

        settings = self.settings.with_options(mode, options)
        return compiled(graph, inputs, settings, settings.compiler())


def backend(
    inner: Any = "inductor",
    *called_with: Any,
    min_lanes: int = 2,
    lowering: Literal["auto", "grouped_conv", "bmm"] = "auto",
    tune: bool = False,
    validate: bool = True,
    freeze: bool = False,
    mode: str | None = None,
) -> Backend:
    """A backend for ``torch.compile`` that fuses loops over small networks and gives the result to ``inner``.

    Args:
        inner: the backend that compiles what was fused: "inductor", "aot_eager", "eager", any other name, or a backend itself.
        min_lanes: the fewest lanes worth fusing.
        lowering: "auto" takes each rule's first form, or what is faster where ``tune``; "grouped_conv" and "bmm" force that form.
        tune: measure every form, op by op (seconds per graph). Otherwise one short comparison keeps a loop that is clearly faster.
        validate: compare outputs and gradients with dynamo's graph before it is used.
        freeze: in graphs without gradients, pack the weights at the first call, once: later changes to them are not seen.
        mode: Inductor's, as in ``torch.compile(mode=...)``, which cannot be given beside a backend that is no name.

    Raises ``ArgumentError`` for anything else.

    >>> import torch
    >>> model = torch.nn.Linear(2, 3)
    >>> fast = torch.compile(model, backend=backend(inner="eager"))
    >>> bool((fast(torch.ones(4, 2)) == model(torch.ones(4, 2))).all())
    True
    """
    if called_with:
        from .errors import ArgumentError

        raise ArgumentError("fxfuse.backend makes a backend: torch.compile(model, backend=fxfuse.backend()), with parentheses")
    return Backend(Settings(inner, min_lanes, lowering, tune, validate, freeze, mode))


def inductor_pass(
    *,
    min_lanes: int = 2,
    lowering: Literal["auto", "grouped_conv", "bmm"] = "auto",
    tune: bool = False,
    validate: bool = True,
) -> Callable[[torch.fx.Graph], None]:
    """The same as a pass, for those who keep ``backend="inductor"``: a value for ``torch._inductor.config.pre_grad_custom_pass``, or for
    ``torch.compile(model, options={"pre_grad_custom_pass": fxfuse.inductor_pass()})``.

    Arguments as of ``backend``. Weights are stacked at every call, which costs about a millisecond for a thousand of them: a pass cannot
    give a graph other inputs. Inductor's caches tell graphs that it was applied to from others.

    >>> inductor_pass(min_lanes=4).uuid() == inductor_pass(min_lanes=4).uuid() != inductor_pass().uuid()
    True
    """
    from .dynamo.inductor_pass import identity, rewrite_in_place
    from .private.custom_pass import custom_pass

    settings = Settings("inductor", min_lanes, lowering, tune, validate)
    return custom_pass(lambda graph: rewrite_in_place(graph, settings), identity(settings), "fxfuse.inductor_pass()")


_default = Backend(Settings())


def fxfuse(
    graph: torch.fx.GraphModule, inputs: list[Any], *, mode: str | None = None, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """The backend of that name. ``options`` are those of ``backend``, and Inductor's."""
    return _default(graph, inputs, mode=mode, options=options)
