"""The VAE: its loss against SciPy, its bounds against quadrature, its training and figures."""

import itertools
import math

import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch
from conftest import VAE, Results, small

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


def test_kl_sums_over_the_latent_dimensions_of_each_image():
    mean, std = torch.randn(5, 3), torch.rand(5, 3) + 0.1
    kl = vae.kl_divergence(mean, std)
    parts = [vae.kl_divergence(mean[:, [d]], std[:, [d]]) for d in range(3)]
    assert kl.shape == (5,)
    torch.testing.assert_close(kl, sum(parts))


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


def test_random_weights_give_784_ln_2_nats(images):
    with torch.no_grad():
        for _ in range(3):
            assert vae.VAE()(images).item() == pytest.approx(784 * math.log(2), abs=8)


def test_forward_is_the_batch_mean_of_the_two_terms(images):
    """Against SciPy, with the noise made dull by a tiny standard deviation."""
    model = vae.VAE(z_dim=2)
    layer = model.encoder.mean_and_log_std
    with torch.no_grad():
        layer.weight[2:] = 0
        layer.bias[2:] = -12
        loss = model(images[:50])
        mean, std = model.encoder(images[:50])
        p = model.decoder(mean).double()
    assert loss.shape == ()
    assert std.numpy() == pytest.approx(math.exp(-12))
    x = images[:50].flatten(1)
    reconstruction = scipy.stats.bernoulli.logpmf(x.numpy(), p.numpy()).sum(axis=1)
    kl = (0.5 * (mean.double() ** 2 + math.exp(-24) - 1) + 12).sum(dim=1)
    assert loss.item() == pytest.approx((kl - reconstruction).mean().item(), rel=1e-5)


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


def test_one_hidden_layer_of_500_on_each_side():
    shapes = [tuple(p.shape) for p in vae.Encoder().parameters() if p.dim() == 2]
    assert shapes == [(500, 784), (40, 500)] or shapes == [(500, 784), (20, 500), (20, 500)]
    shapes = [tuple(p.shape) for p in vae.Decoder().parameters() if p.dim() == 2]
    assert shapes == [(500, 20), (784, 500)]


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


def test_gradient_reaches_the_encoder_through_the_sample(images):
    """That of the reconstruction alone: the KL has a path of its own."""
    model = vae.VAE()
    reconstruction, _ = model.losses(images[:20])
    reconstruction.sum().backward()
    mean_and_std = model.encoder.mean_and_log_std.weight.grad
    assert (mean_and_std.abs().sum(dim=1) > 0).all()
    assert model.encoder.hidden.weight.grad.abs().sum() > 0


def test_gradient_through_the_sample_is_that_of_the_same_noise(images):
    """Finite differences with the noise held, on the biases of mean and log std."""
    model, x = vae.VAE(z_dim=2), images[:50]
    bias = model.encoder.mean_and_log_std.bias

    def loss():
        torch.manual_seed(3)
        return model(x)

    loss().backward()
    for d in range(4):
        step, ends = 0.05, []
        for sign in (1, -1):
            with torch.no_grad():
                bias[d] += sign * step
                ends.append(loss().item())
                bias[d] -= sign * step
        slope = (ends[0] - ends[1]) / (2 * step)
        assert bias.grad[d].item() == pytest.approx(slope, rel=0.01, abs=0.01)


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


def test_one_importance_sample_is_the_elbo(one_dimensional):
    model, x, _ = one_dimensional
    elbo, stderr_elbo = mean_and_stderr(-sum(model.losses(x.expand(20_000, -1))))
    one, stderr_one = mean_and_stderr(vae.importance_log_likelihood(model, x.expand(20_000, -1), 1))
    assert one == pytest.approx(elbo, abs=4 * math.hypot(stderr_elbo, stderr_one))


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


@pytest.mark.parametrize("rows", [1, 7, 100_000])
def test_importance_estimate_does_not_depend_on_its_blocks(one_dimensional, rows):
    model, x, exact = one_dimensional
    estimate = vae.importance_log_likelihood(model, x.expand(3, -1), 1001, rows=rows)
    assert estimate.shape == (3,)
    assert estimate.numpy() == pytest.approx(exact, abs=0.5)


def test_importance_estimate_tells_images_apart(images):
    """Each image gets its own estimate, whatever the block it is in."""
    model = vae.VAE(hidden_dim=20, z_dim=1).requires_grad_(False)
    batch = images[:50]
    batch[25:] *= 0  # the empty image, 784 ln 2 like any other at first
    model.decoder.output.bias -= 1  # then likelier
    log_px = vae.importance_log_likelihood(model, batch, 10)
    assert log_px[25:].min() > log_px[:25].max()
    data = Batches(batch.split(20))
    mean = vae.test_log_likelihood(model, data, 10)
    assert mean == pytest.approx(log_px.mean().item(), abs=0.5)


