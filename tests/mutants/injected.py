"""Bugs in what a rule does, injected while it writes its part of the program.

A rule takes operands in packed form (``Emitter.fetch``, ``weights``, ``table``), makes recipes on the way, calls torch functions
(``Emitter.call``, ``spell``) and returns the result with its lane axis. Each of these steps can be wrong: lanes swapped, another dim
taken for the lane axis, members of a recipe permuted or stored transposed, rows off by one, an operand dropped, a number or flag changed,
two operands exchanged, the op replaced by a close one. ``possible(subject)`` watches the rule at work and lists what can be wrong there;
``active(bug)`` makes it wrong. So the bugs are as systematic as the rules are.
"""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxfuse.ops import Op
from fxfuse.passes.emit import Emitter
from fxfuse.passes.rules import joins
from fxfuse.passes.rules.base import Rule
from fxfuse.passes.writer import Packed
from mutants.subjects import Subject, family_of, subjects_of, table_models
from mutants.verdicts import optimized

JOIN = "join of lanes"  # the single node where lanes come together; no rule of a bundle, so it has no op
Change = tuple[str, Callable[[], Any]]  # what is wrong, and how to make it


@dataclasses.dataclass(frozen=True)
class Bug:
    """``at``: the step of the rule of ``op``; ``change``: what is wrong there; shown on ``subject``."""

    op: str
    at: str
    change: str
    subject: Subject = dataclasses.field(compare=False)

    @property
    def name(self) -> str:
        """What the tables and the file of equivalent mutants call it."""
        return f"{self.op}: {self.at}: {self.change}"

    @property
    def family(self) -> str:
        """The file of the rule."""
        return "joins" if self.op == JOIN else family_of(self.op)

    @property
    def kind(self) -> str:
        """"operand", "recipe", "call", "result": the step, for taking some of each."""
        return self.at.partition(" ")[0]


class _Watch:
    """Stands in every step of the rules. ``bug``: the one to make; None: note in ``seen`` all that could be made for ``op``."""

    def __init__(self, op: str, bug: Bug | None) -> None:
        self.op, self.bug = op, bug
        self.seen: dict[tuple[str, str], None] = {}
        self.inside = False  # the rule of ``op`` is at work
        self.busy = False  # a step within a step
        self.count: Counter[str] = Counter()

    def step(self, at: str, value: Any, changes: Callable[[], Iterator[Change]]) -> Any:
        """``value`` as the rule has it, or changed where the bug is to be here."""
        self.count[at] += 1
        at = f"{at} {self.count[at]}"
        if self.bug is not None and self.bug.at != at:
            return value
        self.busy = True
        try:
            for what, make in changes():
                if self.bug is None:
                    self.seen[at, what] = None
                elif what == self.bug.change:
                    return make()
        finally:
            self.busy = False
        return value

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """The rule is at work: its steps are counted from 1."""
        self.inside, self.count = True, Counter()
        try:
            yield
        finally:
            self.inside = False


def possible(subject: Subject, op: str) -> list[Bug]:
    """All bugs that can be made in the rule of ``op`` while ``subject`` is fused; empty where that rule does not run."""
    watch = _Watch(op, None)
    with _hooked(watch), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimized(subject, subject.model(), subject.inputs(0), validate=False)
    return [Bug(op, at, change, subject) for at, change in watch.seen]


def all_bugs(op: str) -> list[Bug]:
    """The bugs of an op's rule, each on the first of its subjects that shows the step."""
    found: dict[tuple[str, str], Bug] = {}
    for subject in subjects_of(op):
        for bug in possible(subject, op):
            found.setdefault((bug.at, bug.change), bug)
    return list(found.values())


def join_bugs() -> list[Bug]:
    """The bugs where lanes come together in a single node, each on the first model of the test tables that shows the step."""
    found: dict[tuple[str, str], Bug] = {}
    for subject in table_models():
        for bug in possible(subject, JOIN):
            found.setdefault((bug.at, bug.change), bug)
    return list(found.values())


@contextmanager
def active(bug: Bug) -> Iterator[None]:
    """fxfuse has the bug inside of this context."""
    with _hooked(_Watch(bug.op, bug)):
        yield


