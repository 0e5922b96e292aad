"""What happens to a fused model after fusing: every way to change its weights, between calls with and without grad.

After each change the model must say what its original says with the weights that ``original_state_dict`` reports, and change as the
original changes.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from norm_models import PerColumn
from torch import Tensor, nn

import fxfuse
from checks import QUICK, randn, randomized, relative_error
from fxfuse import launches
from fxfuse.planning.memory import peak_bytes
from fxfuse.private.pytree import tree_leaves


class Columns(nn.Module):
    """A network per pair of columns. The first layers are square, so that a transposed weight fits."""

    def __init__(self, lanes: int = 5) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 3)) for _ in range(lanes))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([net(x[:, 2 * i : 2 * i + 2]) for i, net in enumerate(self.nets)], 1)

    def predict(self, x: Tensor) -> Tensor:
        return torch.stack([net(x[:, 2 * i : 2 * i + 2]).relu() for i, net in enumerate(self.nets)], 1).sum(1)


class Wide(Columns):
    """Most of its memory is inside of the lanes: chunks help."""

    def __init__(self) -> None:
        super().__init__(0)
        for _ in range(12):
            self.nets.append(nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1)))


class Tables(nn.Module):
    """Embedding tables of unequal numbers of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(rows, 4) for rows in (3, 7, 5))
        self.top = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.top(torch.cat([table(x[:, i]) for i, table in enumerate(self.tables)], 1))


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(3, 3, 3) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([conv(x[:, 3 * i : 3 * i + 3]) for i, conv in enumerate(self.convs)], 1)


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3, dtype=torch.complex128) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x[:, i]) for i, layer in enumerate(self.layers)], 1)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.LSTM(3, 4, batch_first=True) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x)[0] for layer in self.layers], 1)


def complex_numbers(*shape: int) -> Tensor:
    return torch.complex(randn(*shape), randn(*shape, seed=2))


def complex_model() -> nn.Module:
    model = Complex()
    for seed, parameter in enumerate(model.parameters()):
        parameter.data = torch.complex(randn(*parameter.shape, seed=seed), randn(*parameter.shape, seed=seed + 100))
    return model


ROWS = torch.tensor([[0, 6, 4], [2, 0, 4], [1, 3, 0], [2, 1, 2]])
MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "columns": (lambda: randomized(Columns()), randn(6, 10)),
    "batch norm": (lambda: randomized(PerColumn(4, nn.BatchNorm1d)), randn(6, 4)),
    "tables": (lambda: randomized(Tables()), ROWS),
    "convolutions": (lambda: randomized(Convolutions()), randn(5, 12, 9)),
    "complex": (complex_model, complex_numbers(5, 4, 3)),
    "recurrent": (lambda: randomized(Recurrent()), randn(2, 5, 3)),
}


def scaled(saved: dict[str, Tensor]) -> dict[str, Tensor]:
    """A plain dict, as safetensors gives it: no versions of modules."""
    return {name: value * 1.5 if value.is_floating_point() or value.is_complex() else value.clone() for name, value in saved.items()}


def optimizer_step(model: nn.Module, x: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).abs().pow(2).mean().backward()
        optimizer.step()


def each_data(change: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, Tensor], None]:
    def changed(model: nn.Module, x: Tensor) -> None:
        for parameter in model.parameters():
            parameter.data = change(parameter.data)

    return changed


def swapped(model: nn.Module, x: Tensor) -> None:
    for module in list(model.modules()):
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                setattr(module, name, nn.Parameter(parameter.detach() * 2))


def lane_by_lane(write: bool) -> Callable[[nn.Module, Tensor], None]:
    def changed(model: nn.Module, x: Tensor) -> None:
        for module in list(model.modules()):
            if isinstance(module, nn.Linear | nn.Conv1d | nn.Embedding | nn.BatchNorm1d):
                if write:
                    with torch.no_grad():
                        module.weight.mul_(1.5)
                else:
                    module.weight = nn.Parameter(module.weight.detach() * 1.5)

    return changed


