"""The VAE: its loss against SciPy, its bounds against quadrature, its training and figures."""

import functools
import itertools
import math

import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch
import torch.nn.functional as F
from conftest import VAE, Results, committed, small, way_off
from torch import nn

import a3_vae_template as vae
from datasets import bmnist as bmnist_module
from datasets.bmnist import bmnist


@pytest.fixture(scope="module")
def images():
    """300 real binary images."""
    return bmnist()[2].images[:300].view(-1, 1, 28, 28).float()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Batches(list):
    """A list of batches with a loader's `images`."""

    @property
    def images(self):
        return torch.cat(list(self)).flatten(1)


# ---------------------------------------------------------------------------------------
# The two terms of the loss
# ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("mean", "std"), [(0.0, 1.0), (0.1, 1.0), (-1.5, 0.3), (3.0, 2.5), (0.0, 0.01)]
)
def test_kl_is_the_integral_of_its_definition(mean, std):
    q, p = scipy.stats.norm(mean, std), scipy.stats.norm()
    exact, _ = scipy.integrate.quad(
        lambda z: q.pdf(z) * (q.logpdf(z) - p.logpdf(z)), mean - 15 * std, mean + 15 * std
    )
    kl = vae.kl_divergence(
        torch.tensor([mean], dtype=torch.float64), torch.tensor([std], dtype=torch.float64)
    )
    assert kl.item() == pytest.approx(exact, rel=1e-8, abs=1e-10)


def test_likelihood_is_scipys_bernoulli():
    logits, x = (
        3 * torch.randn(4, 784).double(),
        torch.bernoulli(torch.full((4, 784), 0.3)).double(),
    )
    exact = scipy.stats.bernoulli.logpmf(x.numpy(), scipy.special.expit(logits.numpy())).sum(axis=1)
    np.testing.assert_allclose(vae.bernoulli_log_likelihood(logits, x), exact, rtol=1e-10)


@pytest.mark.parametrize("logit", [1e4, -1e4])
@pytest.mark.parametrize("x", [0.0, 1.0])
def test_likelihood_and_its_gradient_are_exact_at_extreme_logits(logit, x):
    logits = torch.tensor([logit], requires_grad=True)
    log_p = vae.bernoulli_log_likelihood(logits, torch.tensor([x]))
    log_p.backward()
    right = (logit > 0) == (x == 1)
    assert log_p.item() == (0 if right else -1e4)
    assert logits.grad.item() == (0 if right else math.copysign(1, -logit))


# ---------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("z_dim", [1, 2, 20])
def test_shapes_and_ranges(images, z_dim):
    model = vae.VAE(hidden_dim=30, z_dim=z_dim)
    assert model.z_dim == z_dim
    for x in (images, images.flatten(1)):  # both shapes of a batch
        mean, std = model.encoder(x)
        assert mean.shape == std.shape == (300, z_dim)
        assert (std > 0).all()
    means = model.decoder(torch.randn(7, z_dim))
    assert means.shape == (7, 784)
    assert ((means > 0) & (means < 1)).all()


def test_samples_are_binary_draws_from_their_means():
    model = vae.VAE()
    torch.nn.init.constant_(model.decoder.output.bias, -1)  # means near 0.27
    samples, means = model.sample(200)
    assert samples.shape == means.shape == (200, 1, 28, 28)
    assert set(samples.unique().tolist()) == {0, 1}
    z_score = (samples - means).sum() / (means * (1 - means)).sum().sqrt()
    assert abs(z_score) < 5
    assert len(means.flatten(1).unique(dim=0)) == 200  # each from a latent of its own
    assert not samples.requires_grad


def test_samples_come_from_a_standard_normal_latent():
    model, seen = vae.VAE(z_dim=2), []
    model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.sample(5000)
    for column in torch.cat(seen).T:
        assert scipy.stats.kstest(column.numpy(), "norm").pvalue > 1e-3


