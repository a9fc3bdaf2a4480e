"""The flow: its inverse, log-determinant and density against independent sources, its training."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import ROOT, assert_trained_plainly, few, jacobian, narrow, pictures, read, run, zeros

import a3_gan_template as gan
import a3_nf_template as nf
import runs
from datasets.mnist import mnist
from extension.mixture_flow import mixture_model

N_PIXELS = 16  # of the small flows
CHECKERBOARD = ((torch.arange(4)[:, None] + torch.arange(4)) % 2 == 0).float().view(1, -1)
UNEVEN = (torch.arange(N_PIXELS) < 5).float().view(1, -1)
masks = pytest.mark.parametrize("mask", [CHECKERBOARD, UNEVEN], ids=["checkerboard", "uneven"])


def randomize(module, scale=1.0):
    """Moves all weights away from the identity start; returns the module."""
    for weight in module.parameters():
        fan_in = weight.shape[1] if weight.dim() > 1 else 4
        weight.data.normal_(0, scale / fan_in**0.5)
    return module


def assert_inverse(function, z, tolerance):
    """Asserts that reverse after forward gives back the input, and a log-determinant of zero."""
    there, ldj = function(z, zeros(z))
    back, rest = function(there, ldj, reverse=True)
    assert ldj.shape == (len(z),)
    assert ldj.dtype == rest.dtype == back.dtype == z.dtype
    assert (back - z).abs().max() <= tolerance * z.abs().max()
    assert rest.abs().max() <= tolerance * ldj.abs().max().clamp(min=1)
    return there, ldj


# ------------------------ Prior, mask and couplings ------------------------
def test_prior_is_the_standard_normal_and_samples_are_decoded_from_it():
    x = torch.linspace(-9, 9, 50, dtype=torch.float64)
    np.testing.assert_allclose(nf.log_prior(x), scipy.stats.norm.logpdf(x), rtol=1e-12)
    model = nf.Model([784])
    torch.manual_seed(0)
    z = nf.sample_prior((9, 784))
    torch.manual_seed(0)
    assert torch.equal(model.sample(9), model.decode(z))
    assert scipy.stats.kstest(z.flatten(), "norm").pvalue > 1e-3


@masks
def test_coupling_starts_as_the_identity_and_is_undone_by_its_reverse(mask):
    z = 3 * torch.randn(20, N_PIXELS, dtype=torch.float64)
    coupling = nf.Coupling(N_PIXELS, mask, n_hidden=24).double()
    for reverse in (False, True):
        torch.testing.assert_close(coupling(z, zeros(z), reverse), (z, zeros(z)), rtol=0, atol=0)
    assert not coupling.log_bound.any()  # the log-scales within [-1, 1]
    moved, _ = assert_inverse(randomize(coupling), z, 1e-10)
    assert torch.equal((moved != z).any(dim=0), mask[0] == 0)  # it changes these pixels alone


def test_scales_and_shifts_stay_within_their_bounds():
    """A network that is far off scales by exp(+-b) and shifts by +-8 at most."""
    coupling = randomize(nf.Coupling(N_PIXELS, CHECKERBOARD, n_hidden=24), scale=100)
    coupling.log_bound.data.fill_(math.log(2))
    z = torch.zeros(50, N_PIXELS)
    z[:, CHECKERBOARD[0] == 1] = torch.randn(50, 8)
    shifted, ldj = coupling(z, zeros(z))
    assert (shifted - z).abs().max().item() == pytest.approx(8)
    assert 8 < ldj.abs().max() <= 16  # eight pixels, b = 2


# ------------------------ Flow and model ------------------------
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_model_is_undone_by_its_reverse_but_for_the_noise_of_dequantization(dtype, tolerance):
    model = nf.Model([784]).requires_grad_(False).to(dtype)
    images = mnist()[2].images[:60].to(dtype)
    for layer in model.flow.layers:  # away from the identity, by scales that keep z of one size
        torch.nn.init.normal_(layer.nn[-1].weight, std=0.02)
    assert_inverse(model.logit_normalize, images + 0.5, tolerance)
    _, ldj = assert_inverse(model.flow, torch.randn(20, 784, dtype=dtype), tolerance)
    assert ldj.abs().mean() > 1
    noise = model.decode(model.encode(images)[0]) - images
    assert scipy.stats.kstest(noise[:5].flatten(), "uniform").pvalue > 1e-3
    far = model.decode(99 * torch.randn(20, 784, dtype=dtype))
    assert (far.min(), far.max()) == (0, 256)
    ends = torch.tensor([[0.0, 256.0]], dtype=dtype)
    logits, ldj = model.logit_normalize(ends, zeros(ends))
    assert ldj.isfinite()
    assert logits[0, 0].item() == pytest.approx(-math.log(2e5 - 1), rel=1e-5)  # alpha is 1e-5


@masks
def test_log_px_follows_the_change_of_variables(mask, monkeypatch):
    """The density by the full Jacobian of pixels to latents, for random weights."""
    monkeypatch.setattr(nf, "get_mask", lambda: mask)
    narrow(monkeypatch)
    model = randomize(nf.Model([N_PIXELS]), scale=0.7).double()
    model.dequantize = lambda z: z
    pixels = 256 * torch.rand(3, N_PIXELS, dtype=torch.float64)
    for x, log_px in zip(pixels, model(pixels), strict=True):
        z, _ = model.encode(x[None])
        slopes = jacobian(lambda x, _: model.encode(x), x[None])
        exact = scipy.stats.norm.logpdf(z.detach()).sum()
        exact += torch.linalg.slogdet(slopes).logabsdet.item()
        assert log_px.item() == pytest.approx(exact, rel=1e-9)


@torch.no_grad()
@pytest.mark.parametrize(
    ("make", "folder"), [(lambda: nf.Model([784]), "nf"), (mixture_model, "nf_mixture")]
)
def test_committed_weights_give_the_committed_test_bits(make, folder):
    """Networks, data and loss have not changed since they were measured."""
    model, folder, images = make().eval(), ROOT / "results" / folder, mnist()[2].images
    model.load_state_dict(torch.load(folder / "weights.pt"))
    bits = nf.bits_per_dim(model(images[::50].float()))
    final = read(folder)[1]["final"]
    assert bits.mean().item() == pytest.approx(final["test_bpd"], abs=0.05)  # of 200 images


# ------------------------ Training ------------------------
def test_training_is_that_of_a_plain_loop(float64, monkeypatch, tmp_path):
    """Gradients clipped to 0.01, AdamW with a decay of all weights, warm-up and a cosine."""
    run(nf, tmp_path, epochs=3, seed=5, lr=4e-3, weight_decay=0.2)

    narrow(monkeypatch)
    torch.manual_seed(5)
    data, model = few(mnist)(batch_size=20), nf.Model([784])
    adamw = torch.optim.AdamW(model.parameters(), weight_decay=0.2)
    rates = np.repeat([0.002, 0.003, 0.001], 3)  # half of 0.004, then a cosine's 3/4 and 1/4
    assert_trained_plainly(tmp_path, model, [adamw], rates, data)
    weights = torch.load(tmp_path / "checkpoint.pt")["parts"]["model"]
    for name, weight in torch.load(tmp_path / "weights.pt").items():
        assert torch.equal(weight, weights[name].half())


# ------------------------ Figures ------------------------
def test_interpolation_goes_on_an_arc_of_latents_from_image_to_image(monkeypatch):
    """An untrained flow is the identity, so the latents are the logits of the pixels."""
    saved = []
    monkeypatch.setattr(runs, "save_images", lambda images, path, nrow: saved.append(images))
    model, images = nf.Model([784]).double(), 64 + 128 * torch.rand(2, 784, dtype=torch.float64)
    nf.save_interpolation(model, images, "interpolation.png")
    steps = 256 * saved[0]
    noise = steps[[0, -1]] - images  # of dequantization
    assert ((noise > -1e-3) & (noise < 1 + 1e-3)).all()
    z, _ = model.logit_normalize(steps, zeros(steps))
    torch.testing.assert_close(z, gan.interpolate(z[0], z[-1]), rtol=1e-4, atol=1e-4)


def test_interpolation_is_between_the_first_test_images_of_two_digits(finished):
    test = few(mnist)()[2]
    other = next(i for i, label in enumerate(test.labels) if label != test.labels[0])
    ends = pictures(finished(nf).folder / "interpolation.png")[[0, -1]]
    noise = 256 * ends - test.images[[0, other]]
    assert ((noise > -1) & (noise < 2)).all()