# -- the hooks -------------------------------------------------------------------------------------------------------------------------


@contextmanager
def _hooked(watch: _Watch) -> Iterator[None]:
    whole = {name: getattr(Emitter, name) for name in ("fetch", "weights", "table", "call", "spell")}
    apply, join = Rule.apply, joins.join

    def applied(rule: Rule, emitter: Emitter, bundle: Any) -> Any:
        if bundle.name != watch.op or watch.inside:
            return apply(rule, emitter, bundle)

        def vectorize(emitter: Emitter, bundle: Any) -> Any:
            known = set(emitter.packs.recipes)
            with watch.at_work():
                result = rule.vectorize(emitter, bundle)
                _recipes(watch, emitter, known)
                value, rest = (result[0], (result[1],)) if isinstance(result[1], str) else (result, ())
                value = watch.step("result", value, lambda: _lanes(whole["call"], emitter, value, len(bundle.members)))
            return (value, *rest) if rest else value

        return apply(dataclasses.replace(rule, vectorize=vectorize), emitter, bundle)

    def joined(emitter: Emitter, node: Any) -> Any:
        if watch.op != JOIN:
            return join(emitter, node)
        with watch.at_work():
            return join(emitter, node)

    def fetched(emitter: Emitter, nodes: list[Any]) -> Any:
        with _alone(watch) as free:
            value = whole["fetch"](emitter, nodes)
        return watch.step("operand", value, lambda: _lanes(whole["call"], emitter, value, len(nodes))) if free else value

    def weighed(emitter: Emitter, nodes: list[Any], *args: Any, **kwargs: Any) -> Any:
        with _alone(watch) as free:
            value = whole["weights"](emitter, nodes, *args, **kwargs)
        if not free or value is None:
            return value
        return watch.step("operand weights", value, lambda: _lanes(whole["call"], emitter, value, len(nodes)))

    def looked_up(emitter: Emitter, nodes: list[Any]) -> Any:
        value = whole["table"](emitter, nodes)
        if not watch.inside or isinstance(value, str):
            return value
        return watch.step("operand table", value, lambda: _rows(value))

    def called(emitter: Emitter, func: Any, *args: Any, **kwargs: Any) -> Any:
        if not watch.inside or watch.busy:
            return whole["call"](emitter, func, *args, **kwargs)
        name = func if isinstance(func, str) else getattr(func, "__name__", str(func))
        func, args, kwargs = watch.step(f"call {name}", (func, args, kwargs), lambda: _calls(func, args, kwargs))
        return whole["call"](emitter, func, *args, **kwargs)

    def spelled(emitter: Emitter, op: Op, args: tuple[Any, ...]) -> Any:
        if watch.inside and not watch.busy:
            op, args = watch.step(f"call {op.name}", (op, args), lambda: _ops(op, args))
        return whole["spell"](emitter, op, args)

    hooks = {"fetch": fetched, "weights": weighed, "table": looked_up, "call": called, "spell": spelled}
    try:
        Rule.apply, joins.join = applied, joined  # type: ignore[method-assign]
        for name, hook in hooks.items():
            setattr(Emitter, name, hook)
        yield
    finally:
        Rule.apply, joins.join = apply, join  # type: ignore[method-assign]
        for name, method in whole.items():
            setattr(Emitter, name, method)


@contextmanager
def _alone(watch: _Watch) -> Iterator[bool]:
    """True where this is a step of its own; what it calls meanwhile is part of it."""
    free = watch.inside and not watch.busy
    watch.busy = watch.busy or free
    try:
        yield free
    finally:
        if free:
            watch.busy = False


# -- what can be wrong -----------------------------------------------------------------------------------------------------------------


