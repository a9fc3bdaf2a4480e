"""The flow: its inverse, its log-determinant and density against independent sources, training."""

import functools
import math
import re

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
import torch.nn.functional as F
from conftest import NF, Results, jacobian, train_plainly, way_off, zeros

import a3_gan_template as gan
import a3_nf_template as nf
from datasets.mnist import mnist

# Of the couplings that keep all pixels, or none.
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
N_PIXELS = 16  # of the small flows
CHECKERBOARD = (torch.arange(4)[:, None] + torch.arange(4)) % 2 == 0
MASKS = {
    "checkerboard": CHECKERBOARD.float().view(1, -1),
    "other half": 1 - CHECKERBOARD.float().view(1, -1),
    "uneven": (torch.arange(N_PIXELS) < 5).float().view(1, -1),
    "all ones": torch.ones(1, N_PIXELS),
    "all zeros": torch.zeros(1, N_PIXELS),
}


@pytest.fixture(scope="module")
def images():
    """60 real images, pixels 0..255."""
    return mnist()[2].images[:60].float()


def randomize(module, scale=1.0):
    """Move all weights away from the identity start; return the module."""
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter.shape[1] if parameter.dim() > 1 else 4
            parameter.normal_(0, scale / max(fan_in, 1) ** 0.5)
    return module


@pytest.fixture
def model_of(monkeypatch):
    """`model_of(mask)` is a Model of as many pixels as the mask, its couplings narrow."""

    def make(mask, n_hidden=24):
        coupling = functools.partial(nf.Coupling, n_hidden=n_hidden)
        with monkeypatch.context() as patch:
            patch.setattr(nf, "get_mask", lambda: mask)
            patch.setattr(nf, "Coupling", coupling)
            return nf.Model(shape=[mask.numel()])

    return make


def assert_inverse(function, z, tolerance):
    """Assert that reverse after forward gives back the input, and a log-determinant of zero."""
    there, ldj = function(z, zeros(z))
    back, rest = function(there, ldj, reverse=True)
    assert ldj.shape == (len(z),)
    assert ldj.dtype == rest.dtype == back.dtype == z.dtype
    assert (back - z).abs().max() <= tolerance * z.abs().max()
    assert rest.abs().max() <= tolerance * ldj.abs().max().clamp(min=1)
    return there, ldj


# ------------------------ Coupling ------------------------
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_coupling_is_undone_by_its_reverse(mask, dtype, tolerance):
    """And at first it is the identity."""
    z = 3 * torch.randn(20, N_PIXELS, dtype=dtype)
    coupling = nf.Coupling(N_PIXELS, mask, n_hidden=24).to(dtype)
    for reverse in (False, True):
        moved, ldj = coupling(z, zeros(z), reverse)
        assert torch.equal(moved, z)
        assert torch.equal(ldj, zeros(z))
    assert not coupling.log_bound.any()  # the log-scales within [-1, 1]
    moved, ldj = assert_inverse(randomize(coupling), z, tolerance)
    assert torch.equal((moved != z).any(dim=0), mask[0] == 0)  # changes these pixels alone
    assert not mask.all() or torch.equal(ldj, zeros(z))


def test_a_mask_of_another_size_is_a_value_error():
    for n_pixels, mask in ((5, nf.get_mask()), (784, nf.get_mask()[0]), (784, MASKS["uneven"])):
        with pytest.raises(ValueError, match=rf"{re.escape(str(tuple(mask.shape)))}.* {n_pixels} "):
            nf.Coupling(n_pixels, mask)


# ------------------------ Flow ------------------------
def test_flow_is_four_pairs_of_couplings_with_opposite_masks():
    masks = torch.cat([layer.mask for layer in nf.Flow([784]).layers])
    assert torch.equal(masks, torch.cat([nf.get_mask(), 1 - nf.get_mask()]).repeat(4, 1))
    assert len(nf.Flow([784], n_flows=1).layers) == 2


# ------------------------ Model ------------------------
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_model_is_undone_by_its_reverse(images, dtype, tolerance):
    """And is finite at both ends of the pixels' range, within which all latents decode."""
    model = nf.Model([784])
    for layer in model.flow.layers:  # away from the identity, by scales that keep z of one size
        torch.nn.init.normal_(layer.nn[-1].weight, std=0.02)
    assert_inverse(model.logit_normalize, images.to(dtype) + 0.5, tolerance)
    _, ldj = assert_inverse(model.to(dtype).flow, torch.randn(20, 784, dtype=dtype), tolerance)
    assert ldj.abs().mean() > 1
    ends = torch.tensor([[0.0, 256.0, 1e-3, 255.999]], dtype=dtype)
    assert all(x.isfinite().all() for x in model.logit_normalize(ends, zeros(ends)))
    far = model.decode(99 * torch.randn(20, 784, dtype=dtype))
    assert (far.min(), far.max()) == (0, 256)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_log_px_follows_the_change_of_variables(model_of, mask):
    """A random flow: the density by the full Jacobian of pixels to latents."""
    model = randomize(model_of(mask), scale=0.7).double()
    model.dequantize = lambda z: z
    pixels = (256 * torch.rand(3, N_PIXELS)).double()
    for x, log_px in zip(pixels, model(pixels), strict=True):
        z, _ = model.encode(x[None])
        slopes = jacobian(lambda x, _: model.encode(x), x[None])
        exact = scipy.stats.norm.logpdf(z.detach().numpy()).sum()
        exact += torch.linalg.slogdet(slopes).logabsdet.item()
        assert log_px.item() == pytest.approx(exact, rel=1e-9)


