"""A RealNVP flow on MNIST (Dinh et al., 2017).

Read from top to bottom: the couplings, the flow and its log-density (exact, written by hand), the
training, the figures, and `main`; an extension, the machinery and the options come last. Run

    python a3_nf_template.py                       # the template's affine couplings
    python a3_nf_template.py --coupling mixture    # with Flow++'s map (Ho et al., 2019): fewer bits

and look into results/nf and results/nf_mixture. `--help` lists the options.
"""

import argparse
import errno
import functools
import io
import json
import math
import os
import sys
import time
import timeit
from pathlib import Path

if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"  # figures go to files, also where a notebook says otherwise

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.utils import make_grid
from tqdm import tqdm

from datasets.mnist import DataError, mnist

N_PIXELS = 28 * 28
TARGET = 1.85  # bits/dim on validation that the assignment asks for
MAX_GRAD_NORM = 0.01  # below the norm of most gradients: nearly all batches weigh the same


# ------------------------------------ Prior and mask ------------------------------------
def log_prior(x):
    """Returns the elementwise log-density log N(x; 0, 1) in nats."""
    return -0.5 * (x**2 + math.log(2 * math.pi))


def sample_prior(size):
    """Draws a tensor of the given size from N(0, 1)."""
    return torch.randn(size)


def get_mask():
    """Returns the checkerboard `[1, 784]`: 1 where row + column is even, else 0."""
    row_plus_column = torch.arange(28)[:, None] + torch.arange(28)
    return (row_plus_column % 2 == 0).float().view(1, N_PIXELS)


# ------------------------------------ Networks ------------------------------------
class Residual(nn.Sequential):
    """Adds what its layers compute to what they read (He et al., 2016)."""

    def forward(self, x):
        return x + super().forward(x)


class Coupling(nn.Module):
    """An affine coupling layer (paper, equations 7 to 9) for any 0/1 mask `[1, c_in]`.

    The pixels where the mask is 1 stay as they are. Each other pixel is scaled and shifted by
    amounts that a network predicts from those that stay:

        z' = mask * z + (1 - mask) * (z * exp(s(mask * z)) + t(mask * z)).

    Pixels are picked by index instead of masked: the same function, two thirds of the arithmetic.
    """

    def __init__(self, c_in, mask, n_hidden=1024):
        super().__init__()
        self.register_buffer("mask", mask)
        kept = mask.flatten().bool()
        self.register_buffer("kept", kept.nonzero().flatten(), persistent=False)
        self.register_buffer("changed", (~kept).nonzero().flatten(), persistent=False)
        n_kept, n_changed = len(self.kept), len(self.changed)
        self.nn = nn.Sequential(
            nn.Linear(n_kept, n_hidden), nn.GELU(),
            # Without this sum, 40 epochs end 0.08 bits/dim higher.
            Residual(nn.Linear(n_hidden, n_hidden), nn.GELU()),
            nn.Linear(n_hidden, 2 * n_changed),
        )  # fmt: skip
        # With zero scales and shifts the layer starts as the identity.
        nn.init.zeros_(self.nn[-1].weight)
        nn.init.zeros_(self.nn[-1].bias)
        # tanh keeps a log-scale within [-b, b], and b = exp(log_bound) > 0 is learned.
        self.log_bound = nn.Parameter(torch.zeros(n_changed))

    def forward(self, z, ldj, reverse=False):
        """Maps `z` `[batch, c_in]` and adds log|det dz'/dz| to `ldj` `[batch]`; returns both.

        Ordered with the kept pixels first, the Jacobian is triangular with the scales on its
        diagonal, so that its log-determinant is the sum of the log-scales (paper, section 3.3).
        `reverse` inverts both.
        """
        # The products may be in bfloat16; what follows them needs z's precision.
        s, t = self.nn(z.index_select(1, self.kept)).to(z.dtype).chunk(2, dim=1)
        log_scale = torch.tanh(s) * self.log_bound.exp()
        # Without a bound a rare pixel grew from coupling to coupling, to 7.6 million bits/dim.
        shift = 8 * torch.tanh(t / 8)
        pixels = z.index_select(1, self.changed)
        if reverse:
            pixels = (pixels - shift) * torch.exp(-log_scale)
            return z.index_copy(1, self.changed, pixels), ldj - log_scale.sum(dim=1)
        pixels = pixels * torch.exp(log_scale) + shift
        return z.index_copy(1, self.changed, pixels), ldj + log_scale.sum(dim=1)


