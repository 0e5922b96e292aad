"""Every rule against two oracles: ``torch.func.vmap`` of the op, and the loop.

Generated: for each op that has a rule, and each of its samples (tests/rule_samples.py), lanes are made that have their operands at every
place a rule can meet them (lane axis at each position of one tensor, a tensor of one's own, one tensor for all), in 2, 3 and 5
lanes, in float64 and, where the op takes them, complex numbers. The rule's packed result, its gradients and the buffers that it updates
are compared, and nothing else.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rule_samples import BETWEEN, SAMPLES, Numbers, Sample
from torch import Tensor, nn

from fxfuse.graph import RegionPlan
from fxfuse.passes.bundle import find_bundles
from fxfuse.passes.emit import Emitter
from fxfuse.passes.lift import lift
from fxfuse.passes.packs import Packs
from fxfuse.passes.program import make_program
from fxfuse.passes.rules import has_rule, rule_of, table
from fxfuse.passes.rules.base import RULES
from fxfuse.passes.vectorize import prepare
from fxfuse.passes.writer import CannotVectorize
from fxfuse.private.torch_function import DisableTorchFunction
from fxfuse.recording.observe import observe
from fxfuse.recording.tracer import record
from fxfuse.running import install
from fxfuse.weights import packing
from fxfuse.weights.weights import unpackable

LANES = (2, 3, 5)

Layout = int | str  # the position of the lane axis, "own" (a tensor per lane) or "shared"


def test_every_rule_has_a_sample() -> None:
    missing = sorted(RULES.keys() - SAMPLES.keys() - BETWEEN)
    assert not missing, f"no sample in tests/rule_samples.py for: {', '.join(missing)}"


def test_the_table_in_the_readme_is_that_of_the_rules() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert table.written(readme) == readme, "run: python -m fxfuse.passes.rules.table README.md"
    with pytest.raises(ValueError, match="rules: begin"):
        table.written("no markers here")


# -- what is tried ---------------------------------------------------------------------------------------------------------------------


def layouts(sample: Sample, first: bool) -> Iterator[tuple[Layout, ...]]:
    """Each operand in each layout, beside others that are slices of one tensor, and beside others that are weights.

    An op's first sample has the lane axis at every position, the others in front and behind.
    """
    if sample.free:  # the lanes are no free dim: they stand behind one
        yield (1,) * len(sample.operands)
        return
    found: dict[tuple[Layout, ...], None] = {}
    for others in (0, "own"):
        rest: list[Layout] = [others if operand.per_lane else "shared" for operand in sample.operands]
        for index, operand in enumerate(sample.operands):
            for choice in _choices(operand, first) if others == 0 else ("own", "shared"):
                if operand.per_lane or choice == "shared":
                    found[tuple(choice if k == index else r for k, r in enumerate(rest))] = None
    found[tuple(len(operand.shape) if operand.per_lane else "shared" for operand in sample.operands)] = None
    for layout in found:
        if sample.module is not None or any(place != "shared" for place in layout):
            yield layout


def _choices(operand: Numbers, everywhere: bool) -> list[Layout]:
    rank = len(operand.shape)
    places = range(rank + 1) if everywhere and rank <= 3 else sorted({0, rank})
    return [*places, "own", "shared"]


def cases(sample: Sample, first: bool) -> Iterator[tuple[tuple[Layout, ...], int, bool]]:
    """Layout, number of lanes (in turn), complex numbers?"""
    turn = itertools.cycle(LANES)
    for index, layout in enumerate(layouts(sample, first)):
        yield layout, next(turn), False
        if index == 0:
            yield layout, 3, True
    # As many lanes as a dim is long: only then has a misplaced lane axis the right size.
    plain = [layout for layout in layouts(sample, first) if not {"own", "shared"} & set(layout)]
    mixed = [layout for layout in layouts(sample, first) if {"own", "shared"} <= set(layout)]
    sizes = dict.fromkeys(size for operand in sample.operands[:1] for size in operand.shape if 1 < size < 6)
    for layout in dict.fromkeys([*plain[:1], *plain[-1:]]):
        yield from ((layout, lanes, False) for lanes in sizes)
    yield from ((layout, lanes, False) for layout in mixed for lanes in list(sizes)[:1])


# -- the loop --------------------------------------------------------------------------------------------------------------------------


class Loop(nn.Module):
    """The sample's call once per lane. Its inputs are the tensors that hold slices of all lanes, and those that are shared."""

    def __init__(self, sample: Sample, layout: tuple[Layout, ...], lanes: int, wide: bool, seed: int) -> None:
        super().__init__()
        self.sample, self.layout, self.lanes = sample, layout, lanes
        generator = torch.Generator().manual_seed(seed)
        self.nets = nn.ModuleList(sample.module().double() for _ in range(lanes)) if sample.module is not None else None
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        for buffer in self.buffers():  # running statistics, and counters of batches
            drawn_so = torch.rand(buffer.shape, generator=generator, dtype=torch.float64) + 0.5
            buffer.copy_(drawn_so if buffer.is_floating_point() else (drawn_so * 9).long())
        self.own = nn.ModuleList(nn.ParameterList() for _ in range(lanes))
        self.inputs: list[Tensor] = []
        for operand, place in zip(sample.operands, layout, strict=True):
            drawn = [_draw(operand, wide, generator) for _ in range(1 if place == "shared" else lanes)]
            if place == "own":
                for own, tensor in zip(self.own, drawn, strict=True):
                    own.append(nn.Parameter(tensor, requires_grad=_differentiable(tensor)))
            else:
                self.inputs.append(drawn[0] if place == "shared" else torch.stack(drawn, int(place)))

    def operands(self, inputs: Any, lane: int) -> list[Tensor]:
        """What lane ``lane`` computes on."""
        given, own = iter(inputs), iter(self.own[lane])
        return [
            next(own) if place == "own" else next(given) if place == "shared" else next(given).select(int(place), lane)
            for place in self.layout
        ]

    def forward(self, *inputs: Tensor) -> Any:
        found = []
        for lane in range(self.lanes):
            operands = self.operands(inputs, lane)
            out = self.sample.function(*([self.nets[lane]] if self.nets is not None else []), *operands)
            # What is a view of an input, or a copy that may be one at another size, leaves as such, which is no lane set's business.
            found.append(torch.utils._pytree.tree_map_only(Tensor, lambda t, given=operands: _own(t, given), out))
        return found


