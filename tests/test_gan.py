"""The GAN: its value function, its two updates, the measures of its samples, the script."""

import copy
import math

import numpy as np
import pytest
import scipy.spatial.distance
import scipy.special
import scipy.stats
import torch
from conftest import GAN, Results, interrupt, small
from torch.optim.swa_utils import AveragedModel

import a3_gan_template as gan
from datasets.mnist import mnist


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


def batch(n=20):
    """A batch as the loader gives it: pixels 0..255 and labels."""
    return torch.randint(256, (n, 784)).float(), torch.randint(10, (n,))


# ---------------------------------------------------------------------------------------
# Loss
# ---------------------------------------------------------------------------------------
def test_value_of_an_undecided_discriminator_is_minus_log_4():
    zeros = torch.zeros(7)  # logits of D = 1/2
    assert gan.value_function(zeros, zeros).item() == pytest.approx(-math.log(4))


def test_value_is_equation_1_of_the_paper():
    real, fake = torch.randn(9).double(), torch.randn(5).double()
    d_real, d_fake = (scipy.special.expit(logits.numpy()) for logits in (real, fake))
    exact = np.log(d_real).mean() + np.log(1 - d_fake).mean()
    assert gan.value_function(real, fake).item() == pytest.approx(exact, rel=1e-12)
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
@pytest.mark.parametrize("latent_dim", [1, 2, 100])
def test_generator_gives_images_between_minus_one_and_one(latent_dim):
    generator = gan.Generator(latent_dim)
    images = generator(100 * torch.randn(30, latent_dim))
    assert images.shape == (30, 784)
    assert images.min() >= -1
    assert images.max() <= 1
    assert images.min() < -0.5 < 0.5 < images.max()


def test_generator_has_the_layers_of_the_template():
    sizes = [tuple(p.shape) for p in gan.Generator().parameters() if p.dim() == 2]
    assert sizes == [(128, 100), (256, 128), (512, 256), (1024, 512), (784, 1024)]


def test_discriminator_gives_the_probability_of_its_logit():
    discriminator = gan.Discriminator().eval()
    images = 2 * torch.rand(30, 784) - 1
    d, logits = discriminator(images), discriminator.logits(images)
    assert d.shape == logits.shape == (30,)
    np.testing.assert_allclose(d.detach(), scipy.special.expit(logits.detach().numpy()), rtol=1e-5)
    assert discriminator(images[:1]).shape == (1,)


def test_pixels_are_mapped_to_the_generators_range_and_on_to_the_unit_one():
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8)
    images = gan.to_generator_range(pixels)
    assert images.tolist() == pytest.approx([-1, -0.6, 1])
    assert gan.to_unit_range(images).tolist() == pytest.approx([0, 0.2, 1])


# ---------------------------------------------------------------------------------------
# The two updates
# ---------------------------------------------------------------------------------------
def networks(lr_G=0.1, lr_D=0.1):
    """Small learning rates of zero hold one network still; no dropout, to do sums again."""
    generator, discriminator = gan.Generator(10), gan.Discriminator()
    for layer in discriminator.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
    optimizer_G = torch.optim.SGD(generator.parameters(), lr=lr_G)
    optimizer_D = torch.optim.SGD(discriminator.parameters(), lr=lr_D)
    return discriminator, generator, optimizer_G, optimizer_D


def parameters(network):
    return [p.detach().clone() for p in network.parameters()]


@pytest.mark.parametrize("still", ["discriminator", "generator"])
def test_each_update_leaves_the_other_network_alone(still):
    rates = {"lr_D": 0.0} if still == "discriminator" else {"lr_G": 0.0}
    discriminator, generator, *optimizers = networks(**rates)
    before = parameters(discriminator), parameters(generator)
    gan.train([batch()], discriminator, generator, *optimizers)
    unchanged = [
        [torch.equal(old, new) for old, new in zip(olds, parameters(network), strict=True)]
        for olds, network in zip(before, (discriminator, generator), strict=True)
    ]
    if still == "generator":
        unchanged.reverse()
    assert all(unchanged[0])
    assert not any(unchanged[1][-2:])  # the last layer's weight and bias for sure


