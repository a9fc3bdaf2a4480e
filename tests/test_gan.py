"""The GAN: its value function, its two updates, the measures of its samples, the script."""

import functools
import math

import numpy as np
import pytest
import scipy.spatial.distance
import scipy.special
import scipy.stats
import torch
import torch.nn.functional as F
from conftest import GAN, Results, committed, small, stop_in, way_off
from torch import nn

import a3_gan_template as gan
from datasets.mnist import mnist

ETA = 4  # of the polynomial-decay averaging of the generator's weights


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def loaders():
    """Loaders of 600 real images each, for the measures."""
    loaders = mnist(batch_size=100, n_train=50_000, shift=False)
    for loader in loaders:
        loader.limit(6)
    return loaders


# ---------------------------------------------------------------------------------------
# Loss
# ---------------------------------------------------------------------------------------
def test_value_is_equation_1_of_the_paper():
    real, fake = torch.randn(9).double(), torch.randn(5).double()
    d_real, d_fake = (scipy.special.expit(logits.numpy()) for logits in (real, fake))
    exact = np.log(d_real).mean() + np.log(1 - d_fake).mean()
    assert gan.value_function(real, fake).item() == pytest.approx(exact, rel=1e-12)
    undecided = torch.zeros(7)  # D = 1/2
    assert gan.value_function(undecided, undecided).item() == pytest.approx(-math.log(4))
    exact = -np.log(d_fake).mean()
    assert gan.generator_loss(fake).item() == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("sign", [1, -1])
def test_losses_and_gradients_are_finite_at_logits_of_50(sign):
    real = torch.full((3,), 50.0 * sign, requires_grad=True)
    fake = torch.full((3,), -50.0 * sign, requires_grad=True)
    value = gan.value_function(real, fake)
    value.backward()
    assert value.item() == pytest.approx(0 if sign > 0 else -100, abs=1e-6)
    # The gradient of a mistaken discriminator is as large as it can be: 1 a batch.
    assert real.grad.sum().item() == pytest.approx(0 if sign > 0 else 1, abs=1e-6)
    assert fake.grad.sum().item() == pytest.approx(0 if sign > 0 else -1, abs=1e-6)
    loss = gan.generator_loss(fake)
    assert loss.item() == pytest.approx(50 if sign > 0 else 0, abs=1e-6)


def test_generator_gradient_does_not_vanish_where_the_saturating_one_does():
    """Where the discriminator sees through the generator: D(G(z)) = sigmoid(-30)."""
    fake = torch.full((4,), -30.0, requires_grad=True)
    gan.value_function(torch.zeros(4), fake).backward()  # its part log(1 - D(G(z))) saturates
    assert fake.grad.abs().sum() < 1e-12
    fake.grad = None
    gan.generator_loss(fake).backward()
    assert fake.grad.sum().item() == pytest.approx(-1)  # descent raises the logit


# ---------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------
def test_discriminator_gives_the_probability_of_its_logit():
    discriminator = gan.Discriminator().eval()
    images = 2 * torch.rand(30, 784) - 1
    d, logits = discriminator(images), discriminator.logits(images)
    assert d.shape == logits.shape == (30,)
    np.testing.assert_allclose(d.detach(), scipy.special.expit(logits.detach().numpy()), rtol=1e-5)
    assert discriminator(images[:1]).shape == (1,)


# ---------------------------------------------------------------------------------------
# Interpolation
# ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("latent_dim", [2, 100])
def test_interpolation_ends_at_the_images_of_its_two_latents(latent_dim):
    generator = gan.Generator(latent_dim).eval()
    ends = torch.randn(2, latent_dim)
    steps = gan.interpolate(*ends)
    assert steps.shape == (9, latent_dim)  # 7 between the two
    torch.testing.assert_close(generator(steps)[[0, -1]], generator(ends), rtol=1e-4, atol=1e-5)


