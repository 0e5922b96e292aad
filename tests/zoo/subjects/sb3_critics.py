"""Ten critics on one input, held in a plain list; a tuple of outputs, nothing joined."""

import torch

PACKAGE = "stable_baselines3==2.9.2"
ROWS = 256
HEAVY = 3


def model():
    import numpy as np
    from gymnasium import spaces
    from stable_baselines3.common.policies import ContinuousCritic
    from stable_baselines3.common.torch_layers import FlattenExtractor

    seen, done = spaces.Box(-1, 1, (17,), np.float32), spaces.Box(-1, 1, (6,), np.float32)
    return ContinuousCritic(
        seen, done, net_arch=[256, 256], features_extractor=FlattenExtractor(seen), features_dim=17, n_critics=10,
        share_features_extractor=False,
    )


def inputs(rows):
    return (torch.rand(rows, 17), torch.rand(rows, 6)), {}
