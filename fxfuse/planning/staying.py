"""Is the whole model faster, with what was planned region by region?

Comes in: the original and the fused model. Goes out: how many times faster the whole fused model runs, and of which plans that is to be
asked. A region whose Parameters are held elsewhere too is planned as a pack, but installed as views of one: each call looks after every
Parameter, which the plan did not pay for. A small gain was measured once, in one place in memory: it has to show again.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from fxfuse.graph import RegionPlan
from fxfuse.models.containers import opened
from fxfuse.models.determinism import preserved_state
from fxfuse.models.silent_hooks import hooks_silent
from fxfuse.models.unregistered import hidden_parameters, unregistered
from fxfuse.private.pytree import tree_leaves, tree_map_only
from fxfuse.running.entries import Entry

from . import plan as planner
from .timing import medians

# Of a model that runs at this many times the original's speed nobody can say that it is slower.
NOT_SLOWER = 0.985


def unsure(plans: Iterable[RegionPlan]) -> list[RegionPlan]:
    """Those that were measured just now, and gained little."""
    return [plan for plan in plans if not plan.sure and not plan.cached]


def least_gain(staying: bool) -> float:
    """How many times faster the whole model has to be with such plans, or with plans whose Parameters stay."""
    return planner.LEAST_GAIN if staying else min(NOT_SLOWER, planner.LEAST_GAIN)


def times_faster(original: nn.Module, fused: nn.Module, entry: Entry, train: bool, budget: float = 0.5) -> float:
    """The time of ``original`` over that of ``fused``: a forward in eval mode, or with the gradients of all Parameters in train mode. Of a
    model that has no backward, the forward.

    Flags, buffers and random state of both are as before afterwards. ``budget``: seconds.
    """
    steps: list[tuple[Any, Entry, list[nn.Parameter]]] = []
    # The caller's graph, from which inputs may come, is not to be run.
    args, kwargs = tree_map_only(torch.Tensor, lambda t: t.detach().requires_grad_(t.requires_grad), (entry.args, entry.kwargs))
    entry = Entry(entry.name, args, kwargs)
    with preserved_state(original, fused), hooks_silent(original), hooks_silent(fused), torch.set_grad_enabled(train):
        for model in (original, fused):
            model.train(train)
            parameters = (*model.parameters(), *hidden_parameters(model, unregistered(model)).values())
            steps.append((entry.root(model), entry, [p for p in parameters if p.requires_grad] if train else []))
        try:
            _step(*steps[0], [])
        except RuntimeError:
            steps = [(root, entry, []) for root, _, _ in steps]
        before, after = medians([partial(_step, *each, []) for each in steps], budget=budget)
    return before / after


def _step(root: Any, entry: Entry, wanted: list[nn.Parameter], gradients: list[torch.Tensor | None]) -> None:
    """A forward, and the gradients of ``wanted``, which live until the next step begins, as in training."""
    gradients.clear()
    out = root(*entry.args, **entry.kwargs)
    ends = [leaf for leaf in tree_leaves(opened(out)) if isinstance(leaf, torch.Tensor) and leaf.requires_grad] if wanted else []
    if ends:
        gradients.extend(torch.autograd.grad(ends, wanted, [torch.ones_like(end) for end in ends], allow_unused=True))
