"""Programs as functions: guard, fetch the weights, run the graph, shape the result.

Comes in: a ``graph.Program`` and a way to find its tensors and modules in the region. Goes out: ``run(args, kwargs)``, which
returns the region's result, or ``MISS`` where the guard does not hold. Tensors are looked up in their owner's dict at every
call (one dict lookup each), so that reassigned Parameters are seen and no stale weight is ever used; views of them are kept between
calls without grad, for as long as object, address, strides and conjugation are the same.
"""

from __future__ import annotations

import copy
import keyword
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx
from torch import nn

from fxfuse.errors import FxfuseError
from fxfuse.functional import untracked_view
from fxfuse.graph import Program
from fxfuse.private import pytree
from fxfuse.weights.alias import AliasPack
from fxfuse.weights.late_writes import watch

from .for_compilers import biases_apart
from .guards import Facts, compile_guard, explain_miss
from .spelling import Call, Spellings
from .weight_views import are_views, hoist


class _Miss:
    def __repr__(self) -> str:
        return "MISS"


MISS = _Miss()


@dataclass(frozen=True)
class Source:
    """Where a program's own tensor is found: ``getattr(owner, store)[name]``, or ``getattr(owner, name)`` without store."""

    owner: Any
    store: str | None
    name: str

    def fetch(self) -> Any:
        return getattr(self.owner, self.name) if self.store is None else getattr(self.owner, self.store)[self.name]


def walk(root: Any, path: str) -> Any:
    """The object at a dotted path: attributes of modules, indices of lists and tuples, keys of dicts.

    >>> walk(nn.ModuleList([nn.Linear(2, 3)]), "0.weight").shape
    torch.Size([3, 2])
    """
    here = root
    for part in path.replace("[", ".").replace("]", "").split(".") if path else ():
        if isinstance(here, list | tuple):
            here = here[int(part)]
        elif isinstance(here, dict):
            here = here[part] if part in here else here[next(key for key in here if str(key) == part.strip("'\""))]
        elif isinstance(here, nn.Module) and part in here._modules:
            here = here._modules[part]
        else:
            here = getattr(here, part)
    return here


def source(root: nn.Module, target: str) -> Source:
    """Where the tensor of a ``get_attr`` target is found at run time."""
    path, _, name = target.rpartition(".")
    owner = walk(root, path)
    if isinstance(owner, nn.Module):
        for store in ("_parameters", "_buffers"):
            if name in getattr(owner, store):
                return Source(owner, store, name)
    if isinstance(owner, list | tuple | dict):
        raise FxfuseError(f"{target} lies in a plain {type(owner).__name__}, where a program cannot look it up")
    getattr(owner, name)
    return Source(owner, None, name)


