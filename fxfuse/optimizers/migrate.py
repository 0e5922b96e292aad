"""Optimizers go with their model: from the original to its fused form, and back.

Comes in: an optimizer over the Parameters of one model, that model, and another form of it. Goes out: the same optimizer over the other's
Parameters: param groups and state by the original's names, bit for bit. Lanes of a pack that are in different groups, or whose states
differ in count of steps, are cut into parts (``fxfuse.optimizers.cut``), each a Parameter of its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fxfuse.errors import ArgumentError, OptimizerError
from fxfuse.graph import Recipe
from fxfuse.models.live_optimizers import unwrapped
from fxfuse.models.sharded import gathered, shared_as
from fxfuse.running.region import RegionState
from fxfuse.weights.lane import divided
from fxfuse.weights.recipes import pack

from .cut import cut
from .elementwise import ELEMENTWISE, unsupported
from .places import Place, places

# Of an optimizer that was migrated: by id, each Parameter and where in its group its members were in the beginning, by name ("" where it
# is no pack). A pack has no place among them, and a state dict of the original goes by places.
_ORDERS: WeakKeyDictionary[Any, dict[int, tuple[Tensor, dict[str, int]]]] = WeakKeyDictionary()


@dataclass
class _Member:
    """One parameter of the original, as the optimizer has it."""

    group: int
    order: int | None  # its place in the group in the beginning; None where that is not known
    whole: dict[str, Any]  # states of one number
    shaped: dict[str, Tensor]  # states of the parameter's shape

    @property
    def signature(self) -> tuple[Any, ...]:
        """Equal for lanes that may share a pack."""
        numbers = tuple(sorted((key, value.item() if isinstance(value, Tensor) else value) for key, value in self.whole.items()))
        return self.group, numbers, tuple(sorted((key, value.dtype) for key, value in self.shaped.items()))


@dataclass
class Collected:
    """What an optimizer has of a model, by the original's names."""

    members: dict[str, _Member]
    shapes: dict[str, tuple[int, ...]]  # of all parameters of the model
    holders: list[Tensor]  # the Parameters that the optimizer gives up
    others: dict[int, int]  # by id, the places of the Parameters that it keeps


def migrate_optimizer(optimizer: Any, model: nn.Module, fused: nn.Module, *, inplace: bool = True) -> Any:
    """Let an optimizer of ``model`` train ``fused`` from here on: its param groups and its state move over, exactly.

    Either model may be the fused one: ``migrate_optimizer(optimizer, fused, fxfuse.unfuse(fused))`` is the way back. The optimizer itself
    is changed and returned, so that schedulers, GradScalers and loggers that hold it go on; with ``inplace=False`` it stays as it is, and a
    new one comes back (then ``scheduler.optimizer = new`` for schedulers). Lanes in different param groups, or with different counts of
    steps, get packs of their own in ``fused``. Parameters of other models stay.

    Raises ``OptimizerError`` for optimizers whose step is not elementwise, and where the optimizer holds no Parameter of ``model``;
    ``ArgumentError`` where the models are not two forms of one.

    >>> layer, other = nn.Linear(2, 3), nn.Linear(2, 3)
    >>> optimizer = migrate_optimizer(torch.optim.SGD(layer.parameters(), 0.1), layer, other)
    >>> optimizer.param_groups[0]["params"][0] is other.weight
    True
    """
    for what, given in (("model", model), ("fused", fused)):
        if not isinstance(given, nn.Module):
            raise ArgumentError(f"{what} must be a torch.nn.Module, a {type(given).__name__} came")
    if any(divided(module) for of in (model, fused) for module in of.modules()):
        raise OptimizerError("lanes are divided among processes: move the optimizer before that, or build it anew from fused.parameters()")
    collected = collect(optimizer, model)
    result = optimizer if inplace else again(unwrapped(optimizer))
    place(collected, result, fused)
    return result


