"""Every measure of report/measure.py computed anew: by SciPy, quadrature and autograd."""

import functools
import hashlib
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from scipy.spatial.distance import cdist
from scipy.special import log_expit, logsumexp

import a3_gan_template as gan
import a3_nf_template as nf
import a3_vae_template as vae
import runs
from datasets import bmnist, mnist
from datasets.mnist import ShiftedLoader
from extension import mixture_flow
from report import measure

ROOT = Path(__file__).resolve().parent.parent
TRAIN, FLOW_TRAIN, TEST = (0, 50_000, 330), (0, 40_000, 330), (60_000, 70_000, 610)
NATS = 784 * math.log(2)  # in one bit per dimension


def grey(start, stop, n):
    """Returns `n` images of MNIST, uint8 `[n, 784]`, from all over these rows, and their labels."""
    rows = range(start, stop, (stop - start) // n)[:n]
    images, labels = mnist.load()
    return images[rows], labels[rows]


def few(make):
    """Returns a function that makes loaders as `make` does, of 330, 470 and 610 images.

    They come from all over each split. Those of validation are darkened, so that they tell others.
    """

    def make_few(**options):
        loaders = make(**options)
        for loader, n in zip(loaders, (330, 470, 610), strict=True):
            rows = range(0, len(loader.images), len(loader.images) // n)[:n]
            loader.images, loader.labels = loader.images[rows], loader.labels[rows]
        loaders[1].images = loaders[1].images // 2
        return loaders

    return make_few


@pytest.fixture
def small(monkeypatch):
    """Makes measure.py take few draws and few images; returns the figures that it would save."""
    sizes = {"ELBO_DRAWS": 3, "VAE_DRAWS": 20, "MANY": 4, "PRIOR_DRAWS": [4, 12], "FLOW_DRAWS": 2,
             "SAMPLES": 40, "AT_ONCE": 20, "FEW_IMAGES": 7, "FLOW_IMAGES": 5,
             "END_IMAGES": 60}  # fmt: skip
    for name, value in sizes.items():
        monkeypatch.setattr(measure, name, value)
    monkeypatch.setattr(measure, "mnist", few(mnist.mnist))
    monkeypatch.setattr(measure, "bmnist", few(bmnist.bmnist))
    figures = {}
    monkeypatch.setattr(runs, "save_figure", lambda figure, path: figures.update({path: figure}))
    return figures


def assert_equal(measures, expected):
    """Compares names, and numbers or lists of numbers to nine digits."""
    assert set(measures) == set(expected)
    for name, number in expected.items():
        assert measures[name] == pytest.approx(number, rel=1e-9), name


# ------------------------------------ The yardstick ------------------------------------
def judge(images):
    """Returns each image's digit and whether it is clear, by ten neighbours, and its distance."""
    train, labels = grey(*TRAIN)
    distances = cdist(images, train.double() / 255)
    votes = labels.numpy()[distances.argsort(axis=1)[:, :10]]
    digits, counts = scipy.stats.mode(votes, axis=1)
    return digits, counts >= 8, distances.min(axis=1)


def shares(digits):
    return (np.bincount(digits, minlength=10) / len(digits)).tolist()


def test_samples_are_judged_by_the_vote_of_their_ten_nearest_training_images(
    small, float64, monkeypatch
):
    """Three draws of 40 samples, which come by 20; the fastest 20 take 0.25 s of the processor."""
    images = grey(*TEST)[0][:120].double() / 255
    clock = iter([0, 1, 2, 2.5, 3, 3.25, 4, 5, 6, 7, 8, 9])
    monkeypatch.setattr(measure, "time", SimpleNamespace(process_time=clock.__next__))
    parts = iter(images.split(20))
    measures = measure.judge_samples(lambda n: next(parts)[:n])
    digits, clear, distances = judge(images)
    assert 0.1 < clear.mean() < 0.9
    assert_equal(measures, {
        "draws": 3, "samples": 40, "sample_ms": 250, "agreement": clear.mean(),
        "agreement_draws": clear.reshape(3, 40).mean(axis=1).tolist(),
        "digit_shares": shares(digits), "nearest_min": distances.min(),
    })  # fmt: skip


# ------------------------------------ VAE ------------------------------------
def test_the_importance_sampled_bound_rises_with_its_draws_to_log_p_from_below(one_dimensional):
    model, x, _, exact = one_dimensional
    bounds = []
    for k, n in ((1, 8000), (10, 2000), (100, 200)):
        values = measure.importance_log_likelihood(model, x.expand(n, -1), k).numpy()
        bounds.append((values.mean(), scipy.stats.sem(values.astype(float))))
    for (low, _), (high, _) in itertools.pairwise(bounds):
        assert low < high
    assert all(mean < exact + 4 * stderr for mean, stderr in bounds)
    assert bounds[-1][0] == pytest.approx(exact, abs=0.05 + 4 * bounds[-1][1])


def log_likelihood(model, z, x):
    """Returns log p(x|z) of binary images `[n, 784]` and latents `[..., n, z_dim]`."""
    return log_expit((2 * x - 1) * model.decoder.logits(z).numpy()).sum(axis=-1)


def log_weights(model, x, n_draws):
    """Returns log p(x, z) / q(z|x) of latents from q, `[n_draws, n]`."""
    mean, std = model.encoder(torch.from_numpy(x))
    z = mean + std * torch.randn(n_draws, *mean.shape)
    log_q = scipy.stats.norm.logpdf(z, mean, std).sum(axis=-1)
    return log_likelihood(model, z, x) + scipy.stats.norm.logpdf(z).sum(axis=-1) - log_q


def test_a_vae_is_measured_on_the_test_images(small, float64):
    """Computed anew with the same random numbers."""
    model = vae.VAE(hidden_dim=20, z_dim=2).requires_grad_(False)
    model.encoder.mean_and_log_std.weight[:2] *= 20
    torch.manual_seed(1)
    measures = measure.measure_vae(model, {"seed": 3}, Path())

    _, val, test = few(bmnist.bmnist)()
    images = test.images.double()
    mean, std = model.encoder(images)
    torch.manual_seed(1)
    draws = torch.stack([torch.stack(model.losses(images)) for _ in range(3)])
    reconstruction, kl = draws.mean(dim=0)
    weights = [log_weights(model, x.numpy(), 20) for x in images.split(50)]
    log_px = logsumexp(np.concatenate(weights, axis=1), axis=0) - math.log(20)
    few_images = images[::87][:7].numpy()
    many = np.stack([log_weights(model, few_images, 20) for _ in range(4)])
    few_log_px = (logsumexp(many, axis=(0, 1)) - math.log(80)).mean()
    prior = log_likelihood(model, torch.randn(12, 1, 2), few_images).T
    prior = [logsumexp(prior.reshape(7, -1, n), axis=2) - math.log(n) for n in (4, 12)]
    torch.manual_seed(3)
    untrained = vae.VAE(z_dim=2)
    first_reconstruction, first_kl = untrained.losses(val.images.double())
    logits = untrained.decoder.logits(torch.randn(1000, 2))
    assert_equal(measures, {
        "elbo_draws": 3, "test_elbo": -(reconstruction + kl).mean().item(),
        "test_elbo_stderr": scipy.stats.sem(reconstruction + kl),
        "test_reconstruction": reconstruction.mean().item(), "test_kl": kl.mean().item(),
        "test_log_px": log_px.mean(), "test_log_px_stderr": scipy.stats.sem(log_px),
        "iw_samples": 20, "few_images": 7, "many_draws": 80, "few_log_px": few_log_px,
        "iw_bias": few_log_px - (logsumexp(many, axis=1) - math.log(20)).mean(),
        "prior_draws": [4, 12], "prior_log_px": [estimate.mean() for estimate in prior],
        "aggregate_variance": (mean.var(dim=0) + (std**2).mean(dim=0)).tolist(),
        "initial_elbo": -(first_reconstruction + first_kl).mean().item(),
        "initial_kl": first_kl.mean().item(),
        "initial_logit_cost": (logits**2).sum().item() / 8000,
        "share_outside": (abs(mean.numpy()) > 1.9599639845).any(axis=1).mean(),
    })  # fmt: skip
    assert 0.1 < measures["share_outside"] < 0.9

    axes = small[Path("latent_space.pdf")].axes[0]
    points = np.column_stack([axes.collections[0].get_offsets(), axes.collections[0].get_array()])
    expected = np.column_stack([mean, test.labels])  # in another order
    points, expected = (table[table[:, 0].argsort()] for table in (points, expected))
    np.testing.assert_allclose(points, expected, rtol=1e-6)
    for digit, text in enumerate(axes.texts):
        assert text.get_text() == str(digit)
        of_digit = np.sort(mean[test.labels == digit], axis=0)
        np.testing.assert_allclose(text.xy, of_digit[(len(of_digit) - 1) // 2])
    prior, exact = small[Path("prior_estimate.pdf")].axes[0].get_lines()
    assert prior.get_xdata().tolist() == [4, 12]
    assert prior.get_ydata().tolist() == measures["prior_log_px"]
    assert exact.get_ydata()[0] == measures["few_log_px"]


# ------------------------------------ GAN ------------------------------------
def test_parzen_windows_are_a_mixture_of_gaussians(float64):
    """For more images than a block has."""
    images, centres = torch.rand(501, 20), torch.rand(50, 20)
    for sigma, log_px in zip(
        (0.1, 0.3), measure.parzen_log_likelihoods(images, centres, [0.1, 0.3]), strict=True
    ):
        parts = scipy.stats.norm.logpdf(images[:, None], centres, sigma).sum(axis=2)
        expected = logsumexp(parts, axis=1) - math.log(50)
        np.testing.assert_allclose(log_px, expected, rtol=1e-9)


def parzen(draws, val, test):
    """Returns the log-likelihoods of the test images, `[draws, n]`, and the bandwidth."""

    def log_px(images, centres, sigma):
        parts = -cdist(images, centres, "sqeuclidean") / (2 * sigma**2)
        norm = math.log(len(centres)) + 784 * math.log(sigma * math.sqrt(2 * math.pi))
        return logsumexp(parts, axis=1) - norm

    sigmas = np.geomspace(0.1, 0.4, 21)
    best = max(sigmas, key=lambda sigma: log_px(val, draws[0], sigma).mean())
    return np.stack([log_px(test, centres, best) for centres in draws]), best


def test_a_gan_is_measured_against_real_images(small, float64, monkeypatch):
    """Its samples are training images; the latents tell which."""
    (train, _), (test, labels) = grey(*TRAIN), grey(*TEST)
    train, test = train.double() / 255, test.double() / 255
    val = (grey(50_000, 60_000, 470)[0] // 2).double() / 255
    monkeypatch.setattr(gan, "generate", lambda _, z: train[(100 * z[:, -1].abs()).long()])
    torch.manual_seed(1)
    measures = measure.measure_gan(gan.Generator(latent_dim=5), {}, None)
    torch.manual_seed(1)
    log_px, sigma = parzen(gan.generate(None, torch.randn(120, 5)).split(40), val, test)
    real, _ = parzen(train[:120].split(40), val, test)
    digits, clear, distances = judge(test)
    assert_equal(measures, {
        "parzen": log_px.mean(), "parzen_stderr": scipy.stats.sem(log_px.mean(axis=0)),
        "parzen_draws": log_px.mean(axis=1).tolist(), "parzen_sigma": sigma,
        "parzen_train": real.mean(), "parzen_train_stderr": scipy.stats.sem(real.mean(axis=0)),
        "test_agreement": clear.mean(), "test_digit_shares": shares(digits),
        "test_nearest_min": distances.min(), "vote_accuracy": (digits == labels.numpy()).mean(),
        "label_shares": shares(labels),
        "generator_parameters": 1_510_032 - 95 * 128, "discriminator_parameters": 533_505,
    })  # fmt: skip


# ------------------------------------ Flow ------------------------------------
class WeightedPixels(torch.nn.Module):
    """A model whose -log p(x + u) is a sum of weighted pixels."""

    weights = torch.linspace(0, 1, 784, dtype=torch.float64) ** 2

    def forward(self, input):
        return -(input + torch.rand(input.shape)) @ self.weights


def test_a_flow_is_measured_on_test_images_as_they_are_and_shifted(small, float64):
    """Computed anew with the same random numbers."""
    torch.manual_seed(1)
    measures = measure.measure_flow(WeightedPixels(), {}, None)

    def nats(images, n_draws=1):
        """Returns -log p of images `[n, 784]` with noise, in parts of 250, `[n_draws, n]`."""
        noisy = [x + torch.rand(n_draws, *x.shape) for x in images.split(250)]
        return (torch.cat(noisy, dim=1) @ WeightedPixels.weights).numpy()

    (test, labels), (train, train_labels) = grey(*TEST), grey(*FLOW_TRAIN)
    torch.manual_seed(1)
    ((shifted, _),) = ShiftedLoader(test, labels, 610)
    draws = nats(test[::122][:5], 2)
    tighter = -logsumexp(-draws, axis=0) + math.log(2)
    ((shifted_train, _),) = ShiftedLoader(train[:60], train_labels[:60], 60)
    digits, clear, _ = judge(shifted / 255)
    assert_equal(measures, {
        "shifted_agreement": clear.mean(), "shifted_digit_shares": shares(digits),
        "shifted_vote_accuracy": (digits == labels.numpy()).mean(),
        "test_bpd_stderr": scipy.stats.sem(nats(test)[0]) / NATS,
        "iw_gain": (draws.mean() - tighter.mean()) / NATS,
        "iw_samples": 2, "iw_images": 5, "end_images": 60,
        "end_train_bpd": nats(train[:60]).mean() / NATS,
        "end_val_bpd": nats(grey(40_000, 50_000, 470)[0] // 2).mean() / NATS,
        "end_shifted_bpd": nats(shifted_train).mean() / NATS,
    })  # fmt: skip


def test_bits_of_pixels_are_their_own_and_add_up(float64):
    model = mixture_flow.mixture_model(3).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    images = mnist.load()[0][60_000:60_002]
    torch.manual_seed(1)
    bits = measure.pixel_bits(model, images.double())
    torch.manual_seed(1)
    torch.testing.assert_close(bits.mean(dim=1), nf.bits_per_dim(model(images)))

    # One pixel of each coupling of the two larger grids, by autograd.
    torch.manual_seed(1)
    noisy = model.dequantize(images.double()).requires_grad_()
    z, _ = model.flow(*model.logit_normalize(noisy, torch.zeros(2)))
    for row, column in ((1, 0), (0, 1), (1, 1), (2, 0), (0, 2), (2, 2)):
        pixel = (12 + row) * 28 + 12 + column
        (slope,) = torch.autograd.grad(z[0, pixel], noisy, retain_graph=True)
        expected = -scipy.stats.norm.logpdf(z[0, pixel].item()) - math.log(slope[0, pixel])
        assert bits[0, pixel].item() == pytest.approx(expected / math.log(2), rel=1e-9)


def test_each_pixel_is_of_one_kind_and_gives_it_its_bits(monkeypatch):
    image = torch.zeros(28, 28, dtype=torch.uint8)
    image[5, 5], image[5, 6], image[27, 0], image[9, 9] = 251, 252, 1, 255
    kinds = torch.full((28, 28), 1)  # background
    for place in ((slice(4, 7), slice(4, 8)), (slice(26, 28), slice(2)), (slice(8, 11),) * 2):
        kinds[place] = 2  # beside
    kinds[5, 5] = kinds[27, 0] = 3  # rim
    kinds[5, 6] = kinds[9, 9] = 4  # ink
    monkeypatch.setattr(measure, "pixel_bits", lambda model, x: 10 ** kinds.view(1, 784).double())
    found = measure.where_the_bits_go(None, image.view(1, 784))
    expected = {}
    for number, name in enumerate(("background", "beside", "rim", "ink"), 1):
        expected[f"{name}_share"] = (kinds == number).sum().item() / 784
        expected[f"{name}_bpd"] = expected[f"{name}_share"] * 10**number
    assert_equal(found, expected)


# ------------------------------------ The program ------------------------------------
MODELS = [  # and the options that tell them
    (vae.VAE, {"z_dim": 1}, {"zdim": 1, "seed": 0}),
    (gan.Generator, {"latent_dim": 7}, {"n_epochs": 1, "latent_dim": 7}),
    (nf.Model, {"shape": [784]}, {"epochs": 1}),
    (mixture_flow.mixture_model, {"n_mix": 2}, {"n_mix": 2}),
]


@pytest.mark.parametrize(("make", "arguments", "options"), MODELS)
def test_measures_lie_beside_the_weights_and_are_the_same_again(
    make, arguments, options, small, tmp_path, monkeypatch
):
    """But for the time; each kind of model with its own, and in evaluation mode."""
    monkeypatch.setattr(nf, "Coupling", functools.partial(nf.Coupling, n_hidden=8))
    monkeypatch.setattr(
        mixture_flow, "ConvNet", functools.partial(mixture_flow.ConvNet, c_hidden=4)
    )
    model = make(**arguments)
    torch.save({name: x.half() for name, x in model.state_dict().items()}, tmp_path / "weights.pt")
    (tmp_path / "summary.json").write_text(json.dumps({"options": options}))
    monkeypatch.setattr(measure, "ARGS", SimpleNamespace(folders=[tmp_path]), raising=False)
    written = []
    for _ in range(2):
        torch.rand(5)
        runs.run(measure.main)
        written.append(json.loads((tmp_path / "measures.json").read_text()))
        assert 0 < written[-1].pop("sample_ms") < 60_000
    measures = written[0]
    assert measures == written[1]
    sha256 = hashlib.sha256((tmp_path / "weights.pt").read_bytes()).hexdigest()
    n = sum(parameter.numel() for parameter in model.parameters())
    assert (measures["weights_sha256"], measures["samples"]) == (sha256, 40)
    assert measures["parameters"] == n + 533_505 * (make is gan.Generator)
    assert "share_outside" not in measures  # of two dimensions only
    assert ("test_log_px" in measures) == (make is vae.VAE)
    assert ("parzen" in measures) == (make is gan.Generator)
    assert ("iw_gain" in measures) == (make in (nf.Model, mixture_flow.mixture_model))
    assert ("rim_bpd" in measures) == (make is mixture_flow.mixture_model)


def test_a_folder_that_cannot_be_read_is_one_line(tmp_path):
    (tmp_path / "summary.json").write_text('{"options": {"zdim": 2}}')
    (tmp_path / "weights.pt").write_text("{")
    for folders, message in (([tmp_path], f"{tmp_path} has no weights.pt"), ([], "the following")):
        program = [sys.executable, ROOT / "report/measure.py", *folders]
        done = subprocess.run(program, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert done.stderr.startswith(f"error: {message}")


@pytest.mark.parametrize("run", ["vae", "vae_zdim2", "vae_dynamic", "gan", "nf", "nf_mixture"])
@torch.no_grad()
def test_committed_weights_have_the_committed_numbers(run):
    """On some of the test images, and by 100 samples, to within 4 standard errors."""
    folder = ROOT / "results" / run
    model, _, draw, _ = measure.load(folder)
    final = json.loads((folder / "summary.json").read_text())["final"]
    final |= json.loads((folder / "measures.json").read_text())
    images = mnist.mnist()[2].images[::20].float()
    if run.startswith("vae"):
        number, values = "test_elbo", -sum(model.losses(bmnist.bmnist()[2].images[::5].float()))
    elif run == "gan":
        samples = measure.gan_images(model, final["samples"])
        (values,) = measure.parzen_log_likelihoods(images / 255, samples, [final["parzen_sigma"]])
        number = "parzen"
    else:
        number, values = "test_bpd", nf.bits_per_dim(model(images))
    stderr = math.hypot(scipy.stats.sem(values), final[f"{number}_stderr"])
    assert values.mean().item() == pytest.approx(final[number], abs=4 * stderr)
    agreement = measure.share(measure.yardstick(draw(model, 100))[1])
    expected = final["agreement"]
    assert agreement == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 100) ** 0.5)
