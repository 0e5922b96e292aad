"""Rewrite a model: surgery that turns the modules named by RegionPlans into fused regions.

Comes in: a model (a private copy, or the user's own) and ``graph.RegionPlan``s. Goes out: the same model, where each region is an instance
of a generated subclass of its own class (``region.RegionMixin``), its lanes' tensors packed. All that can be wrong is found first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.fx
from torch import Tensor, nn

from fxfuse.errors import FxfuseError, HeldElsewhereError
from fxfuse.graph import Recipe, RegionPlan
from fxfuse.models.held import objects_in
from fxfuse.models.module_tree import all_modules, bare, named_modules
from fxfuse.models.undo import Undo
from fxfuse.models.unregistered import Held, unregistered
from fxfuse.private import recurrent
from fxfuse.private.dynamo import attributes_of_users
from fxfuse.private.tensor_hooks import has_gradient_hooks
from fxfuse.weights.alias import AliasPack
from fxfuse.weights.all_or_nothing import loads_whole
from fxfuse.weights.lane import LANE, LaneInfo, LaneMixin, Pack, Slot, become
from fxfuse.weights.large import Moved
from fxfuse.weights.norm_pack import LayerNormPack, norm_nodes
from fxfuse.weights.recipes import check, pack, packed_shape

from .guards import Facts
from .region import STATE, RegionMixin, RegionState, children_of, hooks_of
from .runtime import source, walk
from .surroundings import closed_modules, inside


@dataclass
class _Surgery:
    """One plan, checked against its region: what ``_apply`` needs and nothing that can still be wrong."""

    plan: RegionPlan
    region: nn.Module
    modules: dict[nn.Module, str]  # and their paths
    hidden: dict[nn.Module, str]
    tensors: list[list[Tensor]]  # per recipe, its members
    names: dict[int, tuple[int, int]]  # id of a member -> (recipe, index)
    stores: list[str]  # per recipe, the dict of the pack it goes to
    holder: str | None


def install(
    model: nn.Module,
    plans: list[RegionPlan],
    *,
    strict: bool = False,
    packing: Literal["packed", "alias"] = "packed",
    undo: Undo | None = None,
    moved: Moved | None = None,
) -> nn.Module:
    """Turn the modules that ``plans`` name into fused regions, in place, and return ``model``.

    ``strict`` raises ``FallbackError`` where a call would run a region's loop. ``packing="alias"`` keeps the members as the
    registered Parameters, with their data as views of one buffer, so that an optimizer built before stays valid. Nothing is
    changed where a plan does not fit (then ``FxfuseError`` says why), or where anything else is raised. ``undo`` is given the way back.
    ``moved`` holds packs into which the weights move, or have moved.

    >>> model = nn.Sequential(nn.Linear(2, 3))
    >>> install(model, []) is model
    True
    """
    prepared = examine(model, plans, packing)
    undo = Undo() if undo is None else undo
    try:
        if plans and all(surgery.region is not model for surgery in prepared):
            undo.keep([model])
            loads_whole(model)
        for surgery in prepared:
            _operate(model, surgery, strict, _packing(surgery.plan, packing), undo, moved)
    except BaseException:
        undo.restore()
        raise
    return model


def examine(model: nn.Module, plans: list[RegionPlan], packing: Literal["packed", "alias"] = "packed") -> list[_Surgery]:
    """What ``install`` would do. Raises ``FxfuseError`` where a plan does not fit; changes nothing."""
    prepared: list[_Surgery] = []
    taken: dict[nn.Module, str] = {}
    for plan in plans:
        surgery = _examine(model, plan, _packing(plan, packing))
        for module in (*surgery.modules, *surgery.hidden):
            if module in taken:
                raise FxfuseError(f"regions {taken[module] or 'model'} and {plan.path or 'model'} share a module")
            taken[module] = plan.path
        prepared.append(surgery)
    return prepared


def _packing(plan: RegionPlan, packing: Literal["packed", "alias"]) -> Literal["packed", "alias"]:
    return "alias" if plan.keeps_parameters else packing


def held_unregistered(model: nn.Module, plan: RegionPlan) -> str | None:
    """The first member that belongs to a module which the model does not register; None where all are registered."""
    region = walk(model, plan.path)
    modules = set(all_modules(region))
    for recipe in plan.recipes:
        for member in recipe.members:
            if walk(region, member.rpartition(".")[0]) not in modules:
                return member
    return None


def misfit(model: nn.Module, plan: RegionPlan, packing: Literal["packed", "alias"] = "packed") -> FxfuseError | None:
    """Why ``plan`` alone cannot be installed in ``model``; None where it can. Changes nothing."""
    try:
        _examine(model, plan, _packing(plan, packing))
    except FxfuseError as error:
        return error
    return None


def _examine(model: nn.Module, plan: RegionPlan, packing: str) -> _Surgery:
    """Find what the plan names in the model. Raises ``FxfuseError`` where something does not fit; changes nothing."""
    where = plan.path or type(model).__name__
    try:
        region = walk(model, plan.path)
    except (AttributeError, KeyError, IndexError) as error:
        raise FxfuseError(f"the model has no module {plan.path}") from error
    if not isinstance(region, nn.Module) or isinstance(region, torch.jit.ScriptModule):
        raise FxfuseError(f"{where} is a {type(region).__name__}, which cannot be given another forward")
    replaced = next((name for name in ("forward", *plan.methods) if name in region.__dict__), None)
    if replaced is not None:
        raise FxfuseError(f"{where}.{replaced} was replaced on the instance, which would bypass the fused {replaced}")
    modules = {module: name for name, module in named_modules(region)}
    if any(LANE in module.__dict__ for module in modules):
        raise FxfuseError(f"{where} is fused already, in whole or in part")
    scripted = next((name for module, name in modules.items() if isinstance(module, torch.jit.ScriptModule)), None)
    if scripted is not None:
        raise FxfuseError(f"{where}.{scripted} is scripted and cannot be watched")

    hidden: dict[nn.Module, str] = {}
    tensors: list[list[Tensor]] = []
    stores: list[str] = []
    names: dict[int, tuple[int, int]] = {}
    for number, recipe in enumerate(plan.recipes):
        check(recipe)
        members, kinds = [], set()
        for index, member in enumerate(recipe.members):
            owner, tensor, store = _member(region, recipe, index)
            if owner not in modules:
                hidden.setdefault(owner, member.rpartition(".")[0])
            kinds.add(store if owner in modules else "__dict__")
            if id(tensor) in names:
                raise FxfuseError(f"{member} is the same tensor as {_member_name(plan, names[id(tensor)])}: it can be packed once only")
            names[id(tensor)] = (number, index)
            members.append(tensor)
        if len(kinds) > 1:
            raise FxfuseError(f"the members of {recipe.name} are partly registered and partly not")
        _agree(recipe, members)
        tensors.append(members)
        stores.append(kinds.pop())
    for path, module in unregistered(model, [(path, module) for module, path in modules.items()]):
        if LANE not in module.__dict__:
            hidden.setdefault(module, path)

    own = (*(recipe.name for recipe in plan.recipes), *plan.constants) if packing == "packed" else ()
    holders = {name.partition(".")[0] for name in own}
    if len(holders) > 1:
        raise FxfuseError(f"the packed names of {where} have several roots: {', '.join(sorted(holders))}")
    holder = next(iter(holders), None)
    if holder is not None and hasattr(region, holder):
        raise FxfuseError(f"{where} has an attribute {holder} already")
    surgery = _Surgery(plan, region, modules, hidden, tensors, names, stores, holder)
    _check_other_names(model, surgery, packing)
    return surgery


def _member_name(plan: RegionPlan, place: tuple[int, int]) -> str:
    return plan.recipes[place[0]].members[place[1]]


def _member(region: nn.Module, recipe: Recipe, index: int) -> tuple[nn.Module, Tensor, str]:
    """The owner of a member, the tensor, and the owner's dict that holds it."""
    member = recipe.members[index]
    path, _, name = member.rpartition(".")
    try:
        owner = walk(region, path)
    except (AttributeError, KeyError, IndexError, ValueError) as error:
        raise FxfuseError(f"the region has no {member}, which {recipe.name} packs") from error
    if not isinstance(owner, nn.Module):
        raise FxfuseError(f"{member} lies in a plain {type(owner).__name__}, whose items cannot become views of a pack")
    for store in ("_parameters", "_buffers", "__dict__"):
        tensor = getattr(owner, store).get(name)
        if isinstance(tensor, Tensor):
            break
    else:
        raise FxfuseError(f"the region has no tensor {member}, which {recipe.name} packs")
    if (store == "_parameters") != (recipe.kind == "parameter") and store != "__dict__":
        raise FxfuseError(f"{member} is a {'parameter' if store == '_parameters' else 'buffer'}, its recipe says {recipe.kind}")
    expected = recipe.member_shape(index)
    if tuple(tensor.shape) != expected:
        raise FxfuseError(f"{member} has shape {tuple(tensor.shape)}, its recipe says {expected}")
    if not tensor.is_leaf:
        raise FxfuseError(f"{member} is computed (it has a grad_fn) and cannot be packed")
    if has_gradient_hooks(tensor):
        raise FxfuseError(f"{member} has a gradient hook, which the packed tensor would not run")
    return owner, tensor, store


