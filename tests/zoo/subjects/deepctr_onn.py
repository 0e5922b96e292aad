"""ONN, 8 fields: two embeddings of its own for every pair i < j, found by name "C0+C1", multiplied, concatenated."""

from zoo import ctr

PACKAGE = "deepctr-torch==0.3.0"
ROWS = 128
HEAVY = 6


def model():
    fields = ctr.columns(8, 4)
    from deepctr_torch.models.onn import ONN

    return ONN(fields, fields, dnn_hidden_units=(64, 64), init_std=0.05)


def inputs(rows):
    return (ctr.table(rows, 8, 4),), {}
