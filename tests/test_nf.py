"""The flow: its inverse, its log-determinant and density against independent sources, training."""

import copy
import functools
import itertools
import math

import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch
from conftest import NF, SAMPLES, Results, committed, small, stop_in, way_off

import a3_nf_template as nf
from datasets.mnist import mnist

# Of the couplings that keep all pixels, or none.
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
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
        coupling = functools.partial(nf.Coupling, n_hidden=n_hidden)
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


def assert_jacobian(function, z):
    """Assert that the log-determinant is that of autograd's full Jacobian, image by image."""
    assert z.dtype == torch.float64
    _, ldj = function(z, zeros(z))
    for row, value in zip(z, ldj, strict=True):
        jacobian = torch.autograd.functional.jacobian(
            lambda x: function(x[None], zeros(x[None]))[0][0], row
        )
        exact = torch.linalg.slogdet(jacobian).logabsdet
        assert value.item() == pytest.approx(exact.item(), rel=1e-9, abs=1e-9)
        assert abs(exact) > 1e-3  # a log-determinant that is not trivially zero


# ------------------------ Prior and mask ------------------------
def test_log_prior_is_scipys_normal():
    x = torch.linspace(-30, 30, 101).double()
    np.testing.assert_allclose(nf.log_prior(x), scipy.stats.norm.logpdf(x.numpy()), rtol=1e-12)


def test_sample_prior_is_standard_normal():
    z = nf.sample_prior((40, 50))
    assert z.shape == (40, 50)
    assert scipy.stats.kstest(z.flatten().numpy(), "norm").pvalue > 1e-3


def test_mask_is_a_checkerboard_that_starts_with_one():
    rows = [[float((row + column) % 2 == 0) for column in range(28)] for row in range(28)]
    assert torch.equal(nf.get_mask(), torch.tensor(rows).view(1, 784))


# ------------------------ Coupling ------------------------
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_coupling_is_undone_by_its_reverse(mask, dtype, tolerance):
    """And at first it is the identity."""
    z = 3 * torch.randn(20, N_PIXELS, dtype=dtype)
    coupling = nf.Coupling(N_PIXELS, mask, n_hidden=24).to(dtype)
    for reverse in (False, True):
        moved, ldj = coupling(z, zeros(z), reverse)
        assert torch.equal(moved, z)
        assert torch.equal(ldj, zeros(z))
    moved, ldj = assert_inverse(randomize(coupling), z, tolerance)
    assert torch.equal((moved != z).any(dim=0), mask[0] == 0)  # changes these pixels alone
    assert not mask.all() or torch.equal(ldj, zeros(z))


@pytest.mark.parametrize("mask", [MASKS["checkerboard"], MASKS["uneven"], MASKS["all zeros"]])
def test_couplings_log_determinant_is_that_of_the_full_jacobian(mask):
    coupling = randomize(nf.Coupling(N_PIXELS, mask, n_hidden=24)).double()
    assert_jacobian(coupling, torch.randn(3, N_PIXELS).double())


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


# ------------------------ Flow ------------------------
def test_flow_is_four_pairs_of_couplings_with_opposite_masks():
    flow = nf.Flow([784])
    masks = [layer.mask for layer in flow.layers]
    assert len(masks) == 8
    assert all(torch.equal(mask, nf.get_mask()) for mask in masks[::2])
    assert all(torch.equal(mask, 1 - nf.get_mask()) for mask in masks[1::2])
    assert list(flow.z_shape) == [784]
    assert len(nf.Flow([784], n_flows=1).layers) == 2


@pytest.mark.parametrize(("shape", "coupling", "words"), [
    ([784], "additive", "additive.*affine.*mixture"), ([3072], "affine", "3072.*784"),
    ([100], "affine", "100.*784"), ([3072], "mixture", "3072.*3025"),
])  # fmt: skip
def test_a_coupling_or_shape_that_does_not_fit_is_a_value_error(shape, coupling, words):
    """It says what would."""
    with pytest.raises(ValueError, match=words):
        nf.Model(shape, coupling=coupling)


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
    assert_jacobian(flow, torch.randn(3, N_PIXELS).double())


