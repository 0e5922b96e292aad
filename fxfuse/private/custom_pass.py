"""The class of which Inductor wants its custom passes to be, so that its caches know what was done to a graph.

Private: ``torch._inductor.custom_graph_pass.CustomGraphPass``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.fx


def custom_pass(rewrite: Callable[[torch.fx.Graph], None], identity: str, name: str) -> Callable[[torch.fx.Graph], None]:
    """``rewrite``, which changes a graph in place, as a pass. ``identity``: equal for passes that do the same."""
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class Pass(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            rewrite(graph)

        def uuid(self) -> Any:
            return identity

        def __repr__(self) -> str:
            return name

    return Pass()
