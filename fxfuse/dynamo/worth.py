"""Is the packed form worth it once the inner backend has compiled it?

Comes in: a planner, what it chose, the graph and the settings. Goes out: a ``Refusal``, or None. Op by op a loop pays a price for every
call, and packing saves most of them. Inductor pays that price for neither: what it compiles to one kernel costs its work alone, and the
products and convolutions that it calls cost little besides. What is left for packing is better work, and larger calls.

So both forms are timed op by op, forward or forward and backward as the graph is used, and for Inductor the price of each launch and view
is taken off, and what it takes to look after shared packs, or to look up what is not vectorized, is added. The static model is asked
first: where it sees the packed form far ahead, nothing is timed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from fxfuse.graph import Recipe, Refusal
from fxfuse.launches import count
from fxfuse.passes.vectorize import Vectorized
from fxfuse.planning.choice import Choice
from fxfuse.planning.plan import Planner
from fxfuse.planning.timing import medians
from fxfuse.planning.workbench import Workbench
from fxfuse.weights.recipes import pack
from fxfuse.weights.shared import memory_form

from .captured import Captured
from .outside import worth_sharing
from .settings import Settings

# What the packed form has to gain, compiled, in inference and in training. What is made of two forms that are as fast by this estimate
# differs by some percent, and most in a backward: 1.12x by the estimate has been 0.95x (five critics of 128 units, 256 rows).
LEAST_GAIN, LEAST_GAIN_IN_TRAINING = 1.08, 1.15
# So far ahead, by the static model, nothing is timed. It knows of no compiled kernels: 2.6x by it has been 0.93x (12 calibrators of one
# feature, in training).
FAR_AHEAD = 4.0
# Seconds to hand a gradient to a parameter that lies in a shared pack.
HANDED_OVER = 3.5e-6
# Seconds at every call where there are shared packs; for each of these, and to see that a member lies in it still; in inference, and where
# gradients are tracked.
CALL = 8e-6
PACK, PACK_IN_TRAINING = 1.2e-6, 9e-6
MEMBER, MEMBER_IN_TRAINING = 0.1e-6, 0.65e-6
# So much slower a packed form may be where the inner backend runs op by op what it is given, as far as fxfuse knows.
SLOWER = 1.25
# What Inductor calls, rather than writes.
_CALLED = frozenset(
    "mm addmm bmm baddbmm mv addmv convolution convolution_backward lstm gru mkldnn_rnn_layer _scaled_dot_product_flash_attention "
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_efficient_attention".split()
)
# What a view costs, as a part of what a launch costs. Alone it is 0.35, but most are made inside of other ops (``linear``): 0.15 fits the
# models of the zoo that are on the edge (embeddings, calibrators, boosted trees).
_VIEW = 0.15
# Seconds for each number that is looked up in packed tables whose rows are no multiple of ``VECTOR`` numbers: where lanes and columns
# become one dim, or are summed, Inductor goes through them one by one on a CPU, dividing to find the lane. 8 tables of 24 columns, side by
# side, took 224 us where the loop took 110, of 32 columns 144 and 124; CANINE's eight ran at 0.51x. Stacked tables run at 1.5x to 2.9x.
LOOKED_UP, VECTOR = 1.1e-9, 16
# The least part of a form's time that is its work, however many launches it has.
_WORK = 0.1


def not_worth_it(planner: Planner, choice: Choice, captured: Captured, settings: Settings) -> Refusal | None:
    """Why the loop stays, or None."""
    assert choice.vectorized is not None
    inductor = planner.compiled
    stacked, shared = _packs(choice.vectorized, captured, settings.freeze and not captured.tracked)
    if inductor and choice.estimated is not None:
        loop, packed = choice.estimated
        if loop > FAR_AHEAD * packed:
            return None
    functions = [_loop(planner, captured), _packed(planner, choice.vectorized, stacked)]
    times = medians(functions, budget=0.1, least=3)
    if not inductor:
        return _left(planner, times, "op by op") if times[1] > SLOWER * times[0] else None
    times = [_compiled(seconds, function) for seconds, function in zip(times, functions, strict=True)]
    times[1] += _looked_after(shared, planner.train) + (_looked_up(choice.vectorized) if planner.benches[0].device == "cpu" else 0.0)
    gain = LEAST_GAIN_IN_TRAINING if planner.train else LEAST_GAIN
    return _left(planner, times, "as far as can be told before it is compiled") if times[1] * gain > times[0] else None


def _left(planner: Planner, times: Sequence[float], how: str) -> Refusal:
    loop, packed = times
    place = planner.prepared.lifted.place or next(iter(planner.prepared.lane_sets().values()), None)
    return Refusal(f"left as a loop: packed runs {loop / packed:.2f}x, {how}", place)


def _looked_after(shared: list[list[Tensor]], train: bool) -> float:
    """Seconds that the packs in the user's parameters take at every call."""
    members = [member for pack in shared for member in pack]
    if not members:
        return 0.0
    if not train:
        return CALL + PACK * len(shared) + MEMBER * len(members)
    handed_over = HANDED_OVER * sum(member.requires_grad for member in members)
    return CALL + PACK_IN_TRAINING * len(shared) + MEMBER_IN_TRAINING * len(members) + handed_over


