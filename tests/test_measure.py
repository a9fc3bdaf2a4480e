"""The measures of the report: bounds against quadrature, Parzen windows and neighbours by SciPy."""

import functools
import itertools
import json
import math
import pathlib

import numpy as np
import pytest
import scipy.integrate
import scipy.spatial.distance
import scipy.special
import scipy.stats
import torch
from conftest import GAN, ROOT, VAE, Results, small

import a3_gan_template as gan
import a3_nf_template as nf
import a3_vae_template as vae
from datasets.bmnist import bmnist
from datasets.mnist import mnist
from report import measure


@pytest.fixture(scope="module")
def grey():
    """Loaders of 600 real images each."""
    loaders = mnist(batch_size=100, n_train=50_000, shift=False)
    small(loaders, 6)
    return loaders


@pytest.fixture
def binary(monkeypatch):
    """Loaders of 60 images each, in whose place measure.py finds them; validation is inverted."""
    loaders = bmnist(batch_size=20)
    small(loaders, 3)
    loaders[1].images = 1 - loaders[1].images
    monkeypatch.setattr(measure, "bmnist", lambda **_: loaders)
    return loaders


@pytest.fixture
def quick(monkeypatch, grey, binary):
    """Few draws, few images, the flow as narrow as that of `finished`, and no timing."""
    sizes = {"VAE_DRAWS": 20, "GAN_SAMPLES": 50, "FLOW_DRAWS": 2, "FLOW_IMAGES": 5}
    for name, size in sizes.items():
        monkeypatch.setattr(measure, name, size)
    monkeypatch.setattr(measure, "sample_ms", lambda draw: 1)
    monkeypatch.setattr(nf, "Coupling", functools.partial(nf.Coupling, n_hidden=32))
    monkeypatch.setattr(measure, "mnist", lambda **_: grey)


# VAE
def test_importance_estimate_rises_with_k_to_log_p_from_below(one_dimensional):
    model, x, _, exact = one_dimensional
    bounds = []
    for k, n in ((1, 20_000), (3, 8000), (10, 4000), (100, 400)):
        values = measure.importance_log_likelihood(model, x.expand(n, -1), k)
        bounds.append((values.mean().item(), scipy.stats.sem(values).item()))
    for (low, _), (high, _) in itertools.pairwise(bounds):
        assert low < high
    assert all(mean < exact + 4 * stderr for mean, stderr in bounds)
    last, stderr = bounds[-1]
    assert last == pytest.approx(exact, abs=0.05 + 4 * stderr)


def test_importance_estimate_tells_images_apart():
    """Each image gets its own estimate, also where the images go in several parts."""
    model = vae.VAE(hidden_dim=20, z_dim=1).requires_grad_(False)
    model.decoder.output.bias -= 1
    batch = bmnist()[2].images[:50].clone()
    batch[25:] = 0  # the likeliest image
    log_px = measure.log_likelihoods(model, batch, 200)
    assert log_px.shape == (50,)
    assert log_px[25:].min() > log_px[:25].max()