# ---------------------------------------------------------------------------------------
# The bounds, against log p(x) by quadrature over a 1-d latent
# ---------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def one_dimensional(images):
    """A briefly trained model with a 1-d latent, an image, and its exact log p(x)."""
    torch.manual_seed(1)
    model = vae.VAE(hidden_dim=20, z_dim=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        model(images).backward()
        optimizer.step()
    x = images[0].flatten()
    z = torch.linspace(-8, 8, 4001)
    with torch.no_grad():
        means = model.decoder(z[:, None]).double().numpy()
    log_joint = scipy.stats.bernoulli.logpmf(x.numpy(), means).sum(axis=1)
    log_joint += scipy.stats.norm.logpdf(z.numpy())
    top = log_joint.max()
    exact = top + math.log(scipy.integrate.simpson(np.exp(log_joint - top), x=z.double().numpy()))
    return model.requires_grad_(False), x, exact


def mean_and_stderr(samples):
    samples = samples.double()
    return samples.mean().item(), samples.std().item() / len(samples) ** 0.5


def test_elbo_is_a_lower_bound(one_dimensional):
    model, x, exact = one_dimensional
    elbo, stderr = mean_and_stderr(-sum(model.losses(x.expand(20_000, -1))))
    assert elbo + 4 * stderr < exact
    assert elbo > exact - 30  # and not just any lower bound


def test_importance_estimate_rises_with_k_to_log_p_from_below(one_dimensional):
    model, x, exact = one_dimensional
    bounds = [
        mean_and_stderr(vae.importance_log_likelihood(model, x.expand(n, -1), k))
        for k, n in ((1, 20_000), (3, 8000), (10, 4000), (100, 400))
    ]
    for (low, _), (high, _) in itertools.pairwise(bounds):
        assert low < high
    assert all(mean < exact + 4 * stderr for mean, stderr in bounds)
    last, stderr = bounds[-1]
    assert last == pytest.approx(exact, abs=0.05 + 4 * stderr)


def test_importance_estimate_tells_images_apart(images):
    """Each image gets its own estimate, and counts alike in the mean."""
    model = vae.VAE(hidden_dim=20, z_dim=1).requires_grad_(False)
    batch = images[:50].clone()
    batch[25:] *= 0  # the empty image, 784 ln 2 like any other at first
    model.decoder.output.bias -= 1  # then likelier
    log_px = vae.importance_log_likelihood(model, batch, 10)
    assert log_px[25:].min() > log_px[:25].max()
    data = Batches(batch.split(20))
    mean = vae.mean_log_likelihood(model, data, 10)
    assert mean == pytest.approx(log_px.mean().item(), abs=0.5)


# ---------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------
def test_epoch_average_counts_the_last_batch_by_its_size():
    """Of a model whose negative ELBO is the mean pixel of the batch."""

    class MeanPixel(torch.nn.Module):
        def forward(self, input):
            return input.mean()

    data = torch.rand(5, 1, 28, 28).split(2)
    elbo = vae.epoch_iter(MeanPixel().eval(), data, optimizer=None)
    assert elbo == pytest.approx(-torch.cat(data).mean().item(), rel=1e-6)


def test_mean_losses_average_over_images(images):
    model = vae.VAE(hidden_dim=20)
    with torch.no_grad():  # no noise, so that the batches do not matter
        model.encoder.mean_and_log_std.weight.zero_()
        model.encoder.mean_and_log_std.bias[20:] = -12
    whole = [term.mean().item() for term in model.losses(images)]
    data = Batches([*images[:250].split(100), images[250:]])
    assert vae.mean_losses(model, data) == pytest.approx(whole, rel=1e-4)


# ---------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------
@pytest.fixture
def figures(monkeypatch):
    """The figures that would be saved, by file name."""
    saved = {}
    monkeypatch.setattr(vae, "save_figure", lambda figure, name: saved.update({name: figure}))
    yield saved
    for figure in saved.values():
        vae.plt.close(figure)


def test_elbo_plot_shows_both_curves(figures):
    vae.save_elbo_plot([-200.0, -120.0, -110.0], [-150.0, -125.0, -115.0], "elbo.pdf")
    axes = figures["elbo.pdf"].axes[0]
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    assert lines == {
        "training": [[1, -200], [2, -120], [3, -110]],
        "validation": [[1, -150], [2, -125], [3, -115]],
    }
    assert "nats" in axes.get_ylabel()
    assert axes.get_xlabel()


def test_manifold_is_a_20_by_20_grid_even_in_the_priors_probability(figures):
    model, seen = vae.VAE(hidden_dim=20, z_dim=2), []
    model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    vae.save_manifold(model, "manifold.pdf")
    z = torch.cat(seen).view(20, 20, 2)
    z_1, z_2 = z[0, :, 0], z[:, 0, 1].flip(0)  # to the right, and upwards
    assert torch.equal(z[..., 0], z_1.expand(20, 20))
    assert torch.equal(z[..., 1].flip(0), z_2[:, None].expand(20, 20))
    for axis in (z_1, z_2):
        shares = scipy.stats.norm.cdf(axis.double())
        np.testing.assert_allclose(np.diff(shares), np.diff(shares)[0], rtol=1e-4)
        assert np.diff(shares)[0] > 0.04
        assert shares.mean() == pytest.approx(0.5, abs=1e-6)
    (picture,) = figures["manifold.pdf"].axes[0].get_images()
    with torch.no_grad():
        means = model.decoder(z.view(400, 2)).view(20, 20, 28, 28)
    tiles = np.asarray(picture.get_array()).reshape(20, 28, 20, 28).transpose(0, 2, 1, 3)
    np.testing.assert_allclose(tiles, means, rtol=1e-5)


def test_latent_space_shows_each_posterior_mean_in_its_digits_colour(figures):
    model, data = vae.VAE(hidden_dim=20, z_dim=2), bmnist()[2]
    data.limit(1)
    vae.save_latent_space(model, data, "latent.pdf")
    points = figures["latent.pdf"].axes[0].collections[0]
    with torch.no_grad():
        mean, _ = model.encoder(data.images.float())
    np.testing.assert_allclose(points.get_offsets(), mean, rtol=1e-6)
    assert points.get_array().tolist() == data.labels.tolist()


# ---------------------------------------------------------------------------------------
# The script
# ---------------------------------------------------------------------------------------
def negative_elbo(encoder, decoder, images, precision="float32"):
    """The average negative ELBO by other means than the script's."""
    x = images.flatten(1)
    with torch.autocast("cpu", torch.bfloat16, precision == "bfloat16"):
        mean, log_std = encoder(x).float().chunk(2, dim=1)
        logits = decoder(mean + log_std.exp() * torch.randn_like(mean)).float()
    reconstruction = F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(dim=1)
    kl = -0.5 * (1 + 2 * log_std - mean**2 - (2 * log_std).exp()).sum(dim=1)
    return (reconstruction + kl).mean()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_is_that_of_a_plain_loop(precision, tmp_path):
    """Two epochs of three batches: AdamW with decay where the pixels are read, and a cosine."""
    loaders, options = functools.partial(small, n_batches=3), ("--precision", precision)
    VAE.run_well(*VAE.options(tmp_path, 2, *options, "--lr", 0.003), loaders=loaders)

    train, val, _ = data = bmnist(batch_size=20)
    loaders(data)
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(784, 500), nn.GELU(), nn.Linear(500, 40))
    decoder = nn.Sequential(nn.Linear(20, 500), nn.GELU(), nn.Linear(500, 784))
    weights = [*encoder.parameters(), *decoder.parameters()]
    start = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.AdamW(weights, weight_decay=0)
    for images in val:
        negative_elbo(encoder, decoder, images)  # of the random weights: it takes its noise
    for epoch in range(2):
        elbos = {"train_elbo": [], "val_elbo": []}
        for step, images in enumerate(train, 3 * epoch):
            optimizer.param_groups[0]["lr"] = lr = 0.003 * (1 + math.cos(math.pi * step / 6)) / 2
            loss = negative_elbo(encoder, decoder, images, precision)
            optimizer.zero_grad()
            loss.backward()
            weights[0].data *= 1 - lr * 0.2
            optimizer.step()
            elbos["train_elbo"].append(-loss.item())
        for images in val:
            elbo = -negative_elbo(encoder, decoder, images, precision).item()
            elbos["val_elbo"].append(elbo)
        row = Results(tmp_path).metrics[epoch]
        for name, values in elbos.items():
            assert float(row[name]) == pytest.approx(np.mean(values), rel=1e-4)
    assert way_off(start, weights, Results(tmp_path).weights.values()) < 1e-3


