"""Every measure of report/measure.py computed anew: by SciPy, closed forms and autograd."""

import hashlib
import json
import math
import re
import runpy
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch
from conftest import ROOT
from scipy.spatial.distance import cdist
from scipy.special import log_expit, logsumexp

import a3_gan_template as gan
import a3_nf_template as nf
import a3_vae_template as vae
import runs
from datasets.bmnist import bmnist
from datasets.mnist import ShiftedLoader, mnist
from extension import mixture_flow
from report import measure


def thinned(loaders):
    """Cuts the loaders of training, validation and test to 330, 470 and 610 images; returns them.

    They come from all over each split. Those of validation are darkened, so that they tell others.
    """
    for loader, n in zip(loaders, (330, 470, 610), strict=True):
        rows = range(0, len(loader.images), len(loader.images) // n)[:n]
        loader.images, loader.labels = loader.images[rows], loader.labels[rows]
    loaders[1].images = loaders[1].images // 2
    return loaders


@pytest.fixture
def small(monkeypatch):
    """Makes networks narrow, draws and images few, and saves no figures.

    The GAN draws dark training images, through which its own images shine.
    """
    sizes = {"DRAWS": 2, "SAMPLES": 20, "AT_ONCE": 10, "ELBO_DRAWS": 3, "VAE_DRAWS": 20, "MANY": 4,
             "FEW_IMAGES": 7, "PRIOR_DRAWS": [4, 12], "FLOW_DRAWS": 2, "FLOW_IMAGES": 5,
             "END_IMAGES": 60}  # fmt: skip
    for name, value in sizes.items():
        monkeypatch.setattr(measure, name, value)
    monkeypatch.setattr(measure, "mnist", lambda **options: thinned(mnist(**options)))
    monkeypatch.setattr(measure, "bmnist", lambda: thinned(bmnist()))
    monkeypatch.setattr(vae, "VAE", partial(vae.VAE, hidden_dim=20))
    monkeypatch.setattr(nf, "Coupling", partial(nf.Coupling, n_hidden=8))
    monkeypatch.setattr(mixture_flow, "ConvNet", partial(mixture_flow.ConvNet, c_hidden=2))
    monkeypatch.setattr(runs, "save_figure", lambda figure, path: None)
    generate, images = gan.generate, mnist()[0].images[:500] / 255

    def generate_digits(generator, z):
        return 0.8 * images[(100 * z[:, 0].abs()).long()] + 0.1 * generate(generator, z)

    monkeypatch.setattr(gan, "generate", generate_digits)


# ------------------------------------ What is expected ------------------------------------
def judge(images):
    """Returns each image's digit and whether it is clear, by ten neighbours, and its distance."""
    train, _, _ = thinned(mnist(n_train=50_000, shift=False))
    distances = cdist(images, train.images.double() / 255)
    votes = train.labels.numpy()[distances.argsort(axis=1)[:, :10]]
    digits, counts = scipy.stats.mode(votes, axis=1)
    return digits, counts >= 8, distances.min(axis=1)


def log_likelihood(model, z, x):
    """Returns log p(x|z) of binary images `[n, 784]` and latents `[..., n, z_dim]`."""
    return log_expit((2 * x - 1) * model.decoder.logits(z).numpy()).sum(axis=-1)


def log_weights(model, x):
    """Returns log p(x, z) / q(z|x) of 20 latents from q for each image, `[20, n]`."""
    mean, std = model.encoder(x)
    z = mean + std * torch.randn(20, *mean.shape)
    log_q = scipy.stats.norm.logpdf(z, mean, std).sum(axis=-1)
    return log_likelihood(model, z, x.numpy()) + scipy.stats.norm.logpdf(z).sum(axis=-1) - log_q


def expect_of_vae(model):
    """Returns the measures of a VAE, and a function that draws ten images.

    Its own losses are tested in test_vae.py.
    """
    _, val, test = thinned(bmnist())
    images = test.images.double()
    mean, _ = model.encoder(images)
    reconstruction, kl = sum(torch.stack(model.losses(images)) for _ in range(3)) / 3
    weights = np.concatenate([log_weights(model, x) for x in images.split(50)], axis=1)
    log_px = logsumexp(weights, axis=0) - math.log(20)
    few = images[::87][:7]
    many = np.stack([log_weights(model, few) for _ in range(4)])
    few_log_px = (logsumexp(many, axis=(0, 1)) - math.log(80)).mean()
    prior = log_likelihood(model, torch.randn(12, 1, 2), few.numpy()).T
    prior = [logsumexp(prior.reshape(7, -1, n), axis=2) - math.log(n) for n in (4, 12)]
    torch.manual_seed(3)
    untrained = vae.VAE(z_dim=2)
    first_reconstruction, first_kl = untrained.losses(val.images.double())
    logits = untrained.decoder.logits(torch.randn(1000, 2))
    return {
        "elbo_draws": 3, "test_elbo": -(reconstruction + kl).mean().item(),
        "test_elbo_stderr": scipy.stats.sem(reconstruction + kl),
        "test_reconstruction": reconstruction.mean().item(), "test_kl": kl.mean().item(),
        "test_log_px": log_px.mean(), "test_log_px_stderr": scipy.stats.sem(log_px),
        "iw_samples": 20, "few_images": 7, "many_draws": 80, "few_log_px": few_log_px,
        "iw_bias": few_log_px - (logsumexp(many, axis=1) - math.log(20)).mean(),
        "prior_draws": [4, 12], "prior_log_px": [estimate.mean() for estimate in prior],
        "initial_elbo": -(first_reconstruction + first_kl).mean().item(),
        "initial_kl": first_kl.mean().item(),
        "initial_logit_cost": (logits**2).sum().item() / 8000,
        "share_outside": (abs(mean.numpy()) > 1.959963984540054).any(axis=1).mean(),
    }, lambda: model.sample(10)[1].flatten(1)  # fmt: skip


def parzen(draws, val, test):
    """Returns the log-likelihoods of the test images, `[draws, n]`, and the bandwidth."""

    def log_px(images, centres, sigma):
        log_peak = 784 * scipy.stats.norm.logpdf(0, scale=sigma) - math.log(len(centres))
        return logsumexp(-(cdist(images, centres) ** 2) / (2 * sigma**2), axis=1) + log_peak

    sigmas = np.geomspace(0.1, 0.4, 21)
    best = max(sigmas, key=lambda sigma: log_px(val, draws[0], sigma).mean())
    return np.stack([log_px(test, centres, best) for centres in draws]), best


def expect_of_gan(generator):
    """Returns the measures of a GAN, and a function that draws ten images."""
    data = thinned(mnist(n_train=50_000, shift=False))
    train, val, test = (loader.images.double() / 255 for loader in data)
    samples = gan.generate(generator, torch.randn(40, 5))
    log_px, sigma = parzen(samples.split(20), val, test)
    real, _ = parzen(train[:40].split(20), val, test)
    digits, clear, distances = judge(test)
    labels = data[2].labels.numpy()
    gan.Discriminator()  # takes random numbers
    return {
        "parzen": log_px.mean(), "parzen_stderr": scipy.stats.sem(log_px.mean(axis=0)),
        "parzen_draws": log_px.mean(axis=1), "parzen_sigma": sigma,
        "parzen_train": real.mean(), "parzen_train_stderr": scipy.stats.sem(real.mean(axis=0)),
        "test_agreement": clear.mean(), "test_digit_shares": np.bincount(digits) / 610,
        "test_nearest_min": distances.min(), "vote_accuracy": (digits == labels).mean(),
        "label_shares": np.bincount(labels) / 610,
        "generator_parameters": 1_510_032 - 95 * 128, "discriminator_parameters": 533_505,
    }, lambda: gan.generate(generator, torch.randn(10, 5))  # fmt: skip


def expect_of_flow(model):
    """Returns the measures of a flow, and a function that draws ten images.

    Its own density is tested in test_nf.py and test_mixture.py.
    """

    def bits(images):
        return nf.bits_per_dim(model(images.double())).numpy()

    train, val, test = thinned(mnist(shift=False))
    ((shifted, labels),) = ShiftedLoader(test.images, test.labels, 610)
    digits, clear, _ = judge(shifted / 255)
    few = test.images[::122][:5]
    draws = np.stack([bits(few), bits(few)])
    log2_px = np.logaddexp2(*(-784 * draws)) - 1
    ((shifted_train, _),) = ShiftedLoader(train.images[:60], train.labels[:60], 60)
    expected = {}
    if hasattr(model.flow.layers[0], "solve"):  # one of mixtures
        pixels, grey = measure.pixel_bits(model, few.double()).numpy(), few.numpy()
        strokes = grey.reshape(5, 28, 28) > 0
        near = scipy.ndimage.binary_dilation(strokes, np.ones((1, 3, 3))).reshape(5, 784)
        kinds = {"background": ~near, "beside": near & (grey == 0),
                 "rim": (grey > 0) & (grey < 252), "ink": grey >= 252}  # fmt: skip
        for name, mask in kinds.items():
            expected |= {f"{name}_share": mask.mean(), f"{name}_bpd": (pixels * mask).mean()}
    return expected | {
        "shifted_agreement": clear.mean(), "shifted_digit_shares": np.bincount(digits) / 610,
        "shifted_vote_accuracy": (digits == labels.numpy()).mean(),
        "test_bpd_stderr": scipy.stats.sem(bits(test.images)), "iw_samples": 2, "iw_images": 5,
        "iw_gain": draws.mean() + log2_px.mean() / 784, "end_images": 60,
        "end_train_bpd": bits(train.images[:60]).mean(), "end_val_bpd": bits(val.images).mean(),
        "end_shifted_bpd": bits(shifted_train).mean(),
    }, lambda: model.sample(10) / 256  # fmt: skip


# ------------------------------------ The measures ------------------------------------
@torch.no_grad()
@pytest.mark.parametrize(
    ("make", "arguments", "options", "expect"),
    [
        (vae.VAE, (20, 2), {"zdim": 2, "seed": 3}, expect_of_vae),
        (gan.Generator, (5,), {"n_epochs": 1, "latent_dim": 5}, expect_of_gan),
        (nf.Model, ([784],), {}, expect_of_flow),
        (mixture_flow.mixture_model, (2,), {"n_mix": 2}, expect_of_flow),
    ],
)
def test_measures_json_has_what_is_computed_anew_with_the_same_random_numbers(
    make, arguments, options, expect, small, float64, monkeypatch, tmp_path
):
    """Two draws of 20 samples, which come by ten; the fastest ten take 0.25 s."""
    model = make(*arguments)
    for parameter in model.parameters():
        parameter += 0.2 * torch.randn_like(parameter)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    (tmp_path / "summary.json").write_text(json.dumps({"options": options}))
    ticks = iter([0, 9, 10, 10.25, 20, 27, 30, 35])
    monkeypatch.setattr(measure, "time", SimpleNamespace(process_time=ticks.__next__))
    monkeypatch.setattr(measure, "ARGS", SimpleNamespace(folders=[tmp_path]), raising=False)
    measure.main()

    torch.manual_seed(0)
    expected, draw = expect(model.eval())
    digits, clear, distances = judge(torch.cat([draw() for _ in range(4)]))
    weights = sum(parameter.numel() for parameter in model.parameters())
    expected |= {
        "parameters": weights + expected.get("discriminator_parameters", 0),
        "draws": 2, "samples": 20, "sample_ms": 250, "agreement": clear.mean(),
        "agreement_draws": clear.reshape(2, 20).mean(axis=1),
        "digit_shares": np.bincount(digits, minlength=10) / 40, "nearest_min": distances.min(),
    }  # fmt: skip
    measures = json.loads((tmp_path / "measures.json").read_text())
    sha256 = hashlib.sha256((tmp_path / "weights.pt").read_bytes()).hexdigest()
    assert measures.pop("weights_sha256") == sha256
    assert set(measures) == set(expected)
    for name, number in expected.items():
        assert measures[name] == pytest.approx(number, rel=1e-9), name


def test_bits_of_pixels_are_their_own_and_add_up(small, float64):
    """Some of both larger grids, each changed by one coupling, against the slope by autograd."""
    model = mixture_flow.mixture_model(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    noisy = (mnist()[2].images[:2] + 0.5).double().requires_grad_()
    model.dequantize = lambda images: noisy
    bits = measure.pixel_bits(model, noisy)
    torch.testing.assert_close(bits.mean(dim=1), nf.bits_per_dim(model(noisy)))
    z, _ = model.encode(noisy)
    for row, column in ((13, 12), (12, 13), (13, 13), (14, 12), (12, 14), (14, 14)):
        pixel = 28 * row + column
        (slope,) = torch.autograd.grad(z[0, pixel], noisy, retain_graph=True)
        expected = -scipy.stats.norm.logpdf(z[0, pixel].item()) - math.log(slope[0, pixel])
        assert bits[0, pixel].item() == pytest.approx(expected / math.log(2), rel=1e-9)


# ------------------------------------ The program ------------------------------------
def test_a_folder_that_cannot_be_read_is_one_line(tmp_path, monkeypatch, capsys):
    """The program computes on one thread, so that it gives the same numbers on any machine."""
    monkeypatch.setattr(sys, "argv", ["measure.py", str(tmp_path)])
    torch.set_num_threads(2)
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(ROOT / "report/measure.py"), run_name="__main__")
    assert re.fullmatch(r"error: .* has no weights\.pt and .*\n", capsys.readouterr().err)
    assert torch.get_num_threads() == 1
