"""``--weights``: a checkpoint into a model, whole or in parts, by whoever holds the tensors, tied or without memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("click")
pytest.importorskip("safetensors")

from safetensors.torch import save_file

from fxfuse.cli import weights
from fxfuse.cli.failure import CommandError
from fxfuse.cli.meta import without_memory as without_values
from fxfuse.cli.weights import load_weights


class Nets(nn.Module):
    """Weights that are also held where no state dict sees them, tied ones, buffers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)) for _ in range(3))
        self.decoder = nn.Linear(3, 4, bias=False)
        self.decoder.weight = self.nets[0][0].weight
        self.held = [net[2].weight for net in self.nets]
        self.register_buffer("scale", torch.tensor(3.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([net(x) @ w.T for net, w in zip(self.nets, self.held, strict=False)], 1) * self.scale + self.decoder(x).sum()


def checkpoint(folder: Path, ending: str) -> tuple[Path, dict[str, Tensor]]:
    torch.manual_seed(1)
    state = {name: torch.rand_like(value) + 0.5 if value.is_floating_point() else value + 7 for name, value in Nets().state_dict().items()}
    state["decoder.weight"] = state["nets.0.0.weight"].clone()
    path = folder / f"w.{ending}"
    if ending == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=ending == "pt")
    return path, state


@pytest.mark.parametrize("ending", ["safetensors", "pt", "old"])
@pytest.mark.parametrize("part", [1, 1 << 26])
def test_everyone_who_holds_a_weight_sees_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, part: int) -> None:
    monkeypatch.setattr(weights, "PART", part)
    path, state = checkpoint(tmp_path, ending)
    model = Nets()
    before = dict(model.named_parameters())
    load_weights(model, str(path), False)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(value is before[name] for name, value in model.named_parameters())
    assert all(torch.equal(held, net[2].weight) for held, net in zip(model.held, model.nets, strict=True))
    assert model.scale == 3.0


@pytest.mark.parametrize("part", [1, 1 << 26])
def test_weights_without_memory_are_replaced_and_stay_tied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int) -> None:
    monkeypatch.setattr(weights, "PART", part)
    path, state = checkpoint(tmp_path, "safetensors")
    with torch.device("meta"):
        model = Nets().to(torch.float64)
    model.nets[1] = Nets().nets[1]  # one that has memory
    own = model.nets[1][0].weight
    load_weights(model, str(path), False)
    assert model.nets[1][0].weight is own
    assert torch.equal(own, state["nets.1.0.weight"])
    assert model.decoder.weight is model.nets[0][0].weight
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name].to(value.dtype)), name
    assert model.nets[0][0].weight.dtype is torch.float64
    assert isinstance(model.nets[2][0].weight, nn.Parameter)


def test_nothing_of_the_file_is_held(tmp_path: Path) -> None:
    path, state = checkpoint(tmp_path, "safetensors")
    with torch.device("meta"):
        model = Nets()
    load_weights(model, str(path), False)
    save_file({name: torch.zeros_like(value) for name, value in state.items()}, path)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_what_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    path, state = checkpoint(tmp_path, "pt")
    del state["nets.1.0.weight"]
    state["nets.2.0.weight"] = torch.zeros(1, 2)
    torch.save(state, path)
    model = Nets()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CommandError, match=r"it lacks nets\.1\.0\.weight; nets\.2\.0\.weight is \[1, 2\], the model has \[4, 3\]"):
        load_weights(model, str(path), False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Versioned(nn.Linear):
    """Its weights had the other sign in checkpoints of its first version."""

    _version = 2

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any) -> None:
        if (local_metadata or {}).get("version", 1) < 2:
            state_dict[prefix + "weight"] = -state_dict[prefix + "weight"]
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


