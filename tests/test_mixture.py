"""The mixture coupling: inverse, log-determinant, distribution function, what a pixel may see."""

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from conftest import jacobian, zeros

import a3_nf_template as nf

SIDE = 12  # of the small images: grids of 12, 6 and 3 pixels a side
SPLITS = list(nf.nested_splits(torch.arange(SIDE**2).view(SIDE, SIDE)))[:-2]  # each one once
NAMES = [f"{len(kept)}x{len(kept)}, {kept.shape[2]} kept" for kept, _ in SPLITS]


def randomize(module):
    """Move all weights away from their start; return the module in float64."""
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(0.3 * torch.randn_like(weight) / max(weight[0].numel(), 4) ** 0.5)
    return module.double().eval()


def layer_of(split):
    """The coupling of a split, or of all of them the flow, with weights that are not zero."""
    if split == "flow":
        return randomize(nf.Flow([SIDE**2], coupling="mixture"))
    return randomize(nf.MixtureCoupling(*split))


@pytest.fixture(params=SPLITS, ids=NAMES)
def coupling(request):
    return layer_of(request.param)


@pytest.fixture(params=[*SPLITS, "flow"], ids=[*NAMES, "flow"])
def layer(request):
    return layer_of(request.param)


def pixels(n=3):
    """Like logits of pixels: most of them black."""
    return 4 * torch.randn(n, SIDE**2, dtype=torch.float64) - 4


def random_mixture(n_mix=5, n=1):
    """A coupling, and log pi, mu and log s of `n` mixtures, `[1, n_mix, n]`."""
    log_pi, mean, log_scale = torch.randn(3, 1, n_mix, n, dtype=torch.float64)
    return nf.MixtureCoupling(*SPLITS[-1]), (log_pi, 4 * mean, log_scale)


@torch.no_grad()
def test_inverse(layer):
    z = pixels()
    there, ldj = layer(z, zeros(z))
    back, rest = layer(there, ldj, reverse=True)
    assert not torch.allclose(there, z, atol=0.1)
    torch.testing.assert_close(back, z, rtol=0, atol=1e-9)
    torch.testing.assert_close(rest, zeros(z), rtol=0, atol=1e-7)


def test_log_determinant(layer):
    z = pixels(1)
    expected = torch.linalg.slogdet(jacobian(layer, z))[1].item()
    assert layer(z, zeros(z))[1].item() == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("n_mix", [1, 5])
def test_distribution_is_that_of_scipy(n_mix):
    coupling, (log_pi, mean, log_scale) = random_mixture(n_mix)
    x = torch.linspace(-40, 40, 81, dtype=torch.float64)[:, None]
    v, log_slope = coupling.logit_cdf(x, log_pi, mean, log_scale)
    weights = torch.softmax(log_pi, dim=1).flatten().numpy()
    logistics = scipy.stats.logistic(mean.flatten().numpy(), log_scale.exp().flatten().numpy())
    functions = logistics.cdf, logistics.sf, logistics.pdf
    c, not_c, density = (function(x.numpy()) @ weights for function in functions)
    np.testing.assert_allclose(v[:, 0], np.log(c / not_c), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(log_slope[:, 0], np.log(density / c / not_c), rtol=1e-9, atol=1e-9)


def test_density_integrates_to_one():
    coupling, mixture = random_mixture()

    def density(x):
        v, log_slope = coupling.logit_cdf(torch.tensor([[x]], dtype=torch.float64), *mixture)
        return (nf.log_prior(2 * v - 0.3) + log_slope).exp().item() * 2

    points = mixture[1].flatten().tolist()
    assert scipy.integrate.quad(density, -60, 60, points=points, limit=500)[0] == pytest.approx(1)


def test_bracket_holds():
    """Else bisection would end at one end of it."""
    coupling, mixture = random_mixture(n=200)
    v = torch.linspace(-40, 40, 200, dtype=torch.float64)[None]
    x = coupling.solve(v, *mixture)
    torch.testing.assert_close(coupling.logit_cdf(x, *mixture)[0], v, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reverse", [False, True])
def test_far_pixels_stay_finite(coupling, dtype, reverse):
    z = torch.full((2, SIDE**2), 40.0, dtype=dtype)
    z[1] *= -1
    z.requires_grad_()
    there, ldj = coupling.to(dtype)(z, zeros(z), reverse)
    (grad,) = torch.autograd.grad(there.sum() + ldj.sum(), z)
    assert all(tensor.isfinite().all() for tensor in (there, ldj, grad))


def test_changed_pixels_see_only_themselves_and_kept_ones(coupling):
    slopes = jacobian(coupling, pixels(1))
    kept, changed = coupling.kept.flatten(), coupling.changed
    others = torch.tensor([i not in changed for i in range(SIDE**2)])
    unseen = torch.tensor([i not in kept for i in range(SIDE**2)])
    assert torch.equal(slopes[others], torch.eye(SIDE**2, dtype=torch.float64)[others])
    assert (slopes[changed, changed] > 0).all()
    slopes.fill_diagonal_(0)
    assert not slopes[changed][:, unseen].any()
    assert slopes[changed][:, kept].any(dim=1).all()


def test_flow_predicts_each_pixel_from_raw_and_coarser_ones():
    """But for the halves of the last grid, which change twice, given each other."""
    flow = layer_of("flow")
    changed = [layer.changed for layer in flow.layers]
    assert torch.cat(changed[:-2]).sort()[0].tolist() == list(range(SIDE**2))
    assert all(map(torch.equal, changed[-2:], changed[-4:-2]))
    slopes = jacobian(flow, pixels(1))
    for i, earlier in enumerate(changed[:-4]):
        assert not slopes[torch.cat(changed[i + 1 :])][:, earlier].any()


def test_likelihood_is_float32_under_autocast():
    flow, z = layer_of("flow").float(), pixels().float()
    expected = flow(z, zeros(z))
    with torch.autocast("cpu", torch.bfloat16):
        out = flow(z, zeros(z))
    torch.testing.assert_close(out, expected, rtol=0.05, atol=0.5)  # and of the same type


@pytest.mark.parametrize("split", SPLITS, ids=NAMES)
def test_starts_as_one_gentle_map_for_all_images(split):
    """With zero last weights nothing depends on the kept pixels, and no slope is extreme."""
    z = pixels(1)
    slopes = jacobian(nf.MixtureCoupling(*split).double(), z)
    assert torch.equal(slopes, slopes.diag().diag())
    assert 0.1 < slopes.diag().min() <= slopes.diag().max() <= 1
