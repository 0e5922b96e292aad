"""What is done to a model after it was made: ties, frozen and eval lanes, hooks, shared modules.

A change is ``[name, lane, other lane or choice]``; "lane" is an index into whatever holds the lanes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st
from torch import nn

from . import parts

HOOKS = ("forward", "watching", "pre", "backward", "gradient")
CHANGES = ("freeze", "eval", "share", "tie", "hook", "alias", "freeze_all")


def holders(model: nn.Module) -> Iterator[Any]:
    """What holds lanes, in the model itself: lists, dicts (by their values), plain Python lists, numbered attributes."""
    for name, value in [*model._modules.items(), *vars(model).items()]:
        if isinstance(value, (nn.ModuleList, nn.ModuleDict)) or (isinstance(value, list) and name.startswith("nets")):
            yield value
    numbered = [name for name in model._modules if name.startswith("nets") and "_" in name]
    if numbered:
        yield {name: model._modules[name] for name in numbered}


def unregistered(model: nn.Module) -> Iterator[nn.Module]:
    """Modules in plain Python lists of the model's own."""
    for name, value in vars(model).items():
        if isinstance(value, list) and name.startswith("nets"):
            yield from value


def lane(holder: Any, index: int) -> nn.Module | None:
    """The lane's module, the last one where there are fewer."""
    values = list(holder.values()) if hasattr(holder, "values") else list(holder)
    return values[index % len(values)] if values else None


def change(model: nn.Module, name: str, first: int, second: int) -> None:
    """One change, to all that the two lanes hold."""
    if name == "freeze_all":
        for number, parameter in enumerate(model.parameters()):
            parameter.requires_grad_(bool(number % 2) == bool(second % 2))
        return
    for holder in holders(model):
        one, other = lane(holder, first), lane(holder, second)
        if one is None or other is None or (one is other and name in ("share", "tie", "alias")):
            continue
        if name == "freeze":
            for number, parameter in enumerate(one.parameters()):
                if second % 2 or not number:
                    parameter.requires_grad_(False)
        elif name == "eval":
            one.eval()
        elif name == "share":
            _put(holder, second, one)
        elif name in ("tie", "alias"):
            _tie(one, other, name == "alias")
        elif name == "hook":
            _hook(one, HOOKS[second % len(HOOKS)])


def _put(holder: Any, index: int, module: nn.Module) -> None:
    if isinstance(holder, (nn.ModuleDict, dict)):
        if isinstance(holder, nn.ModuleDict):
            keys = list(holder)
            holder[keys[index % len(keys)]] = module
    else:
        holder[index % len(holder)] = module


def _tie(one: nn.Module, other: nn.Module, alias: bool) -> None:
    """The first parameter of one lane is that of the other too, or another Parameter on the same memory."""
    paths = [name for name, _ in one.named_parameters()]
    mine = dict(other.named_parameters())
    for path in paths[:1]:
        if path in mine and mine[path].shape == one.get_parameter(path).shape:
            if alias:
                other.get_parameter(path).data = one.get_parameter(path).data
                continue
            owner, _, leaf = path.rpartition(".")
            try:
                setattr(other.get_submodule(owner), leaf, one.get_parameter(path))
            except (AttributeError, RuntimeError, TypeError, KeyError):  # a parametrized weight
                return


def _hook(module: nn.Module, kind: str) -> None:
    if kind == "forward":
        module.register_forward_hook(parts.forward_hook)
    elif kind == "watching":
        module.register_forward_hook(parts.watching_hook)
    elif kind == "pre":
        module.register_forward_pre_hook(parts.pre_hook)
    elif kind == "backward":
        module.register_full_backward_hook(parts.backward_hook)
    else:
        for parameter in list(module.parameters())[:1]:
            if parameter.requires_grad:
                parameter.register_hook(parts.gradient_hook)


def changes() -> st.SearchStrategy[list[Any]]:
    """Mostly none."""
    one = st.tuples(st.sampled_from(CHANGES), st.integers(0, 4), st.integers(0, 4)).map(list)
    return st.one_of(st.just([]), st.just([]), st.lists(one, min_size=1, max_size=2))
