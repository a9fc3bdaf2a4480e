"""A RealNVP flow on MNIST (Dinh et al., 2017).

Read from top to bottom: the couplings, the flow and its log-density (exact, written by hand),
the figures, the training, and at the end the command line. Run

    python a3_nf_template.py                       # the template's affine couplings
    python a3_nf_template.py --coupling mixture    # with Flow++'s map (Ho et al., 2019): fewer bits

and look into results/nf and results/nf_mixture. `--help` lists the options.
"""

import argparse
import contextlib
import csv
import functools
import json
import math
import os
import platform
import sys
import time
import timeit
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.utils import make_grid
from tqdm import tqdm

from datasets.mnist import DataError, mnist

matplotlib.use("Agg")  # figures are written to files; no screen is needed
import matplotlib.pyplot as plt

N_PIXELS = 28 * 28
TARGET = 1.85  # bits/dim on validation that the assignment asks for
MAX_GRAD_NORM = 0.01  # below the norm of most gradients: nearly all batches weigh the same


# ------------------------------------ Prior and mask ------------------------------------
def log_prior(x):
    """Returns the elementwise log-density log N(x; 0, 1) in nats."""
    return -0.5 * (x**2 + math.log(2 * math.pi))


def sample_prior(size, device=None):
    """Draws a tensor of the given size from N(0, 1)."""
    return torch.randn(size, device=device)


def get_mask():
    """Returns the checkerboard `[1, 784]`: 1 where row + column is even, else 0."""
    row_plus_column = torch.arange(28)[:, None] + torch.arange(28)
    return (row_plus_column % 2 == 0).float().view(1, N_PIXELS)


# ------------------------------------ Model ------------------------------------
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
            nn.Linear(n_kept, n_hidden),
            nn.GELU(),
            nn.Linear(n_hidden, n_hidden),
            nn.GELU(),
            nn.Linear(n_hidden, 2 * n_changed),
        )
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
        s, shift = self.nn(z.index_select(1, self.kept)).to(z.dtype).chunk(2, dim=1)
        log_scale = torch.tanh(s) * self.log_bound.exp()
        pixels = z.index_select(1, self.changed)
        if reverse:
            pixels = (pixels - shift) * torch.exp(-log_scale)
            return z.index_copy(1, self.changed, pixels), ldj - log_scale.sum(dim=1)
        pixels = pixels * torch.exp(log_scale) + shift
        return z.index_copy(1, self.changed, pixels), ldj + log_scale.sum(dim=1)


class ConvNet(nn.Module):
    """A residual network on a lattice of `side` x `side` cells; on a single cell, linear layers.

    Each block and the last layer first normalize what they read over the cells and channels of an
    image (layer normalization, Ba et al., 2016): twice the learning rate diverges without that.
    """

    def __init__(self, side, c_in, c_hidden, c_out, n_blocks=4):
        super().__init__()
        size = min(3, side)
        norm = functools.partial(nn.GroupNorm, 1, c_hidden)
        conv = functools.partial(nn.Conv2d, c_hidden, c_hidden, padding="same")
        self.first = nn.Conv2d(c_in, c_hidden, size, padding="same")
        # Convolutions hardly know where they are, yet strokes are rare near the border.
        self.position = nn.Parameter(torch.zeros(1, c_hidden, side, side))
        self.blocks = nn.ModuleList(
            # On CPUs this piecewise SiLU costs half as much as the smooth one, and learns the same.
            nn.Sequential(norm(), nn.Hardswish(), conv(size), nn.Hardswish(), conv(1))
            for _ in range(n_blocks)
        )
        self.last = nn.Sequential(norm(), nn.Hardswish(), nn.Conv2d(c_hidden, c_out, 1, bias=False))
        nn.init.zeros_(self.last[-1].weight)
        self.to(memory_format=torch.channels_last)  # the layout in which CPUs convolve fastest

    def forward(self, x):
        """Maps `[batch, c_in, side, side]` to `[batch, c_out, side, side]`."""
        x = self.first(x)
        x = x + self.position.to(x.dtype)  # in float32 it would make all further sums float32
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


