"""The mixture coupling: inverse, log-determinant, distribution function, what a pixel may see."""

import functools
import math
import re

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from conftest import MIXTURE, Results, jacobian, train_plainly, way_off, zeros

import a3_nf_template as nf
from extension import mixture_flow
from extension.mixture_flow import MixtureCoupling, nested_splits

SIDE = 12  # of the small images: grids of 12, 6 and 3 pixels a side
SPLITS = list(nested_splits(torch.arange(SIDE**2).view(SIDE, SIDE)))[:-2]  # each one once
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
        flow = nf.Flow([784], n_flows=0)
        splits = nested_splits(torch.arange(SIDE**2).view(SIDE, SIDE))
        flow.layers.extend(MixtureCoupling(*split) for split in splits)
        return randomize(flow)
    return randomize(MixtureCoupling(*split))


@pytest.fixture(params=SPLITS, ids=NAMES)
def coupling(request):
    return layer_of(request.param)


def pixels(n=3):
    """Like logits of pixels: most of them black."""
    return 4 * torch.randn(n, SIDE**2, dtype=torch.float64) - 4


@pytest.mark.parametrize("split", [*SPLITS, "flow"], ids=[*NAMES, "flow"])
def test_inverse_and_log_determinant(split):
    layer, z = layer_of(split).requires_grad_(False), pixels()
    there, ldj = layer(z, zeros(z))
    back, rest = layer(there, ldj, reverse=True)
    assert not torch.allclose(there, z, atol=0.1)
    torch.testing.assert_close(back, z, rtol=0, atol=1e-9)
    torch.testing.assert_close(rest, zeros(z), rtol=0, atol=1e-7)
    expected = torch.linalg.slogdet(jacobian(layer, z[:1]))[1].item()
    assert ldj[0].item() == pytest.approx(expected, abs=1e-8)


@torch.no_grad()
def test_inverse_in_float32_loses_digits_only_where_the_map_is_flat(coupling):
    """Off by what float32 leaves of v = logit(C(x)), over its slope: there x hardly changes v."""
    z = pixels(200).float()
    there, _ = coupling.float()(z, zeros(z))
    back, _ = coupling(there, zeros(z), reverse=True)
    *mixture, _, _ = coupling.predict(z)
    v, log_slope = coupling.logit_cdf(z[:, coupling.changed], *mixture)
    error = abs(back - z)[:, coupling.changed] * log_slope.exp()
    assert (error / (1 + v.abs() + z[:, coupling.changed].abs())).max() < 1e-5


@pytest.mark.parametrize("n_mix", [1, 5])
def test_distribution_is_that_of_scipy(n_mix):
    log_pi, mean, log_scale = torch.randn(3, 1, n_mix, 1, dtype=torch.float64)
    log_pi, mean = log_pi.log_softmax(1), 4 * mean
    x = torch.linspace(-40, 40, 81, dtype=torch.float64)[:, None]
    v, log_slope = MixtureCoupling(*SPLITS[-1]).logit_cdf(x, log_pi, mean, log_scale)
    weights = log_pi.exp().flatten().numpy()
    logistics = scipy.stats.logistic(mean.flatten().numpy(), log_scale.exp().flatten().numpy())
    functions = logistics.cdf, logistics.sf, logistics.pdf
    c, not_c, density = (function(x.numpy()) @ weights for function in functions)
    np.testing.assert_allclose(v[:, 0], np.log(c / not_c), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(log_slope[:, 0], np.log(density / c / not_c), rtol=1e-9, atol=1e-9)


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
    assert changed[-1].tolist() == [0, 8, 52, 96, 104]  # the corners and the middle
    assert [first[0].item() for first in changed[:3]] == [SIDE, 1, SIDE + 1]  # c, b and d
    slopes = jacobian(flow, pixels(1))
    for i, earlier in enumerate(changed[:-4]):
        assert not slopes[torch.cat(changed[i + 1 :])][:, earlier].any()


@pytest.mark.parametrize("fast", [True, False])
def test_training_alone_is_in_bfloat16_where_the_processor_has_it(fast, monkeypatch):
    """And there the likelihood stays float32."""
    for name in ("avx512_bf16", "amx_bf16") if fast else ("avx512_f", "amx_int8"):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda name=name: {name: True})
        assert mixture_flow.has_bfloat16(torch.device("cpu")) == fast
    coupling, z = layer_of(SPLITS[0]).float(), pixels().float()
    expected, types = coupling(z, zeros(z)), []
    coupling.nn.last.register_forward_hook(lambda *args: types.append(args[-1].dtype))
    out, again = coupling.train()(z, zeros(z)), coupling.eval()(z, zeros(z))
    assert types == [torch.bfloat16 if fast else torch.float32, torch.float32]
    torch.testing.assert_close(out, expected, rtol=0.05, atol=0.5)  # and of the same type
    assert torch.equal(again[0], expected[0])


def test_a_single_logistic_is_an_affine_coupling_that_starts_as_the_identity():
    z = pixels(4)
    coupling = MixtureCoupling(*SPLITS[0], n_mix=1).double().eval()
    torch.testing.assert_close(coupling(z, zeros(z)), (z, zeros(z)))
    coupling = randomize(coupling)
    _, mean, log_scale, a, b = coupling.predict(z)
    changed, log_scale = coupling.changed, a - log_scale[:, 0]
    expected = (z[:, changed] - mean[:, 0]) * log_scale.exp() + b
    torch.testing.assert_close(coupling(z, zeros(z))[0][:, changed], expected)
    torch.testing.assert_close(coupling(z, zeros(z))[1], log_scale.sum(1))


