"""Recurrent lanes: LSTM, GRU, Elman networks and their cells, against the original model itself (torch.vmap has no rule for them)."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import checks
import fxfuse
from fxfuse.passes import recurrent

KINDS = {"lstm": nn.LSTM, "gru": nn.GRU, "tanh": nn.RNN, "relu": nn.RNN}


def network(kind: str, *sizes: int, **options: Any) -> nn.Module:
    if kind in ("tanh", "relu"):
        options["nonlinearity"] = kind
    return KINDS[kind](*sizes, **options)


class Causality(nn.Module):
    """cLSTM for Granger causality: for each variable a recurrent network on all variables, and a head."""

    def __init__(self, kind: str, lanes: int = 3, **options: Any) -> None:
        super().__init__()
        self.networks = nn.ModuleList(network(kind, 2, 4, **options) for _ in range(lanes))
        width = (options.get("proj_size") or 4) * (2 if options.get("bidirectional") else 1)
        self.heads = nn.ModuleList(nn.Linear(width, 1) for _ in range(lanes))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([head(net(x)[0]) for net, head in zip(self.networks, self.heads, strict=True)], dim=-1)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first": {"batch_first": True},
    "without bias": {"bias": False},
    "two layers": {"num_layers": 2},
    "both directions": {"bidirectional": True},
    "everything": {"num_layers": 2, "bidirectional": True, "batch_first": True},
}


@pytest.mark.parametrize(("kind", "options"), [(k, o) for k in KINDS for o in OPTIONS if k == "lstm" or o in ("plain", "everything")])
def test_one_input_for_all(kind: str, options: str) -> None:
    model = checks.randomized(Causality(kind, **OPTIONS[options]))
    fused = checks.assert_fused_equals(model, checks.randn(3, 4, 2), batches=(1,), **checks.QUICK)
    assert any(op.op in ("lstm", "gru", "rnn_tanh", "rnn_relu") for op in fxfuse.report(fused).fused[0].ops)


@pytest.mark.parametrize(
    ("kind", "options"), [("lstm", {}), ("lstm", {"batch_first": True}), ("gru", OPTIONS["everything"]), ("tanh", OPTIONS["two layers"])]
)
def test_one_wide_product_for_one_input(kind: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxfuse.planning.plan._preferred", lambda options: "")  # the rule's first choice
    model = checks.randomized(Causality(kind, **options))
    fused = checks.assert_fused_equals(model, checks.randn(3, 4, 2), batches=(1,), **checks.QUICK)
    assert "wide_linear, one recurrence" in [op.lowering for op in fxfuse.report(fused).fused[0].ops]


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_calls_that_stay_calls_between_packed_neighbours(kind: str) -> None:
    """Torch's LSTM in float32 is one launch: written out it would be more, but its heads are packed all the same."""
    torch.manual_seed(0)
    model = Causality(kind, num_layers=2, bidirectional=True)
    fused = fxfuse.optimize(model, torch.randn(3, 4, 2), objective="launches")
    lowerings = {op.op: op.lowering for op in fxfuse.report(fused).fused[0].ops}
    assert lowerings["linear"] == "baddbmm"
    if torch.backends.mkldnn.is_available() and kind == "lstm":
        assert lowerings["lstm"] == "lane by lane"
    doubled, wanted = fused.double(), model.double()
    for training in (True, False):
        doubled.train(training), wanted.train(training)
        x = checks.randn(2, 4, 2)
        checks.assert_close(doubled(x), wanted(x), f"training={training}")


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_lane_by_lane(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxfuse.planning.plan._preferred", lambda options: "lane by lane")
    monkeypatch.setattr("fxfuse.planning.estimate.Estimator.loop", lambda *_: 2.0)  # no better than the loop, by launches or by time
    monkeypatch.setattr("fxfuse.planning.estimate.Estimator.program", lambda *_: 1.0)
    for model, x in ((Causality(kind, **OPTIONS["everything"]), checks.randn(3, 4, 2)), (OwnInputs(kind), checks.randn(3, 4, 6))):
        fused = checks.assert_fused_equals(checks.randomized(model), x, batches=(1,), objective="time", **checks.QUICK)
        assert "lane by lane" in [op.lowering for op in fxfuse.report(fused).fused[0].ops]


@pytest.mark.parametrize("options", [{}, {**OPTIONS["everything"], "bias": False}], ids=["plain", "all"])
def test_projections(options: dict[str, Any]) -> None:
    model = checks.randomized(Causality("lstm", proj_size=3, **options))
    checks.assert_fused_equals(model, checks.randn(4, 5, 2), batches=(1, 3), **checks.QUICK)


class OwnInputs(nn.Module):
    """One network per variable, as in temporal fusion transformers; the whole result is used."""

    def __init__(self, kind: str, variables: int = 3, width: int = 2, **options: Any) -> None:
        super().__init__()
        self.networks = nn.ModuleList(network(kind, width, 3, batch_first=True, **options) for _ in range(variables))
        self.width = width

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        outputs, last = [], []
        for i, net in enumerate(self.networks):
            out, state = net(x[..., i * self.width : (i + 1) * self.width])
            outputs.append(out)
            last.extend(state if isinstance(state, tuple) else [state])
        return torch.stack(outputs, 2), torch.cat(last, 0)


@pytest.mark.parametrize(
    ("kind", "options"), [("lstm", {"num_layers": 2, "bidirectional": True}), ("lstm", {}), ("gru", {"bidirectional": True}), ("tanh", {})]
)
def test_own_inputs_and_last_states(kind: str, options: dict[str, Any]) -> None:
    model = checks.randomized(OwnInputs(kind, **options))
    checks.assert_fused_equals(model, checks.randn(4, 3, 6), batches=(1,), **checks.QUICK)


def test_one_variable_each_takes_the_whole_pipeline() -> None:
    model = checks.randomized(OwnInputs("lstm", 4, 1))
    fused = checks.assert_fused_equals(model, checks.randn(4, 3, 4), batches=(1,))
    heavy = fxfuse.launches.count(lambda: fused(checks.randn(4, 3, 4))).heavy
    assert heavy == 1 + 3  # the inputs' part, and one product per step


class LastStates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict({name: nn.GRU(3, 4) for name in ("news", "price", "volume")})
        self.mix = nn.Linear(12, 2)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.mix(torch.cat([self.encoders[name](x)[1][-1] for name, x in inputs.items()], -1))


def test_last_states_of_named_inputs() -> None:
    names = ("news", "price", "volume")
    x = {name: checks.randn(6, 4, 3, seed=i) for i, name in enumerate(names)}
    model = checks.randomized(LastStates())

    def make(rows: int) -> Any:
        return ({name: checks.randn(6, rows, 3, seed=i + rows) for i, name in enumerate(names)},)

    checks.assert_fused_equals(model, (x,), make=make, batches=(1, 7), **checks.QUICK)


class GivenStates(nn.Module):
    def __init__(self, kind: str, own: bool) -> None:
        super().__init__()
        self.networks = nn.ModuleList(network(kind, 3, 4, num_layers=2, batch_first=True) for _ in range(3))
        self.starts = nn.ModuleList(nn.Linear(2, 4) for _ in range(3))
        self.own = own

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        outputs = []
        for net, start in zip(self.networks, self.starts, strict=True):
            h = (start if self.own else self.starts[0])(context).expand(2, -1, -1)
            if isinstance(net, nn.LSTM):
                out, (h, c) = net(x, (h, h.tanh()))
                outputs.append(out[:, -1] + h[0] * c[1])
            else:
                out, h = net(x, h.contiguous())
                outputs.append(out[:, -1] - h[0])
        return torch.stack(outputs)


@pytest.mark.parametrize(("kind", "own"), [("lstm", True), ("lstm", False), ("gru", True), ("tanh", False)])
def test_given_states(kind: str, own: bool) -> None:
    model = checks.randomized(GivenStates(kind, own))

    def make(rows: int) -> Any:
        return checks.randn(rows, 3, 3, seed=rows), checks.randn(rows, 2, seed=rows + 1)

    checks.assert_fused_equals(model, make(4), make=make, batches=(1, 6), **checks.QUICK)


class LearnedStart(nn.Module):
    """A learned initial state per lane."""

    def __init__(self) -> None:
        super().__init__()
        self.networks = nn.ModuleList(nn.LSTM(2, 3, batch_first=True) for _ in range(3))
        self.h0 = nn.ParameterList(nn.Parameter(torch.zeros(1, 1, 3)) for _ in range(3))
        self.c0 = nn.ParameterList(nn.Parameter(torch.zeros(1, 1, 3)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for i, net in enumerate(self.networks):
            start = (self.h0[i].repeat(1, x.shape[0], 1), self.c0[i].repeat(1, x.shape[0], 1))
            outputs.append(net(x[:, :, i], start)[0])
        return torch.stack(outputs, 1)


def test_learned_states() -> None:
    checks.assert_fused_equals(checks.randomized(LearnedStart()), checks.randn(4, 5, 3, 2), batches=(1, 3), **checks.QUICK)


class OneForAll(nn.Module):
    """The same network on every variable."""

    def __init__(self, kind: str, batch_first: bool) -> None:
        super().__init__()
        self.network = network(kind, 1, 4, batch_first=batch_first, num_layers=2, bidirectional=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        results = [self.network(x[..., i : i + 1]) for i in range(x.shape[-1])]
        states = [state[0] + state[1] if isinstance(state, tuple) else state for _, state in results]
        return torch.stack([out for out, _ in results]), torch.stack(states, 1)


@pytest.mark.parametrize(("kind", "batch_first"), [("lstm", True), ("lstm", False), ("gru", True), ("tanh", False)])
def test_one_network_on_many_inputs(kind: str, batch_first: bool) -> None:
    model = checks.randomized(OneForAll(kind, batch_first))
    fused = checks.assert_fused_equals(model, checks.randn(4, 3, 3), batches=(1,), specialised=True, **checks.QUICK)
    assert "lanes in the batch" in [op.lowering for op in fxfuse.report(fused).fused[0].ops]


class Cells(nn.Module):
    """Agents with a recurrent policy: some steps in Python."""

    def __init__(self, cell: Any, agents: int = 3, steps: int = 3, **options: Any) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(nn.Linear(4, 3) for _ in range(agents))
        self.cells = nn.ModuleList(cell(3, 5, **options) for _ in range(agents))
        self.heads = nn.ModuleList(nn.Linear(5, 2) for _ in range(agents))
        self.steps = steps

    def forward(self, observations: Tensor) -> Tensor:
        actions = []
        for i, (encoder, cell, head) in enumerate(zip(self.encoders, self.cells, self.heads, strict=True)):
            x, state = torch.relu(encoder(observations[:, i])), None
            for _ in range(self.steps):
                state = cell(x, state)
            actions.append(head(state[0] if isinstance(state, tuple) else state))
        return torch.stack(actions, 1)


@pytest.mark.parametrize(
    ("cell", "options"),
    [
        (nn.LSTMCell, {}), (nn.LSTMCell, {"bias": False}), (nn.GRUCell, {}), (nn.GRUCell, {"bias": False}), (nn.RNNCell, {}),
        (nn.RNNCell, {"bias": False, "nonlinearity": "relu"}),
    ],
)  # fmt: skip
def test_cells(cell: Any, options: dict[str, Any]) -> None:
    model = checks.randomized(Cells(cell, **options))
    checks.assert_fused_equals(model, checks.randn(4, 3, 4), most_heavy=8, batches=(1,), **checks.QUICK)


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell])
def test_cells_in_half_precision(cell: Any) -> None:
    """Shapes are found on tensors without data there, also those of the states that the cells make themselves."""
    torch.manual_seed(0)
    model, x = Cells(cell).bfloat16(), torch.randn(4, 3, 4).bfloat16()
    fused = fxfuse.optimize(model, x, objective="launches", tune=False)
    report = fxfuse.report(fused)
    assert report.fused, str(report)
    assert not report.refused, str(report)
    checks.assert_close(fused(x), model(x), "bfloat16", rtol=0.05)


class GivenCells(nn.Module):
    """Hidden states go in and come out, one tensor for all agents or a list; each agent sees the same observation or its own."""

    def __init__(self, cell: Any, shared_input: bool, shared_cell: bool) -> None:
        super().__init__()
        own = [cell(3, 4) for _ in range(3)]
        self.cells = nn.ModuleList(own[:1] if shared_cell else own)
        self.shared_input = shared_input

    def forward(self, x: Tensor, hidden: Tensor) -> list[Tensor]:
        found = []
        for i in range(3):
            cell = self.cells[i % len(self.cells)]
            seen = x[:, 0] if self.shared_input else x[:, i]
            if isinstance(cell, nn.LSTMCell):
                h, c = cell(seen, (hidden[:, i], hidden[:, i].sin()))
                found += [h, c]
            else:
                found.append(cell(seen, hidden[:, i]))
        return found


# Of the forms that a rule has: "" is its first choice, "baddbmm" the batched products.
@pytest.mark.parametrize(
    ("cell", "shared_input", "shared_cell", "prefer"),
    [
        (nn.LSTMCell, True, False, ""), (nn.LSTMCell, True, False, "baddbmm"), (nn.LSTMCell, False, False, ""),
        (nn.LSTMCell, False, True, ""), (nn.LSTMCell, True, True, ""), (nn.GRUCell, True, False, ""),
        (nn.GRUCell, False, True, ""), (nn.RNNCell, False, False, ""), (nn.RNNCell, True, True, ""),
    ],
)  # fmt: skip
def test_cells_with_states(cell: Any, shared_input: bool, shared_cell: bool, prefer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxfuse.planning.plan._preferred", lambda options: prefer)
    model = checks.randomized(GivenCells(cell, shared_input, shared_cell))
    x = checks.randn(4, 3, 3), checks.randn(4, 3, 4, seed=2)
    checks.assert_fused_equals(model, x, batches=(1,), **checks.QUICK)


class Unbatched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.networks = nn.ModuleList(nn.GRU(2, 3) for _ in range(3))
        self.cells = nn.ModuleList(nn.LSTMCell(3, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([cell(net(x)[0][-1])[0] for net, cell in zip(self.networks, self.cells, strict=True)])


def test_no_batch() -> None:
    checks.assert_fused_equals(checks.randomized(Unbatched()), checks.randn(6, 2), batches=(1, 9), **checks.QUICK)


class DirectionsOfATree(nn.Module):
    """Two loops over two kinds of networks; outputs are used in part, by some lanes only."""

    def __init__(self) -> None:
        super().__init__()
        self.long = nn.ModuleList(nn.LSTM(2, 3) for _ in range(4))
        self.short = nn.ModuleList(nn.GRU(2, 3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        results = [net(x) for net in self.long]
        total = torch.stack([out for out, _ in results]).sum(0)
        for _, (h, c) in results[1:3]:
            total = total + h * c
        return total + results[3][1][1] + self.short[0](x)[0] * self.short[1](x)[0]


def test_states_of_some_lanes() -> None:
    checks.assert_fused_equals(checks.randomized(DirectionsOfATree()), checks.randn(4, 5, 2), batches=(1, 3), **checks.QUICK)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_dropout_between_layers(kind: str) -> None:
    torch.manual_seed(0)
    model = checks.randomized(Causality(kind, num_layers=2, dropout=0.5))
    x = checks.randn(2, 300, 2)
    fused = checks.assert_fused_equals(model, x, random_in_train=True, batches=(1,), tune=False)  # validation compares with fixed masks
    plan = fxfuse.report(fused).fused[0]
    assert any("random" in note for note in plan.notes)
    model.train(), fused.train()
    draws = [torch.stack([m(x) for _ in range(60)]) for m in (model, fused)]
    for first, second in zip(*[(d.mean((0, 1, 2)), d.std(0).mean((0, 1))) for d in draws], strict=True):
        assert torch.allclose(first, second, rtol=0.15, atol=0.03)
    outs = fused(x)
    assert not torch.equal(outs, fused(x))


def test_dropout_masks_differ_between_lanes() -> None:
    model = Causality("lstm", num_layers=2, dropout=0.5).double()
    with torch.no_grad():
        for net, head in zip(model.networks, model.heads, strict=True):
            net.load_state_dict(model.networks[0].state_dict())
            head.load_state_dict(model.heads[0].state_dict())
    fused = fxfuse.optimize(model, checks.randn(6, 3, 2), objective="launches", **checks.QUICK).train()
    out = fused(checks.randn(6, 3, 2))
    assert not torch.allclose(out[..., 0], out[..., 1])


def test_eval_of_dropout_draws_nothing() -> None:
    model = checks.randomized(Causality("gru", num_layers=2, dropout=0.5)).eval()
    fused = fxfuse.optimize(model, checks.randn(6, 3, 2), objective="launches", **checks.QUICK).eval()
    state = torch.get_rng_state()
    fused(checks.randn(6, 3, 2))
    assert torch.equal(state, torch.get_rng_state())


def test_the_length_of_sequences_is_free() -> None:
    model = checks.randomized(Causality("lstm", batch_first=True))
    x = checks.randn(4, 6, 2)
    fused = fxfuse.optimize(model, x, objective="launches", strict=True, tune=False)
    for shape in ((2, 3, 2), (5, 1, 2), (1, 11, 2)):
        checks.assert_close(fused(checks.randn(*shape)), model(checks.randn(*shape)), str(shape))


def test_fallback_reads_the_pack() -> None:
    """A call that the guard turns away runs nn.LSTM on views of the pack: ``_flat_weights`` must be them, and train them."""
    model = checks.randomized(Causality("lstm", num_layers=2))
    fused = fxfuse.optimize(model, checks.randn(5, 6, 2), objective="launches", **checks.QUICK)
    unbatched = checks.randn(5, 2)
    for each in (model, fused):
        each.zero_grad()
        each(unbatched).sum().backward()
    assert fxfuse.report(fused).fallbacks
    gradients = fxfuse.weights.packing.original_gradients(fused)
    for name, parameter in model.named_parameters():
        checks.assert_close(gradients[name], parameter.grad, name)
    with torch.no_grad():
        for parameter in (*model.parameters(), *fused.parameters()):
            parameter.mul_(0.5)
    checks.assert_close(fused(unbatched), model(unbatched), "after a step")
    assert fused.networks[0]._flat_weights[0].shape == (16, 2)


def test_saved_and_loaded(tmp_path: Any) -> None:
    model = checks.randomized(OwnInputs("gru"))
    x = checks.randn(4, 5, 6)
    fused = fxfuse.optimize(model, x, objective="launches", **checks.QUICK)
    torch.save(fused, tmp_path / "fused.pt")
    loaded = torch.load(tmp_path / "fused.pt", weights_only=False)
    for got, want in zip(loaded(x), model(x), strict=True):
        checks.assert_close(got, want, "loaded")


class Packs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.networks = nn.ModuleList(nn.LSTM(2, 3, batch_first=True) for _ in range(3))

    def forward(self, x: nn.utils.rnn.PackedSequence) -> Tensor:
        return torch.cat([net(x)[1][0] for net in self.networks], -1)


def test_packed_sequences_stay() -> None:
    model = checks.randomized(Packs())
    lengths = torch.tensor([5, 3, 2])
    x = nn.utils.rnn.pack_padded_sequence(checks.randn(3, 5, 2), lengths, batch_first=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fused = fxfuse.optimize(model, (x,), objective="launches")
    report = fxfuse.report(fused)
    assert not report.fused
    assert report.refused
    checks.assert_close(fused(x), model(x), "packed")


class PackedInside(nn.Module):
    """Lengths are given as a list of numbers, the packing is made in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.networks = nn.ModuleList(nn.GRU(2, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, [5, 3, 2])
        return torch.cat([net(packed)[1] for net in self.networks], -1)


def test_packing_inside_stays() -> None:
    model = checks.randomized(PackedInside())
    x = checks.randn(5, 3, 2)
    fused = fxfuse.optimize(model, x, objective="launches")
    assert not fxfuse.report(fused).fused
    assert "packed" in str(fxfuse.report(fused)) or "size depends on the data" in str(fxfuse.report(fused))
    checks.assert_close(fused(x), model(x), "packed")


@pytest.mark.parametrize("kind", ["lstm", "gru", "tanh", "relu"])
def test_steps_are_those_of_torch(kind: str) -> None:
    """The recurrences by themselves, backwards too."""
    net = checks.randomized(network(kind, 3, 4, bidirectional=True))
    x = checks.randn(5, 2, 3)
    want, last = net(x)
    weight_ih, weight_hh, bias_ih, bias_hh = (getattr(net, f"{n}_l0_reverse") for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    bias = bias_ih if kind == "gru" else bias_ih + bias_hh
    gates = (x @ weight_ih.T + bias).unsqueeze(0)
    h = c = torch.zeros(1, 2, 4, dtype=torch.float64)
    weight = weight_hh.T.unsqueeze(0)
    if kind == "lstm":
        out, *states = recurrent.lstm_over_time(gates, h, c, weight, None, True, 1)
    elif kind == "gru":
        out, *states = recurrent.gru_over_time(gates, h, weight, bias_hh.view(1, 1, -1), True, 1)
    else:
        out, *states = recurrent.rnn_over_time(gates, h, weight, kind == "relu", True, 1)
    checks.assert_close(out[0], want[..., 4:], "outputs")
    for state, wanted in zip(states, last if isinstance(last, tuple) else (last,), strict=True):
        checks.assert_close(state[0], wanted[1], "last state")


class LastStep(nn.Module):
    """Forecasters of one channel each: a recurrent network, and a head on what its last step says (``reading`` says how)."""

    def __init__(self, kind: str, reading: str, **options: Any) -> None:
        super().__init__()
        self.networks = nn.ModuleList(network(kind, 1, 4, **options) for _ in range(3))
        width = (options.get("proj_size") or 4) * (2 if options.get("bidirectional") else 1)
        self.heads = nn.ModuleList(nn.Linear(width, 2) for _ in range(3))
        self.reading, self.time = reading, 1 if options.get("batch_first") else 0

    def read(self, out: Tensor, state: Any) -> Tensor:
        last = out.select(self.time, -1)
        if self.reading == "state":
            return state[0][-1] if isinstance(state, tuple) else state[-1]
        if self.reading == "first too":
            return last + out.select(self.time, 0)
        if self.reading == "twice":
            return last * torch.sigmoid(out.select(self.time, -1))
        if self.reading == "summary":
            return torch.cat([last[..., :4], out.select(self.time, 0)[..., 4:]], -1)
        if self.reading == "both states":
            both = state[0] if isinstance(state, tuple) else state
            return torch.cat([both[-2], both[-1]], -1)
        if self.reading == "state too":
            return last + (state[0][-1] if isinstance(state, tuple) else state[-1])
        return last

    def forward(self, x: Tensor) -> Tensor:
        lanes = enumerate(zip(self.networks, self.heads, strict=True))
        return torch.stack([head(self.read(*net(x[..., i : i + 1]))) for i, (net, head) in lanes], -1)


def stacking(fused: nn.Module) -> list[bool]:
    """Of every recurrence in the fused graph, whether it stacks its outputs."""
    program = next(iter(fxfuse.report(fused).fused[0].programs.values()))
    calls = [node for node in program.graph.nodes if "over_time" in getattr(node.target, "__name__", "")]
    return [len(node.args) < len(inspect.signature(node.target).parameters) for node in calls]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("reading", "options", "stacked"),
    [
        ("last", {}, [False]),
        ("last", {"batch_first": True}, [False]),
        ("last", {"num_layers": 2}, [True, False]),
        ("last", {"bidirectional": True, "batch_first": True}, [False, True]),
        ("last", {"bidirectional": True, "num_layers": 2}, [True, True, False, True]),
        ("twice", {"batch_first": True}, [False]),
        ("state", {}, [False]),
        ("first too", {}, [True]),
        ("state too", {}, [False]),
        ("summary", {"bidirectional": True, "batch_first": True}, [False, False]),
        ("summary", {"bidirectional": True}, [False, False]),
        ("both states", {"bidirectional": True}, [False, False]),
    ],
)
def test_outputs_that_nobody_reads_are_not_stacked(kind: str, reading: str, options: dict[str, Any], stacked: list[bool]) -> None:
    model = checks.randomized(LastStep(kind, reading, **options))
    x = checks.randn(3, 5, 3)
    fused = checks.assert_fused_equals(model, x, batches=(1,), **checks.QUICK)
    assert stacking(fused) == stacked


def test_the_last_step_of_projected_states() -> None:
    model = checks.randomized(LastStep("lstm", "last", proj_size=2, batch_first=True))
    fused = checks.assert_fused_equals(model, checks.randn(3, 5, 3), batches=(1,), **checks.QUICK)
    assert stacking(fused) == [False]


def test_one_step_is_first_and_last() -> None:
    model = checks.randomized(LastStep("gru", "first too"))
    fused = checks.assert_fused_equals(model, checks.randn(1, 5, 3), batches=(), **checks.QUICK)
    assert fxfuse.report(fused).fused


class BothResults(nn.Module):
    """The last step as one result and the last state as another: tensors of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.networks = nn.ModuleList(nn.GRU(1, 4) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        made = [net(x[..., i : i + 1]) for i, net in enumerate(self.networks)]
        return torch.stack([out[-1] for out, _ in made]), torch.stack([state[0] for _, state in made])


def test_last_step_and_state_are_not_one_tensor() -> None:
    model = checks.randomized(BothResults())
    x = checks.randn(4, 5, 3)
    fused = checks.assert_fused_equals(model, x, batches=(1,), **checks.QUICK)
    last, state = fused(x)
    with torch.no_grad():
        last.zero_()
    checks.assert_close(state, model(x)[1], "the state")