def test_interpolation_goes_in_equal_angles_and_keeps_the_length():
    z_from, z_to = torch.randn(100), torch.randn(100)
    z_to *= z_from.norm() / z_to.norm()
    steps = gan.interpolate(z_from, z_to).double()
    np.testing.assert_allclose(steps.norm(dim=1), z_from.norm(), rtol=1e-5)
    cosines = torch.cosine_similarity(steps[:-1], steps[1:])
    np.testing.assert_allclose(cosines, cosines[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("z_from", "z_to"), [([1.0, 2.0], [2.0, 4.0]), ([1.0, 2.0], [-1.0, -2.0]), ([3.0], [-1.0])]
)
def test_interpolation_of_parallel_latents_is_the_straight_line(z_from, z_to):
    steps = gan.interpolate(torch.tensor(z_from), torch.tensor(z_to))
    np.testing.assert_allclose(steps, np.linspace(z_from, z_to, 9), atol=1e-6)


NEIGHBOURS = [[1, 1, 2], [3, 3, 3], [3, 3, 3], [5, 5, 4], [7, 7, 7], [2, 2, 2]]


def test_two_classes_are_the_first_two_sure_images_of_different_digits():
    assert gan.two_classes(torch.tensor(NEIGHBOURS)) == [1, 4]


# ---------------------------------------------------------------------------------------
# Measures
# ---------------------------------------------------------------------------------------
def test_nearest_neighbours_are_those_of_brute_force(loaders):
    """More rows than a block has."""
    images = torch.cat([loaders[1].images, loaders[2].images[:7]]).float() / 255
    train, labels = loaders[0].images.float() / 255, loaders[0].labels
    distance, digits = gan.nearest_neighbours(images, train, labels, k=3)
    exact = scipy.spatial.distance.cdist(images.double(), train.double())
    np.testing.assert_allclose(distance, exact.min(axis=1), rtol=1e-4)
    np.testing.assert_array_equal(digits, labels.numpy()[exact.argsort(axis=1)[:, :3]])
    itself, _ = gan.nearest_neighbours(train[:5], train, labels, k=1)
    assert itself.numpy() == pytest.approx(0, abs=0.02)  # float32 leaves that much


def test_parzen_is_a_mixture_of_scipys_normals_in_many_dimensions(loaders):
    """More rows than a block has, and several bandwidths."""
    centres, x = loaders[0].images[:30].float() / 255, loaders[2].images[:501].float() / 255
    sigmas = [0.1, 0.3]
    log_p = gan.parzen_log_likelihoods(x, centres, sigmas)
    assert log_p.shape == (2, 501)
    for row in (0, 499, 500):
        for i, sigma in enumerate(sigmas):
            parts = scipy.stats.norm.logpdf(x[row].double(), centres.double(), sigma).sum(axis=1)
            exact = scipy.special.logsumexp(parts) - math.log(30)
            assert log_p[i, row].item() == pytest.approx(exact, rel=1e-3, abs=0.1)


def test_parzen_estimate_chooses_the_bandwidth_on_the_validation_images_alone():
    """Validation images near their centres, test images far from them."""
    centres = torch.rand(50, 20)
    val = centres + 0.15 * torch.randn(50, 20)
    test = torch.rand(30, 20) + 0.3 * torch.randn(30, 20)
    mean, stderr, sigma = gan.parzen_estimate(centres, val, test)

    def exact(images, sigma):
        parts = scipy.stats.norm.logpdf(images[:, None].double(), centres[None].double(), sigma)
        return scipy.special.logsumexp(parts.sum(axis=2), axis=1) - math.log(50)

    log_px = exact(test, sigma)
    assert mean == pytest.approx(log_px.mean(), rel=1e-3)
    assert stderr == pytest.approx(scipy.stats.sem(log_px), rel=1e-3)
    here = exact(val, sigma).mean()
    assert all(exact(val, sigma + step).mean() < here + 1e-4 for step in (-0.01, 0.01, 0.1))
    assert exact(test, sigma + 0.05).mean() > mean  # the test images would choose another


class Copier(torch.nn.Module):
    """A generator that gives the training images back, one after the other."""

    def __init__(self, pixels):
        super().__init__()
        self.images = pixels.float() / 127.5 - 1
        self.latent_dim, self.at = 3, 0
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, z):
        self.at += len(z)
        return self.images[self.at - len(z) : self.at]


