"""Options that several commands share, once: what they are called, what they mean, what their values may be.

Comes in: click's decorators. Goes out: ``Asked``, the values of one command line.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

import click
from click.shell_completion import CompletionItem

from .failure import CommandError, Interrupted, said
from .screen import Screen

F = TypeVar("F", bound=Callable[..., Any])
FLOATS = ("float64", "float32", "float16", "bfloat16")


class Command(click.Command):
    """A subcommand. stdout is for its result: what models and torch print while it runs goes to stderr."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run it."""
        screen = ctx.find_object(Screen)
        if screen is not None:
            screen.json = bool(ctx.params.get("json"))
        try:
            with contextlib.redirect_stdout(sys.stderr), screen.alone() if screen is not None else contextlib.nullcontext():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted from None
        except SystemExit as error:  # a model's: nothing of ours leaves so
            raise CommandError(f"the model's code ended the process: {said(error)}") from None


@dataclass(frozen=True)
class Asked:
    """The shared options of one command line."""

    args: str | None = None
    weights: str | None = None
    inputs: tuple[str, ...] = ()
    mode: Literal["infer", "train"] = "infer"
    objective: Literal["time", "launches"] = "time"
    lowering: Literal["auto", "grouped_conv", "bmm"] = "auto"
    dtype: str | None = None
    device: str = "cpu"
    seed: int = 0
    allow_pickle: bool = False

    @classmethod
    def of(cls, values: dict[str, Any]) -> Asked:
        """Of the keyword arguments that click gives a command."""
        return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})


class PathOrName(click.ParamType):  # type: ignore[type-arg]
    """A path or ``package.module:factory``; the shell completes paths."""

    name = "source"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """What the shell offers: files and folders."""
        return [CompletionItem(incomplete, type="file")]


def several(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Decorators as one, the first on top."""

    def decorate(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


_PATH = PathOrName()
as_json = click.option("--json", "json", is_flag=True, help="Print one JSON object on stdout, and nothing else.")
seed = click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Of random weights and inputs.")
allow_pickle = click.option(
    "--allow-pickle", is_flag=True,
    help="Also read files that hold pickled code, which can do anything on this machine: only if you trust them.",
)
seconds = click.option(
    "--seconds", type=click.FloatRange(min=0.0, min_open=True), default=2.0, show_default=True,
    help="Of timing, for all candidates together.",
)
inputs = click.option(
    "--inputs", multiple=True, metavar="SPEC", type=_PATH,
    help='One argument of the model, "float32[8,24]"; once for each, in order. "name=int64[8,16]<100" is a keyword, its '
    "integers below 100. Or one .pt file that holds all arguments (a tensor, a tuple, or a dict of keywords).",
)  # fmt: skip
factory = several(
    click.option("--args", metavar="JSON", help="Arguments of the factory: '[128, 32]' or '{\"hidden\": 32}'."),
    click.option("--weights", metavar="FILE", type=_PATH, help="Weights to load first: .safetensors, or .pt, read weights-only."),
)
device = several(
    click.option("--dtype", type=click.Choice(FLOATS), help="Turn the model and its floating inputs into this dtype."),
    click.option("--device", default="cpu", show_default=True, metavar="DEVICE", help="Where to run: cpu, cuda, cuda:1, ..."),
)
fusing = several(
    click.option(
        "--mode", type=click.Choice(["infer", "train"]), default="infer", show_default=True,
        help="infer: the model in eval mode, timed without gradients. train: in train mode, timed forward and backward.",
    ),
    click.option(
        "--objective", type=click.Choice(["time", "launches"]), default="time", show_default=True,
        help="Fuse what runs faster on this machine, or all that is equal.",
    ),
    click.option(
        "--lowering", type=click.Choice(["auto", "grouped_conv", "bmm"]), default="auto", show_default=True,
        help="Let measurement choose the form of each op, or force one.",
    ),
)  # fmt: skip
source = click.argument("source", type=_PATH)
model = several(source, inputs, factory, fusing, device, seed, allow_pickle, as_json)
