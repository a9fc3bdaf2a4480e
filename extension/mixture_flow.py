"""A better flow on MNIST: couplings by mixtures of logistics (Flow++, Ho et al., 2019).

Builds on a3_nf_template.py: its density, prior, dequantization and loss stay. The coupling
(arXiv:1902.00275), its network, the order of the pixels and the optimizer change. In this order:
network, coupling, order of the pixels, training. Run

    python extension/mixture_flow.py

and look into results/nf_mixture. `--help` lists the options.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import a3_nf_template as nf
import runs
from datasets.mnist import mnist


# ------------------------------------ Networks ------------------------------------
class Conv(nn.Linear):
    """A convolution whose kernels are one matrix `[c_out, size * size * c_in]`, as Muon needs."""

    def __init__(self, size, c_in, c_out):
        super().__init__(size * size * c_in, c_out)
        self.size = size

    def forward(self, x):
        kernels = self.weight.view(self.out_features, self.size, self.size, -1)
        return F.conv2d(x, kernels.permute(0, 3, 1, 2), self.bias, padding="same")


class ConvNet(nn.Module):
    """A residual network on `side` x `side` cells; on a single cell it is fully connected."""

    def __init__(self, side, c_in, c_out, c_hidden=64):
        super().__init__()
        size, n_blocks = (3, 4) if side > 1 else (1, 1)
        self.first = nn.Conv2d(c_in, c_hidden, size, padding="same")
        # A position map: convolutions do not know where a pixel is, yet strokes are rare near the
        # border.
        self.position = nn.Parameter(torch.zeros(1, c_hidden, side, side))
        # Hardswish matches SiLU and makes a step 4 % faster.
        # A GroupNorm of one group is layer normalization (Ba et al., 2016).
        self.blocks = nn.Sequential(*(
            nf.Residual(nn.GroupNorm(1, c_hidden), nn.Hardswish(), Conv(size, c_hidden, c_hidden),
                        nn.Hardswish(), Conv(1, c_hidden, c_hidden))
            for _ in range(n_blocks)
        ))  # fmt: skip
        self.last = nn.Sequential(nn.GroupNorm(1, c_hidden), nn.Hardswish(),
                                  nn.Conv2d(c_hidden, c_out, 1, bias=False))  # fmt: skip
        # With zero weights the couplings do not depend on the image at first.
        nn.init.zeros_(self.last[-1].weight)

    def forward(self, x):
        """Maps `[batch, c_in, side, side]` to `[batch, c_out, side, side]`."""
        x = self.first(x)
        x = x + self.position.to(x.dtype)  # otherwise all skip connections would add in float32
        return self.last(self.blocks(x))


# ------------------------------------ Couplings ------------------------------------
class MixtureCoupling(nn.Module):
    """A coupling through the distribution function of a mixture (paper, section 3.2).

    The pixels `kept` stay as they are. From them a network predicts, for each pixel x of
    `changed`, a mixture of K logistics with weights pi, means mu and scales s (the paper's s is
    our log s), and an affine map (a, b); a tanh of ours keeps a within [-2, 2]:

        x' = logit(C(x)) exp(a) + b,   C(x) = sum_k pi_k sigmoid(u_k),   u_k = (x - mu_k) / s_k,
        log dx'/dx = a + log C'(x) - log C(x) - log(1 - C(x)).

    If x follows the mixture, C(x) is uniform and its logit logistic, nearly normal after the scale.
    With K = 1, logit(C(x)) = (x - mu) / s, and the coupling is affine.
    `kept` and `changed` are pixel numbers `[side, side, m]`: m in each cell of a lattice.
    """

    def __init__(self, kept, changed, n_mix=16):
        super().__init__()
        self.register_buffer("kept", kept, persistent=False)
        self.register_buffer("changed", changed.permute(2, 0, 1).flatten(), persistent=False)
        self.sizes = n_mix, n_mix, n_mix, 1, 1  # log pi, mu, log s, a, b
        n_out = sum(self.sizes)
        self.nn = ConvNet(len(kept), kept.shape[2], n_out * changed.shape[2])
        # What the network predicts is added to these. At first the means cover the logits from
        # -6 to 6; a single one is at zero, and its coupling the identity.
        common = torch.zeros(n_out, changed.numel())
        if n_mix > 1:
            common[n_mix : 2 * n_mix] = torch.linspace(-6, 6, n_mix)[:, None]
        self.common = nn.Parameter(common)

    def predict(self, z):
        """Returns log pi, mu and log s, `[batch, K, n]` each, and a and b, `[batch, n]` each."""
        kept = z[:, self.kept].permute(0, 3, 1, 2)  # channels last in memory
        out = self.nn(kept / 4)  # logits reach +-12.2; divided by 4 they are of order one
        out = out.to(z.dtype).reshape(len(z), *self.common.shape) + self.common
        log_pi, mean, log_scale, a, b = out.split(self.sizes, dim=1)
        return log_pi.log_softmax(1), mean, log_scale, 2 * torch.tanh(a[:, 0]), b[:, 0]

    def logit_cdf(self, x, log_pi, mean, log_scale):
        """Returns v = logit(C(x)) and log dv/dx for x `[batch, n]`, mixtures `[batch, K, n]`."""
        u = (x[:, None] - mean) * torch.exp(-log_scale)
        lower = log_pi + F.logsigmoid(u)
        upper = lower - u  # log pi_k sigmoid(-u_k), since sigmoid(-u) = sigmoid(u) exp(-u)
        log_c, log_not_c = lower.logsumexp(1), upper.logsumexp(1)
        # Each logistic has the density sigmoid(u) sigmoid(-u) / s.
        log_density = (lower + upper - log_pi - log_scale).logsumexp(1)
        return log_c - log_not_c, log_density - log_c - log_not_c

    @torch.no_grad()  # no gradient passes through a bisection
    def solve(self, v, log_pi, mean, log_scale):
        """Returns x with logit(C(x)) = v by bisection, 32 halvings in float32.

        At x_k = mu_k + s_k v component k alone gives v. At the least x_k every u_k <= v, so
        C <= sigmoid(v); at the greatest every u_k >= v. x lies between them.
        """
        ends = mean + torch.exp(log_scale) * v[:, None]
        low, high = ends.amin(1), ends.amax(1)
        for _ in range(torch.finfo(v.dtype).bits):
            x = (low + high) / 2
            below = self.logit_cdf(x, log_pi, mean, log_scale)[0] < v
            low, high = torch.where(below, x, low), torch.where(below, high, x)
        return x

    def forward(self, z, ldj, reverse=False):
        """Maps `z` `[batch, c_in]` and adds log|det dz'/dz| to `ldj` `[batch]`; returns both."""
        *mixture, a, b = self.predict(z)
        x = z[:, self.changed]
        if reverse:
            x = self.solve((x - b) * torch.exp(-a), *mixture)
        v, log_slope = self.logit_cdf(x, *mixture)
        log_det = (log_slope + a).sum(dim=1)
        if reverse:
            return z.index_copy(1, self.changed, x), ldj - log_det
        return z.index_copy(1, self.changed, v * torch.exp(a) + b), ldj + log_det