def _looked_up(made: Vectorized) -> float:
    """Seconds for what Inductor looks up number by number on a CPU."""
    packs = {recipe.name for recipe in made.packs.recipes.values()}
    seconds = 0.0
    for node in made.graph.find_nodes(op="call_function", target=F.embedding):
        table, value = node.args[1], node.meta["val"]
        if table.op == "get_attr" and table.target in packs and value.shape[-1] % VECTOR:
            seconds += LOOKED_UP * value.numel()
    return seconds


def _compiled(seconds: float, function: Callable[[], object]) -> float:
    """What Inductor leaves of it: seconds less the price of launches and views that it does not make."""
    launches = count(function, bound=False)
    called = sum(number for name, number in launches.heavy_by_op.items() if name in _CALLED)
    return max(seconds - (launches.total - called + _VIEW * launches.free) * _price(), seconds * _WORK)


@lru_cache(maxsize=1)
def _price() -> float:
    """Seconds that a launch costs by itself here, forward or backward: those of ops on a few numbers."""
    x, ops = torch.ones(4, requires_grad=True), 20

    def chain() -> object:
        y = x
        for _ in range(ops):
            y = torch.relu(y)
        return torch.autograd.grad(y.sum(), x)

    with torch.enable_grad():
        return medians([chain], budget=0.01, least=5)[0] / (2 * ops)


def _loop(planner: Planner, captured: Captured) -> Callable[[], object]:
    """One step of dynamo's graph, as code: ``Captured`` itself goes through it call by call."""
    bench = planner.benches[0]
    return Workbench(_Code(captured), bench.case, bench.train, bench.inner).loop()


class _Code(nn.Module):
    def __init__(self, captured: Captured) -> None:
        super().__init__()
        self.captured = captured
        # A copy: the graph is dynamo's, and a module that takes one owns it.
        self.code = torch.fx.GraphModule(nn.Module(), copy.deepcopy(captured.slots[0].node.graph))

    def forward(self, *tensors: Tensor) -> Any:
        return self.code(*self.captured.values(tensors))


def _packed(planner: Planner, made: Vectorized, stacked: list[tuple[Recipe, list[Tensor]]]) -> Callable[[], object]:
    step = planner.benches[0].step(made)

    def packed() -> object:
        for recipe, members in stacked:
            pack(recipe, members)
        return step()

    return packed


def _packs(made: Vectorized, captured: Captured, frozen: bool) -> tuple[list[tuple[Recipe, list[Tensor]]], list[list[Tensor]]]:
    """The packs that are made anew at every call; the members of each that is not."""
    used = {str(node.target) for node in made.graph.nodes if node.op == "get_attr"}
    weights = captured.weights()
    stacked: list[tuple[Recipe, list[Tensor]]] = []
    shared: list[list[Tensor]] = []
    for recipe in made.packs.recipes.values():
        members = [weights[name] for name in recipe.members]
        if recipe.name not in used:
            continue
        if frozen or worth_sharing(memory_form(recipe), members):
            shared.append(members)
        else:
            stacked.append((recipe, [member.detach() for member in members]))
    return stacked, shared
