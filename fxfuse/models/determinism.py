"""Make two runs comparable: state put back afterwards, no chance in between, float64 where nothing else was asked for.

Comes in: models whose state must survive, or nothing. Goes out: context managers. ``preserved_state`` restores random state and
buffers; ``Derandomized`` replaces random numbers by fixed ones, so that a loop and its packed form can be compared in train mode;
``DefaultFloat64`` gives factories float64 for this thread only, where ``torch.set_default_dtype`` would change every thread.
"""

from __future__ import annotations

import math
import random
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fxfuse.private.dispatch import TorchDispatchMode
from fxfuse.private.pytree import tree_leaves
from fxfuse.private.schemas import schema_of

from .module_tree import all_modules
from .sharded import own_share

UNIFORM = 0.37  # what a uniform number in 0..1 becomes: no special value, neither side of a symmetric choice
NORMAL = 0.61  # what a standard normal number becomes
THRESHOLD = 0.4321  # a Bernoulli draw with a tensor of probabilities becomes p > THRESHOLD: 0.5 would tie too often


@contextmanager
def preserved_state(*models: torch.nn.Module) -> Iterator[None]:
    """Put back, on leaving: random state (CPU, CUDA, Python, numpy), grad mode, and the models' buffers and ``training`` flags.

    Buffers come back as the same objects with the same bits, integer counters such as ``num_batches_tracked`` too. Device
    generators and numpy are looked at only where they are in use already. Parameters and their ``grad`` are not touched.

    >>> model = torch.nn.BatchNorm1d(3)
    >>> with preserved_state(model):
    ...     _ = model(torch.randn(8, 3))
    >>> int(model.num_batches_tracked)
    0
    """
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    numpy = sys.modules.get("numpy")
    numpy_random = getattr(numpy, "random", None)
    cpu_state, python_state = torch.get_rng_state(), random.getstate()
    cuda_states = torch.cuda.get_rng_state_all() if cuda else []
    numpy_state = numpy_random.get_state() if numpy_random is not None else None
    grad = torch.is_grad_enabled()
    modules = list({id(m): m for model in models for m in all_modules(model)}.values())
    flags = [m.training for m in modules]
    buffers = [[(name, b, None if b is None else b.detach().clone()) for name, b in m._buffers.items()] for m in modules]
    try:
        yield
    finally:
        torch.set_rng_state(cpu_state)
        random.setstate(python_state)
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)
        if numpy_random is not None and numpy_state is not None:
            numpy_random.set_state(numpy_state)
        torch.set_grad_enabled(grad)
        for module, flag in zip(modules, flags, strict=True):
            if module.training is not flag:
                module.training = flag
        with ExitStack() as every:  # each module's, whatever happens to another's
            for module, entries in zip(modules, buffers, strict=True):
                if entries or module._buffers:
                    every.callback(_restore_buffers, module, entries)


def foreign_random_state() -> tuple[Any, ...]:
    """The states of the random generators that are not torch's: Python's and numpy's own. Equal tuples: nothing was drawn between."""
    numpy_random = getattr(sys.modules.get("numpy"), "random", None)
    state = () if numpy_random is None else numpy_random.get_state()
    return random.getstate(), tuple(part.tobytes() if hasattr(part, "tobytes") else part for part in state)


def _restore_buffers(module: torch.nn.Module, entries: list[tuple[str, Tensor | None, Tensor | None]]) -> None:
    current = module._buffers
    if [name for name, _ in current.items()] != [name for name, _, _ in entries] or any(current[name] is not b for name, b, _ in entries):
        current.clear()
        current.update({name: b for name, b, _ in entries})
    for _, buffer, saved in entries:
        # Written only where a bit changed: a write would invalidate graphs that saved the buffer for backward.
        if buffer is not None and saved is not None and not same_bits(buffer, saved):
            if buffer.shape == saved.shape and buffer.dtype == saved.dtype:
                with torch.no_grad():
                    buffer.data.copy_(saved)
            else:
                buffer.data = saved


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal shape, dtype and bits: NaN equals itself, -0.0 differs from 0.0. Strides may differ. Of sharded ones, this process's share."""
    a, b = own_share(a), own_share(b)
    if a.shape != b.shape or a.dtype != b.dtype or a.layout != b.layout or a.device != b.device:
        return False
    if a.layout is not torch.strided:
        return bool((a.to_dense() == b.to_dense()).all())
    return torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


