"""Import only the file that holds a model, where its package's ``__init__`` pulls in much more than the model needs.

What is stood in for has no CPU build here (torchvision, torchaudio) or is not used by the model; nothing of the model is replaced.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import io
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import torch

# deepxde looks for TensorFlow first, unless told.
os.environ.setdefault("DDE_BACKEND", "pytorch")


def bare(*names: str) -> None:
    """Register each package without running its ``__init__``: its submodules import as usual."""
    for name in names:
        if name in sys.modules:
            continue
        root, *rest = name.split(".")
        spec = importlib.util.find_spec(root) if root not in sys.modules else None
        path = Path(spec.origin).parent if spec else Path(next(iter(sys.modules[root].__path__)))
        module = types.ModuleType(name)
        module.__path__ = [str(path.joinpath(*rest))]
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        sys.modules[name] = module
        if rest:
            setattr(sys.modules[name.rpartition(".")[0]], rest[-1], module)


class _StandIn(types.ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (torch.nn.Module,), {"__module__": self.__name__})


class _StandIns:
    """Answers the import of a package, and of anything in it, with classes that do nothing."""

    def __init__(self, *roots: str) -> None:
        self.roots = roots

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] in self.roots else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__version__ = "0"


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """What a package prints when it is imported does not belong into a table."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def without(*roots: str) -> Iterator[None]:
    """Imports of these packages succeed inside, where they are not installed. Afterwards they are absent again, as other packages ask."""
    absent = [root for root in roots if root not in sys.modules and importlib.util.find_spec(root) is None]
    finder = _StandIns(*absent)
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] in absent]:
            del sys.modules[name]
