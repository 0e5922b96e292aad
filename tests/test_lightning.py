"""Lightning's Trainer trains fused modules as it trains the original: checkpoints, schedules, fusing within a run.

Marked ``zoo``: ``make zoo-test`` installs Lightning and runs these; elsewhere they are skipped.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxfuse
from checks import QUICK, assert_close, assert_trained_alike, randomized

with warnings.catch_warnings():  # of packages that are not ours
    warnings.simplefilter("ignore")
    lightning = pytest.importorskip("lightning.pytorch")

pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings("ignore")]
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
COLUMNS, EPOCHS = 5, 4


def networks() -> nn.ModuleList:
    return nn.ModuleList(
        nn.Sequential(nn.Linear(1, 6, bias=False), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1)) for _ in range(COLUMNS)
    )


def summed(nets: Any, x: Tensor) -> Tensor:
    return torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(nets)], 1).sum(1, keepdim=True)


class Additive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.nets, self.bias = networks(), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return summed(self.nets, x) + self.bias


class Training(lightning.LightningModule):
    """What both modules below share: losses, and weight decay for matrices only, on a schedule."""

    def training_step(self, batch: Any, number: int) -> Tensor:
        x, y = batch
        loss = (self(x) - y).square().mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, number: int) -> None:
        x, y = batch
        self.log("error", (self(x) - y).square().mean())

    def configure_optimizers(self) -> Any:
        named = [*self.named_parameters()]
        groups = [
            {"params": [p for n, p in named if n.endswith("weight") and p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for n, p in named if not n.endswith("weight") or p.ndim == 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=0.02)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)}


class Inside(Training):
    """The loop is in a submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Additive()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Itself(Training):
    """The loop is in the LightningModule's own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = networks()

    def forward(self, x: Tensor) -> Tensor:
        return summed(self.nets, x)


def rows(seed: int = 0) -> DataLoader:
    x = torch.randn(24, COLUMNS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return DataLoader(TensorDataset(x, x.sin().sum(1, keepdim=True)), batch_size=6)


def fit(module: Any, folder: Path, epochs: int = EPOCHS, callbacks: Any = (), **keywords: Any) -> Any:
    trainer = lightning.Trainer(
        max_epochs=epochs, default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, gradient_clip_val=0.7, callbacks=[*callbacks],
    )  # fmt: skip
    trainer.fit(module, rows(), rows(1), **keywords)
    return trainer


def fused(module: nn.Module, **options: Any) -> Any:
    made = fxfuse.optimize(module, next(iter(rows()))[0], objective="launches", **QUICK, **options)
    assert fxfuse.report(made).fused
    return made


def made(kind: Any, seed: int = 0) -> Any:
    return randomized(kind(), seed)


WAYS = {
    "a submodule": lambda module: setattr(module, "net", fused(module.net)) or module,
    "the whole": fused,
    "in place": lambda module: fused(module, inplace=True),
    "training_step": lambda module: fxfuse.optimize(
        module, next(iter(rows()))[0], methods={"training_step": (next(iter(rows())), 0)}, objective="launches", **QUICK
    ),
}


@pytest.mark.parametrize("kind", [Inside, Itself])
@pytest.mark.parametrize("way", WAYS)
def test_fit_trains_as_without_fusing(way: str, kind: Any, tmp_path: Path) -> None:
    if way == "a submodule" and kind is Itself:
        return
    plain, module = made(kind), WAYS[way](made(kind))
    assert type(module).__name__ == kind.__name__
    assert len([*module.parameters()]) < len([*plain.parameters()])
    trainers = [fit(each, tmp_path) for each in (plain, module)]
    assert_trained_alike(module, plain)
    for name, value in trainers[0].callback_metrics.items():
        assert_close(trainers[1].callback_metrics[name].double(), value.double(), name, 1e-9)


@pytest.mark.parametrize("kind", [Inside, Itself])
@pytest.mark.parametrize("format", ["packed", "original"])
def test_checkpoints_resume(format: Any, kind: Any, tmp_path: Path) -> None:
    plain = made(kind)
    fit(plain, tmp_path)
    half = fused(made(kind))
    fxfuse.checkpoint_format(half, format)
    path = tmp_path / "half.ckpt"
    fit(half, tmp_path, EPOCHS // 2).save_checkpoint(path)
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert ([*saved] == [*plain.state_dict()]) == (format == "original")
    again = fused(made(kind, 7))
    fit(again, tmp_path, ckpt_path=path)
    assert_trained_alike(again, plain)
    if format == "original":  # who has no fxfuse loads it
        loaded = kind.load_from_checkpoint(path, map_location="cpu").state_dict()  # in float32, as it is made
        for name, value in fxfuse.original_state_dict(half).items():
            assert torch.equal(loaded[name], value.to(loaded[name].dtype)), name


class Original(Inside):
    """Writes the optimizer's state in the original's layout too."""

    def configure_optimizers(self) -> Any:
        made = super().configure_optimizers()
        fxfuse.checkpoint_format(self, "original", optimizer=made["optimizer"])
        return made


@pytest.mark.parametrize("first", [True, False])
def test_a_run_goes_on_where_fxfuse_is_not(first: bool, tmp_path: Path) -> None:
    """The first half fused and the second not, or the other way about: checkpoints of the original's layout, moments and all."""
    plain = made(Inside)
    fit(plain, tmp_path)
    halves = [made(Original if first else Inside), made(Inside if first else Original, 7)]
    halves[0 if first else 1].net = fused(halves[0 if first else 1].net)
    path = tmp_path / "half.ckpt"
    fit(halves[0], tmp_path, EPOCHS // 2).save_checkpoint(path)
    fit(halves[1], tmp_path, ckpt_path=path)
    assert_trained_alike(halves[1], plain)


class Fuse(lightning.Callback):
    """Fuses the network at the beginning of one epoch, and takes it apart at the beginning of a later one."""

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        before = module.net
        if trainer.current_epoch == 1:
            module.net = fused(before, optimizer=trainer.optimizers[0])
        if trainer.current_epoch == 3:
            assert not fxfuse.report(before).fallbacks
            module.net = fxfuse.unfuse(before)
            fxfuse.migrate_optimizer(trainer.optimizers[0], before, module.net)


def test_fused_and_taken_apart_within_a_run(tmp_path: Path) -> None:
    plain, module = made(Inside), made(Inside)
    fit(plain, tmp_path)
    fit(module, tmp_path, callbacks=[Fuse()])
    assert_trained_alike(module, plain)
    assert type(module.net.nets[0][0]) is nn.Linear


def test_lightning_s_own_average_of_a_fused_module(tmp_path: Path) -> None:
    plain, module = made(Inside), made(Inside)
    module.net = fused(module.net)
    for each in (plain, module):  # the average's weights are the module's at the end
        fit(each, tmp_path, callbacks=[lightning.callbacks.EMAWeightAveraging(decay=0.8)])
    assert_trained_alike(module, plain)


def test_an_optimizer_within_a_trainer_is_warned_of(tmp_path: Path) -> None:
    class Late(lightning.Callback):
        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            with pytest.warns(UserWarning, match="AdamW holds Parameters of the model"):
                fused(module.net)

    fit(made(Inside), tmp_path, 1, callbacks=[Late()])
