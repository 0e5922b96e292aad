"""Running averages of weights go with their model: from the original to its fused form, and back.

Comes in: a ``torch.optim.swa_utils.AveragedModel`` and the form of its model that is trained from here on. Goes out: the average, in place,
over the same weights in that form: ``update_parameters`` pairs Parameters by their order.
"""

from __future__ import annotations

import copy

from torch import nn
from torch.optim.swa_utils import AveragedModel

from fxfuse.errors import ArgumentError
from fxfuse.weights.packing import load_original_state_dict, original_state_dict


def migrate_average(average: AveragedModel, model: nn.Module) -> AveragedModel:
    """Let an average (SWA, EMA) follow ``model``, another form of the model that it has averaged so far; returns it.

    ``average.module`` becomes a copy of ``model`` with the averaged weights and buffers, bit for bit; their count, function, device and
    dtype stay. ``model`` is the fused model or, on the way back, ``fxfuse.unfuse(fused)``. Raises ``ArgumentError`` for what is no
    ``AveragedModel``, and ``StateDictError`` where the two are no forms of one model; nothing is changed then.

    >>> layer = nn.Linear(2, 3)
    >>> average = AveragedModel(layer)
    >>> migrate_average(average, nn.Linear(2, 3)).module.weight.equal(layer.weight)
    True
    """
    if not isinstance(average, AveragedModel):
        raise ArgumentError(f"average must be a torch.optim.swa_utils.AveragedModel, a {type(average).__name__} came")
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be a torch.nn.Module, a {type(model).__name__} came")
    before = average.module
    made = copy.deepcopy(model)
    had = [*before.parameters()]
    devices, dtypes = {each.device for each in had}, {each.dtype for each in had if each.is_floating_point()}
    made.to(devices.pop() if len(devices) == 1 else None, dtypes.pop() if len(dtypes) == 1 else None)
    load_original_state_dict(made, original_state_dict(before))
    made.zero_grad()
    if not any(parameter.requires_grad for parameter in had):
        made.requires_grad_(False)
    average.module = made.train(before.training)
    return average
