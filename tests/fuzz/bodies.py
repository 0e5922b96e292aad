"""What may stand in a lane: one small function per step, ``(scope, shape of h's rows, *arguments) -> the new shape``.

A step is ``[name, *arguments]``; it writes lines that compute the next ``h``, and brings ``h`` to the shape that it needs by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from . import lines
from .samples import sample, samples
from .source import Scope, Shape, fit

Step = Callable[..., Shape]
STEPS: dict[str, Step] = {"sample": sample}

PADDING = ("zeros", "reflect", "circular", "replicate")


def step(function: Step) -> Step:
    """Register a step under its function's name."""
    STEPS[function.__name__.rstrip("_")] = function
    return function


def write(scope: Scope, shape: Shape, steps: list[Any]) -> Shape:
    """The lines of these steps, one after the other."""
    for name, *arguments in steps:
        shape = STEPS[name](scope, shape, *arguments)
    return shape


def rank(scope: Scope, shape: Shape, wanted: int, at_least: int = 1) -> Shape:
    """``h`` with rows of that rank, the last size kept, and sizes of ``at_least``."""
    size = max(at_least, shape[-1] if shape else 1)
    target = (2, *(max(2, min(size, 4)) for _ in range(wanted - 1))) if wanted > 1 else (size,)
    target = shape if len(shape) == wanted and all(n >= at_least for n in shape) else target
    fit(scope, shape, target)
    return target


@step
def linear(scope: Scope, shape: Shape, out: int, bias: bool = True, kind: str = "nn.Linear") -> Shape:
    if not shape:
        shape = rank(scope, shape, 1)
    made = f"{kind}({shape[-1]}, {out}, bias={bias})"
    if kind == "weight_norm":
        made = f"nn.utils.parametrizations.weight_norm(nn.Linear({shape[-1]}, {out}))"
    elif kind == "halved":
        made = f"halved(nn.Linear({shape[-1]}, {out}))"
    scope.write(f"h = {scope.module(made)}(h)")
    return (*shape[:-1], out)


@step
def product(scope: Scope, shape: Shape, text: str, out: int) -> Shape:
    """A product written by hand."""
    if not shape:
        shape = rank(scope, shape, 1)
    weight, bias = scope.parameter(f"torch.randn({shape[-1]}, {out})"), scope.parameter(f"torch.randn({out})")
    scope.write(text.format(w=weight, b=bias, n=shape[-1], out=out))
    return (*shape[:-1], out)


@step
def line(scope: Scope, shape: Shape, text: str) -> Shape:
    """A line as it stands."""
    after = measured(text, shape)
    if after is None:
        shape = rank(scope, shape, 1)
        after = measured(text, shape)
    scope.write(text)
    return shape if after is None else after


@step
def layer(scope: Scope, shape: Shape, made: str) -> Shape:
    """A module without sizes."""
    if not shape:
        shape = rank(scope, shape, 1)
    scope.write(f"h = {scope.module(made)}(h)")
    return measured(f"h = ({made})(h)", shape) or shape


@step
def number(scope: Scope, shape: Shape, text: str) -> Shape:
    """Numbers, and small tensors, that differ from lane to lane."""
    if not shape:
        shape = rank(scope, shape, 1)
    words = {"i": scope.index}
    makers = {
        "own": lambda: scope.parameter("torch.randn(())"), "vector": lambda: scope.parameter(f"torch.randn({shape[-1]})"),
        "common": lambda: scope.shared(f"torch.randn({shape[-1]})"), "buffer": lambda: scope.buffer(f"torch.rand({shape[-1]})"),
    }  # fmt: skip
    words.update((name, make()) for name, make in makers.items() if f"{{{name}}}" in text)
    scope.write(text.format(**words))
    return shape


@step
def norm(scope: Scope, shape: Shape, text: str, affine: bool = True) -> Shape:
    kind, _, extra = text.partition(" ")
    if kind.startswith("Instance"):
        shape = rank(scope, shape, 3 if kind.endswith("2d") else 2, 2)
    elif not shape:
        shape = rank(scope, shape, 1)
    channels = shape[0]
    if kind == "BatchNorm":
        kind += "1d" if len(shape) < 3 else f"{len(shape) - 1}d"
    last = kind in ("LayerNorm", "RMSNorm")
    sizes = f"{2 - channels % 2}, {channels}" if kind == "GroupNorm" else str(shape[-1] if last else channels)
    flag = f"{'elementwise_' if last else ''}affine={affine}"
    scope.write(f"h = {scope.module(f'nn.{kind}({sizes}, {flag}' + (f', {extra})' if extra else ')'))}(h)")
    return shape


