"""Whom fxfuse is measured against: each peer is a model that computes what the loop does, or the reason for which there is none.

Comes in: a ``Case`` and its loop. Goes out: ``{name: model or reason}``, and the seconds that making each took.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

import fxfuse
from benchmarks.grid_cases import Case, by_hand

# Inductor's own horizontal fusion, every rule of it that keeps the numbers (its rule for dropout does not).
GROUP_BATCH = {
    "pre_grad_fusion_options": {"batch_linear": {}, "batch_linear_lhs": {}, "batch_layernorm": {}, "batch_relu": {}, "batch_sigmoid": {},
                                "batch_tanh": {}},
    "post_grad_fusion_options": {"batch_linear_post_grad": {}},
}  # fmt: skip
# A loop of so many lanes takes minutes to compile (115 s for 128 lanes of three layers).
MOST_COMPILED = 32
COMPILED = ("compiled loop", "group_batch_fusion")


class Stacked(nn.Module):
    """torch.func: the lanes' parameters stacked once, one network under vmap; what a user has to rewrite the model to."""

    def __init__(self, case: Case, model: nn.Module) -> None:
        super().__init__()
        parameters, self.buffers_of = stack_module_state(list(model.nets))
        self.names = list(parameters)
        self.stacked = nn.ParameterList(parameters.values())
        self.base = [copy.deepcopy(model.nets[0]).to("meta")]  # in a list: its parameters are not ours
        self.case = case

    def forward(self, x: Tensor) -> Tensor:
        def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor], given: Tensor) -> Tensor:
            return functional_call(self.base[0], (parameters, buffers), (given,))

        parameters = dict(zip(self.names, self.stacked, strict=True))
        if self.case.shared:
            out = vmap(one, (0, 0, None))(parameters, self.buffers_of, x)
        else:
            out = vmap(one, (0, 0, 0))(parameters, self.buffers_of, x.movedim(-1, 0).unsqueeze(-1))  # [G, N, 1]
        return out.squeeze(-1).t() if self.case.join == "cat" else out.sum(0)


def makers(case: Case, model: nn.Module, x: Tensor, mode: str, compiled: bool) -> dict[str, Callable[[], nn.Module] | str]:
    """How to make each peer. ``compiled``: those too that Inductor makes."""
    found: dict[str, Callable[[], nn.Module] | str] = {
        "loop": lambda: model,
        "vmap": lambda: Stacked(case, model),
        "by hand": lambda: by_hand(case, model),
        "fused": lambda: fxfuse.optimize(model, x, mode=mode, cache=False, progress=False),  # type: ignore[arg-type]
    }
    if not compiled:
        return found
    found["fused, compiled"] = lambda: torch.compile(fxfuse.optimize(model, x, mode=mode, cache=False, progress=False))  # type: ignore
    found["by hand, compiled"] = lambda: torch.compile(by_hand(case, model))  # type: ignore[return-value]
    if case.lanes > MOST_COMPILED:
        reason = f"not compiled: more than {MOST_COMPILED} lanes"
        return {**found, **dict.fromkeys(COMPILED, reason)}
    found["compiled loop"] = lambda: torch.compile(copy.deepcopy(model))
    found["group_batch_fusion"] = lambda: torch.compile(copy.deepcopy(model), options=GROUP_BATCH)
    return found


def made(
    case: Case, model: nn.Module, x: Tensor, mode: str, compiled: bool
) -> tuple[dict[str, nn.Module], dict[str, str], dict[str, float]]:
    """The peers that are right; why the others are missing; seconds that each took to make, first call and backward included."""
    models: dict[str, nn.Module] = {}
    missing: dict[str, str] = {}
    seconds: dict[str, float] = {}
    expected = model.double()(x.double() if x.is_floating_point() else x).detach()
    model.float()
    for name, make in makers(case, model, x, mode, compiled).items():
        if isinstance(make, str):
            missing[name] = make
            continue
        try:
            start = time.perf_counter()
            peer: Any = make()
            out = peer(x)
            if mode == "train":
                out.sum().backward()
                peer.zero_grad(set_to_none=True)
            seconds[name] = time.perf_counter() - start
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
            continue
        wrong = (out.detach().double() - expected).abs().max().item() / max(expected.abs().max().item(), 1e-6)
        if out.shape != expected.shape or not wrong < 1e-3:
            missing[name] = f"wrong by {wrong:.1e}"
            continue
        models[name] = peer
    return models, missing, seconds
