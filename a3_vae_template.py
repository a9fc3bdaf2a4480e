"""A variational autoencoder on Binary MNIST (Kingma & Welling, 2014).

Read from top to bottom: encoder and decoder, the loss (the evidence lower bound, written by hand),
the training, the figures, and `main`; the machinery and the options come last. Run

    python a3_vae_template.py                # 20-d latent: curves and samples
    python a3_vae_template.py --zdim 2       # 2-d latent: the manifold as well

and look into results/vae and results/vae_zdim2. `--help` lists the options.
"""

import argparse
import errno
import io
import json
import math
import os
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"  # figures go to files, also where a notebook says otherwise

import matplotlib.pyplot as plt
import numpy as np
import scipy.stats
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.utils import make_grid
from tqdm import tqdm

from datasets.bmnist import bmnist
from datasets.mnist import DataError

N_PIXELS = 28 * 28


# ------------------------------------ Encoder and decoder ------------------------------------
class Encoder(nn.Module):
    """The approximate posterior q(z|x) = N(z; mean(x), diag(std(x)^2)) (paper, appendix C.2)."""

    def __init__(self, hidden_dim=500, z_dim=20):
        super().__init__()
        self.hidden = nn.Linear(N_PIXELS, hidden_dim)
        self.mean_and_log_std = nn.Linear(hidden_dim, 2 * z_dim)

    def forward(self, input):
        """Maps images, `[batch, 784]` or `[batch, 1, 28, 28]`, to mean and std `[batch, z_dim]`."""
        hidden = F.gelu(self.hidden(input.flatten(1)))  # ReLU: validation ELBO -98.8, not -96.6
        mean, log_std = self.mean_and_log_std(hidden).chunk(2, dim=1)
        return mean, log_std.exp()


class Decoder(nn.Module):
    """The likelihood p(x|z): independent Bernoulli pixels (paper, appendix C.1)."""

    def __init__(self, hidden_dim=500, z_dim=20):
        super().__init__()
        self.hidden = nn.Linear(z_dim, hidden_dim)
        self.output = nn.Linear(hidden_dim, N_PIXELS)

    def logits(self, z):
        """Maps latents `[..., z_dim]` to the logits of the Bernoulli means, `[..., 784]`."""
        return self.output(F.gelu(self.hidden(z)))

    def forward(self, input):
        """Maps latents `[batch, z_dim]` to Bernoulli means `[batch, 784]`."""
        return torch.sigmoid(self.logits(input))


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
        return sum(self.losses(input)).mean()

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
        z = torch.randn(n_samples, self.z_dim).to(self.decoder.output.weight)
        im_means = self.decoder(z).view(-1, 1, 28, 28)
        return torch.bernoulli(im_means), im_means


# ------------------------------------ Training ------------------------------------
def epoch_iter(model, data, optimizer):
    """Runs one epoch and returns its average ELBO in nats; trains if `model.training`."""
    losses, n_images = [], 0
    for images in tqdm(data, leave=False, disable=None):
        with torch.set_grad_enabled(model.training):
            loss = model(images)

        if model.training:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        losses.append(loss.detach() * len(images))  # the last batch may be smaller
        n_images += len(images)
    return -torch.stack(losses).sum().item() / n_images


def run_epoch(model, data, optimizer):
    """Trains on `data[0]`, validates on `data[1]`; returns `train_elbo, val_elbo` in nats."""
    traindata, valdata = data

    model.train()
    train_elbo = epoch_iter(model, traindata, optimizer)

    model.eval()
    val_elbo = epoch_iter(model, valdata, optimizer)

    return train_elbo, val_elbo


# ------------------------------------ Figures ------------------------------------
def save_elbo_plot(train_curve, val_curve, filename):
    """Plots the ELBO of training and validation (nats) against the epoch (Question 1.13)."""
    figure, axes = plt.subplots(figsize=(4, 2), layout="constrained")
    epochs = range(1, len(train_curve) + 1)
    for label, curve in (("training", train_curve), ("validation", val_curve)):
        axes.plot(epochs, curve, label=label, marker="." if len(epochs) == 1 else None)
    if len(epochs) > 1:  # the first training value would squeeze the rest into a line at the top
        axes.set_ylim(bottom=val_curve[0] - 2)
    axes.set(xlabel="epoch", ylabel="ELBO (nats)")
    axes.legend(frameon=False, loc="lower right")
    save_figure(figure, filename)