def _own(tensor: Tensor, operands: list[Tensor]) -> Tensor:
    with DisableTorchFunction():  # the test asks, not the model: a recording that sees the question refuses what follows from it
        of_input = tensor._is_view() or any(tensor is each or _equal(tensor, each) for each in operands)
    return tensor.clone() if of_input else tensor


def _equal(tensor: Tensor, operand: Tensor) -> bool:
    """The same numbers, in any order."""
    alike = tensor.numel() == operand.numel() and tensor.dtype is operand.dtype
    return alike and set(tensor.flatten().tolist()) == set(operand.flatten().tolist())


def _draw(operand: Numbers, wide: bool, generator: torch.Generator) -> Tensor:
    tensor = operand.draw(operand.shape, generator)
    return torch.complex(tensor, operand.draw(operand.shape, generator)) if wide and tensor.is_floating_point() else tensor


def _differentiable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


# -- the rule --------------------------------------------------------------------------------------------------------------------------


def packed(model: Loop, op: str, prefer: str = "") -> tuple[nn.Module | CannotVectorize, list[str]]:
    """The model, in place, with ``op`` computed by its rule for all lanes, or what the rule refuses; and the lowerings there are besides.

    ``prefer``: the lowering to use, where it is one.
    """
    if model.sample.free:
        observed = observe(model, tuple(model.inputs), {})
        trace, sizes = observed.trace, observed.sizes
    else:
        trace, sizes = record(model, tuple(model.inputs), {}), []
    assert not trace.failure, trace.failure
    lifted = lift(trace, trace.frames[0], sizes, frozenset())
    assert not hasattr(lifted, "reason"), lifted
    prepare(lifted, 2)
    bundles = find_bundles(lifted.graph, has_rule, lambda bundle: False, 2)
    names = {bundles.classes[index].name for index in bundles.active}
    assert op in names, f"the sample of {op} does not use it: {sorted(names)}"
    blocked, kinds = unpackable(model, "")
    packs = Packs(unpackable=blocked, kinds=kinds)
    emitter = Emitter(lifted, bundles, packs, rule_of, {}, prefer, False)
    try:
        graph = emitter.run()
    except CannotVectorize as refusal:
        return refusal, []
    used = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    packs.constants.update(lifted.constants)
    plan = RegionPlan(
        "", [recipe for recipe in packs.recipes.values() if recipe.name in used],
        {tuple(module.training for module in model.modules()): make_program(trace, lifted, graph)},
        {name: tensor for name, tensor in packs.constants.items() if name in used},
    )  # fmt: skip
    return install.install(model, [plan], strict=True), [other for options in emitter.choices.values() for other in options[1:]]


# -- the comparison --------------------------------------------------------------------------------------------------------------------


def flat(outputs: Any) -> list[Tensor]:
    """The output tensors of all lanes."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def results(model: nn.Module, inputs: list[Tensor], outputs: Any = None) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    """Outputs, and gradients of inputs and parameters (by the original's names) for random cotangents."""
    model.zero_grad(set_to_none=True)
    given = [x.detach().clone().requires_grad_(_differentiable(x)) for x in inputs]
    found = flat((outputs or model)(*given))
    generator = torch.Generator().manual_seed(11)
    ends = [out for out in found if out.requires_grad]
    if ends:
        torch.autograd.backward(ends, [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype) for out in ends])
    gradients = {f"input {i}": x.grad for i, x in enumerate(given)}
    return [out.detach() for out in found], {**gradients, **packing.original_gradients(model)}