def nested_splits(grid):
    """Yields the pixel numbers `kept, changed` of each coupling in turn.

    A grid of pixels, `[side, side]`, is cut into 2x2 cells (a b / c d). Couplings change c given a,
    b and d, then b given a and d, then d given a: one pixel of a cell at a time, since pixels that
    change together are independent given the kept. Changed pixels are never read again. The pixels
    a form the next, coarser grid, as in RealNVP's multi-scale idea (its section 3.6).

    On the last grid, of odd side, the halves of a checkerboard change in turn, given each other,
    twice. Sampling runs backwards, from coarse to fine.
    """
    while len(grid) % 2 == 0:
        a, b, c, d = grid[::2, ::2], grid[::2, 1::2], grid[1::2, ::2], grid[1::2, 1::2]
        yield torch.stack([a, b, d], dim=2), c[..., None]
        yield torch.stack([a, d], dim=2), b[..., None]
        yield a[..., None], d[..., None]
        grid = a
    cell = grid.reshape(1, 1, -1)
    even, odd = cell[..., ::2], cell[..., 1::2]
    yield from 2 * [(even, odd), (odd, even)]


def mixture_model(n_mix=16):
    """Returns the template's Model with mixture couplings as the layers of its flow."""
    model = nf.Model(shape=[nf.N_PIXELS])
    splits = nested_splits(torch.arange(nf.N_PIXELS).view(28, 28))
    model.flow.layers = nn.ModuleList(MixtureCoupling(*split, n_mix) for split in splits)
    return model