class Hooked(nn.Module):
    """Sums up its weights when they are loaded, once, and looks at its children's before."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
        self.register_buffer("total", torch.zeros(()), persistent=False)
        self.register_load_state_dict_pre_hook(lambda module, state, prefix, *rest: state[f"{prefix}nets.2.bias"])
        self.register_load_state_dict_post_hook(lambda module, keys: module.add_up())

    def add_up(self) -> None:
        self.total += sum(net.weight.detach().sum() for net in self.nets)


class Unequal(nn.Module):
    """Tied weights that the file holds with other values: the last name counts."""

    def __init__(self) -> None:
        super().__init__()
        self.z = nn.Linear(2, 2, bias=False)
        self.a = nn.Linear(2, 2, bias=False)
        self.a.weight = self.z.weight


@pytest.mark.parametrize("made", [lambda: nn.Sequential(Versioned(3, 3), Versioned(3, 3)), Hooked, Unequal])
@pytest.mark.parametrize("part", [1, 1 << 26])
def test_loads_as_torch_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Callable[[], nn.Module], part: int) -> None:
    monkeypatch.setattr(weights, "PART", part)
    state = made().state_dict()
    for number, name in enumerate(state):
        state[name] = torch.full_like(state[name], 1.0 + number)
    torch.save(state, tmp_path / "w.pt")
    model, other = made(), made()
    load_weights(model, str(tmp_path / "w.pt"), False)
    other.load_state_dict(torch.load(tmp_path / "w.pt", weights_only=True))
    for (name, value), (_, wanted) in zip([*model.named_parameters(), *model.named_buffers()],
                                          [*other.named_parameters(), *other.named_buffers()], strict=True):  # fmt: skip
        assert torch.equal(value, wanted), name


def test_who_holds_weights_without_memory_sees_them_too(tmp_path: Path) -> None:
    path, state = checkpoint(tmp_path, "safetensors")
    with torch.device("meta"):
        model = Nets()
    load_weights(model, str(path), False)
    assert all(torch.equal(held, state[f"nets.{i}.2.weight"]) for i, held in enumerate(model.held))


class Extra(nn.Linear):
    """Keeps what is no tensor."""

    scale = 1.0

    def get_extra_state(self) -> Any:
        return {"scale": self.scale, "names": ["a", "b"]}

    def set_extra_state(self, state: Any) -> None:
        self.scale = state["scale"]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class Renaming(nn.Module):
    """Takes the names of its first version too."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
        self.register_load_state_dict_pre_hook(self.rename)

    @staticmethod
    def rename(module: nn.Module, state: Any, prefix: str, *rest: Any) -> None:
        for name in list(state):
            if ".old_" in name:
                state[name.replace("old_", "")] = state.pop(name)


def extra() -> nn.Module:
    return nn.Sequential(*(Extra(3, 3) for _ in range(3)))