def loaded(saved: Callable[[nn.Module], Any], assign: bool) -> Callable[[nn.Module, Tensor], None]:
    def changed(model: nn.Module, x: Tensor) -> None:
        model.load_state_dict(scaled(saved(model)), assign=assign)

    return changed


def evaluated(model: nn.Module, x: Tensor) -> None:
    model.eval()


def loaded_in_inference_mode(model: nn.Module, x: Tensor) -> None:
    with torch.inference_mode():
        model.load_state_dict(scaled(fxfuse.original_state_dict(model)))


def to_and_fro(model: nn.Module, x: Tensor) -> None:
    if not x.is_complex():
        model.half().double()


# Those whose effect is the same on the original; the others say something of the tensors as they are registered.
ALIKE: dict[str, Callable[[nn.Module, Tensor], None]] = {
    "optimizer": optimizer_step,
    "load": loaded(fxfuse.original_state_dict, assign=False),
    "load assign": loaded(fxfuse.original_state_dict, assign=True),
    "data": each_data(lambda data: data * 1.25),
    "data in place": each_data(lambda data: data.mul_(0.5)),
    "conjugated": each_data(torch.conj),
    "write a lane": lane_by_lane(True),
    "assign a lane": lane_by_lane(False),
    "half and back": to_and_fro,
    "load in inference mode": loaded_in_inference_mode,
    "eval": evaluated,
}
REGISTERED: dict[str, Callable[[nn.Module, Tensor], None]] = {
    "load own": loaded(nn.Module.state_dict, assign=False),
    "load own assign": loaded(nn.Module.state_dict, assign=True),
    "swapped": swapped,
    "transposed": each_data(lambda data: data.mT if data.dim() > 1 and data.shape[-1] == data.shape[-2] else data),
    "expanded": each_data(lambda data: data[:1].expand_as(data) if data.dim() else data),
}
MODES = (torch.no_grad, torch.enable_grad, torch.inference_mode, torch.no_grad)


def assert_same_numbers(actual: Tensor, expected: Tensor, what: str) -> None:
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype), what
    assert relative_error(actual, expected) <= 1e-10, f"{what}: {relative_error(actual, expected)}"


def assert_says_its_weights(model: nn.Module, fused: nn.Module, x: Tensor, what: str, methods: tuple[str, ...] = ("forward",)) -> None:
    for mode in MODES:
        expected = copy.deepcopy(model).train(fused.training)
        expected.load_state_dict(fxfuse.original_state_dict(fused))
        for method in methods:
            with mode():
                assert_same_numbers(getattr(fused, method)(x), getattr(expected, method)(x), f"{what}, {mode.__name__}, {method}")
        assert_equal_states(fused, expected, what)


def assert_equal_states(fused: nn.Module, expected: nn.Module, what: str) -> None:
    saved = fxfuse.original_state_dict(fused)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(saved[name], value, rtol=1e-9, atol=1e-9, msg=f"{what}: {name}")


_fused: dict[str, tuple[nn.Module, nn.Module]] = {}


