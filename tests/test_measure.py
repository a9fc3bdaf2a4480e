"""The measures of the report: bounds against quadrature, Parzen windows and neighbours by SciPy."""

import functools
import hashlib
import itertools
import json
import math
import pathlib

import numpy as np
import pytest
import scipy.spatial.distance
import scipy.special
import scipy.stats
import torch
from conftest import GAN, ROOT, VAE, Results, small

import a3_gan_template as gan
import a3_nf_template as nf
import a3_vae_template as vae
import runs
from datasets.bmnist import bmnist
from datasets.mnist import ShiftedLoader, mnist
from datasets.mnist import load as load_mnist
from extension import mixture_flow
from report import measure


def few(make):
    """Returns what makes loaders as `make` does, of 320, 473 and 614 images."""

    def made(**options):
        loaders = make(**options)
        small(loaders)
        return loaders

    return made


@pytest.fixture(autouse=True)
def figures(monkeypatch):
    """Few draws, few images, networks as narrow as those of `finished`, and no timing.

    Returns the figures, by name, that are not saved.
    """
    draws = {"ELBO_DRAWS": 3, "VAE_DRAWS": 20, "MANY": 4, "PRIOR_DRAWS": [4, 12],
             "FLOW_DRAWS": 2}  # fmt: skip
    sizes = {"SAMPLES": 50, "FEW_IMAGES": 7, "FLOW_IMAGES": 5, "END_IMAGES": 60}
    quick = {"sample_ms": lambda draw: 1, "mnist": few(mnist), "bmnist": few(bmnist)}
    for name, value in (draws | sizes | quick).items():
        monkeypatch.setattr(measure, name, value)
    monkeypatch.setattr(nf, "Coupling", functools.partial(nf.Coupling, n_hidden=32))
    narrow = functools.partial(mixture_flow.ConvNet, c_hidden=4)
    monkeypatch.setattr(mixture_flow, "ConvNet", narrow)
    saved = {}
    monkeypatch.setattr(runs, "save_figure", lambda figure, path: saved.update({path.name: figure}))
    yield saved
    vae.plt.close("all")


def grey(start, n):
    """Returns images of MNIST in [0, 1], from row `start` on, and their labels."""
    images, labels = load_mnist()
    return images[start : start + n].double() / 255, labels[start : start + n]


# The yardstick
def expected_yardstick(images):
    train, labels = grey(0, 320)
    distances = scipy.spatial.distance.cdist(images, train)
    votes = labels.numpy()[distances.argsort(axis=1)[:, :10]]
    digits, counts = scipy.stats.mode(votes, axis=1)
    shares = np.bincount(digits, minlength=10) / len(digits)
    return digits, {
        "agreement": (counts >= 8).mean(), "digit_shares": shares.tolist(),
        "digit_entropy": scipy.stats.entropy(shares), "digits_present": np.count_nonzero(shares),
        "nearest": distances.min(axis=1).mean(), "nearest_min": distances.min(),
    }  # fmt: skip


def test_yardstick_is_a_vote_of_the_nearest_training_images(float64):
    """Of more images than a block has."""
    images, _ = grey(60_000, 614)
    measures, digits = measure.yardstick(images)
    expected_digits, expected = expected_yardstick(images)
    assert 0.1 < measures["agreement"] < 0.9
    assert list(measures) == list(expected)
    for name in expected:
        assert measures[name] == pytest.approx(expected[name], rel=1e-9), name
    assert digits.tolist() == expected_digits.tolist()


# VAE
def test_importance_estimate_rises_with_k_to_log_p_from_below(one_dimensional):
    model, x, _, exact = one_dimensional
    bounds = []
    for k, n in ((1, 20_000), (3, 8000), (10, 4000), (100, 400)):
        values = measure.importance_log_likelihood(model, x.expand(n, -1), k)
        bounds.append((values.mean().item(), scipy.stats.sem(values).item()))
    for (low, _), (high, _) in itertools.pairwise(bounds):
        assert low < high
    assert all(mean < exact + 4 * stderr for mean, stderr in bounds)
    last, stderr = bounds[-1]
    assert last == pytest.approx(exact, abs=0.05 + 4 * stderr)


def test_prior_estimate_is_the_mean_over_groups_of_latents(float64):
    model = vae.VAE(hidden_dim=20, z_dim=3).requires_grad_(False)
    images = bmnist()[2].images[:4]
    torch.manual_seed(1)
    estimates = measure.prior_log_likelihoods(model, images, [500, 1500])  # in more than one part
    torch.manual_seed(1)
    logits = model.decoder.logits(torch.randn(1500, 3)).numpy()
    signs = 2 * images.double().numpy() - 1
    log_px = scipy.special.log_expit(signs[:, None] * logits).sum(axis=2)
    for count, estimate in zip((500, 1500), estimates, strict=True):
        groups = scipy.special.logsumexp(log_px.reshape(4, -1, count), axis=2) - math.log(count)
        assert estimate == pytest.approx(groups.mean(), rel=1e-9)