def again(optimizer: Any) -> Any:
    """Another optimizer over the same Parameters, with groups and a state of its own."""
    made = object.__new__(type(optimizer))
    groups = [{**group, "params": list(group["params"])} for group in optimizer.param_groups]
    for group in groups:
        group.update({key: value.clone() for key, value in group.items() if isinstance(value, Tensor)})
    state = defaultdict(dict, {parameter: dict(each) for parameter, each in optimizer.state.items()})
    made.__setstate__({"defaults": dict(optimizer.defaults), "state": state, "param_groups": groups})
    return made


def check_optimizer(optimizer: Any) -> None:
    """Raise ``OptimizerError`` for an optimizer that cannot be migrated, ``ArgumentError`` for what is none."""
    optimizer = unwrapped(optimizer)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ArgumentError(f"optimizer must be a torch.optim.Optimizer, a {type(optimizer).__name__} came")
    reason = unsupported(optimizer)
    if reason is not None:
        raise OptimizerError(f"{reason}; build it anew from fused.parameters()")


def collect(optimizer: Any, model: nn.Module) -> Collected:
    """What ``optimizer`` has of ``model``, by the original's names; changes nothing."""
    check_optimizer(optimizer)
    found = collect_from(unwrapped(optimizer), places(model))
    if not found.members:
        raise OptimizerError(f"the {type(optimizer).__name__} holds no Parameter of the {type(model).__name__} that it shall come from")
    return found


def collect_from(optimizer: Any, where_by_name: Mapping[str, Place]) -> Collected:
    """As ``collect``, of Parameters that lie there; there may be none of them."""
    at = {id(p): (g, k) for g, group in enumerate(optimizer.param_groups) for k, p in enumerate(group["params"])}
    known = _ORDERS.get(optimizer, {})
    packed = any(where.recipe is not None and id(where.holder) in at for where in where_by_name.values())
    members, holders, shapes = {}, {}, {}
    for name, where in where_by_name.items():
        key = id(where.holder)
        shapes[name] = where.shape
        if key in at:
            group, order = at[key]
            places_then = known[key][1] if key in known else {}
            then = places_then.get(name, places_then.get("", None if packed else order))
            members[name] = _member(optimizer, name, where, group, then)
            holders[key] = where.holder
    others = {key: known[key][1].get("", order) if key in known else order for key, (_, order) in at.items() if key not in holders}
    return Collected(members, shapes, list(holders.values()), others)


def _member(optimizer: Any, name: str, where: Place, group: int, order: int | None) -> _Member:
    numbers = ELEMENTWISE[type(optimizer)]
    whole: dict[str, Any] = {}
    shaped: dict[str, Tensor] = {}
    for key, value in optimizer.state.get(where.holder, {}).items():
        if isinstance(value, Tensor) and value.requires_grad:
            raise OptimizerError(f"{name}: its state {key} has a history of autograd, which would be cut")
        if key in numbers and (not isinstance(value, Tensor) or value.dim() == 0):
            whole[key] = value
        elif isinstance(value, Tensor) and value.shape == where.holder.shape:
            shaped[key] = value if where.recipe is None else where.of(gathered(value))
        elif value is None:
            whole[key] = None
        else:
            said = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise OptimizerError(f"{name}: its state {key} ({said}) is neither of the parameter's shape nor one number")
    return _Member(group, order, whole, shaped)


def place(collected: Collected, optimizer: Any, model: nn.Module) -> None:
    """Give ``optimizer`` the Parameters of ``model`` for those that it was collected from. What can be wrong is found first."""
    optimizer = unwrapped(optimizer)
    target = places(model)
    shapes = {name: where.shape for name, where in target.items()}
    if shapes != collected.shapes:
        odd = [name for name in {**shapes, **collected.shapes} if shapes.get(name) != collected.shapes.get(name)]
        raise ArgumentError(f"the two are no forms of one model: {', '.join(odd[:3])} is not in both, or of another shape")
    _apart(collected, target)
    put(collected, optimizer, places(model), {id(p): name for name, p in model.named_parameters()})


