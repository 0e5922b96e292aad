"""AITM: a bottom per task on one input, then a chain of gates from task to task, a tower per task."""

from zoo import ctr

PACKAGE = "torch-rechub==0.9.0"
ROWS = 128
HEAVY = 19


def model():
    from torch_rechub.models.multi_task import AITM

    return AITM(ctr.features(), 4, bottom_params={"dims": [64, 32]}, tower_params_list=[{"dims": [16, 8]}] * 4)


def inputs(rows):
    return (ctr.named(rows),), {}
