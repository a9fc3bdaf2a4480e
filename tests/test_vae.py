"""The VAE: its loss against SciPy, its bound against quadrature, its training and figures."""

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
from conftest import VAE, Results, briefly_trained_vae, committed, mean_and_stderr, small, way_off
from torch import nn

import a3_vae_template as vae
from datasets import bmnist as bmnist_module
from datasets.bmnist import bmnist


@pytest.fixture(scope="module")
def images():
    """300 real binary images."""
    return bmnist()[2].images[:300].view(-1, 1, 28, 28).float()


# ------------------------ The two terms of the loss ------------------------
@pytest.mark.parametrize(("mean", "std"), [(0, 1), (0.1, 1), (-1.5, 0.3), (3, 2.5), (0, 0.01)])
def test_kl_is_the_integral_of_its_definition(mean, std):
    q, p = scipy.stats.norm(mean, std), scipy.stats.norm()
    ends = mean - 15 * std, mean + 15 * std
    exact, _ = scipy.integrate.quad(lambda z: q.pdf(z) * (q.logpdf(z) - p.logpdf(z)), *ends)
    kl = vae.kl_divergence(*torch.tensor([[mean], [std]], dtype=torch.float64))
    assert kl.item() == pytest.approx(exact, rel=1e-8, abs=1e-10)


def test_likelihood_is_scipys_bernoulli():
    logits = 3 * torch.randn(4, 784).double()
    x = torch.bernoulli(torch.full((4, 784), 0.3)).double()
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


# ------------------------ Model ------------------------
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
    """And these come from standard-normal latents."""
    model, seen = vae.VAE(z_dim=2), []
    model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    torch.nn.init.constant_(model.decoder.output.bias, -1)  # means near 0.27
    samples, means = model.sample(2000)
    assert samples.shape == means.shape == (2000, 1, 28, 28)
    assert set(samples.unique().tolist()) == {0, 1}
    z_score = (samples - means).sum() / (means * (1 - means)).sum().sqrt()
    assert abs(z_score) < 5
    assert not samples.requires_grad
    for column in torch.cat(seen).T:
        assert scipy.stats.kstest(column.numpy(), "norm").pvalue > 1e-3


def test_model_may_be_float64(images):
    model = vae.VAE(hidden_dim=30).double()
    assert model(images.double()).dtype == torch.float64
    assert [tensor.dtype for tensor in model.sample(2)] == 2 * [torch.float64]


# ------------------------ The bound ------------------------
def test_elbo_is_that_of_quadrature_and_a_lower_bound(images):
    """Over the 1-d latent of a briefly trained model."""
    model = briefly_trained_vae(images)
    x, z = images[0].flatten(), torch.linspace(-8, 8, 4001)
    with torch.no_grad():
        terms = [mean_and_stderr(term) for term in model.losses(x.expand(20_000, -1))]
        logits = model.decoder.logits(z[:, None]).double().numpy()
        q = scipy.stats.norm(*(number.item() for number in model.encoder(x[None])))
    z = z.double().numpy()
    log_likelihood = scipy.special.log_expit((2 * x.numpy() - 1) * logits).sum(axis=1)
    log_joint = log_likelihood + scipy.stats.norm.logpdf(z)
    integral = scipy.integrate.simpson
    reconstruction = -integral(q.pdf(z) * log_likelihood, x=z)
    kl = integral(q.pdf(z) * (q.logpdf(z) - scipy.stats.norm.logpdf(z)), x=z)
    for (mean, stderr), exact in zip(terms, (reconstruction, kl), strict=True):
        assert mean == pytest.approx(exact, abs=4 * stderr + 1e-3)
    top = log_joint.max()
    assert -reconstruction - kl < top + math.log(integral(np.exp(log_joint - top), x=z))


# ------------------------ Training ------------------------
def test_epoch_average_counts_the_last_batch_by_its_size():
    """Of a model whose negative ELBO is the mean pixel of the batch."""

    class MeanPixel(torch.nn.Module):
        def forward(self, input):
            return input.mean()

    data = torch.rand(5, 1, 28, 28).split(2)
    elbo = vae.epoch_iter(MeanPixel().eval(), data, optimizer=None)
    assert elbo == pytest.approx(-torch.cat(data).mean().item(), rel=1e-6)


# ------------------------ Figures ------------------------
def test_manifold_is_a_20_by_20_grid_even_in_the_priors_probability(monkeypatch):
    model, seen = vae.VAE(hidden_dim=20, z_dim=2), []
    model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    figures = []
    monkeypatch.setattr(vae, "save_figure", lambda figure, _: figures.append(figure))
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
    (picture,) = figures[0].axes[0].get_images()
    vae.plt.close(figures[0])
    with torch.no_grad():
        means = model.decoder(z.view(400, 2)).view(20, 20, 28, 28)
    tiles = np.asarray(picture.get_array()).reshape(20, 28, 20, 28).transpose(0, 2, 1, 3)
    np.testing.assert_allclose(tiles, means, rtol=1e-5)