# ---------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------
class MeanPixel(torch.nn.Module):
    """A model whose negative ELBO is the mean pixel of the batch."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, input):
        return self.weight * input.mean()


@pytest.mark.parametrize("training", [True, False])
def test_epoch_average_counts_the_last_batch_by_its_size(training):
    data = torch.rand(5, 1, 28, 28).split(2)
    model = MeanPixel().train(training)
    elbo = vae.epoch_iter(model, data, torch.optim.SGD(model.parameters(), lr=0))
    assert elbo == pytest.approx(-torch.cat(data).mean().item(), rel=1e-6)


def test_test_losses_average_over_images(images):
    model = vae.VAE(hidden_dim=20)
    with torch.no_grad():  # no noise, so that the batches do not matter
        model.encoder.mean_and_log_std.weight.zero_()
        model.encoder.mean_and_log_std.bias[20:] = -12
    whole = [term.mean().item() for term in model.losses(images)]
    data = Batches([*images[:250].split(100), images[250:]])
    assert vae.test_losses(model, data) == pytest.approx(whole, rel=1e-4)


def test_training_changes_weights_and_evaluation_does_not(images):
    model, data = vae.VAE(hidden_dim=20), images.split(100)
    optimizer = torch.optim.Adam(model.parameters())
    before = [p.clone() for p in model.parameters()]
    vae.epoch_iter(model.eval(), data, optimizer)
    assert all(map(torch.equal, before, model.parameters()))
    vae.epoch_iter(model.train(), data, optimizer)
    assert not any(map(torch.equal, before, model.parameters()))


def test_run_epoch_trains_then_validates_what_it_has_trained():
    model = MeanPixel()
    traindata, valdata = torch.ones(6, 1, 28, 28).split(2), torch.ones(4, 1, 28, 28).split(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train_elbo, val_elbo = vae.run_epoch(model, (traindata, valdata), optimizer)
    assert train_elbo == pytest.approx(-(1 + 0.9 + 0.8) / 3)
    assert val_elbo == pytest.approx(-0.7)


def test_a_few_steps_on_real_images_raise_the_elbo_by_hundreds_of_nats(images):
    model = vae.VAE()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    curve = [vae.run_epoch(model, (images.split(30), images.split(100)), optimizer)[1]]
    curve += [vae.run_epoch(model, (images.split(30), images.split(100)), optimizer)[1]]
    assert -784 * math.log(2) + 200 < curve[0] < curve[1]


def test_draw_gives_the_same_latents_without_touching_the_generator(monkeypatch):
    monkeypatch.setattr(vae, "ARGS", vae.argparse.Namespace(seed=3), raising=False)
    model = vae.VAE()
    state = torch.get_rng_state()
    first = vae.draw(model)
    assert torch.equal(torch.get_rng_state(), state)
    torch.randn(5)
    assert torch.equal(vae.draw(model), first)


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


@pytest.mark.parametrize("n_epochs", [1, 2])
def test_elbo_plot_of_a_short_run_is_written(tmp_path, n_epochs):
    vae.save_elbo_plot([-200.0] * n_epochs, [-150.0] * n_epochs, tmp_path / "elbo.pdf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elbo.pdf", "elbo.png"]


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


def test_reconstructions_stand_beside_their_originals(figures, images):
    model = vae.VAE()
    vae.save_reconstructions(model, images[:25].flatten(1), "reconstructions.pdf")
    left, right = (axes.get_images()[0].get_array() for axes in figures.popitem()[1].axes)
    with torch.no_grad():
        means = model.decoder(model.encoder(images[:25])[0]).view(-1, 28, 28)
    for picture, tiles in ((left, images[:25, 0]), (right, means)):
        assert picture.shape == (5 * 29 + 1, 5 * 29 + 1)
        np.testing.assert_allclose(picture[1:29, 30:58], tiles[1], rtol=1e-5)
        np.testing.assert_allclose(picture[117:145, 117:145], tiles[24], rtol=1e-5)


# ---------------------------------------------------------------------------------------
# The script
# ---------------------------------------------------------------------------------------
def test_two_dimensional_latent_gets_its_two_figures(tmp_path):
    end = VAE.main(*VAE.options(tmp_path, 1), "--zdim", 2, figures=True)
    assert (end.status, end.err) == (0, "")
    names = {path.name for path in tmp_path.iterdir()}
    assert {"manifold.pdf", "manifold.png", "latent_space.pdf", "latent_space.png"} <= names


@pytest.mark.filterwarnings("error::UserWarning")
def test_larochelles_files_train_without_labels(tmp_path, monkeypatch):
    names = {f"binarized_mnist_{split}.amat": 40 for split in ("train", "valid", "test")}
    monkeypatch.setattr(bmnist_module, "LAROCHELLE", names)
    for name in names:
        images = torch.bernoulli(torch.full((40, 784), 0.2)).int().tolist()
        (tmp_path / name).write_text("\n".join(" ".join(map(str, row)) for row in images) + "\n")
    options = ("--binarization", "larochelle", "--data_dir", tmp_path, "--zdim", 2)
    end = VAE.main(*VAE.options(tmp_path / "results", 1), *options)
    assert (end.status, end.err) == (0, "")
    assert (tmp_path / "results" / "summary.json").is_file()


def test_dynamic_binarization_trains_as_well_as_static(tmp_path):
    """Its training images are grey in memory, and must not be taken for binary ones."""
    final = {}
    for binarization in ("static", "dynamic"):
        folder = tmp_path / binarization
        options = (*VAE.options(folder, 2), "--binarization", binarization)
        end = VAE.main(*options, loaders=lambda make: small(make, n_batches=10))
        assert (end.status, end.err) == (0, "")
        final[binarization] = Results(folder).summary["final"]["val_elbo"]
    assert final["dynamic"] == pytest.approx(final["static"], abs=15)


def test_summary_holds_the_bounds_in_their_order(tmp_path):
    end = VAE.main(
        *VAE.options(tmp_path, 2), "--iw_samples", 200, loaders=lambda make: small(make, 10)
    )
    assert (end.status, end.err) == (0, "")
    final = Results(tmp_path).summary["final"]
    assert -784 * math.log(2) < final["test_elbo"] < final["test_log_px"] < -50
