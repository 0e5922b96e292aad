"""LSTM, GRU and Elman networks, whole sequences and single cells. Lowerings:

- own weights: one recurrence for all lanes, written out (``passes/recurrent.py``): the input's part of the gates for all time steps in one
  product, then one batched product per step. ``wide_linear``: lanes that read one input share that first product.
- ``lane by lane``: torch's own call for each lane, between packed neighbours. It may cost one launch for all steps (oneDNN, cuDNN), where
  a recurrence written out costs a few per step: which is faster depends on the number of lanes, and is measured.
- one set of weights for all lanes: the same call on the lanes folded into its batch.

A layer's dropout draws a mask per lane.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..bundle import Bundle, Node
from ..emit import Emitter
from ..recurrent import gru_over_time, gru_step, lstm_over_time, lstm_step, rnn_over_time, rnn_step, together
from ..writer import CannotVectorize, Packed
from .base import rule

RECURRENCE, BY_LANE, FOLDED = "one recurrence", "lane by lane", "lanes in the batch"


@dataclass
class _Weights:
    """One layer in one direction: the lanes' nodes for each weight; None where the layer has none."""

    input: list[Node]
    hidden: list[Node]
    input_bias: list[Node] | None
    hidden_bias: list[Node] | None
    projection: list[Node] | None


@rule("lstm", "gru", "rnn_tanh", "rnn_relu", heavy=True)
def _sequence(emitter: Emitter, bundle: Bundle) -> tuple[Packed, str]:
    op = bundle.op
    assert op is not None
    if op.overload != "input":
        raise CannotVectorize("packed sequences have as many rows per step as the data say")
    x: Packed = emitter.operand(bundle, "input")
    states = _states(emitter, bundle)
    columns = _columns(bundle, op.names.index("params"))
    if all(node is column[0] for column in columns for node in column):
        return _folded_sequence(emitter, bundle, x, states, [emitter.single(column[0]) for column in columns]), FOLDED
    return _Sequence(emitter, bundle, x, states, columns).run()


def _states(emitter: Emitter, bundle: Bundle) -> list[Packed]:
    """The state before the first step: ``h``, and of an LSTM ``c``."""
    hx = emitter.operand(bundle, "hx")
    return [hx] if isinstance(hx, Packed) else list(hx)


def _columns(bundle: Bundle, at: int) -> list[list[Node]]:
    """The lanes' nodes for each tensor of a list argument."""
    lists: list[Any] = [member.args[at] for member in bundle.members]
    return [list(column) for column in zip(*lists, strict=True)]


