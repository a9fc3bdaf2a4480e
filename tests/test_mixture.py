"""The mixture coupling: distribution, inverse, log-determinant; the order of pixels; training."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import assert_trained_plainly, few, jacobian, narrow, run, zeros

import a3_nf_template as nf
from datasets.mnist import mnist
from extension import mixture_flow
from extension.mixture_flow import MixtureCoupling, nested_splits

SIDE = 12  # of the small images: grids of 12, 6 and 3 pixels a side
SPLITS = list(nested_splits(torch.arange(SIDE**2).view(SIDE, SIDE)))


@pytest.fixture
def flow():
    """The couplings of all splits of a small image, in float64, with weights that are not zero."""
    flow = nf.Flow([784], n_flows=0)
    flow.layers.extend(MixtureCoupling(*split) for split in SPLITS)
    for weight in flow.parameters():
        weight.data += 0.3 * torch.randn_like(weight) / max(weight[0].numel(), 4) ** 0.5
    return flow.requires_grad_(False).double()


def pixels(n=3):
    """Returns numbers like logits of pixels, most of them black, `[n, SIDE**2]`."""
    return 4 * torch.randn(n, SIDE**2, dtype=torch.float64) - 4


# ------------------------ Couplings ------------------------
@pytest.mark.parametrize("n_mix", [1, 5])
def test_distribution_is_that_of_scipy(n_mix):
    log_pi, mean, log_scale = torch.randn(3, 1, n_mix, 1, dtype=torch.float64)
    log_pi, mean = log_pi.log_softmax(1), 4 * mean
    x = torch.linspace(-40, 40, 81, dtype=torch.float64)[:, None]
    v, log_slope = MixtureCoupling(*SPLITS[0]).logit_cdf(x, log_pi, mean, log_scale)
    logistics = scipy.stats.logistic(mean.flatten().numpy(), log_scale.exp().flatten().numpy())
    pi = log_pi.exp().flatten().numpy()
    c, not_c, density = logistics.cdf(x) @ pi, logistics.sf(x) @ pi, logistics.pdf(x) @ pi
    np.testing.assert_allclose(v[:, 0], np.log(c / not_c), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(log_slope[:, 0], np.log(density / c / not_c), rtol=1e-9, atol=1e-9)


def test_couplings_start_with_even_means_and_one_logistic_as_the_identity():
    z = pixels()
    _, mean, *others = MixtureCoupling(*SPLITS[0], n_mix=4).double().predict(z)
    np.testing.assert_allclose(mean[0, :, 5].detach(), [-6, -2, 2, 6])
    assert not any(start.any() for start in others)  # log-scales, a and b
    coupling = MixtureCoupling(*SPLITS[0], n_mix=1).double()
    torch.testing.assert_close(coupling(z, zeros(z)), (z, zeros(z)))


def test_inverse_and_log_determinant(flow):
    """In float64, against the reverse and against autograd's Jacobian."""
    far = torch.tensor([[40.0], [-40.0]], dtype=torch.float64).expand(2, SIDE**2)
    z = torch.cat([pixels(), far])
    there, ldj = flow(z, zeros(z))
    back, rest = flow(there, ldj, reverse=True)
    torch.testing.assert_close(back, z, rtol=0, atol=1e-9)
    torch.testing.assert_close(rest, zeros(z), rtol=0, atol=1e-7)
    expected = torch.linalg.slogdet(jacobian(flow, z[:1])).logabsdet.item()
    assert ldj[0].item() == pytest.approx(expected, abs=1e-8)


# ------------------------ The order of the pixels ------------------------
def test_flow_predicts_each_pixel_from_raw_and_coarser_ones(flow):
    """All but the halves of the last grid, which change twice, given each other."""
    changed = [layer.changed for layer in flow.layers]
    assert torch.cat(changed[:-2]).sort()[0].tolist() == list(range(SIDE**2))
    assert all(map(torch.equal, changed[-2:], changed[-4:-2]))
    assert changed[-1].tolist() == [0, 8, 52, 96, 104]  # the corners and the middle
    assert [first[0].item() for first in changed[:3]] == [SIDE, 1, SIDE + 1]  # c, b and d
    slopes = jacobian(flow, pixels(1))
    for i, earlier in enumerate(changed[:-4]):
        assert not slopes[torch.cat(changed[i + 1 :])][:, earlier].any()
        layer = flow.layers[i]  # its changed pixels depend on themselves and all that are kept
        seen = jacobian(layer, pixels(1))[earlier].any(dim=0).nonzero().flatten()
        assert torch.equal(seen, torch.cat([earlier, layer.kept.flatten()]).sort()[0])


# ------------------------ Training ------------------------
def test_training_is_that_of_a_plain_loop(float64, monkeypatch, tmp_path):
    """Gradients clipped to 0.01, Muon for the hidden matrices, AdamW without decay for the rest.

    The model has the last five couplings only, one of 7 x 7 cells and four of one cell.
    """
    monkeypatch.setattr(mixture_flow, "nested_splits", lambda grid: [*nested_splits(grid)][-5:])
    run(mixture_flow, tmp_path, epochs=2, seed=5, lr=0.5, n_mix=3)

    narrow(monkeypatch)
    torch.manual_seed(5)
    data, model = few(mnist)(batch_size=20), mixture_flow.mixture_model(3)
    hidden, others = [], []
    for name, weight in model.named_parameters():
        is_matrix = "blocks" in name and name.endswith(("2.weight", "4.weight"))
        (hidden if is_matrix else others).append(weight)
    settings = {"weight_decay": 0, "ns_steps": 3, "adjust_lr_fn": "match_rms_adamw"}
    optimizers = [torch.optim.AdamW(others, weight_decay=0), torch.optim.Muon(hidden, **settings)]
    rates = [0.5 * (i + 1) / 300 * (1 + math.cos(math.pi * i / 6)) / 2 for i in range(6)]
    assert_trained_plainly(tmp_path, model, optimizers, rates, data)


def test_the_learning_rate_rises_for_300_steps_only(monkeypatch, tmp_path):
    """The last one of 310 steps is only lower by the cosine. The model has one coupling."""
    monkeypatch.setattr(mixture_flow, "nested_splits", lambda grid: [*nested_splits(grid)][-1:])
    run(mixture_flow, tmp_path, epochs=31, batch_size=5, n_mix=1, lr=0.01)
    optimizer = torch.load(tmp_path / "checkpoint.pt")["parts"]["muon"]
    last = 0.01 * (1 + math.cos(math.pi * 309 / 310)) / 2
    assert optimizer["param_groups"][0]["lr"] == pytest.approx(last, rel=1e-9)


def test_training_alone_is_in_bfloat16_where_the_processor_has_it(monkeypatch, tmp_path):
    """What is measured stays in float32, which does not depend on the processor."""
    for flags, has in (({"amx_bf16": True}, True), ({"avx512_bf16": True}, True), ({}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda flags=flags: flags)
        assert mixture_flow.has_bfloat16(torch.device("cpu")) == has
    seen, forward = [], mixture_flow.ConvNet.forward

    def watch(self, x):
        out = forward(self, x)
        seen.append((self.training, out.dtype))
        return out

    monkeypatch.setattr(mixture_flow.ConvNet, "forward", watch)
    monkeypatch.setattr(mixture_flow, "has_bfloat16", lambda device: True)
    run(mixture_flow, tmp_path, epochs=1)
    assert set(seen) == {(True, torch.bfloat16), (False, torch.float32)}
