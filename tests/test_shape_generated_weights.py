"""Shape 3: layers whose weights another network computes, several of them or one per sample (seeds/002)."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxfuse
from checks import assert_equal_models, assert_fused_equals, own_gradients, randn, randomized, run, untouched


def generator(len_input, out, hidden=6):
    return nn.Sequential(nn.Linear(len_input, hidden), nn.ReLU(), nn.Linear(hidden, out))


class OneImageManyGenerators(nn.Module):
    """Each generator synthesizes a 1x1 convolution for the same image from the same code."""

    def __init__(self, n=3, len_input=5, num_kernels=4):
        super().__init__()
        self.generators = nn.ModuleList(generator(len_input, num_kernels * 3) for _ in range(n))
        self.shape = (num_kernels, 3, 1, 1)
        self.conv_layers = nn.Sequential(nn.ReLU(), nn.Conv2d(n * num_kernels, 3, kernel_size=1))

    def forward(self, x1, img):
        generated = []
        for input_layers in self.generators:
            w = input_layers(x1).reshape(self.shape)
            generated.append(F.conv2d(img, w))
        return self.conv_layers(torch.cat(generated, dim=1))


class OwnImageOwnCode(nn.Module):
    """Lane i: its own code x1[:, i], its own image img[:, i], generated kernel and bias."""

    def __init__(self, n=3, len_input=5, num_kernels=4, k=3, bias=True, **conv):
        super().__init__()
        self.n_weights, self.shape, self.bias, self.conv = num_kernels * 2 * k * k, (num_kernels, 2, k, k), bias, conv
        self.generators = nn.ModuleList(generator(len_input, self.n_weights + num_kernels * bias) for _ in range(n))

    def forward(self, x1, img):
        outs = []
        for i, generator in enumerate(self.generators):
            params = generator(x1[:, i]).flatten()
            w, b = params[:self.n_weights].view(self.shape), params[self.n_weights:] if self.bias else None
            outs.append(F.conv2d(img[:, i], w, b, **self.conv))
        return torch.stack(outs, dim=1)


class GeneratedLinear(nn.Module):
    """A hypernetwork per head: F.linear with generated weight and bias."""

    def __init__(self, n=4, len_input=5, cin=3, cout=2):
        super().__init__()
        self.cin, self.cout = cin, cout
        self.weights = nn.ModuleList(nn.Linear(len_input, cin * cout) for _ in range(n))
        self.biases = nn.ModuleList(nn.Linear(len_input, cout) for _ in range(n))

    def forward(self, z, x):
        outs = []
        for make_weight, make_bias in zip(self.weights, self.biases):
            weight = make_weight(z).view(self.cout, self.cin)
            outs.append(F.linear(x, weight, make_bias(z).view(-1)))
        return torch.stack(outs)


def images_vary(x1, channels):
    """Inputs for a number of images; the code is one, as in the document."""
    return lambda rows: (x1 * rows, randn(rows, *channels, seed=rows))


@pytest.mark.parametrize(("n", "num_kernels"), [(2, 3), (3, 4), (7, 1)])
def test_many_generators_for_one_image(n, num_kernels):
    code = randn(1, 5)
    make = images_vary(code, (3, 6, 7))
    model = randomized(OneImageManyGenerators(n, num_kernels=num_kernels))
    assert_fused_equals(model, make(4), make=make, heavy=4)  # two in the generators, one generated, and the last layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("k", "conv"), [
    (1, {}), (3, {"padding": 1}), (3, {"stride": 2, "dilation": 2, "padding": 2}), (3, {"padding": "same"}),
])
@pytest.mark.parametrize("n", [2, 5])
def test_own_code_and_own_image(n, k, conv, bias):
    make = images_vary(randn(1, n, 5), (n, 2, 8, 7))
    assert_fused_equals(randomized(OwnImageOwnCode(n, k=k, bias=bias, **conv)), make(4), make=make, heavy=3)


@pytest.mark.parametrize("n", [2, 4, 9])
def test_generated_linear(n):
    code = randn(5)
    assert_fused_equals(
        randomized(GeneratedLinear(n)), (code, randn(6, 3)), make=lambda rows: (code - rows, randn(rows, 3, seed=rows)), heavy=3)


# A kernel for every sample.


class KernelPerSample(nn.Module):
    def __init__(self, len_input=5, num_kernels=4, k=3):
        super().__init__()
        self.input_layers = generator(len_input, num_kernels * 3 * k * k)
        self.shape, self.padding = (num_kernels, 3, k, k), k // 2

    def forward(self, x1, img):
        weights = self.input_layers(x1)
        outputs = []
        for b in range(img.shape[0]):
            outputs.append(F.conv2d(img[b:b + 1], weights[b].reshape(self.shape), padding=self.padding))
        return torch.cat(outputs, dim=0)


class KernelPerSampleZip(KernelPerSample):
    def forward(self, x1, img):
        weights = self.input_layers(x1).view(-1, *self.shape)
        return torch.stack([F.conv2d(image[None], w, padding=self.padding)[0] for image, w in zip(img, weights)])


class KernelPerSampleWrites(KernelPerSample):
    def forward(self, x1, img):
        weights = self.input_layers(x1)
        out = torch.zeros(img.shape[0], self.shape[0], *img.shape[2:], dtype=img.dtype)
        for b in range(len(img)):
            out[b] = F.conv2d(img[b].unsqueeze(0), weights[b].reshape(self.shape), padding=self.padding).squeeze(0)
        return torch.relu(out)


class GeneratorInTheLoop(KernelPerSample):
    """The generator itself is called once per sample: a shared network, folded into the batch."""

    def forward(self, x1, img):
        outputs = []
        for b in range(img.shape[0]):
            w = self.input_layers(x1[b]).reshape(self.shape)
            outputs.append(F.conv2d(img[b:b + 1], w, padding=self.padding))
        return torch.cat(outputs)


class LinearPerSample(nn.Module):
    def __init__(self, len_input=5, cin=3, cout=2):
        super().__init__()
        self.hyper = nn.Linear(len_input, cin * cout + cout)
        self.cin, self.cout = cin, cout

    def forward(self, z, x):
        params = self.hyper(z)
        outputs = []
        for p, row in zip(params, x):
            weight, bias = p[:self.cin * self.cout].view(self.cout, self.cin), p[self.cin * self.cout:]
            outputs.append(F.linear(row, weight, bias))
        return torch.stack(outputs, dim=0)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("batch", [2, 5])
@pytest.mark.parametrize("kind", [KernelPerSample, KernelPerSampleZip, KernelPerSampleWrites, GeneratorInTheLoop])
def test_kernel_per_sample(kind, batch, k):
    inputs = (randn(batch, 5), randn(batch, 3, 6, 7, seed=2))
    assert_fused_equals(randomized(kind(k=k)), inputs, heavy=3, specialised=True)


@pytest.mark.parametrize("batch", [2, 6])
def test_linear_per_sample(batch):
    assert_fused_equals(randomized(LinearPerSample()), (randn(batch, 5), randn(batch, 4, 3, seed=2)), heavy=2, specialised=True)


def test_gradients_reach_the_generator():
    model = randomized(KernelPerSample())
    inputs = (randn(4, 5), randn(4, 3, 6, 7, seed=2))
    fused = fxfuse.optimize(model, inputs, objective="launches", strict=True)
    assert fxfuse.report(fused).fused
    assert_equal_models(model, fused, [(inputs, {})])
    fused.zero_grad()
    fused(*inputs).sum().backward()
    for name, gradient in fxfuse.weights.packing.original_gradients(fused).items():
        assert gradient is not None, f"no gradient reaches {name}"
        assert gradient.abs().max() > 0, f"only zeros reach {name}"


def test_the_batch_is_still_any_size():
    """The loop runs over the batch: at another size the same call must give the loop's numbers, whichever way."""
    model = randomized(KernelPerSample())
    fused = fxfuse.optimize(model, (randn(4, 5), randn(4, 3, 6, 7)), objective="launches")
    assert_equal_models(model, fused, [((randn(rows, 5), randn(rows, 3, 6, 7, seed=rows)), {}) for rows in (1, 2, 3, 4, 8)])