def put(collected: Collected, optimizer: Any, target: Mapping[str, Place], names_of: Mapping[int, str]) -> None:
    """As ``place``, where the Parameters lie as ``target`` says, cut as they have to be. ``names_of``: by id, for ``param_names``."""
    numbers = {name: number for number, name in enumerate(target)}
    lanes: dict[int, list[str]] = {}
    for name, where in target.items():
        lanes.setdefault(id(where.holder), []).append(name)
    gone = {id(holder) for holder in collected.holders}
    groups: list[list[tuple[Any, Tensor]]] = [
        [((collected.others[id(p)], -1), p) for p in group["params"] if id(p) not in gone] for group in optimizer.param_groups
    ]
    orders = {id(p): (p, {"": order}) for group in groups for ((order, _), p) in group}
    state: list[tuple[Tensor, dict[str, Any]]] = []
    for names in lanes.values():
        where = target[names[0]]
        found = [collected.members.get(name) for name in names]
        first = found[0]
        if first is None:
            continue
        every = sorted(zip(names, found, strict=True), key=lambda each: target[each[0]].index)
        order = numbers[names[0]] if first.order is None else first.order
        groups[first.group].append(((order, where.index), where.holder))
        then = {name: member.order for name, member in every if member is not None and member.order is not None}
        if len(then) == len(names):
            orders[id(where.holder)] = where.holder, then if where.recipe is not None else {"": order}
        made: dict[str, Any] = {key: _copied(value) for key, value in first.whole.items()}
        for key in first.shaped:
            made[key] = _joined(where.holder, where.recipe, [member.shaped[key] for _, member in every if member is not None])
        if made:
            state.append((where.holder, made))
    packed = any(where.recipe is not None for where in target.values())
    held, ranks = {id(where.holder) for where in target.values()}, {key: number for number, key in enumerate(names_of)}
    for group, members in zip(optimizer.param_groups, groups, strict=True):
        before = dict(zip(map(id, group["params"]), group.get("param_names", ()), strict=False))
        group["params"] = [parameter for _, parameter in sorted(members, key=lambda each: each[0])]
        if packed:  # as an optimizer has them that is built from the packed model: their state dicts are the same
            ours = [k for k, parameter in enumerate(group["params"]) if id(parameter) in held]
            alike = sorted((group["params"][k] for k in ours), key=lambda parameter: ranks.get(id(parameter), len(ranks)))
            for k, parameter in zip(ours, alike, strict=True):
                group["params"][k] = parameter
        if "param_names" in group:
            group["param_names"] = [names_of.get(id(p), before.get(id(p), "")) for p in group["params"]]
    for holder in collected.holders:
        optimizer.state.pop(holder, None)
    for holder, made in state:
        optimizer.state[holder] = made
    _ORDERS[optimizer] = orders


def _apart(collected: Collected, target: dict[str, Place]) -> None:
    """Cut the packs whose lanes the optimizer does not treat alike."""
    packs: dict[int, list[tuple[int, str, Place]]] = {}
    for name, where in target.items():
        if where.recipe is not None:
            packs.setdefault(id(where.holder), []).append((where.index, name, where))
    cuts: dict[int, tuple[RegionState, dict[str, list[int]]]] = {}
    for each in packs.values():
        each.sort(key=lambda lane: lane[0])
        signatures = [member.signature if (member := collected.members.get(name)) is not None else None for _, name, _ in each]
        starts = [each[k][0] for k in range(1, len(each)) if signatures[k] != signatures[k - 1]]
        where = each[0][2]
        if starts and where.state is not None and where.recipe is not None:
            cuts.setdefault(id(where.state), (where.state, {}))[1][where.recipe.name] = starts
    for region, starts_by_name in cuts.values():
        cut(region, starts_by_name)


def _joined(holder: Tensor, recipe: Recipe | None, values: list[Tensor]) -> Tensor:
    with torch.no_grad():
        value = shared_as(values[0] if recipe is None else pack(recipe, values), holder)
        return torch.empty_like(holder, dtype=value.dtype, requires_grad=False).copy_(value)


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