def test_copies_of_the_training_images_are_judged_as_such(loaders):
    train_set = loaders[0]
    final, latents, digits = gan.judge(Copier(train_set.images), *loaders, 200)
    assert final["nearest_sample"] == pytest.approx(0, abs=0.02)
    assert final["nearest_test"] > 3
    assert final["parzen"] == pytest.approx(final["parzen_train"], rel=1e-3)
    assert final["parzen_stderr"] == pytest.approx(final["parzen_train_stderr"], rel=1e-3)
    pixels = train_set.images.double().numpy()
    nearest = scipy.spatial.distance.cdist(pixels[:200], pixels).argsort(axis=1)[:, :10]
    digits_of_all = scipy.stats.mode(train_set.labels.numpy()[nearest], axis=1).mode
    shares = np.array(final["digit_shares"])
    np.testing.assert_allclose(shares, np.bincount(digits_of_all, minlength=10) / 200, atol=1e-6)
    assert shares.sum() == pytest.approx(1)
    assert final["digit_entropy"] == pytest.approx(scipy.stats.entropy(shares), rel=1e-5)
    assert final["digits_present"] == 10
    assert latents.shape == (2, 3)
    assert digits[0] != digits[1]


def test_one_image_alone_is_judged_as_a_collapse(loaders):
    ones = loaders[0].images[loaders[0].labels == 1][:1].expand(50, -1)
    final, _, _ = gan.judge(Copier(ones), *loaders, len(ones))
    assert final["digits_present"] == 1
    assert final["digit_shares"] == [0, 1, 0, 0, 0, 0, 0, 0, 0, 0]
    assert final["digit_entropy"] == 0


# ---------------------------------------------------------------------------------------
# The script
# ---------------------------------------------------------------------------------------
def plain_networks():
    """The two networks of the template, of which the script's are to have the initial weights."""
    layers = [nn.Linear(100, 128), nn.LeakyReLU(0.2)]
    for n_in, n_out in ((128, 256), (256, 512), (512, 1024)):
        layers += [nn.Linear(n_in, n_out), nn.BatchNorm1d(n_out), nn.LeakyReLU(0.2)]
    generator = nn.Sequential(*layers, nn.Linear(1024, 784), nn.Tanh())
    discriminator = nn.Sequential(
        nn.Linear(784, 512), nn.LeakyReLU(0.2), nn.Dropout(0.3),
        nn.Linear(512, 256), nn.LeakyReLU(0.2), nn.Dropout(0.3), nn.Linear(256, 1),
    )  # fmt: skip
    return generator, discriminator


def kept(state, end="weight"):
    """Copies of the weights, or the running variances, of a network's state.

    Not the biases: what goes through batch normalisation has no use for them, and noise moves them.
    """
    return [tensor.clone() for name, tensor in state.items() if name.endswith(end)]