def test_density_integrates_to_one_and_samples_are_drawn_from_it(model_of):
    """Over the pixel of a one-pixel model, whose density is steep at both ends."""
    model = model_of(torch.ones(1, 1)).double()
    model.dequantize = lambda z: z
    with torch.no_grad():
        for layer in model.flow.layers:
            layer.nn[-1].bias.normal_()
        pixels = 256 * torch.linspace(-16, 16, 20_001).double().sigmoid()
        density = model(pixels[:, None]).exp()
        samples = model.float().sample(3000).flatten()
    cdf = scipy.integrate.cumulative_trapezoid(density, pixels, initial=0)
    assert cdf[-1] == pytest.approx(1, abs=1e-4)
    assert scipy.stats.kstest(np.interp(samples, pixels, cdf), "uniform").pvalue > 1e-3


# ------------------------ Figures and training ------------------------
def test_interpolation_goes_on_an_arc_of_latents_from_image_to_image(model_of, images, monkeypatch):
    shown = []
    monkeypatch.setattr(nf, "save_images", lambda images, *args, **kwargs: shown.append(images))
    model = randomize(model_of(nf.get_mask()), scale=0.3).double()
    nf.save_interpolation(model, images[[0, 1]], "interpolation.pdf")
    model.decode = lambda z: z
    nf.save_interpolation(model, images[[0, 1]], "interpolation.pdf")
    steps, z = shown
    for step, image in zip(steps[[0, -1]], images, strict=False):
        assert ((step - image > -0.05) & (step - image < 1.05)).all()  # dequantized
    torch.testing.assert_close(z, gan.interpolate(z[0], z[-1]), rtol=1e-4, atol=1e-4)
    assert (steps[:-1] != steps[1:]).any(dim=1).all()


def plain_log_px(model, images):
    """log p(x), of the model's weights by formulas of our own."""
    p = 1e-5 / 2 + (1 - 1e-5) * (images + torch.rand_like(images)) / 256
    z = torch.logit(p)
    log_px = ((1 - 1e-5) / (256 * p * (1 - p))).log().sum(1)
    row_plus_column = (torch.arange(28)[:, None] + torch.arange(28)).flatten()
    for i, layer in enumerate(model.flow.layers):
        mask = ((row_plus_column + i) % 2 == 0).type_as(z)
        w1, b1, w2, b2, w3, b3 = layer.nn.parameters()
        hidden = F.gelu(z[:, mask == 1] @ w1.T + b1)
        hidden = hidden + F.gelu(hidden @ w2.T + b2)
        s, t = (hidden @ w3.T + b3).chunk(2, 1)
        scale, shift = torch.ones_like(z), torch.zeros_like(z)
        scale[:, mask == 0] = (torch.tanh(s) * layer.log_bound.exp()).exp()
        shift[:, mask == 0] = 8 * torch.tanh(t / 8)
        z = mask * z + (1 - mask) * (z * scale + shift)
        log_px = log_px + scale.log().sum(1)
    return log_px - (z**2 + math.log(2 * math.pi)).sum(1) / 2


@pytest.mark.parametrize("seed", [5])
@pytest.mark.parametrize("max_norm", [0.01, 1e3])
def test_training_is_that_of_a_plain_loop(max_norm, seed, float64, monkeypatch, tmp_path):
    """Three epochs of two and a half batches: clipping, AdamW with decay, half a cosine.

    Once clipped as in the script, once hardly: there a gradient kept from the last batch shows.
    """
    replace = [("MAX_GRAD_NORM = 0.01", f"MAX_GRAD_NORM = {max_norm}")]
    NF.run_well(*NF.options(tmp_path, 3, "--seed", seed, "--lr", 0.004), replace=replace)

    monkeypatch.setattr(nf, "Coupling", functools.partial(nf.Coupling, n_hidden=32))
    torch.manual_seed(seed)
    model = nf.Model([784])
    weights = list(model.parameters())
    start = [weight.detach().clone() for weight in weights]
    optimizers = [torch.optim.AdamW(weights, weight_decay=0.3)]
    log_px, rates = functools.partial(plain_log_px, model), (0.002, 0.003, 0.001)
    rate = lambda epoch, _: rates[epoch]  # noqa: E731
    numbers = train_plainly(log_px, weights, optimizers, rate, seed, 3, max_norm)
    assert Results(tmp_path).numbers == pytest.approx(numbers, rel=1e-9)
    found = [Results(tmp_path).weights[name] for name, _ in model.named_parameters()]
    assert way_off(start, weights, found) < 1e-9
