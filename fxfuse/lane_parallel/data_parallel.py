"""Gradients averaged over processes that see other rows of the batch.

Comes in: a model and process groups. Goes out: hooks on its Parameters. As DDP does it, one Parameter at a time, for DTensors too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fxfuse.distributed.traffic import moved
from fxfuse.models.sharded import is_sharded


def average_gradients(model: nn.Module, groups: Sequence[dist.ProcessGroup]) -> None:
    """From here on every gradient of ``model`` is the mean over each of ``groups``, once it is accumulated."""
    for parameter in model.parameters() if groups else ():
        parameter.register_post_accumulate_grad_hook(_averaging(groups))  # type: ignore[no-untyped-call]


def _averaging(groups: Sequence[dist.ProcessGroup]) -> Callable[[Tensor], None]:
    def average(parameter: Tensor) -> None:
        grad: Any = parameter.grad
        with torch.no_grad():
            local: Tensor = grad.to_local() if is_sharded(grad) else grad
            for group in groups:
                mean = local.contiguous()
                moved("average", mean)
                dist.all_reduce(mean, group=group)
                local.copy_(mean / dist.get_world_size(group))

    return average
