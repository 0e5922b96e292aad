"""Other weights for a model that is to be compared: as they might be after some training.

Comes in: a copy of a model. Goes out: the same copy, changed in place. New layers have weights that are alike: norms of ones, biases of
zeros, statistics that no batch has touched. Lanes whose weights are alike can be swapped unseen, and an ``eps`` or a bias can be lost.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

SPREAD = 0.2  # every number changes by up to this part of itself


def vary_weights(model: nn.Module, seed: int = 0) -> None:
    """Change every floating parameter and every floating buffer that is saved, by up to a fifth of each number; signs and zeros stay.

    So do masks, padding rows, and what must be positive. Where a whole parameter is zero, or a norm's running mean, small numbers come in.

    >>> layer = nn.BatchNorm1d(2)
    >>> vary_weights(layer)
    >>> bool((layer.bias != 0).all() and (layer.running_mean != 0).all() and (layer.running_var > 0.7).all())
    True
    """
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            _vary(parameter, random, zeros_too=True)
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in module._non_persistent_buffers_set:
                    _vary(buffer, random, zeros_too=isinstance(module, _NormBase))


def _vary(tensor: Tensor, random: torch.Generator, zeros_too: bool) -> None:
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.layout is not torch.strided:
        return
    u = (torch.rand(tensor.shape, generator=random, dtype=torch.float64) * 2 - 1).to(tensor.device) * SPREAD
    tensor.copy_(tensor * (1 + u) if not zeros_too or tensor.any() else u)
