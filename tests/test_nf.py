"""The flow: its inverse, its log-determinant and density against independent sources, training."""

import functools
import math
import re

import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch
from conftest import NF, Results, jacobian, small, stop_in, way_off, zeros

import a3_nf_template as nf
from datasets.mnist import mnist

# Of the couplings that keep all pixels, or none.
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
N_PIXELS = 16  # of the small flows
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
        exact = torch.linalg.slogdet(jacobian(function, row[None])).logabsdet
        assert value.item() == pytest.approx(exact.item(), rel=1e-9, abs=1e-9)
        assert abs(exact) > 1e-3  # a log-determinant that is not trivially zero


# ------------------------ Mask ------------------------
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


def test_coupling_scales_and_shifts_as_its_network_says_of_the_kept_pixels():
    """By factors of the exponential of a tanh with a learned bound, and by at most 8."""
    coupling = randomize(nf.Coupling(N_PIXELS, MASKS["uneven"], n_hidden=24)).double()
    z = torch.randn(10, N_PIXELS).double()
    kept, pixels = z.split([5, 11], dim=1)
    s, t = coupling.nn(kept).chunk(2, dim=1)
    log_scale = torch.tanh(s) * coupling.log_bound.exp()
    expected = torch.cat([kept, pixels * log_scale.exp() + 8 * torch.tanh(t / 8)], dim=1)
    torch.testing.assert_close(coupling(z, zeros(z)), (expected, log_scale.sum(dim=1)))


def test_log_determinant_stays_float32_under_bfloat16():
    """Exactly, with a network whose output is exact in bfloat16."""
    coupling = randomize(nf.Coupling(N_PIXELS, MASKS["checkerboard"], n_hidden=24))
    with torch.no_grad():
        coupling.nn[-1].weight.zero_()
        coupling.nn[-1].bias.copy_(coupling.nn[-1].bias.bfloat16())
    z, ldj = torch.randn(50, N_PIXELS), torch.full((50,), 100.0)
    exact = coupling(z, ldj)
    with torch.autocast("cpu", torch.bfloat16):
        assert coupling.nn(z[:, ::2]).dtype == torch.bfloat16  # so the products do run in it
        result = coupling(z, ldj)
    torch.testing.assert_close(result, exact, rtol=1e-6, atol=1e-6)


# ------------------------ Flow ------------------------
def test_flow_is_four_pairs_of_couplings_with_opposite_masks():
    masks = torch.cat([layer.mask for layer in nf.Flow([784]).layers])
    assert torch.equal(masks, torch.cat([nf.get_mask(), 1 - nf.get_mask()]).repeat(4, 1))
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
    p = 1e-5 / 2 + (1 - 1e-5) * pixels.numpy() / 256
    slopes = np.log((1 - 1e-5) / 256 / (p * (1 - p)))
    z, ldj = model.logit_normalize(pixels, zeros(pixels))
    np.testing.assert_allclose(z, scipy.special.logit(p), rtol=1e-9)
    np.testing.assert_allclose(ldj, slopes.sum(axis=1), rtol=1e-9)
    _, back = model.logit_normalize(z, zeros(z), reverse=True)
    np.testing.assert_allclose(back, -slopes.sum(axis=1), rtol=1e-9)
    assert_jacobian(model.logit_normalize, pixels[:2, :N_PIXELS])


def test_dequantize_spreads_each_pixel_evenly_over_its_unit(model_of, images):
    noise = model_of(nf.get_mask()).dequantize(images) - images
    assert ((noise >= 0) & (noise <= 1)).all()
    assert scipy.stats.kstest(noise.flatten().double().numpy(), "uniform").pvalue > 1e-3


def test_log_px_follows_the_change_of_variables(model_of):
    """A random flow: the density by the full Jacobian of pixels to latents."""
    model = randomize(model_of(MASKS["checkerboard"]), scale=0.7).double()
    model.dequantize = lambda z: z
    pixels = (256 * torch.rand(3, N_PIXELS)).double()
    for x, log_px in zip(pixels, model(pixels), strict=True):
        z, _ = model.encode(x[None])
        slopes = jacobian(lambda x, _: model.encode(x), x[None])
        exact = scipy.stats.norm.logpdf(z.detach().numpy()).sum()
        exact += torch.linalg.slogdet(slopes).logabsdet.item()
        assert log_px.item() == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("value", [0.0, 255.0])
def test_log_px_is_finite_for_the_blankest_images(value):
    model = nf.Model(shape=[784])
    log_px = model(torch.full((30, 784), value))
    log_px.sum().backward()
    assert log_px.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_density_integrates_to_one_and_samples_are_drawn_from_it(model_of):
    """Over the pixel of a one-pixel model, whose density is steep at both ends."""
    model = model_of(torch.ones(1, 1)).double()
    model.dequantize = lambda z: z
    with torch.no_grad():
        for layer in model.flow.layers:
            layer.nn[-1].bias.normal_()
        pixels = 256 * torch.linspace(-16, 16, 20_001).double().sigmoid()
        density = model(pixels[:, None]).exp()
        samples = model.float().sample(3000).flatten()
    cdf = scipy.integrate.cumulative_trapezoid(density, pixels, initial=0)
    assert cdf[-1] == pytest.approx(1, abs=1e-4)
    assert scipy.stats.kstest(np.interp(samples, pixels, cdf), "uniform").pvalue > 1e-3


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