@pytest.mark.parametrize(("precision", "off"), [("float32", 1e-3), ("bfloat16", 0.15)])
def test_training_is_that_of_a_plain_loop(precision, off, tmp_path):
    """Two epochs of three batches: the paper's two losses, dropout, the schedule, the average.

    In bfloat16 the last bits of a sum decide about the rounding, and grow from step to step.
    """
    lr, loaders = 0.001, functools.partial(small, n_batches=3)
    options = ("--precision", precision, "--lr", lr)
    GAN.run_well(*GAN.options(tmp_path, 2, *options), loaders=loaders)

    data = mnist(batch_size=20, n_train=50_000, shift=False, drop_last=True)
    loaders(data)
    torch.manual_seed(0)
    generator, discriminator = plain_networks()
    start_g, start_d = kept(generator.state_dict()), kept(discriminator.state_dict())
    adam_g, adam_d = (
        torch.optim.Adam(network.parameters(), betas=(0.5, 0.999))
        for network in (generator, discriminator)
    )
    of_real, of_fake = torch.ones(20), torch.zeros(20)
    averages, variances = [], []
    for epoch in range(2):
        metrics = {name: [] for name in GAN.metrics}
        for step, (pixels, _) in enumerate(data[0], 3 * epoch):
            for adam in (adam_g, adam_d):
                adam.param_groups[0]["lr"] = lr * min(1, 2 - step / 3)
                adam.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, precision == "bfloat16"):
                fake = generator(torch.randn(20, 100)).float()
                images = torch.cat([pixels / 127.5 - 1, fake.detach()])
                logits = discriminator(images).float()[:, 0]
            loss_d = F.binary_cross_entropy_with_logits(logits[:20], of_real)
            loss_d = loss_d + F.binary_cross_entropy_with_logits(logits[20:], of_fake)
            loss_d.backward()
            adam_d.step()
            with torch.autocast("cpu", torch.bfloat16, precision == "bfloat16"):
                deceived = discriminator(fake).float()[:, 0]
            loss_g = F.binary_cross_entropy_with_logits(deceived, of_real)
            loss_g.backward()
            adam_g.step()
            for history, end in ((averages, "weight"), (variances, "running_var")):
                now = kept(generator.state_dict(), end)
                last = history[-1] if history else now
                share = (ETA + 1) / (ETA + 1 + step)
                history.append([x + share * (y - x) for x, y in zip(last, now, strict=True)])
            d = torch.sigmoid(logits.detach())
            numbers = (-loss_d.item(), loss_d.item(), loss_g.item(), *d.view(2, 20).mean(1))
            for name, value in zip(GAN.metrics, numbers, strict=True):
                metrics[name].append(float(value))
        row = Results(tmp_path).metrics[epoch]
        for name, values in metrics.items():
            assert float(row[name]) == pytest.approx(np.mean(values), rel=1e-2), name

    parts, average = Results(tmp_path).checkpoint["parts"], Results(tmp_path).weights
    assert way_off(start_g, kept(generator.state_dict()), kept(parts["generator"])) < off
    assert way_off(start_d, kept(discriminator.state_dict()), kept(parts["discriminator"])) < off
    assert way_off(start_g, averages[-1], kept(average)) < off
    assert way_off(variances[0], variances[-1], kept(average, "running_var")) < off


def tile(picture, i, n_columns=5, padding=1):
    """The image `i` of a grid."""
    row, column = (n * (28 + padding) + padding for n in divmod(i, n_columns))
    return picture[row : row + 28, column : column + 28]


