"""SOURCE on a command line: where a model comes from.

Comes in: ``package.module:factory`` (also ``file.py:factory``), the path of a file, or of a folder written by fxfuse. Goes out: the model.
Importing a module runs its code, as ``python`` would; files are read without running code that they hold.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from . import codes
from .failure import CommandError, said

_FILES = (".pt", ".pth", ".pt2", ".onnx", ".safetensors", ".py")
FORMS = "SOURCE is package.module:factory, a .pt2 file, or a folder written by fxfuse"


def load_source(text: str, args: str | None = None, *, seed: int = 0, allow_pickle: bool = False) -> Any:
    """The model that ``text`` names: an ``nn.Module``, or of a file without one a callable. ``args``: JSON for the factory.

    The random seed is set before a factory runs, so that one command line makes one set of weights. Raises ``CommandError``.

    >>> load_source("torch.nn:Linear", "[2, 3]")
    Linear(in_features=2, out_features=3, bias=True)
    """
    name, colon, attribute = text.rpartition(":")
    if not text.strip():  # Path("") is the current folder
        raise CommandError(f"SOURCE is empty: {FORMS}", codes.USAGE)
    if os.path.exists(text) or not colon or _is_drive(name):
        if args is not None:
            raise CommandError(f"--args is for a factory; {text} is a file: leave --args out", codes.USAGE)
        return _from_file(text, allow_pickle)
    if not name or not attribute:
        raise CommandError(f"{text!r} names no model: {FORMS}", codes.USAGE)
    positional, keywords = factory_arguments(args)
    with _staying_here():
        torch.manual_seed(seed)
        found = _attribute(_module(name), name, attribute)
        torch.manual_seed(seed)  # again: the import may have drawn numbers, but only the first time
        if callable(found) and not isinstance(found, nn.Module):
            return _called(found, text, positional, keywords)
    if not isinstance(found, nn.Module):
        raise CommandError(f"{text} is a {type(found).__name__}: it must be a torch.nn.Module, or a callable that returns one")
    if args is not None:
        raise CommandError(f"{text} is a model already, which takes no --args: leave them out", codes.USAGE)
    return found


@contextlib.contextmanager
def _staying_here() -> Iterator[None]:
    """The folder that paths on the command line are relative to, and torch's gradient mode, stay what they are: modules set both for what
    they do themselves."""
    here = os.getcwd()
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            yield
    finally:
        os.chdir(here)


def factory_arguments(text: str | None) -> tuple[list[Any], dict[str, Any]]:
    """Positional and keyword arguments of JSON: a list gives positional ones, an object keyword ones, any other value is the only one.

    >>> factory_arguments('[3, {"a": 1}]'), factory_arguments('{"width": 8}'), factory_arguments("12")
    (([3, {'a': 1}], {}), ([], {'width': 8}), ([12], {}))
    """
    if text is None:
        return [], {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        how = "write a list '[128, 32]' or an object '{\"hidden\": 32}'"
        raise CommandError(f"--args is no JSON ({error}): {how}", codes.USAGE) from None
    if isinstance(value, dict):
        return [], value
    return (value if isinstance(value, list) else [value]), {}


def _is_drive(name: str) -> bool:
    return os.name == "nt" and len(name) == 1


def _from_file(text: str, allow_pickle: bool) -> Any:
    path = Path(text)
    if not path.exists():
        module, dot, name = text.rpartition(".")
        hint = f"; for a model in the module {text} write {text}:NameOfTheFactory" if not dot and text.isidentifier() else ""
        if dot and name.isidentifier() and path.suffix not in _FILES and all(part.isidentifier() for part in module.split(".")):
            hint = f"; for a factory in a module write {module}:{name}"
        raise CommandError(f"there is no file or folder {text}: {FORMS}{hint}")
    if not os.access(path, os.R_OK):
        raise CommandError(f"{text} cannot be read: no permission")
    if path.suffix == ".py":
        raise CommandError(f"{text} is a Python file: write {text}:NameOfTheFactory", codes.USAGE)
    from fxfuse import convert

    return convert.load(path, allow_pickle=allow_pickle)


def _module(name: str) -> ModuleType:
    here = os.getcwd()
    if here not in sys.path:  # a console script does not have it, and models live where one works
        sys.path.insert(0, here)
    try:
        return _of_file(name) if name.endswith(".py") else importlib.import_module(name)
    except (KeyboardInterrupt, CommandError):
        raise
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing and (name == missing or name.startswith(missing + ".")):
            how = f"check the spelling, or run where `python -c 'import {name}'` works (the current folder is searched)"
            raise CommandError(f"there is no module {missing}: {how}") from None
        raise CommandError(f"importing {name} failed: {said(error)}") from None
    except BaseException as error:  # SystemExit too: a module may do anything when it is imported
        if isinstance(error, (ValueError, TypeError)) and not name.endswith(".py") and not all(p.isidentifier() for p in name.split(".")):
            raise CommandError(f"{name!r} is no name of a module: {FORMS}", codes.USAGE) from None
        raise CommandError(f"importing {name} failed: {said(error)}") from None


def _of_file(name: str) -> ModuleType:
    path = Path(name)
    if not path.is_file():
        raise CommandError(f"there is no file {name}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise CommandError(f"{name} cannot be imported")
    folder = str(path.resolve().parent)
    if folder not in sys.path:  # as `python file.py` does
        sys.path.insert(0, folder)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _attribute(module: ModuleType, name: str, path: str) -> Any:
    found: Any = module
    for part in path.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            near = difflib.get_close_matches(part, [n for n in dir(found) if not n.startswith("_")], n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise CommandError(f"{name} has no {path}{hint}") from None
        except Exception as error:
            raise CommandError(f"{name}:{path} cannot be read: {said(error)}") from None
    return found


def _called(factory: Callable[..., Any], text: str, positional: list[Any], keywords: dict[str, Any]) -> nn.Module:
    try:
        model = factory(*positional, **keywords)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        hint = ""
        if isinstance(error, TypeError) and not positional and not keywords:
            hint = "; give it arguments with --args, as JSON"
        raise CommandError(f"{text} raised {said(error)}{hint}") from None
    if isinstance(model, nn.Module):
        return model
    if inspect.iscoroutine(model):
        model.close()  # Python warns of one that nobody waits for
    what = f"the class {model.__name__}, no instance of it" if isinstance(model, type) else f"a {type(model).__name__}"
    raise CommandError(f"{text} returned {what}: it must return a torch.nn.Module")
