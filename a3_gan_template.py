"""A generative adversarial network on MNIST (Goodfellow et al., 2014).

Read from top to bottom: the two networks, the value function of their game (written by hand),
the evaluation, the figures, the training loop, and at the end the command line. Run

    python a3_gan_template.py

and look into results/gan. `--help` lists the options.
"""

import argparse
import contextlib
import csv
import functools
import itertools
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
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from datasets.mnist import DataError, mnist

matplotlib.use("Agg")  # figures are written to files; no screen is needed
import matplotlib.pyplot as plt

N_PIXELS = 28 * 28
N_NEIGHBOURS = 10
AVERAGED_SHARE = 0.1  # of the training, by which the average of the weights looks back


# ---------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------
class Generator(nn.Module):
    """Turns standard-normal noise into images with pixels in [-1, 1]."""

    def __init__(self, latent_dim=100):
        super().__init__()
        self.latent_dim = latent_dim
        layers = [nn.Linear(latent_dim, 128), nn.LeakyReLU(0.2)]
        for n_in, n_out in ((128, 256), (256, 512), (512, 1024)):
            layers += [nn.Linear(n_in, n_out), nn.BatchNorm1d(n_out), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Linear(1024, N_PIXELS), nn.Tanh())

    def forward(self, z):
        """Maps latents `[batch, latent_dim]` to images `[batch, 784]` in [-1, 1]."""
        return self.layers(z).float()


class Discriminator(nn.Module):
    """Tells images of the data from images of the generator.

    Dropout keeps it from learning the training images by heart, after which it would hold
    every image it has not seen, the generator's best ones too, for a fake.
    """

    def __init__(self, dropout=0.3):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(N_PIXELS, 512), nn.LeakyReLU(0.2), nn.Dropout(dropout),
            nn.Linear(512, 256), nn.LeakyReLU(0.2), nn.Dropout(dropout),
            nn.Linear(256, 1),
        )  # fmt: skip

    def logits(self, img):
        """Maps images `[batch, 784]` to the logit of the probability of being real, `[batch]`."""
        return self.layers(img).float().squeeze(1)

    def forward(self, img):
        """Maps images `[batch, 784]` to the probability D(img) of being real, `[batch]`."""
        return torch.sigmoid(self.logits(img))


# ---------------------------------------------------------------------------------------
# Loss
# ---------------------------------------------------------------------------------------
def value_function(real_logits, fake_logits):
    """Returns V(D, G) = E[log D(x)] + E[log(1 - D(G(z)))] in nats (paper, equation 1).

    With D = sigmoid(l), 1 - D = sigmoid(-l): both logarithms are exact where D rounds to 0 or 1.
    """
    return F.logsigmoid(real_logits).mean() + F.logsigmoid(-fake_logits).mean()


def generator_loss(fake_logits):
    """Returns the non-saturating loss -E[log D(G(z))] in nats (paper, end of section 3).

    Where D sees through the generator, D(G(z)) = sigmoid(l) near 0, the gradient of
    log(1 - D(G(z))) to l is -D(G(z)) and vanishes; that of -log D(G(z)) is D(G(z)) - 1.
    """
    return -F.logsigmoid(fake_logits).mean()


# ---------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------
def to_generator_range(pixels):
    """Maps grey values 0..255 to the generator's range [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_unit_range(images):
    """Maps images in the generator's range [-1, 1] to [0, 1], where distances are measured."""
    return (images + 1) / 2


@torch.no_grad()
def draw(generator, n_samples, rows=1000):
    """Returns latents `[n, latent_dim]` and their images `[n, 784]` in [0, 1]."""
    device = next(generator.parameters()).device
    z = torch.randn(n_samples, generator.latent_dim, device=device)
    return z, torch.cat([to_unit_range(generator(part)) for part in z.split(rows)])


def squared_distances(a, b):
    """Yields the squared distances of the rows of `a` to those of `b` in blocks `[500, len(b)]`.

    A block takes 100 MB for 50,000 rows in `b`, where all rows at once would take gigabytes.
    """
    b_norms = b.square().sum(dim=1)
    for block in a.split(500):
        norms = block.square().sum(dim=1, keepdim=True) + b_norms
        # Rounding can push the distance of two equal rows below zero.
        yield torch.addmm(norms, block, b.T, alpha=-2).clamp_(min=0)