class MixtureCoupling(nn.Module):
    """A coupling through the distribution function of a mixture (Flow++, Ho et al., 2019).

    The pixels `kept` stay as they are. From them a network predicts, for each pixel x of
    `changed`, a mixture of K logistics with weights pi, means mu and scales s (the paper's s is
    our log s), and an affine map (a, b) (section 3.2); a tanh of ours keeps a within [-2, 2]:

        x' = logit(C(x)) exp(a) + b,   C(x) = sum_k pi_k sigmoid(u_k),   u_k = (x - mu_k) / s_k,
        log dx'/dx = a + log C'(x) - log C(x) - log(1 - C(x)).

    If x follows the mixture, C(x) is uniform and its logit logistic, which exp(a) and b make nearly
    normal, however sharp an edge or far apart two peaks are.
    Both sets of pixel numbers are `[side, side, n]`: n pixels of each cell of a lattice.
    """

    def __init__(self, kept, changed, n_mix=8):
        super().__init__()
        self.register_buffer("kept", kept, persistent=False)
        self.register_buffer("changed", changed.permute(2, 0, 1).flatten(), persistent=False)
        self.sizes = 3 * [n_mix] + 2 * [1]
        side, n_out = len(kept), sum(self.sizes)
        c_hidden = 64 if side > 1 else 256
        self.nn = ConvNet(side, kept.shape[2], c_hidden, n_out * changed.shape[2])
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
        kept = z[:, self.kept].permute(0, 3, 1, 2)  # the view is channels-last already
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

    The 2x2 cells of a grid of pixel numbers are (a b / c d). First d changes given a, b, c, then
    b given a, c, then c given a: each is predicted from raw pixels, and is not read again. The a
    are the next grid: RealNVP's multi-scale idea (section 3.6), to its end. The last grid has an
    odd side, so that every second pixel makes a checkerboard; its halves change given each other.
    """
    while len(grid) % 2 == 0:
        a, b, c, d = grid[::2, ::2], grid[::2, 1::2], grid[1::2, ::2], grid[1::2, 1::2]
        for *kept, changed in ((a, b, c, d), (a, c, b), (a, c)):
            yield torch.stack(kept, dim=2), changed[..., None]
        grid = a
    cell = grid.reshape(1, 1, -1)
    yield cell[..., ::2], cell[..., 1::2]
    yield cell[..., 1::2], cell[..., ::2]


class Flow(nn.Module):
    """`n_flows` pairs of couplings, the second of which changes what the first has kept.

    With coupling="mixture": one mixture coupling for each of the nested splits of the pixels.
    """

    def __init__(self, shape, n_flows=4, coupling="affine"):
        super().__init__()
        if coupling == "mixture":
            side = math.isqrt(shape[0])
            splits = nested_splits(torch.arange(shape[0]).view(side, side))
            layers = (MixtureCoupling(*split) for split in splits)
        else:
            mask = get_mask()
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
        z = self.dequantize(input)
        z, logdet = self.logit_normalize(z, torch.zeros_like(z[:, 0]))
        return self.flow(z, logdet)

    def decode(self, z):
        """Maps latents to images, `[batch, 784]` in [0, 256]."""
        z, logdet = self.flow(z, torch.zeros_like(z[:, 0]), reverse=True)
        z, _ = self.logit_normalize(z, logdet, reverse=True)
        # The logit's alpha leaves the flow a hair of room outside of the pixel range.
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
        device = self.flow.layers[0].kept.device
        return self.decode(sample_prior((n_samples, *self.flow.z_shape), device))


# ------------------------------------ Loss and evaluation ------------------------------------
def bits_per_dim(log_px, n_dims=N_PIXELS):
    """Turns a log-likelihood in nats into bits per dimension, -log2 p(x) / n_dims."""
    return -log_px / (n_dims * math.log(2))


@torch.no_grad()
def mean_bits_per_dim(model, data):
    """Returns the mean bits/dim over a loader, in float32, and the standard error of that mean."""
    bpd = torch.cat([bits_per_dim(model(images)) for images, _ in data]).cpu().double()
    return bpd.mean().item(), (bpd.std() / len(bpd) ** 0.5).item()


# ------------------------------------ Figures ------------------------------------
def save_bpd_plot(train_curve, val_curve, filename):
    """Plots bits/dim of training and validation against the epoch (Question 3.8)."""
    figure, axes = plt.subplots(figsize=(4.6, 2.4))
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
    images = images.view(-1, 1, 28, 28).cpu() / 256
    grid = make_grid(images, nrow=nrow, padding=1, pad_value=0.5)[0]
    figure, axes = plt.subplots(figsize=(0.6 * nrow, 0.6 * math.ceil(len(images) / nrow)))
    axes.imshow(grid.numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    axes.axis("off")
    save_figure(figure, filename)


def save_samples(model, filename, n_samples=25):
    """Saves samples, of the same latents each time."""
    with torch.random.fork_rng():  # looking at samples must not change the training
        torch.manual_seed(ARGS.seed)
        save_images(model.sample(n_samples), filename, nrow=5)


@torch.no_grad()
def save_interpolation(model, images, filename):
    """Saves 9 images decoded from the arc between the latents of two images `[2, 784]`.

    Spherical, because draws from the prior in d dimensions lie near a sphere of radius sqrt(d),
    which a straight line leaves (White, 2016).
    """
    z_from, z_to = model.encode(images)[0]
    t = torch.linspace(0, 1, 9, device=images.device)[:, None]
    angle = torch.acos(torch.cosine_similarity(z_from, z_to, dim=0))
    z = (torch.sin((1 - t) * angle) * z_from + torch.sin(t * angle) * z_to) / torch.sin(angle)
    save_images(model.decode(z), filename, nrow=9)


# ------------------------------------ Training ------------------------------------
def warm_up_and_decay(step, n_steps):
    """Returns the factor of the learning rate: up over 300 steps, down to zero on a cosine."""
    return min(1, (step + 1) / 300) * 0.5 * (1 + math.cos(math.pi * step / n_steps))


def epoch_iter(model, data, optimizer, schedule=None, precision="float32"):
    """Runs one epoch and returns its average bits/dim; trains if `model.training`.

    Matrix products run in `precision`; `schedule` sets the learning rate after every step.
    Raises FloatingPointError, naming the batch, if a loss is not finite.
    """
    losses, sizes = [], []
    for images, _ in tqdm(data, leave=False, disable=None):
        mixed = torch.autocast(images.device.type, torch.bfloat16, precision == "bfloat16")
        # One context a step: it keeps the bfloat16 copies of the weights that it has made, and
        # around several steps it would go on computing with the weights of the first.
        with mixed, torch.set_grad_enabled(model.training):
            loss = bits_per_dim(model(images)).mean()

        if model.training:
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            if schedule is not None:
                schedule.step()

        losses.append(loss.detach())
        sizes.append(len(images))
    return epoch_mean(losses, sizes)


def run_epoch(model, data, optimizer, schedule=None, precision="float32"):
    """Trains on `data[0]`, validates on `data[1]`; returns `train_bpd, val_bpd`."""
    traindata, valdata = data

    model.train()
    train_bpd = epoch_iter(model, traindata, optimizer, schedule, precision)

    model.eval()
    val_bpd = epoch_iter(model, valdata, optimizer, precision=precision)

    return train_bpd, val_bpd


# >>> shared block: the same characters in all three scripts >>>
REPOSITORY = Path(__file__).resolve().parent
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]  # the last is the default
# Options that do not shape the training: --resume may change them, and they name no folder.
FREE_OPTIONS = {"data_dir", "eval_samples", "iw_samples", "results_dir", "resume", "save_interval"}


def fail(message, status=2):
    """Ends the program with the line `error: message` on standard error."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(status)


