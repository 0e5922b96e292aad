"""Switch Transformers: each expert on the tokens that were routed to it: which, depends on the data."""

import torch

PACKAGE = "transformers==5.23.0"
ROWS = 4
HEAVY = 9


def model():
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

    return SwitchTransformersSparseMLP(
        SwitchTransformersConfig(d_model=32, d_ff=64, num_experts=4, dropout_rate=0.0, router_jitter_noise=0.0)
    )


def inputs(rows):
    return (torch.randn(rows, 16, 32),), {}
