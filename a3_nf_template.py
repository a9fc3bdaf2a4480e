"""A RealNVP flow on MNIST (Dinh et al., 2017).

Read from top to bottom: the flow, its exact log-likelihood, the figures, the training loop, and
at the end the command line. Run

    python a3_nf_template.py

and look into results/nf. `--help` lists the options.
"""

import argparse
import contextlib
import csv
import functools
import json
import math
import os
import platform
import re
import sys
import tempfile
import time
import timeit
from pathlib import Path

import matplotlib
import numpy as np
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
MAX_GRAD_NORM = 0.01  # in bits/dim; most gradients are longer, so that no batch outweighs others
SAVE_INTERVAL = 5  # epochs between the sample grids in the subfolder


# ---------------------------------------------------------------------------------------
# Prior and mask
# ---------------------------------------------------------------------------------------
def log_prior(x):
    """Returns the elementwise log-density log N(x; 0, 1) in nats."""
    return -0.5 * (x**2 + math.log(2 * math.pi))


def sample_prior(size, device=None):
    """Draws a tensor of the given size from N(0, 1)."""
    return torch.randn(size, device=device)


def get_mask():
    """Returns the checkerboard `[1, 784]`: 1 where row + column is even, else 0."""
    row, column = torch.meshgrid(torch.arange(28), torch.arange(28), indexing="ij")
    return ((row + column) % 2 == 0).float().view(1, N_PIXELS)


# ---------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------
class Coupling(nn.Module):
    """An affine coupling layer (paper, equations 7 to 9) for any 0/1 mask `[1, c_in]`.

    The pixels where the mask is 1 stay as they are. Each other pixel is scaled and shifted by
    amounts that a network predicts from those that stay:

        z' = mask * z + (1 - mask) * (z * exp(s(mask * z)) + t(mask * z)).

    The network reads only the pixels that stay and predicts only for the others. It computes the
    same function as one over all `c_in` pixels, whose remaining weights would meet a zero or a
    mask, with two thirds of the arithmetic.
    """

    def __init__(self, c_in, mask, n_hidden=1024):
        super().__init__()
        self.register_buffer("mask", mask)
        kept = mask.flatten().bool()
        self.register_buffer("kept", kept.nonzero().T.contiguous(), persistent=False)
        self.register_buffer("changed", (~kept).nonzero().T.contiguous(), persistent=False)
        n_kept, n_changed = self.kept.shape[1], self.changed.shape[1]
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
        # The log-scale tanh(s) * exp(log_bound) cannot explode, yet may leave [-1, 1].
        self.log_bound = nn.Parameter(torch.zeros(n_changed))

    def forward(self, z, ldj, reverse=False):
        """Maps `z` `[batch, c_in]` and adds log|det dz'/dz| to `ldj` `[batch]`; returns both.

        The Jacobian is triangular with the scales on its diagonal, so that its log-determinant
        is the sum of the log-scales (paper, section 3.3). `reverse` inverts both.
        """
        kept, changed = (index.expand(len(z), -1) for index in (self.kept, self.changed))
        s, shift = self.nn(z.gather(1, kept)).to(z.dtype).chunk(2, dim=1)
        log_scale = torch.tanh(s) * self.log_bound.exp()
        if reverse:
            moved = (z.gather(1, changed) - shift) * torch.exp(-log_scale)
            return z.scatter(1, changed, moved), ldj - log_scale.sum(dim=1)
        moved = z.gather(1, changed) * torch.exp(log_scale) + shift
        return z.scatter(1, changed, moved), ldj + log_scale.sum(dim=1)


class Flow(nn.Module):
    """`n_flows` pairs of couplings; the second of a pair changes what the first has kept."""

    def __init__(self, shape, n_flows=4):
        super().__init__()
        mask = get_mask()
        self.layers = nn.ModuleList(
            Coupling(shape[0], m) for _ in range(n_flows) for m in (mask, 1 - mask)
        )
        self.z_shape = shape

    def forward(self, z, logdet, reverse=False):
        """Maps images to latents `[batch, 784]`, or back in reverse; returns `z, logdet`."""
        for layer in reversed(self.layers) if reverse else self.layers:
            z, logdet = layer(z, logdet, reverse)
        return z, logdet