# ------------------------ Model ------------------------
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
    assert (abs(z_high - y_high) < 1e-3) == (start == "identity")


@pytest.mark.parametrize("value", [0.0, 255.0])
def test_log_px_is_finite_for_the_blankest_images(value):
    model = nf.Model(shape=[784])
    log_px = model(torch.full((30, 784), value))
    log_px.sum().backward()
    assert log_px.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


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


# ------------------------ Training, evaluation and figures ------------------------
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
    nf.save_interpolation(model, images[[0, 1]], "interpolation.pdf")
    (steps,) = shown
    assert steps.shape == (9, 784)
    for step, image in ((steps[0], images[0]), (steps[-1], images[1])):
        assert ((step - image > -0.05) & (step - image < 1.05)).all()  # dequantized
    assert len(steps.unique(dim=0)) == 9


class TwoWeights(torch.nn.Module):
    """As many bits a pixel as the first two pixels say, weighted."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))

    def forward(self, input):
        return 784 * math.log(0.5) * (self.weight * input[:, :2]).sum(dim=1)


def test_a_step_follows_the_clipped_gradient_of_its_own_batch_alone():
    """Each of two batches asks for one of two weights to move, by a gradient of 1."""
    model, batches = TwoWeights(), [(row[None], None) for row in torch.eye(784)[:2]]
    nf.epoch_iter(model.train(), batches, torch.optim.SGD(model.parameters(), lr=1))
    assert model.weight.tolist() == pytest.approx([-0.01, -0.01], rel=1e-3)


def test_epoch_average_counts_the_last_batch_by_its_size():
    model, images = TwoWeights(), torch.rand(37, 784)
    model.weight.data = torch.tensor([1.0, 3.0])
    bpd = nf.epoch_iter(model.eval(), [(part, None) for part in images.split(10)], None)
    assert bpd == pytest.approx((images[:, 0] + 3 * images[:, 1]).mean().item(), rel=1e-6)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_is_that_of_a_plain_loop(precision, model_of, tmp_path):
    """Two epochs of three batches: clipping, Adam, warm-up and a cosine.

    On validation images that are neither shifted nor scaled.
    """
    loaders = functools.partial(small, n_batches=3)
    options = ("--precision", precision, "--seed", 5, "--lr", 0.1)
    NF.run_well(*NF.options(tmp_path, 2, *options), loaders=loaders)

    data = mnist(batch_size=20)
    loaders(data)
    torch.manual_seed(5)
    model = model_of(nf.get_mask(), n_hidden=32)
    weights = list(model.parameters())
    start = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.Adam(weights)

    def loss_of(images):
        with torch.autocast("cpu", torch.bfloat16, precision == "bfloat16"):
            return -model(images).mean() / (784 * math.log(2))

    for epoch in range(2):
        torch.manual_seed(5 * 2 + epoch + 1)
        curves = {"train_bpd": [], "val_bpd": []}
        for step, (images, _) in enumerate(data[0], 3 * epoch):
            cosine = (1 + math.cos(math.pi * step / 6)) / 2
            optimizer.param_groups[0]["lr"] = 0.1 * (step + 1) / 300 * cosine
            loss = loss_of(images)
            optimizer.zero_grad()
            loss.backward()
            norm = sum(weight.grad.square().sum() for weight in weights).sqrt()
            for weight in weights:
                weight.grad *= min(1, 0.01 / norm)
            optimizer.step()
            curves["train_bpd"].append(loss.item())
        curves["val_bpd"] = [loss_of(images).item() for images, _ in data[1]]
        row = Results(tmp_path).metrics[epoch]
        for name, values in curves.items():
            assert float(row[name]) == pytest.approx(np.mean(values), rel=1e-4)
    found = Results(tmp_path).weights
    assert way_off(start, weights, [found[name] for name, _ in model.named_parameters()]) < 1e-3


def test_test_bpd_is_that_of_the_final_weights_on_the_test_images(model_of, finished):
    data, model = mnist(batch_size=20), model_of(nf.get_mask(), n_hidden=32)
    small(data)
    model.load_state_dict(finished(NF).weights)
    bpds = []
    for loader in data[1:]:
        torch.manual_seed(0)
        bpds.append(nf.epoch_iter(model.eval(), loader, None))
    final = finished(NF).summary["final"]["test_bpd"]
    assert final == pytest.approx(bpds[1], rel=1e-5)
    assert abs(final - bpds[0]) > 1e-3


def test_automatic_precision_is_kept_on_resume(tmp_path):
    """Here it is bfloat16 at first, and would be float32 in the runs that follow."""

    def auto(precision):
        definition = "def faster_precision():\n"
        return [(definition, f"{definition}    return '{precision}'\n")]

    whole, broken, other = (Results(tmp_path / name) for name in ("whole", "broken", "other"))
    for run, precision in ((whole, "bfloat16"), (other, "float32")):
        options = NF.options(run.folder, 2, "--precision", "auto")
        NF.run_well(*options, replace=auto(precision))
        assert run.summary["final"]["precision"] == precision
    options = NF.options(broken.folder, 2, "--precision", "auto")
    assert NF.run(*options, loaders=stop_in(2), replace=auto("bfloat16")).status == 130
    NF.run_well(*options, "--resume", replace=auto("float32"))
    assert whole.metrics == broken.metrics != other.metrics
    assert broken.summary["final"] == whole.summary["final"]


def test_samples_are_drawn_from_the_weights_of_their_epoch(model_of, tmp_path):
    """The same latents each time."""
    NF.run_well(*NF.options(tmp_path, 4, "--lr", 0.1))
    run = Results(tmp_path)
    torch.manual_seed(0)
    model = model_of(nf.get_mask(), n_hidden=32)
    pictures = [run.pictures(name)[0] for name in SAMPLES]
    for picture, weights in ((pictures[0], model.state_dict()), (pictures[2], run.weights)):
        model.load_state_dict(weights)
        torch.manual_seed(0)
        images = model.sample(25).view(25, 28, 28) / 256
        assert picture.shape == (5 * 29 + 1, 5 * 29 + 1)
        np.testing.assert_allclose(picture[1:29, 30:58], images[1], atol=1e-4)
        np.testing.assert_allclose(picture[117:145, 117:145], images[24], atol=1e-4)
    for one, other in itertools.combinations(pictures, 2):
        assert abs(one - other).max() > 0.01


@pytest.mark.parametrize(("coupling", "lr"), [("affine", 2e-3), ("mixture", 8e-3)])
def test_each_coupling_has_its_learning_rate(coupling, lr, tmp_path):
    NF.run_well(*NF.options(tmp_path, 1, "--coupling", coupling))
    (group,) = Results(tmp_path).checkpoint["parts"]["optimizer"]["param_groups"]
    assert (group["initial_lr"], group["weight_decay"]) == (lr, 0)
    before, after = (Results(tmp_path).pictures(f"samples_{n}")[0] for n in ("before", "after"))
    assert abs(before - after).max() > 1e-3  # samples are drawn through both


@pytest.mark.parametrize("name", ["nf", "nf_mixture"])
def test_committed_weights_have_the_committed_numbers(name):
    """On every twentieth test image, to within 4 standard errors of a mean over so many."""
    options, final, weights = committed(name)
    model = nf.Model(shape=[784], coupling=options["coupling"])
    model.load_state_dict(weights)
    with torch.no_grad():
        bpd = nf.bits_per_dim(model(mnist()[2].images[::20]))
    stderr = bpd.std().item() / len(bpd) ** 0.5
    assert bpd.mean().item() == pytest.approx(final["test_bpd"], abs=4 * stderr)