def number(kind, above=0):
    """Returns an argparse type: a number of a `kind`, int or float, above a bound and finite."""
    name, below = {int: ("whole number", 2**63), float: ("number", math.inf)}[kind]

    def parse(text):
        with contextlib.suppress(ValueError):
            if above < (value := kind(text)) < below:  # nan is not
                return value
        wanted = f"give a {name} above {above} and below {below}"
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; {wanted}")

    return parse


def shaping_options(args):
    """Returns the options that shape the training, by name."""
    return {name: value for name, value in vars(args).items() if name not in FREE_OPTIONS}


def results_folder(name, parser, args):
    """Returns results/`name`, the name extended by each shaping option that is no default."""
    for option, value in shaping_options(args).items():
        if value != parser.get_default(option):
            word = value if isinstance(value, str) else f"{option}{value}".removesuffix("True")
            name += f"_{word}"
    return REPOSITORY / "results" / name


def faster_precision(args):
    """Returns "bfloat16" if a 1024 x 1024 layer takes clearly less time in it here, else "float32".

    Measured, because no processor flag tells; by turns, on one thread and by the best time, so
    that a machine which is busy with other work gives the same answer.
    """
    if args.device == "cuda":
        return "bfloat16"
    x, weight = torch.ones(args.batch_size, 1024), torch.ones(1024, 1024)
    seconds, n_threads = {"float32": [], "bfloat16": []}, torch.get_num_threads()
    torch.set_num_threads(1)
    for name in 20 * list(seconds):
        with torch.autocast("cpu", torch.bfloat16, name == "bfloat16"):
            seconds[name].append(timeit.timeit(lambda: F.linear(x, weight), number=1))
    torch.set_num_threads(n_threads)
    return "bfloat16" if min(seconds["bfloat16"]) < 0.8 * min(seconds["float32"]) else "float32"


