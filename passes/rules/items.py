"""One of several outputs of an op that is computed for all lanes: ``values, indices = x.max(1)``."""

from __future__ import annotations

import operator
from typing import Any

from ..bundle import Bundle
from ..emit import Emitter
from ..recurrent import together
from ..writer import CannotVectorize, Packed
from .base import rule


@rule("item", view=True)
def _item(emitter: Emitter, bundle: Bundle) -> Packed:
    assert bundle.op is not None
    sources: list[Any] = [member.args[0] for member in bundle.members]
    source = emitter.bundles.bundle(sources[0])
    if source is None or any(emitter.bundles.bundle(node) is not source for node in sources):
        raise CannotVectorize("outputs of calls that are no lanes of one op")
    value, at = emitter.values[source.index], int(bundle.members[0].args[1])  # type: ignore[arg-type]
    if value.node.target is together:  # outputs that a rule has made one by one: what nobody reads is then not computed
        made = Packed(value.node.args[at], value.dim)  # type: ignore[arg-type]
    else:
        made = Packed(emitter.call(operator.getitem, value.node, at), value.dim)
    return emitter.pick(made, len(source.members), [emitter.bundles.position[node] for node in sources])
