"""The data that the stages of the pipeline hand to each other. Pure data: no torch calls, no behaviour beyond printing.

Comes in: nothing. Goes out: ``Place``, ``Refusal``, ``Recipe``, ``Guard``, ``Program``, ``RegionPlan`` and the summaries
that the report prints. Every stage imports this file; this file imports no stage.

Terms (the field's own where there is one): a *lane* is one iteration of the user's loop; a *bundle* is the same op in every
lane; a *pack* is the lanes' tensors joined into one; a *region* is the module whose forward holds the loop; a *lowering* is a
way to compute a bundle; a *recipe* says how a packed tensor is made from, and split back into, the original's; a *refusal*
is a lane set that stays as it is, with the reason.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.fx


@dataclass(frozen=True)
class Place:
    """A line of the user's source: ``Place("/home/me/model.py", 41)`` prints as ``model.py:41``."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{os.path.basename(self.file)}:{self.line}"


@dataclass(frozen=True)
class Refusal:
    """A lane set, or a whole region, that stays as it is: one sentence, and the line it speaks of."""

    reason: str
    place: Place | None = None
    region: str = ""

    def __str__(self) -> str:
        return f"{self.reason} ({self.place})" if self.place is not None else self.reason


@dataclass(frozen=True)
class Recipe:
    """How one packed tensor is made from the lanes' tensors, and split back.

    Let ``m_i`` be the tensor named ``members[i]``. Then ``packed = stack([m_i.permute(order) for i])``, and where
    ``style == "cat"`` the first two dims are flattened into one (``[G, s0, ...] -> [G*s0, ...]``). Zero-dimensional members
    stack to ``[G]``. Where lanes spell one map in different shapes (a Linear's ``[M, K]``, a pointwise convolution's ``[M, K, 1]``),
    ``own_shapes`` says each member's own, and members are reshaped to ``shape`` first. ``style == "rows"`` concatenates members whose
    dim 0 differs (embedding tables), rows of unequal widths with zeros behind them up to ``shape[1:]``. ``style == "padded"`` stacks
    members of unequal sizes, each with zeros behind it up to ``shape``. Nothing reads or trains the zeros. All names are relative to
    the region.
    """

    name: str  # of the packed tensor: "packed.nets.0.weight"
    members: tuple[str, ...]  # of the originals, in lane order: ("nets.0.0.weight", "nets.1.0.weight", ...)
    shape: tuple[int, ...]  # of one member, as the original has it (``padded``: filled up)
    order: tuple[int, ...]  # permutation of a member's dims as it is stored; identity is (0, 1, ...)
    style: Literal["stack", "cat", "rows", "padded"]
    kind: Literal["parameter", "buffer"] = "parameter"
    requires_grad: bool = True
    own_shapes: tuple[tuple[int, ...], ...] | None = None  # of each member, where they are not all ``shape``

    def member_shape(self, index: int) -> tuple[int, ...]:
        """The shape of member ``index`` in the original."""
        return self.shape if self.own_shapes is None else self.own_shapes[index]

    def row_starts(self) -> tuple[int, ...]:
        """Where each member of ``cat`` or ``rows`` begins along the pack's dim 0, and where the last one ends."""
        if self.style == "cat":
            return tuple(index * self.shape[self.order[0]] for index in range(len(self.members) + 1))
        return (0, *itertools.accumulate(self.member_shape(index)[0] for index in range(len(self.members))))


# Any; the dims from the largest stride to the smallest; contiguous; the opposites of the two; and in order, for results lie as it does.
Layout = Literal["", "in order", "in rows", "out of order", "not in rows", "by results"]


@dataclass(frozen=True)
class TensorGuard:
    """What the rewritten graph assumes of one tensor input of the region."""

    shape: tuple[int | None, ...]  # None: any size in this dim (it was proved to be free)
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool | None = None  # None: any
    layout: Layout = ""  # what forward takes for granted of its order in memory
    order: tuple[int, ...] = ()  # the dims in the order of which this is said; empty: from first to last


@dataclass(frozen=True)
class SizeCheck:
    """A comparison of sizes that the recorded run made, to be true again: ``inputs[input].shape[dim] <op> bound``.

    ``chosen``: no run asked for it. The program is right at any size, but another one of the region is faster at others.
    """

    input: int
    dim: int
    op: Literal[">=", ">", "<=", "<", "==", "!="]
    bound: int
    chosen: bool = False


@dataclass(frozen=True)
class Guard:
    """What a recorded program assumes of its caller; one entry in ``leaves`` per flattened input leaf.

    ``leaves[i]`` is a ``TensorGuard`` for a tensor input, or ``("constant", value)`` for anything else (compared with ``is`` or
    equality of the same type). ``same[i]`` is the index of the first leaf that is the same tensor object as leaf i.
    ``generic_dtype``: no dtype is spelled out in the program, so that any floating dtype is right as long as all floating inputs
    and the region's floating parameters share it; else the input dtypes must equal the recorded ones. ``generic_device`` likewise.
    ``in_rows``: forward reads how its tensors lie in memory (strides): all inputs have to be contiguous, from their storage's start.
    ``autocast``: the caller's autocast, a kind of device and a dtype. Its casts are spelled out in the program, which runs without it.
    """

    leaves: tuple[Any, ...]
    same: tuple[int, ...]
    sizes: tuple[SizeCheck, ...] = ()
    equal_dims: tuple[tuple[tuple[int, int], tuple[int, int]], ...] = ()  # ((leaf, dim), (leaf, dim)) that must be equal
    default_dtype: torch.dtype = torch.float32
    generic_dtype: bool = False
    generic_device: bool = False
    autocast: tuple[str, torch.dtype] | None = None
    in_rows: bool = False
    tracking: bool = False  # the caller has to track gradients: forward does so for a part of what it computes, whoever calls