# ------------------------ The script ------------------------
def negative_elbo(encoder, decoder, images):
    """The average negative ELBO by other means than the script's."""
    x = images.flatten(1)
    mean, log_std = encoder(x).chunk(2, dim=1)
    logits = decoder(mean + log_std.exp() * torch.randn_like(mean))
    reconstruction = F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(dim=1)
    kl = -0.5 * (1 + 2 * log_std - mean**2 - (2 * log_std).exp()).sum(dim=1)
    return (reconstruction + kl).mean()


def test_training_is_that_of_a_plain_loop(tmp_path):
    """Three epochs of two batches: AdamW with decay where the pixels are read, and a cosine."""
    VAE.run_well(*VAE.options(tmp_path, 3, "--seed", 5, "--lr", 0.003))

    train, val, _ = data = bmnist(batch_size=20)
    small(data)
    torch.manual_seed(5)
    encoder = nn.Sequential(nn.Linear(784, 500), nn.GELU(), nn.Linear(500, 40))
    decoder = nn.Sequential(nn.Linear(20, 500), nn.GELU(), nn.Linear(500, 784))
    weights = [*encoder.parameters(), *decoder.parameters()]
    start = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.AdamW(weights, weight_decay=0)
    for epoch in range(3):
        torch.manual_seed(5 * 3 + epoch + 1)
        optimizer.param_groups[0]["lr"] = lr = 0.003 * (1 + math.cos(math.pi * epoch / 3)) / 2
        elbos = {"train_elbo": [], "val_elbo": []}
        for images in train:
            loss = negative_elbo(encoder, decoder, images)
            optimizer.zero_grad()
            loss.backward()
            weights[0].data *= 1 - lr * 0.2
            optimizer.step()
            elbos["train_elbo"].append(-loss.item())
        for images in val:
            elbos["val_elbo"].append(-negative_elbo(encoder, decoder, images).item())
        row = Results(tmp_path).metrics[epoch]
        for name, values in elbos.items():
            assert float(row[name]) == pytest.approx(np.mean(values), rel=1e-4)
    assert way_off(start, weights, Results(tmp_path).weights.values()) < 1e-3


def test_test_elbo_is_that_of_the_final_weights_on_the_test_images(finished):
    data, model = bmnist(batch_size=20), vae.VAE()
    small(data)
    model.load_state_dict(finished(VAE).weights)
    elbos = []
    for loader in data[1:]:
        torch.manual_seed(0)
        elbos.append(vae.epoch_iter(model.eval(), loader, None))
    final = finished(VAE).summary["final"]["test_elbo"]
    assert final == pytest.approx(elbos[1], rel=1e-5)
    assert abs(final - elbos[0]) > 0.1


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
    monkeypatch.setattr(bmnist_module, "FILE", tmp_path / "mnist.npz")
    for name in names:
        images = torch.bernoulli(torch.full((40, 784), 0.2)).int().tolist()
        (tmp_path / name).write_text("\n".join(" ".join(map(str, row)) for row in images) + "\n")
    options = ("--binarization", "larochelle", "--zdim", 2)
    VAE.run_well(*VAE.options(tmp_path / "results", 1), *options)
    assert (tmp_path / "results" / "summary.json").is_file()


def test_dynamic_binarization_trains_as_well_as_static(tmp_path):
    """Its training images are grey in memory, and must not be taken for binary ones."""
    loaders, elbos = functools.partial(small, n_batches=10), []
    for binarization in ("static", "dynamic"):
        options = ("--binarization", binarization)
        VAE.run_well(*VAE.options(tmp_path / binarization, 2, *options), loaders=loaders)
        elbos.append(Results(tmp_path / binarization).summary["final"]["val_elbo"])
        assert -784 * math.log(2) < elbos[-1] < -50
    assert elbos[1] == pytest.approx(elbos[0], abs=15)


@pytest.mark.parametrize("name", ["vae", "vae_zdim2", "vae_dynamic"])
def test_committed_weights_have_the_committed_numbers(name):
    """On every fifth test image, to within 4 standard errors of a mean over so many."""
    options, final, weights = committed(name)
    model = vae.VAE(z_dim=options["zdim"])
    model.load_state_dict(weights)
    with torch.no_grad():
        mean, stderr = mean_and_stderr(-sum(model.losses(bmnist()[2].images[::5].float())))
    assert mean == pytest.approx(final["test_elbo"], abs=4 * stderr)