def without_memory(made: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        with torch.device("meta"):
            return made()

    return make


@pytest.mark.parametrize("made", [extra, without_memory(extra)])
def test_extra_state_that_is_no_tensor(tmp_path: Path, made: Callable[[], nn.Module]) -> None:
    saved = extra()
    for number, layer in enumerate(saved):
        layer.scale = number + 2.0
    torch.save(saved.state_dict(), tmp_path / "w.pt")
    model = made()
    load_weights(model, str(tmp_path / "w.pt"), False)
    assert [layer.scale for layer in model] == [2.0, 3.0, 4.0]
    x = torch.randn(5, 3)
    assert torch.equal(model(x), saved(x))


@pytest.mark.parametrize("made", [Renaming, without_memory(Renaming), lambda: without_memory(Renaming)().double()])
def test_a_hook_that_renames(tmp_path: Path, made: Callable[[], nn.Module]) -> None:
    state = Renaming().state_dict()
    save_file({name.replace(".weight", ".old_weight"): value for name, value in state.items()}, tmp_path / "w.safetensors")
    model = made()
    dtype, held = next(model.parameters()).dtype, list(model.parameters())
    load_weights(model, str(tmp_path / "w.safetensors"), False)
    assert all(torch.equal(value, state[name].to(dtype)) for name, value in model.state_dict().items())
    assert all(a is b for a, b in zip(held, model.parameters(), strict=True))
    save_file({name.replace(".weight", ".gone"): value for name, value in state.items()}, tmp_path / "w.safetensors")
    with pytest.raises(CommandError, match=r"it lacks nets\.0\.weight, .*; it has nets\.0\.gone, .*, unknown to the model"):
        load_weights(made(), str(tmp_path / "w.safetensors"), False)


def test_what_a_hook_leaves_without_values(tmp_path: Path) -> None:
    """A model on the meta device whose hook calls a missing key no mistake."""
    with torch.device("meta"):
        model = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
    model.register_load_state_dict_post_hook(lambda module, keys: keys.missing_keys.clear())
    state = nn.ModuleList(nn.Linear(3, 3) for _ in range(2)).state_dict()
    del state["1.bias"]
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(CommandError, match=r"leaves 1\.bias without values"):
        load_weights(model, str(tmp_path / "w.pt"), False)


def test_weak_references_to_weights_without_memory(tmp_path: Path) -> None:
    path, state = checkpoint(tmp_path, "safetensors")
    with torch.device("meta"):
        model = Nets()
    references = [weakref.ref(model.decoder.weight), weakref.ref(model.nets[1][2].weight)]
    load_weights(model, str(path), False)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.decoder.weight is model.nets[0][0].weight
    del references


@pytest.mark.parametrize(
    ("rename", "hint"),
    [
        (lambda name: f"module.{name}", r"its names begin with module\. \(DataParallel .*: save model\.module\.state_dict\(\)"),
        (lambda name: f"_orig_mod.{name}", r"its names begin with _orig_mod\. \(torch\.compile"),
        (lambda name: name.replace("nets.", "nets._orig_mod.") if "nets" in name else f"_orig_mod.{name}", r"its names have _orig_mod\. "),
        (lambda name: f"module._orig_mod.{name}", r"its names begin with module\. and _orig_mod\. "),
        (lambda name: f"net.{name}", r"its names begin with net\.: save the state dict of the inner model"),
    ],
)
def test_prefixes_are_named_first(tmp_path: Path, rename: Callable[[str], str], hint: str) -> None:
    path, state = checkpoint(tmp_path, "pt")
    torch.save({rename(name): value for name, value in state.items()}, path)
    with pytest.raises(CommandError, match="does not fit the model: " + hint):
        load_weights(Nets(), str(path), False)


def test_the_model_s_names_have_a_prefix(tmp_path: Path) -> None:
    path, _ = checkpoint(tmp_path, "pt")
    with pytest.raises(CommandError, match=r"does not fit the model: the model's names begin with 0\., those of the file do not"):
        load_weights(nn.Sequential(Nets()), str(path), False)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bool, torch.float8_e4m3fn, torch.int8, torch.int64])
def test_numbers_of_another_kind(tmp_path: Path, dtype: torch.dtype) -> None:
    path, state = checkpoint(tmp_path, "pt")
    state["nets.1.2.weight"] = state["nets.1.2.weight"].to(dtype)
    torch.save(state, path)
    model = Nets()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(CommandError, match=rf"another kind than the model: nets\.1\.2\.weight is {kind}, the model has float32; "):
        load_weights(model, str(path), False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_numbers_that_the_model_s_dtype_holds(tmp_path: Path) -> None:
    """Floating numbers of any width, and in buffers what is exact."""
    path, state = checkpoint(tmp_path, "pt")
    state["nets.1.2.weight"] = state["nets.1.2.weight"].half()
    state["nets.0.2.weight"] = state["nets.0.2.weight"].double()
    state["nets.0.1.num_batches_tracked"] = torch.tensor(4.0)
    state["nets.0.1.running_mean"] = torch.arange(4)
    torch.save(state, path)
    model = Nets()
    load_weights(model, str(path), False)
    assert all(torch.equal(value, state[name].to(value.dtype)) for name, value in model.state_dict().items())
    state["nets.0.1.num_batches_tracked"] = torch.tensor(4.5)
    torch.save(state, path)
    with pytest.raises(CommandError, match=r"nets\.0\.1\.num_batches_tracked is float32, the model has int64"):
        load_weights(Nets(), str(path), False)


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("mask", torch.ones(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.mask


def test_buffers_without_values_are_named(tmp_path: Path) -> None:
    torch.save(Masked().state_dict(), tmp_path / "w.pt")
    model = without_memory(Masked)()
    load_weights(model, str(tmp_path / "w.pt"), False)
    assert without_values(model) == "the buffer mask on the meta device, which no checkpoint holds (persistent=False): make it on the CPU"
    model = Masked()
    model.layer = nn.Linear(3, 3, device="meta")
    assert without_values(model) == "layer.weight, layer.bias on the meta device, without values: make it on the CPU, or give its --weights"
    assert without_values(Masked()) == ""