def nearest_neighbours(images, train_images, train_labels, k=N_NEIGHBOURS):
    """Finds each image's k nearest training images by Euclidean distance in pixel space.

    Returns the distance to the nearest one `[n]` and the labels of all `[n, k]`; k is at most the
    number of training images.
    """
    distances, labels = [], []
    for block in squared_distances(images, train_images):
        nearest, index = block.topk(min(k, len(train_images)), dim=1, largest=False)
        distances.append(nearest[:, 0].sqrt())
        labels.append(train_labels[index])
    return torch.cat(distances), torch.cat(labels)


def parzen_log_likelihoods(images, centres, sigmas):
    """Returns log p(x) in nats, `[len(sigmas), n]`, under Gaussian Parzen windows.

    p(x) is the mean over the centres c of N(x; c, sigma^2 I), images `[n, 784]` in [0, 1]
    (Breuleux et al., 2011; the protocol of Goodfellow et al., 2014, section 5). It is a weak
    judge: in 784 dimensions 10,000 windows cover little, and blurred averages score well.
    """
    n, dimensions = centres.shape
    columns = []
    for block in squared_distances(images, centres):
        columns.append(torch.stack([
            (block / (-2 * sigma**2)).logsumexp(dim=1)
            - math.log(n) - dimensions * math.log(sigma * math.sqrt(2 * math.pi))
            for sigma in sigmas
        ]))  # fmt: skip
    return torch.cat(columns, dim=1)


def parzen_estimate(centres, val_images, test_images):
    """Returns the mean test log-likelihood (nats), its standard error and the bandwidth.

    The bandwidth is the one that is best for the validation images.
    """
    sigmas = np.geomspace(0.1, 0.4, 21).tolist()
    best = parzen_log_likelihoods(val_images, centres, sigmas).mean(dim=1).argmax().item()
    log_px = parzen_log_likelihoods(test_images, centres, [sigmas[best]])[0].double()
    return log_px.mean().item(), (log_px.std() / len(log_px) ** 0.5).item(), sigmas[best]


def interpolate(z_from, z_to, n_images=9):
    """Returns `n_images` latents on the arc between two latents `[latent_dim]`, ends included.

    Spherical, because standard-normal latents of d dimensions lie near a sphere of radius
    sqrt(d): the middle of a straight line has about 0.7 of that length, where the generator
    was never trained (White, 2016). Parallel latents have no arc and get the straight line.
    """
    t = torch.linspace(0, 1, n_images, device=z_from.device)[:, None]
    angle = torch.acos(torch.cosine_similarity(z_from, z_to, dim=0).clamp(-1, 1))
    if angle.sin() < 1e-3:
        return torch.lerp(z_from, z_to, t)
    return (torch.sin((1 - t) * angle) * z_from + torch.sin(t * angle) * z_to) / torch.sin(angle)


def two_classes(labels):
    """Returns the rows of two images of different digits, given their neighbours' labels `[n, k]`.

    They are the first image whose neighbours all agree and the first such image of another digit;
    None if there are no two.
    """
    sure = (labels == labels[:, :1]).all(dim=1).nonzero().flatten()
    others = sure[labels[sure, 0] != labels[sure[:1], 0]]
    return [sure[0].item(), others[0].item()] if len(others) else None