def apply_module(module: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a submodule that the program left as it was."""
    return module(*args, **kwargs)


def apply_under_autocast(kind: str, dtype: torch.dtype, module: Any, *args: Any, **kwargs: Any) -> Any:
    """The same, of a program that runs with its caller's autocast off."""
    with torch.autocast(kind, dtype=dtype):
        return module(*args, **kwargs)


@dataclass
class Compiled:
    """A program as a function, and what is needed to say why a call missed it."""

    run: Callable[[tuple[Any, ...], dict[str, Any]], Any]
    program: Program
    sources: list[tuple[str, Source]]
    facts: list[Facts]
    hold: Callable[[bool], None]
    spellings: Spellings = field(default_factory=Spellings)

    def rebound(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """The same call spelled as it was recorded (``f(x, mask=None)`` for ``f(x=x)``), None where it is another call."""
        positional, keywords = self.program.in_spec.children()
        names = keywords.context if keywords.num_children else ()
        if len(args) == positional.num_children and [*kwargs] == [*names]:
            return None
        if not torch.compiler.is_dynamo_compiling():  # nothing that it could trace: it finds what was looked up beside the trace
            self.spellings.look_up(forward, (positional.num_children, names), args, kwargs)
        spelling = self.spellings.of(args, kwargs)
        return None if spelling is None else spelling.respelled(args, kwargs)

    def fits(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Would ``run`` answer this call?"""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        return spec == self.program.in_spec and explain_miss(self.program.guard, leaves, self.facts, self._tensors()) is None

    def why(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Why ``run`` missed, in a sentence."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if spec != self.program.in_spec:
            return f"called with {_form(args, kwargs, leaves)}, recorded {_recorded_form(self.program.in_spec)}"
        reason = explain_miss(self.program.guard, leaves, self.facts, self._tensors())
        return reason or "the guard did not hold"

    def _tensors(self) -> list[Any]:
        return [place.fetch() for _, place in self.sources]


def compile_program(
    program: Program, root: nn.Module, facts_of: dict[str, Facts] | None = None, override: dict[str, Source] | None = None
) -> Compiled:
    """Generate the function of a program over the modules of ``root``.

    ``facts_of`` says what the program's own tensors were when it was made (else: what they are now); ``override`` gives the
    sources of targets that are not found by their path. Raises ``FxfuseError`` (or AttributeError) where the graph reads what
    the region does not have.
    """
    autocast = program.guard.autocast
    flat, places, modules = _flat_graph(program.graph, root, override or {}, autocast)
    inputs = [f"x{i}" for i in range(len(program.guard.leaves))]
    names = [node.name for node in flat.nodes if node.op == "placeholder"][len(inputs) : len(inputs) + len(places)]
    views = None if program.tracked else hoist(flat, set(names))  # views made without gradients have no history
    called = _tracked(program, _function(flat))
    traced = _tracked(program, _function(flat)) if biases_apart(flat) else None
    facts = [(facts_of or {}).get(name) or Facts.of(name, place.fetch()) for name, place in places]

    scope: dict[str, Any] = {
        "MISS": MISS,
        "graph": called,
        "traced": traced,
        "is_compiling": torch.compiler.is_compiling,
        "guard": compile_guard(program.guard, facts),
        "flatten": pytree.tree_flatten,
        "unflatten": pytree.tree_unflatten,
        "in_spec": program.in_spec,
        "out_spec": program.out_spec,
    }
    tensors, fetches = [], []
    owners: dict[int, str] = {}  # one name for each: dynamo asks at every call whether two still name one object
    for i, (_, place) in enumerate(places):
        owner = owners.setdefault(id(place.owner), f"owner{i}")
        scope[owner] = place.owner
        tensors.append(f"t{i}")
        if place.store is None:
            fetches.append(f"t{i} = getattr({owner}, {place.name!r})")
        else:
            fetches.append(f"t{i} = {owner}.{place.store}[{place.name!r}]")
    for i, module in enumerate(modules):
        scope[f"module{i}"] = module
    everything = [*inputs, *tensors]
    lines = ["def run(args, kwargs):"]
    positional, keywords = program.in_spec.children()
    opened = [_opened(positional, "args", 0, scope), _opened(keywords, "kwargs", positional.num_leaves, scope)]
    if None not in opened:
        lines.extend(f"    {line}" for part in opened for line in part or ())
    else:
        lines.append("    leaves, spec = flatten((args, kwargs))")
        lines.append("    if spec != in_spec: return MISS")
        lines.extend([f"    {', '.join(inputs)}, = leaves"] if inputs else [])
    lines.extend(f"    {line}" for line in _other_sizes(program, scope))
    if program.tracked and fetches:  # a pack of Parameters that stay has a history only where it is fetched with tracking on
        scope["enable_grad"] = torch.enable_grad
        lines.append("    with enable_grad():")
        fetches = [f"    {fetch}" for fetch in fetches]
    lines.extend(f"    {fetch}" for fetch in fetches)
    lines.append(f"    if not guard({', '.join(everything)}): return MISS")
    hold: Callable[[bool], None] = _nothing_to_hold
    made: list[str] = []
    if views is not None:
        read = [names.index(name) for name in views.reads]
        made = [f"v{i}" for i in range(len(views.names))]
        scope.update(make_views=_function(views.graph), is_grad_enabled=torch.is_grad_enabled)
        scope["is_tracing"] = torch.jit.is_tracing  # type: ignore[attr-defined]  # its graphs would hold the views as constants
        # Read as one tuple: another thread may be about to hold others. ``.data =`` keeps the object, and maybe the address.
        kept = [name for i in read for name in (f"held{i}", f"address{i}", f"stride{i}", f"conj{i}")]
        lines.append(f"    {', '.join([*kept, *made])}, = held")
        changed = [f"t{i} is not held{i}" for i in read] + [f"t{i}.data_ptr() != address{i}" for i in read]
        changed += [f"t{i}.stride() != stride{i}" for i in read if facts[i].shape]
        changed += [f"t{i}.is_conj() is not conj{i}" for i in read if facts[i].dtype.is_complex]
        lines.append(f"    if is_grad_enabled() or is_compiling() or is_tracing() or {' or '.join(changed)}:")
        lines.append(f"        {', '.join(made)}, = make_views(None, {', '.join(f't{i}' for i in read)})")
        hold = _holder(scope, [places[i][1] for i in read], len(made))
        hold(True)
    given = ["None", *everything, *(f"module{i}" for i in range(len(modules))), *made]
    call, compiled = (f"out = {name}({', '.join(given)})" for name in ("graph", "graph" if traced is None else "traced"))
    if autocast is None and traced is None:
        lines.append(f"    {call}")
    elif autocast is None:
        lines += [f"    if is_compiling(): {compiled}", f"    else: {call}"]
    else:  # the casts are in the graph; torch.autocast itself takes some microseconds, and only it can be traced
        scope.update(switch=torch.set_autocast_enabled, autocast=torch.autocast, kind=autocast[0])
        lines += ["    if is_compiling():", f"        with autocast(kind, enabled=False): {compiled}"]
        lines += ["    else:", "        switch(kind, False)", f"        try: {call}", "        finally: switch(kind, True)"]
    lines.extend(_watch(program, [place.owner for _, place in places], scope))
    if program.stores:
        lines.extend(_stores(program, root, scope))
    lines.append(f"    return {_result(program.out_spec)}")
    exec("\n".join(lines), scope)
    return Compiled(scope["run"], program, places, facts, hold)


def _other_sizes(program: Program, scope: dict[str, Any]) -> list[str]:
    """Leave calls of other sizes to the program that is faster there: asked first, since it takes a tenth of what the guard does."""
    asked: dict[tuple[int, int], list[str]] = {}
    for check in program.guard.sizes:
        if check.chosen:
            asked.setdefault((check.input, check.dim), []).append(f"size {check.op} {check.bound}")
    scope["Tensor"] = torch.Tensor
    lines = []
    for (index, dim), wanted in asked.items():
        lines.append(f"if isinstance(x{index}, Tensor) and x{index}.dim() > {dim}:")
        lines += [f"    size = x{index}.size({dim})", f"    if not ({' and '.join(wanted)}): return MISS"]
    return lines


def compile_graph(
    program: Program, root: nn.Module, override: dict[str, Source]
) -> tuple[Callable[..., Any], list[tuple[str, Source]], list[nn.Module]]:
    """A program for compilers, without its guard: ``function(None, *leaves, *tensors, *modules)``, its tensors' sources, its modules."""
    flat, places, modules = _flat_graph(program.graph, root, override, program.guard.autocast)
    biases_apart(flat)
    return _tracked(program, _function(flat)), places, modules


def _function(graph: torch.fx.Graph) -> Callable[..., Any]:
    """The graph as a function; its first argument is not used."""
    code = graph.python_code("self")
    space = dict(code.globals)
    exec(code.src, space)
    function: Callable[..., Any] = space["forward"]
    return function


def _tracked(program: Program, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of the program's graph with gradient tracking on, where the program asks for that."""
    if not program.tracked:
        return function

    def run(*args: Any) -> Any:
        asked = torch.is_grad_enabled()
        with torch.enable_grad():
            out = function(*args)
        if asked:
            return out
        cut = {id(out[i]): out[i].detach() for i in program.outside if isinstance(out[i], torch.Tensor)}
        cut.update((id(out[i]), untracked_view(out[i])) for i in program.viewed if isinstance(out[i], torch.Tensor))
        outside = {*program.outside, *program.viewed}
        return [cut[id(leaf)] if i in outside and id(leaf) in cut else leaf for i, leaf in enumerate(out)]

    return run


def _nothing_to_hold(wanted: bool) -> None:
    """For programs that make no views of weights."""


def _holder(scope: dict[str, Any], sources: list[Source], views: int) -> Callable[[bool], None]:
    """A function that makes the views of weights anew for calls without grad, or (False) lets go of them."""

    def hold(wanted: bool) -> None:
        nothing = [None] * (4 * len(sources) + views)
        scope["held"] = nothing  # first: members that lie apart move together only where nobody holds their memory
        tensors: tuple[Any, ...] = ()
        if wanted:
            with suppress(FxfuseError):  # members of an alias that no longer fit together: the call itself says so
                tensors = tuple(place.fetch() for place in sources)
        usable = bool(tensors) and all(type(t) in (torch.Tensor, nn.Parameter) for t in tensors) and not torch.compiler.is_compiling()
        made: tuple[torch.Tensor, ...] = ()
        if usable:
            with torch.inference_mode(False), torch.no_grad():
                made = scope["make_views"](None, *(tensor.detach() for tensor in tensors))
            usable = are_views(made, tensors)
        if usable:
            scope["held"] = (*(fact for t in tensors for fact in (t, t.data_ptr(), t.stride(), t.is_conj())), *made)

    for place in sources:
        if isinstance(place.owner, AliasPack):
            place.owner.readers.add(hold)
    return hold


def _flat_graph(
    graph: torch.fx.Graph, root: nn.Module, override: dict[str, Source], autocast: tuple[str, torch.dtype] | None
) -> tuple[torch.fx.Graph, list[tuple[str, Source]], list[nn.Module]]:
    """A copy of the graph whose tensors and submodules are placeholders, after the inputs and in this order."""
    flat = torch.fx.Graph()
    env: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            env[node] = flat.placeholder(node.name)
    places: dict[str, tuple[Source, torch.fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            if node.target not in places:
                place = override.get(node.target) or source(root, node.target)
                places[node.target] = (place, flat.placeholder(_name("tensor", len(places), node.target)))
            env[node] = places[node.target][1]
    modules: dict[str, tuple[nn.Module, torch.fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module" and node.target not in modules:
            if not isinstance(walk(root, node.target), nn.Module):
                raise FxfuseError(f"the program calls {node.target}, which is no module")
            modules[node.target] = (walk(root, node.target), flat.placeholder(_name("module", len(modules), node.target)))

    def copied(arg: torch.fx.Node) -> torch.fx.Node:
        return env[arg]

    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            continue
        args, kwargs = torch.fx.map_arg(node.args, copied), torch.fx.map_arg(node.kwargs, copied)
        if node.op == "output":
            flat.output(args[0])
        elif node.op == "call_module":
            apply, first = (apply_module, ()) if autocast is None else (apply_under_autocast, autocast)
            env[node] = flat.call_function(apply, (*first, modules[node.target][1], *args), kwargs)
        else:
            env[node] = flat.create_node(node.op, node.target, args, kwargs, node.name)
    return flat, [(name, place) for name, (place, _) in places.items()], [module for module, _ in modules.values()]


def graph_module(root: dict[str, Any], graph: torch.fx.Graph, class_name: str = "GraphModule") -> torch.fx.GraphModule:
    """``torch.fx.GraphModule``, which would write ``self.in`` for a child of that name; keywords get an underscore here."""

    def spelled(target: str) -> str:
        return ".".join(f"{part}_" if keyword.iskeyword(part) else part for part in target.split("."))

    odd = [target for target in root if spelled(target) != target]
    if odd:
        graph = copy.deepcopy(graph)
        for node in graph.nodes:
            if node.op in ("get_attr", "call_module"):
                node.target = spelled(node.target)
        root = {spelled(target): value for target, value in root.items()}
    return torch.fx.GraphModule(root, graph, class_name=class_name)


def _name(kind: str, number: int, target: str) -> str:
    """An argument's name, unlike any other's: a ModuleDict's keys may be ``C0+C1``, and ``a.b`` is not ``a_b``.

    >>> _name("tensor", 3, "nets.C0+C1.weight")
    'tensor_3_nets_C0_C1_weight'
    """
    return f"{kind}_{number}_{re.sub(r'[^a-zA-Z0-9]', '_', target)}"


def _opened(spec: Any, name: str, first: int, scope: dict[str, Any]) -> list[str] | None:
    """Lines that take the container ``name`` apart into the leaves ``x{first}`` and on, or return ``MISS``; None where pytree has to do it.

    Tuples, lists and dicts only, and of those no subclasses; the keys of a dict have to come in the order of the recording, as forward
    may go through them.
    """
    if spec.type not in (tuple, list, dict):
        return None
    parts = spec.children()
    if spec.type is dict and parts:
        keys = f"keys{len(scope)}"
        scope[keys] = list(spec.context)
        lines = [f"if [*{name}] != {keys}: return MISS"]
    else:
        lines = [f"if len({name}) != {len(parts)}: return MISS"]
    names, inner = [], []
    for number, part in enumerate(parts):
        names.append(f"x{first}" if part.is_leaf() else f"{name}_{number}")
        if not part.is_leaf():
            opened = _opened(part, names[-1], first, scope)
            if opened is None:
                return None
            inner += [f"if type({names[-1]}) is not {part.type.__name__}: return MISS", *opened]
        first += part.num_leaves
    if names:
        lines.append(f"{', '.join(names)}, = {name}{'.values()' if spec.type is dict else ''}")
    return lines + inner


def _watch(program: Program, owners: list[Any], scope: dict[str, Any]) -> list[str]:
    """Lines that have a backward ask what was written since to Parameters that stay in their modules, and lie in packs."""
    scope["aliases"] = [owner for owner in owners if isinstance(owner, AliasPack) and owner.recipe.kind == "parameter"]
    if not scope["aliases"]:
        return []
    scope.update(watch=watch, is_grad_enabled=torch.is_grad_enabled)
    asked = "not is_compiling()" if program.tracked else "is_grad_enabled() and not is_compiling()"
    return [f"    if {asked}: watch(out, [pair for alias in aliases for pair in alias.watched()])"]


def _stores(program: Program, root: nn.Module, scope: dict[str, Any]) -> list[str]:
    """Lines that set the attributes that forward sets, and leave the result alone in ``out``. Not by ``setattr``, which is watched."""
    lines: list[str] = []
    at = program.out_spec.num_leaves
    for i, store in enumerate(program.stores):
        scope[f"keeper{i}"], scope[f"kept_spec{i}"] = walk(root, store.module), store.spec
        until = at + store.spec.num_leaves
        value = f"out[{at}]" if store.spec.is_leaf() else f"unflatten(list(out[{at}:{until}]), kept_spec{i})"
        lines.append(f"    keeper{i}.__dict__[{store.name!r}] = {value}")
        at = until
    return [*lines, f"    out = out[:{program.out_spec.num_leaves}]"]


def _result(spec: Any) -> str:
    """The expression that makes the region's result of the flat list of outputs."""
    if spec.is_leaf():
        return "out[0]"
    if all(child.is_leaf() for child in spec.children()):
        if spec.type is tuple:
            return "tuple(out)"
        if spec.type is list:
            return "list(out)"
    return "unflatten(list(out), out_spec)"


def _form(args: tuple[Any, ...], kwargs: dict[str, Any], leaves: list[Any]) -> str:
    return _words(len(args), list(kwargs), len(leaves))


def _recorded_form(spec: Any) -> str:
    args, kwargs = spec.children()
    return _words(args.num_children, list(kwargs.context), spec.num_leaves)


def _words(positional: int, keywords: list[str], leaves: int) -> str:
    text = f"{positional} positional argument{'' if positional == 1 else 's'}"
    if keywords:
        text += f" and {', '.join(map(str, keywords))}"
    return f"{text} ({leaves} values)"
