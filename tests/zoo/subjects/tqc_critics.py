"""TQC: five quantile critics on one input, `stack(tuple(...), dim=1)`, under `set_grad_enabled`."""

import torch

PACKAGE = "sb3_contrib==2.9.2"
ROWS = 256
HEAVY = 3


def model():
    import numpy as np
    from gymnasium import spaces
    from sb3_contrib.tqc.policies import Critic
    from stable_baselines3.common.torch_layers import FlattenExtractor

    seen, done = spaces.Box(-1, 1, (17,), np.float32), spaces.Box(-1, 1, (6,), np.float32)
    return Critic(
        seen, done, net_arch=[128, 128], features_extractor=FlattenExtractor(seen), features_dim=17, n_critics=5,
        share_features_extractor=False,
    )


def inputs(rows):
    return (torch.rand(rows, 17), torch.rand(rows, 6)), {}
