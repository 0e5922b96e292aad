"""Modules of a fused region: they keep their class, names and methods, while their weights are views of the pack.

Comes in: a module and the slots (place in the pack) of the tensors it gave away. Goes out: the same object with
``__class__`` set to a generated subclass, whose properties read and write the pack, and which tells the region's ``Watch``
of every change that a recorded program may have assumed away. The technique is that of ``torch.nn.utils.parametrize``.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from fxfuse.distributed.packs import gathered_once, whole
from fxfuse.errors import ArgumentError, FxfuseError, StateDictError
from fxfuse.graph import Recipe
from fxfuse.models.copies import copy_ordinary, ordinary
from fxfuse.models.sharded import is_sharded, shared_as
from fxfuse.private import recurrent
from fxfuse.private.module_hooks import BOOKKEEPING
from fxfuse.private.state_dicts import forget_version
from fxfuse.private.transforms import transforming

from .dense_gradient import dense_gradient
from .own_buffers import assign_own, own_buffer
from .recipes import lane_view, lane_views

LANE = "_fxfuse_lane"  # the key in an instance's __dict__ under which its LaneInfo lies

# Attributes of nn.Module itself that say nothing of what a forward computes, or that are compared whenever it matters.
_LOOKED_UP = BOOKKEEPING.union(recurrent.LISTS)

# What torch.compile sets on the module that it is given: right before it traces, when there is no more time to look again.
_COMPILED = {"_is_torch_compile", "_compiled_call_impl"}

_thread = threading.local()
_listing = threading.RLock()  # held while modules list what they gave to the pack: two threads may save at once
_making = threading.Lock()


class Pack(nn.Module):
    """A node of the container tree that holds packed tensors: ``region.packed.nets.0.weight``."""

    def __init__(self, watch: Watch) -> None:
        nn.Module.__init__(self)
        self.__dict__["_fxfuse_watch"] = watch

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        # a checkpoint by original names is loaded through the lanes; the pack then has no keys of its own to miss
        missing: list[str] = rest[2]
        before = len(missing)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if self.__dict__["_fxfuse_watch"].by_original_name(missing):
            del missing[before:]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if not (saving_by_original_name() or self.__dict__["_fxfuse_watch"].original_names):
            super()._save_to_state_dict(destination, prefix, keep_vars)
        else:
            forget_version(destination, prefix[:-1])


@dataclass
class Watch:
    """What the modules of one region share: is the compiled program still what the modules say?

    ``ready`` is the callable for the current state of the modules, or None after any change (the next call looks again).
    ``written`` holds, per attribute set after installation, what it was before: ``(existed, value)``.
    """

    ready: Callable[..., Any] | None = None
    written: dict[tuple[str, str], tuple[bool, Any]] = field(default_factory=dict)
    sets: frozenset[tuple[str, str]] = frozenset()  # (path, name) of attributes that forward itself sets, and does not read before
    original_names: bool = False  # state_dict() writes the original's names
    loading: tuple[list[str], bool] | None = None  # the load in progress (its list of missing keys), by original names?

    def moved(self) -> None:
        """Packs have another dtype or lie elsewhere."""
        self.ready = None

    def unread(self, path: str, module: nn.Module, name: str) -> bool:
        """Is an attribute that is set on a module one that no program rests on?"""
        return False

    def by_original_name(self, missing: list[str]) -> bool:
        """Is the ``load_state_dict`` that this list belongs to one by original names?"""
        return self.loading is not None and self.loading[0] is missing and self.loading[1]

    def note(self, path: str, module: nn.Module, name: str, value: Any = None) -> None:
        """Remember what an attribute was before its first change. Flags, tensors and submodules need no note: these are
        compared with what they were whenever ``ready`` is None."""
        if name in _COMPILED or (path, name) in self.sets:
            return
        own = module.__dict__
        found = isinstance(value, nn.Module | nn.Parameter) or any(name in own[s] for s in ("_parameters", "_buffers", "_modules"))
        if not found and self.unread(path, module, name):
            return
        self.ready = None
        if found or name in _LOOKED_UP:
            return
        if (path, name) not in self.written:
            found = name in own or hasattr(type(module), name)
            self.written[(path, name)] = (found, attribute_of(module, name))


def attribute_of(module: nn.Module, name: str) -> Any:
    """An attribute as it is, without the module's own ways to look it up; None where there is none."""
    return type(module) if name == "__class__" else module.__dict__.get(name, getattr(type(module), name, None))