# ------------------------------------ Training ------------------------------------
def has_bfloat16(device):
    """Says whether a device multiplies in bfloat16; where it does not, emulation is slow."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return flags.get("avx512_bf16", False) or flags.get("amx_bf16", False)


def main():
    torch.manual_seed(ARGS.seed)
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32, on GPUs too
    train, val, test = mnist(batch_size=ARGS.batch_size, device=ARGS.device)
    model = mixture_model(ARGS.n_mix).to(ARGS.device)
    # Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon) for the matrices of the hidden
    # layers: it makes each step's matrix nearly orthogonal, and they learn faster. AdamW for the
    # rest; match_rms_adamw (Liu et al., 2025, arXiv:2502.16982) gives both updates the same size.
    hidden = [module.weight for module in model.modules() if isinstance(module, Conv)]
    others = [weight for weight in model.parameters() if all(weight is not h for h in hidden)]
    muon = torch.optim.Muon(hidden, lr=ARGS.lr, weight_decay=0, ns_steps=3,  # as good as 5
                            adjust_lr_fn="match_rms_adamw")  # fmt: skip
    adamw = torch.optim.AdamW(others, lr=ARGS.lr, weight_decay=0, fused=True)

    train_curve, val_curve, seconds = [], [], []
    history = {"train_bpd": train_curve, "val_bpd": val_curve, "seconds": seconds}
    parts = {"model": model, "adamw": adamw, "muon": muon}
    if ARGS.resume:
        runs.load_checkpoint(ARGS, parts, history)
    else:
        nf.save_samples(model.eval(), ARGS.results_dir / "samples_before.png")
    print(f"training on {ARGS.device}, results in {ARGS.results_dir}", flush=True)

    device = torch.device(ARGS.device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device))
    start = time.perf_counter()
    for epoch in range(len(train_curve) + 1, ARGS.epochs + 1):
        model.train()
        losses = []
        for batch, (images, _) in enumerate(tqdm(train, leave=False, disable=None)):
            # The learning rate rises over 300 steps and falls to zero on half a cosine.
            step = (epoch - 1) * len(train) + batch
            cosine = (1 + math.cos(math.pi * step / (ARGS.epochs * len(train)))) / 2
            for group in adamw.param_groups + muon.param_groups:
                group["lr"] = ARGS.lr * min(1, (step + 1) / 300) * cosine

            with autocast:  # in training alone; validation and test stay in float32
                loss = nf.bits_per_dim(model(images)).mean()
            model.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), nf.MAX_GRAD_NORM)
            adamw.step()
            muon.step()
            losses.append(loss.detach() * len(images))  # the last batch may be smaller

        train_bpd = torch.stack(losses).sum().item() / len(train.images)
        val_bpd = nf.epoch_iter(model.eval(), val, None)
        runs.check_finite(epoch, train_bpd, val_bpd)
        train_curve.append(train_bpd)
        val_curve.append(val_bpd)

        if epoch == (ARGS.epochs + 1) // 2:
            nf.save_samples(model, ARGS.results_dir / "samples_halfway.png")
        if epoch == ARGS.epochs:
            nf.save_samples(model, ARGS.results_dir / "samples_after.png")

        seconds.append(time.perf_counter() - start)
        start = time.perf_counter()  # the next epoch's time includes this checkpoint
        runs.save_checkpoint(ARGS, parts, history)
        print(f"epoch {epoch}/{ARGS.epochs}  train_bpd {train_bpd:.4f}  val_bpd {val_bpd:.4f}"
              f"  {seconds[-1]:.1f} s", flush=True)  # fmt: skip

    test_bpd = nf.epoch_iter(model.eval(), test, None)
    print(f"test_bpd {test_bpd:.3f}", flush=True)
    runs.save_results(ARGS, model.state_dict(), history, test_bpd=test_bpd)
    nf.save_bpd_plot(train_curve, val_curve, ARGS.results_dir / "bpd.png")
    other = (test.labels != test.labels[0]).nonzero()[0].item()  # first image of a different digit
    nf.save_interpolation(model, test.images[[0, other]], ARGS.results_dir / "interpolation.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=40, help="passes over the images")
    parser.add_argument("--n_mix", type=int, default=16, help="logistics in a mixture")
    parser.add_argument("--batch_size", type=int, default=64, help="images in a batch")
    parser.add_argument("--lr", type=float, default=8e-3, help="greatest learning rate")

    ARGS = runs.parse(parser, "nf_mixture")
    runs.run(main)
