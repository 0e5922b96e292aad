"""Lanes in chunks: every bundle cut into parts of fewer lanes, computed one chunk after the other.

Comes in: bundles, and a number of chunks. Goes out: bundles of which each is one chunk's. What lies between the first op and the join then
exists for one chunk at a time: less memory in inference, and values that fit the cache (128 lanes x batch 1024 x hidden 32 are 16 MB per
op: packed at once they are slower than the loop, in chunks several times faster).

A bundle may have several members of one lane: the projections to queries, keys and values of 32 attentions are one bundle of 96. One
bundle, the anchor, is cut by position; what it reads and what reads it goes to the chunks of its members, and so on, so that a chunk has
all that its lanes need. (With all cut by position, no attention could run before nearly all 96 projections had: 126 MiB more than the loop
where 6 do.) Bundles in which chunks meet are cut by position, too.
"""

from __future__ import annotations

import math
from dataclasses import replace

import networkx as nx

from .bundle import Bundle, Bundles, Node, dataflow_of

# The results of one bundle that a chunk may have, in bytes: half of a second-level cache of 2 MiB, which operands share.
CHUNK_BYTES = 1 << 20
# Bundles with less than this part of the widest one's members, or memory, say nothing of how many lanes there are: two encoders that 64
# lanes read, or what becomes of the lanes' results.
LIGHT = 0.25


def in_chunks(whole: Bundles, count: int) -> Bundles:
    """The same lanes in ``count`` chunks, as far as bundles have that many; the order of lanes is kept."""
    if count <= 1:
        return whole
    chunk_of = _chunk_of(whole, count)
    classes: list[Bundle] = []
    for bundle in whole.classes:
        parts: dict[int, list[Node]] = {}
        for member in bundle.members:
            parts.setdefault(chunk_of.get(member, 0), []).append(member)
        for part, (chunk, members) in enumerate(sorted(parts.items())):
            cut = replace(bundle, index=len(classes), members=members, operands=set(), whole=len(bundle.members))
            cut.chunk, cut.chunks, cut.leads = chunk, len(parts), part == 0
            classes.append(cut)
    active = {bundle.index for bundle in classes if whole.of[bundle.members[0]] in whole.active}
    of = {member: bundle.index for bundle in classes for member in bundle.members}
    position = {member: at for bundle in classes if bundle.index in active for at, member in enumerate(bundle.members)}
    for bundle in classes:
        bundle.operands = {of[operand] for member in bundle.members for operand in member.all_input_nodes}
    for number, index in enumerate(nx.topological_sort(dataflow_of(classes))):
        classes[index].number = number
    return Bundles(classes, of, active, position)


def _chunk_of(whole: Bundles, count: int) -> dict[Node, int]:
    """The chunk of every member that is cut; of those in no active bundle, and of unequal widths, nothing is said."""
    found: dict[Node, int] = {}
    for component in whole.components():
        cut = {index for index in component if not whole.classes[index].unequal}
        if not cut:
            continue
        anchor = _anchor(whole, cut)
        level = found_here = _by_position(anchor, count)
        torn: set[int] = set()  # bundles in which lanes meet
        while level:
            offered: dict[Node, set[int]] = {}
            for node in level:
                for other in (*node.all_input_nodes, *node.users):
                    if other not in found_here and whole.of.get(other) in cut:
                        offered.setdefault(other, set()).add(found_here[node])
            level = {node: min(chunks) for node, chunks in offered.items()}
            torn.update(whole.of[node] for node, chunks in offered.items() if len(chunks) > 1)
            found_here.update(level)
        for index in cut:
            bundle = whole.classes[index]
            if index in torn or any(member not in found_here for member in bundle.members):
                found_here.update(_by_position(bundle, count))
        found.update(found_here)
    return found


def _by_position(bundle: Bundle, count: int) -> dict[Node, int]:
    lanes = len(bundle.members)
    parts = min(count, lanes)
    return {member: part for part in range(parts) for member in bundle.members[lanes * part // parts : lanes * (part + 1) // parts]}


def widest(bundles: Bundles) -> tuple[int, int]:
    """``(bytes, lanes)`` of the bundle whose results take most memory; the lanes are those of its anchor."""
    found = (0, 1)
    for component in bundles.components():
        size = max(_bytes(bundles.classes[index]) for index in component)
        cut = {index for index in component if not bundles.classes[index].unequal}
        found = max(found, (size, _lanes(_anchor(bundles, cut or component))))
    return found


def _anchor(bundles: Bundles, component: set[int]) -> Bundle:
    """The bundle that says how many lanes there are: of those with large results the one with the fewest members."""
    classes = [bundles.classes[index] for index in sorted(component)]
    top = max(classes, key=_bytes)
    large = [each for each in classes if _bytes(each) >= LIGHT * _bytes(top) and _lanes(each) >= LIGHT * _lanes(top)]
    return min(large, key=_lanes)


def _lanes(bundle: Bundle) -> int:
    return len(bundle.members)


def _bytes(bundle: Bundle) -> int:
    """What its results take in memory."""
    meta = bundle.members[0].meta
    if meta.get("shape") is None or meta.get("dtype") is None:
        return 0
    numbers: int = len(bundle.members) * math.prod(meta["shape"])
    return numbers * int(meta["dtype"].itemsize)


def fitting_chunks(bundles: Bundles, limit: int = CHUNK_BYTES) -> int:
    """The number of chunks in which no bundle's results exceed ``limit`` bytes, at most one chunk per two lanes."""
    size, lanes = widest(bundles)
    return max(1, min(-(-size // limit), lanes // 2))