def save_samples(model, filename, n_samples=25):
    """Saves samples on the left and the Bernoulli means they were drawn from on the right."""
    figure, axes = plt.subplots(1, 2, figsize=(3.6, 1.8), layout="constrained")
    for ax, images in zip(axes, model.sample(n_samples), strict=True):
        grid = make_grid(images.cpu(), nrow=5, padding=1, pad_value=0.5)[0]
        ax.imshow(grid.numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
        ax.axis("off")
    save_figure(figure, filename)


@torch.no_grad()
def save_manifold(model, filename, n_side=20):
    """Saves the decoded 2-d latent plane as a grid of Bernoulli means (paper, Figure 4b).

    The grid's latents are the prior's quantiles (i + 1/2) / `n_side` in each dimension, given by
    the percent point function: each stands for a cell of equal prior mass (Question 1.15).
    """
    quantiles = scipy.stats.norm.ppf((np.arange(n_side) + 0.5) / n_side)
    z_1, z_2 = np.meshgrid(quantiles, quantiles[::-1])  # z_2 grows upwards, as on paper
    z = torch.from_numpy(np.stack([z_1.ravel(), z_2.ravel()], axis=1))
    means = model.decoder(z.to(model.decoder.output.weight)).view(-1, 1, 28, 28)
    figure, axes = plt.subplots(figsize=(4.5, 4.5), layout="constrained")
    grid = make_grid(means.cpu(), nrow=n_side, padding=0)[0]
    axes.imshow(grid.numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    ticks = np.linspace(0, n_side - 1, 6).round().astype(int)  # the first and the last, too
    axes.set_xticks(28 * ticks + 14, [f"${quantiles[i]:.2f}$" for i in ticks])
    axes.set_yticks(28 * ticks + 14, [f"${quantiles[::-1][i]:.2f}$" for i in ticks])
    axes.set(xlabel="$z_1$", ylabel="$z_2$")
    save_figure(figure, filename)


def main():
    # Matrix products may run in bfloat16 where the processor has it; all else stays float32.
    torch.set_float32_matmul_precision("medium")
    torch.manual_seed(ARGS.seed)
    train, val, test = bmnist(batch_size=ARGS.batch_size, binarization=ARGS.binarization,
                              device=ARGS.device)  # fmt: skip
    model = VAE(z_dim=ARGS.zdim).to(ARGS.device)
    # Weight decay where the encoder overfits, telling images apart by single pixels. Validation
    # ELBO -96.6; without decay -97.9; with the template's plain Adam at 1e-3 -100.0.
    first = model.encoder.hidden.weight
    others = [parameter for parameter in model.parameters() if parameter is not first]
    groups = [{"params": [first], "weight_decay": 0.2}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=ARGS.lr, fused=True)

    parts = {"model": model, "optimizer": optimizer}
    train_curve, val_curve, seconds = [], [], []
    if ARGS.resume:
        train_curve, val_curve, seconds = load_checkpoint(ARGS, parts)
    else:
        torch.manual_seed(ARGS.seed)
        save_samples(model, ARGS.results_dir / "samples_before.pdf")
    print(f"training on {ARGS.device}, results in {ARGS.results_dir}", flush=True)

    for epoch in range(len(train_curve) + 1, ARGS.epochs + 1):
        torch.manual_seed(ARGS.seed * ARGS.epochs + epoch)  # its own draws, also if resumed
        start = time.perf_counter()
        for group in optimizer.param_groups:  # half a cosine, towards zero
            group["lr"] = ARGS.lr * (1 + math.cos(math.pi * (epoch - 1) / ARGS.epochs)) / 2

        train_elbo, val_elbo = run_epoch(model, (train, val), optimizer)
        # Validation uses the very weights that would be saved.
        if not math.isfinite(train_elbo + val_elbo):
            raise FloatingPointError(f"epoch {epoch} has the ELBOs {train_elbo} and {val_elbo}")
        train_curve.append(train_elbo)
        val_curve.append(val_elbo)
        seconds.append(time.perf_counter() - start)
        print(f"epoch {epoch}/{ARGS.epochs}  train_elbo {train_elbo:.2f}  val_elbo {val_elbo:.2f}"
              f"  {seconds[-1]:.1f} s", flush=True)  # fmt: skip

        # Samples after the first epoch, half-way and at the end (Question 1.14)
        torch.manual_seed(ARGS.seed)  # the same latents each time
        if epoch == 1:
            save_samples(model, ARGS.results_dir / "samples_first.pdf")
        if epoch == (ARGS.epochs + 1) // 2:
            save_samples(model, ARGS.results_dir / "samples_halfway.pdf")
        if epoch == ARGS.epochs:
            save_samples(model, ARGS.results_dir / "samples_after.pdf")
        save_checkpoint(ARGS, parts, (train_curve, val_curve, seconds))

    torch.manual_seed(ARGS.seed)
    test_elbo = epoch_iter(model.eval(), test, optimizer)
    print(f"test_elbo {test_elbo:.2f}", flush=True)
    if ARGS.zdim == 2:
        save_manifold(model, ARGS.results_dir / "manifold.pdf")
    save_elbo_plot(train_curve, val_curve, ARGS.results_dir / "elbo.pdf")
    columns = {"epoch": range(1, ARGS.epochs + 1), "train_elbo": train_curve,
               "val_elbo": val_curve, "seconds": seconds}  # fmt: skip
    final = {"train_elbo": train_curve[-1], "val_elbo": val_curve[-1], "test_elbo": test_elbo}
    save_results(ARGS, model, columns, final)


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
    parser.add_argument("--zdim", type=int, default=20, help="dimensions of the latent")
    parser.add_argument("--binarization", default="static", help="how grey images become binary",
                        choices=["static", "dynamic", "larochelle"])  # fmt: skip
    parser.add_argument("--batch_size", type=int, default=64, help="images in a batch")
    parser.add_argument("--lr", type=float, default=3e-3, help="learning rate of the first epoch")
    parser.add_argument("--seed", type=int, default=0, help="of every random draw")
    parser.add_argument("--device", default=devices[-1], choices=devices, help="where to run")
    parser.add_argument("--results_dir", type=Path, help="if not one named by the options")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")

    ARGS = parser.parse_args()
    check_numbers(ARGS)
    ARGS.results_dir = ARGS.results_dir or results_folder("vae", parser, ARGS)
    run(main, ARGS)