_fixed = threading.local()


def derandomized() -> bool:
    """Is this thread inside of ``Derandomized``? For dropouts that are written out, whose masks it cannot tell from other draws."""
    return bool(getattr(_fixed, "depth", 0))


class Derandomized(TorchDispatchMode):
    """Inside this context random ops give fixed numbers that do not depend on an element's place or on the tensor's shape.

    So a loop over lanes and the packed form agree although they would draw in another order. Every mask of a dropout keeps
    everything, hence dropout multiplies by ``1 / (1 - p)``: with another ``p``, or left out, the result differs. Uniform and normal
    noise become a constant of their distribution, also element by element where mean and spread are tensors. A Bernoulli draw
    from a tensor of probabilities becomes a comparison, ``multinomial`` the most probable classes. Attention is run with
    ``dropout_p=0``. It works below autograd, so inside ``nn.MultiheadAttention``, ``nn.LSTM`` and scripted code as well.

    Limits: which elements a dropout drops is not compared, nor noise that depends on the place by design. Names of random ops that
    have no fixed form here are left in ``undefined``; they ran as they are.

    ``needed``: some op was random, or could have been. ``drawn``: how many random numbers were asked for; lanes that share a mask
    ask for fewer than lanes with masks of their own. ``precisions``: the floating dtypes narrower than float64 in which some op gave
    a result while the context was on.

    >>> with Derandomized():
    ...     torch.nn.functional.dropout(torch.ones(3), 0.5)
    tensor([2., 2., 2.])
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.undefined: set[str] = set()
        self.precisions: set[torch.dtype] = set()
        self.needed = False
        self.drawn = 0

    def __enter__(self) -> Any:
        _fixed.depth = getattr(_fixed, "depth", 0) + 1
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        _fixed.depth -= 1
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        special = _SPECIAL.get(func)
        if special is None:
            special = _SPECIAL[func] = _classify(func)
        # The usual op: every one of a model's thousands passes here, so that this path is kept short.
        out = func(*args, **kwargs) if not special else self._run(func, special, args, kwargs)
        for tensor in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.dtype in _NARROW:
                self.precisions.add(tensor.dtype)
        return out

    def reaching(self, results: Iterable[Tensor]) -> int:
        """How many of the numbers drawn are in these tensors: all of them, for all that is known here."""
        return self.drawn

    def _run(self, func: Any, special: tuple[str, ...], args: Any, kwargs: Any) -> Any:
        self.needed = True
        name = func.overloadpacket.__name__
        bound = _bound(func, args, kwargs)
        if special != _RANDOM:  # the names of arguments that hold a probability of dropping
            if not any(map(bound.get, special)):
                return func(*args, **kwargs)
            self.drawn += _masked(out := func(**{**bound, **dict.fromkeys(special, 0.0)}), bound)
            return out
        parts, out = self._fixed(func, name, bound, args, kwargs)
        if not parts:
            self._count(out, bound.get("p", bound["self"]) if name.startswith("bernoulli") else 0.5)
        return out

    def _count(self, out: Any, chance: Any = 0.5) -> None:
        """``chance``: of a Bernoulli draw; 0 or 1 decide without a number."""
        first = next((leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)), None)
        if first is not None and isinstance(chance, Tensor) and chance.shape == first.shape:
            self.drawn += int(((chance > 0) & (chance < 1)).sum())
        elif first is not None and (isinstance(chance, Tensor) or 0 < chance < 1):
            self.drawn += first.numel()

    def _fixed(self, func: Any, name: str, bound: dict[str, Any], args: Any, kwargs: Any) -> tuple[bool, Any]:
        """Whether the result was put together from other random ops, and the result."""
        if name in _DROPOUT:
            return bound.get("train") is False, _dropout(func, bound)
        if name in ("rrelu_with_noise", "rrelu_with_noise_"):
            return not bound["training"], _rrelu(func, bound)
        fixed = _FIXED.get(name.removesuffix("_")) or _FIXED.get(name.removesuffix("_like"))
        if fixed is None:
            with self:  # composite ops reach here whole in inference mode
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return True, parts
            self.undefined.add(name)
            return False, func(*args, **kwargs)
        # Computed first: an in-place op may hold its own parameters in ``self``. Then the real op runs, for the result's layout.
        value = fixed(bound)
        out = func(*args, **kwargs)
        return False, out.copy_(value) if isinstance(value, Tensor) else out.fill_(value)


def _classify(func: Any) -> tuple[str, ...]:
    """Nothing for an ordinary op, ``_RANDOM`` for a random one, else the arguments by which it drops on its own (attention, cuDNN)."""
    names = tuple(a.name for a in schema_of(func).arguments if a.name in ("dropout_p", "dropout"))
    if names and "dropout" not in func.overloadpacket.__name__:
        return names
    return _RANDOM if torch.Tag.nondeterministic_seeded in func.tags else ()


_RANDOM = ("random",)
_SPECIAL: dict[Any, tuple[str, ...]] = {}
_NARROW = frozenset(
    {torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex32, torch.float8_e4m3fn, torch.float8_e5m2}
)
_DROPOUT = frozenset({"native_dropout", "_fused_dropout"})


def _bound(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments by their names in the op's schema, defaults filled in."""
    bound = {a.name: a.default_value for a in schema_of(func).arguments if a.has_default_value()}
    bound.update(zip((a.name for a in schema_of(func).arguments), args, strict=False))
    bound.update(kwargs)
    return bound


