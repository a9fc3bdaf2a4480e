"""The VAE: its loss against SciPy, its bound against quadrature, its training and figures."""

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch
from conftest import ROOT, few, read, run
from matplotlib.image import imread

import a3_vae_template as vae
from datasets.bmnist import bmnist


# ------------------------ The loss ------------------------
@pytest.mark.parametrize(("mean", "std"), [(0, 1), (0.1, 1), (-1.5, 0.3), (3, 2.5), (0, 0.01)])
def test_kl_is_the_integral_of_its_definition(mean, std):
    q, p = scipy.stats.norm(mean, std), scipy.stats.norm()
    ends = mean - 15 * std, mean + 15 * std
    exact, _ = scipy.integrate.quad(lambda z: q.pdf(z) * (q.logpdf(z) - p.logpdf(z)), *ends)
    kl = vae.kl_divergence(*torch.tensor([[mean], [std]], dtype=torch.float64))
    assert kl.item() == pytest.approx(exact, rel=1e-8, abs=1e-10)


def test_likelihood_and_its_gradient_are_exact_at_extreme_logits():
    logits = torch.tensor([[1e4], [-1e4], [1e4], [-1e4]], requires_grad=True)
    log_p = vae.bernoulli_log_likelihood(logits, torch.tensor([[1.0], [1], [0], [0]]))
    log_p.sum().backward()
    assert log_p.tolist() == [0, -1e4, -1e4, 0]
    assert logits.grad.flatten().tolist() == [0, 1, -1, 0]


@torch.no_grad()
def test_losses_are_those_of_quadrature_over_the_latent():
    model, x = vae.VAE(hidden_dim=20, z_dim=1), bmnist()[2].images[5000].float()
    mean, std = model.encoder(x[None])
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)  # for integrals over N(0, 1)
    z = mean + std * torch.from_numpy(nodes).float()[:, None]
    log_px = scipy.special.log_expit((2 * x - 1).numpy() * model.decoder.logits(z).numpy()).sum(1)
    log_ratio = scipy.stats.norm.logpdf(z, mean, std) - scipy.stats.norm.logpdf(z)
    exact = -weights @ log_px / weights.sum(), weights @ log_ratio[:, 0] / weights.sum()
    for term, integral in zip(model.losses(x.expand(20_000, -1)), exact, strict=True):
        bound = 4 * scipy.stats.sem(term).item() + 1e-3
        assert term.mean().item() == pytest.approx(integral, abs=bound)


def test_gradients_pass_through_the_drawn_latents(float64):
    """Those by the means and deviations are the quotients of small steps, with the same noise."""
    model, x = vae.VAE(hidden_dim=20, z_dim=2), bmnist()[2].images[::2000].double()

    def losses(mean, std):
        torch.manual_seed(0)
        model.encoder.forward = lambda x: (mean, std)
        return model.losses(x)

    assert torch.autograd.gradcheck(losses, torch.rand(2, 5, 2, requires_grad=True).unbind())


# ------------------------ The model ------------------------
@torch.no_grad()
def test_samples_are_binary_draws_from_the_means_of_normal_latents():
    model = vae.VAE(z_dim=2)
    torch.nn.init.constant_(model.decoder.output.bias, -1)  # means near 0.27
    torch.manual_seed(0)
    samples, means = model.sample(2000)
    torch.manual_seed(0)
    assert torch.equal(means, model.decoder(torch.randn(2000, 2)).view(-1, 1, 28, 28))
    assert samples.shape == means.shape
    assert set(samples.unique().tolist()) == {0, 1}
    z_score = (samples - means).sum() / (means * (1 - means)).sum().sqrt()
    assert abs(z_score) < 5


@torch.no_grad()
@pytest.mark.parametrize("folder", ["vae", "vae_dynamic", "vae_zdim2"])
def test_committed_weights_give_the_committed_test_elbo(folder):
    """Networks, data and loss have not changed since it was measured."""
    _, summary = read(ROOT / "results" / folder)
    model = vae.VAE(z_dim=summary["options"]["zdim"]).eval()
    model.load_state_dict(torch.load(ROOT / "results" / folder / "weights.pt"))
    elbo = vae.epoch_iter(model, bmnist(batch_size=1000)[2], None)
    assert elbo == pytest.approx(summary["final"]["test_elbo"], abs=0.2)  # 0.03 of noise


# ------------------------ Training ------------------------
@pytest.mark.parametrize("binarization", ["static", "dynamic"])
def test_training_is_that_of_a_plain_loop(binarization, float64, tmp_path):
    """Adam whose rate falls on a cosine, a decay of the first layer, the splits, the seed."""
    options = {"epochs": 3, "seed": 5, "lr": 4e-3, "weight_decay": 0.3, "zdim": 1}
    run(vae, tmp_path, binarization=binarization, **options)

    torch.manual_seed(5)
    train, val, test = few(bmnist)(batch_size=20, binarization=binarization)
    model, train_curve, val_curve = vae.VAE(z_dim=1), [], []
    adam = torch.optim.Adam(model.parameters())

    def elbo(loader):
        sums = [model(images).item() * len(images) for images in loader]
        return -sum(sums) / len(loader.images)

    for epoch in range(3):
        adam.param_groups[0]["lr"] = lr = 4e-3 * (1 + math.cos(math.pi * epoch / 3)) / 2
        losses = []
        for images in train:
            loss = model(images)
            adam.zero_grad()
            loss.backward()
            model.encoder.hidden.weight.data *= 1 - lr * 0.3
            adam.step()
            losses.append(loss.item() * len(images))
        train_curve.append(-sum(losses) / len(train.images))
        val_curve.append(elbo(val))

    history = torch.load(tmp_path / "checkpoint.pt")["history"]
    assert history["train_elbo"] == pytest.approx(train_curve, rel=1e-9)
    assert history["val_elbo"] == pytest.approx(val_curve, rel=1e-9)
    final = read(tmp_path)[1]["final"]
    assert final["test_elbo"] == pytest.approx(elbo(test), rel=1e-9)
    torch.testing.assert_close(torch.load(tmp_path / "weights.pt"), dict(model.state_dict()))


# ------------------------ Figures ------------------------
def test_manifold_is_a_20_by_20_grid_even_in_the_priors_probability(tmp_path):
    """The first latent grows to the right, the second one upwards."""
    run(vae, tmp_path, epochs=1, zdim=2)
    model = vae.VAE(z_dim=2).requires_grad_(False)
    model.load_state_dict(torch.load(tmp_path / "weights.pt"))
    quantiles = scipy.stats.norm.ppf((np.arange(20) + 0.5) / 20).tolist()
    z = torch.tensor([(right, up) for up in reversed(quantiles) for right in quantiles])
    grid = model.decoder(z).view(20, 20, 28, 28).transpose(1, 2).reshape(560, 560)
    ink = 1 - imread(tmp_path / "manifold.png")[::4, ::4, 0]  # a pixel takes 4 x 4 dots
    np.testing.assert_allclose(ink, grid, atol=0.51 / 255)
