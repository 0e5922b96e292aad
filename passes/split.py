"""Which values of a program can be divided among processes, lane by lane, and how each op computes one process's part.

Comes in: a program's graph, and how its packs are divided. Goes out: ``Step``s, one per node: computed of everything, on every process
alike, or of this process's part. Nothing here knows what an op means. Each is *tried*: the graph runs once on random numbers, and for each
op that reads a divided value the part is computed as it would be (operands that all have cut or whole, sizes in its arguments scaled) and
compared with the part of the whole result, for every process. An op for which no way gives the right numbers gets all lanes, gathered.
This is sharding propagation as in GSPMD (Xu et al., 2021), with trials in place of a rule per op.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor

Node = torch.fx.Node
Path = tuple[Any, ...]

MOST_TRIES = 1500
# Ops whose random numbers are drawn element by element, or channel by channel, for one tensor: of a part as of the whole.
_DRAWS = (F.dropout, F.alpha_dropout, F.rrelu, torch.bernoulli, torch.rand_like, torch.randn_like, torch.dropout)


@dataclass(frozen=True)
class Split:
    """Process ``r`` has the entries ``starts[r]`` to ``starts[r + 1]`` (excluded) of a tensor's dim ``dim``."""

    dim: int
    starts: tuple[int, ...]

    def part(self, tensor: Tensor, rank: int) -> Tensor:
        """The part of one process: a view."""
        return tensor.narrow(self.dim, self.starts[rank], self.starts[rank + 1] - self.starts[rank])


@dataclass(frozen=True)
class Step:
    """How one node is computed. ``own`` False: of whole values, by all alike. Else of this process's part:

    ``cuts``: operands that all have, of which each process takes its part; ``sizes``: numbers in the arguments, by their place, one for
    each process; ``shifts``: operands that hold row numbers, and of which row each process's table begins. ``result``: how the result is
    divided (None: it is no lane's, as a size; a tuple for several results). ``total``: the results of all processes have to be added.
    ``draws``: it draws random numbers.
    """

    own: bool = False
    cuts: tuple[tuple[Node, Split], ...] = ()
    sizes: tuple[tuple[Path, tuple[int, ...]], ...] = ()
    shifts: tuple[tuple[Node, tuple[int, ...]], ...] = ()
    result: Any = None
    total: bool = False
    draws: bool = False


def alike(one: Step, other: Step) -> bool:
    """Is a node computed in one way at two batch sizes? Where lanes lie beside rows in one dim, parts are as long as the batch says."""
    if (one.own, one.sizes, one.shifts, one.total, one.draws) != (other.own, other.sizes, other.shifts, other.total, other.draws):
        return False
    if [node for node, _ in one.cuts] != [node for node, _ in other.cuts]:
        return False
    results = [step.result if isinstance(step.result, tuple) else (step.result,) for step in (one, other)]
    pairs = [*zip(*results, strict=True), *((a, b) for (_, a), (_, b) in zip(one.cuts, other.cuts, strict=True))]
    return all(_proportional(a, b) for a, b in pairs)


def _proportional(one: Split | None, other: Split | None) -> bool:
    if one is None or other is None or one == other:
        return one == other
    total, whole = one.starts[-1], other.starts[-1]
    if any(a == b for a, b in itertools.pairwise(one.starts)):  # of a part without entries nothing can be scaled
        return False
    return one.dim == other.dim and all(a * whole == b * total for a, b in zip(one.starts, other.starts, strict=True))


class CannotSplit(Exception):
    """The region stays whole on every process; the message says why."""


