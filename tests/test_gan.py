"""The GAN: its value function, its two updates and the average, its interpolation and figures."""

import copy
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


# ------------------------ Losses and networks ------------------------
def test_losses_are_those_of_the_paper_and_finite_at_logits_of_50():
    """The gradient of a mistaken discriminator is as large as it can be."""
    real, fake = torch.tensor([[-50.0, 1, 2], [50, 0, -3]], dtype=torch.float64)
    real.requires_grad_(), fake.requires_grad_()
    log_d, log_not_d = np.log(scipy.special.expit([[-50.0, 1, 2], [-50, 0, 3]])).mean(axis=1)
    value = gan.value_function(real, fake)
    value.backward()
    assert value.item() == pytest.approx(log_d + log_not_d, rel=1e-12)
    assert (3 * real.grad[0].item(), 3 * fake.grad[0].item()) == pytest.approx((1, -1))
    assert gan.generator_loss(real).item() == pytest.approx(-log_d, rel=1e-12)


def test_discriminator_gives_the_probability_of_its_logit():
    discriminator, images = gan.Discriminator().eval(), 2 * torch.rand(30, 784) - 1
    logits = discriminator.logits(images).detach()
    torch.testing.assert_close(discriminator(images).detach(), 1 / (1 + torch.exp(-logits)))
    assert discriminator(images[:1]).shape == (1,)


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
def test_training_is_that_of_a_plain_loop(float64, monkeypatch, tmp_path):
    """D before G, the same noise for both, the falling rate, the average of every tenth batch."""
    monkeypatch.setattr(runs, "save_figure", lambda *args: None)
    options = {"n_epochs": 3, "lr": 1e-3, "latent_dim": 50, "dropout": 0.4}
    run(gan, tmp_path, seed=5, **options)

    torch.manual_seed(5)
    train = few(mnist)(batch_size=4, n_train=50_000, shift=False, drop_last=True)[0]
    networks = generator, discriminator = gan.Generator(50), gan.Discriminator(0.4)
    average = copy.deepcopy(generator)
    torch.randn(25, 50)  # of the sample grids
    start = [[x.clone() for x in network.state_dict().values()] for network in networks]
    adams = adam_g, adam_d = [
        torch.optim.Adam(network.parameters(), betas=(0.5, 0.999), fused=True)
        for network in networks
    ]
    rows, batches = [], 0
    for epoch in range(3):
        metrics = []
        for pixels, _ in train:
            for adam in adams:
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
            metrics.append(
                [value.item(), loss_g.item(), *logits.sigmoid().view(2, 4).mean(1).tolist()]
            )
            batches += 1
            if batches in (10, 20, 30):
                n = batches // 10 - 1  # states averaged before
                states = average.state_dict().values(), generator.state_dict().values()
                for mean, now in zip(*states, strict=True):
                    mean.copy_(mean + (now - mean) * 5 / (5 + n) if n else now)
        rows.append(np.mean(metrics, axis=0))
    checkpoint = torch.load(tmp_path / "checkpoint.pt")
    history, parts = checkpoint["history"], checkpoint["parts"]
    found = [history[name] for name in ("value", "loss_g", "d_real", "d_fake")]
    np.testing.assert_allclose(np.transpose(found), rows, rtol=1e-9)
    ends = (generator, parts["generator"]), (discriminator, parts["discriminator"])
    for before, (network, found) in zip(start, ends, strict=True):
        assert way_off(before, network.state_dict().values(), found.values()) < 1e-9
    found = torch.load(tmp_path / "weights.pt").values()
    assert way_off(start[0], average.state_dict().values(), found) < 1e-9


def test_progress_shows_the_average_from_the_same_noise(finished):
    """A grid is saved every 15 batches of 60; all numbers but the last are of other weights."""
    images = finished(gan).images
    assert torch.equal(images["000060.png"], images["samples_after.png"])
    assert len({images[f"{n:06d}.png"].sum().item() for n in (15, 30, 45, 60)}) == 4


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