# What the question did, and must not be made into something else.


class ParameterReplaced(nn.Module):
    """The question's own code: the weight is replaced under no_grad, so that no gradient reaches the generator. It stays so."""

    def __init__(self, n=2, len_input=5, num_kernels=4):
        super().__init__()
        self.input_layers = nn.ModuleList(generator(len_input, num_kernels * 3) for _ in range(n))
        self.synthesized_conv = nn.ModuleList(nn.Conv2d(3, num_kernels, bias=False, kernel_size=1) for _ in range(n))

    def forward(self, x1, img):
        outs = []
        for input_layers, conv in zip(self.input_layers, self.synthesized_conv):
            x = input_layers(x1)
            with torch.no_grad():
                conv.weight = nn.Parameter(x.reshape_as(conv.weight))
            outs.append(conv(img))
        return torch.cat(outs, 1)


def test_a_replaced_parameter_keeps_its_meaning():
    model = randomized(ParameterReplaced())
    inputs = (randn(1, 5), randn(3, 3, 6, 7))
    with untouched(model):
        fused = fxfuse.optimize(model, inputs, objective="launches")
    assert isinstance(fused, ParameterReplaced)
    assert fxfuse.report(fused).refused, "a region that replaces its Parameters must be left alone, with the reason"
    expected, actual = run(model, inputs, {}, own_gradients), run(fused, inputs, {}, fxfuse.weights.packing.original_gradients)
    torch.testing.assert_close(actual.outputs, expected.outputs, rtol=1e-12, atol=0)
    assert all(gradient is None for name, gradient in expected.parameters.items() if name.startswith("input_layers"))
    assert all(gradient is None for name, gradient in actual.parameters.items() if name.startswith("input_layers"))
