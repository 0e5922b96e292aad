"""State is put back, chance is taken out, and factories give float64 where nothing else was asked for."""

import random
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxfuse.models import determinism
from fxfuse.models.determinism import DefaultFloat64, Derandomized, preserved_state, same_bits

# -- preserved_state --------------------------------------------------------------------------------------------------


def test_random_state_is_put_back():
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    with preserved_state():
        inside = (torch.rand(3).tolist(), random.random(), np.random.rand())
    assert inside == (torch.rand(3).tolist(), random.random(), np.random.rand())


def test_buffers_come_back_with_their_bits():
    model = nn.BatchNorm1d(2)
    model.running_mean[:] = torch.tensor([torch.nan, -0.0])
    mean, count = model.running_mean, model.num_batches_tracked
    before = mean.clone()
    with preserved_state(model):
        model(torch.ones(4, 2))
        assert int(count) == 1
    assert model.running_mean is mean
    assert model.num_batches_tracked is count
    assert same_bits(mean, before)
    assert int(count) == 0


def test_untouched_buffers_are_not_written():
    model = nn.BatchNorm1d(2)
    version = model.running_mean._version
    with preserved_state(model):
        model.eval()
        model(torch.ones(4, 2))
    assert model.running_mean._version == version


def test_replaced_added_and_deleted_buffers():
    model = nn.Module()
    model.register_buffer("a", torch.zeros(2))
    model.register_buffer("b", torch.ones(2))
    model.register_buffer("none", None)
    a, b = model.a, model.b
    with preserved_state(model):
        model.a = torch.full((3,), 7.0)
        del model.b
        model.register_buffer("c", torch.ones(1))
        model.none = torch.ones(1)
    assert model.a is a
    assert model.b is b
    assert model.none is None
    assert list(dict(model.named_buffers())) == ["a", "b"]


def test_flags_and_grad_mode():
    model = nn.Sequential(nn.Linear(1, 1), nn.Dropout())
    model[1].eval()
    with preserved_state(model):
        model.eval()
        torch.set_grad_enabled(False)
    assert [m.training for m in model.modules()] == [True, True, False]
    assert torch.is_grad_enabled()


def test_an_exception_restores_too():
    model = nn.BatchNorm1d(2)
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), preserved_state(model):
        model(torch.randn(4, 2))
        raise ZeroDivisionError
    assert int(model.num_batches_tracked) == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_same_bits():
    assert same_bits(torch.tensor([torch.nan]), torch.tensor([torch.nan]))
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(torch.zeros(2), torch.zeros(1, 2))
    assert not same_bits(torch.zeros(2), torch.zeros(2, dtype=torch.float64))
    assert same_bits(torch.eye(2)[:, 0], torch.tensor([1.0, 0.0]))
    assert same_bits(torch.tensor(True), torch.tensor(True))


# -- Derandomized -----------------------------------------------------------------------------------------------------

DROPOUTS = {
    "dropout": lambda x, p: F.dropout(x, p, training=True),
    "dropout in place": lambda x, p: F.dropout(x.clone(), p, training=True, inplace=True),
    "dropout1d": lambda x, p: F.dropout1d(x, p, training=True),
    "dropout2d": lambda x, p: F.dropout2d(x[..., None], p, training=True)[..., 0],
    "dropout3d": lambda x, p: F.dropout3d(x[..., None, None], p, training=True)[..., 0, 0],
    "alpha_dropout": lambda x, p: F.alpha_dropout(x, p, training=True),
    "feature_alpha_dropout": lambda x, p: F.feature_alpha_dropout(x, p, training=True),
    "torch.dropout": lambda x, p: torch.dropout(x, p, True),
    "native_dropout": lambda x, p: torch.native_dropout(x, p, True)[0],
    "module": lambda x, p: nn.Dropout(p)(x),
    "inference mode": lambda x, p: torch.inference_mode()(F.dropout)(x, p),
}


@pytest.mark.parametrize("drop", DROPOUTS.values(), ids=DROPOUTS.keys())
class TestDropout:
    def test_lanes_and_pack_agree(self, drop):
        x = torch.randn(5, 4, 6)
        with Derandomized():
            loop = torch.stack([drop(x[i : i + 1], 0.3)[0] for i in range(5)])
            packed = drop(x, 0.3)
        assert torch.equal(loop, packed)

    def test_it_is_not_the_identity_and_depends_on_p(self, drop):
        x = torch.randn(2, 3, 4)
        with Derandomized():
            a, b = drop(x, 0.3), drop(x, 0.5)
        assert not torch.allclose(a, x, rtol=1e-3)
        assert not torch.allclose(a, b, rtol=1e-3)

    def test_dropping_everything(self, drop):
        x = torch.ones(2, 3, 4)
        with Derandomized():
            assert not drop(x, 1.0).isnan().any()


