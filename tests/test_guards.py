"""Guards: the generated function and the slow explanation decide alike, and say the first thing that differs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxfuse.graph import Guard, SizeCheck, TensorGuard
from fxfuse.running.guards import Facts, compile_guard, explain_miss

CPU = torch.device("cpu")


def leaf(*shape: int | None, dtype: torch.dtype = torch.float32, requires_grad: bool | None = None) -> TensorGuard:
    return TensorGuard(shape, dtype, CPU, requires_grad)


def decide(guard: Guard, *leaves: object, weights: tuple[torch.Tensor, ...] = (), recorded: tuple[torch.Tensor, ...] = ()) -> str | None:
    """The reason, after making sure that the fast function says the same."""
    facts = [Facts.of(f"weight{i}", tensor) for i, tensor in enumerate(recorded or weights)]
    reason = explain_miss(guard, leaves, facts, weights)
    assert compile_guard(guard, facts)(*leaves, *weights) is (reason is None)
    return reason


def test_shapes() -> None:
    guard = Guard((leaf(None, 7),), (0,))
    assert decide(guard, torch.zeros(2, 7)) is None
    assert decide(guard, torch.zeros(0, 7)) is None
    assert decide(guard, torch.zeros(2, 5)) == "input 0 has shape (2, 5), recorded (any, 7)"
    assert decide(guard, torch.zeros(2, 7, 1)) == "input 0 has shape (2, 7, 1), recorded (any, 7)"
    assert decide(Guard((leaf(),), (0,)), torch.tensor(1.0)) is None


def test_types() -> None:
    class Mine(torch.Tensor):
        pass

    guard = Guard((leaf(None, 7),), (0,))
    assert decide(guard, nn.Parameter(torch.zeros(2, 7))) is None
    assert decide(guard, torch.zeros(2, 7).as_subclass(Mine)) == "input 0 is a Mine, recorded a plain tensor"
    assert decide(guard, None) == "input 0 is None, recorded a plain tensor"
    assert decide(guard, torch.zeros(2, 7).to_sparse()) == "input 0 has layout torch.sparse_coo, recorded torch.strided"
    assert decide(guard, torch.zeros(2, 7, device="meta")) == "input 0 is on meta, recorded cpu"


def test_order_in_memory() -> None:
    said = "input 0 does not lie in rows, and forward views it, or what it computes from it, as if it did"
    plain, gaps, turned, expanded = torch.zeros(3, 4), torch.zeros(3, 9)[:, :4], torch.zeros(4, 3).t(), torch.zeros(1, 4).expand(3, 4)
    for layout, right, wrong in (("in rows", [plain], [gaps, turned, expanded]), ("in order", [plain, gaps, expanded], [turned])):
        guard = Guard((TensorGuard((None, 4), torch.float32, CPU, layout=layout),), (0,))
        assert [decide(guard, x) for x in right] == [None] * len(right)
        assert [decide(guard, x) for x in wrong] == [said] * len(wrong)
    said = "input 0 lies in rows, and forward writes into a copy of it, or of what it computes from it, that is none then"
    for layout, right, wrong in (("not in rows", [gaps, turned, expanded], [plain]), ("out of order", [turned], [plain, gaps, expanded])):
        guard = Guard((TensorGuard((None, 4), torch.float32, CPU, layout=layout),), (0,))
        assert [decide(guard, x) for x in right] == [None] * len(right)
        assert [decide(guard, x) for x in wrong] == [said] * len(wrong)


def test_dtypes() -> None:
    weight = torch.zeros(1, dtype=torch.float64)
    exact = Guard((leaf(2), leaf(2, dtype=torch.int64)), (0, 1))
    ints = torch.zeros(2, dtype=torch.int64)
    assert decide(exact, torch.zeros(2), ints) is None
    assert decide(exact, torch.zeros(2).double(), ints) == "input 0 has dtype torch.float64, recorded torch.float32"
    generic = Guard((leaf(2), leaf(2, dtype=torch.int64)), (0, 1), generic_dtype=True)
    assert decide(generic, torch.zeros(2).double(), ints, weights=(weight,)) is None
    assert decide(generic, torch.zeros(2), ints, weights=(weight,)) == "weight0 has dtype torch.float64, input 0 has torch.float32"
    assert decide(generic, torch.zeros(2), ints.int()) == "input 1 has dtype torch.int32, recorded torch.int64"
    assert decide(generic, ints, ints.clone()) == "input 0 has dtype torch.int64, recorded torch.float32"
    changed = weight.float()
    assert decide(exact, torch.zeros(2), ints, weights=(changed,), recorded=(weight,)) == (
        "weight0 has dtype torch.float32, recorded torch.float64"
    )


def test_devices() -> None:
    generic = Guard((leaf(2), leaf(2)), (0, 1), generic_device=True)
    meta = torch.zeros(2, device="meta")
    assert decide(generic, meta, torch.zeros(2, device="meta")) is None
    assert decide(generic, torch.zeros(2), meta) == "input 1 is on meta, input 0 on cpu"
    assert decide(Guard((leaf(2),), (0,), generic_device=True), meta, weights=(torch.zeros(1),)) == "weight0 is on cpu, input 0 on meta"


@pytest.mark.parametrize(
    ("recorded", "given", "holds"),
    [
        (None, None, True),
        (None, False, False),
        (True, True, True),
        (True, 1, False),
        (1, True, False),
        (3, 3, True),
        (3, 3.0, False),
        ("mean", "mean", True),
        ("mean", "sum", False),
        (2.5, 2.5, True),
        (torch.float32, torch.float32, True),
        (torch.float32, torch.float64, False),
        (None, torch.zeros(1), False),
        (3, torch.tensor(3), False),
    ],
)
def test_constants(recorded: object, given: object, holds: bool) -> None:
    reason = decide(Guard((("constant", recorded),), (0,)), given)
    assert (reason is None) is holds
    if reason is not None:
        assert reason.startswith("input 0 is ")
        assert reason.endswith(f"recorded {recorded!r}")


def test_sizes_and_equal_dims() -> None:
    guard = Guard((leaf(None, None), leaf(None)), (0, 1), sizes=(SizeCheck(0, 1, ">=", 3),), equal_dims=(((0, 0), (1, 0)),))
    assert decide(guard, torch.zeros(2, 3), torch.zeros(2)) is None
    assert decide(guard, torch.zeros(2, 2), torch.zeros(2)) == "input 0 has size 2 in dim 1, recorded >= 3"
    assert decide(guard, torch.zeros(2, 3), torch.zeros(4)) == "dim 0 of input 0 is 2 and dim 0 of input 1 is 4, recorded as equal"


@pytest.mark.parametrize("more", [0, 4])  # few and many inputs are compared in two ways
def test_same_objects(more: int) -> None:
    rest = [torch.zeros(2) for _ in range(more)]
    same = tuple(range(2, 2 + more))
    x, y = torch.zeros(2), torch.zeros(2)
    apart = Guard((leaf(2),) * (2 + more), (0, 1, *same))
    assert decide(apart, x, y, *rest) is None
    assert decide(apart, x, x, *rest) == "inputs 0 and 1 are the same tensor, recorded as two"
    together = Guard((leaf(2),) * (2 + more), (0, 0, *same))
    assert decide(together, x, x, *rest) is None
    assert decide(together, x, y, *rest) == "inputs 0 and 1 are two tensors, recorded as the same"


def test_surroundings() -> None:
    guard = Guard((leaf(2),), (0,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert decide(guard, torch.zeros(2)) == "autocast is on for cpu"
    with torch.autocast("cpu", enabled=False):
        assert decide(guard, torch.zeros(2)) is None
    assert decide(Guard((leaf(2),), (0,), default_dtype=torch.float64), torch.zeros(2)) == (
        "the default dtype is torch.float32, recorded torch.float64"
    )
    assert decide(Guard((leaf(2, requires_grad=True),), (0,)), torch.zeros(2)) == "input 0 has requires_grad=False, recorded True"
    assert decide(Guard((), ())) is None