class Flow(nn.Module):
    """`n_flows` pairs of couplings, the second of which changes what the first has kept.

    With coupling="mixture": one mixture coupling for each of the nested splits of the pixels.
    Raises ValueError for another coupling and for a shape that does not fit it.
    """

    def __init__(self, shape, n_flows=4, coupling="affine"):
        super().__init__()
        mask, side = get_mask(), math.isqrt(shape[0])
        n_pixels = {"affine": mask.numel(), "mixture": side**2}
        if list(shape) != [n_pixels.get(coupling)]:
            raise ValueError(f"{coupling!r} couplings do not fit {shape}, only {n_pixels}")
        if coupling == "mixture":
            splits = nested_splits(torch.arange(shape[0]).view(side, side))
            layers = (MixtureCoupling(*split) for split in splits)
        else:
            layers = (Coupling(shape[0], m) for _ in range(n_flows) for m in (mask, 1 - mask))
        self.layers = nn.ModuleList(layers)
        self.z_shape = shape

    def forward(self, z, logdet, reverse=False):
        """Maps logits of pixels to latents `[batch, 784]`, or back in reverse; returns both."""
        for layer in reversed(self.layers) if reverse else self.layers:
            z, logdet = layer(z, logdet, reverse)
        return z, logdet


class Model(nn.Module):
    """The density of grey images whose latents under the flow are standard normal."""

    def __init__(self, shape, coupling="affine"):
        super().__init__()
        self.flow = Flow(shape, coupling=coupling)

    def dequantize(self, z):
        """Adds uniform noise to pixels 0..255 and so spreads each over an interval of length 1.

        Averaged over the noise, the log-density of the result is a lower bound of the discrete
        pixels' log-probability (Theis et al., 2016); on bare integers it could grow without limit.
        """
        return z + torch.rand_like(z)

    def logit_normalize(self, z, logdet, reverse=False):
        """Maps pixels in [0, 256] to the real line by a logit; returns `z, logdet`.

        y = logit(alpha / 2 + (1 - alpha) z / 256): the paper's section 4.1, made symmetric, so that
        both ends of the interval stay finite. The derivative of a pixel is (1 - alpha) / 256 /
        (p (1 - p)) with p = sigmoid(y).
        """
        alpha = 1e-5
        log_slope = math.log(1 - alpha) - math.log(256)
        if reverse:
            logdet = logdet + (F.logsigmoid(z) + F.logsigmoid(-z) - log_slope).sum(dim=1)
            return (torch.sigmoid(z) - alpha / 2) / (1 - alpha) * 256, logdet
        p = alpha / 2 + (1 - alpha) * z / 256
        log_p, log_not_p = torch.log(p), torch.log1p(-p)
        return log_p - log_not_p, logdet + (log_slope - log_p - log_not_p).sum(dim=1)

    def encode(self, input):
        """Maps pixels `[batch, 784]` in 0..255 to latents `[batch, 784]`; returns `z, logdet`."""
        z = self.dequantize(input.to(next(self.parameters()).dtype))
        z, logdet = self.logit_normalize(z, torch.zeros_like(z[:, 0]))
        return self.flow(z, logdet)

    def decode(self, z):
        """Maps latents to images, `[batch, 784]` in [0, 256]."""
        z, logdet = self.flow(z, torch.zeros_like(z[:, 0]), reverse=True)
        z, _ = self.logit_normalize(z, logdet, reverse=True)
        # The logit's alpha lets far latents decode slightly outside of the pixel range.
        return z.clamp(0, 256)

    def forward(self, input):
        """Returns log p(x), `[batch]` in nats, of pixels `[batch, 784]` in 0..255.

        log p(x) = log p(z) + log|det dz/dx| (paper, equation 3) of the dequantized image: with one
        draw of the noise, an estimate of the bound on the discrete image's log-probability.
        """
        z, logdet = self.encode(input)
        return log_prior(z).sum(dim=1) + logdet

    @torch.no_grad()
    def sample(self, n_samples):
        """Draws images `[n_samples, 784]` in [0, 256]: latents from the prior, flow in reverse."""
        z = sample_prior((n_samples, *self.flow.z_shape))
        return self.decode(z.to(next(self.parameters())))