class _Sequence:
    """Writes one bundle's recurrence, layer by layer."""

    def __init__(self, emitter: Emitter, bundle: Bundle, x: Packed, states: list[Packed], columns: list[list[Node]]) -> None:
        self.emitter, self.bundle, self.x = emitter, bundle, x
        self.lanes = len(bundle.members)
        self.kind = bundle.name
        self.batch_first = bool(emitter.operand(bundle, "batch_first"))
        self.directions = 2 if emitter.operand(bundle, "bidirectional") else 1
        self.layers = int(emitter.operand(bundle, "num_layers"))
        self.dropout = float(emitter.operand(bundle, "dropout")) if emitter.operand(bundle, "train") else 0.0
        self.states = [emitter.front(state, self.lanes) for state in states]  # [G, layers * directions, N, H]
        self.columns = columns

    def _by_layer(self) -> list[_Weights]:
        columns = self.columns
        biased = bool(self.emitter.operand(self.bundle, "has_biases"))
        count = len(columns) // (self.layers * self.directions)
        projected = count > (4 if biased else 2)
        found = []
        for start in range(0, len(columns), count):
            own = columns[start : start + count]
            biases = own[2:4] if biased else [None, None]
            found.append(_Weights(own[0], own[1], biases[0], biases[1], own[-1] if projected else None))
        return found

    def run(self) -> tuple[Packed, str]:
        emitter, call = self.emitter, self.emitter.call
        chosen = emitter.choose(self.bundle, (*(("wide_linear",) if self.x.dim is None else ()), "baddbmm", BY_LANE))
        if chosen == BY_LANE:
            return self._by_lane(), BY_LANE
        lowering = f"wide_linear, {RECURRENCE}" if chosen == "wide_linear" else RECURRENCE
        x = self.x if chosen == "wide_linear" else Packed(emitter.front(self.x, self.lanes), 0)
        time_first = not self.batch_first
        weights = self._by_layer()
        last: list[list[Node]] = [[] for _ in self.states]
        for layer in range(self.layers):
            final = layer == self.layers - 1
            dim = 2 if self.batch_first and final else 1
            outputs: list[Node] = []
            for direction in range(self.directions):
                index = layer * self.directions + direction
                made = self._layer(x, time_first, weights[index], index, direction == 1, dim)
                outputs.append(call(operator.getitem, made, 0))
                for position, states in enumerate(last):
                    states.append(call(operator.getitem, made, 1 + position))
            out = outputs[0] if len(outputs) == 1 else call(torch.cat, outputs, -1)
            if self.dropout and not final:
                out = call(F.dropout, out, self.dropout, True)
            x, time_first = Packed(out, 0), True
        ends = [call(torch.unsqueeze, states[0], 1) if len(states) == 1 else call(torch.stack, states, 1) for states in last]
        return Packed(call(together, x.node, *ends), 0), lowering

    def _by_lane(self) -> Packed:
        emitter, call, op = self.emitter, self.emitter.call, self.bundle.op
        assert op is not None
        inputs = self._apart(emitter.front(self.x, self.lanes))
        states = [self._apart(state) for state in self.states]
        params = []
        for nodes in self.columns:
            packed = emitter.weights(nodes) or emitter.fetch(nodes)
            params.append(self._apart(emitter.front(packed, self.lanes)))
        rest = [emitter.operand(self.bundle, name) for name in op.names[3:]]
        outputs: list[list[Node]] = [[] for _ in range(1 + len(states))]
        for lane in range(self.lanes):
            own = tuple(state[lane] for state in states)
            made = call(op.func, inputs[lane], own if self.kind == "lstm" else own[0], [param[lane] for param in params], *rest)
            for position, output in enumerate(outputs):
                output.append(call(operator.getitem, made, position))
        return Packed(call(together, *[call(torch.stack, output) for output in outputs]), 0)

    def _apart(self, node: Node) -> list[Node]:
        """The lanes of ``[G, ...]`` one by one."""
        pieces = self.emitter.call(torch.unbind, node)
        return [self.emitter.call(operator.getitem, pieces, lane) for lane in range(self.lanes)]

    def _layer(self, x: Packed, time_first: bool, weights: _Weights, index: int, backwards: bool, dim: int) -> Node:
        emitter, call = self.emitter, self.emitter.call
        folded = self.kind != "gru"  # a GRU multiplies the state's bias by a gate
        bias = bias_of(emitter, weights.input_bias, weights.hidden_bias if folded else None, self.lanes)
        gates = self._gates(x, time_first, weights.input, bias)
        state = [call(torch.select, each, 1, index) for each in self.states]
        hidden = transposed(emitter, weights.hidden, self.lanes)
        if self.kind == "lstm":
            projection = None if weights.projection is None else transposed(emitter, weights.projection, self.lanes)
            return call(lstm_over_time, gates, *state, hidden, projection, backwards, dim)
        if self.kind == "gru":
            own = bias_of(emitter, weights.hidden_bias, None, self.lanes)
            return call(gru_over_time, gates, *state, hidden, None if own is None else call(torch.unsqueeze, own, 1), backwards, dim)
        return call(rnn_over_time, gates, *state, hidden, self.kind == "rnn_relu", backwards, dim)

    def _gates(self, x: Packed, time_first: bool, weights: list[Node], bias: Node | None) -> Node:
        """The input's part of the gates for all steps, ``[G, T, N, gates * H]``, in one product."""
        call = self.emitter.call
        if x.dim is None:
            gates = wide(self.emitter, x.node, weights, bias, self.lanes)
        else:
            rows = call(torch.flatten, x.node, 1, 2)
            gates = call(torch.unflatten, product(self.emitter, rows, weights, bias, self.lanes), 1, self._sizes(x.node, time_first))
        return gates if time_first else call(torch.transpose, gates, 1, 2)

    def _sizes(self, node: Node, time_first: bool) -> tuple[Any, ...]:
        """Steps and rows, in the order in which ``node`` ``[G, ., ., K]`` has them: numbers where they are fixed."""
        given: Any = self.bundle.members[0].args[0]
        order = (0, 1) if time_first is not self.batch_first else (1, 0)  # where the input itself has them
        found = zip((1, 2), order, strict=True)
        return tuple(self.emitter.call("size", node, at) if own in given.meta["dyn"] else given.meta["shape"][own] for at, own in found)


def transposed(emitter: Emitter, nodes: list[Node], lanes: int) -> Node:
    """The lanes' weights as ``[G, K, M]``, stored that way where they are the lanes' own parameters."""
    packed = emitter.weights(nodes, (1, 0), "stack")
    if packed is not None:
        return packed.node
    return emitter.call(torch.transpose, emitter.front(emitter.fetch(nodes), lanes), 1, 2)


def bias_of(emitter: Emitter, first: list[Node] | None, second: list[Node] | None, lanes: int) -> Node | None:
    """The sum of the biases that there are, ``[G, M]``."""
    biases = [emitter.front(emitter.fetch(nodes), lanes) for nodes in (first, second) if nodes is not None]
    return None if not biases else biases[0] if len(biases) == 1 else emitter.call(torch.add, *biases)


def product(emitter: Emitter, rows: Node, weights: list[Node], bias: Node | None, lanes: int) -> Node:
    """``[G, N, K] x [G, K, M]`` with the bias ``[G, M]``."""
    weight = transposed(emitter, weights, lanes)
    if bias is None:
        return emitter.call(torch.bmm, rows, weight)
    return emitter.call(torch.baddbmm, emitter.call(torch.unsqueeze, bias, 1), rows, weight)


