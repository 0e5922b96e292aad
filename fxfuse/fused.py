"""The fused model: surgery that turns the modules named by RegionPlans into regions that run packed programs.

Comes in: a model (a private copy) and ``graph.RegionPlan``s. Goes out: the same model, where each region is an instance of a
generated subclass of its own class: its forward checks a guard, runs the packed program, or answers through the class's own
original forward, whose lanes read the pack through views. ``unfuse`` is the way back.
"""

from __future__ import annotations

import copy
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
import torch.fx
from torch import Tensor, nn

from fxfuse.alias import AliasPack, StaleAlias
from fxfuse.all_or_nothing import all_or_nothing, loads_as_before, loads_whole
from fxfuse.entries import FORWARD
from fxfuse.errors import FallbackError, FxfuseError, HeldElsewhereError
from fxfuse.graph import Program, Recipe, RegionPlan
from fxfuse.guards import Facts
from fxfuse.held import Held, Kept, objects_in, resolved
from fxfuse.lane import LANE, LaneInfo, LaneMixin, Pack, Slot, Watch, become, lane_info, restore, shared_views
from fxfuse.large import Moved
from fxfuse.private import recurrent
from fxfuse.private.autocast import any_autocast_enabled
from fxfuse.private.module_hooks import CALL_HOOKS, hooks_for_all
from fxfuse.private.tensor_hooks import has_gradient_hooks
from fxfuse.recipes import check, pack, packed_shape, unpack
from fxfuse.runtime import MISS, Compiled, Source, compile_program, graph_module, source, walk
from fxfuse.serialize import program_from_data, program_to_data
from fxfuse.undo import Undo
from fxfuse.widen import widened

STATE = "_fxfuse"  # the key in a region's __dict__ under which its RegionState lies
_HOOKS_FOR_ALL = "a hook for all modules is registered"
_MOST_REASONS = 100  # reasons hold shapes: a run over endless shapes must not fill the memory


def _unsaved() -> dict[str, Any]:
    """What a state has before its first call: never copied or saved."""
    return {
        "ready": None, "current": None, "compiled": {}, "methods": {}, "others": {}, "loading": None, "holders": None,
        "adapted": {}, "unfit": {},
    }


_UNSAVED = frozenset({*_unsaved(), "plan"})