def test_samples_are_drawn_from_the_weights_of_their_epoch(tmp_path):
    """The same latents each time; samples to the left, their Bernoulli means to the right."""
    VAE.run_well(*VAE.options(tmp_path, 4))
    torch.manual_seed(0)
    run, model = Results(tmp_path), vae.VAE()
    for name, weights in (("before", model.state_dict()), ("after", run.weights)):
        model.load_state_dict(weights)
        torch.manual_seed(0)
        for picture, images in zip(run.pictures(f"samples_{name}"), model.sample(25), strict=True):
            assert picture.shape == (5 * 29 + 1, 5 * 29 + 1)
            np.testing.assert_allclose(picture[1:29, 30:58], images[1, 0], atol=1e-6)
            np.testing.assert_allclose(picture[117:145, 117:145], images[24, 0], atol=1e-6)
    means = [run.pictures(f"samples_{name}")[1] for name in ("before", "first", "halfway", "after")]
    for one, other in itertools.combinations(means, 2):
        assert abs(one - other).max() > 1e-3


def test_larochelles_files_train_without_labels(tmp_path, monkeypatch):
    names = {f"binarized_mnist_{split}.amat": 40 for split in ("train", "valid", "test")}
    monkeypatch.setattr(bmnist_module, "LAROCHELLE", names)
    for name in names:
        images = torch.bernoulli(torch.full((40, 784), 0.2)).int().tolist()
        (tmp_path / name).write_text("\n".join(" ".join(map(str, row)) for row in images) + "\n")
    options = ("--binarization", "larochelle", "--data_dir", tmp_path, "--zdim", 2)
    VAE.run_well(*VAE.options(tmp_path / "results", 1), *options)
    assert (tmp_path / "results" / "summary.json").is_file()


