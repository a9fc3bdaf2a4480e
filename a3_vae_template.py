"""A variational autoencoder on Binary MNIST (Kingma & Welling, 2014).

Read from top to bottom: the model, its loss (the evidence lower bound, written by hand), the
evaluation, the figures, the training loop, and at the end the command line. Run

    python a3_vae_template.py                # 20-d latent: curves, samples, test log-likelihood
    python a3_vae_template.py --zdim 2       # 2-d latent: the manifold as well

and look into results/vae_z20 and results/vae_z2. `--help` lists the options.
"""

import argparse
import contextlib
import csv
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
import scipy.stats
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.utils import make_grid
from tqdm import tqdm

from datasets.bmnist import bmnist
from datasets.mnist import DataError

matplotlib.use("Agg")  # figures are written to files; no screen is needed
import matplotlib.pyplot as plt

N_PIXELS = 28 * 28


# ---------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------
class Encoder(nn.Module):
    """The approximate posterior q(z|x) = N(z; mean(x), diag(std(x)^2)) (paper, appendix C.2)."""

    def __init__(self, hidden_dim=500, z_dim=20):
        super().__init__()
        self.hidden = nn.Linear(N_PIXELS, hidden_dim)
        self.mean_and_log_std = nn.Linear(hidden_dim, 2 * z_dim)

    def forward(self, input):
        """Maps images, `[batch, 784]` or `[batch, 1, 28, 28]`, to mean and std `[batch, z_dim]`."""
        hidden = F.gelu(self.hidden(input.flatten(1)))
        mean, log_std = self.mean_and_log_std(hidden).float().chunk(2, dim=1)
        return mean, log_std.exp()


class Decoder(nn.Module):
    """The likelihood p(x|z): independent Bernoulli pixels (paper, appendix C.1)."""

    def __init__(self, hidden_dim=500, z_dim=20):
        super().__init__()
        self.hidden = nn.Linear(z_dim, hidden_dim)
        self.output = nn.Linear(hidden_dim, N_PIXELS)

    def logits(self, z):
        """Maps latents `[..., z_dim]` to the logits of the Bernoulli means, `[..., 784]`."""
        return self.output(F.gelu(self.hidden(z))).float()

    def forward(self, input):
        """Maps latents `[batch, z_dim]` to Bernoulli means `[batch, 784]`."""
        return torch.sigmoid(self.logits(input))


class VAE(nn.Module):
    """Encoder, decoder and the standard-normal prior p(z) = N(0, I) on `z_dim` dimensions."""

    def __init__(self, hidden_dim=500, z_dim=20):
        super().__init__()
        self.z_dim = z_dim
        self.encoder = Encoder(hidden_dim, z_dim)
        self.decoder = Decoder(hidden_dim, z_dim)

    def forward(self, input):
        """Returns the average negative ELBO of a batch of binary images, a scalar in nats.

        -ELBO = E_q[-log p(x|z)] + KL(q(z|x) || p(z)) (paper, equation 3), the expectation
        estimated with a single z for each image.
        """
        reconstruction, kl = self.losses(input)
        return (reconstruction + kl).mean()

    def losses(self, input):
        """Returns the two terms of the negative ELBO, `[batch]` each, in nats (Question 1.10)."""
        mean, std = self.encoder(input)
        # z = mean + std * noise moves the randomness out of the way of the gradient: z is a
        # differentiable function of the encoder's output (paper, section 2.4).
        z = mean + std * torch.randn_like(std)
        reconstruction = -bernoulli_log_likelihood(self.decoder.logits(z), input.flatten(1))
        return reconstruction, kl_divergence(mean, std)

    @torch.no_grad()
    def sample(self, n_samples):
        """Draws from the model by ancestral sampling: z from the prior, then x from p(x|z).

        Returns binary images and the Bernoulli means they were drawn from, `[n, 1, 28, 28]` each.
        """
        z = torch.randn(n_samples, self.z_dim, device=self.decoder.output.weight.device)
        im_means = self.decoder(z).view(-1, 1, 28, 28)
        return torch.bernoulli(im_means), im_means


# ---------------------------------------------------------------------------------------
# Loss
# ---------------------------------------------------------------------------------------
def bernoulli_log_likelihood(logits, x):
    """Returns log p(x|z) of binary pixels, summed over the last dimension, in nats.

    With p = sigmoid(l): x log p + (1 - x) log(1 - p) = x l - log(1 + e^l), which is exact for
    any logit, where the logarithm of a rounded p would need a clamp.
    """
    return (x * logits - F.softplus(logits)).sum(dim=-1)


def kl_divergence(mean, std):
    """Returns KL(N(mean, std^2) || N(0, 1)) summed over the latent dimensions, in nats.

    The closed form of the paper's appendix B: sum_d (std^2 + mean^2 - 1 - log std^2) / 2.
    """
    return 0.5 * (std**2 + mean**2 - 1 - 2 * std.log()).sum(dim=-1)


# ---------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------
@torch.no_grad()
def test_losses(model, data):
    """Returns the average reconstruction and regularization loss over a loader, in nats."""
    losses = torch.stack([torch.stack(model.losses(x)).sum(dim=1) for x in data]).sum(dim=0)
    return (losses / len(data.images)).tolist()


@torch.no_grad()
def importance_log_likelihood(model, images, n_samples, rows=4000):
    """Estimates log p(x) of each image, `[batch]` in nats, with `n_samples` latents from q(z|x).

    log 1/K sum_k p(x|z_k) p(z_k) / q(z_k|x) (Burda et al., 2016, equation 8): a lower bound in
    expectation that rises to log p(x) with K. `rows` bounds the images decoded at once.
    """
    mean, std = model.encoder(images)
    x = images.flatten(1)
    log_weights = []
    chunk = max(1, rows // len(images))
    for start in range(0, n_samples, chunk):
        noise = torch.randn(min(chunk, n_samples - start), *mean.shape, device=mean.device)
        z = mean + std * noise
        # log p(z) - log q(z|x): the normalisers cancel, and (z - mean) / std is the noise.
        log_prior_ratio = (0.5 * (noise**2 - z**2) + std.log()).sum(dim=-1)
        log_weights.append(bernoulli_log_likelihood(model.decoder.logits(z), x) + log_prior_ratio)
    return torch.cat(log_weights).logsumexp(dim=0) - math.log(n_samples)


def test_log_likelihood(model, data, n_samples):
    """Returns the importance-sampled log p(x) averaged over a loader, in nats."""
    images = tqdm(data.images.split(20), desc="log p(x)", leave=False, disable=None)
    log_px = [importance_log_likelihood(model, x.float(), n_samples) for x in images]
    return torch.cat(log_px).mean().item()


# ---------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------
def save_elbo_plot(train_curve, val_curve, filename):
    """Plots the ELBO of training and validation (nats) against the epoch (Question 1.13)."""
    figure, axes = plt.subplots(figsize=(5, 3.2))
    epochs = range(1, len(train_curve) + 1)
    axes.plot(epochs, train_curve, label="training", marker="." if len(epochs) < 3 else None)
    axes.plot(epochs, val_curve, label="validation", marker="." if len(epochs) < 3 else None)
    # The first epochs would squeeze the rest of the curves into a line at the top.
    axes.set_ylim(bottom=min(min(val_curve), train_curve[min(1, len(train_curve) - 1)]) - 2)
    axes.set(xlabel="epoch", ylabel="ELBO (nats)")
    axes.legend(frameon=False, loc="lower right")
    save_figure(figure, filename)


def show_grid(axes, images, title, nrow=5):
    """Draws images `[n, 1, 28, 28]` with values in [0, 1] as one grid, black on white."""
    grid = make_grid(images.cpu(), nrow=nrow, padding=1, pad_value=0.5)[0]
    axes.imshow(grid.numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(title, fontsize=8)
    axes.axis("off")


def save_image_pair(left, right, filename, nrow=5):
    """Saves two grids side by side; each is (title, images `[n, 1, 28, 28]`)."""
    figure, axes = plt.subplots(1, 2, figsize=(3.6, 1.9), layout="constrained")
    for ax, (title, images) in zip(axes, (left, right), strict=True):
        show_grid(ax, images, title, nrow)
    save_figure(figure, filename)


@torch.no_grad()
def save_reconstructions(model, images, filename):
    """Saves test images beside the Bernoulli means decoded from their posterior means."""
    mean, _ = model.encoder(images)
    save_image_pair(
        ("test images", images.view(-1, 1, 28, 28)),
        ("reconstructions", model.decoder(mean).view(-1, 1, 28, 28)),
        filename,
    )


@torch.no_grad()
def save_manifold(model, filename, n_side=20):
    """Saves the decoded 2-d latent plane as a grid of Bernoulli means (paper, Figure 4b).

    The grid is even in the prior's probability: its latents are the prior's quantiles, given by
    the percent point function, at the centres of `n_side` equal shares (Question 1.15).
    """
    quantiles = scipy.stats.norm.ppf((np.arange(n_side) + 0.5) / n_side)
    z_1, z_2 = np.meshgrid(quantiles, quantiles[::-1])  # z_2 grows upwards, as on paper
    z = torch.tensor(np.stack([z_1.ravel(), z_2.ravel()], axis=1), dtype=torch.float32)
    means = model.decoder(z.to(model.decoder.output.weight.device)).view(-1, 1, 28, 28)
    figure, axes = plt.subplots(figsize=(6, 6))
    grid = make_grid(means.cpu(), nrow=n_side, padding=0)[0]
    axes.imshow(grid.numpy(), cmap="gray_r", vmin=0, vmax=1)
    ticks = np.arange(0, n_side, 4)
    axes.set_xticks(28 * ticks + 14, [f"{quantiles[i]:.2f}" for i in ticks])
    axes.set_yticks(28 * ticks + 14, [f"{quantiles[::-1][i]:.2f}" for i in ticks])
    axes.set(xlabel="$z_1$", ylabel="$z_2$")
    save_figure(figure, filename)


@torch.no_grad()
def save_latent_space(model, data, filename):
    """Saves the posterior means of a loader's images in the 2-d latent plane, coloured by digit."""
    mean = model.encoder(data.images.float())[0].cpu().numpy()
    figure, axes = plt.subplots(figsize=(5, 4.2))
    colours = {}
    if data.labels is not None:  # Larochelle's files have none
        colours = {"c": data.labels.cpu().numpy(), "cmap": "tab10", "vmin": -0.5, "vmax": 9.5}
    points = axes.scatter(*mean.T, s=2, lw=0, **colours)
    if colours:
        figure.colorbar(points, ticks=range(10), label="digit")
    axes.set(xlabel="$z_1$ (posterior mean)", ylabel="$z_2$ (posterior mean)", aspect="equal")
    save_figure(figure, filename)


# ---------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------
def epoch_iter(model, data, optimizer):
    """Runs one epoch and returns its average ELBO in nats; trains if `model.training`.

    Raises FloatingPointError, naming the batch, if a loss is not finite.
    """
    losses, sizes = [], []
    progress = tqdm(data, leave=False, disable=None)
    with torch.set_grad_enabled(model.training):
        for images in progress:
            loss = model(images)
            if model.training:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            losses.append(loss.detach().clone())  # --compile gives each loss the same memory
            sizes.append(len(images))
            show_loss(progress, losses)
    return -epoch_mean(losses, sizes)


def run_epoch(model, data, optimizer):
    """Trains on `data[0]`, validates on `data[1]`; returns `train_elbo, val_elbo` in nats."""
    traindata, valdata = data
    model.train()
    train_elbo = epoch_iter(model, traindata, optimizer)
    model.eval()
    val_elbo = epoch_iter(model, valdata, optimizer)
    return train_elbo, val_elbo


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
    parser = Parser("Trains a VAE on Binary MNIST.", batch_size=64, lr=3e-3)
    parser.add_argument("--epochs", type=number(int), default=40, help="passes over the images")
    parser.add_argument("--zdim", type=number(int), default=20, help="dimensions of the latent")
    parser.add_argument("--binarization", default="static", help="how grey images become binary",
                        choices=["static", "dynamic", "larochelle"])  # fmt: skip
    parser.add_argument("--iw_samples", type=number(int), default=1000,
                        help="importance samples for the test log p(x)")  # fmt: skip
    return parser.parse_args()


def make_optimizer(model, lr):
    """Returns Adam, with weight decay for the weights that read the pixels.

    It is the encoder that overfits: it can tell the training images apart by single pixels, while
    the decoder has to explain every code between theirs too.
    """
    reading = model.encoder.hidden.weight
    others = [parameter for parameter in model.parameters() if parameter is not reading]
    groups = [{"params": [reading], "weight_decay": 0.2}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def draw(model, n_samples=25):
    """Samples images and their means from the same latents whenever it is called."""
    with torch.random.fork_rng():
        torch.manual_seed(ARGS.seed)
        return torch.cat(model.sample(n_samples))


def evaluate(run, model, test):
    """Evaluates a trained model on the test set, and writes every number and figure."""
    reconstruction, kl = test_losses(model, test)
    log_px = test_log_likelihood(model, test, ARGS.iw_samples)
    sample_seconds = min(timeit.repeat(lambda: model.sample(1000)[0].cpu(), number=1))
    last = run.history[-1]
    final = {"train_elbo": last["train_elbo"], "val_elbo": last["val_elbo"],
             "test_elbo": -reconstruction - kl, "test_log_px": log_px}  # fmt: skip
    numbers = {name: f"{value:.1f}" for name, value in final.items()} | {
        "test_reconstruction": f"{reconstruction:.1f}",
        "test_kl": f"{kl:.1f}",
        "initial_elbo": f"{run.kept['initial_elbo']:.1f}",
        "iw_samples": ARGS.iw_samples,
        "sample_ms": f"{1000 * sample_seconds:.1f}",
    }
    curves = ([row[name] for row in run.history] for name in ("train_elbo", "val_elbo"))
    save_elbo_plot(*curves, run.folder / "elbo.pdf")
    for when in ("before", "halfway", "after"):
        samples, means = run.kept[f"samples_{when}"].chunk(2)
        pair = ("samples", samples), ("their Bernoulli means", means)
        save_image_pair(*pair, run.folder / f"samples_{when}.pdf")
    save_reconstructions(model, test.images[:25].float(), run.folder / "reconstructions.pdf")
    if ARGS.zdim == 2:
        save_manifold(model, run.folder / "manifold.pdf")
        save_latent_space(model, test, run.folder / "latent_space.pdf")
    print("  ".join(f"{name} {value:.2f}" for name, value in final.items()) + "  (nats)")
    run.finish(model, final, numbers)


def main():
    """Trains the VAE, then evaluates it."""
    device = set_up(ARGS)
    train, val, test = bmnist(ARGS.data_dir, ARGS.batch_size, binarization=ARGS.binarization,
                              device=device, seed=ARGS.seed)  # fmt: skip
    model = VAE(z_dim=ARGS.zdim).to(device)
    optimizer = make_optimizer(model, ARGS.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, ARGS.epochs * len(train))
    optimizer.register_step_post_hook(lambda *_: schedule.step())
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    name = f"vae_z{ARGS.zdim}" + (f"_{ARGS.binarization}" if ARGS.binarization != "static" else "")
    with Run(ARGS, name, ARGS.epochs, (train, val, test), **parts) as run:
        run.compile(model)
        if not run.history:
            run.kept["initial_elbo"] = epoch_iter(model.eval(), val, optimizer)
        run.keep_samples(lambda: draw(model))
        for _ in run.epochs():
            with run.autocast():
                train_elbo, val_elbo = run_epoch(model, (train, val), optimizer)
            run.keep_samples(lambda: draw(model))
            run.finish_epoch(train_elbo=train_elbo, val_elbo=val_elbo)
        evaluate(run, model.eval(), test)


if __name__ == "__main__":
    ARGS = parse_options()
    guard(main)
