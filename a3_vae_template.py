"""A variational autoencoder on Binary MNIST (Kingma & Welling, 2014).

Read from top to bottom: encoder and decoder, the loss (the evidence lower bound, written by hand),
the evaluation, the figures, the training, and at the end the command line. Run

    python a3_vae_template.py                # 20-d latent: curves, samples, test log-likelihood
    python a3_vae_template.py --zdim 2       # 2-d latent: the manifold as well

and look into results/vae and results/vae_zdim2. `--help` lists the options.
"""

import argparse
import contextlib
import csv
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


# ------------------------------------ Model ------------------------------------
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


# ------------------------------------ Loss ------------------------------------
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


# ------------------------------------ Evaluation ------------------------------------
@torch.no_grad()
def mean_losses(model, data):
    """Returns the average reconstruction and regularization loss over a loader, in nats."""
    losses = torch.stack([torch.stack(model.losses(x)).sum(dim=1) for x in data]).sum(dim=0)
    return (losses / len(data.images)).tolist()


@torch.no_grad()
def importance_log_likelihood(model, images, n_samples):
    """Estimates log p(x) of each image, `[batch]` in nats, with `n_samples` latents from q(z|x).

    log 1/K sum_k p(x|z_k) p(z_k) / q(z_k|x) (Burda et al., 2016, equation 8): a lower bound in
    expectation that rises to log p(x) with K.
    """
    mean, std = model.encoder(images)
    noise = torch.randn(n_samples, *mean.shape, device=mean.device)
    z = mean + std * noise
    # log p(z) - log q(z|x): the normalisers cancel, and (z - mean) / std is the noise.
    log_prior_ratio = (0.5 * (noise**2 - z**2) + std.log()).sum(dim=-1)
    log_likelihood = bernoulli_log_likelihood(model.decoder.logits(z), images.flatten(1))
    return (log_likelihood + log_prior_ratio).logsumexp(dim=0) - math.log(n_samples)


