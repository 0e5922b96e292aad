"""The subjects: what they are, whether their package is installed, and how to build one.

Comes in: the files of ``zoo/subjects``. Goes out: ``Subject``. Parameters and running statistics are drawn anew, so that no two lanes are
alike whatever the package initialises them to, and everything is float64, where a wrong rewrite cannot hide in rounding.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from zoo import subjects as files

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Subject:
    """One model of somebody's package."""

    name: str

    @cached_property
    def file(self) -> ModuleType:
        """The file that builds it; imports nothing of the package."""
        return importlib.import_module(f"zoo.subjects.{self.name}")

    @property
    def says(self) -> str:
        """Where the loop is, in one line."""
        return (self.file.__doc__ or "").strip().splitlines()[0]

    @property
    def package(self) -> str:
        """What pip installs: ``deepctr-torch==0.3.0``."""
        return str(self.file.PACKAGE)

    @property
    def missing(self) -> str:
        """Why it cannot be built here, and the command that mends it; empty where it can be."""
        name = self.package.partition("==")[0]
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return f"{self.name} needs {name}, which is not installed: make .venv-zoo/.installed (or pip install --no-deps {self.package})"
        return ""

    def model(self, *, dropout: bool = True, double: bool = True) -> nn.Module:
        """The model in train mode; without dropout, two runs of it can be compared in train mode too."""
        torch.manual_seed(0)
        model = randomized(self.file.model())
        if not dropout:
            silence(model)
        return as_double(model) if double else model

    def inputs(self, rows: int | None = None, *, seed: int = 0, double: bool = True) -> Inputs:
        """Arguments of one call; ``rows`` None gives the example's own batch size."""
        torch.manual_seed(seed + 1)
        found: Inputs = self.file.inputs(self.file.ROWS if rows is None else rows)
        return tree_map(_double, found) if double else found

    def build(self) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        """The model and an example call, in the package's own dtype."""
        return self.model(double=False), *self.inputs(double=False)


def subjects() -> list[Subject]:
    """All of them, installed or not, by name."""
    return [Subject(entry.name) for entry in pkgutil.iter_modules(files.__path__)]


def randomized(model: nn.Module) -> nn.Module:
    """Every parameter moved by its own noise, every BatchNorm's running statistics drawn anew: no two lanes alike."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() or parameter.is_complex():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        for module in model.modules():
            if isinstance(getattr(module, "running_mean", None), torch.Tensor):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
    return model


def silence(model: nn.Module) -> None:
    """Dropout off, in train mode too."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        elif isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
            module.dropout = 0.0


def as_double(model: nn.Module) -> nn.Module:
    """``model.double()``, which leaves complex parameters behind, and plain tensors held as attributes."""
    model = model.double()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_complex():
                module._parameters[name] = nn.Parameter(parameter.detach().to(torch.complex128), requires_grad=parameter.requires_grad)
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                setattr(module, name, _double(value))
    return model


def _double(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf
