"""The GAN: its value function, its two updates and the average, its interpolation and figures."""

import json
import math

import numpy as np
import pytest
import scipy.spatial.distance
import scipy.special
import torch
import torch.nn.functional as F
from conftest import ROOT, few, run, way_off
from torch import nn

import a3_gan_template as gan
import runs
from datasets.mnist import mnist


# ------------------------ The losses ------------------------
def test_losses_are_those_of_the_paper():
    real, fake = torch.randn(9).double(), torch.randn(5).double()
    d_real, d_fake = (scipy.special.expit(logits.numpy()) for logits in (real, fake))
    value = np.log(d_real).mean() + np.log(1 - d_fake).mean()
    assert gan.value_function(real, fake).item() == pytest.approx(value, rel=1e-12)
    loss = -np.log(d_fake).mean()
    assert gan.generator_loss(fake).item() == pytest.approx(loss, rel=1e-12)


def test_losses_and_gradients_are_exact_at_logits_of_50():
    """The gradient of a mistaken discriminator is as large as it can be."""
    real = torch.tensor([-50.0], requires_grad=True)
    fake = torch.tensor([50.0], requires_grad=True)
    value = gan.value_function(real, fake)
    value.backward()
    assert (value.item(), real.grad.item(), fake.grad.item()) == (-100, 1, -1)
    assert gan.generator_loss(real).item() == 50


# ------------------------ The networks ------------------------
def test_networks_are_the_templates_with_dropout_in_the_discriminator():
    layers = [nn.Linear(50, 128), nn.LeakyReLU(0.2)]
    for n_in, n_out in ((128, 256), (256, 512), (512, 1024)):
        layers += [nn.Linear(n_in, n_out), nn.BatchNorm1d(n_out), nn.LeakyReLU(0.2)]
    generator = nn.Sequential(*layers, nn.Linear(1024, 784), nn.Tanh())
    assert str(gan.Generator(50).layers) == str(generator)
    discriminator = nn.Sequential(
        nn.Linear(784, 512), nn.LeakyReLU(0.2), nn.Dropout(0.4),
        nn.Linear(512, 256), nn.LeakyReLU(0.2), nn.Dropout(0.4), nn.Linear(256, 1),
    )  # fmt: skip
    assert str(gan.Discriminator(0.4).layers) == str(discriminator)


def test_discriminator_gives_the_probability_of_its_logit():
    discriminator, images = gan.Discriminator().eval(), 2 * torch.rand(30, 784) - 1
    logits = discriminator.logits(images).detach()
    torch.testing.assert_close(discriminator(images).detach(), 1 / (1 + torch.exp(-logits)))
    assert discriminator(images[:1]).shape == (1,)


def test_committed_weights_are_those_of_a_generator_of_digits():
    """An average that lost its running means or variances draws other shades of grey."""
    folder, images = ROOT / "results" / "gan", mnist()[2].images / 255
    latent_dim = json.loads((folder / "summary.json").read_text())["options"]["latent_dim"]
    generator = gan.Generator(latent_dim).eval()
    generator.load_state_dict(torch.load(folder / "weights.pt"))
    samples = gan.generate(generator, torch.randn(1000, latent_dim))
    assert (samples.mean(dim=0) - images.mean(dim=0)).abs().max() < 0.15
    assert samples.mean().item() == pytest.approx(images.mean().item(), rel=0.1)


# ------------------------ Training ------------------------
def kept(network):
    """Returns copies of the weights and running variances of a network, or of its state.

    Biases stay out: batch normalization takes them away again, so rounding errors alone move them.
    """
    state = network if isinstance(network, dict) else network.state_dict()
    return [x.clone() for name, x in state.items() if name.endswith(("weight", "running_var"))]