class Model(nn.Module):
    """The distribution of grey images that the flow gives to a standard-normal latent."""

    def __init__(self, shape):
        super().__init__()
        self.flow = Flow(shape)

    def dequantize(self, z):
        """Adds uniform noise to pixels 0..255 and so spreads each over an interval of length 1.

        The density of the result is a bound for the probability of the discrete pixels
        (Theis et al., 2016), where the density of bare integers has no bound at all.
        """
        return z + torch.rand_like(z)

    def logit_normalize(self, z, logdet, reverse=False):
        """Maps pixels in [0, 256] to the real line by a logit; returns `z, logdet`.

        y = logit(alpha / 2 + (1 - alpha) z / 256) (paper, section 4.1); alpha keeps the ends of the
        interval finite. The derivative of a pixel is (1 - alpha) / 256 / (p (1 - p)) with
        p = sigmoid(y).
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
        logdet = torch.zeros_like(z[:, 0])
        z, logdet = self.flow(z, logdet, reverse=True)
        z, _ = self.logit_normalize(z, logdet, reverse=True)
        # The logit's alpha leaves the flow a hair of room outside of the pixel range.
        return z.clamp(0, 256)

    def forward(self, input):
        """Returns log p(x), `[batch]` in nats, of pixels `[batch, 784]` in 0..255.

        log p(x) = log p(z) + log|det dz/dx| (paper, equation 3) of the dequantized image.
        """
        z, logdet = self.encode(input)
        return log_prior(z).sum(dim=1) + logdet

    @torch.no_grad()
    def sample(self, n_samples):
        """Draws images `[n_samples, 784]` in [0, 256]: latents from the prior, flow in reverse."""
        device = self.flow.layers[0].mask.device
        return self.decode(sample_prior((n_samples, *self.flow.z_shape), device))


# ---------------------------------------------------------------------------------------
# Loss and evaluation
# ---------------------------------------------------------------------------------------
def bits_per_dim(log_px, n_dims=N_PIXELS):
    """Turns a log-likelihood in nats into bits per dimension, -log2 p(x) / n_dims."""
    return -log_px / (n_dims * math.log(2))


@torch.no_grad()
def test_bits_per_dim(model, data):
    """Returns the mean bits/dim over a loader and the standard error of that mean."""
    bpd = torch.cat([bits_per_dim(model(images)) for images, _ in data]).double()
    return bpd.mean().item(), (bpd.std() / len(bpd) ** 0.5).item()


# ---------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------
def save_bpd_plot(train_curve, val_curve, filename):
    """Plots bits/dim of training and validation against the epoch (Question 3.8)."""
    figure, axes = plt.subplots(figsize=(5, 3.2))
    epochs = range(1, len(train_curve) + 1)
    marker = "." if len(epochs) < 3 else None
    axes.plot(epochs, train_curve, label="training", marker=marker)
    axes.plot(epochs, val_curve, label="validation", marker=marker)
    axes.axhline(TARGET, color="0.5", ls="--", label=f"{TARGET} bits/dim")
    # The first epoch would squeeze the rest of the curves into a line at the bottom.
    axes.set_ylim(min(*train_curve, *val_curve, TARGET) - 0.02, max(val_curve[0], TARGET) + 0.02)
    axes.set(xlabel="epoch", ylabel="bits per dimension")
    axes.legend(frameon=False)
    save_figure(figure, filename)


def save_images(images, filename, nrow, title=None):
    """Saves images `[n, 784]` with values in [0, 256] as one grid, `nrow` to a row."""
    images = images.view(-1, 1, 28, 28).cpu() / 256
    grid = make_grid(images, nrow=nrow, padding=1, pad_value=0.5)[0]
    figure, axes = plt.subplots(figsize=(0.6 * nrow, 0.6 * math.ceil(len(images) / nrow)))
    axes.imshow(grid.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(title, fontsize=9)
    axes.axis("off")
    save_figure(figure, filename)


@torch.no_grad()
def save_interpolation(model, images, filename, title):
    """Saves 9 images decoded from the arc between the latents of two images `[2, 784]`.

    Spherical, because the latents of d pixels lie near a sphere of radius sqrt(d), which a
    straight line leaves.
    """
    z_from, z_to = model.encode(images)[0]
    t = torch.linspace(0, 1, 9, device=images.device)[:, None]
    angle = torch.acos(torch.cosine_similarity(z_from, z_to, dim=0))
    z = (torch.sin((1 - t) * angle) * z_from + torch.sin(t * angle) * z_to) / torch.sin(angle)
    save_images(model.decode(z), filename, nrow=9, title=title)


# ---------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------
def epoch_iter(model, data, optimizer):
    """Runs one epoch and returns its average bits/dim; trains if `model.training`.

    Raises FloatingPointError, naming the batch, if a loss is not finite.
    """
    losses, sizes = [], []
    progress = tqdm(data, leave=False, disable=None)
    with torch.set_grad_enabled(model.training):
        for images, _ in progress:
            loss = bits_per_dim(model(images)).mean()
            if model.training:
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
                optimizer.step()
            losses.append(loss.detach())
            sizes.append(len(images))
            show_loss(progress, losses)
    return epoch_mean(losses, sizes)


def run_epoch(model, data, optimizer):
    """Trains on `data[0]`, validates on `data[1]`; returns `train_bpd, val_bpd`."""
    traindata, valdata = data
    model.train()
    train_bpd = epoch_iter(model, traindata, optimizer)
    model.eval()
    val_bpd = epoch_iter(model, valdata, optimizer)
    return train_bpd, val_bpd


# >>> shared block: the same characters in all three scripts >>>
REPOSITORY = Path(__file__).resolve().parent
# What a resumed run may change, since it does not shape the training.
FREE_OPTIONS = {"resume", "results_dir", "data_dir", "iw_samples", "eval_samples", "save_interval"}


def fail(message, status=2):
    """Ends the program with the line `error: message` on standard error."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(status)