def _masked(out: Any, bound: dict[str, Any]) -> int:
    """The entries of the masks inside attention and cuDNN's recurrent nets: as many as where the same is spelled out with dropouts."""
    if "query" in bound and "key" in bound:  # one for each weight
        query, key = bound["query"], bound["key"]
        return int(query.numel() // max(query.shape[-1], 1) * key.shape[-2])
    first = next(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
    return int(first.numel() * max(bound.get("num_layers", 2) - 1, 0))  # between the layers


def _dropout(func: Any, bound: dict[str, Any]) -> tuple[Tensor, Tensor]:
    x: Tensor = bound["input"] if "input" in bound else bound["self"]
    if func.overloadpacket.__name__ == "native_dropout":
        if bound["train"] is False:
            return x.clone(), torch.ones_like(x, dtype=torch.bool)
        keep, mask = 1.0 - bound["p"], torch.ones_like(x, dtype=torch.bool)
    else:
        keep, mask = bound["p"], torch.ones_like(x, dtype=torch.uint8)
    return x * (1.0 / keep if keep else 0.0), mask


def _rrelu(func: Any, bound: dict[str, Any]) -> Tensor:
    if not bound["training"]:
        result: Tensor = func(**bound)
        return result
    x: Tensor = bound["self"]
    slope = (bound["lower"] + bound["upper"]) / 2
    bound["noise"].copy_(torch.where(x <= 0, slope, 1.0))  # backward multiplies by it
    return x.mul_(bound["noise"]) if func.overloadpacket.__name__.endswith("_") else x * bound["noise"]


def _bernoulli(a: dict[str, Any]) -> Tensor | float:
    p = a.get("p", a["self"])
    return (p > THRESHOLD) if isinstance(p, Tensor) else float(p > 0)


def _uniform(a: dict[str, Any]) -> float:
    low, high = a.get("from", 0.0), a.get("to", 1.0)
    return float(low + UNIFORM * (high - low))


def _normal(a: dict[str, Any]) -> Tensor | float:
    mean, std = a.get("mean", 0.0), a.get("std", 1.0)
    return mean + NORMAL * std  # type: ignore[no-any-return]


def _integer(a: dict[str, Any]) -> int:
    low, high = a.get("low", a.get("from")) or 0, a.get("high", a.get("to"))
    return int(low + (high - low) // 3) if high is not None else 1


def _multinomial(a: dict[str, Any]) -> Tensor:
    order: Tensor = a["self"].argsort(dim=-1, descending=True, stable=True)
    wanted = a["num_samples"]
    return order[..., :1].expand(*order.shape[:-1], wanted) if a.get("replacement") else order[..., :wanted]


_FIXED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "bernoulli": _bernoulli,
    "rand": lambda a: UNIFORM,
    "randn": lambda a: NORMAL,
    "uniform": _uniform,
    "normal": _normal,
    "normal_functional": _normal,
    "exponential": lambda a: math.log(2.0) / a.get("lambd", 1.0),
    "cauchy": lambda a: a.get("median", 0.0) + UNIFORM * a.get("sigma", 1.0),
    "log_normal": lambda a: math.exp(a.get("mean", 1.0) + NORMAL * a.get("std", 2.0)),
    "geometric": lambda a: max(1.0, round(1.0 / a["p"])),
    "random": _integer,
    "randint": _integer,
    "randperm": lambda a: torch.arange(a["n"]),
    "multinomial": _multinomial,
    "poisson": lambda a: a["self"].round(),
    "binomial": lambda a: (a["count"] * a["prob"]).round(),
    "_standard_gamma": lambda a: a["self"],
    "_sample_dirichlet": lambda a: a["self"] / a["self"].sum(-1, keepdim=True),
}


class DefaultFloat64(TorchFunctionMode):
    """Inside this context the default floating dtype is float64, for this thread, without touching the global default.

    Concerns calls that leave the dtype to the default: factories (``zeros``, ``full`` with a float, ``arange`` with floats, ``tensor``
    of Python floats, window functions ...) and operations that turn integers into floats (``ints / 2``, ``ints.sqrt()``). A dtype that
    is spelled out is kept, and so is that of ``zeros_like`` and ``x.new_zeros``. Legacy constructors (``torch.Tensor(3)``) are not seen.

    >>> with DefaultFloat64():
    ...     torch.zeros(1).dtype, torch.tensor([0.5]).dtype, torch.zeros(1, dtype=torch.float16).dtype
    (torch.float64, torch.float64, torch.float16)
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        default = torch.get_default_dtype()
        if kwargs.get("dtype") is not None or default == torch.float64:
            return func(*args, **kwargs)
        if func in _ALWAYS_FLOAT and kwargs.get("out") is None:
            return func(*args, **{**kwargs, "dtype": torch.float64})
        out = func(*args, **kwargs)
        if func in _FROM_DATA:
            wide = _WIDE.get(out.dtype) if out.dtype in (default, default.to_complex()) else None
            if wide is not None and len(args) < _FROM_DATA[func] and all(_plain(a) for a in (*args, *kwargs.values())):
                return func(*args, **{**kwargs, "dtype": wide})
            return out
        if not isinstance(out, Tensor) or out.dtype != default or getattr(func, "__name__", "") in _CASTS:
            return out
        return _from_integers(func, args, kwargs, out)


_WIDE = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
    torch.complex32: torch.complex128,
}
_ALWAYS_FLOAT: frozenset[Any] = frozenset(
    {
        torch.zeros,
        torch.ones,
        torch.empty,
        torch.empty_strided,
        torch.empty_permuted,
        torch.rand,
        torch.randn,
        torch.eye,
        torch.linspace,
        torch.logspace,
        torch.fft.fftfreq,
        torch.fft.rfftfreq,
        torch.bartlett_window,
        torch.blackman_window,
        torch.hamming_window,
        torch.hann_window,
        torch.kaiser_window,
    }
)
# Factories whose dtype follows their arguments, and how many positional arguments leave the dtype out.
_FROM_DATA: dict[Any, int] = {
    torch.tensor: 2,
    torch.as_tensor: 2,
    torch.asarray: 2,
    torch.scalar_tensor: 2,
    torch.full: 3,
    torch.arange: 4,
    torch.range: 4,
}
_CASTS = frozenset({"float", "to", "type", "type_as", "view", "half", "bfloat16", "dequantize", "__get__", "detach", "clone"})


def _plain(value: Any) -> bool:
    """Python numbers, nested as you like: what takes the default dtype when it becomes a tensor."""
    if isinstance(value, (list, tuple)):
        return all(_plain(v) for v in value)
    return type(value) in (bool, int, float, complex, str, type(None), torch.device, torch.layout)


def _from_integers(func: Any, args: Any, kwargs: Any, out: Tensor) -> Tensor:
    """``ints / 3`` is computed in the default dtype; do it in float64. Other results pass through."""
    leaves = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    if not leaves or any(t.is_floating_point() or t.is_complex() for t in leaves):
        return out
    wide = [a.double() if isinstance(a, Tensor) and a.dtype != torch.bool else a for a in args]
    try:
        again = func(*wide, **kwargs)
    except (RuntimeError, TypeError):
        return out.double()
    return again if isinstance(again, Tensor) and again.dtype == torch.float64 and again.shape == out.shape else out.double()
