"""Guards: may this call run the recorded program, decided in a few microseconds; and if not, why not, in a sentence.

Comes in: a ``graph.Guard`` and what the program's own tensors were when it was installed (``Facts``). Goes out:
``compile_guard``, a generated straight-line function of bools, and ``explain_miss``, the same checks read slowly with a
sentence for each. The first check that fails decides; both go in the same order.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fxfuse.graph import Guard, Layout, TensorGuard
from fxfuse.models.held import Kept
from fxfuse.private.autocast import any_autocast_enabled
from fxfuse.private.fake_tensors import FakeTensor
from fxfuse.private.tensor_guards import alike, never

_KNOWN = 3  # calls that are remembered: a full batch, the last one, one of evaluation
_MOST_LEARNT = 32
# What is true of a tensor that lies in another way than was recorded.
_MISPLACED = {
    "in rows": "not {0}.is_contiguous()", "in order": "not {0}.is_contiguous() and not in_order({0})",
    "not in rows": "{0}.is_contiguous()", "out of order": "in_order({0})", "by results": "not {0}.is_contiguous() and not in_order({0})",
}  # fmt: skip
_LIES = {
    **dict.fromkeys(("in rows", "in order"), "does not lie in rows, and forward views it, or what it computes from it, as if it did"),
    "order": "lies in memory in another order than recorded, and forward views it, or writes into what was a copy of it, as it lies",
    "by results": "lies in memory in another order than recorded, and results lie as it does",
    **dict.fromkeys(
        ("not in rows", "out of order"),
        "lies in rows, and forward writes into a copy of it, or of what it computes from it, that is none then",
    ),
}
_COMPARE = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt, "==": operator.eq, "!=": operator.ne}


@dataclass(frozen=True)
class Facts:
    """What a program assumes of one of its own tensors (a weight, a buffer, a constant)."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(name: str, tensor: Tensor) -> Facts:
        """The facts of a tensor as it is now."""
        return Facts(name, tuple(tensor.shape), tensor.dtype, tensor.device)


def _same_constant(given: Any, recorded: Any) -> bool:
    if given is recorded:
        return True
    if type(recorded) is Kept:
        return recorded.holds(given)
    if type(given) is not type(recorded) or isinstance(recorded, Tensor):
        return False
    try:
        return bool(given == recorded)
    except Exception:  # a value whose equality is not a bool is not known to be equal
        return False


def in_order(tensor: Tensor) -> bool:
    """Do its dims go from the largest stride to the smallest? Those of one element, and expanded ones, may stand anywhere.

    >>> in_order(torch.zeros(2, 3)[:, :2]), in_order(torch.zeros(2, 3).t())
    (True, False)
    """
    steps = [step for step, size in zip(tensor.stride(), tensor.shape, strict=True) if step and size > 1]
    return all(a >= b for a, b in pairwise(steps))


def order_of(tensor: Tensor) -> tuple[int, ...]:
    """Its dims from the largest stride to the smallest; empty where that is from first to last.

    >>> order_of(torch.zeros(2, 3).t()), order_of(torch.zeros(2, 3)), order_of(torch.zeros(1, 3).t())
    ((1, 0), (), ())
    """
    if tensor.is_contiguous() or in_order(tensor):
        return ()
    steps = tensor.stride()
    return tuple(sorted(range(tensor.dim()), key=lambda dim: (-steps[dim], dim)))


def lies(tensor: Tensor, layout: Layout, order: tuple[int, ...]) -> bool:
    """Does it lie in memory as a guard asks?

    >>> lies(torch.zeros(2, 3).t(), "in rows", (1, 0)), lies(torch.zeros(2, 3).t(), "by results", ())
    (True, False)
    """
    tensor = tensor.permute(order) if order else tensor
    rows = tensor.is_contiguous()
    if layout == "not in rows":
        return not rows
    if layout == "out of order":
        return not in_order(tensor)
    return rows or (layout != "in rows" and in_order(tensor))


def _misplaced(name: str, leaf: TensorGuard) -> str:
    """An expression that is true of a tensor that lies in another way than was recorded."""
    if not leaf.order:
        return _MISPLACED[leaf.layout].format(name)
    slow = f"not lies({name}, {leaf.layout!r}, {leaf.order!r})"
    if leaf.layout == "in rows":
        return slow
    first, *others = leaf.order  # a view in that order takes some microseconds: strides tell as much of the usual call
    falling = " >= ".join([f"(y := {name}.stride())[{first}]", *(f"y[{dim}]" for dim in others)])
    return f"not ({falling} > 0) and {slow}"