def test_eval_mode_is_the_identity():
    x = torch.randn(3)
    with Derandomized():
        assert torch.equal(F.dropout(x, 0.5, training=False), x)


def test_in_place_stays_in_place():
    x = torch.ones(3)
    with Derandomized():
        y = F.dropout(x, 0.5, training=True, inplace=True)
    assert y is x
    assert x.tolist() == [2, 2, 2]


def test_gradients_have_the_same_scale():
    x = torch.ones(3, requires_grad=True)
    with Derandomized():
        F.dropout(x, 0.75).sum().backward()
    assert x.grad.tolist() == [4, 4, 4]


NOISE = {
    "rand": lambda *size: torch.rand(*size),
    "randn": lambda *size: torch.randn(*size),
    "rand_like": lambda *size: torch.rand_like(torch.empty(*size)),
    "randn_like": lambda *size: torch.randn_like(torch.empty(*size)),
    "normal": lambda *size: torch.normal(2.0, 3.0, size),
    "normal of tensors": lambda *size: torch.normal(torch.ones(size), torch.full(size, 2.0)),
    "normal_": lambda *size: torch.empty(*size).normal_(1, 2),
    "uniform_": lambda *size: torch.empty(*size).uniform_(-1, 2),
    "exponential_": lambda *size: torch.empty(*size).exponential_(2.0),
    "bernoulli": lambda *size: torch.bernoulli(torch.full(size, 0.7)),
    "bernoulli_": lambda *size: torch.empty(*size).bernoulli_(0.7),
    "bernoulli_ of a tensor": lambda *size: torch.empty(*size).bernoulli_(torch.full(size, 0.7)),
    "randint": lambda *size: torch.randint(2, 9, size),
    "randint_like": lambda *size: torch.randint_like(torch.empty(*size), 2, 9),
    "gumbel": lambda *size: F.gumbel_softmax(torch.ones(*size), dim=0),
    "distribution": lambda *size: torch.distributions.Normal(torch.zeros(size), 1.0).rsample(),
    "poisson": lambda *size: torch.poisson(torch.full(size, 3.0)),
    "cauchy_": lambda *size: torch.empty(*size).cauchy_(),
    "geometric_": lambda *size: torch.empty(*size).geometric_(0.4),
    "log_normal_": lambda *size: torch.empty(*size).log_normal_(),
    "random_": lambda *size: torch.empty(*size).random_(3, 10),
}


@pytest.mark.parametrize("make", NOISE.values(), ids=NOISE.keys())
def test_noise_is_fixed_and_knows_no_place(make):
    with Derandomized() as mode:
        a, b, lane = make(4, 3), make(4, 3), make(4, 1)
    assert torch.equal(a, b)
    assert torch.equal(a[:, :1], lane)
    assert torch.equal(a[:, :1], a[:, 1:2])
    assert not mode.undefined


def test_bernoulli_of_a_tensor_depends_on_the_element():
    p = torch.tensor([0.1, 0.9, 0.3, 0.6])
    with Derandomized():
        assert torch.bernoulli(p).tolist() == [0, 1, 0, 1]


def test_permutations_and_draws_of_classes():
    with Derandomized():
        assert torch.randperm(4).tolist() == [0, 1, 2, 3]
        weights = torch.tensor([[0.1, 0.7, 0.2]])
        assert torch.multinomial(weights, 2).tolist() == [[1, 2]]
        assert torch.multinomial(weights, 3, replacement=True).tolist() == [[1, 1, 1]]
        assert torch.distributions.Categorical(weights).sample().tolist() == [1]


def test_attention_without_dropout():
    q = torch.randn(1, 2, 3, 4)
    with Derandomized():
        got = [F.scaled_dot_product_attention(q, q, q, dropout_p=p) for p in (0.3, 0.3)]
    assert torch.equal(got[0], got[1])


def test_inside_of_library_modules():
    x = torch.randn(3, 2, 8)
    for module in (nn.MultiheadAttention(8, 2, dropout=0.5), nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5)):
        args = (x, x, x) if isinstance(module, nn.MultiheadAttention) else (x,)
        with Derandomized():
            a, b = module(*args), module(*args)
        a, b = (t[0] if isinstance(t, tuple) else t for t in (a, b))
        assert torch.equal(a, b)
        assert not torch.equal(a, (module.eval()(*args)[0] if isinstance(module, nn.MultiheadAttention) else module.eval()(*args)))


def test_lstm_between_its_layers():
    lstm, x = nn.LSTM(4, 4, 2, dropout=0.5), torch.randn(3, 2, 4)
    with Derandomized():
        assert torch.equal(lstm(x)[0], lstm(x)[0])


def test_rrelu_has_the_mean_slope_and_its_gradient():
    x = torch.tensor([-8.0, 2.0], requires_grad=True)
    with Derandomized():
        y = F.rrelu(x, 0.25, 0.75, training=True)
        y.sum().backward()
    assert y.tolist() == [-4, 2]
    assert x.grad.tolist() == [0.5, 1]