def test_dynamic_binarization_trains_as_well_as_static(tmp_path):
    """Its training images are grey in memory, and must not be taken for binary ones.

    And the summary has the bounds in their order.
    """
    loaders, elbos = functools.partial(small, n_batches=10), []
    for binarization in ("static", "dynamic"):
        options = ("--binarization", binarization, "--iw_samples", 200)
        VAE.run_well(*VAE.options(tmp_path / binarization, 2, *options), loaders=loaders)
        final = Results(tmp_path / binarization).summary["final"]
        assert -784 * math.log(2) < final["test_elbo"] < final["test_log_px"] < -50
        assert final["initial_elbo"] == pytest.approx(-784 * math.log(2), abs=10)
        elbos.append(final["val_elbo"])
    assert elbos[1] == pytest.approx(elbos[0], abs=15)


@pytest.mark.parametrize("name", ["vae", "vae_zdim2", "vae_dynamic"])
def test_committed_weights_have_the_committed_numbers(name):
    """On every fifth test image, to within 4 standard errors of a mean over so many."""
    options, final, weights = committed(name)
    model = vae.VAE(z_dim=options["zdim"])
    model.load_state_dict(weights)
    with torch.no_grad():
        terms = model.losses(bmnist()[2].images[::5].float())
    for term, name in zip(terms, ("test_reconstruction", "test_kl"), strict=True):
        mean, stderr = mean_and_stderr(term)
        assert mean == pytest.approx(final[name], abs=4 * stderr)
    mean, stderr = mean_and_stderr(-sum(terms))
    assert mean == pytest.approx(final["test_elbo"], abs=4 * stderr)