@step
def conv(scope: Scope, shape: Shape, dims: int, out: int, extra: int) -> Shape:
    """A convolution of 1 to 3 dims; ``extra`` chooses stride, padding, groups and whether it is transposed."""
    dims = 1 + dims % 3
    shape = rank(scope, shape, dims + 1, 2)
    channels = shape[0]
    groups = 2 if extra & 1 and channels % 2 == 0 else 1
    rest = f"groups={groups}, bias={not extra & 2}"
    if extra & 4:
        rest += ", stride=2"
    kernel, kind = 2, "Conv"
    if extra & 8:
        kernel = 1
    elif extra & 16:
        rest, kernel = rest + f", padding=1, padding_mode={PADDING[extra // 32 % 4]!r}", 3
        if extra // 32 % 4 == 1 and dims == 3:
            rest = rest.replace("reflect", "zeros")
    elif extra & 64:
        kind = "ConvTranspose"
    made = f"nn.{kind}{dims}d({channels}, {out * groups}, {kernel}, {rest})"
    scope.write(f"h = {scope.module(made)}(h)")
    return measured(f"h = ({made})(h)", shape) or shape


@step
def pool(scope: Scope, shape: Shape, text: str) -> Shape:
    shape = rank(scope, shape, 3 if "2d" in text or "interpolate" in text else 2, 2)
    scope.write(text)
    return measured(text, shape) or shape


@step
def recurrent(scope: Scope, shape: Shape, kind: str, hidden: int, last: bool) -> Shape:
    shape = rank(scope, shape, 2)
    name = scope.module(f"nn.{kind}({shape[1]}, {hidden}, batch_first=True)")
    scope.write(f"h, _ = {name}(h)")
    if last:
        scope.write("h = h[:, -1]")
    return (hidden,) if last else (shape[0], hidden)


@step
def attention(scope: Scope, shape: Shape, heads: int) -> Shape:
    shape = rank(scope, shape, 2)
    fit(scope, shape, (shape[0], 4))
    name = scope.module(f"nn.MultiheadAttention(4, {1 if heads % 2 else 2}, batch_first=True)")
    scope.write(f"h, _ = {name}(h, h, h" + (", need_weights=False)" if heads > 1 else ")"))
    return (shape[0], 4)


@step
def encoder(scope: Scope, shape: Shape, first: bool) -> Shape:
    shape = rank(scope, shape, 2)
    fit(scope, shape, (shape[0], 4))
    made = f"nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True, norm_first={first})"
    scope.write(f"h = {scope.module(made)}(h)")
    return (shape[0], 4)


@step
def embedding(scope: Scope, shape: Shape, width: int, ragged: bool) -> Shape:
    """A look-up by what ``h`` rounds to; ``ragged``: the tables have unequal numbers of rows."""
    if not shape:
        shape = rank(scope, shape, 1)
    name = scope.module(f"nn.Embedding({f'5 + {scope.index}' if ragged else 5}, {width})")
    scope.write(f"h = {name}((h.detach().flatten(1).abs() * 3).clamp(max=4).long()).flatten(1)")
    return (math.prod(shape) * width,)


@step
def residual(scope: Scope, shape: Shape, steps: list[Any], text: str) -> Shape:
    """``h`` together with what the steps make of it."""
    if not shape:
        shape = rank(scope, shape, 1)
    kept = scope.program.fresh("r")
    scope.write(f"{kept} = h")
    fit(scope, write(scope, shape, steps), shape)
    scope.write(text.format(kept=kept))
    return shape


@step
def untracked(scope: Scope, shape: Shape, steps: list[Any]) -> Shape:
    """The steps under ``no_grad``, scaled by a weight that does get a gradient."""
    shape = _inside("torch.no_grad()", scope, shape, steps)
    scope.write(f"h = h * {scope.parameter('torch.randn(())')}")
    return shape


