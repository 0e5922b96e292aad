"""The lanes that most tests of joins bring together: a few small networks, with weights of their own each."""

from __future__ import annotations

from torch import nn

from checks import mlp


class Nets(nn.Module):
    def __init__(self, inputs: int = 1, outputs: int = 1, n: int = 4):
        super().__init__()
        self.n = n
        self.nets = nn.ModuleList(mlp(inputs, outputs=outputs) for _ in range(n))