def number(kind, above=0):
    """Returns an argparse type: a finite `kind`, int or float, greater than `above`."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not above < value < (2**63 if kind is int else math.inf):  # nan fails too
            wanted = f"a whole number from {above + 1}" if kind is int else "a number above 0"
            raise argparse.ArgumentTypeError(f"{text!r} is not allowed; give {wanted}")
        return value

    return parse


class Parser(argparse.ArgumentParser):
    """A parser with one-line errors and the options that all three scripts have."""

    def __init__(self, description, batch_size, lr):
        formatter = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(description=description, formatter_class=formatter, allow_abbrev=False)
        add = self.add_argument
        add("--batch_size", type=number(int), default=batch_size, help="images in a batch")
        add("--lr", type=number(float), default=lr, help="learning rate of Adam")
        add("--seed", type=number(int, -1), default=0, help="seed of every random draw")
        add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="where to run")
        add("--precision", default="auto", choices=["auto", "float32", "bfloat16"],
            help="of matrix products in training; auto: bfloat16 where faster")  # fmt: skip
        add("--compile", action="store_true", help="run the networks as compiled graphs (for GPUs)")
        add("--data_dir", default=str(REPOSITORY / "datasets"), help="folder of the data files")
        add("--results_dir", help="results folder; without it made from the options")
        add("--resume", action="store_true", help="continue from the folder's checkpoint")
        add("--fast_dev_run", action="store_true", help="one epoch of two batches: does it run?")

    def error(self, message):
        fail(message)


def set_up(args):
    """Seeds the generators, settles the option `--device auto` and returns the device."""
    there = [name for name in ("cuda", "mps") if getattr(torch, name).is_available()] + ["cpu"]
    args.device = there[0] if args.device == "auto" else args.device
    if args.device not in there:
        fail(f"--device {args.device} is not there; this machine has {', '.join(there)}")
    if args.compile:
        try:
            torch.compile(torch.neg)(torch.zeros(1, device=args.device))
        except RuntimeError:
            fail("--compile does not work without a C++ compiler; install one or leave it out")
    torch.manual_seed(args.seed)
    return torch.device(args.device)


def fast_precision(device):
    """Returns "bfloat16" if its matrix products take less than 2/3 of float32's time here."""
    if device != "cpu":
        return "bfloat16" if device == "cuda" else "float32"
    a, b = torch.ones(512, 512), torch.ones(512, 512, dtype=torch.bfloat16)
    float32, bfloat16 = (min(timeit.repeat(lambda a=a: a @ a, number=4)) for a in (a, b))
    return "bfloat16" if bfloat16 < 2 / 3 * float32 else "float32"


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
    for suffix, metadata in ((".pdf", {"CreationDate": None}), (".png", None)):
        with replacing(Path(filename).with_suffix(suffix)) as path:
            figure.savefig(path, dpi=200, bbox_inches="tight", metadata=metadata)
    plt.close(figure)