@dataclass
class Trial:
    """One run of a graph on given tensors. ``call(node, args, kwargs)`` computes a node; ``packs``: how packed tensors are divided."""

    graph: torch.fx.Graph
    world: int
    packs: dict[str, Split]
    call: Callable[[Node, Any, Any], Any]
    values: dict[Node, Any] = field(default_factory=dict)  # of placeholders and get_attr nodes to begin with
    steps: dict[Node, Step] = field(default_factory=dict)
    splits: dict[Node, Any] = field(default_factory=dict)
    tensors: set[Node] = field(default_factory=set)
    floating: set[Node] = field(default_factory=set)

    def run(self) -> None:
        """Try every node in turn."""
        for node in self.graph.nodes:
            if node.op == "output":
                break
            if node.op == "get_attr":
                self.splits[node] = self.packs.get(str(node.target))
            elif node.op != "placeholder":
                self._try(node)
            value = self.values[node]
            if isinstance(value, Tensor):
                self.tensors.add(node)
                if value.is_floating_point() or value.is_complex():
                    self.floating.add(node)

    def _try(self, node: Node) -> None:
        divided = [n for n in node.all_input_nodes if self.splits.get(n) is not None]
        given = {n: _cloned(self.values[n]) for n in node.all_input_nodes}
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), given.__getitem__)
        whole = self.call(node, args, kwargs)
        written = [n for n in node.all_input_nodes if not _equal(given[n], self.values[n])]
        for n in written:
            if n.op != "get_attr" and len(n.users) > 1:
                raise CannotSplit(f"{_name(node)} writes into a value that is read elsewhere")
        step = Step()
        if divided:
            if node.target is not getattr and node.op != "call_module":
                step = next((found for found in self._ways(node, whole, given, written) if found is not None), step)
            if not step.own and any(self.splits.get(n) is not None and n.op != "get_attr" for n in written):
                raise CannotSplit(f"{_name(node)} writes into lanes of several processes")
        self.steps[node], self.splits[node] = step, None if step.total else step.result
        for n in written:
            self.values[n] = given[n]
        self.values[node] = whole

    def _ways(self, node: Node, whole: Any, written_values: dict[Node, Any], written: list[Node]) -> Iterator[Step | None]:
        """The step of each way that gives the right numbers, None for one that does not."""
        if any(isinstance(self.splits.get(n), tuple) for n in node.all_input_nodes):  # one of several results: getitem takes it
            source = node.args[0] if node.args else None
            if node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem" and isinstance(node.args[1], int):
                split = self.splits[source][node.args[1]]  # type: ignore[index]
                yield Step(own=split is not None or not isinstance(whole, Tensor), result=split) if split is not None else None
            return
        if self._is_random(node):
            yield self._drawn(node, whole)
            return
        splits = [self.splits[n] for n in node.all_input_nodes if self.splits.get(n) is not None]
        for cuts, sizes, shifts in itertools.islice(self._candidates(node, splits), MOST_TRIES):
            yield self._tried(node, whole, written_values, written, cuts, sizes, shifts)

    # -- ways to compute a part ----------------------------------------------------------------------------------------------------------

    def _candidates(self, node: Node, splits: list[Split]) -> Iterator[tuple[dict[Node, Split], dict[Path, tuple[int, ...]], Any]]:
        starts = list(dict.fromkeys(split.starts for split in splits))
        common = [n for n in node.all_input_nodes if self.splits.get(n) is None and isinstance(self.values[n], Tensor)]
        options: list[list[Split | None]] = []
        for n in common:
            shape = self.values[n].shape
            cut = [Split(d, s) for d, size in enumerate(shape) for whole in starts if (s := _scaled(size, whole)) is not None]
            options.append([None, *dict.fromkeys(cut)])
        numbers = {path: _numbers(value, starts) for path, value in _ints(node)}
        changing = [(path, new) for path, found in numbers.items() for new in found]
        subsets: list[tuple[Any, ...]] = [()]
        subsets += [(one,) for one in changing]
        subsets += [(a, b) for a, b in itertools.combinations(changing, 2) if a[0] != b[0]]
        shifts = self._shifts(node)
        for sizes in subsets:
            for chosen in itertools.product(*options):
                cuts = {n: split for n, split in zip(common, chosen, strict=True) if split is not None}
                for shift in shifts:
                    yield cuts, dict(sizes), shift

    def _shifts(self, node: Node) -> list[tuple[tuple[Node, tuple[int, ...]], ...]]:
        """Row numbers count from where the process's rows of the table begin."""
        if node.target is F.embedding and isinstance(node.args[0], Node) and isinstance(node.args[1], Node):
            split = self.splits.get(node.args[1])
            if isinstance(split, Split) and split.dim == 0:
                return [((node.args[0], split.starts[:-1]),)]
        return [()]

    def _tried(
        self, node: Node, whole: Any, written_values: dict[Node, Any], written: list[Node], cuts: dict[Node, Split], sizes: Any, shifts: Any
    ) -> Step | None:
        if any(n in cuts or self.splits.get(n) is None for n in written):
            return None  # each process would write a part of what all have
        parts: list[Any] = []
        for rank in range(self.world):
            given = {}
            for n in node.all_input_nodes:
                split = self.splits.get(n) or cuts.get(n)
                given[n] = _cloned(self.values[n] if split is None else split.part(self.values[n], rank))
            for n, first in shifts:
                given[n] = given[n] - first[rank]
            args, kwargs = part_arguments(node, {path: new[rank] for path, new in sizes.items()}, given.__getitem__)
            try:
                parts.append(self.call(node, args, kwargs))
            except Exception:  # whatever an op says of arguments that do not fit it
                return None
            if not all(_close(given[n], self.splits[n].part(written_values[n], rank)) for n in written):
                return None
            if rank == 0 and not _may_be_part(parts[0], whole):
                return None
        made = tuple(cuts.items()), tuple(sizes.items()), shifts
        if isinstance(whole, (tuple, list)) and whole and all(isinstance(item, Tensor) for item in whole):
            if any(len(part) != len(whole) for part in parts):
                return None
            found = tuple(self._divided([part[i] for part in parts], item) for i, item in enumerate(whole))
            return None if any(split is None for split in found) else Step(True, *made, found)
        if not isinstance(whole, Tensor):
            return Step(True, *made) if all(type(part) is type(whole) and part == whole for part in parts) else None
        if (cuts or sizes) and _constant(whole):
            return None  # right in any case, which says nothing
        split = self._divided(parts, whole)
        if split is not None:
            return Step(True, *made, split)
        if whole.is_floating_point() and all(part.shape == whole.shape for part in parts) and _close(sum(parts), whole):
            return Step(True, *made, None, total=True)
        return None

    def _divided(self, parts: list[Tensor], whole: Tensor) -> Split | None:
        """How these results lie in the whole one."""
        first = parts[0].shape
        if any(part.dim() != whole.dim() for part in parts):
            return None
        dims = [d for d in range(whole.dim()) if first[d] != whole.shape[d]]
        if len(dims) != 1:
            return None
        split = Split(dims[0], tuple(itertools.accumulate((part.shape[dims[0]] for part in parts), initial=0)))
        if split.starts[-1] != whole.shape[split.dim]:
            return None
        right = all(_close(part, split.part(whole, rank)) for rank, part in enumerate(parts))
        return split if right else None

    # -- random numbers ------------------------------------------------------------------------------------------------------------------

    def _is_random(self, node: Node) -> bool:
        results = []
        for seed in (0, 1):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                given = {n: _cloned(self.values[n]) for n in node.all_input_nodes}
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), given.__getitem__)
                results.append(self.call(node, args, kwargs))
        return not _equal(*results)

    def _drawn(self, node: Node, whole: Any) -> Step | None:
        tensors = [n for n in node.all_input_nodes if isinstance(self.values[n], Tensor)]
        same = len(tensors) == 1 and isinstance(whole, Tensor) and whole.shape == self.values[tensors[0]].shape
        return Step(True, result=self.splits[tensors[0]], draws=True) if same and node.target in _DRAWS else None


