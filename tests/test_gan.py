"""The GAN: its value function, its two updates, its interpolation, the script."""

import math

import numpy as np
import pytest
import scipy.spatial.distance
import scipy.special
import torch
import torch.nn.functional as F
from conftest import GAN, Results, small, stop_in, way_off
from torch import nn

import a3_gan_template as gan
import runs
from datasets.mnist import mnist


# ------------------------ Loss ------------------------
def test_value_is_equation_1_of_the_paper():
    real, fake = torch.randn(9).double(), torch.randn(5).double()
    d_real, d_fake = (scipy.special.expit(logits.numpy()) for logits in (real, fake))
    exact = np.log(d_real).mean() + np.log(1 - d_fake).mean()
    assert gan.value_function(real, fake).item() == pytest.approx(exact, rel=1e-12)
    undecided = torch.zeros(7)  # D = 1/2
    assert gan.value_function(undecided, undecided).item() == pytest.approx(-math.log(4))
    exact = -np.log(d_fake).mean()
    assert gan.generator_loss(fake).item() == pytest.approx(exact, rel=1e-12)


def test_losses_and_gradients_are_exact_at_logits_of_50():
    """The gradient of a mistaken discriminator is as large as it can be."""
    real = torch.tensor([-50.0], requires_grad=True)
    fake = torch.tensor([50.0], requires_grad=True)
    value = gan.value_function(real, fake)
    value.backward()
    assert (value.item(), real.grad.item(), fake.grad.item()) == (-100, 1, -1)
    assert gan.generator_loss(real).item() == 50


# ------------------------ Networks ------------------------
def test_discriminator_gives_the_probability_of_its_logit():
    discriminator, images = gan.Discriminator().eval(), 2 * torch.rand(30, 784) - 1
    expected = scipy.special.expit(discriminator.logits(images).detach().numpy())
    np.testing.assert_allclose(discriminator(images).detach(), expected, rtol=1e-5)
    assert discriminator(images[:1]).shape == (1,)


