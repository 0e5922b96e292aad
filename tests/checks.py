"""One question for every test of a loop shape: is the fused model the original, and does it launch as little as it should?

``assert_fused_equals(model, x, heavy=3)`` fuses the model, asserts that nothing was refused and that the original is untouched, and
then compares, in float64 and to 1e-10 relative, everything a user could see: outputs, input gradients, every parameter gradient by
the original's name, in both modes, on data and batch sizes that the recording has not seen, with new weights loaded, and after
``unfuse``.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map

import fxfuse
from fxfuse import launches
from fxfuse.weights import packing

RTOL = 1e-10
ROUNDING = 2.0**-44  # of float64, in what adds up to zero: a part of the largest number that it may have been added up of
# For tests that are many: the planner's measurements and fxfuse's own validation are left out; the comparison here is not.
QUICK: dict[str, Any] = {"tune": False, "validate": False}


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in float64, every parameter and floating buffer drawn anew, counters too: no two lanes alike, no bias zero."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("num_batches_tracked"):
                buffer.copy_(torch.randint(9, (), generator=generator))
            elif buffer.is_floating_point():
                buffer.copy_(torch.rand(buffer.shape, generator=generator, dtype=buffer.dtype) + 0.5)
    return model


def mlp(inputs: int = 1, hidden: int = 6, outputs: int = 1) -> nn.Sequential:
    """The network of most lanes here: two Linears and a ReLU."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def model_of(forward: Callable[..., Any], train: Callable[..., Any] | None = None, **attributes: Any) -> nn.Module:
    """A module with this forward (and ``train``) and these attributes."""
    class Made(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, value in attributes.items():
                setattr(self, name, value)

    Made.forward = forward  # type: ignore[method-assign]
    if train is not None:
        Made.train = train  # type: ignore[method-assign]
    return Made()


def randn(*shape: int, seed: int = 1) -> Tensor:
    """Normal float64 numbers that depend on nothing but the seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def as_args(inputs: Any) -> tuple[Any, ...]:
    """The positional arguments: a tuple stays one, anything else is the only argument."""
    return inputs if isinstance(inputs, tuple) else (inputs,)


def fresh(inputs: Any, batch: int | None, seed: int) -> Any:
    """Inputs of the same kind with other numbers, and `batch` rows where `batch` is given; integer tensors are resampled by rows."""
    generator = torch.Generator().manual_seed(seed)

    def draw(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        rows = leaf.shape[0] if batch is None else batch
        if leaf.is_floating_point():
            return torch.randn(rows, *leaf.shape[1:], generator=generator, dtype=leaf.dtype)
        return leaf[torch.randint(leaf.shape[0], (rows,), generator=generator)]

    return tree_map(draw, inputs)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest number expected; 0 where both are all zero, nan where either holds one."""
    if expected.numel() == 0:
        return 0.0
    if expected.is_complex():
        actual, expected = torch.view_as_real(actual.resolve_conj()), torch.view_as_real(expected.resolve_conj())
    difference = (actual.double() - expected.double()).abs().max().item()
    scale = expected.double().abs().max().item()
    return difference / scale if scale else difference


def assert_same_strides(got: Tensor, want: Tensor, what: str) -> None:
    """In dims of more than one element: in others no stride can be seen."""
    seen = [dim for dim in range(want.dim()) if want.shape[dim] > 1]
    assert [got.stride(dim) for dim in seen] == [want.stride(dim) for dim in seen], what


def assert_close(actual: Tensor | None, expected: Tensor | None, what: str, rtol: float = RTOL, floor: float = 0.0) -> None:
    """Same shape, dtype and numbers; None equals nothing but None. Differences up to ``floor`` are rounding."""
    if expected is None or actual is None:
        assert actual is expected, f"{what}: {'no gradient' if actual is None else 'a gradient'}, the original differs"
        return
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
    if floor and actual.numel() and (actual - expected).abs().max().item() <= floor:
        return
    error = relative_error(actual, expected)
    assert error <= rtol, f"{what}: relative error {error:.3g}, allowed {rtol:.3g}"


def plain(value: Any) -> Any:
    """A result in containers that pytree knows: dataclasses and dict subclasses as their type's name and what they hold."""
    if isinstance(value, dict):
        items = {key: plain(item) for key, item in value.items()}
        return items if type(value) is dict else (type(value).__name__, items)
    if is_dataclass(value) and not isinstance(value, type):
        return (type(value).__name__, {f.name: plain(getattr(value, f.name)) for f in fields(value)})
    if type(value) in (tuple, list):
        return type(value)(plain(item) for item in value)
    return value


@dataclass
class Result:
    """What one forward and backward gave: the outputs as a tree, and the gradients of the inputs and parameters."""

    outputs: list[Any]
    spec: TreeSpec
    inputs: list[Tensor | None]
    parameters: dict[str, Tensor | None]


def run(model: nn.Module, args: Any, kwargs: dict[str, Any], gradients: Callable[[nn.Module], dict[str, Tensor | None]]) -> Result:
    """Forward, a random weighted sum of all floating outputs, backward."""
    def leaf(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().clone().requires_grad_(value.is_floating_point())

    args, kwargs = tree_map(leaf, (as_args(args), kwargs))
    model.zero_grad(set_to_none=True)
    result = model(*args, **kwargs)
    outputs, spec = tree_flatten(plain(result))
    generator = torch.Generator().manual_seed(7)
    loss = torch.zeros((), dtype=torch.float64)
    for output in outputs:
        if isinstance(output, Tensor) and output.is_floating_point():
            loss = loss + (output * torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)).sum()
    if loss.requires_grad:
        loss.backward()
    inputs = [value.grad for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor) and value.requires_grad]
    detached = [output.detach() if isinstance(output, Tensor) else output for output in outputs]
    return Result(detached, spec, inputs, gradients(model))


