"""ESMM: two towers on one input, one output the product of both; 26 embeddings of columns."""

from zoo import ctr

PACKAGE = "deepctr-torch==0.3.0"
ROWS = 128
HEAVY = 4


def model():
    fields = ctr.columns()
    from deepctr_torch.models import ESMM

    return ESMM(fields, tower_dnn_hidden_units=(128, 64), init_std=0.05)


def inputs(rows):
    return (ctr.table(rows),), {}