def test_vae_is_measured_on_the_test_images(binary, quick, monkeypatch, tmp_path):
    saved = []
    monkeypatch.setattr(vae, "save_figure", lambda figure, name: saved.append((figure, name)))
    model = vae.VAE(hidden_dim=20, z_dim=2).requires_grad_(False)
    model.decoder.output.bias -= 1  # likes test images, but not the inverted validation images
    model.encoder.mean_and_log_std.weight[:2] *= 20
    options = {"batch_size": 20, "binarization": "static", "seed": 3}
    torch.manual_seed(1)
    measures = measure.measure_vae(model, options, tmp_path)

    _, val, test = binary
    torch.manual_seed(1)
    reconstruction, kl = torch.cat([torch.stack(model.losses(x)) for x in test], dim=1)
    for name, values in (("reconstruction", reconstruction), ("kl", kl)):
        assert measures[f"test_{name}"] == pytest.approx(values.mean().item(), rel=1e-5)
        assert measures[f"test_{name}_stderr"] == pytest.approx(scipy.stats.sem(values), rel=1e-4)
    loss = reconstruction + kl
    assert measures["test_elbo_stderr"] == pytest.approx(scipy.stats.sem(loss), rel=1e-4)
    assert -loss.mean() < measures["test_log_px"] < 50 - loss.mean()
    mean, std = model.encoder(test.images.float())
    spread = np.var(mean.numpy(), axis=0, ddof=1) + np.mean(std.numpy() ** 2, axis=0)
    np.testing.assert_allclose(measures["aggregate_variance"], spread, rtol=1e-4)
    outside = (abs(mean.numpy()) > 1.959964).any(axis=1).mean()
    assert 0 < outside < 1
    assert measures["share_outside"] == pytest.approx(outside)
    torch.manual_seed(3)
    random = vae.VAE(z_dim=2).eval()
    assert measures["initial_elbo"] == vae.epoch_iter(random, val, None)

    ((figure, name),) = saved
    points = figure.axes[0].collections[0]
    assert name == tmp_path / "latent_space.pdf"
    np.testing.assert_allclose(points.get_offsets(), mean, rtol=1e-4, atol=1e-5)
    assert points.get_array().tolist() == test.labels.tolist()
    vae.plt.close(figure)


# GAN
def exact_parzen(images, centres, sigma):
    parts = scipy.stats.norm.logpdf(images[:, None].double(), centres[None].double(), sigma)
    return scipy.special.logsumexp(parts.sum(axis=2), axis=1) - math.log(len(centres))


def test_parzen_estimate_chooses_the_bandwidth_on_the_validation_images_alone():
    """Validation images near their centres; test images, more than a block has, far from them."""
    centres = torch.rand(50, 20)
    val = centres + 0.15 * torch.randn(50, 20)
    test = torch.rand(501, 20) + 0.3 * torch.randn(501, 20)
    mean, stderr, sigma = measure.parzen_estimate(centres, val, test)
    log_px = exact_parzen(test, centres, sigma)
    assert mean == pytest.approx(log_px.mean(), rel=1e-3)
    assert stderr == pytest.approx(scipy.stats.sem(log_px), rel=1e-3)
    here = exact_parzen(val, centres, sigma).mean()
    for step in (-0.01, 0.01, 0.1):
        assert exact_parzen(val, centres, sigma + step).mean() < here + 1e-4
    assert exact_parzen(test, centres, sigma + 0.05).mean() > mean  # they would choose another


def test_copies_of_the_training_images_are_judged_as_such(grey, monkeypatch):
    """More of them, and of the test images, than a block has."""
    train, _, test = grey
    monkeypatch.setattr(gan, "sample_images", lambda _, z: train.images[: len(z)] / 255)
    measures = measure.judge(gan.Generator(), *grey, 600)
    assert measures["nearest_sample"] == pytest.approx(0, abs=0.02)  # float32 leaves that much
    images = [split.images / 255 for split in grey]
    distances = scipy.spatial.distance.cdist(images[2].double(), images[0].double())
    assert measures["nearest_test"] == pytest.approx(distances.min(axis=1).mean(), rel=1e-4)
    parzen, stderr, sigma = measure.parzen_estimate(*images)
    assert measures["parzen_train"] == pytest.approx(parzen, rel=1e-5)
    assert measures["parzen"] == pytest.approx(parzen, rel=1e-3)
    assert measures["parzen_stderr"] == pytest.approx(stderr, rel=1e-3)
    assert measures["parzen_sigma"] == sigma
    pixels = train.images.double().numpy()
    nearest = scipy.spatial.distance.cdist(pixels, pixels).argsort(axis=1)[:, :10]
    digits = scipy.stats.mode(train.labels.numpy()[nearest], axis=1).mode
    for name, labels in (("digit_shares", digits), ("test_digit_shares", test.labels.numpy())):
        shares = np.bincount(labels, minlength=10) / len(labels)
        np.testing.assert_allclose(measures[name], shares, atol=1e-6)
    entropy = scipy.stats.entropy(measures["digit_shares"])
    assert measures["digit_entropy"] == pytest.approx(entropy, rel=1e-5)
    assert measures["digits_present"] == 10