@dataclass(eq=False)
class RegionState(Watch):
    """All that a region knows besides its modules: its plan, what it answered through the loop and why."""

    plan: RegionPlan = field(default_factory=lambda: RegionPlan("", [], {}))
    strict: bool = False
    packing: Literal["packed", "alias"] = "packed"
    fallbacks: Counter[str] = field(default_factory=Counter)
    modules: list[nn.Module] = field(default_factory=list)  # region.modules() of the original, in order: the region is the first
    hidden: list[nn.Module] = field(default_factory=list)  # owners that the region does not register (lanes in a plain list)
    hidden_flags: tuple[bool, ...] = ()
    holder: str | None = None  # the name of the pack among the region's children
    facts: dict[str, Facts] = field(default_factory=dict)  # of the tensors that programs read, at installation
    hooks: tuple[Any, ...] = ()  # of the submodules, at installation
    objects: dict[Held, Kept] = field(default_factory=dict)  # that guards ask for, at installation
    aliases: dict[str, AliasPack] = field(default_factory=dict)  # packing="alias": by packed name
    compiled: dict[tuple[bool, ...], Compiled] = field(default_factory=dict)  # never copied or saved
    current: Compiled | None = None
    methods: dict[str, list[Compiled]] = field(default_factory=dict)  # of the current flags; right while ``ready`` is not None
    others: dict[tuple[str, tuple[bool, ...]], list[Compiled]] = field(default_factory=dict)  # never copied or saved
    adapted: dict[tuple[str, tuple[bool, ...]], list[Compiled]] = field(default_factory=dict)  # made at calls under autocast; never saved
    unfit: dict[Any, list[str]] = field(default_factory=dict)  # of the calls that none was made for, why; never copied or saved
    extra: dict[str, Tensor] = field(default_factory=dict)  # index tensors that those made later read
    holders: list[dict[str, Any]] | None = None  # the ``_parameters`` of all modules, for as long as none comes or goes

    @property
    def region(self) -> nn.Module:
        """The region itself."""
        return self.modules[0]

    def removed(self, region: nn.Module) -> None:
        """Called when the region is an ordinary module again: take the pack and this state out of it."""
        if self.holder is not None:
            region._modules.pop(self.holder, None)
        region.__dict__.pop(STATE, None)

    def members(self) -> Iterator[nn.Module]:
        """All modules that were given a generated class."""
        yield from self.modules
        yield from self.hidden

    def __getstate__(self) -> dict[str, Any]:
        kept = {k: v for k, v in self.__dict__.items() if k not in _UNSAVED}
        programs = {flags: program_to_data(program) for flags, program in self.plan.programs.items()}
        methods = {
            name: {flags: [program_to_data(p) for p in programs] for flags, programs in modes.items()}
            for name, modes in self.plan.methods.items()
        }
        return {**kept, "plan": replace(self.plan, programs={}, methods={}), "programs": programs, "methods_data": methods}

    def __setstate__(self, state: dict[str, Any]) -> None:
        programs = {flags: program_from_data(data) for flags, data in state.pop("programs").items()}
        methods = {
            name: {flags: tuple(program_from_data(p) for p in datas) for flags, datas in modes.items()}
            for name, modes in state.pop("methods_data", {}).items()
        }
        self.__dict__.update(state, **_unsaved())
        self.plan = replace(state["plan"], programs=programs, methods=methods)

    def __deepcopy__(self, memo: dict[int, Any]) -> RegionState:
        copied = RegionState.__new__(RegionState)
        memo[id(self)] = copied
        # plans are never changed; compiled functions hold the modules of this very region
        shared: dict[str, Any] = {**_unsaved(), "plan": self.plan}
        copied.__dict__.update(shared)
        copied.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__dict__.items() if k not in shared})
        return copied

    def flags(self) -> tuple[bool, ...]:
        """The ``training`` flags that choose the program."""
        return tuple(module.training for module in self.modules)

    def prepare(self) -> Compiled | str:
        """The compiled program for the modules as they are now, or why there is none. Sets ``ready``."""
        self.ready = self.current = self.holders = None
        reason = self._stale()
        if reason is not None:
            return reason
        flags = self.flags()
        later = {name: programs for (name, of), programs in self.adapted.items() if of == flags}
        self.methods = {
            name: [*self._compiled_others(name, flags), *later.get(name, ())] for name in dict.fromkeys((*self.plan.methods, *later))
        }
        program = self.plan.programs.get(flags)
        if program is None:
            self.ready = _always_miss if self.plan.methods else None
            return self._unknown_flags(flags)
        compiled = self.compiled.get(flags)
        if compiled is None:
            compiled = self.compiled[flags] = self.compile(program)
        else:
            compiled.hold(True)
        further = self.methods.get("forward")
        self.current, self.ready = compiled, _first_of([compiled, *further]) if further else compiled.run
        return compiled

    def compile(self, program: Program, facts: dict[str, Facts] | None = None) -> Compiled:
        """The program as a function over the tensors of this region. ``facts``: what is assumed of them (default: as installed)."""
        elsewhere = {name: Source(alias, None, "tensor") for name, alias in self.aliases.items()}
        elsewhere.update((name, Source(self, "extra", name)) for name in self.extra)
        return compile_program(resolved(program, self.objects), self.region, self.facts if facts is None else facts, elsewhere)

    def _compiled_others(self, name: str, flags: tuple[bool, ...]) -> list[Compiled]:
        key = (name, flags)
        if key not in self.others:
            self.others[key] = [self.compile(program) for program in self.plan.methods.get(name, {}).get(flags, ())]
        else:
            for compiled in self.others[key]:
                compiled.hold(True)
        return self.others[key]

    def _unknown_flags(self, flags: tuple[bool, ...]) -> str:
        if not self.plan.programs and self.plan.methods:
            return "forward itself holds no program, other methods do"
        if len(set(flags)) == 1:
            return f"no program was recorded in {'train' if flags[0] else 'eval'} mode"
        odd = not max(set(flags), key=flags.count)
        # A copy that is being made asks while some of its modules are no lanes yet.
        found = (info.path for m, f in zip(self.modules, flags, strict=True) if f is odd and (info := lane_info(m)) is not None)
        where = next(found, "")
        return f"no program was recorded with {where or 'the region'} in {'train' if odd else 'eval'} mode and others not"

    def _stale(self) -> str | None:
        """What has changed since installation that a recorded program may rest on."""
        holder = None if self.holder is None else self.region._modules.get(self.holder)
        if self.holder is not None and holder is None:
            return f"the child {self.holder}, which holds the packed weights, was removed"
        now = registered(self.region, holder)
        if len(now) != len(self.modules) or any(a is not b for a, b in zip(now, self.modules, strict=True)):
            return "a submodule was replaced, added or removed"
        reads: frozenset[str] | None = getattr(self.plan, "reads", None)  # "nets.0.scale": the attributes that forward read
        for (path, name), (existed, before) in self.written.items():
            if reads is not None and (f"{path}.{name}" if path else name) not in reads:
                continue
            module = next((m for m in self.members() if (info := lane_info(m)) is not None and info.path == path), None)
            if module is not None and not _unchanged(module, name, existed, before):
                return f"attribute {f'{path}.{name}' if path else name} was set after fusing"
        if _hooks(self.modules) != self.hooks:
            return "a hook was registered on a submodule"
        if tuple(module.training for module in self.hidden) != self.hidden_flags:
            return "an unregistered submodule changed its training flag"
        for target, fact in self.facts.items():
            if target in self.aliases:
                continue
            try:
                tensor = source(self.region, target).fetch()
            except (AttributeError, KeyError, FxfuseError):
                return f"{target} is gone"
            if not isinstance(tensor, Tensor) or tuple(tensor.shape) != fact.shape:
                return f"{target} is not a tensor of shape {fact.shape} any more"
        return None


