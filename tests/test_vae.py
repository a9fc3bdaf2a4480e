"""The VAE: its loss against SciPy, its bound against quadrature, its training and figures."""

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
import torch.nn.functional as F
from conftest import VAE, Results, small, way_off
from torch import nn

import a3_vae_template as vae
import runs
from datasets.bmnist import bmnist


# ------------------------ The two terms of the loss ------------------------
@pytest.mark.parametrize(("mean", "std"), [(0, 1), (0.1, 1), (-1.5, 0.3), (3, 2.5), (0, 0.01)])
def test_kl_is_the_integral_of_its_definition(mean, std):
    q, p = scipy.stats.norm(mean, std), scipy.stats.norm()
    ends = mean - 15 * std, mean + 15 * std
    exact, _ = scipy.integrate.quad(lambda z: q.pdf(z) * (q.logpdf(z) - p.logpdf(z)), *ends)
    kl = vae.kl_divergence(*torch.tensor([[mean], [std]], dtype=torch.float64))
    assert kl.item() == pytest.approx(exact, rel=1e-8, abs=1e-10)


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


# ------------------------ The bound ------------------------
def test_elbo_is_that_of_quadrature_and_a_lower_bound(one_dimensional):
    model, x, exact, log_px = one_dimensional
    for term, integral in zip(model.losses(x.expand(20_000, -1)), exact, strict=True):
        bound = 4 * scipy.stats.sem(term).item() + 1e-3
        assert term.mean().item() == pytest.approx(integral, abs=bound)
    assert -sum(exact) < log_px


# ------------------------ Figures ------------------------
def test_manifold_is_a_20_by_20_grid_even_in_the_priors_probability(monkeypatch):
    model, seen, saved = vae.VAE(hidden_dim=20, z_dim=2), [], []
    monkeypatch.setattr(runs, "save_figure", lambda figure, _: saved.append(figure))
    model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    vae.save_manifold(model, "manifold.pdf")
    z = torch.cat(seen).view(20, 20, 2)
    quantiles = scipy.stats.norm.ppf((np.arange(20) + 0.5) / 20)
    z_1, z_2 = np.meshgrid(quantiles, quantiles)
    np.testing.assert_allclose(z[..., 0], z_1, rtol=1e-5)  # to the right
    np.testing.assert_allclose(z[..., 1].flip(0), z_2, rtol=1e-5)  # upwards
    (axes,) = saved[0].axes
    (picture,) = axes.get_images()
    assert (picture.get_cmap().name, picture.get_clim()) == ("gray_r", (0, 1))
    with torch.no_grad():
        means = model.decoder(z.view(400, 2)).view(20, 20, 28, 28)
    tiles = np.asarray(picture.get_array()).reshape(20, 28, 20, 28).transpose(0, 2, 1, 3)
    np.testing.assert_allclose(tiles, means, rtol=1e-5)
    # The axes' numbers stand in the middle of the images that they are of.
    for axis, values in ((axes.xaxis, z[0, :, 0]), (axes.yaxis, z[:, 0, 1])):
        for place, text in zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True):
            assert text.get_text() == f"${values[int(place) // 28]:.2f}$"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("$z_1$", "$z_2$")
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # as pictures are shown: rows downwards


# ------------------------ The script ------------------------
def negative_elbo(encoder, decoder, images):
    """The average negative ELBO by other means than the script's."""
    x = images.flatten(1)
    mean, log_std = encoder(x).chunk(2, dim=1)
    logits = decoder(mean + log_std.exp() * torch.randn_like(mean))
    reconstruction = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
    kl = -0.5 * (1 + 2 * log_std - mean**2 - (2 * log_std).exp()).sum()
    return (reconstruction + kl) / len(x)


@pytest.mark.parametrize("seed", [5])
def test_training_is_that_of_a_plain_loop(seed, float64, tmp_path):
    """Three epochs of two and a half batches: AdamW with decay on the pixels' layer, a cosine."""
    VAE.run_well(*VAE.options(tmp_path, 3, "--seed", seed, "--lr", 0.003))

    train, val, test = data = bmnist(batch_size=20)
    small(data)
    torch.manual_seed(seed)
    encoder = nn.Sequential(nn.Linear(784, 500), nn.GELU(), nn.Linear(500, 40))
    decoder = nn.Sequential(nn.Linear(20, 500), nn.GELU(), nn.Linear(500, 784))
    weights = [*encoder.parameters(), *decoder.parameters()]
    start = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.AdamW(weights, weight_decay=0)
    numbers = []

    def elbo(loader):
        sums = [negative_elbo(encoder, decoder, images).item() * len(images) for images in loader]
        return -sum(sums) / len(loader.images)

    for epoch in range(3):
        torch.manual_seed(seed * 3 + epoch + 1)
        optimizer.param_groups[0]["lr"] = lr = 0.003 * (1 + math.cos(math.pi * epoch / 3)) / 2
        train_elbo = 0
        for images in train:
            loss = negative_elbo(encoder, decoder, images)
            optimizer.zero_grad()
            loss.backward()
            weights[0].data *= 1 - lr * 0.2
            optimizer.step()
            train_elbo -= loss.item() * len(images) / len(train.images)
        numbers += [train_elbo, elbo(val)]
    torch.manual_seed(seed)
    assert Results(tmp_path).numbers == pytest.approx([*numbers, elbo(test)], rel=1e-9)
    assert way_off(start, weights, Results(tmp_path).weights.values()) < 1e-9


def test_dynamic_training_images_are_grey(tmp_path):
    def loaders(made):
        assert made[0].images.max() == 255
        small(made)

    VAE.run_well(*VAE.options(tmp_path, 1, "--binarization", "dynamic"), loaders=loaders)