def _agree(recipe: Recipe, members: list[Tensor]) -> None:
    first = members[0]
    for name, tensor in zip(recipe.members, members, strict=True):
        for what in ("dtype", "device", "requires_grad"):
            if getattr(tensor, what) != getattr(first, what):
                raise FxfuseError(f"{name} has {what} {getattr(tensor, what)}, {recipe.members[0]} has {getattr(first, what)}")
        if type(tensor) is not type(first) or type(tensor) not in (Tensor, nn.Parameter):
            raise FxfuseError(f"{name} is a {type(tensor).__name__}, only plain tensors and Parameters are packed")
        own, others = ({k: each.__dict__[k] for k in attributes_of_users(each)} for each in (tensor, first))
        if own.keys() != others.keys() or any(own[k] is not others[k] for k in others):
            raise FxfuseError(f"{name} has other attributes than {recipe.members[0]}")
    if recipe.kind == "parameter" and first.requires_grad != recipe.requires_grad:
        raise FxfuseError(f"{recipe.members[0]} has requires_grad={first.requires_grad}, its recipe says {recipe.requires_grad}")


def _check_other_names(model: nn.Module, surgery: _Surgery, packing: str) -> None:
    """A member that is also reachable by a way that stays would keep its old value there: raise."""
    if packing == "alias":
        return
    ours = {**surgery.modules, **surgery.hidden}
    skip = ("_parameters", "_buffers", "_modules", *recurrent.LISTS)
    for path, module in [*named_modules(model), *((path, module) for module, path in surgery.hidden.items())]:
        for store in ("_parameters", "_buffers"):
            for name, tensor in getattr(module, store).items():
                if module not in ours and id(tensor) in surgery.names:
                    member = _member_name(surgery.plan, surgery.names[id(tensor)])
                    raise FxfuseError(f"{member} is also {path}.{name}, outside of the region")
        for name, value in module.__dict__.items():
            if bare(value) or name in skip or (module in ours and isinstance(value, Tensor) and _is_member(surgery, ours[module], name)):
                continue
            found = next((item for item in _tensors_in(value, 6) if id(item) in surgery.names), None)
            if found is not None:
                member = _member_name(surgery.plan, surgery.names[id(found)])
                raise HeldElsewhereError(f"{member} is also held by the attribute {f'{path}.{name}' if path else name}")


