"""The flow: its inverse, log-determinant and density against independent sources, its training."""

import functools
import json
import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from conftest import ROOT, few, jacobian, run, train_plainly, way_off, zeros

import a3_gan_template as gan
import a3_nf_template as nf
import runs
from datasets.mnist import mnist

N_PIXELS = 16  # of the small flows
CHECKERBOARD = ((torch.arange(4)[:, None] + torch.arange(4)) % 2 == 0).float().view(1, -1)
MASKS = {"checkerboard": CHECKERBOARD, "other half": 1 - CHECKERBOARD,
         "uneven": (torch.arange(N_PIXELS) < 5).float().view(1, -1)}  # fmt: skip
precisions = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)]
)


@pytest.fixture(scope="module")
def images():
    """Real images, `[60, 784]`, with pixels 0..255."""
    return mnist()[2].images[:60].float()


def randomize(module, scale=1.0):
    """Moves all weights away from the identity start; returns the module."""
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter.shape[1] if parameter.dim() > 1 else 4
            parameter.normal_(0, scale / fan_in**0.5)
    return module


@pytest.fixture
def model_of(monkeypatch):
    """`model_of(mask)` is a Model of as many pixels as the mask, its couplings narrow."""

    def make(mask):
        with monkeypatch.context() as patch:
            patch.setattr(nf, "get_mask", lambda: mask)
            patch.setattr(nf, "Coupling", functools.partial(nf.Coupling, n_hidden=24))
            return nf.Model(shape=[mask.numel()])

    return make


def assert_inverse(function, z, tolerance):
    """Asserts that reverse after forward gives back the input, and a log-determinant of zero."""
    there, ldj = function(z, zeros(z))
    back, rest = function(there, ldj, reverse=True)
    assert ldj.shape == (len(z),)
    assert ldj.dtype == rest.dtype == back.dtype == z.dtype
    assert (back - z).abs().max() <= tolerance * z.abs().max()
    assert rest.abs().max() <= tolerance * ldj.abs().max().clamp(min=1)
    return there, ldj


# ------------------------ Prior, mask and couplings ------------------------
def test_prior_is_the_standard_normal():
    x = torch.linspace(-9, 9, 50, dtype=torch.float64)
    np.testing.assert_allclose(nf.log_prior(x), scipy.stats.norm.logpdf(x), rtol=1e-12)
    assert scipy.stats.kstest(nf.sample_prior((40, 50)).flatten(), "norm").pvalue > 1e-3


def test_flow_is_four_pairs_of_couplings_of_a_checkerboard_and_its_opposite():
    mask = nf.get_mask()
    assert (mask.shape, mask.dtype) == ((1, 784), torch.float32)
    assert np.array_equal(mask.view(28, 28), 1 - np.indices((28, 28)).sum(axis=0) % 2)
    masks = torch.cat([layer.mask for layer in nf.Flow([784]).layers])
    assert torch.equal(masks, torch.cat([mask, 1 - mask]).repeat(4, 1))
    assert len(nf.Flow([784], n_flows=1).layers) == 2


@precisions
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_coupling_starts_as_the_identity_and_is_undone_by_its_reverse(mask, dtype, tolerance):
    z = 3 * torch.randn(20, N_PIXELS, dtype=dtype)
    coupling = nf.Coupling(N_PIXELS, mask, n_hidden=24).to(dtype)
    for reverse in (False, True):
        moved, ldj = coupling(z, zeros(z), reverse)
        assert torch.equal(moved, z)
        assert torch.equal(ldj, zeros(z))
    assert not coupling.log_bound.any()  # the log-scales within [-1, 1]
    moved, _ = assert_inverse(randomize(coupling), z, tolerance)
    assert torch.equal((moved != z).any(dim=0), mask[0] == 0)  # it changes these pixels alone


def test_scales_and_shifts_stay_within_their_bounds():
    """A network that is far off scales by exp(+-b) and shifts by +-8 at most."""
    coupling = randomize(nf.Coupling(N_PIXELS, CHECKERBOARD, n_hidden=24), scale=100)
    coupling.log_bound.data.fill_(math.log(2))
    z = torch.zeros(50, N_PIXELS)
    z[:, CHECKERBOARD[0] == 1] = torch.randn(50, 8)
    shifted, ldj = coupling(z, zeros(z))
    assert (shifted - z).abs().max().item() == pytest.approx(8)
    assert 8 < ldj.abs().max() <= 16  # eight pixels, b = 2