def part_arguments(node: Node, sizes: dict[Path, Any], value: Callable[[Node], Any]) -> tuple[Any, Any]:
    """The arguments of a node with the numbers at some places replaced, and its operands by ``value``."""

    def replaced(item: Any, path: Path) -> Any:
        if path in sizes:
            return sizes[path]
        if isinstance(item, Node):
            return value(item)
        if isinstance(item, (tuple, list)) and not hasattr(item, "_fields"):
            made = [replaced(each, (*path, i)) for i, each in enumerate(item)]
            return made if isinstance(item, list) else tuple(made)
        if isinstance(item, dict):
            return {key: replaced(each, (*path, key)) for key, each in item.items()}
        if isinstance(item, slice):
            return slice(*(value(each) if isinstance(each, Node) else each for each in (item.start, item.stop, item.step)))
        return item

    return tuple(replaced(arg, ("args", i)) for i, arg in enumerate(node.args)), {k: replaced(v, (k,)) for k, v in node.kwargs.items()}


def _ints(node: Node) -> Iterator[tuple[Path, int]]:
    def within(item: Any, path: Path) -> Iterator[tuple[Path, int]]:
        if type(item) is int and item > 1:
            yield path, item
        elif isinstance(item, (tuple, list)):
            for i, each in enumerate(item):
                yield from within(each, (*path, i))

    for i, arg in enumerate(node.args):
        yield from within(arg, ("args", i))
    for key, arg in node.kwargs.items():
        yield from within(arg, (key,))


def _numbers(value: int, starts: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    found = [scaled for whole in starts if (scaled := _scaled(value, whole)) is not None]
    return list(dict.fromkeys(tuple(b - a for a, b in itertools.pairwise(scaled)) for scaled in found))


def _scaled(size: int, starts: tuple[int, ...]) -> tuple[int, ...] | None:
    """The starts of parts of ``size`` entries that are divided as ``starts`` divides its own, None where an edge would lie within one."""
    total = starts[-1]
    if size < 2 or (size % total and total % size):
        return None
    if any(start * size % total for start in starts):
        return None
    return tuple(start * size // total for start in starts)


def _cloned(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()  # strides and all
    return type(value)(_cloned(item) for item in value) if type(value) in (tuple, list) else value


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.shape == other.shape and bool(torch.equal(one.nan_to_num(), other.nan_to_num()))
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return True  # no tensor: nothing that an op writes


def _close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype is not other.dtype:
        return False
    if not (other.is_floating_point() or other.is_complex()):
        return bool(torch.equal(one, other))
    if not bool(torch.isfinite(other).all()):
        return False  # not shown to be right
    most = other.abs().max().item() if other.numel() else 0.0
    rounding = min(1e3 * torch.finfo(other.dtype).eps, 0.05)
    return bool(((one - other).abs() <= rounding * max(most, 1e-3)).all())


def _constant(tensor: Tensor) -> bool:
    return tensor.numel() > 1 and bool((tensor == tensor.reshape(-1)[0]).all())


def _may_be_part(part: Any, whole: Any) -> bool:
    return isinstance(part, Tensor) is isinstance(whole, Tensor) and (not isinstance(part, Tensor) or part.dim() == whole.dim())


def _name(node: Node) -> str:
    return getattr(node.target, "__name__", str(node.target))
