"""Lanes divided among processes: sharded packs, the collectives between the processes, and what these move."""