def _is_member(surgery: _Surgery, path: str, name: str) -> bool:
    full = f"{path}.{name}" if path else name
    return any(full in recipe.members for recipe in surgery.plan.recipes)


def _tensors_in(value: Any, depth: int) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, list | tuple | set | frozenset):
        for item in value:
            yield from _tensors_in(item, depth - 1)
    elif depth and isinstance(value, dict):
        for item in value.values():
            yield from _tensors_in(item, depth - 1)


def move(model: nn.Module, plans: list[RegionPlan], packing: Literal["packed", "alias"], moved: Moved) -> None:
    """Let the Parameters that ``plans`` pack move into packs: ``model`` computes what it did, on the same Parameters."""
    for plan in plans:
        surgery = _examine(model, plan, _packing(plan, packing))
        for recipe, members in zip(plan.recipes, surgery.tensors, strict=True):
            if recipe.kind == "parameter":
                moved.pack(plan.path, recipe, members)


def _operate(
    model: nn.Module, surgery: _Surgery, strict: bool, packing: Literal["packed", "alias"], undo: Undo, moved: Moved | None
) -> None:
    plan, region = surgery.plan, surgery.region
    everyone = {**surgery.modules, **surgery.hidden}
    undo.keep(everyone)
    state = RegionState(plan=plan, strict=strict, packing=packing, modules=list(surgery.modules), hidden=list(surgery.hidden))
    state.hidden_flags = tuple(module.training for module in state.hidden)
    state.hooks = hooks_of([*state.modules, *state.hidden])
    state.objects = objects_in(model, plan.all_programs())
    state.sets = plan.sets
    state.holder = surgery.holder
    root = Pack(state)
    slots: dict[nn.Module, dict[str, Slot]] = {module: {} for module in everyone}
    infos = {
        module: LaneInfo(path, state, slots[module], tuple(module._parameters), tuple(module._buffers)) for module, path in everyone.items()
    }
    if packing == "packed":
        norms = norm_nodes(plan.recipes, [[walk(region, m.rpartition(".")[0]) for m in recipe.members] for recipe in plan.recipes])
        owners = [
            _place(root, recipe, members, store, state, surgery, moved, norms)
            for recipe, members, store in zip(plan.recipes, surgery.tensors, surgery.stores, strict=True)
        ]
        for module in everyone:
            for store in ("_parameters", "_buffers", "__dict__"):
                kept = getattr(module, store)
                for name, tensor in list(kept.items()):
                    place = surgery.names.get(id(tensor)) if isinstance(tensor, Tensor) else None
                    if place is not None:
                        recipe = plan.recipes[place[0]]
                        leaf = recipe.name.rpartition(".")[2]
                        slots[module][name] = Slot(owners[place[0]], surgery.stores[place[0]], leaf, recipe, place[1])
                        del kept[name]
    else:
        updates = any(node.meta.get("update") for program in plan.programs.values() for node in program.graph.nodes)
        for recipe in plan.recipes:
            places = [(cast(nn.Module, walk(region, m.rpartition(".")[0])), m.rpartition(".")[2]) for m in recipe.members]
            unseen = [surgery.hidden[owner] for owner, _ in places if owner in surgery.hidden]
            held = Held.on_the_way(region, unseen) if unseen else None
            alias = state.aliases[recipe.name] = AliasPack(recipe, places, written=updates and recipe.kind == "buffer", held=held)
            alias.settle(undo, moved, plan.path)
    if packing == "alias":  # what the model registers stays what it was: averages go through buffers() of two models at once
        state.extra.update(plan.constants)
    for name, tensor in plan.constants.items() if packing == "packed" else ():
        owner = _container(root, name, state, {})
        owner.register_buffer(name.rpartition(".")[2], tensor, persistent=False)
    if surgery.holder is not None:
        region._modules[surgery.holder] = root
    region.__dict__[STATE] = state
    for module, info in infos.items():
        methods = [name for name in plan.methods if name != "forward"] if module is region else []
        become(module, info, RegionMixin if module is region else LaneMixin, methods)
    for program in plan.all_programs():
        for node in program.graph.nodes:
            if node.op == "get_attr":
                try:
                    kept = state.aliases.get(node.target)
                    if kept is None:
                        known = state.extra.get(node.target)
                        tensor = known if known is not None else source(region, node.target).fetch()
                        state.facts[node.target] = Facts.of(node.target, tensor)
                    else:
                        first = kept.members()[0]
                        state.facts[node.target] = Facts(node.target, packed_shape(kept.recipe), first.dtype, first.device)
                except AttributeError as error:
                    raise FxfuseError(f"the program reads {node.target}, which {plan.path or 'the region'} does not have") from error
    if plan.spelled is not None:
        closed = closed_modules(plan.all_programs(), region)
        state.inside = inside([(path, module) for module, path in everyone.items() if module not in closed], plan.spelled, plan.sets)
    state.children = children_of(state.modules)
    state.prepare()


