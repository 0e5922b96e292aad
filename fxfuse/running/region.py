"""A fused region at run time: the class that a region's module becomes, and the state it carries.

Comes in: calls. Goes out: what the packed program gives, where its guard holds; else what the class's own original forward gives, whose
lanes read the pack through views, and the reason why. State dicts go in and out in either naming.
"""

from __future__ import annotations

import copy
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeGuard
from weakref import ref

import torch
import torch.fx
from torch import Tensor, nn

from fxfuse.distributed.loading import fit_sharded
from fxfuse.distributed.packs import LocalPack, gathered_once
from fxfuse.distributed.sharding import Sharding
from fxfuse.errors import FallbackError, FxfuseError
from fxfuse.graph import Program, RegionPlan
from fxfuse.models.held import Held, Kept, resolved
from fxfuse.models.module_tree import all_modules
from fxfuse.models.sharded import gathered, is_sharded, shared_as
from fxfuse.private.autocast import any_autocast_enabled
from fxfuse.private.module_hooks import CALL_HOOKS, hooks_for_all
from fxfuse.private.state_dicts import versions_of
from fxfuse.weights.alias import AliasPack, StaleAlias
from fxfuse.weights.all_or_nothing import all_or_nothing, refitted
from fxfuse.weights.lane import LaneMixin, Slot, Watch, attribute_of, lane_info, saving_by_original_name, shared_views
from fxfuse.weights.own_buffers import own_buffers
from fxfuse.weights.parts import fit_parts
from fxfuse.weights.recipes import clear_filling, lane_view, pack, packed_shape, unpack
from fxfuse.weights.saved_recipes import NOTE, note_of, packs_in, unpack_region

from .entries import FORWARD
from .first_of import always_miss, first_of
from .guards import Facts
from .runtime import MISS, Compiled, Source, compile_program, source
from .serialize import program_from_data, program_to_data
from .surroundings import Around, Piece
from .unread import unread
from .while_traced import count_while_traced, prepare_while_traced

STATE = "_fxfuse"  # the key in a region's __dict__ under which its RegionState lies
_HOOKS_FOR_ALL = "a hook for all modules is registered"
_MOST_REASONS = 100  # reasons hold shapes: a run over endless shapes must not fill the memory