# ------------------------ Flow and model ------------------------
@precisions
def test_model_is_undone_by_its_reverse_and_decodes_into_the_pixels_range(images, dtype, tolerance):
    model = nf.Model([784])
    for layer in model.flow.layers:  # away from the identity, by scales that keep z of one size
        torch.nn.init.normal_(layer.nn[-1].weight, std=0.02)
    assert_inverse(model.logit_normalize, images.to(dtype) + 0.5, tolerance)
    _, ldj = assert_inverse(model.to(dtype).flow, torch.randn(20, 784, dtype=dtype), tolerance)
    assert ldj.abs().mean() > 1
    ends = torch.tensor([[0.0, 256.0, 1e-3, 255.999]], dtype=dtype)
    logits, ldj = model.logit_normalize(ends, zeros(ends))
    assert ldj.isfinite()
    assert logits[0, 0].item() == pytest.approx(-math.log(2e5 - 1), rel=1e-5)  # alpha is 1e-5
    far = model.decode(99 * torch.randn(20, 784, dtype=dtype))
    assert (far.min(), far.max()) == (0, 256)


def test_dequantization_is_uniform_over_an_interval_of_length_1(images):
    noise = nf.Model([784]).dequantize(images.double()) - images
    assert scipy.stats.kstest(noise[:5].flatten(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_log_px_follows_the_change_of_variables(model_of, mask):
    """The density by the full Jacobian of pixels to latents, for random weights."""
    model = randomize(model_of(mask), scale=0.7).double()
    model.dequantize = lambda z: z
    pixels = (256 * torch.rand(3, N_PIXELS)).double()
    for x, log_px in zip(pixels, model(pixels), strict=True):
        z, _ = model.encode(x[None])
        slopes = jacobian(lambda x, _: model.encode(x), x[None])
        exact = scipy.stats.norm.logpdf(z.detach()).sum()
        exact += torch.linalg.slogdet(slopes).logabsdet.item()
        assert log_px.item() == pytest.approx(exact, rel=1e-9)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
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


@torch.no_grad()
def test_committed_weights_give_the_committed_test_bits():
    """So networks, data and loss are those that it was published for."""
    folder, test = ROOT / "results" / "nf", mnist()[2]
    model = nf.Model([784]).eval()
    model.load_state_dict(torch.load(folder / "weights.pt"))
    bits = nf.bits_per_dim(model(test.images[::25].float()))
    final = json.loads((folder / "summary.json").read_text())["final"]
    assert bits.mean().item() == pytest.approx(final["test_bpd"], abs=0.05)  # of 400 images


# ------------------------ Training ------------------------
def test_training_is_that_of_a_plain_loop(float64, monkeypatch, tmp_path):
    """Gradients clipped to 0.01, AdamW with a decay of all weights, warm-up and a cosine."""
    monkeypatch.setattr(runs, "save_figure", lambda *args: None)
    out = run(nf, tmp_path, epochs=3, seed=5, lr=4e-3, weight_decay=0.2)

    monkeypatch.setattr(nf, "Coupling", functools.partial(nf.Coupling, n_hidden=32))
    torch.manual_seed(5)
    data, model = few(mnist)(batch_size=20), nf.Model([784])
    start = [weight.clone() for weight in model.parameters()]
    adamw = torch.optim.AdamW(model.parameters(), weight_decay=0.2)
    rates = np.repeat([0.002, 0.003, 0.001], 3)  # half of 0.004, then a cosine's 3/4 and 1/4
    rows, test_bpd = train_plainly(model, [adamw], rates, data)
    checkpoint = torch.load(tmp_path / "checkpoint.pt")
    found = [checkpoint["history"][name] for name in ("train_bpd", "val_bpd")]
    np.testing.assert_allclose(np.transpose(found), rows, rtol=1e-9)
    assert f"\ntest_bpd {test_bpd:.3f}\n" in out
    found = [checkpoint["parts"]["model"][name] for name, _ in model.named_parameters()]
    assert way_off(start, model.parameters(), found) < 1e-9
    for name, weight in torch.load(tmp_path / "weights.pt").items():
        assert torch.equal(weight, checkpoint["parts"]["model"][name].half())


# ------------------------ Figures ------------------------
def test_interpolation_goes_on_an_arc_of_latents_from_image_to_image(model_of, images, monkeypatch):
    shown = []
    monkeypatch.setattr(runs, "save_images", lambda images, *_, nrow: shown.append((images, nrow)))
    model = randomize(model_of(nf.get_mask()), scale=0.3).double()
    nf.save_interpolation(model, images[[0, 1]].double(), "interpolation.png")
    model.decode = lambda z: 256 * z
    nf.save_interpolation(model, images[[0, 1]].double(), "interpolation.png")
    (steps, nrow), (z, _) = shown
    assert nrow == len(steps) == 9
    noise = 256 * steps[[0, -1]] - images[[0, 1]]
    assert ((noise > -0.05) & (noise < 1.05)).all()  # of dequantization
    torch.testing.assert_close(z, gan.interpolate(z[0], z[-1]), rtol=1e-4, atol=1e-4)


def test_interpolation_is_between_the_first_test_images_of_two_digits(finished):
    test = few(mnist)()[2]
    other = next(i for i, label in enumerate(test.labels) if label != test.labels[0])
    ends = finished(nf).images["interpolation.png"][[0, -1]]
    noise = 256 * ends - test.images[[0, other]]
    assert ((noise > -0.1) & (noise < 1.1)).all()
