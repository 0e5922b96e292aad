"""Process groups by name: a program's graph holds names only.

Comes in: a ``ProcessGroup``. Goes out: its name, and by it the group again, in this process.
"""

from __future__ import annotations

import torch.distributed as dist

from fxfuse.errors import FxfuseError

_groups: dict[str, dist.ProcessGroup] = {}


def name_of(group: dist.ProcessGroup) -> str:
    """The name by which ``group_of`` finds the group."""
    name = str(group.group_name)
    _groups[name] = group
    return name


def group_of(name: str) -> dist.ProcessGroup:
    """The group of that name. Raises ``FxfuseError`` in a process that has not sharded a model over it."""
    found = _groups.get(name)
    if found is None:
        raise FxfuseError(f"the process group {name} is not known here: shard the fused model in this process (fxfuse.shard_lanes)")
    return found