# ------------------------------------ Loss and training ------------------------------------
def bits_per_dim(log_px, n_dims=N_PIXELS):
    """Turns a log-likelihood in nats into bits per dimension, -log2 p(x) / n_dims."""
    return -log_px / (n_dims * math.log(2))


def warm_up_and_decay(step, n_steps):
    """Returns the factor of the learning rate: up over 300 steps, down to zero on a cosine."""
    return min(1, (step + 1) / 300) * 0.5 * (1 + math.cos(math.pi * step / n_steps))


def epoch_iter(model, data, optimizer, then=(), precision="float32"):
    """Runs one epoch and returns its average bits/dim; trains if `model.training`.

    The model's products run in `precision`. After `optimizer` all in `then` step, in order: its
    schedule and, for mixture couplings, Muon (its products always in bfloat16) and Muon's schedule.
    """
    losses, n_images = [], 0
    for images, _ in tqdm(data, leave=False, disable=None):
        mixed = torch.autocast(images.device.type, torch.bfloat16, precision == "bfloat16")
        # One context a step: it keeps the bfloat16 copies of the weights that it has made, and
        # around several steps it would go on computing with the weights of the first.
        with mixed, torch.set_grad_enabled(model.training):
            loss = bits_per_dim(model(images)).mean()

        if model.training:
            model.zero_grad()  # `optimizer` need not have all weights
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            for part in then:
                part.step()

        losses.append(loss.detach() * len(images))  # the last batch may be smaller
        n_images += len(images)
    return torch.stack(losses).sum().item() / n_images


def run_epoch(model, data, optimizer, then=(), precision="float32"):
    """Trains on `data[0]`, validates on `data[1]`; returns `train_bpd, val_bpd`."""
    traindata, valdata = data

    model.train()
    train_bpd = epoch_iter(model, traindata, optimizer, then, precision)

    model.eval()
    val_bpd = epoch_iter(model, valdata, optimizer, precision=precision)

    return train_bpd, val_bpd


# ------------------------------------ Figures ------------------------------------
def save_bpd_plot(train_curve, val_curve, filename):
    """Plots bits/dim of training and validation against the epoch (Question 3.8)."""
    figure, axes = plt.subplots(figsize=(2.7, 2), layout="constrained")
    epochs = range(1, len(train_curve) + 1)
    for label, curve in (("training", train_curve), ("validation", val_curve)):
        axes.plot(epochs, curve, label=label, marker="." if len(epochs) == 1 else None)
    if val_curve[0] > TARGET:
        axes.axhline(TARGET, color="0.5", ls="--", label=f"{TARGET} bits/dim")
    if len(epochs) > 1:  # single training values far above would squeeze the rest into a line
        axes.set_ylim(min(TARGET, *train_curve, *val_curve) - 0.02, val_curve[0] + 0.02)
    axes.set(xlabel="epoch", ylabel="bits per dimension")
    axes.legend(frameon=False)
    save_figure(figure, filename)