def divided(owner: nn.Module) -> bool:
    """Are the lanes of a pack's owner divided among processes, each whole in its own (``shard_lanes``)?"""
    watch = owner.__dict__.get("_fxfuse_watch", owner.__dict__.get("_fxfuse"))
    return getattr(watch, "sharding", None) is not None


@dataclass
class Slot:
    """Where a tensor of a lane lies: member ``index`` of the packed tensor ``name`` of the module ``owner``."""

    owner: nn.Module
    store: str  # the dict of the owner that has it: "_parameters", "_buffers", or "__dict__" (never registered: stays so)
    name: str
    recipe: Recipe
    index: int

    def __deepcopy__(self, memo: dict[int, Any]) -> Slot:
        copied = memo[id(self)] = object.__new__(Slot)  # before the owner, which leads back here
        copied.__dict__.update(self.__dict__)
        copied.owner = copy.deepcopy(self.owner, memo)
        return copied

    def packed(self) -> Tensor:
        """The packed tensor as it is now: Parameters may be replaced (``assign=True``, ``.to()``), so it is looked up."""
        found = getattr(self.owner, self.store).get(self.name)
        return cast(Tensor, getattr(self.owner, self.name) if found is None else found)

    def view(self) -> Tensor:
        """This lane's tensor, a differentiable view in the original's shape. Of a pack that is sharded, a view of what is gathered."""
        packed = self.packed()
        if torch.compiler.is_compiling():
            return lane_view(self.recipe, packed, self.index)
        own = own_buffer(self)
        if own is not None:
            return own
        packed = whole(packed)
        cache: dict[int, tuple[Tensor, tuple[Tensor, ...]]] | None = getattr(_thread, "views", None)
        # A view made without grad, or inside a functorch transform, must not be handed out after it.
        if cache is None or not packed.requires_grad or not torch.is_grad_enabled() or transforming():
            return lane_view(self.recipe, packed, self.index)
        entry = cache.get(id(packed))
        if entry is None:
            entry = cache[id(packed)] = (packed, lane_views(self.recipe, packed))  # the entry keeps packed, and so its id, alive
        return entry[1][self.index]

    def write(self, name: str, value: Any) -> None:
        """Copy an assigned tensor into the pack. Raises ``ArgumentError`` for what a view cannot become."""
        shape, kind = self.recipe.member_shape(self.index), self.recipe.kind
        if not isinstance(value, Tensor):
            raise ArgumentError(f"{name} is packed with the other lanes: expected a tensor of shape {shape}, got {type(value).__name__}")
        if kind == "parameter" and self.store == "_parameters" and not isinstance(value, nn.Parameter):
            raise ArgumentError(f"cannot assign {type(value).__name__} as parameter {name}: expected torch.nn.Parameter of shape {shape}")
        if tuple(value.shape) != shape:
            raise ArgumentError(f"{name} is packed with the other lanes: expected shape {shape}, got {tuple(value.shape)}")
        if kind == "buffer" and assign_own(self, value):
            return
        packed = self.packed()
        if kind == "parameter" and value.requires_grad != packed.requires_grad:
            raise ArgumentError(
                f"{name} is packed with the other lanes, which have requires_grad={packed.requires_grad}; got {value.requires_grad}"
            )
        if packed.is_meta and not value.is_meta:
            raise ArgumentError(f"{name} is part of a pack on the meta device and cannot be assigned alone: load all lanes at once")
        with torch.no_grad():
            if is_sharded(packed):  # every process assigns, and takes its lanes
                full = whole(packed).clone()
                lane_view(self.recipe, full, self.index).copy_(value)
                packed.copy_(shared_as(full, packed))
            else:
                lane_view(self.recipe, packed, self.index).copy_(value)