def test_each_network_gets_the_gradient_of_its_own_loss_alone():
    """One step with nothing moving, against the gradients of the paper's losses done again."""
    data = batch()
    discriminator, generator, *optimizers = networks(0.0, 0.0)
    copies = copy.deepcopy((discriminator, generator))
    for _ in range(2):  # the second step must not add to the gradients of the first
        torch.manual_seed(5)
        metrics = gan.train([data], discriminator, generator, *optimizers)

    d, g = copies
    torch.manual_seed(5)
    fake = g(torch.randn(20, 10))
    logits = d.logits(gan.to_generator_range(data[0])), d.logits(fake)
    value = (
        torch.log(torch.sigmoid(logits[0])).mean() + torch.log(1 - torch.sigmoid(logits[1])).mean()
    )
    loss_g = -torch.log(torch.sigmoid(logits[1])).mean()
    grads_d = torch.autograd.grad(-value, list(d.parameters()), retain_graph=True)
    grads_g = torch.autograd.grad(loss_g, list(g.parameters()))
    for network, grads in ((discriminator, grads_d), (generator, grads_g)):
        for parameter, grad in zip(network.parameters(), grads, strict=True):
            torch.testing.assert_close(parameter.grad, grad, rtol=1e-3, atol=1e-6)
    assert metrics["value"] == pytest.approx(value.item(), rel=1e-5)
    assert metrics["loss_d"] == pytest.approx(-value.item(), rel=1e-5)
    assert metrics["loss_g"] == pytest.approx(loss_g.item(), rel=1e-5)
    assert metrics["d_real"] == pytest.approx(torch.sigmoid(logits[0]).mean().item(), rel=1e-5)
    assert metrics["d_fake"] == pytest.approx(torch.sigmoid(logits[1]).mean().item(), rel=1e-5)


def test_the_discriminator_learns_to_tell_and_the_generator_to_deceive():
    data = [batch() for _ in range(30)]
    discriminator, generator, *optimizers = networks(lr_G=0.0)
    first = gan.train(data[:1], discriminator, generator, *optimizers)
    last = gan.train(data, discriminator, generator, *optimizers)
    last = gan.train(data[:1], discriminator, generator, *optimizers)
    assert last["value"] > first["value"]
    assert last["d_real"] - last["d_fake"] > first["d_real"] - first["d_fake"]
    for group in optimizers[1].param_groups:
        group["lr"] = 0.0
    for group in optimizers[0].param_groups:
        group["lr"] = 0.1
    gan.train(data, discriminator, generator, *optimizers)
    deceived = gan.train(data[:1], discriminator, generator, *optimizers)
    assert deceived["loss_g"] < last["loss_g"]


def test_epoch_means_count_batches_by_their_size():
    sizes = (6, 2)
    data = [batch(n) for n in sizes]
    discriminator, generator, *optimizers = networks(0.0, 0.0)
    torch.manual_seed(5)
    whole = gan.train(data, discriminator, generator, *optimizers)
    torch.manual_seed(5)
    parts = [gan.train([one], discriminator, generator, *optimizers) for one in data]
    for name, mean in whole.items():
        weighted = sum(n * part[name] for n, part in zip(sizes, parts, strict=True)) / sum(sizes)
        assert mean == pytest.approx(weighted, rel=1e-6)


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


@pytest.mark.parametrize("labels", [NEIGHBOURS[:4], NEIGHBOURS[:1], NEIGHBOURS[1:3]])
def test_two_classes_are_none_where_there_are_no_two(labels):
    assert gan.two_classes(torch.tensor(labels)) is None


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