@step
def tracked(scope: Scope, shape: Shape, steps: list[Any]) -> Shape:
    """The steps with tracking on, whoever calls."""
    return _inside("torch.enable_grad()", scope, shape, steps)


def _inside(context: str, scope: Scope, shape: Shape, steps: list[Any]) -> Shape:
    scope.write(f"with {context}:")
    scope.indent += 1
    scope.write("pass")
    shape = write(scope, shape, steps)
    scope.indent -= 1
    return shape


@step
def energy(scope: Scope, shape: Shape, text: str) -> Shape:
    """A derivative inside of forward, scaled by a weight."""
    scope.write("with torch.enable_grad():")
    scope.indent += 1
    scope.write("z = h.detach().requires_grad_()")
    scope.write(text)
    scope.indent -= 1
    scope.write(f"h = h * {scope.parameter('torch.randn(())')}")
    return shape


@step
def state(scope: Scope, shape: Shape, text: str, whole: bool) -> Shape:
    """A buffer that forward updates."""
    buffer = scope.buffer("torch.tensor(0)" if whole else "torch.tensor(0.5)")
    if text.startswith("{b} +=") and buffer.endswith(")"):  # no target of an assignment: what getattr gives
        scope.write(f"counter = {buffer}")
        buffer = "counter"
    scope.write(text.format(b=buffer))
    return shape


@step
def dropout(scope: Scope, shape: Shape, p: float) -> Shape:
    scope.write(f"h = {scope.module(f'nn.Dropout({p})')}(h)")
    scope.program.random = True
    return shape


@step
def nested(scope: Scope, shape: Shape, loop: dict[str, Any]) -> Shape:
    """A loop inside the lane, in a module of its own."""
    from .loops import loop_class

    name, shape = loop_class(scope, shape, loop)
    scope.write(f"h = {scope.module(name)}(h)")
    return shape


def measured(text: str, shape: Shape) -> Shape | None:
    """The shape of the rows after a line, found by running it; None where it does not run on such rows, or not on its own."""
    space = {"torch": torch, "F": functional, "nn": nn, "h": torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))}
    try:
        with torch.random.fork_rng(devices=[]):
            exec(text, space)
    except (RuntimeError, IndexError, ValueError, TypeError, NameError):
        return None
    return tuple(space["h"].shape[1:])


def bodies(depth: int = 1) -> st.SearchStrategy[list[Any]]:
    """Lists of steps; ``depth``: how many loops may be nested in one."""
    width = st.integers(1, 4)

    def of(name: str, *parts: Any) -> st.SearchStrategy[Any]:
        return st.tuples(st.just(name), *(part if isinstance(part, st.SearchStrategy) else st.sampled_from(part) for part in parts))

    plain = st.one_of(
        of("linear", width),
        of("linear", width, st.booleans(), ["nn.Linear", "Scaled", "weight_norm", "halved"]),
        of("line", lines.ELEMENTWISE),
        of("line", lines.ELEMENTWISE),
        samples(),
        samples(),
        of("line", lines.SHAPES),
        of("norm", lines.NORMS, st.booleans()),
        of("number", lines.NUMBERS),
        of("layer", lines.MODULES),
        of("line", lines.IN_PLACE),
        of("line", ["h = h * 1"]),
        of("conv", [0, 0, 0, 1, 1, 2], width, st.integers(0, 127)),
        of("product", lines.PRODUCTS, width),
        of("pool", lines.POOLS),
        of("recurrent", ["GRU", "LSTM", "RNN"], st.integers(1, 2), st.booleans()),
        of("attention", st.integers(0, 3)),
        of("encoder", st.booleans()),
        of("embedding", width, st.booleans()),
        of("state", lines.STATES, st.booleans()),
        of("energy", lines.ENERGIES),
        of("line", lines.ODD),
        of("dropout", [0.2, 0.5]),
    )
    few = st.lists(plain, min_size=1, max_size=2)
    compound = [of("residual", few, lines.RESIDUALS), of("untracked", few), of("tracked", few)]
    if depth:
        from .loops import loops

        compound.append(of("nested", st.deferred(lambda: loops(depth - 1, inner=True))))
    return st.lists(st.one_of(plain, plain, plain, plain, plain, *compound).map(list), min_size=1, max_size=4)