@dataclass(frozen=True)
class Store:
    """An attribute that forward sets on a module of the region (its path in it), to what ``spec`` makes of its leaves."""

    module: str
    name: str
    spec: Any  # pytree.TreeSpec


@dataclass
class Program:
    """One rewritten forward of a region, for one vector of ``training`` flags.

    ``graph`` has one placeholder per flattened input leaf, in ``in_spec`` order (also for leaves that are constants: those
    placeholders are unused), ``get_attr`` nodes with targets relative to the region (``packed.*`` for packed tensors, others for
    what stayed), ``call_function`` nodes, ``call_module`` nodes for opaque children (target relative to the region), and one output:
    the flat list of output leaves of ``out_spec``, followed by those of each of ``stores``.
    ``tracked``: it runs with gradient tracking on, as forward itself does; where the caller tracks none, results ``outside`` are detached,
    and of those ``viewed`` of inputs and weights the history is cut off, but not the flag.
    """

    graph: torch.fx.Graph
    guard: Guard
    in_spec: Any  # pytree.TreeSpec of (args, kwargs)
    out_spec: Any  # pytree.TreeSpec of the result
    stores: tuple[Store, ...] = ()
    tracked: bool = False
    outside: tuple[int, ...] = ()
    viewed: tuple[int, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        return self  # finished programs are never changed, so that copies of a model share them

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        from .running.serialize import program_from_data, program_to_data  # only pickling needs it

        return program_from_data, (program_to_data(self),)


@dataclass(frozen=True)
class FusedOp:
    """One bundle in the rewritten graph, for the report."""

    op: str  # "linear", "conv1d", "relu", ...
    lanes: int
    lowering: str  # "baddbmm", "grouped_conv", "pointwise", "fold into batch", ...
    place: Place | None
    detail: str = ""  # "[64, 32] x [32, 32]"


@dataclass(frozen=True)
class Making:
    """How the programs of a region were made: what was chosen, for programs that are made later (under autocast)."""

    lowering: dict[Any, str]  # of bundles, by ``passes.emit.signature``
    prefer: str
    chunks: int
    skipped: frozenset[Any]  # lane sets that stay as they are
    single: bool
    validate: bool
    together: bool = False  # lanes of unequal widths in one bundle
    own_results: bool = False  # results are copies, which nothing keeps for backward


@dataclass(frozen=True)
class SizePlan:
    """What serves the sizes from ``first`` to ``last`` (None: any that is larger), for the report."""

    first: int
    last: int | None
    how: str  # "linear 32x32: baddbmm, in 8 chunks"
    measured: tuple[tuple[int, float, float], ...]  # (size, seconds of the loop, of this)


@dataclass
class RegionPlan:
    """All that is needed to rewrite one region, and what the report says of it."""

    path: str  # the region's module path in the model; "" is the model itself
    recipes: list[Recipe]
    programs: dict[tuple[bool, ...], Program]  # key: the ``training`` flags of region.modules(), in order
    constants: dict[str, torch.Tensor] = field(default_factory=dict)  # index tensors the graphs read: "packed.index_0"
    ops: list[FusedOp] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # "dropout draws other random numbers than the loop did", ...
    place: Place | None = None  # of the loop
    launches: tuple[int, int] | None = None  # before, after
    heavy: tuple[int, int] | None = None  # parameter-carrying launches before, after
    seconds: tuple[float, float] | None = None  # median before, after, in the mode asked for
    peak_bytes: tuple[int, int] | None = None  # before, after
    tried: list[tuple[str, float]] = field(default_factory=list)  # lowering and its median seconds
    by_size: list[SizePlan] = field(default_factory=list)  # where ranges of sizes have programs of their own
    cached: bool = False  # the choice was read from the cache of plans, its figures too
    sure: bool = True  # it gained so much that another measurement would say the same
    key: str = ""  # of the plan in that cache
    sets: frozenset[tuple[str, str]] = frozenset()  # (module, name) of the attributes that forward sets, and no program reads before
    keeps_parameters: bool = False  # the members stay Parameters whose data are views of the pack: somebody else holds them too
    # Programs over the same packs: of other methods by name, and further signatures of "forward".
    methods: dict[str, dict[tuple[bool, ...], tuple[Program, ...]]] = field(default_factory=dict)
    method_ops: dict[str, list[FusedOp]] = field(default_factory=dict)
    making: Making | None = None  # None: no further programs can be made
    spelled: Any = None  # ``surroundings.Spelled``: the names in the code that ran in the region
    outside: list[Any] = field(default_factory=list)  # ``surroundings.Piece``s: globals and the like that it could read
    wholes: dict[str, Recipe] = field(default_factory=dict)  # of the packs that were cut into parts, the recipe before; by name

    def all_programs(self) -> list[Program]:
        """The programs of all methods, signatures and modes."""
        return [*self.programs.values(), *(p for modes in self.methods.values() for programs in modes.values() for p in programs)]