def _autocast(kind: str) -> bool:
    """Is autocast on for this kind of device? ("meta" and the like have none, and torch raises for them.)"""
    try:
        return torch.is_autocast_enabled(kind)
    except RuntimeError:
        return False


def compile_guard(guard: Guard, facts: Sequence[Facts] = ()) -> Callable[..., bool]:
    """The guard as a generated function of the flattened inputs, then the program's own tensors, in the order of ``facts``.

    >>> guard = Guard((TensorGuard((None, 3), torch.float32, torch.device("cpu")),), same=(0,))
    >>> check = compile_guard(guard)
    >>> check(torch.zeros(5, 3)), check(torch.zeros(5, 4))
    (True, False)
    """
    space: dict[str, Any] = {
        "Tensor": Tensor,
        "Parameter": torch.nn.Parameter,
        "FakeTensor": FakeTensor,  # what torch.export traces with
        "strided": torch.strided,
        "autocast": _autocast,
        "any_autocast": any_autocast_enabled,
        "is_compiling": torch.compiler.is_compiling,
        "autocast_dtype": torch.get_autocast_dtype,
        "default_dtype": torch.get_default_dtype,
        "same_constant": _same_constant,
        "in_order": in_order,
        "is_grad_enabled": torch.is_grad_enabled,
        "lies": lies,
        "constant0": guard.default_dtype,
    }

    def constant(value: Any) -> str:
        if isinstance(value, torch.dtype | torch.device):  # few of them, in many checks
            for name, known in space.items():
                if type(known) is type(value) and known == value:
                    return name
        name = f"constant{len(space)}"
        space[name] = value
        return name

    each: list[str] = []  # of each tensor; ":=" gives a shape a name for the tests after it. The guard holds where no test is true.
    dtypes: list[str] = []  # generic programs: expressions that must all be one dtype, or one device
    devices: list[str] = []
    others: list[str] = []  # of anything else than tensors
    tensors: list[str] = []
    for i, leaf in enumerate(guard.leaves):
        x = f"x{i}"
        if not isinstance(leaf, TensorGuard):
            value = leaf[1]
            plain = value is None or isinstance(value, bool)
            others.append(f"{x} is not {value!r}" if plain else f"not same_constant({x}, {constant(value)})")
            continue
        tensors.append(x)
        each.append(f"type({x}) is not Tensor and type({x}) is not Parameter and type({x}) is not FakeTensor")
        each.append(f"{x}.layout is not strided")
        each.append(f"len(s{i} := {x}.shape) != {len(leaf.shape)}")
        each.extend(f"s{i}[{dim}] != {size}" for dim, size in enumerate(leaf.shape) if size is not None)
        if guard.generic_dtype and leaf.dtype.is_floating_point:
            if not dtypes:
                each.append(f"not {x}.dtype.is_floating_point")
            dtypes.append(f"{x}.dtype")
        else:
            each.append(f"{x}.dtype is not {constant(leaf.dtype)}")
        if guard.generic_device:
            devices.append(f"{x}.device")
        else:
            each.append(f"{x}.device != {constant(leaf.device)}")
        if leaf.requires_grad is not None:
            each.append(f"{x}.requires_grad is not {leaf.requires_grad}")
    for i, fact in enumerate(facts):
        tensors.append(f"t{i}")
        if guard.generic_dtype and fact.dtype.is_floating_point:
            dtypes.append(f"t{i}.dtype")
        else:
            each.append(f"t{i}.dtype is not {constant(fact.dtype)}")
        if guard.generic_device:
            devices.append(f"t{i}.device")
        else:
            each.append(f"t{i}.device != {constant(fact.device)}")
    each.extend(f"{other} is not {dtypes[0]}" for other in dtypes[1:])
    each.extend(f"{other} != {devices[0]}" for other in devices[1:])
    # What the planner chose is asked before the guard is (``runtime``).
    each.extend(f"not (s{check.input}[{check.dim}] {check.op} {check.bound})" for check in guard.sizes if not check.chosen)
    each.extend(f"s{a}[{m}] != s{b}[{n}]" for (a, m), (b, n) in guard.equal_dims)
    inputs = [i for i, leaf in enumerate(guard.leaves) if isinstance(leaf, TensorGuard)]
    others.extend(f"x{i} is not x{guard.same[i]}" for i in inputs if guard.same[i] != i)
    others.extend(_misplaced(f"x{i}", guard.leaves[i]) for i in inputs if guard.leaves[i].layout)
    if guard.in_rows:
        others.extend(f"not x{i}.is_contiguous() or x{i}.storage_offset()" for i in inputs)
    distinct = [i for i in inputs if guard.same[i] == i]
    if len(distinct) > 4:
        others.append("len({" + ", ".join(f"id(x{i})" for i in distinct) + f"}}) != {len(distinct)}")
    else:
        others.extend(f"x{i} is x{j}" for n, i in enumerate(distinct) for j in distinct[:n])
    if guard.tracking:
        others.append("not is_grad_enabled()")
    others.append("default_dtype() is not constant0")
    if guard.autocast is None:
        kind = f"{devices[0]}.type" if devices else repr(_recorded_device(guard, facts).type)
        others.append(f"(compiling or any_autocast()) and autocast({kind})")
    else:
        kind, dtype = guard.autocast
        others.append(f"not autocast({kind!r}) or autocast_dtype({kind!r}) is not {constant(dtype)}")

    # Tensors that are like those of a call before, sizes and all, pass as those did: the usual call needs no more than that.
    given = ", ".join(tensors)
    known = [f"known{number}" for number in range(_KNOWN)]
    space.update(dict.fromkeys(known, never), learn=_learner(space))
    names = [f"x{i}" for i in range(len(guard.leaves))] + [f"t{i}" for i in range(len(facts))]
    lines = [f"def check({', '.join(names)}):", "    compiling = is_compiling()"]
    if tensors:
        lines.append(f"    if compiling or not ({' or '.join(f'{name}({given})' for name in known)}):")
        lines += [f"        if {test}: return False" for test in each]
        lines.append(f"        if not compiling: learn({given})")
    lines += [*(f"    if {test}: return False" for test in others), "    return True"]
    exec("\n".join(lines), space)
    check: Callable[..., bool] = space["check"]
    return check