def show_loss(progress, losses):
    """Puts the newest loss on the progress bar; seldom, since reading it waits for the device."""
    if not progress.disable and len(losses) % 50 == 1:
        progress.set_postfix(loss=f"{losses[-1].flatten()[0].item():.4g}")


def epoch_mean(losses, sizes):
    """Returns the mean over images of batch means; a non-finite one is a FloatingPointError."""
    losses, sizes = torch.stack(losses).cpu().double(), torch.tensor(sizes).double()
    bad = (~losses.isfinite()).nonzero()
    if len(bad):
        batch = bad[0, 0].item()
        raise FloatingPointError(f"the loss of batch {batch + 1} is {losses[batch].tolist()}")
    return (sizes @ losses / sizes.sum()).tolist()


class Run:
    """A training run: its results folder and all that it takes to go on after a break.

    `parts` are the objects with a `state_dict` that training changes; the first of the `loaders`
    is the one that shuffles. `history` gets a row an epoch, `kept` holds what is needed at the
    end. As a context it turns Ctrl-C and a non-finite loss into one line and an exit status.
    """

    def __init__(self, args, name, n_epochs, loaders, **parts):
        self.name, self.train, self.parts, self.n_epochs = name, loaders[0], parts, n_epochs
        if args.fast_dev_run:
            self.n_epochs = 1
            for loader in loaders:
                loader.limit(2)
        parent = REPOSITORY / "results" / ("fast_dev_run" if args.fast_dev_run else "")
        self.folder = Path(args.results_dir or parent / name)
        self.options = {k: v for k, v in vars(args).items() if k not in FREE_OPTIONS}
        self.history, self.kept, self.epoch = [], {}, 0
        self.rng = {"cpu": torch, "cuda": torch.cuda, "mps": torch.mps}[args.device]
        if args.resume:
            self.load()
        elif args.precision == "auto":
            self.options["precision"] = fast_precision(args.device)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            fail(f"--results_dir {self.folder} cannot be written: {error.strerror}")

    def load(self):
        """Restores what `save` wrote; a missing, damaged or foreign checkpoint is an error."""
        path = self.folder / "checkpoint.pt"
        if not path.is_file():
            fail(f"--resume found no {path}; leave it out to start")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            options, rng = state["options"], state["rng"]
            if self.options["precision"] == "auto":
                self.options["precision"] = options["precision"]
            for option, value in self.options.items():
                if options[option] != value:
                    fail(f"--{option} is {value}, but {options[option]} in {path}")
            for name, part in self.parts.items():
                part.load_state_dict(state["parts"][name])
            torch.set_rng_state(rng["cpu"])
            self.rng.set_rng_state(rng["device"])
            self.train.generator.set_state(rng["train"])
            self.history, self.kept = state["history"], state["kept"]
        except Exception:  # a damaged file makes the unpickler raise almost anything
            fail(f"{path} is damaged or of another version; leave --resume out to start afresh")
        self.epoch = len(self.history)

    def save(self, history):
        """Writes the checkpoint and metrics.csv, each whole or not at all."""
        state = {
            "options": self.options,
            "history": history,
            "kept": self.kept,
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "rng": {
                "cpu": torch.get_rng_state(),
                "device": self.rng.get_rng_state(),
                "train": self.train.generator.get_state(),
            },
        }
        # The checkpoint last: a resumed run writes whatever comes after it anew.
        with replacing(self.folder / "metrics.csv") as path, path.open("w", newline="") as file:
            table = csv.DictWriter(file, history[0])
            table.writeheader()
            table.writerows(history)
        with replacing(self.folder / "checkpoint.pt") as path:
            torch.save(state, path)
        self.history = history

    def autocast(self):
        """Returns the context in which matrix products run in the run's precision."""
        enabled = self.options["precision"] == "bfloat16"
        # No cache: a weight is used once a step, and the step then changes it.
        return torch.autocast(self.options["device"], torch.bfloat16, enabled, cache_enabled=False)

    def compile(self, *networks):
        """Compiles networks if --compile is given; a GPU then replays a pass in one launch."""
        for network in networks if self.options["compile"] else ():
            network.compile(mode="reduce-overhead")

    def epochs(self):
        """Yields the number of each epoch still to run; each ends with `finish_epoch`."""
        while self.epoch < self.n_epochs:
            self.epoch += 1
            self.started = time.perf_counter()
            yield self.epoch

    def keep_samples(self, draw):
        """Keeps `draw()` for the figures if the epoch is the start, the middle or the end."""
        points = {"before": 0, "halfway": (self.n_epochs + 1) // 2, "after": self.n_epochs}
        for when, epoch in points.items():
            if epoch == self.epoch:
                self.kept[f"samples_{when}"] = draw()

    def finish_epoch(self, **metrics):
        """Records an epoch's metrics, saves the checkpoint and prints a line."""
        seconds = time.perf_counter() - self.started
        row = {"epoch": self.epoch, **metrics, "seconds": round(seconds, 3)}
        self.save([*self.history, row])
        if self.epoch == 1:  # from here on the folder is the new run's
            for stale in ("summary.json", "numbers.tex"):
                (self.folder / stale).unlink(missing_ok=True)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        left = tqdm.format_interval(seconds * (self.n_epochs - self.epoch))
        line = f"epoch {self.epoch}/{self.n_epochs}  {shown}  {seconds:.1f} s, {left} left"
        print(line, flush=True)

    def finish(self, model, final, numbers):
        """Writes summary.json with `final`, and numbers.tex with `numbers` as LaTeX macros."""
        n_threads, seconds = torch.get_num_threads(), [row["seconds"] for row in self.history]
        on_cuda = self.options["device"] == "cuda"
        cpu = f"CPU, {n_threads} thread{'s' * (n_threads > 1)}"
        facts = {name: self.options[name] for name in ("seed", "precision")} | {
            "device": torch.cuda.get_device_name() if on_cuda else cpu,
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        versions = {"python": platform.python_version(), "numpy": np.__version__}
        summary = {
            "options": self.options,
            **facts,
            "versions": versions | {"torch": torch.__version__},
            "wall_time": round(sum(seconds), 1),
            "final": final,
        }
        facts |= {name: self.options[name] for name in ("batch_size", "lr")} | {
            "epochs": self.n_epochs,
            "seconds_per_epoch": f"{np.median(seconds):.1f}",
            "training_minutes": f"{sum(seconds) / 60:.1f}",
        }
        macros = {self.macro(name): value for name, value in (facts | numbers).items()}
        lines = [f"\\newcommand{{\\{name}}}{{{value}}}\n" for name, value in macros.items()]
        with replacing(self.folder / "summary.json") as path:
            path.write_text(json.dumps(summary, indent=2) + "\n")
        with replacing(self.folder / "numbers.tex") as path:
            path.write_text("".join(lines))
        print("figures and numbers are in", self.folder)

    def macro(self, key):
        """Returns the macro of a number: vae_z2, val_elbo -> VaeZTwoValElbo, letters only."""
        digits = ["Zero", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine"]
        words = re.sub(r"\d", lambda d: f"_{digits[int(d[0])]}", f"{self.name}_{key}").split("_")
        return "".join(word.capitalize() for word in words)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if kind is KeyboardInterrupt:
            n = len(self.history)
            saved = f"epoch {n} is saved, and --resume goes on from there"
            print("interrupted:", saved if n else "the first epoch was not over", file=sys.stderr)
            raise SystemExit(130)
        if kind is FloatingPointError:
            fail(f"epoch {self.epoch}: {error}; the last good checkpoint is kept", status=1)


def guard(main):
    """Runs a script; a data error ends in one line, Ctrl-C before the training in silence."""
    try:
        main()
    except DataError as error:
        fail(error)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


# <<< shared block <<<


# ---------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------
def parse_options():
    """Returns the options of the command line."""
    parser = Parser("Trains a RealNVP flow on MNIST.", batch_size=128, lr=1e-3)
    parser.add_argument("--epochs", type=number(int), default=40, help="passes over the images")
    return parser.parse_args()


def warm_up_and_decay(step, n_steps):
    """Returns the factor of the learning rate: up over 300 steps, down to zero on a cosine."""
    return min(1, (step + 1) / 300) * 0.5 * (1 + math.cos(math.pi * step / n_steps))


def make_optimizer(model, lr):
    """Returns Adam with strong weight decay.

    Without it weights that few images use drift, until an image comes that they amplify from
    layer to layer: one in 40,000 then costs more bits than all others together.
    """
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.3, fused=True)


def draw(model, n_samples=25):
    """Samples images from the same latents whenever it is called."""
    with torch.random.fork_rng():
        torch.manual_seed(ARGS.seed)
        return model.sample(n_samples)


def evaluate(run, model, test):
    """Evaluates a trained model on the test set, and writes every number and figure."""
    test_bpd, stderr = test_bits_per_dim(model, test)
    seconds = min(timeit.repeat(lambda: model.sample(1000).cpu(), number=1))
    train_curve, val_curve = ([row[k] for row in run.history] for k in ("train_bpd", "val_bpd"))
    below = [row["epoch"] for row in run.history if row["val_bpd"] < TARGET]
    final = {"train_bpd": train_curve[-1], "val_bpd": val_curve[-1],
             "test_bpd": test_bpd, "test_bpd_stderr": stderr}  # fmt: skip
    save_bpd_plot(train_curve, val_curve, run.folder / "bpd.pdf")
    for when in ("before", "halfway", "after"):
        save_images(run.kept[f"samples_{when}"], run.folder / f"samples_{when}.pdf", nrow=5)
    other = (test.labels != test.labels[0]).nonzero()[0, 0].item()
    digit_from, digit_to = test.labels[[0, other]].tolist()
    images = test.images[[0, other]].float()
    title = f"from {digit_from} to {digit_to}"
    save_interpolation(model, images, run.folder / "interpolation.pdf", title)
    numbers = {name: f"{value:.3f}" for name, value in final.items()} | {
        "test_bpd_stderr": f"{stderr:.4f}",
        "epoch_below": below[0] if below else "none",
        "digit_from": digit_from,
        "digit_to": digit_to,
        "sample_ms": f"{1000 * seconds:.1f}",
    }
    print(f"test_bpd {test_bpd:.3f} +- {stderr:.3f}")
    run.finish(model, final, numbers)


def main():
    """Trains the flow, then evaluates it."""
    device = set_up(ARGS)
    train, val, test = mnist(ARGS.data_dir, ARGS.batch_size, device=device, seed=ARGS.seed)
    model = Model(shape=[N_PIXELS]).to(device)
    optimizer = make_optimizer(model, ARGS.lr)
    n_steps = ARGS.epochs * len(train)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, functools.partial(warm_up_and_decay, n_steps=n_steps)
    )
    optimizer.register_step_post_hook(lambda *_: schedule.step())
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    with Run(ARGS, "nf", ARGS.epochs, (train, val, test), **parts) as run:
        run.compile(model)
        run.keep_samples(lambda: draw(model))
        progress = run.folder / "progress"
        progress.mkdir(exist_ok=True)
        for epoch in run.epochs():
            with run.autocast():
                train_bpd, val_bpd = run_epoch(model, (train, val), optimizer)
            run.keep_samples(lambda: draw(model))
            if epoch % SAVE_INTERVAL == 0:
                save_images(draw(model), progress / f"epoch_{epoch:03d}.png", nrow=5)
            run.finish_epoch(train_bpd=train_bpd, val_bpd=val_bpd)
        evaluate(run, model.eval(), test)


if __name__ == "__main__":
    ARGS = parse_options()
    guard(main)