def test_vae_is_measured_on_the_test_images(float64, figures, tmp_path):
    model = vae.VAE(hidden_dim=20, z_dim=2).requires_grad_(False)
    model.encoder.mean_and_log_std.weight[:2] *= 20
    torch.manual_seed(1)
    measures = measure.measure_vae(model, {"seed": 3}, tmp_path)

    _, val, test = few(bmnist)()
    images = test.images.double()
    torch.manual_seed(1)
    draws = torch.stack([torch.stack(model.losses(images)) for _ in range(3)])
    reconstruction, kl = draws.mean(dim=0)
    loss = reconstruction + kl
    for name, values in (("reconstruction", reconstruction), ("kl", kl), ("elbo", loss)):
        sign = -1 if name == "elbo" else 1
        assert measures[f"test_{name}"] == pytest.approx(sign * values.mean().item(), rel=1e-9)
        assert measures[f"test_{name}_stderr"] == pytest.approx(scipy.stats.sem(values), rel=1e-9)
    assert -loss.mean() < measures["test_log_px"] < 50 - loss.mean()
    many = measure.log_likelihoods(model, images[:: 614 // 7][:7], 3000)
    assert measures["few_log_px"] == pytest.approx(many.mean().item(), abs=3)
    assert (0 < measures["iw_bias"] < 3, measures["many_draws"]) == (True, 80)

    mean, std = model.encoder(images)
    variance = np.var(mean.numpy(), axis=0, ddof=1) + np.mean(std.numpy() ** 2, axis=0)
    np.testing.assert_allclose(measures["aggregate_variance"], variance, rtol=1e-9)
    outside = (abs(mean.numpy()) > 1.9599639845).any(axis=1).mean()
    assert 0 < outside < 1
    assert measures["share_outside"] == pytest.approx(outside)

    torch.manual_seed(3)
    untrained = vae.VAE(z_dim=2)
    reconstruction, kl = untrained.losses(val.images.double())
    assert measures["initial_kl"] == pytest.approx(kl.mean().item(), rel=1e-9)
    expected = -(reconstruction + kl).mean().item()
    assert measures["initial_elbo"] == pytest.approx(expected, rel=1e-9)
    cost = untrained.decoder.logits(torch.randn(5000, 2)).pow(2).sum(dim=1).mean() / 8
    assert measures["initial_logit_cost"] == pytest.approx(cost.item(), rel=0.05)

    points = figures["latent_space.pdf"].axes[0].collections[0]
    shown = np.column_stack([points.get_offsets(), points.get_array()])
    expected = np.column_stack([mean, test.labels])  # in another order
    shown, expected = (table[table[:, 0].argsort()] for table in (shown, expected))
    np.testing.assert_allclose(shown, expected, rtol=1e-6)
    prior, exact = figures["prior_estimate.pdf"].axes[0].get_lines()
    assert prior.get_xdata().tolist() == measures["prior_draws"] == [4, 12]
    assert prior.get_ydata().tolist() == measures["prior_log_px"]
    assert exact.get_ydata()[0] == measures["few_log_px"]


# GAN
def exact_parzen(images, centres, sigma):
    parts = scipy.stats.norm.logpdf(images[:, None].double(), centres[None].double(), sigma)
    return scipy.special.logsumexp(parts.sum(axis=2), axis=1) - math.log(len(centres))


def test_parzen_estimate_chooses_the_bandwidth_on_the_validation_images_alone(float64):
    """Validation images near their centres; test images, more than a block has, far from them."""
    centres = torch.rand(50, 20)
    val = centres + 0.15 * torch.randn(50, 20)
    test = torch.rand(501, 20) + 0.3 * torch.randn(501, 20)
    mean, stderr, sigma = measure.parzen_estimate(centres, val, test)
    log_px = exact_parzen(test, centres, sigma)
    assert mean == pytest.approx(log_px.mean(), rel=1e-9)
    assert stderr == pytest.approx(scipy.stats.sem(log_px), rel=1e-9)
    here = exact_parzen(val, centres, sigma).mean()
    for step in (-0.01, 0.01, 0.1):
        assert exact_parzen(val, centres, sigma + step).mean() < here + 1e-4
    assert exact_parzen(test, centres, sigma + 0.05).mean() > mean  # they would choose another


def test_gan_is_measured_against_real_images(float64, monkeypatch):
    """Its samples are training images; the bandwidth is that of the 10,000 after the others."""
    monkeypatch.setattr(gan, "generate", lambda _, z: grey(150, len(z))[0])
    estimate, given = measure.parzen_estimate, []
    monkeypatch.setattr(measure, "parzen_estimate", lambda *x: given.append(x) or estimate(*x))
    measures = measure.measure_gan(gan.Generator(), {"seed": 0}, None)
    (val, _), (test, labels) = grey(50_000, 473), grey(60_000, 614)
    for name, start in (("parzen", 150), ("parzen_train", 0)):
        mean, stderr, sigma = estimate(grey(start, 50)[0], val, test)
        assert torch.equal(given.pop(0)[1], val)  # which may make no difference to sigma
        assert measures[name] == pytest.approx(mean, rel=1e-9)
        assert measures[f"{name}_stderr"] == pytest.approx(stderr, rel=1e-9)
        assert name == "parzen_train" or measures["parzen_sigma"] == sigma
    digits, expected = expected_yardstick(test)
    assert measures["test_agreement"] == pytest.approx(expected["agreement"])
    assert measures["test_nearest_min"] == pytest.approx(expected["nearest_min"])
    assert measures["vote_accuracy"] == pytest.approx((digits == labels.numpy()).mean())
    shares = np.bincount(labels, minlength=10) / 614
    np.testing.assert_allclose(measures["label_shares"], shares)
    ends = expected_yardstick(grey(150, 2)[0])[0]  # which `generate` has made of any latents
    assert [measures["digit_from"], measures["digit_to"]] == ends.tolist()
    n = measures["generator_parameters"], measures["discriminator_parameters"]
    assert n == (1_510_032, 533_505)


# Flow
class WeightedPixels(torch.nn.Module):
    """A model whose -log p(x + u) is a sum of weighted pixels, and 10 more in every second draw."""

    n_calls = extra = 0
    weights = torch.linspace(0, 1, 784, dtype=torch.float64) ** 2

    def forward(self, input):
        self.n_calls += 1
        return -input.double() @ self.weights - self.extra * (self.n_calls % 2)


def test_tighter_bits_are_of_the_mean_density(float64):
    model, images = WeightedPixels(), load_mnist()[0][:251]  # in two parts
    model.extra = 10
    bits = measure.draws_of_bits(model, images, 3)
    unit, first = 784 * math.log(2), (images.double() @ model.weights).numpy()
    extra = 10 * np.repeat([[1, 0], [0, 1], [1, 0]], [250, 1], axis=1)
    np.testing.assert_allclose(bits, (first + extra) / unit, rtol=1e-9)
    log_px = scipy.special.logsumexp(-(first + extra), axis=0) - math.log(3)
    np.testing.assert_allclose(measure.tighter_bits(bits), -log_px / unit, rtol=1e-9)


def test_flow_is_measured_on_the_test_images(float64):
    torch.manual_seed(1)
    measures = measure.measure_flow(WeightedPixels(), {}, None)
    unit = 784 * math.log(2)
    test = load_mnist()[0][60_000:60_614].double() @ WeightedPixels.weights / unit
    assert measures["test_bpd_stderr"] == pytest.approx(scipy.stats.sem(test), rel=1e-9)
    spread = test[:: 614 // 5][:5].mean().item()
    assert measures["test_bpd_iw_single"] == pytest.approx(spread, rel=1e-9)
    assert measures["test_bpd_iw"] == pytest.approx(spread, rel=1e-9)
    assert (measures["iw_samples"], measures["iw_images"]) == (2, 5)
    # At the end: training images as they are, shifted, and the validation images.
    images, labels = (x[:60] for x in load_mnist())
    torch.manual_seed(1)
    ((shifted, _),) = ShiftedLoader(images, labels, 60)
    splits = {"train": images, "shifted": shifted, "val": load_mnist()[0][40_000:40_473]}
    for name, split in splits.items():
        expected = (split.double() @ WeightedPixels.weights / unit).mean().item()
        assert measures[f"end_{name}_bpd"] == pytest.approx(expected, rel=1e-9), name
    assert not any("ink" in name for name in measures)


def test_bits_of_pixels_are_their_own_and_add_up(float64):
    model = mixture_flow.mixture_model(3).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    images = load_mnist()[0][60_000:60_002]
    torch.manual_seed(1)
    bits = measure.pixel_bits(model, images.double())
    torch.manual_seed(1)
    total = nf.bits_per_dim(model(images))
    torch.testing.assert_close(bits.mean(dim=1), total)

    # One pixel of each coupling of the two larger grids, by autograd.
    torch.manual_seed(1)
    noisy = model.dequantize(images.double()).requires_grad_()
    z, _ = model.flow(*model.logit_normalize(noisy, torch.zeros(2)))
    for row, column in ((1, 0), (0, 1), (1, 1), (2, 0), (0, 2), (2, 2)):
        pixel = (12 + row) * 28 + 12 + column
        (slope,) = torch.autograd.grad(z[0, pixel], noisy, retain_graph=True)
        expected = -scipy.stats.norm.logpdf(z[0, pixel].item()) - math.log(slope[0, pixel])
        assert bits[0, pixel].item() == pytest.approx(expected / math.log(2), rel=1e-9)

    with torch.no_grad():
        torch.manual_seed(1)
        measures = measure.where_the_bits_go(model, images)
    ink = images >= 252
    assert measures["ink_share"] == pytest.approx(ink.double().mean().item())
    assert measures["ink_bpd"] == pytest.approx((bits * ink).mean().item(), rel=1e-9)


def test_kinds_of_pixels():
    image = torch.zeros(28, 28, dtype=torch.uint8)
    image[5, 5], image[5, 6], image[27, 0], image[9, 9] = 251, 252, 1, 255
    kinds = measure.kinds_of_pixels(image.view(1, 784))
    square = {name: mask.view(28, 28) for name, mask in kinds.items()}
    assert square["ink"].nonzero().tolist() == [[5, 6], [9, 9]]
    assert square["rim"].nonzero().tolist() == [[5, 5], [27, 0]]
    assert square["beside"].sum() == 10 + 3 + 8  # around the pair, in the corner, around the last
    assert square["beside"][4:7, 4:8].sum() == 10
    assert (sum(mask.int() for mask in square.values()) == 1).all()


# The program
def test_measures_are_beside_the_weights_and_the_same_again(script, finished, tmp_path):
    finished(script).copy(tmp_path)
    written = []
    for _ in range(2):
        measure.main([tmp_path])
        written.append((tmp_path / "measures.json").read_bytes())
        torch.rand(5)
    assert written[0] == written[1]
    measures, (model, _, draw, _) = json.loads(written[0]), measure.load(tmp_path)
    assert not any(module.training for module in model.modules())
    images = draw(model, 4)
    assert images.shape == (4, 784)
    assert 0 <= images.min() < 0.5 < images.max() <= 1
    n = sum(parameter.numel() for parameter in model.parameters())
    assert measures["parameters"] == n + 533_505 * (script is GAN)
    assert (measures["sample_ms"], measures["samples"]) == (1, 50)
    assert sum(measures["digit_shares"]) == pytest.approx(1)
    sha256 = hashlib.sha256((tmp_path / "weights.pt").read_bytes()).hexdigest()
    assert measures["weights_sha256"] == sha256


@pytest.mark.parametrize("file", ["weights.pt", "summary.json"])
@pytest.mark.parametrize("damage", [pathlib.Path.unlink, lambda path: path.write_text("{")])
def test_a_folder_that_cannot_be_read_is_one_line(file, damage, finished, tmp_path, capsys):
    finished(VAE).copy(tmp_path)
    damage(tmp_path / file)
    with pytest.raises(SystemExit) as end:
        measure.main([tmp_path])
    error = capsys.readouterr().err
    assert (end.value.code, error.count("\n"), error.startswith("error: ")) == (2, 1, True)
    assert not (tmp_path / "measures.json").exists()


RUNS = ["vae", "vae_zdim2", "vae_dynamic", "gan", "nf", "nf_mixture", "nf_mixture_n_mix1"]


@pytest.mark.parametrize("name", RUNS)
@torch.no_grad()
def test_committed_weights_have_the_committed_numbers(name, monkeypatch):
    """On some of the test images, and by 100 samples, to within 4 standard errors."""
    monkeypatch.undo()  # the networks in their full size
    folder = ROOT / "results" / name
    for file in ("weights.pt", "measures.json"):
        if not (folder / file).exists():
            pytest.skip(f"results/{name} has no {file}")
    model, _, draw, _ = measure.load(folder)
    final = Results(folder).summary["final"] | json.loads((folder / "measures.json").read_text())
    images = mnist()[2].images[::20].float()
    if name.startswith("vae"):
        number, values = "test_elbo", -sum(model.losses(bmnist()[2].images[::5].float()))
    elif name == "gan":
        samples = measure.gan_images(model, final["samples"])
        (values,) = measure.parzen_log_likelihoods(images / 255, samples, [final["parzen_sigma"]])
        number = "parzen"
    else:
        number, values = "test_bpd", nf.bits_per_dim(model(images))
    stderr = math.hypot(scipy.stats.sem(values), final[f"{number}_stderr"])
    assert values.mean().item() == pytest.approx(final[number], abs=4 * stderr)
    share = final["agreement"]
    judged, _ = measure.yardstick(draw(model, 100))
    assert judged["agreement"] == pytest.approx(share, abs=4 * (share * (1 - share) / 100) ** 0.5)