def test_samples_and_grids_show_the_averaged_generators_images_of_the_same_latents(tmp_path):
    """The samples black on white by their colour map, the grids in progress/ as they are."""
    GAN.run_well(*GAN.options(tmp_path, 4), "--save_interval", 2)
    run, (generator, _) = Results(tmp_path), plain_networks()
    generator.load_state_dict(dict(zip(generator.state_dict(), run.weights.values(), strict=True)))
    z = torch.randn(25, 100, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        images = (generator.eval()(z).view(25, 28, 28) + 1) / 2
    before, halfway, after = (
        run.pictures(f"samples_{name}")[0] for name in ("before", "halfway", "after")
    )
    assert before.shape == (5 * 29 + 1, 5 * 29 + 1)
    for i in (0, 1, 24):
        np.testing.assert_allclose(tile(after, i), images[i], atol=1e-5)
    grids = {
        path.name: gan.plt.imread(path)[..., 0]
        for path in sorted((tmp_path / "progress").iterdir())
    }
    assert list(grids) == ["000002.png", "000004.png", "000006.png", "000008.png"]
    for name, samples in (("000004.png", halfway), ("000008.png", after)):
        for i in (0, 1, 24):
            grey = 1 - tile(grids[name], i, padding=2)
            np.testing.assert_allclose(grey, tile(samples, i), atol=0.003)
    assert abs(before - halfway).max() > 0.01
    assert abs(halfway - after).max() > 1e-4


def test_a_resumed_run_goes_on_with_the_grids_and_a_fresh_one_removes_them(tmp_path):
    """5 epochs of 2 iterations, the break before the sixth."""

    def grids():
        return sorted(path.name for path in (tmp_path / "progress").iterdir())

    options = (*GAN.options(tmp_path, 5), "--save_interval", 3)
    assert GAN.run(*options, loaders=stop_in(3, batch=2)).status == 130
    assert grids() == ["000003.png"]
    GAN.run_well(*options, "--resume")
    assert grids() == ["000003.png", "000006.png", "000009.png"]
    GAN.run_well(*GAN.options(tmp_path, 1), "--save_interval", 2)
    assert grids() == ["000002.png"]


def test_a_last_batch_of_one_image_is_left_out_and_a_latent_may_be_small(tmp_path):
    """Batch normalisation cannot train on one image."""

    def loaders(made):
        for loader in made:
            loader.images, loader.labels = loader.images[:41], loader.labels[:41]

    GAN.run_well(*GAN.options(tmp_path, 2, "--latent_dim", 1), loaders=loaders)
    assert len(Results(tmp_path).metrics) == 2


def test_training_plot_has_the_two_reference_lines(monkeypatch):
    saved = []
    monkeypatch.setattr(gan, "save_figure", lambda figure, name: saved.append(figure))
    history = {"epoch": [1, 2, 3], "value": [-1, -2, -3], "d_real": [0.7] * 3,
               "d_fake": [0.2, 0.4, 0.6]}  # fmt: skip
    gan.save_training_plot(history, "training.pdf")
    left, right = saved[0].axes
    curves = [[list(line.get_ydata()) for line in axes.get_lines()] for axes in (left, right)]
    gan.plt.close(saved[0])
    assert curves[0] == [[-1, -2, -3], [-math.log(4)] * 2]
    assert curves[1] == [[0.7] * 3, [0.2, 0.4, 0.6], [0.5] * 2]


def test_interpolation_goes_from_one_digit_of_the_summary_to_the_other(finished):
    """Each end's digit is the most frequent one of its ten nearest training images."""
    (picture,) = finished(GAN).pictures("interpolation")
    assert picture.shape == (30, 9 * 29 + 1)
    ends = torch.tensor(np.stack([tile(picture, i, n_columns=9) for i in (0, 8)])).flatten(1)
    train = mnist(n_train=50_000, shift=False)[0]
    nearest = torch.cdist(ends, train.images[:40].float() / 255).argsort(dim=1)[:, :10]
    final = finished(GAN).summary["final"]
    digits = train.labels[nearest].mode(dim=1).values.tolist()
    assert digits == [final["digit_from"], final["digit_to"]]


def test_committed_weights_have_the_committed_numbers():
    """The Parzen estimate on every twentieth test image, of as many samples as in the run.

    To within 4 standard errors of a mean over so many, with that of the committed estimate.
    """
    options, final, weights = committed("gan")
    generator = gan.Generator(options["latent_dim"])
    generator.load_state_dict(weights)
    z = torch.randn(final["eval_samples"], options["latent_dim"])
    samples = gan.sample_images(generator.eval(), z)
    images = mnist()[2].images[::20].float() / 255
    (log_px,) = gan.parzen_log_likelihoods(images, samples, [final["parzen_sigma"]])
    stderr = math.hypot(log_px.std().item() / len(images) ** 0.5, final["parzen_stderr"])
    assert log_px.mean().item() == pytest.approx(final["parzen"], abs=4 * stderr)