def mean_log_likelihood(model, data, n_samples):
    """Returns the importance-sampled log p(x) averaged over a loader, in nats."""
    parts = data.images.split(max(1, 4000 // n_samples))  # about 4,000 latents at once
    parts = tqdm(parts, desc="log p(x)", leave=False, disable=None)
    log_px = [importance_log_likelihood(model, x.float(), n_samples) for x in parts]
    return torch.cat(log_px).mean().item()


# ------------------------------------ Figures ------------------------------------
def save_elbo_plot(train_curve, val_curve, filename):
    """Plots the ELBO of training and validation (nats) against the epoch (Question 1.13)."""
    figure, axes = plt.subplots(figsize=(4.6, 2.4))
    epochs = range(1, len(train_curve) + 1)
    for label, curve in (("training", train_curve), ("validation", val_curve)):
        axes.plot(epochs, curve, label=label, marker="." if len(epochs) == 1 else None)
    if len(epochs) > 1:  # the first training value would squeeze the rest into a line at the top
        axes.set_ylim(bottom=val_curve[0] - 2)
    axes.set(xlabel="epoch", ylabel="ELBO (nats)")
    axes.legend(frameon=False, loc="lower right")
    save_figure(figure, filename)


def save_samples(model, filename, n_samples=25):
    """Saves samples on the left and their Bernoulli means on the right, of always the same z."""
    with torch.random.fork_rng():  # looking at samples must not change the training
        torch.manual_seed(ARGS.seed)
        pair = model.sample(n_samples)
    figure, axes = plt.subplots(1, 2, figsize=(3.6, 1.8), layout="constrained")
    for ax, images in zip(axes, pair, strict=True):
        grid = make_grid(images.cpu(), nrow=5, padding=1, pad_value=0.5)[0]
        ax.imshow(grid.numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
        ax.axis("off")
    save_figure(figure, filename)


@torch.no_grad()
def save_manifold(model, filename, n_side=20):
    """Saves the decoded 2-d latent plane as a grid of Bernoulli means (paper, Figure 4b).

    Its latents are the prior's quantiles (i + 1/2) / `n_side` in each dimension, given by the
    percent point function: each stands for a cell of equal prior mass (Question 1.15).
    """
    quantiles = scipy.stats.norm.ppf((np.arange(n_side) + 0.5) / n_side)
    z_1, z_2 = np.meshgrid(quantiles, quantiles[::-1])  # z_2 grows upwards, as on paper
    z = torch.tensor(np.stack([z_1.ravel(), z_2.ravel()], axis=1), dtype=torch.float32)
    means = model.decoder(z.to(model.decoder.output.weight.device)).view(-1, 1, 28, 28)
    figure, axes = plt.subplots(figsize=(5, 5))
    grid = make_grid(means.cpu(), nrow=n_side, padding=0)[0]
    axes.imshow(grid.numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    ticks = np.arange(0, n_side, 4)
    axes.set_xticks(28 * ticks + 14, [f"{quantiles[i]:.2f}" for i in ticks])
    axes.set_yticks(28 * ticks + 14, [f"{quantiles[::-1][i]:.2f}" for i in ticks])
    axes.set(xlabel="$z_1$", ylabel="$z_2$")
    save_figure(figure, filename)


@torch.no_grad()
def save_latent_space(model, data, filename):
    """Saves the posterior means of a loader's images in the 2-d latent plane, coloured by digit."""
    mean = model.encoder(data.images.float())[0].cpu().numpy()
    figure, axes = plt.subplots(figsize=(4.6, 3.8))
    colours = {"c": data.labels.cpu().numpy(), "cmap": "tab10", "vmin": -0.5, "vmax": 9.5}
    points = axes.scatter(*mean.T, s=2, lw=0, **colours)
    figure.colorbar(points, ticks=range(10), label="digit")
    axes.set(xlabel="$z_1$ (posterior mean)", ylabel="$z_2$ (posterior mean)", aspect="equal")
    save_figure(figure, filename)


# ------------------------------------ Training ------------------------------------
def epoch_iter(model, data, optimizer, schedule=None, precision="float32"):
    """Runs one epoch and returns its average ELBO in nats; trains if `model.training`.

    Matrix products run in `precision`; `schedule` sets the learning rate after every step.
    Raises FloatingPointError, naming the batch, if a loss is not finite.
    """
    losses, sizes = [], []
    for images in tqdm(data, leave=False, disable=None):
        mixed = torch.autocast(images.device.type, torch.bfloat16, precision == "bfloat16")
        # One context a step: it keeps the bfloat16 copies of the weights that it has made, and
        # around several steps it would go on computing with the weights of the first.
        with mixed, torch.set_grad_enabled(model.training):
            loss = model(images)

        if model.training:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()

        losses.append(loss.detach())
        sizes.append(len(images))
    return -epoch_mean(losses, sizes)


def run_epoch(model, data, optimizer, schedule=None, precision="float32"):
    """Trains on `data[0]`, validates on `data[1]`; returns `train_elbo, val_elbo` in nats."""
    traindata, valdata = data

    model.train()
    train_elbo = epoch_iter(model, traindata, optimizer, schedule, precision)

    model.eval()
    val_elbo = epoch_iter(model, valdata, optimizer, precision=precision)

    return train_elbo, val_elbo


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


def evaluate(model, val, test, history):
    """Measures the trained model on the test images; writes numbers, figures and weights."""
    folder = ARGS.results_dir
    train_curve, val_curve = history["train_elbo"], history["val_elbo"]
    reconstruction, kl = mean_losses(model, test)
    final = {
        "train_elbo": train_curve[-1], "val_elbo": val_curve[-1], "test_elbo": -reconstruction - kl,
        "test_reconstruction": reconstruction, "test_kl": kl, "iw_samples": ARGS.iw_samples,
        "test_log_px": mean_log_likelihood(model, test, ARGS.iw_samples),
        "sample_ms": 1000 * min(timeit.repeat(lambda: model.sample(1000)[0].cpu(), number=1)),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }  # fmt: skip
    torch.manual_seed(ARGS.seed)  # the random weights again, which a resumed run has not seen
    untrained = VAE(z_dim=ARGS.zdim).to(ARGS.device).eval()
    final["initial_elbo"] = epoch_iter(untrained, val, optimizer=None)
    save_elbo_plot(train_curve, val_curve, folder / "elbo.pdf")
    if ARGS.zdim == 2:
        save_manifold(model, folder / "manifold.pdf")
    if ARGS.zdim == 2 and test.labels is not None:  # Larochelle's files have none
        save_latent_space(model, test, folder / "latent_space.pdf")
    save_results(ARGS, history, model, final)
    print(f"test_elbo {final['test_elbo']:.2f}  test_log_px {final['test_log_px']:.2f}  (nats)")


def main():
    torch.manual_seed(ARGS.seed)
    data = bmnist(ARGS.data_dir, ARGS.batch_size, binarization=ARGS.binarization,
                  device=ARGS.device, seed=ARGS.seed)  # fmt: skip
    if ARGS.fast_dev_run:
        ARGS.epochs = 1
        for loader in data:
            loader.limit(2)
    train, val, test = data
    model = VAE(z_dim=ARGS.zdim).to(ARGS.device)
    # Weight decay for the first layer alone, for it is the encoder that overfits: single pixels
    # tell it the training images apart, while the decoder has to explain the codes between, too.
    first = model.encoder.hidden.weight
    others = [parameter for parameter in model.parameters() if parameter is not first]
    groups = [{"params": [first], "weight_decay": 0.2}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=ARGS.lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, ARGS.epochs * len(train))

    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    history = {"epoch": [], "train_elbo": [], "val_elbo": [], "seconds": []}
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
        val_elbo = epoch_iter(model.eval(), val, optimizer)
        print(f"epoch 0/{ARGS.epochs}  val_elbo {val_elbo:.2f} with random weights", flush=True)
        save_samples(model, folder / "samples_before.pdf")
    for epoch in range(len(epochs) + 1, ARGS.epochs + 1):
        start = time.perf_counter()
        train_elbo, val_elbo = run_epoch(model, (train, val), optimizer, schedule, ARGS.precision)
        epochs.append(epoch)
        train_curve.append(train_elbo)
        val_curve.append(val_elbo)
        seconds.append(time.perf_counter() - start)

        # Samples during training: after the first epoch, half-way and at the end (Question 1.14)
        if epoch == 1:
            save_samples(model, folder / "samples_first.pdf")
        if epoch == (ARGS.epochs + 1) // 2:
            save_samples(model, folder / "samples_halfway.pdf")
        if epoch == ARGS.epochs:
            save_samples(model, folder / "samples_after.pdf")

        save_checkpoint(ARGS, history, parts, train.generator)
        print(f"epoch {epoch}/{ARGS.epochs}  train_elbo {train_elbo:.2f}  val_elbo {val_elbo:.2f}"
              f"  {seconds[-1]:.1f} s", flush=True)  # fmt: skip

    evaluate(model.eval(), val, test, history)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.error = fail  # one line, where argparse would print its usage, too
    parser.add_argument("--epochs", type=number(int), default=40, help="passes over the images")
    parser.add_argument("--zdim", type=number(int), default=20, help="dimensions of the latent")
    parser.add_argument("--binarization", default="static", help="how grey images become binary",
                        choices=["static", "dynamic", "larochelle"])  # fmt: skip
    parser.add_argument("--batch_size", type=number(int), default=64, help="images in a batch")
    parser.add_argument("--lr", type=number(float), default=3e-3, help="highest of the schedule")
    parser.add_argument("--seed", type=number(int, -1), default=0, help="of every random draw")
    parser.add_argument("--iw_samples", type=number(int), default=1000, help="latents for log p(x)")
    parser.add_argument("--device", default=DEVICES[-1], choices=DEVICES, help="where to run")
    parser.add_argument("--precision", default="auto", choices=["auto", "float32", "bfloat16"],
                        help="of products in each epoch; auto: what is faster")  # fmt: skip
    parser.add_argument("--data_dir", type=Path, default=REPOSITORY / "datasets", help="data files")
    parser.add_argument("--results_dir", type=Path, help="if not one named by the options")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--fast_dev_run", action="store_true", help="two batches: does it run?")

    ARGS = parser.parse_args()
    ARGS.results_dir = ARGS.results_dir or results_folder("vae", parser, ARGS)

    with guard(ARGS):
        main()