def _container(root: Pack, name: str, state: RegionState, norms: dict[str, nn.LayerNorm]) -> nn.Module:
    """The node of the container tree that holds a packed name, made where it is missing."""
    owner: nn.Module = root
    path, *parts = name.split(".")[:-1]
    for part in parts:
        path = f"{path}.{part}"
        if part not in owner._modules:
            owner.add_module(part, LayerNormPack(state, norms[path]) if path in norms else Pack(state))
        owner = cast(nn.Module, owner._modules[part])
    return owner


def _place(
    root: Pack,
    recipe: Recipe,
    members: list[Tensor],
    store: str,
    state: RegionState,
    surgery: _Surgery,
    moved: Moved | None,
    norms: dict[str, nn.LayerNorm],
) -> nn.Module:
    """Pack the members into the container tree; their gradients, where any has one, come along."""
    owner, name = _container(root, recipe.name, state, norms), recipe.name.rpartition(".")[2]
    first = members[0]
    if moved is not None and recipe.kind == "parameter":
        packed = moved.pack(state.plan.path, recipe, members)
    else:
        with torch.no_grad():
            packed = pack(recipe, [member.detach() for member in members])
    if isinstance(first, nn.Parameter):
        packed = nn.Parameter(packed, requires_grad=first.requires_grad)
        if any(member.grad is not None for member in members):
            grads = [torch.zeros_like(member) if member.grad is None else member.grad for member in members]
            packed.grad = pack(recipe, [grad.detach() for grad in grads])
    elif first.requires_grad:
        packed.requires_grad_()
    packed.__dict__.update(first.__dict__)
    if store == "__dict__":
        owner.__dict__[name] = packed
    elif store == "_parameters":
        owner.register_parameter(name, cast(nn.Parameter, packed))
    else:
        persistent = {n in m._non_persistent_buffers_set for m in surgery.modules for n, t in m._buffers.items() if _in(t, members)}
        if len(persistent) > 1:
            raise FxfuseError(f"the members of {recipe.name} are partly saved in the state dict and partly not")
        owner.register_buffer(name, packed, persistent=not persistent.pop())
    return owner


def _in(tensor: Tensor | None, members: list[Tensor]) -> bool:
    return any(tensor is member for member in members)
