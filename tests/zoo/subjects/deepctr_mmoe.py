"""MMOE: experts on one input, a gate and a tower per task; 26 embeddings of columns."""

from zoo import ctr

PACKAGE = "deepctr-torch==0.3.0"
ROWS = 256
HEAVY = 8


def model():
    fields = ctr.columns()
    from deepctr_torch.models import MMOE

    return MMOE(
        fields, num_experts=8, expert_dnn_hidden_units=(256, 128), tower_dnn_hidden_units=(64,), gate_dnn_hidden_units=(64,),
        task_types=["binary"] * 4, task_names=[f"t{i}" for i in range(4)], init_std=0.05,
    )


def inputs(rows):
    return (ctr.table(rows),), {}
