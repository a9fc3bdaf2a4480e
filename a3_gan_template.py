"""A generative adversarial network on MNIST (Goodfellow et al., 2014).

Read from top to bottom: the two networks, the value function of their game (written by hand),
the evaluation, the figures, the training, and at the end the command line. Run

    python a3_gan_template.py

and look into results/gan. `--help` lists the options.
"""

import argparse
import contextlib
import copy
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
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from datasets.mnist import DataError, mnist

matplotlib.use("Agg")  # figures are written to files; no screen is needed
import matplotlib.pyplot as plt

N_PIXELS = 28 * 28
N_NEIGHBOURS = 10


# ------------------------------------ Model ------------------------------------
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

    Without dropout it learns the training images by heart, and then takes any other image, however
    good, for a fake.
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


# ------------------------------------ Loss ------------------------------------
def value_function(real_logits, fake_logits):
    """Returns V(D, G) = E[log D(x)] + E[log(1 - D(G(z)))] in nats (paper, equation 1).

    With D = sigmoid(l), 1 - D = sigmoid(-l): both logarithms are exact where D rounds to 0 or 1.
    """
    return F.logsigmoid(real_logits).mean() + F.logsigmoid(-fake_logits).mean()


def generator_loss(fake_logits):
    """Returns the non-saturating loss -E[log D(G(z))] in nats (paper, end of section 3).

    Where D sees through the generator, D(G(z)) = sigmoid(l) near 0, the derivative of
    log(1 - D(G(z))) in l is -D(G(z)) and vanishes; that of -log D(G(z)) is D(G(z)) - 1.
    """
    return -F.logsigmoid(fake_logits).mean()


# ------------------------------------ Evaluation ------------------------------------
@torch.no_grad()
def sample_images(generator, z):
    """Returns the images `[n, 784]` of latents `[n, latent_dim]`, with pixels in [0, 1]."""
    return (generator(z) + 1) / 2


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
    log_px = parzen_log_likelihoods(test_images, centres, [sigmas[best]])[0].cpu().double()
    return log_px.mean().item(), (log_px.std() / len(log_px) ** 0.5).item(), sigmas[best]


def judge(generator, train_set, val_set, test_set, n_samples):
    """Measures the quality of `n_samples` images, and picks two for the interpolation.

    A sample's digit is the most frequent one of its ten nearest training images. Returns the
    measures by name, and the latents and digits of the two images.
    """
    splits = [data.images.float() / 255 for data in (train_set, val_set, test_set)]
    train_images, val_images, test_images = splits
    z = torch.randn(n_samples, generator.latent_dim, device=train_images.device)
    samples = sample_images(generator, z)
    nearest, labels = nearest_neighbours(samples, train_images, train_set.labels)
    nearest_test, _ = nearest_neighbours(test_images, train_images, train_set.labels)
    digits = labels.mode(dim=1).values
    shares = digits.cpu().bincount(minlength=10).double() / len(digits)
    test_shares = test_set.labels.cpu().bincount(minlength=10).double() / len(test_set.labels)
    parzen, parzen_stderr, sigma = parzen_estimate(samples, val_images, test_images)
    # As many training images in the samples' place: what perfect samples would reach.
    real = parzen_estimate(train_images[:n_samples], val_images, test_images)
    final = {
        "parzen": parzen, "parzen_stderr": parzen_stderr, "parzen_sigma": sigma,
        "parzen_train": real[0], "parzen_train_stderr": real[1],
        "digit_shares": shares.tolist(), "test_digit_shares": test_shares.tolist(),
        "digit_entropy": -torch.xlogy(shares, shares).sum().item(),
        "digits_present": (shares > 0).sum().item(),
        # A mean would hide a few copies of training images; the smallest distances would not.
        "nearest_sample": nearest.mean().item(), "nearest_test": nearest_test.mean().item(),
        "nearest_sample_min": nearest.min().item(), "nearest_test_min": nearest_test.min().item(),
    }  # fmt: skip
    rows = two_classes(labels) or [0, 1]
    return final, z[rows], digits[rows].tolist()


def two_classes(labels):
    """Returns the rows of two images of different digits, given their neighbours' labels `[n, k]`.

    They are the first image whose neighbours all agree and the first such image of another digit;
    None if there are no two.
    """
    sure = (labels == labels[:, :1]).all(dim=1).nonzero().flatten()
    others = sure[labels[sure, 0] != labels[sure[:1], 0]]
    return [sure[0].item(), others[0].item()] if len(others) else None


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