@dataclass
class LaneInfo:
    """What a module of a region knows of its place: its path, its slots, and the original order of its tensors."""

    path: str
    watch: Watch
    slots: dict[str, Slot]
    parameters: tuple[str, ...]  # all names of the original's _parameters, in order
    buffers: tuple[str, ...]

    def __deepcopy__(self, memo: dict[int, Any]) -> LaneInfo:
        copied = memo[id(self)] = object.__new__(LaneInfo)
        copied.__dict__.update(self.__dict__)
        copied.watch = copy.deepcopy(self.watch, memo)
        copied.slots = {name: copy.deepcopy(slot, memo) for name, slot in self.slots.items()}
        return copied

    def merged(self, module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
        """``_parameters`` and ``_buffers`` as the original had them, packed ones as views, in the original's order."""
        own, slots = module.__dict__, self.slots
        return (
            _in_order(self.parameters, own["_parameters"], {n: s for n, s in slots.items() if s.recipe.kind == "parameter"}),
            _in_order(self.buffers, own["_buffers"], {n: s for n, s in slots.items() if s.recipe.kind == "buffer"}),
        )


def _in_order(order: tuple[str, ...], kept: dict[str, Any], slots: dict[str, Slot]) -> dict[str, Any]:
    merged = {name: slots[name].view() if name in slots else kept[name] for name in order if name in slots or name in kept}
    return {**merged, **kept}


def lane_info(module: nn.Module) -> LaneInfo | None:
    """The ``LaneInfo`` of a module of a fused region, None for any other module."""
    return cast("LaneInfo | None", module.__dict__.get(LANE))


@contextmanager
def shared_views() -> Iterator[None]:
    """Within, on this thread, all reads of one packed tensor share one ``unbind`` (for the original forward over the pack)."""
    outer = getattr(_thread, "views", None)
    _thread.views = {} if outer is None else outer
    try:
        yield
    finally:
        _thread.views = outer


@contextmanager
def by_original_name() -> Iterator[None]:
    """Within, on this thread, ``state_dict()`` writes original names."""
    outer = saving_by_original_name()
    _thread.original = True
    try:
        with gathered_once():
            yield
    finally:
        _thread.original = outer


def saving_by_original_name() -> bool:
    """Is ``state_dict()`` to write original names, on this thread?"""
    return bool(getattr(_thread, "original", False))


def _saved_whole(destination: Any) -> dict[int, str]:
    """The regions that were written into a state dict so far on this thread, by identity, and their prefixes there."""
    noted: list[tuple[weakref.ref[Any], dict[int, str]]] = getattr(_thread, "saved", [])
    for reference, regions in noted:
        if reference() is destination:
            return regions
    made: dict[int, str] = {}
    _thread.saved = [each for each in noted if each[0]() is not None] + [(weakref.ref(destination), made)]
    return made


@contextmanager
def _loading_alone() -> Iterator[None]:
    outer = getattr(_thread, "alone", False)
    _thread.alone = True
    try:
        yield
    finally:
        _thread.alone = outer


@contextmanager
def _as_original(module: nn.Module, info: LaneInfo) -> Iterator[None]:
    """Within, the module's ``_parameters`` and ``_buffers`` list views of what it gave to the pack."""
    own = module.__dict__
    with _listing:
        kept = own["_parameters"], own["_buffers"]
        with torch.no_grad():
            merged = info.merged(module)
        own["_parameters"], own["_buffers"] = merged
        try:
            yield
        finally:
            own["_parameters"], own["_buffers"] = kept
            for was, now in zip(kept, merged, strict=True):
                was.update({name: now[name] for name in was if name in now})  # whatever was replaced meanwhile


@dataclass
class _OwnState:
    """What a module's own ``__getstate__`` keeps of it, and what makes it a lane."""

    state: Any
    lane: dict[str, Any]


class LaneMixin(nn.Module):
    """Comes first among the bases of every generated class; the original class follows and does the real work.

    It derives from nn.Module only for its memory layout: a class whose first base were laid out otherwise could not become
    the class of an existing module.
    """

    __slots__ = ()
    _fxfuse_base: type[nn.Module]
    _fxfuse_ordinary: bool  # the base has no copying of its own

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        # ModuleList slices and user code call type(module)(...): what they build is a plain module
        return cls._fxfuse_base(*args, **kwargs)

    def __init_subclass__(cls) -> None:
        """Ends here: a base that registers its subclasses shall not meet generated ones."""

    def __setattr__(self, name: str, value: Any) -> None:
        info: LaneInfo | None = self.__dict__.get(LANE)
        if info is not None:
            slot = info.slots.get(name)
            if slot is not None:
                slot.write(f"{info.path}.{name}" if info.path else name, value)
                return
            if name == "training" and self.__dict__.get("training") is value:
                return
            if name in _OF_FSDP or (name == "__class__" and _wraps(value, type(self))):
                super().__setattr__(name, value)
                return
            info.watch.note(info.path, self, name, value)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        info: LaneInfo | None = self.__dict__.get(LANE)
        if info is not None:
            if name in info.slots:
                raise ArgumentError(f"{info.path}.{name} is packed with the other lanes and cannot be deleted; fxfuse.unfuse first")
            info.watch.note(info.path, self, name)
        super().__delattr__(name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        if not isinstance(reduced, tuple) or reduced[0].__name__ != "__newobj__":
            return reduced
        cls = type(self)
        state, *more = reduced[2:] or (None,)
        if not isinstance(state, dict) or LANE not in state:  # a __getstate__ of its own, as einops' layers have
            state = _OwnState(state, {name: self.__dict__[name] for name in (LANE, "training")})
        return (rebuild, (cls._fxfuse_base, cls._fxfuse_mixin, cls._fxfuse_names), state, *more)  # type: ignore[attr-defined]

    def __setstate__(self, state: Any) -> None:
        own = state.lane if isinstance(state, _OwnState) else {}
        super().__setstate__(state.state if isinstance(state, _OwnState) else state)  # type: ignore[no-untyped-call]
        self.__dict__.update(own)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        info: LaneInfo = self.__dict__[LANE]
        region: Any = info.watch.region  # type: ignore[attr-defined]
        if region is not self and id(region) not in memo:
            # One lane alone: a copy with weights of its own, not a view of a copy of everybody's.
            copied = copy.deepcopy(region, memo)
            lane = memo[id(self)]
            restore(copied)
            return lane
        if hasattr(self._fxfuse_base, "__deepcopy__"):  # parametrized modules: they can be copied, but not pickled
            parts = rebuild, (self._fxfuse_base, self._fxfuse_mixin, self._fxfuse_names), self.__dict__
            return copy._reconstruct(self, memo, *parts)  # type: ignore[attr-defined]
        if self._fxfuse_ordinary:
            return copy_ordinary(self, memo)
        return copy._reconstruct(self, memo, *self.__reduce_ex__(4))  # type: ignore[attr-defined]

    def _replicate_for_data_parallel(self) -> Any:
        raise FxfuseError("a fused model cannot be replicated by nn.DataParallel; use DistributedDataParallel, or fxfuse.unfuse it first")

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As any module's. A part that is reached without its region has what it holds by the original's names, as views."""
        info: LaneInfo = self.__dict__[LANE]
        destination, prefix = (args[i] if i < len(args) else kwargs.get(n) for i, n in enumerate(("destination", "prefix")))
        if info.watch.original_names or self._is_written_whole(destination, prefix or ""):
            return super().state_dict(*args, **kwargs)
        with by_original_name():
            return super().state_dict(*args, **kwargs)

    def _is_written_whole(self, destination: Any, prefix: str) -> bool:
        """Is this the region, or does its region write the packs into the same state dict?"""
        region = getattr(self.__dict__[LANE].watch, "region", self)
        if region is self or destination is None:
            return region is self
        above = _saved_whole(destination).get(id(region)) if isinstance(destination, OrderedDict) else ""
        return above is not None and prefix.startswith(above)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As any module's. A part by itself knows the original's names only, and misses those that are not there."""
        if getattr(self.__dict__[LANE].watch, "region", self) is self:
            return super().load_state_dict(*args, **kwargs)
        with _loading_alone():
            return super().load_state_dict(*args, **kwargs)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        info: LaneInfo = self.__dict__[LANE]
        if getattr(info.watch, "region", self) is self and isinstance(destination, OrderedDict):
            _saved_whole(destination)[id(self)] = prefix
        if saving_by_original_name() or info.watch.original_names:
            with _as_original(self, info):
                super()._save_to_state_dict(destination, prefix, keep_vars)
            if not saving_by_original_name() and not keep_vars:  # for savers that take no tensors that share memory
                for name in info.slots:
                    if prefix + name in destination:
                        destination[prefix + name] = destination[prefix + name].clone(memory_format=torch.contiguous_format)
        else:
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        info: LaneInfo = self.__dict__[LANE]
        loading = info.watch.loading
        ours = loading is not None and loading[0] is rest[2]
        # A lane that is reached without its region (lane.load_state_dict, or a second path to it) knows original names only.
        alone = getattr(_thread, "alone", False) or any(prefix + name in state_dict for name in info.slots)
        original = loading[1] if ours and loading is not None else alone
        if not original or not info.slots:
            absent = [prefix + name for name in info.slots if prefix + name not in state_dict]
            super()._load_from_state_dict(state_dict, prefix, *rest)
            for key in absent:  # BatchNorm adds the counter that it misses in a dict without versions: the pack has it
                if state_dict.pop(key, None) is not None and key in rest[3]:
                    rest[3].remove(key)
            return
        # Assigning cannot change the storage of one lane alone (the region packs whole packs before this): copy instead.
        assign = rest[0].get("assign_to_params_buffers", False)
        rest = ({k: v for k, v in rest[0].items() if k != "assign_to_params_buffers"}, *rest[1:])
        for name, slot in info.slots.items():
            if is_sharded(slot.packed()):
                raise StateDictError(f"{prefix}{name} is a lane of a pack that is sharded over processes: load all lanes together")
            if assign and prefix + name in state_dict and slot.packed().is_meta:
                raise StateDictError(f"{prefix}{name} cannot be loaded alone into a pack on the meta device: load all its lanes together")
        with _as_original(self, info):
            given = dict(self.__dict__["_parameters"]), dict(self.__dict__["_buffers"])
            super()._load_from_state_dict(state_dict, prefix, *rest)
            for before, after in zip(given, (self.__dict__["_parameters"], self.__dict__["_buffers"]), strict=True):
                for name in info.slots:  # replaced or swapped instead of written: carry the values into the pack
                    if name in before and after.get(name) is not None:
                        target = info.slots[name].view().detach()
                        if after[name].device != target.device or after[name].data_ptr() != target.data_ptr():
                            target.copy_(after[name].detach())

    def named_parameters(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
        """As of any module. A part of a region, asked for by itself, has the packs whose lanes it holds, or views of its lanes."""
        region = getattr(self.__dict__[LANE].watch, "region", self)
        if not recurse or region is self or self._fxfuse_base.named_parameters is not nn.Module.named_parameters:
            return super().named_parameters(prefix, recurse, remove_duplicate)
        from .below import parameters_below  # imports this file

        return cast("Iterator[tuple[str, nn.Parameter]]", parameters_below(self, prefix, remove_duplicate))

    def named_buffers(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Iterator[tuple[str, Tensor]]:
        """As of any module; of a part of a region as ``named_parameters``."""
        region = getattr(self.__dict__[LANE].watch, "region", self)
        if not recurse or region is self or self._fxfuse_base.named_buffers is not nn.Module.named_buffers:
            return super().named_buffers(prefix, recurse, remove_duplicate)
        from .below import buffers_below  # imports this file

        return buffers_below(self, prefix, remove_duplicate)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As of any module; a part by itself (``fused.experts.half()``) moves the packs whose lanes all lie in it, or raises."""
        if getattr(_thread, "moved", None) is self:
            from .below import apply_below  # imports this file

            apply_below(self, fn)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """As of any module; where it would freeze some lanes of a pack only, raise instead of doing nothing."""
        own: dict[str, set[str]] = {}
        packs: dict[str, Slot] = {}
        for module in self.modules():
            info = lane_info(module)
            for slot in info.slots.values() if info is not None else ():
                if slot.recipe.kind == "parameter":
                    own.setdefault(slot.recipe.name, set()).add(slot.recipe.members[slot.index])
                    packs[slot.recipe.name] = slot
        for name, members in own.items():
            lanes = len(packs[name].recipe.members)
            if len(members) < lanes and packs[name].packed().requires_grad is not requires_grad:
                said = f"{name} packs {lanes} lanes, and requires_grad_ of {len(members)} of them alone cannot be set"
                first = sorted(members)[0]
                raise FxfuseError(f"{said}: fxfuse.freeze(model, {first!r}) and fxfuse.unfreeze do that, by names in the whole model")
        for slot in packs.values():
            slot.packed().requires_grad_(requires_grad)
        super().requires_grad_(requires_grad)
        return self


def _telling(name: str, base: type = nn.Module) -> Callable[..., Any]:
    """A method that does what its base does and then has the watch look again."""

    @functools.wraps(getattr(base, name))  # torch looks whether register_buffer takes ``persistent``
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return getattr(super(LaneMixin, self), name)(*args, **kwargs)
        finally:
            info = self.__dict__.get(LANE)
            if info is not None:
                info.watch.ready = None

    return method


def _moving(name: str) -> Callable[..., Any]:
    """A method that moves or casts, told to the part that it is called of: below a model that moves, parts have nothing to do."""

    @functools.wraps(getattr(nn.Module, name))
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        outer = getattr(_thread, "moved", None)
        _thread.moved = None if getattr(self.__dict__[LANE].watch, "region", self) is self else self
        try:
            return getattr(super(LaneMixin, self), name)(*args, **kwargs)
        finally:
            _thread.moved = outer

    return method


# What ``fully_shard`` notes on every module below the one that it wraps; no forward reads it.
_OF_FSDP = frozenset(("_is_fsdp_managed_module", "_fsdp_use_orig_params"))


def _wraps(kind: Any, wrapped: type) -> bool:
    """Is this a class around ``wrapped`` whose forward is the same, as ``fully_shard`` makes it?"""
    return isinstance(kind, type) and issubclass(kind, wrapped) and getattr(kind, "forward", None) is getattr(wrapped, "forward", None)


# These change hooks or submodules without passing through __setattr__.
for _name in (
    *("register_forward_hook", "register_forward_pre_hook", "register_backward_hook"),
    *("register_full_backward_hook", "register_full_backward_pre_hook", "add_module", "register_module"),
    *("register_parameter", "register_buffer"),
):
    setattr(LaneMixin, _name, _telling(_name))
for _name in ("to", "type", "float", "double", "half", "bfloat16", "cpu", "cuda", "xpu", "ipu", "mtia", "to_empty", "share_memory"):
    setattr(LaneMixin, _name, _moving(_name))
_CONTAINER = ("__delitem__", "__setitem__", "append", "extend", "insert", "pop", "clear", "update", "popitem")
_CONTAINER_READS = ("__iter__", "__len__", "__getitem__", "__contains__", "keys", "values", "items")


def _property(name: str) -> property:
    def read(self: Any) -> Tensor:
        slot: Slot = self.__dict__[LANE].slots[name]
        return slot.view() if self.__dict__.get("sparse") is not True else dense_gradient(slot.view())

    def write(self: Any, value: Any) -> None:
        setattr(self, name, value)

    return property(read, write, doc=f"A view of the packed tensor that holds this lane's {name}.")


_classes: dict[tuple[type, type, tuple[str, ...]], type] = {}


def generated(base: type, mixin: type, names: tuple[str, ...]) -> type:
    """The subclass of ``base`` whose attributes ``names`` are views of a pack; equal arguments give the same class.

    A name that ends in ``()`` is that of a method with a program of its own, as ``forward`` has.
    """
    key = (base, mixin, names)
    if key not in _classes:
        methods = [name.removesuffix("()") for name in names if name.endswith("()")]
        names = tuple(name for name in names if not name.endswith("()"))
        space: dict[str, Any] = {
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "__slots__": (),  # the layout must stay that of the base, or no instance could change to it
            "_fxfuse_base": base,
            "_fxfuse_ordinary": ordinary(base),
            "_fxfuse_mixin": mixin,
            "_fxfuse_names": key[2],
            **{name: _property(name) for name in names},
            **{name: _telling(name, base) for name in _CONTAINER if hasattr(base, name)},
        }
        if issubclass(base, nn.RNNBase) and names:
            space.update(recurrent.listing())
        if hasattr(mixin, "_fxfuse_hide") and issubclass(base, nn.ModuleList | nn.Sequential | nn.ModuleDict):
            space.update({name: mixin._fxfuse_hide(name) for name in _CONTAINER_READS if hasattr(base, name)})
        if hasattr(mixin, "_fxfuse_forward"):

            def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
                try:
                    run = self._fxfuse_forward
                except AttributeError:  # taken apart; who wrapped the forward of the fused model (accelerate does) still comes here
                    return base.forward(self, *args, **kwargs)  # type: ignore[attr-defined]
                return run(args, kwargs)

            forward.__code__ = forward.__code__.replace()  # dynamo counts recompilations by code objects: each class has its own
            forward.__doc__ = base.forward.__doc__  # type: ignore[attr-defined]
            with suppress(TypeError, ValueError):  # a builtin or a wrapper without one
                forward.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]
            space["forward"] = forward
            space.update({name: _method(base, name) for name in methods})
        with _making:
            if key not in _classes:
                _classes[key] = type(base)(base.__name__, (mixin, base), space)
    return _classes[key]


def _method(base: Any, name: str) -> Callable[..., Any]:
    """A method of the base that runs its program."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._fxfuse_method(name, args, kwargs)

    method.__code__ = method.__code__.replace()  # as that of ``forward``
    return functools.wraps(getattr(base, name))(method)


def rebuild(base: type, mixin: type, names: tuple[str, ...]) -> Any:
    """An instance of a generated class without state: what pickle and deepcopy start from."""
    return object.__new__(generated(base, mixin, names))


def become(module: nn.Module, info: LaneInfo, mixin: type = LaneMixin, methods: Sequence[str] = ()) -> None:
    """Give ``module`` its generated class, in place. ``methods``: those that run programs, besides forward."""
    module.__dict__[LANE] = info
    if isinstance(module, nn.RNNBase) and info.slots:
        recurrent.forget(module)
    # object.__setattr__: the module's own may have opinions on __class__
    object.__setattr__(module, "__class__", generated(type(module), mixin, (*info.slots, *(f"{name}()" for name in methods))))


def restore(module: nn.Module) -> None:
    """Undo ``become`` on a region and all that belongs to it, in place: original classes with Parameters of their own.

    Order of registration, requires_grad, training flags and attributes set meanwhile stay. Tied names get one Parameter.
    """
    watch: Any = module.__dict__[LANE].watch
    own: dict[tuple[str, int], Tensor] = {}
    for member in watch.members():
        info = lane_info(member)
        if info is None:
            continue
        for slot in info.slots.values():
            key = (slot.recipe.name, slot.index)
            if key not in own:
                packed = slot.packed()
                data = lane_view(slot.recipe, whole(packed.detach()), slot.index).clone(memory_format=torch.contiguous_format)
                own[key] = nn.Parameter(data, packed.requires_grad) if isinstance(packed, nn.Parameter) else data
                own[key].__dict__.update(packed.__dict__)
        state = member.__dict__
        for order, store in ((info.parameters, "_parameters"), (info.buffers, "_buffers")):
            kept, kind = state[store], "parameter" if store == "_parameters" else "buffer"
            mine = {n: own[(s.recipe.name, s.index)] for n, s in info.slots.items() if s.recipe.kind == kind and n in order}
            merged = {name: mine[name] if name in mine else kept[name] for name in order if name in mine or name in kept}
            merged.update({name: value for name, value in kept.items() if name not in merged})
            kept.clear()
            kept.update(merged)
        for name, slot in info.slots.items():
            if name not in info.parameters and name not in info.buffers:  # a tensor that was a plain attribute
                state[name] = own[(slot.recipe.name, slot.index)]
        del state[LANE]
        object.__setattr__(member, "__class__", type(member)._fxfuse_base)
        if isinstance(member, nn.RNNBase):
            recurrent.relist(member)
    watch.removed(module)
