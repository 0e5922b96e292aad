"""Memory of which no gradient is ever asked, whatever the caller's inputs and weights need: what ``no_grad`` may write to in a graph.

Comes in: the calls of a recorded run, as they come. Goes out: ``Loose``. A write under ``no_grad`` into what has a history changes the
numbers and leaves the history, which no graph repeats; into memory without one it is a new value, detached.
"""

from __future__ import annotations

from torch import nn

from .trace import Value


class Loose:
    """Which memory, by its number, has no history. Buffers have none, nor what is made of numbers or under ``no_grad``."""

    def __init__(self, values: list[Value]) -> None:
        self.values = values
        self.storages: set[int] = set()
        self.held: set[int] = set()  # memory with a history, or of Parameters
        self.parameters: dict[int, str] = {}  # memory of Parameters, by whose name

    def attribute(self, value: Value) -> None:
        """A tensor that a module holds."""
        if isinstance(value.tensor, nn.Parameter) or value.tensor.requires_grad:
            self._tied(value.storage)
            if isinstance(value.tensor, nn.Parameter):
                self.parameters.setdefault(value.storage, value.name)
        elif value.storage not in self.held:
            self.storages.add(value.storage)

    def made(self, value: Value, arguments: list[int], untracked: bool) -> None:
        """What a call made of the values ``arguments``."""
        if (untracked or not arguments) and all(self.values[each].storage != value.storage for each in arguments):
            self.storages.add(value.storage)

    def written(self, mutated: tuple[int, ...], arguments: list[int]) -> None:
        """A write with gradient tracking on: what is written takes on the history of what it is written from."""
        own = {self.values[each].storage for each in mutated}
        read = {self.values[each].storage for each in arguments} - own
        if any(storage not in self.storages for storage in read):
            for storage in own:
                self._tied(storage)

    def all(self, values: tuple[int, ...]) -> bool:
        """Is this so of all of these values?"""
        return all(self.values[each].storage in self.storages for each in values)

    def why_not(self, values: tuple[int, ...], name: str) -> str:
        """Why a graph does not repeat the call ``name``, which writes these values under ``no_grad``, where this is not so of all."""
        written = [self.values[each] for each in values if self.values[each].storage not in self.storages]
        held = next((self.parameters[value.storage] for value in written if value.storage in self.parameters), "")
        if held:
            return f"changes the parameter {held} in forward ({name})"
        return f"writes into what has a gradient history, without gradient tracking ({name} under no_grad)"

    def _tied(self, storage: int) -> None:
        self.storages.discard(storage)
        self.held.add(storage)