def _lanes(call: Callable[..., Any], emitter: Emitter, value: Any, lanes: int) -> Iterator[Change]:
    """Of a packed tensor: lanes exchanged or off by one, another dim taken for the lane axis, two dims of a lane exchanged."""
    tensor = value.node.meta.get("val") if isinstance(value, Packed) and value.dim is not None else None
    if not isinstance(tensor, Tensor) or lanes < 2:
        return

    def picked(order: list[int]) -> Packed:
        index = emitter.constant(order, emitter.device(None))
        if tensor.shape[value.dim] == lanes:
            return Packed(call(emitter, torch.index_select, value.node, value.dim, index), value.dim)
        apart = call(emitter, torch.unflatten, value.node, value.dim, (lanes, -1))  # concatenated: [G * s0, ...]
        chosen = call(emitter, torch.index_select, apart, value.dim, index)
        return Packed(call(emitter, torch.flatten, chosen, value.dim, value.dim + 1), value.dim)

    yield "two lanes swapped", lambda: picked([1, 0, *range(2, lanes)])
    if lanes > 2:
        yield "lanes off by one", lambda: picked([*range(1, lanes), 0])
    others = [d for d in range(tensor.dim()) if d != value.dim and tensor.shape[d] > 1]
    if tensor.shape[value.dim] == lanes:
        for d in others:
            if tensor.shape[d] == lanes:
                yield f"lane axis at {d} instead of {value.dim}", lambda d=d: Packed(value.node, d)
    for i, a in enumerate(others):
        for b in others[i + 1 :]:
            if tensor.shape[a] == tensor.shape[b]:
                yield f"dims {a} and {b} exchanged", lambda a=a, b=b: Packed(call(emitter, torch.transpose, value.node, a, b), value.dim)


def _rows(value: tuple[Any, list[int]]) -> Iterator[Change]:
    """Of a table: where the lanes' rows begin."""
    node, starts = value
    yield "rows of two lanes swapped", lambda: (node, [starts[1], starts[0], *starts[2:]])
    yield "rows off by one", lambda: (node, [max(start - 1, 0) for start in starts])


def _recipes(watch: _Watch, emitter: Emitter, known: set[Any]) -> None:
    """Of the recipes that the rule made: the order of members, the order of dims."""
    for key in [key for key in emitter.packs.recipes if key not in known]:
        recipe = emitter.packs.recipes[key]

        def changes(recipe: Any = recipe) -> Iterator[Change]:
            first, second, *rest = recipe.members
            yield "members swapped", lambda: dataclasses.replace(recipe, members=(second, first, *rest))
            order = list(recipe.order)
            for i in range(len(order)):
                for j in range(i + 1, len(order)):
                    if recipe.shape[order[i]] == recipe.shape[order[j]] > 1 and recipe.style != "rows":
                        turned = [*order]
                        turned[i], turned[j] = order[j], order[i]
                        yield f"dims {i} and {j} stored exchanged", lambda turned=turned: dataclasses.replace(recipe, order=tuple(turned))

        made = watch.step("recipe", recipe, changes)
        if made is not recipe:
            emitter.packs.recipes[key] = made
            emitter.packs.where.update({name: (made, lane) for name, (held, lane) in emitter.packs.where.items() if held is recipe})


# Ops that are close enough to be taken for each other: same operands, same shape of the result.
_GROUPS = (
    "relu gelu silu", "tanh sigmoid sin", "exp expm1", "sum mean", "amax amin", "argmax argmin", "max min", "cummax cummin", "add sub",
    "mul div", "minimum maximum", "var std", "cumsum cumprod", "softmax log_softmax softmin", "fft_fft fft_ifft", "fft_rfft fft_ihfft",
    "fft_fft2 fft_ifft2", "fft_rfft2 fft_ihfft2", "fft_fftn fft_ifftn", "fft_rfftn fft_ihfftn", "fft_fftshift fft_ifftshift",
    "fft_irfft fft_hfft", "tril triu", "sort msort", "all any", "lt gt", "le ge", "eq ne", "zeros_like ones_like", "new_zeros new_ones",
    "zeros ones", "max_pool1d avg_pool1d", "max_pool2d avg_pool2d", "max_pool3d avg_pool3d", "adaptive_max_pool1d adaptive_avg_pool1d",
    "adaptive_max_pool2d adaptive_avg_pool2d", "adaptive_max_pool3d adaptive_avg_pool3d", "mse_loss l1_loss", "quantile nanquantile",
    "linalg_inv linalg_pinv", "linalg_det logdet", "fliplr flipud", "special_erf special_erfc", "special_exp2 special_expm1", "atan2 hypot",
    "median nanmedian", "prod sum", "logsumexp sum",
)  # fmt: skip
_CLOSE = {one: other for group in _GROUPS for one, other in zip(group.split(), [*group.split()[1:], group.split()[0]], strict=True)}
_WORDS = {"mean": "sum", "sum": "mean", "tanh": "none", "reflect": "replicate", "replicate": "reflect", "floor": "trunc", "nearest": "area"}