# ------------------------ Interpolation ------------------------
@pytest.mark.parametrize("latent_dim", [2, 100])
def test_interpolation_goes_in_equal_angles_and_keeps_the_length(latent_dim):
    ends = 10 * F.normalize(torch.randn(2, latent_dim).double())
    steps = gan.interpolate(*ends)
    assert steps.shape == (9, latent_dim)  # 7 between the two
    torch.testing.assert_close(steps[[0, -1]], ends, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(steps.norm(dim=1), 10, rtol=1e-5)
    cosines = torch.cosine_similarity(steps[:-1], steps[1:])
    np.testing.assert_allclose(cosines, cosines[0], rtol=1e-5)


def test_two_digits_are_those_of_the_nearest_training_images():
    """If there is but one, it is both."""
    generator, (train, _, _) = gan.Generator().eval(), mnist(shift=False)
    with torch.no_grad():  # so that the images differ as much as digits do
        generator.layers[-2].weight *= 20
    small([train], n_batches=20)
    for _ in range(5):
        z, digits = gan.two_digits(generator, train)
        images = generator(z).detach().double() / 2 + 0.5
        nearest = scipy.spatial.distance.cdist(images, train.images.double() / 255).argmin(axis=1)
        assert train.labels[nearest].tolist() == digits
        assert digits[0] != digits[1]
    train.labels = torch.full_like(train.labels, 7)
    z, digits = gan.two_digits(generator, train)
    assert (z.shape, digits) == ((2, 100), [7, 7])


def test_training_plot_shows_v_and_both_outputs_and_the_equilibrium(finished, monkeypatch):
    """Without the first of 20 epochs."""
    run = finished(GAN)
    value, _, d_real, d_fake = ([float(row[name]) for row in run.metrics] for name in GAN.metrics)
    assert run.lines("training") == {
        "_child0 of $V(D, G)$ (nats)": value,
        "_child1 of $V(D, G)$ (nats)": [-math.log(4), -math.log(4)],
        r"$D(\mathbf{x})$ of mean output of $D$": d_real,
        r"$D(G(\mathbf{z}))$ of mean output of $D$": d_fake,
        "_child2 of mean output of $D$": [0.5, 0.5],
    }
    monkeypatch.setattr(runs, "save_figure", lambda figure, _: saved.append(figure))
    columns, saved = ("epoch", "value", "d_real", "d_fake"), []
    gan.save_training_plot(dict.fromkeys(columns, range(20)), "training.pdf")
    assert saved[0].axes[0].get_lines()[0].get_ydata()[0] == 1
    gan.plt.close(saved[0])


# ------------------------ The script ------------------------
def plain_networks():
    """The two networks of the template, of which the script's are to have the initial weights."""
    layers = [nn.Linear(50, 128), nn.LeakyReLU(0.2)]
    for n_in, n_out in ((128, 256), (256, 512), (512, 1024)):
        layers += [nn.Linear(n_in, n_out), nn.BatchNorm1d(n_out), nn.LeakyReLU(0.2)]
    generator = nn.Sequential(*layers, nn.Linear(1024, 784), nn.Tanh())
    discriminator = nn.Sequential(
        nn.Linear(784, 512), nn.LeakyReLU(0.2), nn.Dropout(0.3),
        nn.Linear(512, 256), nn.LeakyReLU(0.2), nn.Dropout(0.3), nn.Linear(256, 1),
    )  # fmt: skip
    return generator, discriminator


def kept(network):
    """Copies of the weights and running variances of a network, or of its state.

    Not the biases: what goes through batch normalization has no use for them, and noise moves them.
    """
    state = network if isinstance(network, dict) else network.state_dict()
    return [x.clone() for name, x in state.items() if name.endswith(("weight", "running_var"))]


@pytest.mark.parametrize("seed", [5])
def test_training_is_that_of_a_plain_loop(seed, float64, tmp_path):
    """Three epochs of two batches: the paper's two losses, dropout, the schedule, the average.

    The half batch behind these is left out.
    """
    lr = 0.001
    GAN.run_well(*GAN.options(tmp_path, 3, "--seed", seed, "--lr", lr, "--latent_dim", 50))

    data = mnist(batch_size=20, n_train=50_000, shift=False, drop_last=True)
    small(data)
    torch.manual_seed(seed)
    networks = generator, discriminator = plain_networks()
    start_g, start_d = kept(generator), kept(discriminator)
    average = start_g
    adam_g, adam_d = (torch.optim.Adam(x.parameters(), betas=(0.5, 0.999)) for x in networks)
    of_real, of_fake, numbers = torch.ones(20), torch.zeros(20), []
    for epoch in range(3):
        torch.manual_seed(seed * 3 + epoch + 1)
        metrics = []
        for step, (pixels, _) in enumerate(data[0], 2 * epoch):
            for adam in (adam_g, adam_d):
                adam.param_groups[0]["lr"] = lr * min(1, 2 - 2 * epoch / 3)
                adam.zero_grad()
            fake = generator(torch.randn(20, 50))
            logits = discriminator(torch.cat([pixels / 127.5 - 1, fake.detach()]))[:, 0]
            loss_d = F.binary_cross_entropy_with_logits(logits[:20], of_real)
            loss_d = loss_d + F.binary_cross_entropy_with_logits(logits[20:], of_fake)
            loss_d.backward()
            adam_d.step()
            loss_g = F.binary_cross_entropy_with_logits(discriminator(fake)[:, 0], of_real)
            loss_g.backward()
            adam_g.step()
            pairs = zip(average, kept(generator), strict=True)
            average = [x + (y - x) * 5 / (5 + step) for x, y in pairs]
            d = torch.sigmoid(logits.detach())
            metrics.append([-loss_d.item(), loss_g.item(), *d.view(2, 20).mean(1).tolist()])
        numbers += np.mean(metrics, axis=0).tolist()
    assert Results(tmp_path).numbers == pytest.approx(numbers, rel=1e-9)

    parts, found = Results(tmp_path).checkpoint["parts"], Results(tmp_path).weights
    assert way_off(start_g, kept(generator), kept(parts["generator"])) < 1e-9
    assert way_off(start_d, kept(discriminator), kept(parts["discriminator"])) < 1e-9
    assert way_off(start_g, average, kept(found)) < 1e-9


def test_a_resumed_run_goes_on_with_the_grids_and_no_run_removes_a_file(tmp_path):
    """The grids, every third batch of two an epoch, are like the sample figures."""
    progress, options = tmp_path / "progress", GAN.options(tmp_path, 3, "--save_interval", 3)
    progress.mkdir()
    (progress / "mine.png").write_text("mine")
    assert GAN.run(*options, loaders=stop_in(2)).status == 130
    assert sorted(path.name for path in progress.glob("*.png")) == ["000003.png", "mine.png"]
    GAN.run_well(*options, "--resume")
    names = ["000003.png", "000006.png", "mine.png"]
    assert sorted(path.name for path in progress.glob("*.png")) == names
    assert (progress / "mine.png").read_text() == "mine"
    grids = Results(tmp_path).pictures
    assert np.array_equal(grids("progress/000006"), grids("samples_after"))


def test_interpolation_goes_from_one_digit_of_the_summary_to_the_other(finished):
    """Each end's digit is that of its nearest training image."""
    (picture,) = finished(GAN).pictures("interpolation")
    tiles = torch.tensor(picture[1:29, 1:]).view(28, 9, 29)[..., :28]
    ends = tiles[:, [0, 8]].transpose(0, 1).flatten(1)
    train = mnist(n_train=50_000, shift=False)[0]
    nearest = torch.cdist(ends, train.images[:50].float() / 255).argmin(dim=1)
    final = finished(GAN).summary["final"]
    assert train.labels[nearest].tolist() == [final["digit_from"], final["digit_to"]]
