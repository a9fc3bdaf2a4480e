"""The measures of the report: bounds against quadrature, Parzen windows and neighbours by SciPy."""

import functools
import itertools
import json
import math

import numpy as np
import pytest
import scipy.integrate
import scipy.spatial.distance
import scipy.special
import scipy.stats
import torch
from conftest import briefly_trained_vae, committed, mean_and_stderr, small

import a3_gan_template as gan
import a3_nf_template as nf
import a3_vae_template as vae
from datasets.bmnist import bmnist
from datasets.mnist import mnist
from report import measure


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


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
    """Few draws, few images, a narrow flow and no timing."""
    sizes = {"VAE_DRAWS": 20, "GAN_SAMPLES": 50, "FLOW_DRAWS": 2, "FLOW_IMAGES": 5}
    for name, size in sizes.items():
        monkeypatch.setattr(measure, name, size)
    monkeypatch.setattr(measure, "sample_ms", lambda draw: 1)
    monkeypatch.setattr(nf, "Coupling", functools.partial(nf.Coupling, n_hidden=8))
    monkeypatch.setattr(measure, "mnist", lambda **_: grey)


# VAE: the bounds, against log p(x) by quadrature over a 1-d latent
@pytest.fixture(scope="module")
def one_dimensional():
    """A briefly trained model with a 1-d latent, an image, and its exact log p(x)."""
    torch.manual_seed(1)
    images = bmnist()[2].images[:300].float()
    model = briefly_trained_vae(images)
    x, z = images[0], torch.linspace(-8, 8, 4001)
    with torch.no_grad():
        means = model.decoder(z[:, None]).double().numpy()
    log_joint = scipy.stats.bernoulli.logpmf(x.numpy(), means).sum(axis=1)
    log_joint += scipy.stats.norm.logpdf(z.numpy())
    top = log_joint.max()
    exact = top + math.log(scipy.integrate.simpson(np.exp(log_joint - top), x=z.double().numpy()))
    return model.requires_grad_(False), x, exact


def test_importance_estimate_rises_with_k_to_log_p_from_below(one_dimensional):
    model, x, exact = one_dimensional
    bounds = [
        mean_and_stderr(measure.importance_log_likelihood(model, x.expand(n, -1), k))
        for k, n in ((1, 20_000), (3, 8000), (10, 4000), (100, 400))
    ]
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
    measures = measure.measure_vae(model, options, tmp_path)

    _, val, test = binary
    mean, std = model.encoder(test.images.float())
    reconstruction, kl = model.losses(test.images.float())
    assert measures["test_kl"] == pytest.approx(kl.mean().item(), rel=1e-5)
    assert measures["test_kl_stderr"] == pytest.approx(scipy.stats.sem(kl), rel=1e-4)
    assert measures["test_reconstruction"] == pytest.approx(reconstruction.mean().item(), abs=10)
    for name, loss in {"reconstruction": reconstruction, "elbo": reconstruction + kl}.items():
        assert measures[f"test_{name}_stderr"] == pytest.approx(scipy.stats.sem(loss), rel=0.3)
    bound = -measures["test_reconstruction"] - measures["test_kl"]
    assert bound < measures["test_log_px"] < bound + 50
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
def test_nearest_neighbours_are_those_of_brute_force(grey):
    """More rows than a block has."""
    images = torch.cat([grey[1].images, grey[2].images[:7]]).float() / 255
    train, labels = grey[0].images.float() / 255, grey[0].labels
    distance, digits = measure.nearest_neighbours(images, train, labels, k=3)
    exact = scipy.spatial.distance.cdist(images.double(), train.double())
    np.testing.assert_allclose(distance, exact.min(axis=1), rtol=1e-4)
    np.testing.assert_array_equal(digits, labels.numpy()[exact.argsort(axis=1)[:, :3]])
    itself, _ = measure.nearest_neighbours(train[:5], train, labels, k=1)
    assert itself.numpy() == pytest.approx(0, abs=0.02)  # float32 leaves that much


def exact_parzen(images, centres, sigma):
    parts = scipy.stats.norm.logpdf(images[:, None].double(), centres[None].double(), sigma)
    return scipy.special.logsumexp(parts.sum(axis=2), axis=1) - math.log(len(centres))


def test_parzen_is_a_mixture_of_scipys_normals_in_many_dimensions(grey):
    """More rows than a block has, and several bandwidths."""
    centres, x = grey[0].images[:30].float() / 255, grey[2].images[:501].float() / 255
    log_p = measure.parzen_log_likelihoods(x, centres, [0.1, 0.3])
    assert log_p.shape == (2, 501)
    rows = [0, 499, 500]
    for values, sigma in zip(log_p, [0.1, 0.3], strict=True):
        exact = exact_parzen(x[rows], centres, sigma)
        np.testing.assert_allclose(values[rows], exact, rtol=1e-3, atol=0.1)


def test_parzen_estimate_chooses_the_bandwidth_on_the_validation_images_alone():
    """Validation images near their centres, test images far from them."""
    centres = torch.rand(50, 20)
    val = centres + 0.15 * torch.randn(50, 20)
    test = torch.rand(30, 20) + 0.3 * torch.randn(30, 20)
    mean, stderr, sigma = measure.parzen_estimate(centres, val, test)
    log_px = exact_parzen(test, centres, sigma)
    assert mean == pytest.approx(log_px.mean(), rel=1e-3)
    assert stderr == pytest.approx(scipy.stats.sem(log_px), rel=1e-3)
    here = exact_parzen(val, centres, sigma).mean()
    for step in (-0.01, 0.01, 0.1):
        assert exact_parzen(val, centres, sigma + step).mean() < here + 1e-4
    assert exact_parzen(test, centres, sigma + 0.05).mean() > mean  # they would choose another


