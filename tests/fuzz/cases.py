"""Whole cases: inputs, a loop, what comes before and after it, what is done to the model, how it is fused, and how it is then used."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

from .bodies import bodies
from .inputs import inputs
from .loops import loops
from .structure import changes

Case = dict[str, Any]

# How a user may ask for it, besides ``objective="launches", tune=False``; each of these once with ``validate=False`` too.
OPTIONS: tuple[dict[str, Any], ...] = (
    {}, {}, {}, {}, {"lowering": "grouped_conv"}, {"lowering": "bmm"}, {"min_lanes": 3}, {"max_memory": 2000}, {"inplace": True},
    {"mode": "infer"}, {"first_call": True},
)  # fmt: skip
OPTIMIZERS = ("sgd", "adam", "momentum", "decay")


def cases() -> st.SearchStrategy[Case]:
    """Any model that this package can write."""
    around = st.one_of(st.just([]), st.just([]), bodies(0).map(lambda steps: steps[:2]))
    return st.fixed_dictionaries({
        "inputs": inputs(),
        "before": around,
        "loop": loops(2),
        "again": st.sampled_from([None, None, None, None, "same", "second", "outside"]),
        "after": around,
        "changes": changes(),
        "options": st.sampled_from(OPTIONS),
        "optimizer": st.sampled_from(OPTIMIZERS),
        "seed": st.integers(0, 999),
    })  # fmt: skip


def literal(case: Case) -> str:
    """The case on one line, as Python reads it."""
    plain = json.loads(json.dumps(case))
    return repr(plain)
