"""The flow: its inverse, its log-determinant and density against independent sources, training."""

import copy
import itertools
import math

import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch
from conftest import NF, Results, small

import a3_nf_template as nf
from datasets.mnist import mnist

N_PIXELS = 16  # of the small flows
ALPHA = 1e-5
CHECKERBOARD = (torch.arange(4)[:, None] + torch.arange(4)) % 2 == 0
MASKS = {
    "checkerboard": CHECKERBOARD.float().view(1, -1),
    "other half": 1 - CHECKERBOARD.float().view(1, -1),
    "uneven": (torch.arange(N_PIXELS) < 5).float().view(1, -1),
    "all ones": torch.ones(1, N_PIXELS),
    "all zeros": torch.zeros(1, N_PIXELS),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def images():
    """60 real images, pixels 0..255."""
    return mnist()[2].images[:60].float()


def randomize(module, scale=1.0):
    """Move all weights away from the identity start; return the module."""
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter.shape[1] if parameter.dim() > 1 else 4
            parameter.normal_(0, scale / max(fan_in, 1) ** 0.5)
    return module


@pytest.fixture
def model_of(monkeypatch):
    """`model_of(mask)` is a Model of as many pixels as the mask, its couplings narrow."""

    def make(mask, n_hidden=24):
        narrow, full = nf.Coupling, n_hidden

        def coupling(c_in, mask):
            return narrow(c_in, mask, n_hidden=full)

        with monkeypatch.context() as patch:
            patch.setattr(nf, "get_mask", lambda: mask)
            patch.setattr(nf, "Coupling", coupling)
            return nf.Model(shape=[mask.numel()])

    return make


@pytest.fixture
def exact_pixels(monkeypatch):
    """No dequantization noise."""
    monkeypatch.setattr(nf.Model, "dequantize", lambda self, z: z)


def zeros(z):
    return z.new_zeros(len(z))


def assert_inverse(function, z, tolerance):
    """Assert that reverse after forward gives back the input, and a log-determinant of zero."""
    there, ldj = function(z, zeros(z))
    back, rest = function(there, ldj, reverse=True)
    assert ldj.shape == (len(z),)
    assert ldj.dtype == rest.dtype == back.dtype == z.dtype
    assert (back - z).abs().max() <= tolerance * z.abs().max()
    assert rest.abs().max() <= tolerance * ldj.abs().max().clamp(min=1)
    return there, ldj


def assert_jacobian(function, z, changes=True):
    """Assert that the log-determinant is that of autograd's full Jacobian, image by image."""
    assert z.dtype == torch.float64
    _, ldj = function(z, zeros(z))
    for row, value in zip(z, ldj, strict=True):
        jacobian = torch.autograd.functional.jacobian(
            lambda x: function(x[None], zeros(x[None]))[0][0], row
        )
        exact = torch.linalg.slogdet(jacobian).logabsdet
        assert value.item() == pytest.approx(exact.item(), rel=1e-9, abs=1e-9)
        if changes:
            assert abs(exact) > 1e-3  # a log-determinant that is not trivially zero


# ---------------------------------------------------------------------------------------
# Prior and mask
# ---------------------------------------------------------------------------------------
def test_log_prior_is_scipys_normal():
    x = torch.linspace(-30, 30, 101).double()
    np.testing.assert_allclose(nf.log_prior(x), scipy.stats.norm.logpdf(x.numpy()), rtol=1e-12)


def test_sample_prior_is_standard_normal():
    z = nf.sample_prior((40, 50))
    assert z.shape == (40, 50)
    assert scipy.stats.kstest(z.flatten().numpy(), "norm").pvalue > 1e-3


def test_mask_is_a_checkerboard_that_starts_with_one():
    mask = nf.get_mask()
    assert (mask.shape, mask.dtype) == ((1, 784), torch.float32)
    for row in range(28):
        for column in range(28):
            assert mask[0, 28 * row + column] == float((row + column) % 2 == 0)


# ---------------------------------------------------------------------------------------
# Coupling
# ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_coupling_is_undone_by_its_reverse(mask, dtype, tolerance):
    coupling = randomize(nf.Coupling(N_PIXELS, mask, n_hidden=24)).to(dtype)
    z, _ = assert_inverse(coupling, 3 * torch.randn(20, N_PIXELS, dtype=dtype), tolerance)
    assert z.shape == (20, N_PIXELS)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_coupling_changes_exactly_the_pixels_that_the_mask_leaves(mask):
    coupling = randomize(nf.Coupling(N_PIXELS, mask, n_hidden=24))
    z = torch.randn(20, N_PIXELS)
    moved, ldj = coupling(z, zeros(z))
    changed = (moved != z).any(dim=0)
    assert torch.equal(changed, mask[0] == 0)
    if mask.all():
        assert torch.equal(ldj, zeros(z))


def test_coupling_reads_only_the_pixels_that_the_mask_keeps():
    """Scale and shift of a pixel that changes do not depend on the others that do."""
    mask = MASKS["uneven"]
    coupling = randomize(nf.Coupling(N_PIXELS, mask, n_hidden=24)).double()
    z = torch.randn(N_PIXELS).double()
    jacobian = torch.autograd.functional.jacobian(lambda x: coupling(x[None], zeros(x[None]))[0], z)
    among_changed = jacobian[0, 5:, 5:]
    assert torch.equal(among_changed, among_changed.diag().diag())
    assert (jacobian[0, 5:, :5] != 0).all()


@pytest.mark.parametrize("mask", [MASKS["checkerboard"], MASKS["uneven"], MASKS["all zeros"]])
def test_couplings_log_determinant_is_that_of_the_full_jacobian(mask):
    coupling = randomize(nf.Coupling(N_PIXELS, mask, n_hidden=24)).double()
    assert_jacobian(coupling, torch.randn(3, N_PIXELS).double())


def test_coupling_adds_to_the_log_determinant_it_gets():
    coupling = randomize(nf.Coupling(N_PIXELS, MASKS["uneven"], n_hidden=24))
    z, before = torch.randn(5, N_PIXELS), torch.randn(5)
    for reverse in (False, True):
        from_zero = coupling(z, zeros(z), reverse=reverse)[1]
        torch.testing.assert_close(coupling(z, before, reverse=reverse)[1], before + from_zero)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_coupling_starts_as_the_identity(mask):
    coupling, z = nf.Coupling(N_PIXELS, mask), torch.randn(5, N_PIXELS)
    for reverse in (False, True):
        moved, ldj = coupling(z, zeros(z), reverse=reverse)
        assert torch.equal(moved, z)
        assert torch.equal(ldj, zeros(z))


def test_sliced_coupling_is_the_plain_masked_one():
    """With a network over all pixels that has the same weights, and others that the mask kills."""
    mask = MASKS["uneven"]
    coupling = randomize(nf.Coupling(N_PIXELS, mask, n_hidden=24)).double()
    kept, changed = mask[0] == 1, mask[0] == 0
    first, last = torch.nn.Linear(N_PIXELS, 24), torch.nn.Linear(24, 2 * N_PIXELS)
    first, last = randomize(first).double(), randomize(last).double()
    outputs = torch.cat([changed, changed])
    with torch.no_grad():
        first.weight[:, kept] = coupling.nn[0].weight
        first.bias[:] = coupling.nn[0].bias
        last.weight[outputs] = coupling.nn[-1].weight
        last.bias[outputs] = coupling.nn[-1].bias
        bound = torch.randn(N_PIXELS).double()
        bound[changed] = coupling.log_bound
    plain = torch.nn.Sequential(first, *copy.deepcopy(coupling.nn)[1:-1], last)

    z = torch.randn(10, N_PIXELS).double()
    s, shift = plain(mask * z).chunk(2, dim=1)
    log_scale = (1 - mask) * torch.tanh(s) * bound.exp()
    expected = mask * z + (1 - mask) * (z * log_scale.exp() + shift)
    moved, ldj = coupling(z, zeros(z))
    torch.testing.assert_close(moved, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ldj, log_scale.sum(dim=1), rtol=1e-12, atol=1e-12)


def test_coupling_has_the_weights_of_the_pixels_that_count_alone():
    coupling = nf.Coupling(784, nf.get_mask())
    sizes = [tuple(layer.weight.shape) for layer in coupling.nn if hasattr(layer, "weight")]
    assert sizes == [(1024, 392), (1024, 1024), (784, 1024)]
    assert "mask" in dict(coupling.named_buffers())


def test_log_determinant_stays_float32_under_bfloat16():
    """Exactly, with a network whose output is exact in bfloat16."""
    coupling = nf.Coupling(N_PIXELS, MASKS["checkerboard"], n_hidden=24)
    randomize(coupling)
    with torch.no_grad():
        coupling.nn[-1].weight.zero_()
        coupling.nn[-1].bias.copy_(coupling.nn[-1].bias.bfloat16())
    products = []
    coupling.nn[-1].register_forward_hook(lambda *call: products.append(call[-1].dtype))
    z, ldj = torch.randn(50, N_PIXELS), torch.full((50,), 100.0)
    exact = coupling(z, ldj)
    with torch.autocast("cpu", torch.bfloat16):
        result = coupling(z, ldj)
    assert products == [torch.float32, torch.bfloat16]  # so the products did run in it
    for tensor, expected in zip(result, exact, strict=True):
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------
# Flow
# ---------------------------------------------------------------------------------------
def test_flow_is_four_pairs_of_couplings_with_opposite_masks():
    flow = nf.Flow([784])
    masks = [layer.mask for layer in flow.layers]
    assert len(masks) == 8
    assert all(torch.equal(mask, nf.get_mask()) for mask in masks[::2])
    assert all(torch.equal(mask, 1 - nf.get_mask()) for mask in masks[1::2])
    assert list(flow.z_shape) == [784]
    assert len(nf.Flow([784], n_flows=1).layers) == 2


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_flow_is_undone_by_its_reverse(dtype, tolerance):
    flow = nf.Flow([784], n_flows=2)
    for layer in flow.layers:  # away from the identity, by scales that keep z of one size
        torch.nn.init.normal_(layer.nn[-1].weight, std=0.02)
    z, ldj = assert_inverse(flow.to(dtype), torch.randn(20, 784, dtype=dtype), tolerance)
    assert z.shape == (20, 784)
    assert ldj.abs().mean() > 1


def test_flows_log_determinant_is_that_of_the_full_jacobian(model_of):
    flow = randomize(model_of(MASKS["checkerboard"]).flow, scale=0.7).double()
    assert len(flow.layers) == 8
    assert_jacobian(flow, torch.randn(3, N_PIXELS).double())


# ---------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------
def logit_of(pixels):
    """The normalization of a pixel in float64 by SciPy, and the log of its derivative."""
    p = ALPHA / 2 + (1 - ALPHA) * np.asarray(pixels, dtype=np.float64) / 256
    slope = (1 - ALPHA) / 256 / (p * (1 - p))
    return scipy.special.logit(p), np.log(slope)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_logit_normalize_is_undone_by_its_reverse(model_of, images, dtype, tolerance):
    model = model_of(nf.get_mask())
    assert_inverse(model.logit_normalize, images.to(dtype) + 0.5, tolerance)
    ends = torch.tensor([[0.0, 256.0, 1e-3, 255.999]], dtype=dtype)
    z, ldj = model.logit_normalize(ends, zeros(ends))
    assert z.isfinite().all()
    assert ldj.isfinite().all()


def test_logit_normalize_has_its_complete_log_determinant(model_of):
    """log(1 - alpha) of each pixel included: 0.00784 nats over 784 pixels, both ways."""
    model = model_of(nf.get_mask())
    pixels = (256 * torch.rand(5, 784)).double()
    y, slopes = logit_of(pixels.numpy())
    z, ldj = model.logit_normalize(pixels, zeros(pixels))
    np.testing.assert_allclose(z, y, rtol=1e-9)
    np.testing.assert_allclose(ldj, slopes.sum(axis=1), rtol=1e-9)
    _, back = model.logit_normalize(z, zeros(z), reverse=True)
    np.testing.assert_allclose(back, -slopes.sum(axis=1), rtol=1e-9)
    assert_jacobian(model.logit_normalize, pixels[:2, :N_PIXELS])


def test_dequantize_spreads_each_pixel_evenly_over_its_unit(model_of, images):
    noise = model_of(nf.get_mask()).dequantize(images) - images
    assert ((noise >= 0) & (noise <= 1)).all()
    assert scipy.stats.kstest(noise.flatten().double().numpy(), "uniform").pvalue > 1e-3


def test_log_px_at_the_identity_start_is_the_closed_form(exact_pixels, images):
    pixels = images + torch.rand_like(images)
    y, slopes = logit_of(pixels)
    exact = (scipy.stats.norm.logpdf(y) + slopes).sum(axis=1)
    with torch.no_grad():
        log_px = nf.Model(shape=[784])(pixels)
    assert log_px.shape == (60,)
    np.testing.assert_allclose(log_px, exact, rtol=1e-4)


def test_log_px_follows_the_change_of_variables(model_of, exact_pixels):
    """A random flow: the density by the full Jacobian of pixels to latents."""
    model = randomize(model_of(MASKS["checkerboard"]), scale=0.7).double()
    pixels = (256 * torch.rand(3, N_PIXELS)).double()
    for x, log_px in zip(pixels, model(pixels), strict=True):
        z, _ = model.encode(x[None])
        jacobian = torch.autograd.functional.jacobian(lambda x: model.encode(x[None])[0][0], x)
        exact = scipy.stats.norm.logpdf(z.detach().numpy()).sum()
        exact += torch.linalg.slogdet(jacobian).logabsdet.item()
        assert log_px.item() == pytest.approx(exact, rel=1e-9)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("start", ["identity", "random"])
def test_the_density_of_a_one_pixel_model_integrates_to_one(start, model_of, exact_pixels):
    model = model_of(torch.ones(1, 1)).double()
    if start == "random":
        randomize(model, scale=0.5)
    model.requires_grad_(False)

    def density(pixel):
        return model(torch.tensor([[pixel]], dtype=torch.float64)).exp().item()

    ends = torch.tensor([[0.0], [256.0]], dtype=torch.float64)
    z_low, z_high = model.encode(ends)[0].flatten().tolist()
    share = scipy.stats.norm.cdf(z_high) - scipy.stats.norm.cdf(z_low)  # alpha keeps tails out
    assert share > 0.999
    edges = [0, 1e-3, 0.1, 1, 20, 128, 236, 255, 255.9, 255.999, 256]
    parts = [scipy.integrate.quad(density, *ab)[0] for ab in itertools.pairwise(edges)]
    assert sum(parts) == pytest.approx(share, abs=1e-6)
    y_high, _ = logit_of(256)
    assert (abs(z_high - y_high) < 1e-9) == (start == "identity")


@pytest.mark.parametrize("trained", [False, True])
def test_uniform_noise_costs_no_less_than_8_bits(trained, images):
    model = nf.Model(shape=[784])
    if trained:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        batches = [(part, None) for part in images.split(20)] * 2
        before = nf.epoch_iter(model.eval(), batches, optimizer)
        nf.epoch_iter(model.train(), batches, optimizer)
        assert nf.epoch_iter(model.eval(), batches, optimizer) < before
    noise = torch.randint(256, (60, 784)).float()
    with torch.no_grad():
        assert nf.bits_per_dim(model(noise)).mean() >= 8


@pytest.mark.parametrize("value", [0.0, 255.0])
def test_log_px_is_finite_for_the_blankest_images(value):
    model = nf.Model(shape=[784])
    log_px = model(torch.full((30, 784), value))
    log_px.sum().backward()
    assert log_px.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_sample_gives_images_within_the_pixels_range(model_of):
    model = randomize(model_of(nf.get_mask()), scale=0.7)
    images = model.sample(50)
    assert images.shape == (50, 784)
    assert images.min() >= 0
    assert images.max() <= 256
    assert (images == 0).any()
    assert (images == 256).any()  # latents beyond the ends
    assert not images.requires_grad


def test_sample_draws_from_the_density_that_forward_gives(model_of, exact_pixels):
    """The samples of a one-pixel model against the integral of its density."""
    model = model_of(torch.ones(1, 1)).double()
    with torch.no_grad():
        for layer in model.flow.layers:
            layer.nn[-1].bias.normal_()
        samples = model.to(torch.float32).sample(3000).double().flatten()
        grid = torch.linspace(0, 256, 20_001).double()
        density = model.double()(grid[:, None]).exp().numpy()
    cdf = scipy.integrate.cumulative_trapezoid(density, grid.numpy(), initial=0)
    shares = np.interp(samples.numpy(), grid.numpy(), cdf)
    assert scipy.stats.kstest(shares, "uniform").pvalue > 1e-3


# ---------------------------------------------------------------------------------------
# Training and evaluation
# ---------------------------------------------------------------------------------------
class Constant(torch.nn.Module):
    """A model that gives an image 784 ln 2 times the negative of its first pixel in nats."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, input):
        return -784 * math.log(2) * self.weight * input[:, 0]


def batches_of(images, size):
    return [(part, torch.zeros(len(part))) for part in images.split(size)]


def test_bits_per_dim_of_a_fair_coin_a_pixel_is_one():
    assert nf.bits_per_dim(torch.tensor(784 * math.log(0.5))).item() == pytest.approx(1)


@pytest.mark.parametrize("training", [True, False])
def test_epoch_average_counts_the_last_batch_by_its_size(training):
    images = torch.rand(5, 784)
    model = Constant().train(training)
    optimizer = torch.optim.SGD(model.parameters(), lr=0)
    bpd = nf.epoch_iter(model, batches_of(images, 2), optimizer)
    assert bpd == pytest.approx(images[:, 0].mean().item(), rel=1e-6)


def test_training_changes_weights_and_evaluation_does_not(model_of, images):
    model, data = model_of(nf.get_mask()), batches_of(images, 20)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    before = [p.clone() for p in model.parameters()]
    nf.epoch_iter(model.eval(), data, optimizer)
    assert all(map(torch.equal, before, model.parameters()))
    nf.epoch_iter(model.train(), data, optimizer)
    assert not any(map(torch.equal, before, model.parameters()))


def test_a_step_follows_the_gradient_of_its_own_batch_alone():
    """Each of two batches asks for one of two weights to move."""

    class TwoWeights(Constant):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(2))

        def forward(self, input):
            return -784 * math.log(2) * (self.weight * input[:, :2]).sum(dim=1)

    model = TwoWeights()
    batches = batches_of(torch.eye(784)[:2], 1)
    nf.epoch_iter(model.train(), batches, torch.optim.SGD(model.parameters(), lr=1))
    first, second = model.weight.tolist()
    assert first == pytest.approx(second)
    assert first < 0


def test_run_epoch_trains_then_validates_what_it_has_trained(model_of, images):
    model = model_of(nf.get_mask())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    data = batches_of(images, 10)
    curve = [nf.run_epoch(model, (data, data), optimizer) for _ in range(2)]
    (train_1, val_1), (train_2, val_2) = curve
    assert val_2 < train_2 < val_1 < train_1  # a training average is older than what follows
    assert not model.training


def test_test_bits_per_dim_and_its_standard_error():
    images = torch.rand(37, 784)
    bpd, stderr = nf.test_bits_per_dim(Constant(), batches_of(images, 10))
    assert bpd == pytest.approx(images[:, 0].mean().item(), rel=1e-6)
    assert stderr == pytest.approx(scipy.stats.sem(images[:, 0].numpy()), rel=1e-5)


# ---------------------------------------------------------------------------------------
# Figures and the script
# ---------------------------------------------------------------------------------------
def test_bpd_plot_shows_both_curves_and_the_target(monkeypatch):
    saved = []
    monkeypatch.setattr(nf, "save_figure", lambda figure, name: saved.append(figure))
    nf.save_bpd_plot([2.5, 2.0, 1.8], [2.3, 1.9, 1.7], "bpd.pdf")
    lines = [line.get_ydata() for line in saved[0].axes[0].get_lines()]
    nf.plt.close(saved[0])
    assert [list(line) for line in lines] == [[2.5, 2.0, 1.8], [2.3, 1.9, 1.7], [1.85, 1.85]]


def test_interpolation_starts_and_ends_at_the_two_images(model_of, images, monkeypatch):
    shown = []
    monkeypatch.setattr(nf, "save_images", lambda images, *args, **kwargs: shown.append(images))
    model = randomize(model_of(nf.get_mask()), scale=0.3)
    nf.save_interpolation(model, images[[0, 1]], "interpolation.pdf", "from 7 to 2")
    (steps,) = shown
    assert steps.shape == (9, 784)
    for step, image in ((steps[0], images[0]), (steps[-1], images[1])):
        assert ((step - image > -0.05) & (step - image < 1.05)).all()  # dequantized
    assert len(steps.unique(dim=0)) == 9


def test_interpolation_of_the_script_is_between_two_digits(finished):
    numbers = (finished(NF).folder / "numbers.tex").read_text()
    digits = nf.re.findall(r"\\NfDigit(?:From|To)\}\{(\d)\}", numbers)
    assert len(set(digits)) == 2


def test_test_images_are_neither_shifted_nor_scaled(tmp_path):
    """An untrained model's bits/dim on the test set against the closed form on its pixels."""
    n, kept = 40, []

    def loaders(make):
        def loaders(*args, **kwargs):
            kept.extend(small(make)(*args, **kwargs))
            return kept

        return loaders

    end = NF.main(*NF.options(tmp_path, 1), "--lr", 1e-12, loaders=loaders)
    assert (end.status, end.err) == (0, "")
    for loader, name in ((kept[2], "test_bpd"), (kept[1], "val_bpd")):
        assert loader.images.max() == 255
        pixels = loader.images[:n].double().numpy()
        # The mean over the noise, pixel by pixel, on a grid of it.
        noise = (np.arange(2000) + 0.5) / 2000
        table = np.array([
            np.mean(np.sum([scipy.stats.norm.logpdf(y), slope], axis=0))
            for y, slope in (logit_of(grey + noise) for grey in range(256))
        ])  # fmt: skip
        exact = -table[pixels.astype(int)].sum(axis=1).mean() / (784 * math.log(2))
        final = Results(tmp_path).summary["final"]
        assert final[name] == pytest.approx(exact, abs=0.05)