def fused_of(name: str, packing: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """The original, a fused model that answered calls without grad, and inputs."""
    make, x = MODELS[name]
    if packing == "alias":
        model = make()
        fused = fxfuse.optimize(copy.deepcopy(model), tune=False)
        with torch.no_grad():
            fused(x)
            model(x)
        assert fxfuse.report(fused).fused
    else:
        if name not in _fused:
            model = make()
            _fused[name] = model, fxfuse.optimize(model, x, objective="launches", **QUICK)
            assert fxfuse.report(_fused[name][1]).fused
        model, fused = copy.deepcopy(_fused[name])
    with torch.no_grad():
        fused(x)
        model(x)
    return model, fused, x


@pytest.mark.parametrize("change", [*ALIKE, *REGISTERED])
@pytest.mark.parametrize("name", MODELS)
def test_a_change_of_the_weights_is_seen(name: str, change: str) -> None:
    model, fused, x = fused_of(name, "packed")
    plain = copy.deepcopy(model)
    apply = ALIKE.get(change) or REGISTERED[change]
    apply(fused, x)
    if change in ALIKE:
        apply(plain, x)
        assert_equal_states(fused, plain, change)
    assert_says_its_weights(model, fused, x, change)


@pytest.mark.parametrize(
    "change", ["optimizer", "load assign", "data", "conjugated", "assign a lane", "half and back", "transposed", "expanded"]
)
@pytest.mark.parametrize("name", ["columns", "complex"])
def test_a_change_of_shared_parameters_is_seen(name: str, change: str) -> None:
    model, fused, x = fused_of(name, "alias")
    plain = copy.deepcopy(model)
    for each in (fused, plain):
        (ALIKE.get(change) or REGISTERED[change])(each, x)
    assert_equal_states(fused, plain, change)
    assert_says_its_weights(model, fused, x, change)


@pytest.mark.parametrize("name", ["columns", "batch norm", "tables"])
def test_copies_change_alone(name: str) -> None:
    model, fused, x = fused_of(name, "packed")
    copied = copy.deepcopy(fused)
    optimizer_step(copied, x)
    assert_equal_states(fused, model, "the first one")
    assert_says_its_weights(model, copied, x, "the copy")
    assert_says_its_weights(model, fused, x, "the first one")
    plain = fxfuse.unfuse(copied)
    assert_equal_states(copied, plain, "unfused")


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("naming", ["original", "packed"])
def test_batch_norm_loads_strictly(naming: str, assign: bool) -> None:
    model, fused, _ = fused_of("batch norm", "packed")
    saved = scaled((model if naming == "original" else fused).state_dict())
    last = [name for name in saved if "running_var" in name][-1]
    for wrong, words in (
        ({name: value for name, value in saved.items() if name != last}, last),
        ({**saved, "nets.0.1.extra": torch.zeros(1)}, "nets.0.1.extra"),
        ({**saved, last: torch.zeros(99)}, last),
    ):
        with pytest.raises(RuntimeError, match=words):
            copy.deepcopy(fused).load_state_dict(wrong, assign=assign)
    result = fused.load_state_dict(saved, assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    model.load_state_dict(scaled(model.state_dict()))
    assert_equal_states(fused, model, naming)


@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_from_before_the_counter_loads(assign: bool) -> None:
    model, fused, _ = fused_of("batch norm", "packed")
    old = {name: value for name, value in scaled(model.state_dict()).items() if "num_batches" not in name}
    for each in (fused, model):
        result = each.load_state_dict(old, assign=assign)
        assert not result.missing_keys
        assert not result.unexpected_keys
    assert_equal_states(fused, model, "old")


def test_methods_and_signatures_see_changes() -> None:
    model, x = randomized(Columns()), randn(6, 10)
    fused = fxfuse.optimize(model, x, methods=["predict"], objective="launches", **QUICK)
    assert [launches.count(lambda call=call: call(x)).heavy for call in (fused, fused.predict)] == [2, 2]  # type: ignore[misc]
    for change in ("load assign", "data", "optimizer", "eval", "half and back", "assign a lane", "transposed"):
        (ALIKE.get(change) or REGISTERED[change])(fused, x)
        assert_says_its_weights(model, fused, x, change, ("forward", "predict"))
    assert not fxfuse.report(fused).fallbacks
    assert_says_its_weights(model, fused, x[:1], "another batch", ("forward", "predict"))


def test_chunks_see_changes() -> None:
    model, x = randomized(Wide()), randn(64, 24)
    whole = fxfuse.optimize(model, x, mode="infer", objective="launches", **QUICK)

    def run() -> None:
        with torch.no_grad():
            whole(x)

    run()
    fused = fxfuse.optimize(model, x, mode="infer", objective="launches", max_memory=int(0.75 * peak_bytes(run)), **QUICK)
    assert any(op.lowering.endswith("chunks") for plan in fxfuse.report(fused).fused for op in plan.ops)
    for change in ("load assign", "data", "optimizer", "eval", "half and back", "transposed", "expanded"):
        (ALIKE.get(change) or REGISTERED[change])(fused, x)
        assert_says_its_weights(model, fused, x, change)


def test_shared_parameters_that_no_longer_fit_do_not_raise_before_the_call() -> None:
    _, fused, x = fused_of("columns", "alias")
    odd: Any = fused.nets[0]  # type: ignore[index]
    odd.float()
    fused.eval()
    fused.train()
    with pytest.raises(RuntimeError, match="dtype"), torch.no_grad():  # the original's own error, in its own place
        fused(x)
    odd.double()
    with torch.no_grad():
        fused(x)


class ReturnsWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(4))

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        weights = [layer.weight for layer in self.layers]
        return torch.stack([layer(x) for layer in self.layers]), torch.stack(weights), [weight.t() for weight in weights]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_a_caller_does_to_returned_weights(mode: Any) -> None:
    model, x = randomized(ReturnsWeights()), randn(5, 3)
    fused = fxfuse.optimize(model, x, objective="launches", **QUICK)
    with mode():
        for _ in range(3):
            for each in (model, fused):
                _, stacked, views = each(x)
                stacked.mul_(2).unsqueeze_(0)
                views[0].mul_(0.5)
                views[1].t_()
            for actual, expected in zip(tree_leaves(fused(x)), tree_leaves(model(x)), strict=True):
                assert_same_numbers(actual, expected, "outputs")
    assert_equal_states(fused, model, "weights")


def test_transforms_of_torch_func() -> None:
    model, fused, x = fused_of("columns", "packed")
    inputs = randn(3, 6, 10)
    weights = {name: torch.stack([value.detach() * (i + 1) for i in range(3)]) for name, value in fused.named_parameters()}
    for mode in MODES:
        with mode():
            assert_same_numbers(torch.vmap(fused)(inputs), torch.stack([model(each) for each in inputs]), "vmap")
            many = torch.vmap(lambda given: torch.func.functional_call(fused, given, (x,)))(weights)
            assert_same_numbers(fused(x), model(x), "after vmap")
        for i in range(3):
            other = copy.deepcopy(model)
            each_data(lambda data, i=i: data * (i + 1))(other, x)  # type: ignore[misc]
            assert_same_numbers(many[i], other(x), "functional_call")


@pytest.mark.parametrize("name", ["columns", "tables", "batch norm"])
def test_compiled_models_see_changes(name: str) -> None:
    torch._dynamo.reset()
    model, fused, x = fused_of(name, "packed")
    compiled = torch.compile(fused, fullgraph=True, backend="eager")
    for change in ("eval", "data in place", "data", "load assign"):
        for each in (fused, model):
            ALIKE[change](each, x)
        for mode in (torch.no_grad, torch.enable_grad):
            with mode():
                assert_same_numbers(compiled(x), model(x), change)
                assert_same_numbers(fused(x), model(x), change)
    torch._dynamo.reset()


def test_threads() -> None:
    model, fused, x = fused_of("columns", "packed")
    expected = model.eval()(x).detach()
    fused.eval()
    wrong: list[str] = []

    def call() -> None:
        for _ in range(100):
            try:
                with torch.no_grad():
                    assert_same_numbers(fused(x), expected, "thread")
            except Exception as error:
                wrong.append(str(error))

    def prepare() -> None:
        for _ in range(100):
            fused.eval()

    threads = [threading.Thread(target=call) for _ in range(3)] + [threading.Thread(target=prepare)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
