"""``shard_lanes``: the lanes of a fused model divided among processes; what passes between these is in ``fxfuse.distributed``."""