def over_lanes(model: Loop) -> Any:
    """All lanes by ``torch.func.vmap``: the oracle that shares no code with the rules."""

    def run(*inputs: Tensor) -> Any:
        given, position = iter(inputs), itertools.count()
        operands, dims = [], []
        for place in model.layout:
            if place == "own":
                k = next(position)
                operands.append(torch.stack([own[k] for own in model.own]))
            else:
                tensor = next(given)
                operands.append(tensor if place == "shared" else tensor.movedim(int(place), 0))
            dims.append(None if place == "shared" else 0)
        if model.nets is None:
            out = torch.func.vmap(model.sample.function, tuple(dims), randomness="different")(*operands)
        else:
            base = model.nets[0]
            states = [dict(itertools.chain(net.named_parameters(), net.named_buffers())) for net in model.nets]
            stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}
            out = torch.func.vmap(lambda state, *own: torch.func.functional_call(base, state, own), (0, *dims))(stacked, *operands)
        leaves = flat(out)
        return [[leaf[lane] for leaf in leaves] for lane in range(model.lanes)]

    return run


def close(got: list[Tensor], want: list[Tensor], where: str) -> None:
    assert len(got) == len(want), where
    for index, (one, other) in enumerate(zip(got, want, strict=True)):
        near(one, other, f"{where}: output {index}")


def near(got: Tensor | None, want: Tensor | None, where: str) -> None:
    if got is None or want is None:
        # A lane of a pack always has a gradient: zeros where the loop has none.
        assert got is want or (got if want is None else want).abs().max() == 0, f"{where}: {got} against {want}"
        return
    assert (got.shape, got.dtype) == (want.shape, want.dtype), f"{where}: {got.shape} {got.dtype} against {want.shape} {want.dtype}"
    if not _differentiable(want):
        assert torch.equal(got, want), where
        return
    scale = want.abs().max().item() if want.numel() else 0
    tolerance = 1e-10 * max(1.0, scale) if want.dtype in (torch.float64, torch.complex128) else 1e-5 * max(1.0, scale)
    assert torch.allclose(got, want, rtol=0, atol=tolerance, equal_nan=True), f"{where}: {(got - want).abs().max():.3g} apart"


# torch warns of its own batching rules for losses, and of the slices that some layouts are.
@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized", "ignore:torch.searchsorted", "ignore:Casting complex")
@pytest.mark.parametrize("op", sorted(SAMPLES))
def test_the_rule_equals_vmap_and_the_loop(op: str) -> None:
    for number, sample in enumerate(SAMPLES[op]):
        fits, refusals, known = 0, [], set()
        for seed, (layout, lanes, wide) in enumerate(cases(sample, number == 0)):
            where = f"{op}, sample {number}, {layout}, {lanes} lanes{', complex' if wide else ''}"
            model = Loop(sample, layout, lanes, wide, seed)
            try:
                loop, gradients = results(model, model.inputs)
            except (RuntimeError, TypeError, ValueError) as error:
                refusals.append(str(error))  # no complex numbers in this op, no such view of such strides
                continue
            made, lowerings = packed(Loop(sample, layout, lanes, wide, seed), op)  # running statistics and counters as before the loop ran
            if isinstance(made, CannotVectorize):
                assert op not in RULES or wide or any(str(made).startswith(known) for known in sample.refused), f"{where}: {made}"
                refusals.append(str(made))
                continue
            fits += not wide
            got, own = results(made, model.inputs)
            close(got, loop, where)
            for name, gradient in gradients.items():
                near(own[name], gradient, f"{where}: gradient of {name}")
            for lowering in lowerings if layout not in known else ():
                other, _ = packed(Loop(sample, layout, lanes, wide, seed), op, lowering)
                if wide and isinstance(other, CannotVectorize):
                    continue
                assert isinstance(other, nn.Module), f"{where}, {lowering}: {other}"
                result, slopes = results(other, model.inputs)
                close(result, loop, f"{where}, {lowering}")
                for name, gradient in gradients.items():
                    near(slopes[name], gradient, f"{where}, {lowering}: gradient of {name}")
            known.add(layout)
            for name, tensor in packing.original_state_dict(made).items():
                near(tensor, model.state_dict()[name], f"{where}: {name}")
            if sample.oracle:
                out, ideal = results(model, model.inputs, over_lanes(model))
                close(got, out, f"{where}, vmap")
                for name, gradient in ideal.items():
                    near(own[name], gradient, f"{where}, vmap: gradient of {name}")
        if op in RULES:
            assert bool(fits) is not sample.never, f"{op}, sample {number}: {'not refused any more' if fits else refusals}"