# ------------------------ Training ------------------------
def plain_net(net, x):
    """A ConvNet's output, of its weights by formulas of our own."""
    size, side = net.first.weight.shape[-1], x.shape[-1]

    def norm(x, layer):
        mean, var = x.mean((1, 2, 3), keepdim=True), x.var((1, 2, 3), correction=0, keepdim=True)
        x = (x - mean) / (var + 1e-5).sqrt()
        return x * layer.weight[:, None, None] + layer.bias[:, None, None]

    def act(x):
        return x * (x + 3).clamp(0, 6) / 6

    def conv(x, layer, size):
        weight = layer.weight.view(x.shape[1], size, size, x.shape[1]).permute(0, 3, 1, 2)
        return F.conv2d(x, weight, layer.bias, padding=size // 2)

    x = F.conv2d(x, net.first.weight, net.first.bias, padding=size // 2) + net.position
    assert len(net.blocks) == (4 if side > 1 else 1)
    for block in net.blocks:
        hidden = conv(act(norm(x, block[0])), block[2], size)
        x = x + conv(act(hidden), block[4], 1)
    return F.conv2d(act(norm(x, net.last[0])), net.last[2].weight)


def plain_log_px(model, images, n_mix):
    """log p(x), of the model's weights by formulas of our own."""
    p = 1e-5 / 2 + (1 - 1e-5) * (images + torch.rand_like(images)) / 256
    z = torch.logit(p)
    log_px = ((1 - 1e-5) / (256 * p * (1 - p))).log().sum(1)
    for layer in model.flow.layers:
        out = plain_net(layer.nn, z[:, layer.kept].movedim(3, 1) / 4)
        out = out.reshape(len(z), 3 * n_mix + 2, -1) + layer.common
        pi, mean, scale = (part.exp() for part in out[:, : 3 * n_mix].split(n_mix, 1))
        u, pi = (z[:, None, layer.changed] - mean.log()) / scale, pi / pi.sum(1, keepdim=True)
        a, b = 2 * torch.tanh(out[:, -2]), out[:, -1]
        c, not_c = (pi * torch.sigmoid(u)).sum(1), (pi * torch.sigmoid(-u)).sum(1)
        slope = (pi * torch.sigmoid(u) * torch.sigmoid(-u) / scale).sum(1)
        z = z.index_copy(1, layer.changed, (c / not_c).log() * a.exp() + b)
        log_px = log_px + (a + slope.log() - c.log() - not_c.log()).sum(1)
    return log_px - (z**2 + math.log(2 * math.pi)).sum(1) / 2


@pytest.mark.parametrize("seed", [5])
@pytest.mark.parametrize(("max_norm", "rise"), [(0.01, 300), (1e3, 3)])
def test_training_is_that_of_a_plain_loop(max_norm, rise, seed, float64, monkeypatch, tmp_path):
    """Two epochs of two and a half batches: clipping, AdamW, Muon, warm-up and a cosine.

    Once clipped as in the script, once hardly: there a gradient kept from the last batch shows,
    and the rates are not to rise for longer than 3 steps.
    """
    monkeypatch.setattr(nf, "MAX_GRAD_NORM", max_norm)
    options, replace = ("--n_mix", 3, "--seed", seed, "--lr", 0.1), [("/ 300", f"/ {rise}")]
    MIXTURE.run_well(*MIXTURE.options(tmp_path, 2, *options), replace=replace)

    monkeypatch.setattr(nf, "Coupling", functools.partial(nf.Coupling, n_hidden=8))
    narrow = functools.partial(mixture_flow.ConvNet, c_hidden=4)
    monkeypatch.setattr(mixture_flow, "ConvNet", narrow)
    torch.manual_seed(seed)
    model = mixture_flow.mixture_model(3)
    weights = dict(model.named_parameters())
    start = {name: weight.detach().clone() for name, weight in weights.items()}
    hidden = [name for name in weights if re.search(r"blocks\.\d+\.[24]\.weight", name)]
    others = [name for name in weights if name not in hidden]
    settings = {"weight_decay": 0, "ns_steps": 3, "adjust_lr_fn": "match_rms_adamw"}
    optimizers = [torch.optim.AdamW([weights[name] for name in others], weight_decay=0),
                  torch.optim.Muon([weights[name] for name in hidden], **settings)]  # fmt: skip

    def rate(epoch, batch):
        step = 3 * epoch + batch
        return 0.1 * min(1, (step + 1) / rise) * (1 + math.cos(math.pi * step / 6)) / 2

    log_px = functools.partial(plain_log_px, model, n_mix=3)
    numbers = train_plainly(log_px, list(weights.values()), optimizers, rate, seed, 2, max_norm)
    assert Results(tmp_path).numbers == pytest.approx(numbers, rel=1e-9)
    for names in (others, hidden):  # apart, since Muon's way is the shorter one
        parts = (start, weights, Results(tmp_path).weights)
        assert way_off(*([part[name] for name in names] for part in parts)) < 1e-9
