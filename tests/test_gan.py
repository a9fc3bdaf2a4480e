"""The GAN: its value function, its two updates and the average, its interpolation and figures."""

import copy
import math

import numpy as np
import pytest
import scipy.spatial.distance
import scipy.special
import torch
import torch.nn.functional as F
from conftest import ROOT, few, pictures, read, run
from torch import nn

import a3_gan_template as gan
import runs
from datasets.mnist import mnist


# ------------------------ Losses and networks ------------------------
def test_losses_are_those_of_the_paper_and_finite_at_logits_of_1000():
    """The gradient of a mistaken discriminator is as large as it can be."""
    real, fake = torch.tensor([[-1000.0, 1, 2], [1000, 0, -3]], dtype=torch.float64)
    real.requires_grad_(), fake.requires_grad_()
    log_d, log_not_d = scipy.special.log_expit([[-1000.0, 1, 2], [-1000, 0, 3]]).mean(axis=1)
    value = gan.value_function(real, fake)
    value.backward()
    assert value.item() == pytest.approx(log_d + log_not_d, rel=1e-12)
    assert (3 * real.grad[0].item(), 3 * fake.grad[0].item()) == pytest.approx((1, -1))
    assert gan.generator_loss(real).item() == pytest.approx(-log_d, rel=1e-12)


def test_networks_are_the_templates_with_dropout_in_the_discriminator():
    """The generator's sizes are those of the committed weights."""
    generator, discriminator = gan.Generator(), gan.Discriminator(0.4).eval()
    layers = [*generator.layers, *discriminator.layers]
    slopes = [layer.negative_slope for layer in layers if isinstance(layer, nn.LeakyReLU)]
    assert slopes == 6 * [0.2]
    assert [layer.p for layer in layers if isinstance(layer, nn.Dropout)] == [0.4, 0.4]
    assert isinstance(generator.layers[-1], nn.Tanh)
    images = 2 * torch.rand(30, 784) - 1
    logits = discriminator.logits(images).detach()
    torch.testing.assert_close(discriminator(images).detach(), 1 / (1 + torch.exp(-logits)))


def test_committed_weights_are_those_of_a_generator_of_digits():
    """An average that lost its running means or variances draws other shades of grey."""
    generator, images = gan.Generator().eval(), mnist()[2].images / 255
    generator.load_state_dict(torch.load(ROOT / "results" / "gan" / "weights.pt"))
    samples = gan.generate(generator, torch.randn(1000, 100))
    assert (samples.mean(dim=0) - images.mean(dim=0)).abs().max() < 0.15
    assert samples.mean().item() == pytest.approx(images.mean().item(), rel=0.1)


# ------------------------ Training ------------------------
def test_training_is_that_of_a_plain_loop(float64, tmp_path):
    """D before G, the same noise for both, the falling rate, the average of every tenth batch."""
    run(gan, tmp_path, n_epochs=3, seed=5, lr=1e-3, latent_dim=50, dropout=0.4)

    torch.manual_seed(5)
    train = few(mnist)(batch_size=4, n_train=50_000, shift=False, drop_last=True)[0]
    generator, discriminator = gan.Generator(50), gan.Discriminator(0.4)
    average = copy.deepcopy(generator)
    torch.randn(25, 50)  # of the sample grids
    settings = {"betas": (0.5, 0.999), "fused": True}
    adam_g = torch.optim.Adam(generator.parameters(), **settings)
    adam_d = torch.optim.Adam(discriminator.parameters(), **settings)
    rows, batches = [], 0
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
            d_real, d_fake = logits[:4].sigmoid().mean(), logits[4:].sigmoid().mean()
            metrics.append([x.item() for x in (value, loss_g, d_real, d_fake)])
            batches += 1
            if batches in (10, 20, 30):
                n = batches // 10 - 1  # states averaged before
                states = average.state_dict().values(), generator.state_dict().values()
                for mean, now in zip(*states, strict=True):
                    mean.copy_(mean + (now - mean) * 5 / (5 + n))
        rows.append(np.mean(metrics, axis=0))
    checkpoint = torch.load(tmp_path / "checkpoint.pt")
    history, parts = checkpoint["history"], checkpoint["parts"]
    columns = [history[name] for name in ("value", "loss_g", "d_real", "d_fake")]
    np.testing.assert_allclose(np.transpose(columns), rows, rtol=1e-9)
    torch.testing.assert_close(parts["generator"], dict(generator.state_dict()))
    torch.testing.assert_close(parts["discriminator"], dict(discriminator.state_dict()))
    torch.testing.assert_close(torch.load(tmp_path / "weights.pt"), dict(average.state_dict()))


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