def _learner(space: dict[str, Any]) -> Callable[..., None]:
    """Remembers the tensors that passed, the last few of them; after so many, sizes change at every call and it is no use."""
    learnt = 0

    def learn(*tensors: Any) -> None:
        nonlocal learnt
        if learnt < _MOST_LEARNT:
            learnt += 1
            space[f"known{learnt % _KNOWN}"] = alike(tensors)

    return learn


def _recorded_device(guard: Guard, facts: Sequence[Facts]) -> torch.device:
    """Where the program runs: the device of its first tensor."""
    inputs = [leaf.device for leaf in guard.leaves if isinstance(leaf, TensorGuard)]
    return [*inputs, *(fact.device for fact in facts), torch.device("cpu")][0]


def explain_miss(guard: Guard, leaves: Sequence[Any], facts: Sequence[Facts] = (), tensors: Sequence[Tensor] = ()) -> str | None:
    """The first thing that keeps a call from the recorded program, as a sentence; None where nothing does.

    Sizes that another program of the region serves, for being faster there, are no reason.

    >>> guard = Guard((TensorGuard((None, 3), torch.float32, torch.device("cpu")),), same=(0,))
    >>> explain_miss(guard, [torch.zeros(5, 4)])
    'input 0 has shape (5, 4), recorded (any, 3)'
    """
    dtype: tuple[str, torch.dtype] | None = None  # the first floating tensor's, by whose name
    device: tuple[str, torch.device] | None = None
    late: list[str] = []
    for i, (leaf, x) in enumerate(zip(guard.leaves, leaves, strict=True)):
        if not isinstance(leaf, TensorGuard):
            if not (x is leaf[1] if leaf[1] is None or isinstance(leaf[1], bool) else _same_constant(x, leaf[1])):
                return _other_object(i, x, leaf[1])
            continue
        if type(x) not in (Tensor, torch.nn.Parameter, FakeTensor):
            return f"input {i} is {_short(x)}, recorded a plain tensor"
        if x.layout is not torch.strided:
            return f"input {i} has layout {x.layout}, recorded torch.strided"
        if x.dim() != len(leaf.shape) or any(size is not None and x.size(dim) != size for dim, size in enumerate(leaf.shape)):
            return f"input {i} has shape {tuple(x.shape)}, recorded {_shape(leaf.shape)}"
        generic = guard.generic_dtype and leaf.dtype.is_floating_point
        if not x.dtype.is_floating_point if generic else x.dtype is not leaf.dtype:
            return f"input {i} has dtype {x.dtype}, recorded {leaf.dtype}"
        if generic and dtype is not None and x.dtype is not dtype[1]:
            late.append(f"input {i} has dtype {x.dtype}, {dtype[0]} has {dtype[1]}")
        dtype = (f"input {i}", x.dtype) if generic and dtype is None else dtype
        if not guard.generic_device and x.device != leaf.device:
            return f"input {i} is on {x.device}, recorded {leaf.device}"
        if guard.generic_device and device is not None and x.device != device[1]:
            late.append(f"input {i} is on {x.device}, {device[0]} on {device[1]}")
        device = device or (f"input {i}", x.device)
        if leaf.requires_grad is not None and x.requires_grad is not leaf.requires_grad:
            return f"input {i} has requires_grad={x.requires_grad}, recorded {leaf.requires_grad}"
    for fact, t in zip(facts, tensors, strict=True):
        generic = guard.generic_dtype and fact.dtype.is_floating_point
        if not generic and t.dtype is not fact.dtype:
            return f"{fact.name} has dtype {t.dtype}, recorded {fact.dtype}"
        if generic and dtype is not None and t.dtype is not dtype[1]:
            late.append(f"{fact.name} has dtype {t.dtype}, {dtype[0]} has {dtype[1]}")
        dtype = (fact.name, t.dtype) if generic and dtype is None else dtype
        if not guard.generic_device and t.device != fact.device:
            return f"{fact.name} is on {t.device}, recorded {fact.device}"
        if guard.generic_device and device is not None and t.device != device[1]:
            late.append(f"{fact.name} is on {t.device}, {device[0]} on {device[1]}")
        device = device or (fact.name, t.device)
    if late:
        return late[0]
    for size in guard.sizes:
        if not size.chosen and not _COMPARE[size.op](leaves[size.input].size(size.dim), size.bound):
            return f"input {size.input} has size {leaves[size.input].size(size.dim)} in dim {size.dim}, recorded {size.op} {size.bound}"
    for (a, m), (b, n) in guard.equal_dims:
        if leaves[a].size(m) != leaves[b].size(n):
            return f"dim {m} of input {a} is {leaves[a].size(m)} and dim {n} of input {b} is {leaves[b].size(n)}, recorded as equal"
    indices = [i for i, leaf in enumerate(guard.leaves) if isinstance(leaf, TensorGuard)]
    for i in indices:
        first = next(j for j in indices if leaves[j] is leaves[i])
        if first != guard.same[i]:
            if guard.same[i] == i:
                return f"inputs {first} and {i} are the same tensor, recorded as two"
            return f"inputs {guard.same[i]} and {i} are two tensors, recorded as the same"
    for i in indices:
        layout, order = guard.leaves[i].layout, guard.leaves[i].order
        if layout and not lies(leaves[i], layout, order):
            return f"input {i} {_LIES['order' if order and layout in ('in rows', 'in order') else layout]}"
    crooked = next((i for i in indices if guard.in_rows and (not leaves[i].is_contiguous() or leaves[i].storage_offset())), None)
    if crooked is not None:
        return f"input {crooked} does not lie in rows, and forward reads how it lies in memory"
    if guard.tracking and not torch.is_grad_enabled():
        return "the caller tracks no gradients, and forward does for a part of what it computes"
    if torch.get_default_dtype() is not guard.default_dtype:
        return f"the default dtype is {torch.get_default_dtype()}, recorded {guard.default_dtype}"
    where = device[1].type if device is not None else "cpu"
    if guard.autocast is None:
        return f"autocast is on for {where}" if _autocast(where) else None
    kind, wanted = guard.autocast
    if not _autocast(kind):
        return f"autocast is off for {kind}, recorded with {wanted}"
    if torch.get_autocast_dtype(kind) is not wanted:
        return f"autocast is on for {kind} with {torch.get_autocast_dtype(kind)}, recorded with {wanted}"
    return None


def _other_object(index: int, given: Any, recorded: Any) -> str:
    if type(recorded) is Kept and given is recorded.value:
        return f"input {index}, {_short(given)}, has other attributes than when it was recorded"
    return f"input {index} is {_short(given)}, recorded {_short(recorded.value if type(recorded) is Kept else recorded)}"


def _shape(shape: tuple[int | None, ...]) -> str:
    inner = ", ".join("any" if size is None else str(size) for size in shape)
    return f"({inner},)" if len(shape) == 1 else f"({inner})"


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= 40 else f"a {type(value).__name__}"
