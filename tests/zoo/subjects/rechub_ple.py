"""PLE, 2 levels, 4 tasks: experts of each task and shared ones, with BatchNorm; gates by softmax; towers."""

from zoo import ctr

PACKAGE = "torch-rechub==0.9.0"
ROWS = 256
HEAVY = 18


def model():
    from torch_rechub.models.multi_task import PLE

    return PLE(
        ctr.features(), ["classification"] * 4, n_level=2, n_expert_specific=2, n_expert_shared=1, expert_params={"dims": [64, 32]},
        tower_params_list=[{"dims": [16]}] * 4,
    )


def inputs(rows):
    return (ctr.named(rows),), {}