# ------------------------------------ Figures ------------------------------------
def save_training_plot(history, filename):
    """Plots V and the mean outputs of D by epoch; dashed: their values at the equilibrium."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(5.5, 2.2), layout="constrained")
    marker = "." if len(history["epoch"]) == 1 else None
    left.plot(history["epoch"], history["value"], marker=marker)
    left.axhline(-math.log(4), color="0.5", ls="--", label=r"$-\log 4$")
    left.set(xlabel="epoch", ylabel="V(D, G) (nats)")
    for name, label in (("d_real", "D(x)"), ("d_fake", "D(G(z))")):
        right.plot(history["epoch"], history[name], marker=marker, label=label)
    right.axhline(0.5, color="0.5", ls="--", label="1/2")
    right.set(xlabel="epoch", ylabel="mean output of D", ylim=(0, 1))
    for axes in (left, right):
        axes.legend(frameon=False)
    save_figure(figure, filename)


def save_images(images, filename, nrow):
    """Saves images `[n, 784]` in [0, 1] as one grid, black on white, `nrow` to a row."""
    grid = make_grid(images.view(-1, 1, 28, 28).cpu(), nrow=nrow, padding=1, pad_value=0.5)[0]
    figure, axes = plt.subplots(figsize=(0.6 * nrow, 0.6 * math.ceil(len(images) / nrow)))
    axes.imshow(grid.numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    axes.axis("off")
    save_figure(figure, filename)


# ------------------------------------ Training ------------------------------------
def decay(step, n_steps):
    """Returns the factor of the learning rates: 1, then from half-way on a line down to 0."""
    return min(1, 2 * (1 - step / n_steps))


def train(dataloader, discriminator, generator, optimizer_G, optimizer_D):
    """Trains both networks by turns (paper, Algorithm 1, k = 1, with the same noise for both).

    Returns the generator with averaged weights, which `evaluate` saves for use in the report, and
    the means over each epoch of V, both losses, D(x) and D(G(z)), by name. A value that is not
    finite is a FloatingPointError.
    """
    n_steps = ARGS.n_epochs * len(dataloader)
    factor = functools.partial(decay, n_steps=n_steps)
    schedule_G, schedule_D = LambdaLR(optimizer_G, factor), LambdaLR(optimizer_D, factor)
    # Two adversaries circle around the solution more than they approach it; the average of the
    # last part of the way lies closer. Samples come from it, and training never sees it.
    average = copy.deepcopy(generator).eval()
    weights, averaged = generator.state_dict().values(), average.state_dict().values()

    parts = {"generator": generator, "discriminator": discriminator, "average": average,
             "optimizer_G": optimizer_G, "optimizer_D": optimizer_D,
             "schedule_G": schedule_G, "schedule_D": schedule_D}  # fmt: skip
    columns = ("epoch", "value", "loss_d", "loss_g", "d_real", "d_fake", "seconds")
    history = {name: [] for name in columns}
    if ARGS.resume:
        history = load_checkpoint(ARGS, parts, dataloader.generator)
    elif ARGS.precision == "auto":
        ARGS.precision = faster_precision(ARGS)
    folder, bfloat16 = ARGS.results_dir, ARGS.precision == "bfloat16"
    (folder / "progress").mkdir(parents=True, exist_ok=True)
    print(f"training on {ARGS.device} in {ARGS.precision}, results in {folder}", flush=True)

    z = torch.randn(25, generator.latent_dim, generator=torch.Generator().manual_seed(ARGS.seed))
    z = z.to(ARGS.device)  # of all the sample grids
    if not history["epoch"]:
        for stale in (folder / "progress").glob("*.png"):
            stale.unlink()
        save_images(sample_images(average, z), folder / "samples_before.pdf", nrow=5)

    for epoch in range(len(history["epoch"]) + 1, ARGS.n_epochs + 1):
        start, metrics, sizes = time.perf_counter(), [], []
        generator.train()
        discriminator.train()
        for i, (pixels, _) in enumerate(tqdm(dataloader, leave=False, disable=None), 1):
            real = pixels / 127.5 - 1  # grey values 0..255 to the generator's range

            # Train Discriminator (before the generator, as in Algorithm 1)
            # -------------------
            # One context an update: it keeps the bfloat16 copies of the weights that it has made,
            # and around several updates it would go on computing with the first weights.
            with torch.autocast(ARGS.device, torch.bfloat16, bfloat16):
                fake = generator(torch.randn(len(real), generator.latent_dim, device=real.device))
                # It ascends V; the fake images are constants to it.
                logits = discriminator.logits(torch.cat([real, fake.detach()]))
                real_logits, fake_logits = logits.chunk(2)
                value = value_function(real_logits, fake_logits)
            optimizer_D.zero_grad()
            (-value).backward()
            optimizer_D.step()
            schedule_D.step()

            # Train Generator
            # ---------------
            # The improved discriminator judges the same images, whose graph is still there; its
            # own weights get no gradient.
            with torch.autocast(ARGS.device, torch.bfloat16, bfloat16):
                loss_g = generator_loss(discriminator.logits(fake))
            optimizer_G.zero_grad()
            loss_g.backward(inputs=list(generator.parameters()))
            optimizer_G.step()
            schedule_G.step()

            # Average Generator (over about the last fifth of the batches so far)
            # -----------------
            # Polynomial-decay averaging (Shamir & Zhang, 2013, with eta = 4).
            batches_done = (epoch - 1) * len(dataloader) + i
            for mean, new in zip(averaged, weights, strict=True):
                if new.is_floating_point():  # all but batch normalisation's counters
                    mean.lerp_(new, 5 / (4 + batches_done))

            # Save Images
            # -----------
            if batches_done % ARGS.save_interval == 0:
                images = sample_images(average, z).view(-1, 1, 28, 28)
                with replacing(folder / "progress" / f"{batches_done:06d}.png") as path:
                    save_image(1 - images, path, nrow=5)  # black on white

            with torch.no_grad():
                d_real, d_fake = (torch.sigmoid(x).mean() for x in (real_logits, fake_logits))
                metrics.append(torch.stack([value, -value, loss_g, d_real, d_fake]))
            sizes.append(len(real))

        row = [epoch, *epoch_mean(metrics, sizes), time.perf_counter() - start]
        for column, entry in zip(history.values(), row, strict=True):
            column.append(entry)
        if epoch == (ARGS.n_epochs + 1) // 2:
            save_images(sample_images(average, z), folder / "samples_halfway.pdf", nrow=5)
        if epoch == ARGS.n_epochs:
            save_images(sample_images(average, z), folder / "samples_after.pdf", nrow=5)
        save_checkpoint(ARGS, history, parts, dataloader.generator)
        shown = "  ".join(f"{name} {history[name][-1]:.4f}" for name in columns[1:-1])
        print(f"epoch {epoch}/{ARGS.n_epochs}  {shown}  {row[-1]:.1f} s", flush=True)
    return average, history


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


def evaluate(generator, discriminator, loaders, history):
    """Measures the trained generator; writes numbers, figures and weights."""
    folder = ARGS.results_dir
    final, ends, digits = judge(generator, *loaders, ARGS.eval_samples)
    z = torch.randn(1000, generator.latent_dim, device=ends.device)
    final |= {name: history[name][-1] for name in ("value", "loss_d", "loss_g", "d_real", "d_fake")}
    final |= {
        "eval_samples": ARGS.eval_samples, "digit_from": digits[0], "digit_to": digits[1],
        "generator_parameters": sum(p.numel() for p in generator.parameters()),
        "discriminator_parameters": sum(p.numel() for p in discriminator.parameters()),
        "sample_ms": 1000 * min(timeit.repeat(lambda: sample_images(generator, z).cpu(), number=1)),
    }  # fmt: skip
    save_training_plot(history, folder / "training.pdf")
    steps = sample_images(generator, interpolate(*ends))
    save_images(steps, folder / "interpolation.pdf", nrow=9)
    save_results(ARGS, history, generator, final)
    print(f"Parzen {final['parzen']:.1f} +- {final['parzen_stderr']:.1f} nats")


def main():
    if ARGS.batch_size == 1:
        fail("--batch_size 1 is not allowed: batch normalisation needs at least 2 images")
    torch.manual_seed(ARGS.seed)
    # The last 10,000 images choose the bandwidth of the Parzen windows, so none is trained on.
    loaders = mnist(ARGS.data_dir, ARGS.batch_size, n_train=50_000, shift=False, drop_last=True,
                    device=ARGS.device, seed=ARGS.seed)  # fmt: skip
    if ARGS.fast_dev_run:
        ARGS.n_epochs = 1
        for loader in loaders:
            loader.limit(2)
    generator = Generator(ARGS.latent_dim).to(ARGS.device)
    discriminator = Discriminator().to(ARGS.device)
    adam = {"lr": ARGS.lr, "betas": (0.5, 0.999), "fused": True}
    optimizer_G = torch.optim.Adam(generator.parameters(), **adam)
    optimizer_D = torch.optim.Adam(discriminator.parameters(), **adam)

    average, history = train(loaders[0], discriminator, generator, optimizer_G, optimizer_D)

    evaluate(average, discriminator, loaders, history)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.error = fail  # one line, where argparse would print its usage, too
    parser.add_argument("--n_epochs", type=number(int), default=200, help="passes over the images")
    parser.add_argument("--batch_size", type=number(int), default=64, help="images in a batch")
    parser.add_argument("--lr", type=number(float), default=2e-4, help="learning rates of Adam")
    parser.add_argument("--latent_dim", type=number(int), default=100, help="of the latent space")
    parser.add_argument("--save_interval", type=number(int), default=500,
                        help="batches between sample grids")  # fmt: skip
    parser.add_argument("--eval_samples", type=number(int, 1), default=10_000,
                        help="samples that are judged")  # fmt: skip
    parser.add_argument("--seed", type=number(int, -1), default=0, help="of every random draw")
    parser.add_argument("--device", default=DEVICES[-1], choices=DEVICES, help="where to run")
    parser.add_argument("--precision", default="auto", choices=["auto", "float32", "bfloat16"],
                        help="of products in each epoch; auto: what is faster")  # fmt: skip
    parser.add_argument("--data_dir", type=Path, default=REPOSITORY / "datasets", help="data files")
    parser.add_argument("--results_dir", type=Path, help="if not one named by the options")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--fast_dev_run", action="store_true", help="two batches: does it run?")

    ARGS = parser.parse_args()
    ARGS.results_dir = ARGS.results_dir or results_folder("gan", parser, ARGS)

    with guard(ARGS):
        main()