_counting = threading.Lock()
_thread = threading.local()  # .loops: states whose original forward this thread is in -> how deep


def _loops() -> dict[int, int]:
    found: dict[int, int] | None = getattr(_thread, "loops", None)
    if found is None:
        found = _thread.loops = {}
    return found


@contextmanager
def _in_the_loop(state: RegionState) -> Iterator[None]:
    """This thread is in the original forward of the region."""
    loops, key = _loops(), id(state)
    loops[key] = loops.get(key, 0) + 1
    try:
        yield
    finally:
        loops[key] -= 1
        if not loops[key]:
            del loops[key]


def _always_miss(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return MISS


def _first_of(programs: list[Compiled]) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
    """The first program whose guard holds."""

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for program in programs:
            out = program.run(args, kwargs)
            if out is not MISS:
                break
        return out

    return run


def _unchanged(module: nn.Module, name: str, existed: bool, before: Any) -> bool:
    own = module.__dict__
    present = name in own or hasattr(type(module), name)
    if not present or not existed:
        return present is existed
    now = own.get(name, getattr(type(module), name, None))
    if now is before:
        return True
    plain = (bool, int, float, str, bytes, torch.dtype, torch.device)
    return type(now) is type(before) and isinstance(now, plain) and bool(now == before)


def _hooks(modules: list[nn.Module]) -> tuple[Any, ...]:
    """The hooks of a region's submodules (those of the region itself run in its ``__call__``, program or not)."""
    return tuple(
        (index, name, tuple(module.__dict__[name]))
        for index, module in enumerate(modules)
        if index > 0
        for name in CALL_HOOKS
        if module.__dict__.get(name)
    )


class RegionMixin(LaneMixin):
    """A region: a lane module (it may own packed tensors itself) whose forward runs the packed program."""

    __slots__ = ()

    def _fxfuse_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state: RegionState = self.__dict__[STATE]
        run = state.ready
        reason = "the region changed since its last call, and this one is traced"
        if run is None and not torch.compiler.is_compiling():
            prepared = state.prepare()
            run, reason = (None, prepared) if isinstance(prepared, str) else (state.ready, "")
        if hooks_for_all():
            run, reason = None, _HOOKS_FOR_ALL
        if run is not None:
            try:
                out = run(args, kwargs)
                if out is not MISS:
                    return out
                current = state.current  # another thread may be about to prepare
                reason = "the guard did not hold" if current is not None else state._unknown_flags(state.flags())
                if current is not None and not torch.compiler.is_compiling():
                    again = current.rebound(self._fxfuse_base.forward, self, args, kwargs)
                    if again is not None and (out := run(*again)) is not MISS:
                        return out
                    reason = current.why(*(again or (args, kwargs)))
                    if any_autocast_enabled():
                        reason, out = self._fxfuse_adapted(state, FORWARD, reason, *(again or (args, kwargs)))
                        if out is not MISS:
                            return out
            except StaleAlias as stale:
                reason = str(stale)
        return self._fxfuse_fall_back(state, reason, args, kwargs)

    def _fxfuse_method(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As ``_fxfuse_forward``, for another method of the region that holds a loop."""
        state: RegionState = self.__dict__[STATE]
        reason = "the region changed since its last call, and this one is traced"
        if state.ready is None and not torch.compiler.is_compiling():
            prepared = state.prepare()
            reason = prepared if isinstance(prepared, str) else ""
        if hooks_for_all():
            reason = _HOOKS_FOR_ALL
        elif state.ready is not None:
            programs = state.methods[name]
            mode = {True: "train", False: "eval"}.get(self.training)
            reason = "the guard did not hold" if programs else f"no program was recorded in {mode} mode"
            try:
                for program in programs:
                    out = program.run(args, kwargs)
                    if out is not MISS:
                        return out
                    if not torch.compiler.is_compiling():
                        again = program.rebound(getattr(self._fxfuse_base, name), self, args, kwargs)
                        if again is not None and (out := program.run(*again)) is not MISS:
                            return out
                        reason = program.why(*(again or (args, kwargs)))
                if programs and any_autocast_enabled() and not torch.compiler.is_compiling():
                    reason, out = self._fxfuse_adapted(state, name, reason, *(again or (args, kwargs)))
                    if out is not MISS:
                        return out
            except StaleAlias as stale:
                reason = str(stale)
        return self._fxfuse_fall_back(state, reason, args, kwargs, name)

    def _fxfuse_adapted(self, state: RegionState, name: str, reason: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, Any]:
        """A call under autocast that no program fits: by one made for it now, or why there is none, and ``MISS``."""
        from .adapt import adapt  # imports this file

        said = adapt(state, name, args, kwargs)
        if said is None:
            state.prepare()
            return reason, _first_of(state.methods[name])(args, kwargs)
        return f"{reason}{said and ', and '}{said}", MISS

    def _fxfuse_fall_back(
        self, state: RegionState, reason: str, args: tuple[Any, ...], kwargs: dict[str, Any], method: str = "forward"
    ) -> Any:
        reason = reason if method == "forward" else f"{method}: {reason}"
        if state.strict:
            raise FallbackError(f"{state.plan.path or type(self).__name__} would run its loop: {reason}")
        forward = getattr(self._fxfuse_base, method)
        if torch.compiler.is_compiling():  # traced: no counters, no caches
            return forward(self, *args, **kwargs)
        with _counting:
            known = reason in state.fallbacks or len(state.fallbacks) < _MOST_REASONS
            state.fallbacks[reason if known else "other reasons"] += 1
        with shared_views(), _in_the_loop(state):
            return forward(self, *args, **kwargs)

    def train(self, mode: bool = True) -> Any:
        """As of any module. Looks for the program at once, so that torch.compile finds it ready."""
        result = super().train(mode)
        self.__dict__[STATE].prepare()
        return result

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As of any module (``to``, ``half``, ``cuda``): the memory of the old weights is let go of."""
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        state: RegionState = self.__dict__[STATE]
        for compiled in (*state.compiled.values(), *(each for others in state.others.values() for each in others)):
            compiled.hold(False)
        state.adapted.clear()
        state.unfit.clear()
        state.extra.clear()
        state.ready = None
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = super().__deepcopy__(memo)
        # Where the copy began below the region, its state is not complete yet: then the first call prepares.
        with suppress(AttributeError, KeyError):
            copied.__dict__[STATE].prepare()
        return copied

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        # Where one lane is pickled, its region is built before the lane is: then the first call prepares.
        with suppress(AttributeError, KeyError):
            self.__dict__[STATE].prepare()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As any module's. The lanes stay as modules without tensors: walking them by name would cost more than a training step."""
        if not set_to_none or _own_zero_grad(type(self)):
            super().zero_grad(set_to_none)
            return
        state: RegionState = self.__dict__[STATE]
        holders = state.holders
        if state.ready is None or holders is None:  # a new module or Parameter clears ``ready``
            holders = state.holders = [module._parameters for module in nn.Module.modules(self) if module._parameters]
        for parameters in holders:
            for parameter in parameters.values():
                if parameter is not None:
                    parameter.grad = None

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """As of any module; the original forward, where it walks its children, does not meet the pack."""
        state: RegionState = self.__dict__[STATE]
        for name, child in super().named_children():
            if not (name == state.holder and id(state) in _loops()):
                yield name, child

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As any module's; a state dict that does not fit changes nothing."""
        with all_or_nothing(self):
            return super().load_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        state: RegionState = self.__dict__[STATE]
        metadata, missing = rest[0], rest[2]
        packed = any(prefix + recipe.name in state_dict for recipe in state.plan.recipes)
        if not packed and state.packing == "packed" and metadata.get("assign_to_params_buffers", False):
            packed = _pack_keys(state, state_dict, prefix)
        if state.packing == "alias":
            _unpack_keys(state, state_dict, prefix)
            packed = True  # nothing is a view: the lanes load as any module does
        state.loading = (missing, not packed)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _pack_keys(state: RegionState, state_dict: Any, prefix: str) -> bool:
    """Replace the original keys by packed ones where all are there and fit: ``assign=True`` then takes over dtype and device."""
    names = {(s.recipe.name, s.index): [] for m in state.members() for s in _slots(m).values()}  # type: ignore[var-annotated]
    for path, module in state.region.named_modules(remove_duplicate=False):
        for name, slot in _slots(module).items():
            names[(slot.recipe.name, slot.index)].append(prefix + (f"{path}.{name}" if path else name))
    made: dict[str, Tensor] = {}
    for recipe in state.plan.recipes:
        tensors = []
        for index in range(len(recipe.members)):
            keys = [key for key in names[(recipe.name, index)] if key in state_dict]
            if len(keys) != len(names[(recipe.name, index)]) or not keys:
                return False
            given = state_dict[keys[-1]]
            if not isinstance(given, Tensor) or tuple(given.shape) != recipe.member_shape(index):
                return False
            tensors.append(given)
        if len({(tensor.dtype, tensor.device) for tensor in tensors}) > 1:
            return False
        with torch.no_grad():
            made[prefix + recipe.name] = pack(recipe, tensors)
    for keys in names.values():
        for key in keys:
            del state_dict[key]
    state_dict.update(made)
    return True


def _unpack_keys(state: RegionState, state_dict: Any, prefix: str) -> None:
    """Replace packed keys by the original ones, for a region whose members are registered."""
    for name, alias in state.aliases.items():
        packed = state_dict.get(prefix + name)
        if not isinstance(packed, Tensor) or tuple(packed.shape) != packed_shape(alias.recipe):
            continue
        index = {id(member): i for i, member in enumerate(alias.members())}
        views = unpack(alias.recipe, packed)
        del state_dict[prefix + name]
        for path, module in state.region.named_modules(remove_duplicate=False):
            for own in (module._parameters, module._buffers):
                keys = {f"{path}.{key}" if path else key: index.get(id(tensor)) for key, tensor in own.items()}
                state_dict.update({prefix + key: views[i] for key, i in keys.items() if i is not None})


def _own_zero_grad(cls: type) -> bool:
    """Does the user's class bring its own ``zero_grad``?"""
    methods = [vars(base)["zero_grad"] for base in cls.__mro__ if "zero_grad" in vars(base)]
    return any(method not in (RegionMixin.__dict__["zero_grad"], nn.Module.zero_grad) for method in methods)


def _slots(module: nn.Module) -> dict[str, Slot]:
    info = lane_info(module)
    return {} if info is None else info.slots


def registered(region: nn.Module, holder: nn.Module | None = None) -> list[nn.Module]:
    """``region.modules()``, in order, without the pack."""
    skip = set() if holder is None else set(holder.modules())
    return [module for module in region.modules() if module not in skip]


def _hide_pack(name: str) -> Callable[..., Any]:
    """A container's reading method that does not see the pack: ``len(region)``, ``for lane in region``."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        # On an object beside this one: another thread may be reading the children meanwhile.
        own, state, base = self.__dict__, self.__dict__[STATE], self._fxfuse_base
        beside = object.__new__(base)
        beside.__dict__.update(own)
        beside.__dict__["_modules"] = {key: value for key, value in own["_modules"].items() if key != state.holder}
        return getattr(base, name)(beside, *args, **kwargs)

    method.__name__ = name
    return method


RegionMixin._fxfuse_hide = staticmethod(_hide_pack)  # type: ignore[attr-defined]


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
    modules = {module: name for name, module in region.named_modules()}
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
    for path, module in _unregistered(model, modules):
        hidden.setdefault(module, path)

    holders = {name.partition(".")[0] for name in (*(r.name for r in plan.recipes if packing == "packed"), *plan.constants)}
    if len(holders) > 1:
        raise FxfuseError(f"the packed names of {where} have several roots: {', '.join(sorted(holders))}")
    holder = next(iter(holders), None)
    if holder is not None and hasattr(region, holder):
        raise FxfuseError(f"{where} has an attribute {holder} already")
    surgery = _Surgery(plan, region, modules, hidden, tensors, names, stores, holder)
    _check_other_names(model, surgery, packing)
    return surgery


def _unregistered(model: nn.Module, modules: dict[nn.Module, str]) -> Iterator[tuple[str, nn.Module]]:
    """Modules in plain lists and dicts of the region's modules, which nobody registers: their flags and attributes are read too."""
    known = set(model.modules())
    for owner, path in modules.items():
        for name, value in owner.__dict__.items():
            if name in ("_parameters", "_buffers", "_modules"):
                continue
            for inner, found in _modules_in(value, 3):
                for below, module in found.named_modules():
                    if module not in known and LANE not in module.__dict__ and not isinstance(module, torch.jit.ScriptModule):
                        known.add(module)
                        yield ".".join(part for part in (path, name, inner, below) if part), module


def _modules_in(value: Any, depth: int) -> Iterator[tuple[str, nn.Module]]:
    """Modules in nested containers, each with the way to it."""
    if isinstance(value, nn.Module):
        yield "", value
    elif depth and isinstance(value, list | tuple | dict):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            for way, module in _modules_in(item, depth - 1):
                yield f"{key}.{way}" if way else str(key), module


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
        if tensor.__dict__.keys() != first.__dict__.keys() or any(tensor.__dict__[k] is not first.__dict__[k] for k in first.__dict__):
            raise FxfuseError(f"{name} has other attributes than {recipe.members[0]}")
    if recipe.kind == "parameter" and first.requires_grad != recipe.requires_grad:
        raise FxfuseError(f"{recipe.members[0]} has requires_grad={first.requires_grad}, its recipe says {recipe.requires_grad}")


def _check_other_names(model: nn.Module, surgery: _Surgery, packing: str) -> None:
    """A member that is also reachable by a way that stays would keep its old value there: raise."""
    if packing == "alias":
        return
    ours = {**surgery.modules, **surgery.hidden}
    for path, module in [*model.named_modules(), *((path, module) for module, path in surgery.hidden.items())]:
        for store in ("_parameters", "_buffers"):
            for name, tensor in getattr(module, store).items():
                if module not in ours and id(tensor) in surgery.names:
                    member = _member_name(surgery.plan, surgery.names[id(tensor)])
                    raise FxfuseError(f"{member} is also {path}.{name}, outside of the region")
        for name, value in module.__dict__.items():
            skip = ("_parameters", "_buffers", "_modules", *recurrent.LISTS)
            if name in skip or (module in ours and isinstance(value, Tensor) and _is_member(surgery, ours[module], name)):
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
    state.hooks = _hooks(state.modules)
    state.objects = objects_in(model, plan.all_programs())
    state.sets = plan.sets
    state.holder = surgery.holder
    root = Pack(state)
    slots: dict[nn.Module, dict[str, Slot]] = {module: {} for module in everyone}
    infos = {
        module: LaneInfo(path, state, slots[module], tuple(module._parameters), tuple(module._buffers)) for module, path in everyone.items()
    }
    if packing == "packed":
        owners = [
            _place(root, recipe, members, store, state, surgery, moved)
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
            state.aliases[recipe.name] = AliasPack(recipe, places, written=updates and recipe.kind == "buffer")
            members = state.aliases[recipe.name].members()
            if moved is not None and recipe.kind == "parameter":
                state.aliases[recipe.name].lies_in(moved.pack(plan.path, recipe, members))
            undo.keep_data(members)
            _ = state.aliases[recipe.name].tensor  # binds
    for name, tensor in plan.constants.items():
        owner = _container(root, name, state)
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
                    alias = state.aliases.get(node.target)
                    tensor = alias.tensor if alias is not None else source(region, node.target).fetch()
                    state.facts[node.target] = Facts.of(node.target, tensor)
                except AttributeError as error:
                    raise FxfuseError(f"the program reads {node.target}, which {plan.path or 'the region'} does not have") from error
    state.prepare()


def _container(root: Pack, name: str, state: RegionState) -> nn.Module:
    """The node of the container tree that holds a packed name, made where it is missing."""
    owner: nn.Module = root
    for part in name.split(".")[1:-1]:
        if part not in owner._modules:
            owner.add_module(part, Pack(state))
        owner = cast(nn.Module, owner._modules[part])
    return owner


def _place(
    root: Pack, recipe: Recipe, members: list[Tensor], store: str, state: RegionState, surgery: _Surgery, moved: Moved | None
) -> nn.Module:
    """Pack the members into the container tree; their gradients, where any has one, come along."""
    owner, name = _container(root, recipe.name, state), recipe.name.rpartition(".")[2]
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


def regions(model: nn.Module) -> dict[str, RegionState]:
    """The state of every fused region by its module path: ``plan``, ``fallbacks`` (reason -> calls) and so on."""
    return {path: module.__dict__[STATE] for path, module in model.named_modules() if STATE in module.__dict__}


def attributes_set(model: nn.Module, by_programs: bool = False) -> list[tuple[str, str]]:
    """The attributes (module path, name) that the forwards of fused regions set; ``by_programs``: without those that closed calls set."""
    found: list[tuple[str, str]] = []
    for path, state in regions(model).items():
        programs = {(store.module, store.name) for program in state.plan.all_programs() for store in program.stores}
        for module, name in sorted(programs if by_programs else state.plan.sets):
            found.append((f"{path}.{module}" if path and module else path or module, name))
    return found


def accept_any_dtype(model: nn.Module) -> None:
    """Let the programs of ``model`` run in float64, also where they follow the dtype of the recording.

    For comparisons in float64 under ``DefaultFloat64`` only: elsewhere a factory would still make the dtype of the recording.
    """
    for state in regions(model).values():
        programs = {flags: _generic(program) for flags, program in state.plan.programs.items()}
        methods = {
            name: {flags: tuple(map(_generic, programs)) for flags, programs in modes.items()} for name, modes in state.plan.methods.items()
        }
        state.plan = replace(state.plan, programs=programs, methods=methods)
        state.compiled.clear()
        state.others.clear()
        state.adapted.clear()
        state.ready = state.current = None


def _generic(program: Program) -> Program:
    guard = replace(program.guard, generic_dtype=True, autocast=None)  # autocast leaves float64 alone
    return replace(program, graph=widened(program.graph), guard=guard)


def unfuse(model: nn.Module) -> nn.Module:
    """A new model of the original classes, with Parameters of its own; ``model`` is not changed.

    Values, requires_grad, training flags, the order of registration and attributes set since fusing stay. A model without
    fused regions is copied.

    >>> unfuse(nn.Linear(2, 3))
    Linear(in_features=2, out_features=3, bias=True)
    """
    copied = copy.deepcopy(model)
    loads_as_before(copied)
    for path in regions(copied):
        restore(cast(nn.Module, walk(copied, path)))
    return copied


def graphs(model: nn.Module) -> dict[str, torch.fx.GraphModule]:
    """By region path, the program of the current mode as a ``torch.fx.GraphModule`` that shares the region's tensors.

    Its inputs are the flattened arguments, its result is the flat list of outputs. Regions without a program for the
    current ``training`` flags are left out. Programs of other methods are there as ``"path.method()"``.
    """
    found: dict[str, torch.fx.GraphModule] = {}
    for path, state in regions(model).items():
        flags = state.flags()
        program = state.plan.programs.get(flags)
        if program is not None:
            found[path] = _graph_module(state, program)
        for name, modes in state.plan.methods.items():
            if name != "forward" and modes.get(flags):
                found[f"{path}.{name}()" if path else f"{name}()"] = _graph_module(state, modes[flags][0])
    return found


def _graph_module(state: RegionState, program: Program) -> torch.fx.GraphModule:
    graph = copy.deepcopy(program.graph)
    root: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            alias = state.aliases.get(node.target)
            root[node.target] = alias.tensor if alias is not None else source(state.region, node.target).fetch()
        elif node.op == "call_module":
            root[node.target] = walk(state.region, node.target)
    return graph_module(root, graph, type(state.region).__name__)