def _ops(op: Op, args: tuple[Any, ...]) -> Iterator[Change]:
    """Of an op with its arguments: each of them, and the op."""
    for what, changed in _arguments(dict(zip(op.names, args, strict=True)), dict(zip(op.names, op.defaults, strict=True))):
        yield what, lambda changed=changed: (op, tuple(changed.values()))
    close = _function(_CLOSE.get(op.name, ""))
    if close is not None:
        yield f"{_CLOSE[op.name]} in its place", lambda: (dataclasses.replace(op, func=close), args)


def _calls(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Change]:
    """Of a call: each argument, and the function."""
    given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    for what, changed in _arguments(given, _defaults(func)):
        yield what, lambda changed=changed: (
            func, tuple(value for key, value in changed.items() if isinstance(key, int)),
            {key: value for key, value in changed.items() if not isinstance(key, int)},
        )  # fmt: skip
    name = func if isinstance(func, str) else getattr(func, "__name__", "")
    close = _function(_CLOSE.get(name, ""))
    if close is not None and not isinstance(func, str):
        yield f"{_CLOSE[name]} in its place", lambda: (close, args, kwargs)


def _arguments(given: dict[Any, Any], defaults: dict[Any, Any]) -> Iterator[tuple[str, dict[Any, Any]]]:
    """The arguments with one of them changed to another legal value, left out, or two exchanged."""
    nodes = [key for key, value in given.items() if isinstance(value, torch.fx.Node) and isinstance(value.meta.get("val"), Tensor)]
    for key, value in given.items():
        for what, other in _values(value):
            yield f"{key}: {what}", {**given, key: other}
        if key in nodes and defaults.get(key, inspect.Parameter.empty) is None:
            yield f"{key} left out", {**given, key: None}
    for i, one in enumerate(nodes):
        for other in nodes[i + 1 :]:
            a, b = given[one], given[other]
            if a is not b and a.meta["val"].shape == b.meta["val"].shape and a.meta["val"].dtype == b.meta["val"].dtype:
                yield f"{one} and {other} exchanged", {**given, one: b, other: a}


def _values(value: Any) -> Iterator[tuple[str, Any]]:
    if type(value) is bool:
        yield f"{not value}", not value
    elif type(value) is int:
        yield f"{value + 1}", value + 1
        yield f"{value - 1}", value - 1
    elif type(value) is float:
        yield "another number", value * 1.5 + 0.125
    elif isinstance(value, str) and value in _WORDS:
        yield _WORDS[value], _WORDS[value]
    elif isinstance(value, (tuple, list)) and value and all(type(number) is int for number in value):
        if len(value) > 1 and value[0] != value[1]:
            yield "first two exchanged", type(value)([value[1], value[0], *value[2:]])
        yield "first one more", type(value)([value[0] + 1, *value[1:]])


# Of functions without a signature: the arguments that may be None.
_OPTIONAL = {"linear": (2,), "bilinear": (3,), **dict.fromkeys("conv1d conv2d conv3d".split(), (2,))}
_OPTIONAL.update(dict.fromkeys("conv_transpose1d conv_transpose2d conv_transpose3d".split(), (2,)))


def _defaults(func: Any) -> dict[Any, Any]:
    if isinstance(func, str) or not inspect.isfunction(func):
        return dict.fromkeys(_OPTIONAL.get(getattr(func, "__name__", ""), ()))
    found = inspect.signature(func).parameters
    return {**{i: p.default for i, p in enumerate(found.values())}, **{name: p.default for name, p in found.items()}}


def _function(name: str) -> Callable[..., Any] | None:
    space, _, rest = name.partition("_")
    if space in ("special", "linalg", "fft") and hasattr(getattr(torch, space), rest):
        return getattr(getattr(torch, space), rest)  # type: ignore[no-any-return]
    return getattr(torch, name, None) or getattr(F, name, None) or getattr(Tensor, name, None) if name else None