def wide(emitter: Emitter, x: Node, weights: list[Node], bias: Node | None, lanes: int) -> Node:
    """One input ``[..., K]`` through the weights of all lanes: ``[G, ..., M]``, a view of one wide product."""
    packed = emitter.weights(weights, (0, 1), "cat")
    weight = packed.node if packed is not None else emitter.call(torch.flatten, emitter.front(emitter.fetch(weights), lanes), 0, 1)
    out = emitter.call(F.linear, x, weight, None if bias is None else emitter.call(torch.flatten, bias, 0, 1))
    last = len(out.meta["val"].shape) - 1
    return emitter.call(torch.movedim, emitter.call(torch.unflatten, out, last, (lanes, -1)), last, 0)


def _folded_sequence(emitter: Emitter, bundle: Bundle, x: Packed, states: list[Packed], params: list[Node]) -> Packed:
    """One network on many inputs: the call itself, lanes next to its batch."""
    assert bundle.op is not None
    call, lanes = emitter.call, len(bundle.members)
    batch = 0 if emitter.operand(bundle, "batch_first") else 1
    if bundle.op.random or x.dim is not None or any(state.dim is not None for state in states):
        folded = _beside(emitter, x, batch, lanes)
        hidden = [_beside(emitter, state, 1, lanes) for state in states]
        hx = tuple(hidden) if bundle.name == "lstm" else hidden[0]
        rest = [emitter.operand(bundle, name) for name in bundle.op.names[3:]]
        made = call(bundle.op.func, folded, hx, params, *rest)
        out = call(torch.unflatten, call(operator.getitem, made, 0), batch, (lanes, -1))
        outputs = [emitter.at(Packed(out, batch), 0)]
        for position in range(len(states)):
            last = call(torch.unflatten, call(operator.getitem, made, 1 + position), 1, (lanes, -1))
            outputs.append(emitter.at(Packed(last, 1), 0))
        return Packed(call(together, *outputs), 0)
    raise CannotVectorize("every lane makes the same call")


def _beside(emitter: Emitter, value: Packed, batch: int, lanes: int) -> Node:
    """The lane axis moved before the batch at ``batch``, and both made one."""
    moved = emitter.at(Packed(emitter.front(value, lanes), 0), batch)
    return emitter.call(torch.flatten, moved, batch, batch + 1)


# -- cells --------------------------------------------------------------------------------------------------------------------------------


@rule("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell", heavy=True)
def _cell(emitter: Emitter, bundle: Bundle) -> tuple[Packed, str]:
    op = bundle.op
    assert op is not None
    call, lanes, kind = emitter.call, len(bundle.members), bundle.name
    x: Packed = emitter.operand(bundle, "input")
    states = _states(emitter, bundle)
    weights = [emitter.nodes(bundle, name) for name in ("w_ih", "w_hh", "b_ih", "b_hh")]
    input_weight, hidden_weight, input_bias, hidden_bias = weights
    assert input_weight is not None
    assert hidden_weight is not None
    if all(nodes is None or all(node is nodes[0] for node in nodes) for nodes in weights):
        return _folded_cell(emitter, bundle, x, states, [None if nodes is None else emitter.single(nodes[0]) for nodes in weights]), FOLDED
    bias = bias_of(emitter, input_bias, hidden_bias if kind != "gru_cell" else None, lanes)
    if x.dim is None and emitter.choose(bundle, ("wide_linear", "baddbmm")) == "wide_linear":
        gates, lowering = wide(emitter, x.node, input_weight, bias, lanes), "wide_linear"
    else:
        gates, lowering = product(emitter, emitter.front(x, lanes), input_weight, bias, lanes), "baddbmm"
    fronts = [emitter.front(state, lanes) for state in states]
    hidden = transposed(emitter, hidden_weight, lanes)
    if kind == "lstm_cell":
        return Packed(call(lstm_step, gates, *fronts, hidden), 0), lowering
    if kind == "gru_cell":
        own = bias_of(emitter, hidden_bias, None, lanes)
        return Packed(call(gru_step, gates, *fronts, hidden, None if own is None else call(torch.unsqueeze, own, 1)), 0), lowering
    return Packed(call(rnn_step, gates, *fronts, hidden, kind == "rnn_relu_cell"), 0), lowering


def _folded_cell(emitter: Emitter, bundle: Bundle, x: Packed, states: list[Packed], weights: list[Node | None]) -> Packed:
    assert bundle.op is not None
    call, lanes = emitter.call, len(bundle.members)
    folded = [_beside(emitter, value, 0, lanes) for value in (x, *states)]
    lstm = bundle.name == "lstm_cell"
    made = call(bundle.op.func, folded[0], tuple(folded[1:]) if lstm else folded[1], *weights)
    if not lstm:
        return Packed(call(torch.unflatten, made, 0, (lanes, -1)), 0)
    outputs = [call(torch.unflatten, call(operator.getitem, made, position), 0, (lanes, -1)) for position in range(2)]
    return Packed(call(together, *outputs), 0)