# ---------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------
def save_training_plot(history, filename):
    """Plots the value and the discriminator's mean outputs by epoch, with where they head for."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(7, 2.8), layout="constrained")
    epochs = [row["epoch"] for row in history]
    marker = "." if len(epochs) < 3 else None
    left.plot(epochs, [row["value"] for row in history], marker=marker)
    left.axhline(-math.log(4), color="0.5", ls="--", label=r"$-\log 4$")
    left.set(xlabel="epoch", ylabel="V(D, G) (nats)")
    for name, label in (("d_real", "D(x)"), ("d_fake", "D(G(z))")):
        right.plot(epochs, [row[name] for row in history], marker=marker, label=label)
    right.axhline(0.5, color="0.5", ls="--", label="1/2")
    right.set(xlabel="epoch", ylabel="mean output of D", ylim=(0, 1))
    for axes in (left, right):
        axes.legend(frameon=False)
    save_figure(figure, filename)


def save_images(images, filename, nrow, title=None):
    """Saves images `[n, 784]` with values in [0, 1] as one grid, `nrow` to a row."""
    grid = make_grid(images.view(-1, 1, 28, 28).cpu(), nrow=nrow, padding=1, pad_value=0.5)[0]
    figure, axes = plt.subplots(figsize=(0.6 * nrow, 0.6 * math.ceil(len(images) / nrow)))
    axes.imshow(grid.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(title, fontsize=9)
    axes.axis("off")
    save_figure(figure, filename)


# ---------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------
def train(dataloader, discriminator, generator, optimizer_G, optimizer_D):
    """Trains both networks for one epoch (paper, Algorithm 1, with one discriminator step).

    Returns the epoch's means of V, both losses, D(x) and D(G(z)) by name; a value that is not
    finite is a FloatingPointError that names its batch.
    """
    names = ("value", "loss_d", "loss_g", "d_real", "d_fake")
    metrics, sizes = [], []
    progress = tqdm(dataloader, leave=False, disable=None)
    generator.train()
    discriminator.train()
    for pixels, _ in progress:
        real = to_generator_range(pixels)
        fake = generator(torch.randn(len(real), generator.latent_dim, device=real.device))

        # The discriminator ascends V; the fake images are constants to it.
        logits = discriminator.logits(torch.cat([real, fake.detach()]))
        real_logits, fake_logits = logits.chunk(2)
        value = value_function(real_logits, fake_logits)
        optimizer_D.zero_grad()
        (-value).backward()
        optimizer_D.step()

        # The generator answers the improved discriminator with the same images, whose graph
        # is still there. No gradient to the discriminator's weights is computed.
        loss_g = generator_loss(discriminator.logits(fake))
        optimizer_G.zero_grad()
        loss_g.backward(inputs=list(generator.parameters()))
        optimizer_G.step()

        with torch.no_grad():
            d_real, d_fake = torch.sigmoid(real_logits).mean(), torch.sigmoid(fake_logits).mean()
            metrics.append(torch.stack([value, -value, loss_g, d_real, d_fake]))
        sizes.append(len(real))
        show_loss(progress, metrics)
    return dict(zip(names, epoch_mean(metrics, sizes), strict=True))


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
    parser = Parser("Trains a GAN on MNIST.", batch_size=64, lr=2e-4)
    add = parser.add_argument
    add("--n_epochs", type=number(int), default=200, help="passes over the images")
    add("--latent_dim", type=number(int), default=100, help="dimensions of the latent")
    add("--save_interval", type=number(int), default=500, help="iterations between sample grids")
    add("--eval_samples", type=number(int, 1), default=10_000, help="samples that are judged")
    return parser.parse_args()


def decay(step, n_steps):
    """Returns the factor of the learning rates: 1, then from half-way on a line down to 0."""
    return min(1, 2 * (1 - step / n_steps))


def judge(generator, train_set, val_set, test_set, n_samples):
    """Measures the quality of `n_samples` images, and picks two for the interpolation.

    Returns the measures by name, and the latents and digits of the two images.
    """
    splits = [data.images.float() / 255 for data in (train_set, val_set, test_set)]
    train_images, val_images, test_images = splits
    z, samples = draw(generator, n_samples)
    nearest, labels = nearest_neighbours(samples, train_images, train_set.labels)
    nearest_test, _ = nearest_neighbours(test_images, train_images, train_set.labels)
    digits = labels.mode(dim=1).values
    shares = digits.bincount(minlength=10) / len(digits)
    parzen, parzen_stderr, sigma = parzen_estimate(samples, val_images, test_images)
    # As many training images in the samples' place: what perfect samples would reach.
    real = parzen_estimate(train_images[:n_samples], val_images, test_images)
    final = {
        "parzen": parzen, "parzen_stderr": parzen_stderr, "parzen_sigma": sigma,
        "parzen_train": real[0], "parzen_train_stderr": real[1],
        "digit_shares": shares.tolist(),
        "digit_entropy": -torch.xlogy(shares, shares).sum().item(),
        "digits_present": (shares > 0).sum().item(),
        "nearest_sample": nearest.mean().item(),
        "nearest_test": nearest_test.mean().item(),
    }  # fmt: skip
    rows = two_classes(labels) or [0, 1]
    return final, z[rows], digits[rows].tolist()


def evaluate(run, generator, loaders):
    """Evaluates a trained generator, and writes every number and figure."""
    final, (z_from, z_to), (digit_from, digit_to) = judge(generator, *loaders, ARGS.eval_samples)
    save_training_plot(run.history, run.folder / "training.pdf")
    for when in ("before", "halfway", "after"):
        save_images(run.kept[f"samples_{when}"], run.folder / f"samples_{when}.pdf", nrow=5)
    with torch.no_grad():
        steps = to_unit_range(generator(interpolate(z_from, z_to)))
    title = f"from {digit_from} to {digit_to}"
    save_images(steps, run.folder / "interpolation.pdf", nrow=9, title=title)
    seconds = min(timeit.repeat(lambda: draw(generator, 1000)[1].cpu(), number=1))
    shares, last = final["digit_shares"], run.history[-1]
    final |= {name: last[name] for name in ("value", "loss_d", "loss_g", "d_real", "d_fake")}
    decimals = {"digits_present": 0, "parzen": 1, "parzen_stderr": 1, "parzen_train": 1,
                "parzen_train_stderr": 1, "nearest_sample": 2, "nearest_test": 2}  # fmt: skip
    scalars = {name: value for name, value in final.items() if name != "digit_shares"}
    numbers = {name: f"{value:.{decimals.get(name, 3)}f}" for name, value in scalars.items()} | {
        "share_min": f"{100 * min(shares):.1f}",
        "share_max": f"{100 * max(shares):.1f}",
        "digit_from": digit_from,
        "digit_to": digit_to,
        "sample_ms": f"{1000 * seconds:.1f}",
    }
    print(f"Parzen {final['parzen']:.1f} +- {final['parzen_stderr']:.1f} nats")
    run.finish(generator, final, numbers)


def main():
    """Trains the GAN, then evaluates it."""
    device = set_up(ARGS)
    if ARGS.batch_size == 1:
        fail("--batch_size 1 is not allowed: batch normalisation needs at least 2 images")
    # The last 10,000 images choose the bandwidth of the Parzen windows, so none is trained on.
    loaders = mnist(ARGS.data_dir, ARGS.batch_size, n_train=50_000, shift=False, drop_last=True,
                    device=device, seed=ARGS.seed)  # fmt: skip
    generator = Generator(ARGS.latent_dim).to(device)
    discriminator = Discriminator().to(device)
    adam = {"lr": ARGS.lr, "betas": (0.5, 0.999), "fused": True}
    optimizer_G = torch.optim.Adam(generator.parameters(), **adam)
    optimizer_D = torch.optim.Adam(discriminator.parameters(), **adam)
    n_steps = ARGS.n_epochs * len(loaders[0])
    factor = functools.partial(decay, n_steps=n_steps)
    schedule_G = torch.optim.lr_scheduler.LambdaLR(optimizer_G, factor)
    schedule_D = torch.optim.lr_scheduler.LambdaLR(optimizer_D, factor)
    # Two adversaries circle around the solution more than they approach it; the average of the
    # last part of the way lies closer. Samples come from it, and training never sees it.
    ema = get_ema_multi_avg_fn(1 - 1 / (1 + AVERAGED_SHARE * n_steps))
    average = AveragedModel(generator, multi_avg_fn=ema, use_buffers=True).eval()
    z = torch.randn(25, ARGS.latent_dim, generator=torch.Generator().manual_seed(ARGS.seed))
    parts = {"generator": generator, "discriminator": discriminator, "average": average,
             "optimizer_G": optimizer_G, "optimizer_D": optimizer_D,
             "schedule_G": schedule_G, "schedule_D": schedule_D}  # fmt: skip
    with Run(ARGS, "gan", ARGS.n_epochs, loaders, **parts) as run:

        @torch.no_grad()
        def grid():
            return to_unit_range(average(z.to(device)))

        def after_step(*_):
            average.update_parameters(generator)
            if ARGS.compile:  # the next step may write over this one's images
                torch.compiler.cudagraph_mark_step_begin()
            step = next(steps)
            if step % ARGS.save_interval == 0:
                with replacing(progress / f"{step:06d}.png") as path:
                    save_image(grid().view(-1, 1, 28, 28), path, nrow=5)

        progress = run.folder / "progress"
        progress.mkdir(exist_ok=True)
        steps = itertools.count(1 + len(run.history) * len(loaders[0]))
        optimizer_D.register_step_post_hook(lambda *_: schedule_D.step())
        optimizer_G.register_step_post_hook(lambda *_: schedule_G.step())
        optimizer_G.register_step_post_hook(after_step)
        run.compile(generator, discriminator.layers)
        run.keep_samples(grid)
        for _ in run.epochs():
            with run.autocast():
                metrics = train(loaders[0], discriminator, generator, optimizer_G, optimizer_D)
            run.keep_samples(grid)
            run.finish_epoch(**metrics)
        evaluate(run, average.module, loaders)


if __name__ == "__main__":
    ARGS = parse_options()
    guard(main)