def test_parzen_is_scipys_kernel_density_in_one_dimension():
    centres, x, sigma = torch.rand(40, 1), torch.rand(11, 1), 0.13
    kde = scipy.stats.gaussian_kde(centres[:, 0], bw_method=sigma / centres.std().item())
    (log_p,) = gan.parzen_log_likelihoods(x, centres, [sigma])
    np.testing.assert_allclose(log_p, kde.logpdf(x[:, 0]), rtol=1e-3, atol=1e-4)


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
        self.images = gan.to_generator_range(pixels)
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


def test_draw_gives_the_latents_of_its_images_in_any_blocks():
    generator = gan.Generator(4).eval()
    for rows in (3, 100):
        z, images = gan.draw(generator, 10, rows=rows)
        assert (z.shape, images.shape) == ((10, 4), (10, 784))
        expected = (generator(z).detach() + 1) / 2
        torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------
# The script
# ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("latent_dim", [1, 2])
def test_a_small_latent_trains(latent_dim, tmp_path):
    end = GAN.main(*GAN.options(tmp_path, 1), "--latent_dim", latent_dim)
    assert (end.status, end.err) == (0, "")


def test_a_last_batch_of_one_image_is_left_out(tmp_path):
    """Batch normalisation cannot train on it."""
    seen = []

    def loaders(make):
        def loaders(*args, **kwargs):
            made = make(*args, **kwargs)
            for loader in made:
                loader.images, loader.labels = loader.images[:41], loader.labels[:41]
            return made

        return loaders

    def patch(monkeypatch, module):
        train = module.train
        monkeypatch.setattr(module, "train", lambda data, *rest: train(spy(data), *rest))

    def spy(data):
        for images, labels in data:
            seen.append(len(images))
            yield images, labels

    end = GAN.main(*GAN.options(tmp_path, 2), loaders=loaders, patch=patch)
    assert (end.status, end.err) == (0, "")
    assert seen == [20, 20, 20, 20]


def test_one_sample_to_judge_is_judged_or_refused_in_one_line(tmp_path):
    end = GAN.main(*GAN.options(tmp_path, 1), "--eval_samples", 1)
    assert end.status == 0 or (end.status == 2 and end.err.startswith("error: "))


def test_summary_and_numbers_agree_on_the_digits(finished):
    run = finished(GAN)
    final = run.summary["final"]
    shares = final["digit_shares"]
    assert len(shares) == 10
    assert sum(shares) == pytest.approx(1)
    assert final["digits_present"] == sum(share > 0 for share in shares)
    numbers = (run.folder / "numbers.tex").read_text()
    for name in ("From", "To"):
        (digit,) = gan.re.findall(rf"\\GanDigit{name}\}}\{{(\d)\}}", numbers)
        assert shares[int(digit)] > 0


def run_and_record(folder, *options, n_epochs=3, **kwargs):
    """Run the script; return its generator's weights after each step."""
    steps = []

    class Recorder(AveragedModel):
        def update_parameters(self, model):
            steps.append({name: t.clone() for name, t in model.state_dict().items()})
            super().update_parameters(model)

    def patch(monkeypatch, module):
        monkeypatch.setattr(module, "AveragedModel", Recorder)

    end = GAN.main(*GAN.options(folder, n_epochs), *options, patch=patch, **kwargs)
    assert (end.status, end.err) == (0, "")
    return steps