@pytest.mark.parametrize(("coupling", "precision", "max_norm"), [
    ("affine", "float32", 1e3), ("affine", "bfloat16", 0.01), ("mixture", "float32", 0.01),
    ("mixture", "float32", 1e3),
])  # fmt: skip
def test_training_is_that_of_a_plain_loop(coupling, precision, max_norm, monkeypatch, tmp_path):
    """Two epochs of two and a half batches: clipping, AdamW, Muon, warm-up and a cosine.

    Once clipped as in the script, once hardly: there a gradient kept from the last batch shows.
    """
    loaders = functools.partial(small, n_batches=2.5)
    options = ("--coupling", coupling, "--precision", precision, "--seed", 5, "--lr", 0.1)
    replace = [("MAX_GRAD_NORM = 0.01", f"MAX_GRAD_NORM = {max_norm}")]
    NF.run_well(*NF.options(tmp_path, 2, *options), loaders=loaders, replace=replace)

    data = mnist(batch_size=20)
    loaders(data)
    torch.manual_seed(5)
    monkeypatch.setattr(nf, "Coupling", functools.partial(nf.Coupling, n_hidden=32))
    monkeypatch.setattr(nf, "ConvNet", functools.partial(nf.ConvNet, c_hidden=4))
    model = nf.Model([784], coupling)
    weights = dict(model.named_parameters())
    start = {name: weight.detach().clone() for name, weight in weights.items()}
    hidden = [name for name in weights if re.search(r"blocks\.\d+\.[24]\.weight", name)]
    others = [name for name in weights if name not in hidden]
    decay = 0 if hidden else 0.3
    optimizers = [torch.optim.AdamW([weights[name] for name in others], weight_decay=decay)]
    if coupling == "mixture":
        settings = {"weight_decay": 0, "ns_steps": 3, "adjust_lr_fn": "match_rms_adamw"}
        optimizers.append(torch.optim.Muon([weights[name] for name in hidden], **settings))

    def loss_of(images):
        with torch.autocast("cpu", torch.bfloat16, precision == "bfloat16"):
            return -model(images).mean() / (784 * math.log(2))

    for epoch in range(2):
        torch.manual_seed(5 * 2 + epoch + 1)
        bits = {"train_bpd": 0, "val_bpd": 0}
        for step, (images, _) in enumerate(data[0], 3 * epoch):
            cosine = (1 + math.cos(math.pi * step / 6)) / 2
            loss = loss_of(images)
            model.zero_grad()
            loss.backward()
            norm = sum(weight.grad.square().sum() for weight in weights.values()).sqrt()
            for weight in weights.values():
                weight.grad *= min(1, max_norm / norm)
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = 0.1 * (step + 1) / 300 * cosine
                optimizer.step()
            bits["train_bpd"] += loss.item() * len(images) / 50
        for images, _ in data[1]:
            bits["val_bpd"] += loss_of(images).item() * len(images) / 50
        row = Results(tmp_path).metrics[epoch]
        assert {name: float(row[name]) for name in bits} == pytest.approx(bits, rel=1e-4)
    for names in filter(None, (others, hidden)):  # apart, since Muon's way is the shorter one
        parts = (
            [part[name] for name in names] for part in (start, weights, Results(tmp_path).weights)
        )
        assert way_off(*parts) < 1e-3
    assert nf.warm_up_and_decay(600, 1200) == pytest.approx(0.5)  # later than the steps above


def test_automatic_precision_is_kept_on_resume(tmp_path):
    """Here it is bfloat16 at first, and would be float32 when the run is resumed.

    With mixture couplings, so that of these, too, all that trains is resumed.
    """

    def auto(precision):
        definition = "def faster_precision():\n"
        return [(definition, f"{definition}    return '{precision}'\n")]

    run, fixed = Results(tmp_path / "auto"), Results(tmp_path / "fixed")
    options = NF.options(run.folder, 2, "--coupling", "mixture", "--precision", "auto")
    assert NF.run(*options, loaders=stop_in(2), replace=auto("bfloat16")).status == 130
    NF.run_well(*options, "--resume", replace=auto("float32"))
    options = ("--coupling", "mixture", "--precision", "bfloat16")
    NF.run_well(*NF.options(fixed.folder, 2, *options))
    assert run.metrics == fixed.metrics
    assert run.summary["final"] == fixed.summary["final"]


@pytest.mark.parametrize(("coupling", "batch_size", "lr", "decay"), [
    ("affine", 128, 1e-3, 0.3), ("mixture", 64, 8e-3, 0),
])  # fmt: skip
def test_each_coupling_has_its_batch_size_and_rates(coupling, batch_size, lr, decay, tmp_path):
    assert NF.arguments("--coupling", coupling).batch_size == batch_size
    NF.run_well(*NF.options(tmp_path, 1, "--coupling", coupling))
    parts = Results(tmp_path).checkpoint["parts"]
    optimizers = [parts["optimizer"], *([parts["muon"]] if coupling == "mixture" else [])]
    for optimizer in optimizers:
        (group,) = optimizer["param_groups"]
        assert (group["initial_lr"], group["weight_decay"]) == (lr, decay)
    before, after = (Results(tmp_path).pictures(f"samples_{n}")[0] for n in ("before", "after"))
    assert abs(before - after).max() > 1e-3  # samples are drawn through both
