"""``--weights``: a checkpoint into a model, whole or in parts, by whoever holds the tensors, tied or without memory."""

from __future__ import annotations

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
