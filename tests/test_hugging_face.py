"""transformers: ``save_pretrained``, ``from_pretrained`` and the Trainer with fused models and submodules.

Marked ``zoo``: ``make zoo-test`` installs transformers and runs these; elsewhere they are skipped.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from checks import QUICK, assert_close, assert_trained_alike, randomized

with warnings.catch_warnings():  # of packages that are not ours
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from transformers.modeling_outputs import ModelOutput

pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings("ignore")]
STEPS, ROWS = 6, 8


class Config(transformers.PretrainedConfig):
    model_type = "columns"

    def __init__(self, columns: int = 5, hidden: int = 6, **others: Any) -> None:
        self.columns, self.hidden = columns, hidden
        super().__init__(**others)


@dataclass
class Result(ModelOutput):
    loss: Tensor | None = None
    logits: Tensor | None = None


class Networks(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.nets = nn.ModuleList(
            nn.Sequential(nn.Linear(1, config.hidden), nn.LayerNorm(config.hidden), nn.Tanh(), nn.Linear(config.hidden, 1))
            for _ in range(config.columns)
        )

    def forward(self, values: Tensor) -> Tensor:
        return torch.cat([net(values[:, i : i + 1]) for i, net in enumerate(self.nets)], 1)


class Scorer(transformers.PreTrainedModel):
    """The loop is in a submodule."""

    config_class = Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.body, self.head = Networks(config), nn.Linear(config.columns, 1)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0.0, 0.5)
            nn.init.zeros_(module.bias)

    def score(self, values: Tensor) -> Tensor:
        return self.head(self.body(values)).squeeze(1)

    def forward(self, values: Tensor, labels: Tensor | None = None, return_dict: bool | None = None) -> Result:
        logits = self.score(values)
        return Result(None if labels is None else (logits - labels).square().mean(), logits)


class Flat(Scorer):
    """The loop is in the model's own forward."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.nets = self.body.nets
        del self.body

    def score(self, values: Tensor) -> Tensor:
        return self.head(Networks.forward(self, values)).squeeze(1)  # type: ignore[arg-type]


class Rows(torch.utils.data.Dataset):
    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.x = torch.randn(32, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
        self.y = self.x.sin().sum(1)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: Any) -> dict[str, Tensor]:
        return {"values": self.x[index], "labels": self.y[index]}


def trainer(model: Any, folder: Path, **keywords: Any) -> Any:
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=STEPS, per_device_train_batch_size=ROWS, learning_rate=0.02, weight_decay=0.3, max_grad_norm=0.7,
        report_to=[], use_cpu=True, save_strategy="steps", save_steps=STEPS // 2, logging_steps=100, disable_tqdm=True, seed=3,
        **keywords.pop("arguments", {}),
    )  # fmt: skip
    return transformers.Trainer(model, arguments, train_dataset=Rows(model.head.weight.dtype), **keywords)


def made(kind: Any, seed: int = 0) -> Any:
    return randomized(kind(Config()), seed)


def fused(model: Any, **options: Any) -> Any:
    result = fxfuse.optimize(model, example_kwargs=Rows(model.head.weight.dtype)[:ROWS], objective="launches", **QUICK, **options)
    assert fxfuse.report(result).fused
    return result


def submodule(model: Any) -> Any:
    model.body = fxfuse.optimize(model.body, Rows(model.head.weight.dtype)[:ROWS]["values"], objective="launches", **QUICK)
    return model


WAYS = {"the whole": fused, "in place": lambda model: fused(model, inplace=True), "a submodule": submodule}


@pytest.mark.parametrize(("kind", "way"), [(Flat, "the whole"), (Flat, "in place"), *((Scorer, way) for way in WAYS)])
def test_the_trainer_trains_as_without_fusing(way: str, kind: Any, tmp_path: Path) -> None:
    """Weight decay too, which the Trainer keeps from what lies in a LayerNorm, whatever its name."""
    plain, model = made(kind), WAYS[way](made(kind))
    trainers = [trainer(each, tmp_path / name) for each, name in ((plain, "plain"), (model, "fused"))]
    for each in trainers:
        each.train()
    assert_trained_alike(model, plain)
    assert len([p for g in trainers[1].optimizer.param_groups for p in g["params"]]) == len([*model.parameters()])
    numbers = [[sum(p.numel() for p in g["params"]) for g in each.optimizer.param_groups] for each in trainers]
    assert numbers[0] == numbers[1]


@pytest.mark.parametrize("format", ["packed", "original"])
def test_the_trainer_resumes(format: Any, tmp_path: Path) -> None:
    plain, half, again = made(Flat), fused(made(Flat)), fused(made(Flat, 7))
    trainer(plain, tmp_path / "plain").train()
    fxfuse.checkpoint_format(half, format)
    trainer(half, tmp_path / "half").train()
    trainer(again, tmp_path / "again").train(resume_from_checkpoint=str(tmp_path / "half" / f"checkpoint-{STEPS // 2}"))
    for each in (half, again):
        assert_trained_alike(each, plain)


def test_an_optimizer_made_before_goes_along(tmp_path: Path) -> None:
    plain, model = made(Scorer), made(Scorer)
    optimizers = [torch.optim.AdamW(each.parameters(), 0.02, weight_decay=0.1) for each in (plain, model)]
    model = fused(model, optimizer=optimizers[1])
    for each, optimizer in zip((plain, model), optimizers):
        trainer(each, tmp_path / "run", optimizers=(optimizer, None)).train()
    assert_trained_alike(model, plain)


@pytest.mark.parametrize("kind", [Flat, Scorer])
def test_save_pretrained_and_from_pretrained(kind: Any, tmp_path: Path) -> None:
    plain, model = made(kind), fused(made(kind))
    with fxfuse.checkpoint_format(model, "original"):
        model.save_pretrained(tmp_path)
    expected = fxfuse.original_state_dict(model)
    loaded = kind.from_pretrained(tmp_path)
    assert type(loaded) is kind
    assert loaded.config.columns == plain.config.columns
    again = fused(type(model).from_pretrained(tmp_path))
    for each in (loaded.state_dict(), fxfuse.original_state_dict(again)):
        assert [*each] == [*expected]
        assert all(torch.equal(each[name], value) for name, value in expected.items())
    batch = Rows()[:ROWS]
    assert_close(model(**batch).logits, loaded(**batch).logits, "logits after saving")
    assert not fxfuse.report(model).fallbacks


@pytest.mark.parametrize(("kind", "way"), [(Flat, fused), (Scorer, submodule)])
def test_the_trainer_s_autocast_goes_through_the_programs(kind: Any, way: Any, tmp_path: Path) -> None:
    """It wraps the forward of the model that it trains; below, and there too, packed programs run."""
    plain, model = made(kind).float(), way(made(kind).float())
    for each in (plain, model):
        trainer(each, tmp_path / "bf16", arguments={"bf16": True}).train()
    assert not fxfuse.report(model).fallbacks, fxfuse.report(model).fallbacks
    state = fxfuse.original_state_dict(model)
    for name, value in plain.state_dict().items():
        assert torch.allclose(state[name], value, atol=0.02), name
    back = fxfuse.unfuse(model)
    assert_close(back(**Rows(torch.float32)[:ROWS]).logits, model(**Rows(torch.float32)[:ROWS]).logits, "taken apart, still wrapped", 0.02)
