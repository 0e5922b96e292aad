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

    So do masks, padding rows, and what must be positive. Where a whole parameter is zero, or a norm's running mean, small numbers come in;
    norms have counted another number of batches each.

    >>> layer = nn.BatchNorm1d(2)
    >>> vary_weights(layer)
    >>> bool(layer.bias.all() and layer.running_mean.all() and (layer.running_var > 0.7).all()), int(layer.num_batches_tracked)
    (True, 1)
    """
    random, counted = torch.Generator().manual_seed(seed), 0
    with torch.no_grad():
        for parameter in model.parameters():
            _vary(parameter, random, zeros_too=True)
        for module in model.modules():
            norm = isinstance(module, _NormBase)
            for name, buffer in module._buffers.items():
                if buffer is None or name in module._non_persistent_buffers_set:
                    continue
                _vary(buffer, random, zeros_too=norm)
                if norm and name == "num_batches_tracked":  # by which statistics without a momentum are averaged
                    counted += 1
                    buffer += counted


def _vary(tensor: Tensor, random: torch.Generator, zeros_too: bool) -> None:
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.layout is not torch.strided:
        return
    u = (torch.rand(tensor.shape, generator=random, dtype=torch.float64) * 2 - 1).to(tensor.device) * SPREAD
    tensor.copy_(tensor * (1 + u) if not zeros_too or tensor.any() else u)
