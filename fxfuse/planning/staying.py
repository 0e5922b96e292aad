"""Regions whose Parameters stay: is the model still faster with them?

Comes in: the original and the fused model. Goes out: how many times faster the whole fused model runs. A region whose Parameters are held
elsewhere too is planned as a pack, but installed as views of one: each call looks after every Parameter, which the plan did not pay for.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from fxfuse.models.containers import opened
from fxfuse.models.determinism import preserved_state
from fxfuse.models.silent_hooks import hooks_silent
from fxfuse.models.unregistered import hidden_parameters, unregistered
from fxfuse.private.pytree import tree_leaves
from fxfuse.running.entries import Entry

from .timing import medians


def times_faster(original: nn.Module, fused: nn.Module, entry: Entry, train: bool, budget: float = 0.5) -> float:
    """The time of ``original`` over that of ``fused``: a forward in eval mode, or with the gradients of all Parameters in train mode.

    Flags, buffers and random state of both are as before afterwards. ``budget``: seconds.
    """
    calls = []
    with preserved_state(original, fused), hooks_silent(original), hooks_silent(fused), torch.set_grad_enabled(train):
        for model in (original, fused):
            model.train(train)
            parameters = (*model.parameters(), *hidden_parameters(model, unregistered(model)).values())
            wanted = [p for p in parameters if p.requires_grad] if train else []
            calls.append(partial(_step, entry.root(model), entry, wanted))
        before, after = medians(calls, budget=budget)
    return before / after


def _step(root: Any, entry: Entry, wanted: list[nn.Parameter]) -> None:
    """A forward, and the gradients of ``wanted``."""
    out = root(*entry.args, **entry.kwargs)
    ends = [leaf for leaf in tree_leaves(opened(out)) if isinstance(leaf, torch.Tensor) and leaf.requires_grad] if wanted else []
    if ends:
        torch.autograd.grad(ends, wanted, [torch.ones_like(end) for end in ends], allow_unused=True)