def test_what_has_no_fixed_form_is_named(monkeypatch):
    monkeypatch.delitem(determinism._FIXED, "rand")
    with Derandomized() as mode:
        torch.randn(3)
        assert not mode.undefined
        torch.rand(3)
    assert mode.undefined == {"rand"}


def test_functions_that_draw_inside():
    with Derandomized() as mode:
        got = [F.fractional_max_pool2d(torch.arange(16.0).view(1, 1, 4, 4), 2, output_size=2) for _ in range(2)]
    assert torch.equal(got[0], got[1])
    assert not mode.undefined


def test_narrow_precisions_are_seen():
    with Derandomized() as mode:
        x = torch.ones(2, dtype=torch.float64) * 2
    assert not mode.precisions
    assert not mode.needed
    with Derandomized() as mode:
        x.float().double()
    assert mode.precisions == {torch.float32}


# -- DefaultFloat64 ---------------------------------------------------------------------------------------------------

MADE = {
    "zeros": lambda: torch.zeros(2),
    "ones": lambda: torch.ones((2, 3)),
    "empty": lambda: torch.empty(2),
    "full": lambda: torch.full((2,), 0.5),
    "rand": lambda: torch.rand(2),
    "randn": lambda: torch.randn(2, 3),
    "linspace": lambda: torch.linspace(0, 1, 3),
    "logspace": lambda: torch.logspace(0, 1, 3),
    "arange": lambda: torch.arange(0.0, 1.0, 0.25),
    "eye": lambda: torch.eye(3),
    "tensor": lambda: torch.tensor([0.1, 2]),
    "tensor, nested": lambda: torch.tensor([[0.1], [2]]),
    "as_tensor": lambda: torch.as_tensor(0.1),
    "hann_window": lambda: torch.hann_window(4),
    "fftfreq": lambda: torch.fft.fftfreq(4),
    "integers over integers": lambda: torch.arange(3) / 3,
    "integers times a float": lambda: torch.arange(3) * 0.1,
    "a float minus integers": lambda: 0.1 - torch.arange(3),
    "root of integers": lambda: torch.arange(3).sqrt(),
    "where of floats": lambda: torch.where(torch.tensor([True, False]), 1.0, 0.0),
}
KEPT = {
    "spelled out": (lambda: torch.zeros(2, dtype=torch.float32), torch.float32),
    "half": (lambda: torch.ones(2, dtype=torch.float16), torch.float16),
    "zeros_like": (lambda: torch.zeros_like(torch.zeros(1, dtype=torch.float32)), torch.float32),
    "new_zeros": (lambda: torch.zeros(1, dtype=torch.float32).new_zeros(2), torch.float32),
    "full of integers": (lambda: torch.full((2,), 3), torch.int64),
    "full of truth": (lambda: torch.full((2,), True), torch.bool),
    "arange": (lambda: torch.arange(3), torch.int64),
    "tensor of integers": (lambda: torch.tensor([1, 2]), torch.int64),
    "tensor of truth": (lambda: torch.tensor(True), torch.bool),
    "of numpy float32": (lambda: torch.tensor(np.zeros(2, dtype=np.float32)), torch.float32),
    "of a tensor": (lambda: torch.as_tensor(torch.zeros(2, dtype=torch.float32)), torch.float32),
    "randint": (lambda: torch.randint(3, (2,)), torch.int64),
    "float()": (lambda: torch.arange(3).float(), torch.float32),
    "to": (lambda: torch.arange(3).to(torch.float32), torch.float32),
    "float32 times a float": (lambda: torch.zeros(2, dtype=torch.float32) * 0.5, torch.float32),
    "dtype by position": (lambda: torch.full((1,), 0.5, dtype=torch.float32), torch.float32),
}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE.keys())
def test_made_in_float64(make):
    plain = make()
    with DefaultFloat64():
        wide = make()
    assert plain.dtype == torch.float32
    assert wide.dtype == torch.float64
    assert wide.shape == plain.shape
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(("make", "dtype"), KEPT.values(), ids=KEPT.keys())
def test_kept(make, dtype):
    with DefaultFloat64():
        assert make().dtype == dtype


def test_full_precision_not_a_cast():
    with DefaultFloat64():
        assert torch.tensor([0.1]).item() == 0.1
        assert (torch.arange(1, 4) / 3)[0].item() == 1 / 3
        assert torch.full((1,), 0.1).item() == 0.1


def test_complex_numbers():
    with DefaultFloat64():
        assert torch.tensor(1j).dtype == torch.complex128
        assert torch.full((2,), 1j).dtype == torch.complex128


def test_other_threads_are_left_alone():
    seen = []
    with DefaultFloat64():
        thread = threading.Thread(target=lambda: seen.append(torch.zeros(1).dtype))
        thread.start()
        thread.join()
    assert seen == [torch.float32]