def own_gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """Gradients by parameter name, of tied ones the first."""
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same_results(actual: Result, expected: Result, where: str, rtol: float = RTOL, rtol_outputs: float | None = None) -> None:
    """Outputs, input gradients and parameter gradients by name."""
    assert actual.spec == expected.spec, f"{where}: another output structure, {actual.spec} against {expected.spec}"
    for index, (got, want) in enumerate(zip(actual.outputs, expected.outputs, strict=True)):
        if isinstance(want, Tensor):
            assert_close(got, want, f"{where}: output {index}", rtol if rtol_outputs is None else rtol_outputs)
        else:
            assert got == want, f"{where}: output {index} is {got!r}, expected {want!r}"
    assert list(actual.parameters) == list(expected.parameters), f"{where}: other parameter names"
    # A bias in front of a BatchNorm has a gradient of zero but for rounding: of the largest gradient's, as everything here is float64.
    # Of one row, so has what a LayerNorm or softmax is given.
    given = [grad.abs().max().item() for grad in (*expected.inputs, *expected.parameters.values()) if grad is not None and grad.numel()]
    largest = max(given, default=0.0)
    for index, (got, want) in enumerate(zip(actual.inputs, expected.inputs, strict=True)):
        assert_close(got, want, f"{where}: gradient of input {index}", rtol, floor=largest * ROUNDING)
    for name, want in expected.parameters.items():
        assert_close(actual.parameters[name], want, f"{where}: gradient of {name}", rtol, floor=largest * ROUNDING)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Assert that the block leaves the model and the random state as they are, bit for bit."""
    def facts() -> tuple[Any, ...]:
        hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks)) for module in model.modules()]
        return (
            [(name, id(p), p.requires_grad, p.grad) for name, p in model.named_parameters(remove_duplicate=False)],
            [(name, id(b)) for name, b in model.named_buffers(remove_duplicate=False)],
            [(name, type(m), m.training, sorted(vars(m))) for name, m in model.named_modules()], hooks,
            torch.is_grad_enabled(), torch.get_default_dtype(), random.getstate(),
        )

    model.zero_grad(set_to_none=True)
    before, random_state = facts(), torch.get_rng_state()
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    yield
    assert facts() == before, "the original, or a global switch, was changed"
    assert torch.equal(torch.get_rng_state(), random_state), "random numbers were drawn from the user's generator"
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, tensors[name]), f"{name} of the original was changed"


def assert_same_state(actual: dict[str, Tensor], expected: dict[str, Tensor], where: str) -> None:
    """Same keys in the same order, same bits."""
    assert list(actual) == list(expected), f"{where}: other keys: {sorted(set(actual) ^ set(expected))} or another order"
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, f"{where}: {name} is {actual[name].dtype}"
        assert torch.equal(actual[name], tensor), f"{where}: {name} is not the same, bit for bit"


def assert_same_buffers(actual: nn.Module, expected: nn.Module, where: str) -> None:
    """Running statistics and counters by the original's names, saved or not; whole numbers exactly."""
    got = {**dict(actual.named_buffers()), **fxfuse.original_state_dict(actual)}
    for name, want in expected.named_buffers():
        if want.is_floating_point():
            assert_close(got[name], want, f"{where}: {name}")
        else:
            assert torch.equal(got[name], want), f"{where}: {name} is {got[name]}, expected {want}"


