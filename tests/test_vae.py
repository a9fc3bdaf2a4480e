"""The VAE: its loss against SciPy, its bound against quadrature, its training and figures."""

import json
import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from conftest import ROOT, few, run, way_off

import a3_vae_template as vae
import runs
from datasets.bmnist import bmnist


# ------------------------ The loss ------------------------
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


def test_both_terms_are_those_of_quadrature_and_their_sum_bounds_log_p(one_dimensional):
    model, x, exact, log_px = one_dimensional
    for term, integral in zip(model.losses(x.expand(20_000, -1)), exact, strict=True):
        bound = 4 * scipy.stats.sem(term).item() + 1e-3
        assert term.mean().item() == pytest.approx(integral, abs=bound)
    assert -sum(exact) < log_px


# ------------------------ The model ------------------------
def test_samples_are_binary_draws_from_the_means_of_normal_latents():
    model, seen = vae.VAE(z_dim=2), []
    model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    torch.nn.init.constant_(model.decoder.output.bias, -1)  # means near 0.27
    samples, means = model.sample(2000)
    assert samples.shape == means.shape == (2000, 1, 28, 28)
    assert set(samples.unique().tolist()) == {0, 1}
    z_score = (samples - means).sum() / (means * (1 - means)).sum().sqrt()
    assert abs(z_score) < 5
    for column in torch.cat(seen).T:
        assert scipy.stats.kstest(column.numpy(), "norm").pvalue > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("folder", ["vae", "vae_dynamic", "vae_zdim2"])
def test_committed_weights_give_the_committed_test_elbo(folder):
    """So networks, data and loss are those that it was published for."""
    summary = json.loads((ROOT / "results" / folder / "summary.json").read_text())
    model = vae.VAE(z_dim=summary["options"]["zdim"]).eval()
    model.load_state_dict(torch.load(ROOT / "results" / folder / "weights.pt"))
    elbo = vae.epoch_iter(model, bmnist(batch_size=1000)[2], None)
    assert elbo == pytest.approx(summary["final"]["test_elbo"], abs=0.2)  # 0.03 of noise


# ------------------------ Training ------------------------
@pytest.mark.parametrize("binarization", ["static", "dynamic"])
def test_training_is_that_of_a_plain_loop(binarization, float64, monkeypatch, tmp_path):
    """Adam whose rate falls on a cosine, a decay of the first layer, the splits, the seed."""
    modes, epoch_iter = [], vae.epoch_iter

    def watch(model, *args):
        modes.append((model.training, torch.get_float32_matmul_precision()))
        return epoch_iter(model, *args)

    monkeypatch.setattr(vae, "epoch_iter", watch)
    monkeypatch.setattr(runs, "save_figure", lambda *args: None)
    options = {"epochs": 3, "seed": 5, "lr": 4e-3, "weight_decay": 0.3, "zdim": 1}
    out = run(vae, tmp_path, binarization=binarization, **options)
    assert modes == 3 * [(True, "medium"), (False, "medium")] + [(False, "highest")]

    torch.manual_seed(5)
    train, val, test = few(bmnist)(batch_size=20, binarization=binarization)
    model = vae.VAE(z_dim=1)
    start = [weight.clone() for weight in model.parameters()]
    adam, numbers = torch.optim.Adam(model.parameters()), []

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
        numbers.append((-sum(losses) / len(train.images), elbo(val)))

    history = torch.load(tmp_path / "checkpoint.pt")["history"]
    found = np.transpose([history["train_elbo"], history["val_elbo"]])
    np.testing.assert_allclose(found, numbers, rtol=1e-9)
    assert f"\ntest_elbo {elbo(test):.2f}\n" in out
    found = torch.load(tmp_path / "weights.pt").values()
    assert way_off(start, model.parameters(), found) < 1e-9


# ------------------------ Figures ------------------------
def test_manifold_is_a_20_by_20_grid_even_in_the_priors_probability(monkeypatch, tmp_path):
    model, seen, saved = vae.VAE(hidden_dim=20, z_dim=2), [], []
    monkeypatch.setattr(runs, "save_images", lambda *args, **layout: saved.append((args, layout)))
    model.decoder.register_forward_hook(lambda _, *in_and_out: seen.append(in_and_out))
    vae.save_manifold(model, tmp_path / "manifold.png")
    (((z,), means),) = seen
    (((images, path), layout),) = saved
    assert torch.equal(images, means)
    assert (path.name, layout) == ("manifold.png", {"nrow": 20, "padding": 0})
    shares = scipy.stats.norm.cdf(z.view(20, 20, 2))
    steps = (np.arange(20) + 0.5) / 20
    np.testing.assert_allclose(shares[..., 0], np.tile(steps, (20, 1)), rtol=1e-5)  # to the right
    np.testing.assert_allclose(shares[::-1, :, 1].T, np.tile(steps, (20, 1)), rtol=1e-5)  # upwards


def test_a_two_dimensional_latent_adds_the_manifold_to_the_figures(monkeypatch, tmp_path):
    monkeypatch.setattr(runs, "save_figure", lambda *args: None)
    for zdim in (2, 3):
        run(vae, tmp_path / str(zdim), epochs=1, zdim=zdim)
        assert (tmp_path / str(zdim) / "manifold.png").exists() == (zdim == 2)


def test_curves_are_shown_without_the_first_training_value(monkeypatch):
    """It is far off; of a single epoch both points are shown."""
    saved, train, val = [], [-130.0, -93.0, -95.0], [-99.0, -96.0, -97.0]
    monkeypatch.setattr(runs, "save_figure", lambda figure, path: saved.append(figure))
    for n, shown in ((1, train[:1] + val[:1]), (3, train[1:] + val)):
        vae.save_elbo_plot(train[:n], val[:n], "elbo.png")
        (axes,) = saved[-1].axes
        lines = {line.get_label(): line.get_data() for line in axes.get_lines()}
        for label, curve in (("training", train), ("validation", val)):
            np.testing.assert_array_equal(lines.pop(label), ([1, 2, 3][:n], curve[:n]))
        assert not lines
        low, high = axes.get_ylim()
        assert low < min(shown) < max(shown) < high
        assert (low < train[0]) == (n == 1)
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "ELBO (nats)")
        assert [text.get_text() for text in axes.get_legend().get_texts()] == [
            "training", "validation"]  # fmt: skip