def test_training_is_that_of_a_plain_loop(float64, monkeypatch, tmp_path):
    """D before G, the same noise for both, the falling rate, the average of every tenth batch.

    The samples are the average's, at moments counted in batches over all epochs.
    """
    precisions, images, two_digits = [], {}, gan.two_digits

    def watch(*args):
        precisions.append(torch.get_float32_matmul_precision())
        return two_digits(*args)

    def check_finite(*losses):
        precisions.append(torch.get_float32_matmul_precision())

    monkeypatch.setattr(gan, "two_digits", watch)
    monkeypatch.setattr(runs, "check_finite", check_finite)
    monkeypatch.setattr(runs, "save_figure", lambda *args: None)
    save = lambda grid, path, **layout: images.update({path.name: grid.clone()})  # noqa: E731
    monkeypatch.setattr(runs, "save_images", save)
    options = {"n_epochs": 3, "lr": 1e-3, "latent_dim": 50, "dropout": 0.4, "save_interval": 8}
    run(gan, tmp_path, seed=5, **options)
    assert precisions == ["medium", "medium", "medium", "highest"]

    torch.manual_seed(5)
    train = few(mnist)(batch_size=4, n_train=50_000, shift=False, drop_last=True)[0]
    networks = generator, discriminator = gan.Generator(50), gan.Discriminator(0.4)
    average = gan.Generator(50)  # its weights' random numbers are put back
    torch.manual_seed(5)
    gan.Generator(50), gan.Discriminator(0.4)
    z = torch.randn(25, 50)
    start_g, start_d = kept(generator), kept(discriminator)
    adam_g, adam_d = (torch.optim.Adam(x.parameters(), betas=(0.5, 0.999)) for x in networks)
    numbers, batches, grids = [], 0, {}
    for epoch in range(3):
        metrics = []
        for pixels, _ in train:
            for adam in (adam_g, adam_d):
                adam.param_groups[0]["lr"] = 1e-3 * min(1, 2 - 2 * epoch / 3)
            fake = generator(torch.randn(4, 50))
            logits = discriminator.logits(torch.cat([pixels / 127.5 - 1, fake.detach()]))
            value = gan.value_function(logits[:4], logits[4:])
            adam_d.zero_grad()
            (-value).backward()
            adam_d.step()
            loss_g = gan.generator_loss(discriminator.logits(fake))
            adam_g.zero_grad()
            loss_g.backward()
            adam_g.step()
            d_real, d_fake = torch.sigmoid(logits).view(2, 4).mean(1).tolist()
            metrics.append([value.item(), loss_g.item(), d_real, d_fake])
            batches += 1
            if batches % 10 == 0:
                n, now = batches // 10 - 1, generator.state_dict()
                before = average.state_dict() if n else now
                mean = {
                    name: before[name] + (now[name] - before[name]) * 5 / (5 + n) for name in now
                }
                average.load_state_dict(mean)
            if batches % 8 == 0 and batches >= 10:
                with torch.no_grad():
                    grids[f"{batches:06d}.png"] = (average.eval()(z) + 1) / 2
        numbers.append(np.mean(metrics, axis=0))

    checkpoint = torch.load(tmp_path / "checkpoint.pt")
    columns = ("value", "loss_g", "d_real", "d_fake")
    found = np.transpose([checkpoint["history"][name] for name in columns])
    np.testing.assert_allclose(found, numbers, rtol=1e-9)
    parts, weights = checkpoint["parts"], torch.load(tmp_path / "weights.pt")
    assert way_off(start_g, kept(generator), kept(parts["generator"])) < 1e-9
    assert way_off(start_d, kept(discriminator), kept(parts["discriminator"])) < 1e-9
    assert way_off(start_g, kept(average), kept(weights)) < 1e-9
    assert {name for name in images if name[0] == "0"} == {"000008.png", *grids}
    for name, grid in grids.items():
        torch.testing.assert_close(images[name], grid, rtol=0, atol=1e-6)


# ------------------------ Interpolation and figures ------------------------
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
    """If all samples are of one digit, it is both."""
    generator, train = gan.Generator().eval(), few(mnist)(shift=False)[0]
    with torch.no_grad():  # so that the images differ as much as digits do
        generator.layers[-2].weight *= 20
    for _ in range(5):
        z, digits = gan.two_digits(generator, train)
        images = generator(z).detach().double() / 2 + 0.5
        nearest = scipy.spatial.distance.cdist(images, train.images.double() / 255).argmin(axis=1)
        assert train.labels[nearest].tolist() == digits
        assert digits[0] != digits[1]
    train.labels = torch.full_like(train.labels, 7)
    z, digits = gan.two_digits(generator, train)
    assert (z.shape, digits) == ((2, 100), [7, 7])


def test_interpolation_goes_from_one_digit_of_the_summary_to_the_other(finished):
    images = finished(gan).images["interpolation.png"]
    train = few(mnist)(n_train=50_000, shift=False)[0]
    nearest = torch.cdist(images[[0, -1]], train.images / 255).argmin(dim=1)
    final = json.loads((finished(gan).folder / "summary.json").read_text())["final"]
    assert train.labels[nearest].tolist() == [final["digit_from"], final["digit_to"]]
    assert len(images) == len(images.unique(dim=0)) == 9


@pytest.mark.parametrize("n_epochs", [3, 20])
def test_training_plot_leaves_out_the_first_of_20_epochs(n_epochs, monkeypatch):
    columns, saved = ("value", "loss_g", "d_real", "d_fake"), []
    history = {name: list(range(i, n_epochs + i)) for i, name in enumerate(columns)}
    monkeypatch.setattr(runs, "save_figure", lambda figure, path: saved.append(figure))
    gan.save_training_plot(history, "training.png")
    left, right = saved[0].axes
    epochs, first = list(range(1, n_epochs + 1)), n_epochs // 20
    shown = [
        [list(map(list, line.get_data())) for line in axes.get_lines()] for axes in saved[0].axes
    ]
    curve = {name: [epochs[first:], history[name][first:]] for name in columns}
    assert shown[0] == [curve["value"], [[0, 1], [-math.log(4)] * 2]]
    assert shown[1] == [curve["d_real"], curve["d_fake"], [[0, 1], [0.5, 0.5]]]
    labels = [text.get_text() for text in right.get_legend().get_texts()]
    assert labels == [r"$D(\mathbf{x})$", r"$D(G(\mathbf{z}))$"]
    assert (left.get_ylabel(), right.get_ylabel()) == ("$V(D, G)$ (nats)", "mean output of $D$")