def save_images(images, filename, nrow):
    """Saves images `[n, 784]` in [0, 256] as one grid, black on white, `nrow` to a row."""
    grid = make_grid(images.view(-1, 1, 28, 28).cpu() / 256, nrow=nrow, padding=1, pad_value=0.5)[0]
    figure, axes = plt.subplots(figsize=(0.6 * nrow, 0.6 * math.ceil(len(images) / nrow)))
    axes.imshow(grid.numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    axes.axis("off")
    save_figure(figure, filename)


@torch.no_grad()
def save_interpolation(model, images, filename):
    """Saves 9 images decoded from the arc between the latents of two images `[2, 784]`.

    Spherical (White, 2016): draws from the prior lie near a sphere, which a straight line leaves.
    """
    z_from, z_to = model.encode(images)[0]
    t = torch.linspace(0, 1, 9, device=images.device)[:, None]
    angle = torch.acos(torch.cosine_similarity(z_from, z_to, dim=0))
    z = (torch.sin((1 - t) * angle) * z_from + torch.sin(t * angle) * z_to) / torch.sin(angle)
    save_images(model.decode(z), filename, nrow=9)


def main():
    torch.manual_seed(ARGS.seed)
    train, val, test = mnist(batch_size=ARGS.batch_size, device=ARGS.device)
    model = Model(shape=[N_PIXELS], coupling=ARGS.coupling).to(ARGS.device)
    matrices = [layer.weight for layer in model.modules() if isinstance(layer, Conv)]  # if mixture
    others = [w for w in model.parameters() if all(w is not m for m in matrices)]
    optimizer = torch.optim.AdamW(others, ARGS.lr, weight_decay=0 if matrices else 0.3, fused=True)
    factor = functools.partial(warm_up_and_decay, n_steps=ARGS.epochs * len(train))
    then = {"schedule": torch.optim.lr_scheduler.LambdaLR(optimizer, factor)}
    if matrices:  # these learn faster by Muon (Jordan et al., 2024), in steps of AdamW's size
        muon = torch.optim.Muon(matrices, ARGS.lr, weight_decay=0, ns_steps=3,  # as good as 5
                                adjust_lr_fn="match_rms_adamw")  # fmt: skip
        then |= {"muon": muon, "muon_schedule": torch.optim.lr_scheduler.LambdaLR(muon, factor)}
    parts = {"model": model, "optimizer": optimizer, **then}

    train_curve, val_curve, seconds = [], [], []
    if ARGS.resume:
        train_curve, val_curve, seconds, precision = load_checkpoint(ARGS, parts)
    else:
        precision = faster_precision() if ARGS.precision == "auto" else ARGS.precision
        torch.manual_seed(ARGS.seed)
        save_images(model.sample(25), ARGS.results_dir / "samples_before.pdf", nrow=5)
    print(f"training on {ARGS.device} in {precision}, results in {ARGS.results_dir}", flush=True)

    for epoch in range(len(train_curve) + 1, ARGS.epochs + 1):
        torch.manual_seed(ARGS.seed * ARGS.epochs + epoch)  # its own draws, also if resumed
        start = time.perf_counter()
        train_bpd, val_bpd = run_epoch(model, (train, val), optimizer, then.values(), precision)
        # Validation uses the very weights that would be saved.
        if not math.isfinite(train_bpd + val_bpd):
            raise FloatingPointError(f"epoch {epoch} has {train_bpd} and {val_bpd} bits/dim")
        train_curve.append(train_bpd)
        val_curve.append(val_bpd)
        seconds.append(time.perf_counter() - start)
        print(f"epoch {epoch}/{ARGS.epochs}  train_bpd {train_bpd:.4f}  val_bpd {val_bpd:.4f}"
              f"  {seconds[-1]:.1f} s", flush=True)  # fmt: skip

        # Samples half-way and at the end (Question 3.8)
        torch.manual_seed(ARGS.seed)  # the same latents each time
        if epoch == (ARGS.epochs + 1) // 2:
            save_images(model.sample(25), ARGS.results_dir / "samples_halfway.pdf", nrow=5)
        if epoch == ARGS.epochs:
            save_images(model.sample(25), ARGS.results_dir / "samples_after.pdf", nrow=5)
        save_checkpoint(ARGS, parts, (train_curve, val_curve, seconds, precision))

    torch.manual_seed(ARGS.seed)
    test_bpd = epoch_iter(model.eval(), test, optimizer)  # in float32
    print(f"test_bpd {test_bpd:.3f}", flush=True)
    rows = [0, (test.labels != test.labels[0]).int().argmax().item()]  # of two digits
    save_interpolation(model, test.images[rows], ARGS.results_dir / "interpolation.pdf")
    save_bpd_plot(train_curve, val_curve, ARGS.results_dir / "bpd.pdf")
    columns = {"epoch": range(1, ARGS.epochs + 1), "train_bpd": train_curve,
               "val_bpd": val_curve, "seconds": seconds}  # fmt: skip
    final = {"train_bpd": train_curve[-1], "val_bpd": val_curve[-1], "test_bpd": test_bpd,
             "precision": precision, "digit_from": test.labels[rows[0]].item(),
             "digit_to": test.labels[rows[1]].item()}  # fmt: skip
    save_results(ARGS, model, columns, final)


def faster_precision():
    """Returns "bfloat16" on a GPU or where a layer is clearly faster in it, else "float32"."""
    if ARGS.device == "cuda":
        return "bfloat16"
    # Measured, since no processor flag tells: by turns, on one thread and by the best time, so
    # that a machine which is busy with other work gives the same answer.
    x, weight = torch.ones(128, 1024), torch.ones(1024, 1024)
    seconds, n_threads = {"float32": [], "bfloat16": []}, torch.get_num_threads()
    torch.set_num_threads(1)
    for name in 20 * list(seconds):
        with torch.autocast("cpu", torch.bfloat16, name == "bfloat16"):
            seconds[name].append(timeit.timeit(lambda: F.linear(x, weight), number=1))
    torch.set_num_threads(n_threads)
    return "bfloat16" if min(seconds["bfloat16"]) < 0.8 * min(seconds["float32"]) else "float32"


# ------------------------------------ Extension: mixture couplings ------------------------------
class Conv(nn.Linear):
    """A convolution, its weight a matrix that Muon can train: `[c_out, size * size * c_in]`."""

    def forward(self, x):
        size = math.isqrt(self.in_features // x.shape[1])
        weight = self.weight.view(-1, size, size, x.shape[1]).permute(0, 3, 1, 2)  # channels last
        return F.conv2d(x, weight, self.bias, padding="same")


class ConvNet(nn.Module):
    """A residual network on `side` x `side` cells; on a single one its convolutions are linear."""

    def __init__(self, side, c_in, c_out, c_hidden=64):
        super().__init__()
        size = min(3, side)
        norm = functools.partial(nn.GroupNorm, 1, c_hidden)  # layer normalization (Ba et al., 2016)
        self.first = nn.Conv2d(c_in, c_hidden, size, padding="same")
        # Convolutions hardly know where they are, yet strokes are rare near the border.
        self.position = nn.Parameter(torch.zeros(1, c_hidden, side, side))
        # On CPUs this piecewise SiLU costs half as much as the smooth one.
        self.blocks = nn.Sequential(*(
            Residual(norm(), nn.Hardswish(), Conv(size**2 * c_hidden, c_hidden),
                     nn.Hardswish(), Conv(c_hidden, c_hidden))
            for _ in range(4 if side > 1 else 1)
        ))  # fmt: skip
        self.last = nn.Sequential(norm(), nn.Hardswish(), nn.Conv2d(c_hidden, c_out, 1, bias=False))
        nn.init.zeros_(self.last[-1].weight)

    def forward(self, x):
        """Maps `[batch, c_in, side, side]` to `[batch, c_out, side, side]`."""
        x = self.first(x)
        x = x + self.position.to(x.dtype)  # in float32 it would make all further sums float32
        return self.last(self.blocks(x))


class MixtureCoupling(nn.Module):
    """A coupling through the distribution function of a mixture (Flow++, Ho et al., 2019).

    The pixels `kept` stay as they are. From them a network predicts, for each pixel x of
    `changed`, a mixture of K logistics with weights pi, means mu and scales s (the paper's s is
    our log s), and an affine map (a, b) (section 3.2); a tanh of ours keeps a within [-2, 2]:

        x' = logit(C(x)) exp(a) + b,   C(x) = sum_k pi_k sigmoid(u_k),   u_k = (x - mu_k) / s_k,
        log dx'/dx = a + log C'(x) - log C(x) - log(1 - C(x)).

    If x follows the mixture, C(x) is uniform and its logit logistic, nearly normal after the scale.
    Both sets of pixel numbers are `[side, side, n]`: n pixels of each cell of a lattice.
    """

    def __init__(self, kept, changed, n_mix=16):
        super().__init__()
        self.register_buffer("kept", kept, persistent=False)
        self.register_buffer("changed", changed.permute(2, 0, 1).flatten(), persistent=False)
        self.sizes = 3 * [n_mix] + 2 * [1]
        n_out = sum(self.sizes)
        self.nn = ConvNet(len(kept), kept.shape[2], n_out * changed.shape[2])
        # To these the network adds; at first the means cover the logits from -6 to 6.
        common = torch.zeros(n_out, changed.numel())
        common[n_mix : 2 * n_mix] = torch.linspace(-6, 6, n_mix)[:, None]
        self.common = nn.Parameter(common)

    def logit_cdf(self, x, log_pi, mean, log_scale):
        """Returns v = logit(C(x)) and log dv/dx for x `[batch, n]`, mixtures `[batch, K, n]`."""
        u = (x[:, None] - mean) * torch.exp(-log_scale)
        # log pi_k sigmoid(u_k) and log pi_k sigmoid(-u_k): both share the larger one's logarithm.
        larger = log_pi + torch.log(torch.sigmoid(u.abs()))
        lower, upper = larger - F.relu(-u), larger - F.relu(u)
        log_c, log_not_c = lower.logsumexp(1), upper.logsumexp(1)
        # Each logistic has the density sigmoid(u) sigmoid(-u) / s.
        log_density = (lower + upper - log_pi - log_scale).logsumexp(1)
        # The pi_k sum to S = S C + S (1 - C), not to 1: S cancels everywhere but in the slope.
        log_sum = torch.logaddexp(log_c, log_not_c)
        return log_c - log_not_c, log_density + log_sum - log_c - log_not_c

    @torch.no_grad()  # no gradient passes through a bisection
    def solve(self, v, log_pi, mean, log_scale):
        """Returns x with logit(C(x)) = v by bisection, as many steps as a number has bits.

        C is an average of the sigmoid(u_k), so that v lies between the least and the greatest
        u_k, and x between the least and the greatest of the points where a u_k is v.
        """
        ends = mean + torch.exp(log_scale) * v[:, None]
        low, high = ends.amin(1), ends.amax(1)
        # Compared is the smaller one of C and, where `flip`, 1 - C: no digits are lost in it.
        flip, tail = v > 0, torch.sigmoid(-v.abs())
        pi, slope = log_pi.softmax(1), torch.exp(-log_scale) * torch.where(flip, -1, 1)[:, None]
        for _ in range(torch.finfo(v.dtype).bits):
            x = (low + high) / 2
            below = ((pi * torch.sigmoid((x[:, None] - mean) * slope)).sum(1) < tail) != flip
            low, high = torch.where(below, x, low), torch.where(below, high, x)
        return x

    def forward(self, z, ldj, reverse=False):
        """Maps `z` `[batch, c_in]` and adds log|det dz'/dz| to `ldj` `[batch]`; returns both."""
        kept = z[:, self.kept].permute(0, 3, 1, 2)  # channels last, as CPUs like it
        # Divided by 4 the logits, which begin within +-12.3, are of order one.
        out = self.nn(kept / 4).to(z.dtype).reshape(len(z), *self.common.shape) + self.common
        *mixture, a, b = out.split(self.sizes, dim=1)
        a, b, x = 2 * torch.tanh(a[:, 0]), b[:, 0], z[:, self.changed]
        if reverse:
            x = self.solve((x - b) * torch.exp(-a), *mixture)
        v, log_slope = self.logit_cdf(x, *mixture)
        log_scale = (log_slope + a).sum(dim=1)
        if reverse:
            return z.index_copy(1, self.changed, x), ldj - log_scale
        return z.index_copy(1, self.changed, v * torch.exp(a) + b), ldj + log_scale


def nested_splits(grid):
    """Yields `kept, changed` of couplings from fine to coarse; sampling goes from coarse to fine.

    The 2x2 cells of a grid of pixel numbers are (a b / c d). First c changes given a, b and d, then
    b given a and d, then d given a; none is read again. Those that change together are independent
    given the kept, so few do. The a are the next grid: RealNVP's multi-scale idea (section 3.6), to
    its end. On the last one, of odd side, the halves of a checkerboard change in turn, twice.
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


# >>> shared block: the same characters in all three scripts (`make block` copies the VAE's) >>>
def fail(message, status=2):
    """Ends the program with the line `error: message` on standard error."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(status)


def check_numbers(args):
    """Ends the program if a number among the options is out of range."""
    for name, value in vars(args).items():
        least = -1 if name == "seed" else 0
        if type(value) in (int, float) and not least < value < 2**31:  # nan is not
            fail(f"--{name} {value} is not allowed; give a number above {least} and below 2^31")


def run_options(args):
    """Returns the options by name, but for where the results go and whether to resume."""
    return {k: v for k, v in vars(args).items() if k not in ("results_dir", "resume")}


def results_folder(name, parser, args):
    """Returns results/`name`, the name extended by each option that is not its default."""
    for option, value in run_options(args).items():
        if value != parser.get_default(option):
            name += f"_{value}" if isinstance(value, str) else f"_{option}{value}"
    return Path(__file__).resolve().parent / "results" / name


def write(path, content):
    """Writes bytes to a file, whole or not at all: what was there stays until all is written."""
    temporary = path.with_name(f".{path.name}.tmp")  # one name: what a kill leaves is used again
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def save_figure(figure, filename):
    """Saves a figure as PDF and PNG; without a date, so that the same figure is the same file."""
    for kind in ("pdf", "png"):
        buffer = io.BytesIO()
        metadata = {"CreationDate": None}
        figure.savefig(buffer, format=kind, dpi=200, bbox_inches="tight", metadata=metadata)
        write(Path(filename).with_suffix(f".{kind}"), buffer.getvalue())
    plt.close(figure)


def torch_bytes(state):
    """Returns a state as `torch.save` writes it to memory: the same bytes for the same state."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def save_checkpoint(args, parts, history):
    """Writes checkpoint.pt: the options, the states of the `parts` by name, and the `history`."""
    states = {name: part.state_dict() for name, part in parts.items()}
    state = {"options": run_options(args), "parts": states, "history": history}
    write(args.results_dir / "checkpoint.pt", torch_bytes(state))


def load_checkpoint(args, parts):
    """Restores the `parts` from checkpoint.pt and returns the history."""
    path = args.results_dir / "checkpoint.pt"
    if not path.is_file():
        fail(f"--resume found no {path}; leave it out to start")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        for option, value in run_options(args).items():
            if state["options"][option] != value:
                fail(f"--{option} is {value}, but {state['options'][option]} in {path}")
        for name, part in parts.items():
            part.load_state_dict(state["parts"][name])
        return state["history"]
    except Exception:  # a damaged file makes the unpickler raise almost anything
        fail(f"{path} is no checkpoint that this script can read; move it away to start afresh")


def save_results(args, model, columns, final):
    """Writes weights.pt, a plain state_dict, metrics.csv with the columns, and summary.json."""
    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    summary = {"options": run_options(args), "device": device, "threads": torch.get_num_threads(),
               "torch": str(torch.__version__), "final": final}  # fmt: skip
    rows = [columns, *zip(*columns.values(), strict=True)]
    table = "".join(",".join(map(str, row)) + "\n" for row in rows)
    write(args.results_dir / "weights.pt", torch_bytes(model.state_dict()))
    write(args.results_dir / "metrics.csv", table.encode())
    write(args.results_dir / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())


def run(main, args):
    """Runs `main`; bad data, too little memory or disk, and Ctrl-C end it in one line."""
    font = {"font.family": "STIXGeneral", "mathtext.fontset": "stix", "font.size": 9}
    try:
        with plt.rc_context(font):  # the report's
            main()
    except DataError as error:
        fail(error)
    except BrokenPipeError:  # nobody reads on, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        fail(f"{error.filename or '-'}: {error.strerror}", 1 if error.errno == errno.ENOSPC else 2)
    except RuntimeError as error:
        if "memory" not in str(error):  # PyTorch has no class of its own for a processor's
            raise
        fail(f"there is not enough memory for {run_options(args)}")
    except (FloatingPointError, KeyboardInterrupt) as error:
        path = args.results_dir / "checkpoint.pt"
        kept = f"{path} is the last one" if path.is_file() else "there is no checkpoint"
        fail(f"{str(error) or 'interrupted'}; {kept}", 1 if str(error) else 130)


# <<< shared block <<<


if __name__ == "__main__":
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = fail  # one line, where argparse would print its usage, too
    parser.add_argument("--epochs", type=int, default=40, help="passes over the images")
    parser.add_argument("--coupling", default="affine", choices=["affine", "mixture"],
                        help="affine: RealNVP's, the template's; mixture: Flow++'s")  # fmt: skip
    parser.add_argument("--batch_size", type=int, help="None: 128 affine, 64 mixture")
    parser.add_argument("--lr", type=float, help="peak; None: 1e-3 affine, 8e-3 mixture")
    parser.add_argument("--seed", type=int, default=0, help="of every random draw")
    parser.add_argument("--device", default=devices[-1], choices=devices, help="where to run")
    parser.add_argument("--precision", default="auto", choices=["auto", "float32", "bfloat16"],
                        help="of products in each epoch; auto: what is faster")  # fmt: skip
    parser.add_argument("--results_dir", type=Path, help="if not one named by the options")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")

    # The coupling's own defaults: what is equal to them stays out of the folder's name.
    mixture = parser.parse_args().coupling == "mixture"
    parser.set_defaults(batch_size=64 if mixture else 128, lr=8e-3 if mixture else 1e-3)
    ARGS = parser.parse_args()
    check_numbers(ARGS)
    ARGS.results_dir = ARGS.results_dir or results_folder("nf", parser, ARGS)
    run(main, ARGS)