def _unsaved() -> dict[str, Any]:
    """What a state has before its first call: never copied or saved."""
    return {
        "ready": None, "current": None, "compiled": {}, "methods": {}, "others": {}, "loading": None, "holders": None,
        "adapted": {}, "unfit": {}, "around": None, "renewed": None, "traced_reason": "", "traced_by": None,
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
    adapted: dict[tuple[str, tuple[bool, ...]], list[Compiled]] = field(default_factory=dict)  # made at calls; never saved
    unfit: dict[Any, list[str]] = field(default_factory=dict)  # of the calls that none was made for, why; never copied or saved
    traced_reason: str = ""  # why the call that dynamo traces now runs the loop; never copied or saved
    traced_by: ref[Any] | None = None  # the trace of dynamo's in which it was called last; never copied or saved
    extra: dict[str, Tensor] = field(default_factory=dict)  # index tensors that those made later read
    inside: list[Piece] = field(default_factory=list)  # what lies in objects that the modules hold, at installation
    around: Around | None = None  # compares that, and ``plan.outside``, at every call; None: there is nothing
    renewed: frozenset[str] | None = None  # ``written_packs``, found once; never copied or saved
    children: list[list[tuple[str, int]]] | None = None  # of each module, at installation
    sharding: Sharding | None = None  # its lanes are divided among processes
    holders: list[dict[str, Any]] | None = None  # the ``_parameters`` of all modules, for as long as none comes or goes

    @property
    def region(self) -> nn.Module:
        """The region itself."""
        return self.modules[0]

    def unread(self, path: str, module: nn.Module, name: str) -> bool:
        """Is an attribute that is set on a module of the region one that no program rests on?"""
        if not path and name == "forward":
            # Who replaces the forward of the region itself is asked first; where it then comes here, it wants the class's own.
            return not self.plan.methods.keys() - {FORWARD}
        plan = self.__dict__.get("plan")  # none while this is unpickled: modules set attributes then
        return plan is None or unread(plan.spelled, module, name)

    def moved(self) -> None:
        """The memory of the old weights is let go of."""
        for compiled in (*self.compiled.values(), *(each for others in self.others.values() for each in others)):
            compiled.hold(False)
        self.adapted.clear()
        self.unfit.clear()
        if self.extra:  # in a trial, a program made later is the plan's only one
            read = {str(node.target) for program in self.plan.all_programs() for node in program.graph.find_nodes(op="get_attr")}
            self.extra = {name: tensor for name, tensor in self.extra.items() if name in read}
        self.ready = None

    def removed(self, region: nn.Module) -> None:
        """Called when the region is an ordinary module again: take the pack and this state out of it."""
        if self.holder is not None:
            region._modules.pop(self.holder, None)
        region.__dict__.pop(STATE, None)

    def members(self) -> Iterator[nn.Module]:
        """All modules that were given a generated class."""
        yield from self.modules
        yield from self.hidden

    def slots(self) -> Iterator[Slot]:
        """Where the tensors of all lanes lie."""
        for module in self.members():
            yield from _slots(module).values()

    def written_packs(self) -> frozenset[str]:
        """The packed buffers whose last values a program writes when all else has run: what forward writes or assigns."""
        if self.renewed is None:
            found: set[str] = set()
            for program in self.plan.all_programs():
                for node in program.graph.find_nodes(op="call_method", target="copy_"):
                    while node.op != "get_attr" and node.all_input_nodes:
                        node = node.all_input_nodes[0]
                    found.add(str(node.target))
            self.renewed = frozenset(found)
        return self.renewed

    def __getstate__(self) -> dict[str, Any]:
        if self.sharding is not None:
            raise FxfuseError(
                "a model whose lanes are divided among processes cannot be pickled: save fxfuse.original_state_dict(model), or its"
                " state_dict() with torch.distributed.checkpoint"
            )
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
        if self.around is None and (self.inside or self.plan.outside):
            self.around = Around([*self.inside, *self.plan.outside])
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
            self.ready = always_miss if self.plan.methods else None
            return self._unknown_flags(flags)
        compiled = self.compiled.get(flags)
        if compiled is None:
            compiled = self.compiled[flags] = self.compile(program)
        else:
            compiled.hold(True)
        further = self.methods.get("forward")
        self.current, self.ready = compiled, first_of([compiled, *(further or ())])
        return compiled

    def adapt(self, name: str, program: Compiled, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[bool, str]:
        """Make a program for a call that none fits, under autocast or of inputs that lie otherwise. Returns whether there is one now, and
        why none fitted: ``program`` was the last that was asked.
        """
        from fxfuse.building.adapt import adapt  # imports this file

        reason = program.why(args, kwargs)
        if torch.compiler.is_compiling():  # exported: there are no numbers to compare
            return False, reason
        if self.sharding is not None:  # what is made now would be over all lanes
            late = ", and lanes that are divided among processes are not made anew under autocast" if any_autocast_enabled() else ""
            return False, reason + late
        said = adapt(self, name, args, kwargs)
        if said is None:
            self.prepare()
            return True, reason
        return False, f"{reason}{said and ', and '}{said}"

    def compile(self, program: Program, facts: dict[str, Facts] | None = None) -> Compiled:
        """The program as a function over the tensors of this region. ``facts``: what is assumed of them (default: as installed)."""
        return compile_program(self.resolved(program), self.region, self.facts if facts is None else facts, self.sources())

    def sources(self) -> dict[str, Source]:
        """Where the tensors of programs are found that do not lie at their path in the region."""
        elsewhere = {name: Source(alias, None, "tensor") for name, alias in self.aliases.items()}
        elsewhere.update((name, Source(self, "extra", name)) for name in self.extra)
        for name in self.sharding.sharded if self.sharding is not None else ():
            place = source(self.region, name)
            elsewhere[name] = Source(LocalPack(place.owner, str(place.store), place.name), None, "tensor")
        return elsewhere

    def resolved(self, program: Program) -> Program:
        """The program with the objects that its guard asks for, as they are in this model."""
        return resolved(program, self.objects)

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
        if self.children is not None and children_of(self.modules) != self.children:
            return "a submodule was registered once more, or under another name"
        for (path, name), (existed, before) in self.written.items():
            module = next((m for m in self.members() if (info := lane_info(m)) is not None and info.path == path), None)
            if module is not None and not _unchanged(module, name, existed, before):
                return f"attribute {f'{path}.{name}' if path else name} was set after fusing"
        if hooks_of([*self.modules, *self.hidden]) != self.hooks:
            return "a hook was registered on a submodule"
        if tuple(module.training for module in self.hidden) != self.hidden_flags:
            return "an unregistered submodule changed its training flag"
        elsewhere = self.sources() if self.sharding is not None else {}
        for target, fact in self.facts.items():
            if target in self.aliases or target in self.extra:
                continue
            try:
                tensor = (elsewhere.get(target) or source(self.region, target)).fetch()
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


def _unchanged(module: nn.Module, name: str, existed: bool, before: Any) -> bool:
    own = module.__dict__
    present = name in own or hasattr(type(module), name)
    if not present or not existed:
        return present is existed
    now = attribute_of(module, name)
    if now is before:
        return True
    plain = (bool, int, float, str, bytes, torch.dtype, torch.device)
    return type(now) is type(before) and isinstance(now, plain) and bool(now == before)


def hooks_of(modules: list[nn.Module]) -> tuple[Any, ...]:
    """The hooks of a region's submodules (those of the region itself run in its ``__call__``, program or not)."""
    return tuple(
        (index, name, tuple(module.__dict__[name]))
        for index, module in enumerate(modules)
        if index > 0
        for name in CALL_HOOKS
        if module.__dict__.get(name)
    )


def _takes_writes(tensor: Any) -> TypeGuard[Tensor]:
    """Is this memory that may be written here? What was made in inference mode may not outside of it, and has its numbers."""
    if type(tensor) is not Tensor or tensor.is_meta:
        return False
    return not tensor.is_inference() or torch.is_inference_mode_enabled()


class RegionMixin(LaneMixin):
    """A region: a lane module (it may own packed tensors itself) whose forward runs the packed program."""

    __slots__ = ()

    def _fxfuse_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state: RegionState = self.__dict__[STATE]
        if torch.compiler.is_dynamo_compiling():
            prepare_while_traced(state, FORWARD, args, kwargs)
        run = state.ready
        reason = "the region changed since its last call, and this one is traced"
        if run is None and not torch.compiler.is_dynamo_compiling():
            prepared = state.prepare()
            run, reason = (None, prepared) if isinstance(prepared, str) else (state.ready, "")
            if torch.compiler.is_compiling():  # exported, on weights without data: views of them are no use to the calls that follow
                state.ready = None
        if hooks_for_all():
            run, reason = None, _HOOKS_FOR_ALL
        if run is not None and state.around is not None and (changed := state.around.changed()):
            run, reason = None, changed
        if run is not None:
            try:
                out = run(args, kwargs)
                if out is not MISS:
                    return out
                current = state.current  # another thread may be about to prepare
                reason = "the guard did not hold" if current is not None else state._unknown_flags(state.flags())
                again = current.rebound(self._fxfuse_base.forward, args, kwargs) if current is not None else None
                if again is not None and (out := run(*again)) is not MISS:
                    return out
                if current is not None and not torch.compiler.is_dynamo_compiling():
                    reason, out = self._fxfuse_adapted(state, FORWARD, current, *(again or (args, kwargs)))
                    if out is not MISS:
                        return out
            except StaleAlias as stale:
                reason = str(stale)
        return self._fxfuse_fall_back(state, reason, args, kwargs)

    def _fxfuse_method(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As ``_fxfuse_forward``, for another method of the region that holds a loop."""
        state: RegionState = self.__dict__[STATE]
        if torch.compiler.is_dynamo_compiling():
            prepare_while_traced(state, name, args, kwargs)
        ready, reason = state.ready, "the region changed since its last call, and this one is traced"
        if ready is None and not torch.compiler.is_dynamo_compiling():
            prepared = state.prepare()
            ready, reason = state.ready, prepared if isinstance(prepared, str) else ""
            if torch.compiler.is_compiling():  # exported: see above
                state.ready = None
        if hooks_for_all():
            reason = _HOOKS_FOR_ALL
        elif ready is not None and state.around is not None and (changed := state.around.changed()):
            reason = changed
        elif ready is not None:
            programs = state.methods[name]
            mode = {True: "train", False: "eval"}.get(self.training)
            reason = "the guard did not hold" if programs else f"no program was recorded in {mode} mode"
            try:
                for program in programs:
                    out = program.run(args, kwargs)
                    if out is not MISS:
                        return out
                    again = program.rebound(getattr(self._fxfuse_base, name), args, kwargs)
                    if again is not None and (out := program.run(*again)) is not MISS:
                        return out
                if programs and not torch.compiler.is_dynamo_compiling():
                    reason, out = self._fxfuse_adapted(state, name, programs[-1], *(again or (args, kwargs)))
                    if out is not MISS:
                        return out
            except StaleAlias as stale:
                reason = str(stale)
        return self._fxfuse_fall_back(state, reason, args, kwargs, name)

    def _fxfuse_adapted(
        self, state: RegionState, name: str, program: Compiled, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[str, Any]:
        """A call that no program fits, by one made for it now; or why not, the last one being ``program``, and ``MISS``."""
        made, reason = state.adapt(name, program, args, kwargs)
        return reason, first_of(state.methods[name])(args, kwargs) if made else MISS

    def _fxfuse_fall_back(
        self, state: RegionState, reason: str, args: tuple[Any, ...], kwargs: dict[str, Any], method: str = "forward"
    ) -> Any:
        reason = reason if method == "forward" else f"{method}: {reason}"
        if state.strict:
            raise FallbackError(f"{state.plan.path or type(self).__name__} would run its loop: {reason}")
        forward = getattr(self._fxfuse_base, method)
        if torch.compiler.is_dynamo_compiling():
            count_while_traced(state, reason)
            return forward(self, *args, **kwargs)
        with _counting:
            known = reason in state.fallbacks or len(state.fallbacks) < _MOST_REASONS
            state.fallbacks[reason if known else "other reasons"] += 1
        if torch.compiler.is_compiling():  # exported: no caches
            return forward(self, *args, **kwargs)
        # Methods may call forward, and that a program, which reads the pack itself.
        own = nullcontext() if state.plan.methods.keys() - {FORWARD} else own_buffers(state.written_packs())
        with shared_views(), gathered_once(), _in_the_loop(state), own:
            return forward(self, *args, **kwargs)

    def train(self, mode: bool = True) -> Any:
        """As of any module. Looks for the program at once, so that torch.compile finds it ready."""
        result = super().train(mode)
        self.__dict__[STATE].prepare()
        return result

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As of any module (``to``, ``half``, ``cuda``): the memory of the old weights is let go of. What the program alone reads is in no
        state dict that would fill it again after ``to_empty``."""
        result = super()._apply(fn, recurse)
        state: RegionState = self.__dict__[STATE]
        state.moved()
        if recurse and state.sharding is None:
            for name in state.extra:
                state.extra[name] = fn(state.extra[name])
            for name, known in state.plan.constants.items():
                with suppress(AttributeError, FxfuseError), torch.no_grad():  # the child that holds it may have been removed
                    constant = state.extra.get(name) if state.packing == "alias" else source(self, name).fetch()
                    if constant is not known and _takes_writes(constant):
                        constant.copy_(known)
            for recipe in state.plan.recipes if state.packing != "alias" else ():
                with suppress(AttributeError, FxfuseError), torch.no_grad():
                    packed = source(self, recipe.name).fetch().data  # a backward that is still to come finds it as it was
                    if _takes_writes(packed):
                        clear_filling(recipe, packed)
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

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As any module's. One of packed names carries the recipes in its metadata, where torch notes the versions of modules."""
        state: RegionState = self.__dict__[STATE]
        with gathered_once():
            saved = super().state_dict(*args, **kwargs)
        versions = versions_of(saved)
        if versions is not None and state.packing == "packed" and not (state.original_names or saving_by_original_name()):
            path = str(args[1] if len(args) > 1 else kwargs.get("prefix", ""))[:-1]
            versions.get(path, {})[NOTE] = note_of(self, state.plan)
        return saved

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As any module's; a state dict that does not fit changes nothing."""
        with all_or_nothing(self):
            return super().load_state_dict(*refitted(self, *args), **kwargs)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        state: RegionState = self.__dict__[STATE]
        metadata, missing = rest[0], rest[2]
        note = metadata.get(NOTE)
        if note is not None and packs_in(note) != {recipe.name for recipe in state.plan.recipes}:  # plans differ with the machine
            unpack_region(prefix[:-1], note, state_dict)
        if state.packing == "packed":
            fit_parts(state.plan, state_dict, prefix)
        if state.sharding is not None:
            fit_sharded(state, state_dict, prefix)
        packed = any(prefix + recipe.name in state_dict for recipe in state.plan.recipes)
        if not packed and state.packing == "packed" and any(is_sharded(slot.packed()) for slot in state.slots()):
            packed = _share_keys(state, state_dict, prefix, missing, rest[4])
        if not packed and state.packing == "packed" and metadata.get("assign_to_params_buffers", False):
            packed = _pack_keys(state, state_dict, prefix)
        if state.packing == "alias":
            _unpack_keys(state, state_dict, prefix)
            packed = True  # nothing is a view: the lanes load as any module does
        state.loading = (missing, not packed)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _names_of_lanes(state: RegionState, prefix: str) -> dict[tuple[str, int], list[str]]:
    """By pack and lane, the original's keys for it: several where it is tied."""
    names: dict[tuple[str, int], list[str]] = {(slot.recipe.name, slot.index): [] for slot in state.slots()}
    for path, module in state.region.named_modules(remove_duplicate=False):
        for name, slot in _slots(module).items():
            names[(slot.recipe.name, slot.index)].append(prefix + (f"{path}.{name}" if path else name))
    return names


def _share_keys(state: RegionState, state_dict: Any, prefix: str, missing: list[str], errors: list[str]) -> bool:
    """Replace the original keys by packed ones, laid out over the processes as the packs are: a lane's view cannot be written there."""
    names = _names_of_lanes(state, prefix)
    if not any(key in state_dict for keys in names.values() for key in keys):
        return False
    packs = {slot.recipe.name: (slot.recipe, slot.packed()) for slot in state.slots()}
    with torch.no_grad():
        for recipe, packed in packs.values():
            full = gathered(packed).clone()
            for index in range(len(recipe.members)):
                keys = names[(recipe.name, index)]
                missing += [key for key in keys if key not in state_dict]
                for key in (key for key in keys if key in state_dict):
                    given = state_dict.pop(key)
                    if not isinstance(given, Tensor) or tuple(given.shape) != recipe.member_shape(index):
                        said = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
                        errors.append(f"size mismatch for {key}: {said} in the checkpoint, the model has {recipe.member_shape(index)}")
                    else:
                        lane_view(recipe, full, index).copy_(gathered(given))
            state_dict[prefix + recipe.name] = shared_as(full, packed)
    return True


def _pack_keys(state: RegionState, state_dict: Any, prefix: str) -> bool:
    """Replace the original keys by packed ones where all are there and fit: ``assign=True`` then takes over dtype and device."""
    names = _names_of_lanes(state, prefix)
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
    skip = set() if holder is None else set(all_modules(holder))
    return [module for module in all_modules(region) if module not in skip]


def children_of(modules: list[nn.Module]) -> list[list[tuple[str, int]]]:
    """Of each of these, the names of its children that are among them, and their places: one module may be registered more than once."""
    places = {module: place for place, module in enumerate(modules)}
    return [[(name, places[child]) for name, child in module._modules.items() if child in places] for module in modules]


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