@contextlib.contextmanager
def replacing(path):
    """Gives a temporary path that takes the place of `path` if the block ends well."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_figure(figure, filename):
    """Saves a figure as PDF, for the report, and as PNG, to look at."""
    for suffix in (".pdf", ".png"):
        with replacing(Path(filename).with_suffix(suffix)) as path:
            # Without a date, the same figure is the same file.
            figure.savefig(path, dpi=200, bbox_inches="tight", metadata={"CreationDate": None})
    plt.close(figure)


def epoch_mean(losses, sizes):
    """Returns the mean over images of batch means; a non-finite one is a FloatingPointError."""
    losses, sizes = torch.stack(losses).cpu().double(), torch.tensor(sizes).double()
    for batch, loss in enumerate(losses, 1):
        if not loss.isfinite().all():
            raise FloatingPointError(f"the loss of batch {batch} is {loss.tolist()}")
    return (sizes @ losses / sizes.sum()).tolist()


def save_checkpoint(args, history, parts, generator):
    """Writes metrics.csv and checkpoint.pt, each whole or not at all.

    `history` has the columns of metrics.csv by name, `parts` are what training changes, and
    `generator` orders the images. A weight that is not finite is a FloatingPointError.
    """
    networks = [part for part in parts.values() if isinstance(part, nn.Module)]
    if not all(w.isfinite().all() for net in networks for w in net.state_dict().values()):
        raise FloatingPointError(f"epoch {history['epoch'][-1]} ends with non-finite weights")
    for stale in ("summary.json", "weights.pt"):  # of earlier weights
        (args.results_dir / stale).unlink(missing_ok=True)
    with replacing(args.results_dir / "metrics.csv") as path, path.open("w", newline="") as file:
        csv.writer(file).writerows([history, *zip(*history.values(), strict=True)])
    cuda = torch.cuda.get_rng_state_all() if args.device == "cuda" else []
    rng = {"loader": generator.get_state(), "cpu": torch.get_rng_state(), "cuda": cuda}
    states = {name: part.state_dict() for name, part in parts.items()}
    state = {"options": shaping_options(args), "history": history, "parts": states, "rng": rng}
    # Last: a run that ends before it is resumed one epoch earlier, and writes the rest again.
    with replacing(args.results_dir / "checkpoint.pt") as path:
        torch.save(state, path)


def load_checkpoint(args, parts, generator):
    """Restores what `save_checkpoint` wrote, and returns the history."""
    path = args.results_dir / "checkpoint.pt"
    if not path.is_file():
        fail(f"--resume found no {path}; leave it out to start")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if args.precision == "auto":
            args.precision = state["options"]["precision"]
        for option, value in shaping_options(args).items():
            if state["options"][option] != value:
                fail(f"--{option} is {value}, but {state['options'][option]} in {path}")
        for name, part in parts.items():
            part.load_state_dict(state["parts"][name])
        generator.set_state(state["rng"]["loader"])
        torch.set_rng_state(state["rng"]["cpu"])
        torch.cuda.set_rng_state_all(state["rng"]["cuda"])
        return state["history"]
    except Exception:  # a damaged file makes the unpickler raise almost anything
        fail(f"{path} is damaged or of another version; leave --resume out to start afresh")


def save_results(args, history, model, final):
    """Writes weights.pt, a plain state_dict, and summary.json with the `final` numbers."""
    summary = {
        "options": shaping_options(args),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
        "epoch_seconds": torch.tensor(history["seconds"]).median().item(),
        "training_seconds": sum(history["seconds"]),
        "final": final,
    }
    with replacing(args.results_dir / "weights.pt") as path:
        torch.save(model.state_dict(), path)
    with replacing(args.results_dir / "summary.json") as path:
        path.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")


@contextlib.contextmanager
def guard(args):
    """Turns bad data, a folder not to be written, a non-finite loss and Ctrl-C into one line."""
    try:
        yield
    except DataError as error:
        fail(error)
    except OSError as error:
        fail(f"--results_dir {args.results_dir} cannot be written: {error.strerror or error}")
    except (FloatingPointError, KeyboardInterrupt) as error:
        path = args.results_dir / "checkpoint.pt"
        kept = f"{path} has the last epoch saved there" if path.is_file() else "no epoch was saved"
        text, status = ("interrupted", 130) if isinstance(error, KeyboardInterrupt) else (error, 1)
        fail(f"{text}; {kept}", status)


# <<< shared block <<<


def evaluate(model, test, history):
    """Measures the trained model on the test images; writes numbers, figures and weights."""
    folder = ARGS.results_dir
    train_curve, val_curve = history["train_bpd"], history["val_bpd"]
    test_bpd, test_bpd_stderr = mean_bits_per_dim(model, test)
    first, other = 0, (test.labels != test.labels[0]).nonzero()[0, 0].item()  # of two digits
    final = {
        "train_bpd": train_curve[-1], "val_bpd": val_curve[-1],
        "test_bpd": test_bpd, "test_bpd_stderr": test_bpd_stderr,
        "epoch_below": next((n for n, bpd in enumerate(val_curve, 1) if bpd < TARGET), None),
        "digit_from": test.labels[first].item(), "digit_to": test.labels[other].item(),
        "sample_ms": 1000 * min(timeit.repeat(lambda: model.sample(1000).cpu(), number=1)),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }  # fmt: skip
    save_bpd_plot(train_curve, val_curve, folder / "bpd.pdf")
    save_interpolation(model, test.images[[first, other]].float(), folder / "interpolation.pdf")
    save_results(ARGS, history, model, final)
    print(f"test_bpd {test_bpd:.3f} +- {test_bpd_stderr:.3f}")


def main():
    torch.manual_seed(ARGS.seed)
    data = mnist(ARGS.data_dir, ARGS.batch_size, device=ARGS.device, seed=ARGS.seed)
    if ARGS.fast_dev_run:
        ARGS.epochs = 1
        for loader in data:
            loader.limit(2)
    train, val, test = data
    model = Model(shape=[N_PIXELS], coupling=ARGS.coupling).to(ARGS.device)
    # Without decay, weights of affine couplings that few images use drift, until an image comes
    # that they amplify from layer to layer: one in 40,000 then costs more bits than the rest.
    # The means of mixtures must not decay: those of black pixels lie far from zero.
    decay = {"affine": 0.3, "mixture": 0}[ARGS.coupling]
    optimizer = torch.optim.AdamW(model.parameters(), lr=ARGS.lr, weight_decay=decay, fused=True)
    factor = functools.partial(warm_up_and_decay, n_steps=ARGS.epochs * len(train))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    history = {"epoch": [], "train_bpd": [], "val_bpd": [], "seconds": []}
    if ARGS.resume:
        history = load_checkpoint(ARGS, parts, train.generator)
    elif ARGS.precision == "auto":
        ARGS.precision = faster_precision(ARGS)
    # The lists of the history themselves: what is appended to them is saved with it.
    epochs, train_curve, val_curve, seconds = history.values()
    folder = ARGS.results_dir
    folder.mkdir(parents=True, exist_ok=True)
    print(f"training on {ARGS.device} in {ARGS.precision}, results in {folder}", flush=True)

    if not epochs:
        save_samples(model, folder / "samples_before.pdf")
    for epoch in range(len(epochs) + 1, ARGS.epochs + 1):
        start = time.perf_counter()
        train_bpd, val_bpd = run_epoch(model, (train, val), optimizer, schedule, ARGS.precision)
        epochs.append(epoch)
        train_curve.append(train_bpd)
        val_curve.append(val_bpd)
        seconds.append(time.perf_counter() - start)

        # Samples during training: half-way and at the end (Question 3.8)
        if epoch == (ARGS.epochs + 1) // 2:
            save_samples(model, folder / "samples_halfway.pdf")
        if epoch == ARGS.epochs:
            save_samples(model, folder / "samples_after.pdf")

        save_checkpoint(ARGS, history, parts, train.generator)
        print(f"epoch {epoch}/{ARGS.epochs}  train_bpd {train_bpd:.4f}  val_bpd {val_bpd:.4f}"
              f"  {seconds[-1]:.1f} s", flush=True)  # fmt: skip

    evaluate(model.eval(), test, history)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.error = fail  # one line, where argparse would print its usage, too
    parser.add_argument("--epochs", type=number(int), default=40, help="passes over the images")
    parser.add_argument("--coupling", default="affine", choices=["affine", "mixture"],
                        help="affine: RealNVP's, the template's; mixture: Flow++'s")  # fmt: skip
    parser.add_argument("--batch_size", type=number(int), default=128, help="images in a batch")
    parser.add_argument("--lr", type=number(float), help="peak; None: 1e-3 affine, 8e-3 mixture")
    parser.add_argument("--seed", type=number(int, -1), default=0, help="of every random draw")
    parser.add_argument("--device", default=DEVICES[-1], choices=DEVICES, help="where to run")
    parser.add_argument("--precision", default="auto", choices=["auto", "float32", "bfloat16"],
                        help="of products in each epoch; auto: what is faster")  # fmt: skip
    parser.add_argument("--data_dir", type=Path, default=REPOSITORY / "datasets", help="data files")
    parser.add_argument("--results_dir", type=Path, help="if not one named by the options")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--fast_dev_run", action="store_true", help="two batches: does it run?")

    ARGS = parser.parse_args()
    # A default after all, so that the rate of a coupling is no part of its folder's name.
    parser.set_defaults(lr={"affine": 1e-3, "mixture": 8e-3}[ARGS.coupling])
    ARGS.lr = ARGS.lr or parser.get_default("lr")
    ARGS.results_dir = ARGS.results_dir or results_folder("nf", parser, ARGS)

    with guard(ARGS):
        main()