def test_two_digits_are_the_clearest_samples_of_two_digits():
    """Their ten nearest training images agree best; if all show one digit, it is both."""
    generator, train = gan.Generator().eval(), few(mnist)(shift=False)[0]
    generator.layers[-2].weight.data *= 20  # so that the images differ as much as digits do
    z = torch.randn(100, 100)
    torch.manual_seed(0)  # for the same latents, after those of the weights
    gan.Generator()
    ends, digits = gan.two_digits(generator, train)
    images = generator(z).detach().double() / 2 + 0.5
    distances = scipy.spatial.distance.cdist(images, train.images.double() / 255)
    votes = train.labels.numpy()[distances.argsort(axis=1)[:, :10]]
    agreement = (votes == votes[:, :1]).sum(axis=1)
    first, *order = sorted(range(100), key=lambda sample: -agreement[sample])
    other = next(sample for sample in order if votes[sample, 0] != votes[first, 0])
    torch.testing.assert_close(ends, z[[first, other]])
    assert digits == [votes[first, 0], votes[other, 0]]
    train.labels = torch.full_like(train.labels, 7)
    assert gan.two_digits(generator, train)[1] == [7, 7]


def test_grids_show_the_average_from_the_same_noise_and_from_digit_to_digit(finished):
    """A grid is saved every 15 of 60 batches, no two alike; the last one is samples_after.png."""
    folder, average = finished(gan).folder, finished(gan).models[-1].module
    grids = [(folder / "progress" / f"{n:06d}.png").read_bytes() for n in (15, 30, 45, 60)]
    assert grids[-1] == (folder / "samples_after.png").read_bytes()
    assert len(set(grids)) == 4

    torch.set_rng_state(torch.load(folder / "checkpoint.pt")["random"])  # at the training's end
    ends, digits = gan.two_digits(average, few(mnist)(n_train=50_000, shift=False)[0])
    steps = gan.generate(average, gan.interpolate(*ends))
    np.testing.assert_allclose(pictures(folder / "interpolation.png"), steps, atol=0.51 / 255)
    final = read(folder)[1]["final"]
    assert digits == [final["digit_from"], final["digit_to"]]


def test_training_plot_leaves_out_the_first_of_20_epochs(monkeypatch):
    history, saved = {"value": range(20), "d_real": range(30, 50), "d_fake": range(60, 80)}, []
    monkeypatch.setattr(runs, "save_figure", lambda figure, path: saved.append(figure))
    gan.save_training_plot(history, "training.png")
    left, right = saved[0].axes
    value, target, d_real, d_fake, d_target = [*left.get_lines(), *right.get_lines()]
    for line, column in zip((value, d_real, d_fake), history.values(), strict=True):
        np.testing.assert_array_equal(line.get_data(), (range(2, 21), column[1:]))
    assert (target.get_ydata()[0], d_target.get_ydata()[0]) == (-math.log(4), 0.5)
    labels = [text.get_text() for text in right.get_legend().get_texts()]
    assert labels == [r"$D(\mathbf{x})$", r"$D(G(\mathbf{z}))$"]
    assert (left.get_ylabel(), right.get_ylabel()) == ("$V(D, G)$ (nats)", "mean output of $D$")