# Flow
class PixelModel(torch.nn.Module):
    """A model whose -log p(x + u) is the mean pixel, and 10 more in every second draw."""

    n_calls = 0

    def forward(self, input):
        self.n_calls += 1
        return -input.mean(dim=1) - 10 * (self.n_calls % 2)

    sample = staticmethod(torch.zeros)


def test_flow_is_measured_on_the_test_images(grey, quick):
    measures = measure.measure_flow(PixelModel(), {}, None)
    pixels = grey[2].images.double().numpy().mean(axis=1)
    unit = 784 * math.log(2)
    # 600 images go in three parts, so that not all have the same draw
    extra = 10 * np.repeat([1, 0, 1], [250, 250, 100])
    assert measures["test_bpd_stderr"] == pytest.approx(scipy.stats.sem(pixels + extra) / unit)
    first = pixels[:5].mean()
    assert measures["test_bpd_iw_single"] == pytest.approx((first + 5) / unit, rel=1e-5)
    expected = first - math.log((1 + math.exp(-10)) / 2)
    assert measures["test_bpd_iw"] == pytest.approx(expected / unit, rel=1e-5)
    assert (measures["iw_samples"], measures["iw_images"]) == (2, 5)


# The program
def test_measures_are_beside_the_weights_and_the_same_again(script, finished, quick, tmp_path):
    finished.copy(script, tmp_path)
    written = []
    for _ in range(2):
        measure.main([tmp_path])
        written.append((tmp_path / "measures.json").read_bytes())
        torch.rand(5)
    assert written[0] == written[1]
    measures, (model, _, _) = json.loads(written[0]), measure.load(tmp_path)
    n = sum(parameter.numel() for parameter in model.parameters())
    assert measures["parameters"] == n + 533_505 * (script is GAN)
    assert measures["sample_ms"] == 1


@pytest.mark.parametrize("file", ["weights.pt", "summary.json"])
@pytest.mark.parametrize("damage", [pathlib.Path.unlink, lambda path: path.write_text("{")])
def test_a_folder_that_cannot_be_read_is_one_line(file, damage, finished, tmp_path, capsys):
    finished.copy(VAE, tmp_path)
    damage(tmp_path / file)
    with pytest.raises(SystemExit) as end:
        measure.main([tmp_path])
    error = capsys.readouterr().err
    assert (end.value.code, error.count("\n"), error.startswith("error: ")) == (2, 1, True)
    assert not (tmp_path / "measures.json").exists()


@pytest.mark.parametrize("name", ["vae", "vae_zdim2", "vae_dynamic", "gan", "nf", "nf_mixture"])
@torch.no_grad()
def test_committed_weights_have_the_committed_numbers(name):
    """On some of the test images, to within 4 standard errors."""
    folder = ROOT / "results" / name
    for file in ("weights.pt", "measures.json"):
        if not (folder / file).exists():
            pytest.skip(f"results/{name} has no {file}")
    model, _, _ = measure.load(folder)
    final = Results(folder).summary["final"] | json.loads((folder / "measures.json").read_text())
    images = mnist()[2].images[::20].float()
    if name.startswith("vae"):
        number, values = "test_elbo", -sum(model.losses(bmnist()[2].images[::5].float()))
    elif name == "gan":
        samples = gan.sample_images(model, torch.randn(final["eval_samples"], model.latent_dim))
        (values,) = measure.parzen_log_likelihoods(images / 255, samples, [final["parzen_sigma"]])
        number = "parzen"
    else:
        number, values = "test_bpd", nf.bits_per_dim(model(images))
    stderr = math.hypot(scipy.stats.sem(values), final[f"{number}_stderr"])
    assert values.mean().item() == pytest.approx(final[number], abs=4 * stderr)
