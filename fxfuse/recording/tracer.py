"""Record one real run of a model: every torch call, every module call, every size that Python looked at.

Comes in: a model (a private copy) and its inputs. Goes out: a ``Trace``. Any Python runs, because nothing is replaced by proxies: a
``TorchFunctionMode`` watches the real tensors of one eager call. Where Python reads data out of a tensor (``bool(t)``, ``.item()``), runs
without gradient tracking (a custom autograd Function, ``no_grad``) or otherwise does what a graph cannot repeat, the event is
marked (``Event.poison``): a region must not contain it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fxfuse.models.contents import Contents
from fxfuse.models.determinism import preserved_state
from fxfuse.models.internal_files import is_internal
from fxfuse.models.module_tree import named_modules
from fxfuse.models.unregistered import hidden_parameters, unregistered
from fxfuse.private.module_hooks import has_hooks
from fxfuse.private.pytree import tree_flatten

from .attributes import settle, watching
from .casts import casts_not_kept
from .idle_draws import idle_draws_unseen
from .kept_memory import KeptMemory
from .outside import Change, Generators, Globals, drawing, draws_itself, line_of_attribute
from .recorder import Recorder, run_watched
from .trace import Key, Trace
from .watched_module import WatchedModule


@contextmanager
def _watched(model: nn.Module, args: Any, kwargs: Any, keys: frozenset[Key]) -> Iterator[Recorder]:
    """Every module's forward reports to the recorder, and so do the attributes ``keys``; afterwards everything is as it was, and frames of
    changed modules are marked."""
    attributes: dict[int, str] = {}
    generators: list[Any] = []
    modules = dict(named_modules(model))
    buffers = {(path, name) for path, name in keys if path in modules and name in vars(modules[path]).get("_buffers", ())}
    holders = {path for path, _ in buffers}
    watched = [WatchedModule(path, module, attributes, generators, path in holders) for path, module in modules.items()]
    hidden: dict[str, nn.Parameter] = {}
    beside = list(unregistered(model))
    hooked = [(path, module) for path, module in beside if has_hooks(module)]  # they run while recording, a fused forward calls none
    if not hooked:
        hidden = hidden_parameters(model, beside)
        for path, parameter in hidden.items():
            attributes.setdefault(id(parameter), path)
    recorder = Recorder(attributes)
    recorder.trace.unregistered = frozenset(hidden)
    recorder.generators = Generators(generators)
    leaves = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    recorder.kept = KeptMemory(leaves, watched)
    objects: dict[int, tuple[Contents, list[tuple[str, str]]]] = {}  # by id: what it holds, and which attributes of which modules it is
    for each in watched:
        for name, value in each.objects:
            if id(value) not in objects:
                objects[id(value)] = (Contents((value,)), [])
            objects[id(value)][1].append((each.path, name))
    tellers = []
    try:
        tellers += [module.register_forward_pre_hook(partial(_tell, recorder, path)) for path, module in hooked]
        for each in watched:
            each.start(recorder)
        for leaf in leaves:
            if id(leaf) not in recorder.known:
                recorder.add(leaf, "input")
        with watching(modules, keys - buffers, recorder.touch):
            yield recorder
    finally:
        for teller in tellers:
            teller.remove()
        stopped = {each.path: each.stop() for each in watched}
        recorder.kept.restore()
        final: dict[Key, Any] = {(path, name): value for path, (_, found, _) in stopped.items() for name, value in found.items()}
        recorder.trace.changed = {*final, *((path, name) for path, (_, _, names) in stopped.items() for name in names)}
        explained = settle(recorder.trace, recorder.describe, final) if keys else set()
        changed = {path: name for path, name in final if (path, name) not in explained}
        changed.update((path, name) for path, (name, _, _) in stopped.items() if name)
        for contents, holding in objects.values():
            if contents.changed():
                contents.restore()
                changed.update(holding)
        if changed:
            _mark_changed(recorder.trace, changed)


def _tell(recorder: Recorder, path: str, *_: Any) -> None:
    """A module that nobody registered, and that has hooks, is called: whoever calls it has to go on doing so."""
    for index in recorder.stack[-1:]:
        frame = recorder.trace.frames[index]
        frame.poison = frame.poison or f"calls {path}, which has hooks and is registered nowhere"


def _mark_changed(trace: Trace, changed: dict[str, str]) -> None:
    """Close the calls of modules that the run changed: what they did to themselves, a graph does not repeat.

    A module that no call of its own changed was changed by one around it, or so it must be taken.
    """
    alone = {frame.path for frame in trace.frames if frame.sets_own}
    around: dict[str, str] = {}
    for path, name in changed.items():
        if path not in alone:
            parts = path.split(".") if path else []
            for length in range(len(parts)):
                around.setdefault(".".join(parts[:length]), f"{path}.{name}")
    for frame in trace.frames:
        found = changed.get(frame.path) or around.get(frame.path)
        if found and not frame.poison:
            name = found.removeprefix(f"{frame.path}.")
            frame.poison, frame.place = f"forward changes self.{name}", line_of_attribute(frame.module, name) or frame.place


def record(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], keys: frozenset[Key] = frozenset()) -> Trace:
    """Run ``model(*args, **kwargs)`` once under watch. Leaves no trace: the values of parameters, buffers and inputs, random state,
    attributes, hooks and grad mode stay as they were. ``keys``: attributes whose every read and write is noted.

    A run that raises gives a ``Trace`` whose ``failure`` says why.
    """
    before = around = Globals(model)
    trace, generators = _recorded(model, args, kwargs, keys)
    if around.changes():  # a cache is filled once, and then it is read: that is the run that counts
        around = Globals(model)
        trace, generators = _recorded(model, args, kwargs, keys)
    changes = around.changes()
    if changes:
        before.restore()
    if generators is not None:
        changes += _draws(model, args, kwargs, generators)
    for change in changes:
        touched = [f for f in trace.frames if f.module is change.module or type(f.module) is change.kind] or trace.frames[:1]
        for frame in touched:
            if not frame.poison:
                frame.poison, frame.place = change.reason, change.place or frame.place
    return trace


def _recorded(model: nn.Module, args: Any, kwargs: Any, keys: frozenset[Key]) -> tuple[Trace, Generators | None]:
    """One run under watch, and the random generators, where it drew from any."""
    found = _recorded_once(model, args, kwargs, keys, late=True)
    return _recorded_once(model, args, kwargs, keys, late=False) if found[0].failure else found


def _recorded_once(model: nn.Module, args: Any, kwargs: Any, keys: frozenset[Key], late: bool) -> tuple[Trace, Generators | None]:
    moved, given = False, Contents((*args, *kwargs.values()))
    with _undisturbed(model, args, kwargs, keys, late) as recorder, recorder.generators.preserved():
        before = recorder.generators.states()
        try:
            run_watched(recorder, model, args, kwargs)
        except Exception as error:  # the user's model: anything can come
            recorder.trace.failure = f"{type(error).__name__}: {error}".splitlines()[0]
            if recorder.kept is not None and any(each.hooks for each in recorder.kept.watched):
                recorder.trace.failure += ", without its hooks, which do not run while it is recorded"
        finally:
            given.restore()
        moved = recorder.generators.states() != before
    return recorder.trace, recorder.generators if moved else None


@contextmanager
def _undisturbed(
    model: nn.Module, args: Any, kwargs: Any, keys: frozenset[Key] = frozenset(), late: bool = True
) -> Iterator[Recorder]:
    """``late``: random numbers that decide nothing are not drawn."""
    watched, modes = _watched(model, args, kwargs, keys), (torch.enable_grad(), torch.inference_mode(False))
    with preserved_state(model), watched as recorder, modes[0], modes[1], casts_not_kept(), idle_draws_unseen(late):
        yield recorder


def _draws(model: nn.Module, args: Any, kwargs: Any, generators: Generators) -> list[Change]:
    """Where the model draws from them."""

    def again() -> None:
        with suppress(Exception):  # it is recorded as a failure already
            model(*args, **kwargs)

    with _undisturbed(model, args, kwargs), generators.preserved():
        return drawing(generators, lambda file: is_internal(file) or draws_itself(file), again)