class Copier(torch.nn.Module):
    """A generator that gives images back, one after the other."""

    latent_dim = 3

    def __init__(self, pixels):
        super().__init__()
        self.images = iter(pixels.float() / 127.5 - 1)

    def forward(self, z):
        return torch.stack(list(itertools.islice(self.images, len(z))))


def test_copies_of_the_training_images_are_judged_as_such(grey):
    train, val, test = grey
    measures = measure.judge(Copier(train.images), *grey, 200)
    assert measures["nearest_sample"] == pytest.approx(0, abs=0.02)
    assert measures["nearest_test"] > 3
    images = [split / 255 for split in (train.images[:200], val.images, test.images)]
    parzen, stderr, sigma = measure.parzen_estimate(*images)
    assert measures["parzen_train"] == pytest.approx(parzen, rel=1e-5)
    assert measures["parzen"] == pytest.approx(parzen, rel=1e-3)
    assert measures["parzen_stderr"] == pytest.approx(stderr, rel=1e-3)
    assert measures["parzen_sigma"] == sigma
    pixels = train.images.double().numpy()
    nearest = scipy.spatial.distance.cdist(pixels[:200], pixels).argsort(axis=1)[:, :10]
    digits = scipy.stats.mode(train.labels.numpy()[nearest], axis=1).mode
    for name, labels in (("digit_shares", digits), ("test_digit_shares", test.labels.numpy())):
        shares = np.bincount(labels, minlength=10) / len(labels)
        np.testing.assert_allclose(measures[name], shares, atol=1e-6)
    entropy = scipy.stats.entropy(measures["digit_shares"])
    assert measures["digit_entropy"] == pytest.approx(entropy, rel=1e-5)
    assert measures["digits_present"] == 10


# Flow
def test_bits_of_the_mean_density_are_fewer_than_the_mean_bits():
    bits = 2 + 0.01 * torch.rand(16, 30).double()
    tighter = measure.tighter_bits(bits)
    log_px = scipy.special.logsumexp(-bits.numpy() * 784 * math.log(2), axis=0, b=1 / 16)
    np.testing.assert_allclose(tighter, -log_px / 784 / math.log(2), rtol=1e-12)
    assert (tighter < bits.mean(dim=0)).all()
    torch.testing.assert_close(measure.tighter_bits(bits[:1]), bits[0])


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
def make_run(folder, kind):
    """Write what a run leaves, of random weights."""
    binary = {"batch_size": 20, "binarization": "static"}
    options, model = {
        "vae": ({"zdim": 2, "seed": 0, **binary}, vae.VAE(z_dim=2)),
        "gan": ({"n_epochs": 1, "latent_dim": 3}, gan.Generator(3)),
        "nf": ({"epochs": 1, "coupling": "affine"}, nf.Model([784], "affine")),
    }[kind]
    folder.mkdir()
    torch.save(model.state_dict(), folder / "weights.pt")
    (folder / "summary.json").write_text(json.dumps({"options": options}))
    return model


@pytest.mark.parametrize("kind", ["vae", "gan", "nf"])
def test_measures_are_written_beside_the_weights_and_the_same_again(kind, tmp_path, quick):
    written = []
    n = sum(weight.numel() for weight in make_run(tmp_path / kind, kind).parameters())
    for _ in range(2):
        measure.main([tmp_path / kind])
        written.append((tmp_path / kind / "measures.json").read_bytes())
        torch.rand(5)
    assert written[0] == written[1]
    measures = json.loads(written[0])
    assert measures["sample_ms"] == 1
    assert measures["parameters"] == n + 533_505 * (kind == "gan")
    assert (tmp_path / kind / "latent_space.png").is_file() == (kind == "vae")


@pytest.mark.parametrize("file", ["weights.pt", "summary.json"])
@pytest.mark.parametrize("content", [None, "{"])
def test_a_folder_that_cannot_be_read_is_one_line(file, content, tmp_path, capsys):
    make_run(tmp_path / "vae", "vae")
    (tmp_path / "vae" / file).unlink()
    if content:
        (tmp_path / "vae" / file).write_text(content)
    with pytest.raises(SystemExit) as end:
        measure.main([tmp_path / "vae"])
    error = capsys.readouterr().err
    assert (end.value.code, error.count("\n"), error.startswith("error: ")) == (2, 1, True)
    assert not (tmp_path / "vae" / "measures.json").exists()


def test_committed_gan():
    """To within 4 standard errors, with as many samples as in the run, on some of the images."""
    options, final, weights = committed("gan")
    generator = gan.Generator(options["latent_dim"])
    generator.load_state_dict(weights)
    z = torch.randn(final["eval_samples"], options["latent_dim"])
    samples = gan.sample_images(generator.eval(), z)
    images = mnist()[2].images[::20].float() / 255
    (log_px,) = measure.parzen_log_likelihoods(images, samples, [final["parzen_sigma"]])
    mean, stderr = mean_and_stderr(log_px)
    stderr = math.hypot(stderr, final["parzen_stderr"])
    assert mean == pytest.approx(final["parzen"], abs=4 * stderr)