def test_samples_come_from_the_exponential_average_of_the_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(gan, "AVERAGED_SHARE", 0.4)  # of 6 steps, to weigh several
    steps = run_and_record(tmp_path)
    assert len(steps) == 6
    checkpoint = Results(tmp_path).checkpoint
    decay = 1 - 1 / (1 + 0.4 * 6)
    expected = steps[0]
    for step in steps[1:]:
        expected = {
            name: decay * expected[name] + (1 - decay) * step[name]
            for name in step
            if step[name].is_floating_point()
        }
    average = {
        name.removeprefix("module."): tensor
        for name, tensor in checkpoint["parts"]["average"].items()
    }
    for name, tensor in expected.items():
        torch.testing.assert_close(average[name], tensor, rtol=1e-4, atol=1e-6)
        assert not torch.equal(average[name], checkpoint["parts"]["generator"][name])

    generator = gan.Generator().eval()
    generator.load_state_dict({k: v for k, v in average.items() if k != "n_averaged"})
    z = torch.randn(25, 100, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        images = (generator(z) + 1) / 2
    torch.testing.assert_close(checkpoint["kept"]["samples_after"], images)
    assert not torch.equal(checkpoint["kept"]["samples_before"], images)


def grids(folder):
    return sorted(path.name for path in (folder / "progress").iterdir())


def test_a_grid_is_saved_every_save_interval_iterations_also_after_a_resume(tmp_path):
    """5 epochs of 2 iterations, the break before the sixth."""
    options = (*GAN.options(tmp_path, 5), "--save_interval", 3)
    end = GAN.main(*options, loaders=lambda make: small(make, epoch=3, batch=1, act=interrupt))
    assert end.status == 130
    assert grids(tmp_path) == ["000003.png"]
    assert GAN.main(*options, "--resume").status == 0
    assert grids(tmp_path) == ["000003.png", "000006.png", "000009.png"]


def test_grids_are_the_fixed_latents_5_to_a_row(tmp_path):
    end = GAN.main(*GAN.options(tmp_path, 1), "--save_interval", 2)
    assert end.status == 0
    picture = gan.plt.imread(tmp_path / "progress" / "000002.png")[..., 0]
    assert picture.shape == (5 * 30 + 2, 5 * 30 + 2)
    images = Results(tmp_path).checkpoint["kept"]["samples_after"].view(25, 28, 28)
    np.testing.assert_allclose(picture[2:30, 32:60], images[1], atol=0.003)
    np.testing.assert_allclose(picture[122:150, 122:150], images[24], atol=0.003)


def test_training_plot_has_the_two_reference_lines(monkeypatch):
    saved = []
    monkeypatch.setattr(gan, "save_figure", lambda figure, name: saved.append(figure))
    history = [{"epoch": e, "value": -e, "d_real": 0.7, "d_fake": 0.2 * e} for e in (1, 2, 3)]
    gan.save_training_plot(history, "training.pdf")
    left, right = saved[0].axes
    curves = [[list(line.get_ydata()) for line in axes.get_lines()] for axes in (left, right)]
    gan.plt.close(saved[0])
    assert curves[0] == [[-1, -2, -3], [-math.log(4)] * 2]
    assert curves[1] == [[0.7] * 3, pytest.approx([0.2, 0.4, 0.6]), [0.5] * 2]


def test_interpolation_figure_shows_the_arc_between_two_sure_digits(tmp_path):
    """In the title the digits that numbers.tex has; 9 images, the ends those of the latents."""
    shown = {}

    def patch(monkeypatch, module):
        def save_images(images, filename, nrow, title=None):
            shown[filename.stem] = (images, nrow, title)

        def judge(generator, *args):
            torch.manual_seed(1)
            final, _, _ = original(generator, *args)
            shown["latents"] = torch.randn(2, 100)
            with torch.no_grad():
                shown["ends"] = (generator(shown["latents"]) + 1) / 2
            return final, shown["latents"], [4, 7]

        original = module.judge
        monkeypatch.setattr(module, "save_images", save_images)
        monkeypatch.setattr(module, "judge", judge)

    end = GAN.main(*GAN.options(tmp_path, 1), patch=patch)
    assert end.status == 0
    images, nrow, title = shown["interpolation"]
    assert (images.shape, nrow) == ((9, 784), 9)
    torch.testing.assert_close(images[[0, -1]], shown["ends"], rtol=1e-3, atol=1e-4)
    assert gan.re.findall(r"\d", title) == ["4", "7"]
    numbers = (tmp_path / "numbers.tex").read_text()
    assert r"{\GanDigitFrom}{4}" in numbers
    assert r"{\GanDigitTo}{7}" in numbers