def assert_equal_models(
    model: nn.Module, fused: nn.Module, trials: Sequence[tuple[Any, dict[str, Any]]], *, random_in_train: bool = False,
    rtol: float = RTOL, rtol_outputs: float | None = None, gradients: Callable[[nn.Module], dict[str, Tensor | None]] | None = None,
) -> None:
    """Both give the same results on every trial (args, kwargs), in train and eval mode; eval alone where training draws random numbers."""
    gradients = gradients or packing.original_gradients
    for training in (False,) if random_in_train else (True, False):
        model.train(training)
        fused.train(training)
        for args, kwargs in trials:
            sizes = [tuple(leaf.shape) for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
            where = f"{'train' if training else 'eval'} on {sizes}"
            expected = run(model, args, kwargs, own_gradients)
            assert_same_results(run(fused, args, kwargs, gradients), expected, where, rtol, rtol_outputs)
            assert_same_buffers(fused, model, where)
    model.train()
    fused.train()


def assert_checkpoints_travel(model: nn.Module, fused: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """State dicts by the original's names go out and in exactly; ``unfuse`` gives the original class back."""
    assert_same_state(fxfuse.original_state_dict(fused), model.state_dict(), "original_state_dict")
    plain = fxfuse.unfuse(fused)
    assert type(plain) is type(model)
    assert_same_state(plain.state_dict(), model.state_dict(), "unfuse")
    for each in (model, fused, plain):
        each.eval()
    with torch.no_grad():
        for got, want in zip(*(tree_flatten(each(*as_args(args), **kwargs))[0] for each in (plain, model)), strict=True):
            assert not isinstance(want, Tensor) or torch.equal(got, want), "unfuse: another result"

    other = randomized(copy.deepcopy(model), seed=99)
    fxfuse.load_original_state_dict(fused, other.state_dict())
    assert_same_state(fxfuse.original_state_dict(fused), other.state_dict(), "load_original_state_dict")
    assert_equal_models(other, fused, [(args, kwargs)], random_in_train=True)
    fused.load_state_dict(model.state_dict())
    assert_same_state(fxfuse.original_state_dict(fused), model.state_dict(), "load_state_dict by the original's names")
    for each in (model, fused, plain):
        each.train()


def assert_fused_equals(
    model: nn.Module, x: Any, *, heavy: int | None = None, most_heavy: int | None = None, batches: Sequence[int] = (1, 4, 9),
    kwargs: dict[str, Any] | None = None,
    make: Callable[[int], Any] | None = None, specialised: bool = False, random_in_train: bool = False, rtol_outputs: float | None = None,
    refused: str = "", **options: Any,
) -> nn.Module:
    """Fuse the model on `x` and check all that this file's first lines promise; return what ``optimize`` returned.

    `x` is the example, a tensor or a tuple; rows are its tensors' first dim, and `batches` are the other row counts to try; `make(rows)`
    gives those inputs where rows are not all that simple. `heavy` is how many parameter-carrying launches one forward may
    make. `refused`: words of the one reason for which something stays out. `specialised`: the loop runs over a size, so that other
    sizes may take the original's way (never another number).
    """
    kwargs = kwargs or {}
    with untouched(model):
        options = {"objective": "launches", "strict": not specialised, **options}
        fused = fxfuse.optimize(model, x, example_kwargs=kwargs or None, **options)
    assert isinstance(fused, type(model))
    report = fxfuse.report(fused)
    assert report.fused, f"nothing fused:\n{report}"
    assert bool(report.refused) == bool(refused), f"refused:\n{report}"
    assert all(refused in str(r) for r in report.refused), f"refused:\n{report}"

    assert_same_state(fxfuse.original_state_dict(fused), model.state_dict(), "as fused")
    rows = next((leaf.shape[0] for leaf in tree_flatten(x)[0] if isinstance(leaf, Tensor)), 0)
    trials = [(x, kwargs), (make(rows) if make else fresh(x, None, seed=3), kwargs)]
    for batch in batches:
        trials.append((make(batch) if make else fresh(x, batch, seed=4 + batch), fresh(kwargs, batch, seed=5 + batch)))
    assert_equal_models(model, fused, trials, random_in_train=random_in_train, rtol_outputs=rtol_outputs)

    if not specialised:
        assert not fxfuse.report(fused).fallbacks, f"answered by the original's forward: {fxfuse.report(fused).fallbacks}"
    if heavy is not None or most_heavy is not None:
        assert_heavy(fused, x, heavy, most_heavy, **kwargs)
        args = as_args(x)
        before, after = (launches.count(lambda m=m: m(*args, **kwargs)) for m in (model.train(), fused.train()))
        assert after.total <= before.total, f"{after.total} launches in all, {before.total} before"
        # two lanes of one convolution may launch as many in all: the packing then saves parameter-carrying ones
        assert after.total < before.total or after.heavy < before.heavy, f"{after} launches as much as {before}"
    if rtol_outputs is None:
        fxfuse.load_original_state_dict(fused, model.state_dict())  # running statistics differ in their last bits by now
        assert_checkpoints_travel(model, fused, *trials[1])
    return fused


def assert_heavy(fused: nn.Module, x: Any, heavy: int | None, most_heavy: int | None = None, **kwargs: Any) -> None:
    """One forward makes `heavy` parameter-carrying launches, or `most_heavy` at most, in eval as in train mode."""
    for training in (False, True):
        fused.train(training)
        count = launches.count(lambda: fused(*as_args(x), **kwargs))
        said = f"{count.heavy} heavy launches, expected {heavy if heavy is not None else most_heavy}: {count.heavy_by_op}"
        assert heavy is None or count.heavy == heavy, said
        assert most_heavy is None or count.heavy <= most_heavy, said


@dataclass
class Case:
    """A model with its example, and how many launches its fused forward may make: of heavy ops, and of all kinds in eval mode."""

    model: type[nn.Module]
    x: Any
    heavy: int
    total: int
    options: dict[str, Any]


class Cases(dict[str, Case]):
    """A table of models, filled by its decorator ``case``; a test file runs each with ``assert_case``."""

    def case(self, x: Any = None, *, heavy: int, total: int, **options: Any) -> Callable[[type[nn.Module]], type[nn.Module]]:
        """Register a class that takes no arguments. ``x`` is its example (default: 5 rows of 4); options are ``assert_fused_equals``'s."""
        def register(cls: type[nn.Module]) -> type[nn.Module]:
            self[cls.__name__] = Case(cls, randn(5, 4) if x is None else x, heavy, total, options)
            return cls

        return register


def assert_case(case: Case) -> nn.Module:
    """The model fuses, is the original in everything (``assert_fused_equals``), and launches as little as the table says."""
    torch.manual_seed(0)
    model = randomized(case.model())
    fused = assert_fused_equals(model, case.x, most_heavy=case.heavy, **{**QUICK, "batches": (1, 9), **case.options})
    args, kwargs = as_args(case.x), case.options.get("kwargs") or {}
    count = launches.count(lambda: fused.eval()(*args, **kwargs))
    assert count.total <= case.total, f"{count.total} launches, expected at most {case.total}: {count.total_by_op}"
    return fused


def assert_trained_alike(fused: nn.Module, plain: nn.Module, rtol: float = 1e-9) -> None:
    """After the same training both have the same weights and buffers, by the original's names in its order; no call fell back."""
    state, expected = packing.original_state_dict(fused), plain.state_dict()
    assert [*state] == [*expected]
    for name, value in expected.items():
        assert_close(state[name], value, name, rtol, floor=1e-10)
    assert not fxfuse.report(fused).fallbacks
