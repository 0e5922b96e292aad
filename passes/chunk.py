"""Lanes in chunks: every bundle cut into parts of fewer lanes, computed one chunk after the other.

Comes in: bundles, and a number of chunks. Goes out: bundles of which each is one chunk's. What lies between the first op and the join then
exists for one chunk at a time: less memory in inference, and values that fit the cache (128 lanes x batch 1024 x hidden 32 are 16 MB per
op: packed at once they are slower than the loop, in chunks several times faster).
"""

from __future__ import annotations

import math
from dataclasses import replace

import networkx as nx

from .bundle import Bundle, Bundles, dataflow_of

# The results of one bundle that a chunk may have, in bytes: half of a second-level cache of 2 MiB, which operands share.
CHUNK_BYTES = 1 << 20


def in_chunks(whole: Bundles, count: int) -> Bundles:
    """The same lanes in ``count`` chunks, as far as bundles have that many; the order of lanes is kept."""
    if count <= 1:
        return whole
    classes: list[Bundle] = []
    for bundle in whole.classes:
        lanes = len(bundle.members)
        parts = min(count, lanes) if bundle.index in whole.active and not bundle.unequal else 1
        for part in range(parts):
            members = bundle.members[lanes * part // parts : lanes * (part + 1) // parts]
            cut = replace(bundle, index=len(classes), members=members, operands=set(), whole=lanes, chunk=part, chunks=parts)
            classes.append(cut)
    active = {bundle.index for bundle in classes if whole.of[bundle.members[0]] in whole.active}
    of = {member: bundle.index for bundle in classes for member in bundle.members}
    position = {member: at for bundle in classes if bundle.index in active for at, member in enumerate(bundle.members)}
    for bundle in classes:
        bundle.operands = {of[operand] for member in bundle.members for operand in member.all_input_nodes}
    for number, index in enumerate(nx.topological_sort(dataflow_of(classes))):
        classes[index].number = number
    return Bundles(classes, of, active, position)


def widest(bundles: Bundles) -> tuple[int, int]:
    """``(bytes, lanes)`` of the bundle whose results take most memory."""
    found = (0, 1)
    for index in bundles.active:
        bundle = bundles.classes[index]
        meta = bundle.members[0].meta
        if meta.get("shape") is not None and meta.get("dtype") is not None:
            found = max(found, (len(bundle.members) * math.prod(meta["shape"]) * meta["dtype"].itemsize, len(bundle.members)))
    return found


def fitting_chunks(bundles: Bundles, limit: int = CHUNK_BYTES) -> int:
    """The number of chunks in which no bundle's results exceed ``limit`` bytes, at most one chunk per two lanes."""
    size, lanes = widest(bundles)
    return max(1, min(-(-size // limit), lanes // 2))
