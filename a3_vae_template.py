"""A variational autoencoder on Binary MNIST (Kingma & Welling, 2014, arXiv:1312.6114).

Read from top to bottom, as the assignment's template: encoder and decoder, the loss (the evidence
lower bound, written by hand), the training, the figures, `main`, the options. Run

    python a3_vae_template.py                # 20-d latent: curves and samples
    python a3_vae_template.py --zdim 2       # 2-d latent: the manifold as well

and look into results/vae and results/vae_zdim2. `--help` lists the options. `runs.py` has what is
not the lesson.
"""

import argparse
import math
import os
import time

if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"  # figures go to files, also if started from a notebook

import matplotlib.pyplot as plt
import numpy as np
import scipy.stats
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.utils import make_grid
from tqdm import tqdm

import runs
from datasets.bmnist import bmnist

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
        hidden = F.gelu(self.hidden(input.flatten(1)))  # ReLU: validation ELBO -99.2, not -96.8
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

    With p = sigmoid(l): x log p + (1 - x) log(1 - p) = x l - log(1 + e^l). Computed from the
    logit l it stays finite where p rounds to 0 or 1.
    """
    return (x * logits - F.softplus(logits)).sum(dim=-1)


def kl_divergence(mean, std):
    """Returns KL(N(mean, std^2) || N(0, 1)) summed over the latent dimensions, in nats.

    The closed form of the paper's appendix B: sum_d (std^2 + mean^2 - 1 - 2 log std) / 2.
    """
    return 0.5 * (std**2 + mean**2 - 1 - 2 * std.log()).sum(dim=-1)


class VAE(nn.Module):
    """Encoder, decoder and the standard-normal prior p(z) = N(0, I) on `z_dim` dimensions."""

    def __init__(self, hidden_dim=500, z_dim=20):
        super().__init__()
        self.z_dim = z_dim
        self.encoder = Encoder(hidden_dim, z_dim)
        self.decoder = Decoder(hidden_dim, z_dim)

    def losses(self, input):
        """Returns the two terms of the negative ELBO, `[batch]` each, in nats (Question 1.10)."""
        mean, std = self.encoder(input)
        # The noise does not depend on the weights, so the gradient passes through mean and std
        # (paper, section 2.4).
        z = mean + std * torch.randn_like(std)
        reconstruction = -bernoulli_log_likelihood(self.decoder.logits(z), input.flatten(1))
        return reconstruction, kl_divergence(mean, std)

    def forward(self, input):
        """Returns the average negative ELBO of a batch of binary images, a scalar in nats.

        -ELBO = E_q[-log p(x|z)] + KL(q(z|x) || p(z)) (paper, equation 3), the expectation
        estimated with a single z for each image.
        """
        reconstruction, kl = self.losses(input)
        return (reconstruction + kl).mean()

    @torch.no_grad()
    def sample(self, n_samples):
        """Draws from the model by ancestral sampling: z from the prior, then x from p(x|z).

        Returns binary images and the Bernoulli means they were drawn from, `[n, 1, 28, 28]` each.
        """
        weight = self.decoder.output.weight
        z = torch.randn(n_samples, self.z_dim, dtype=weight.dtype, device=weight.device)
        im_means = self.decoder(z).view(-1, 1, 28, 28)
        return torch.bernoulli(im_means), im_means


# ------------------------------------ Training ------------------------------------
def epoch_iter(model, data, optimizer):
    """Runs one epoch and returns its average ELBO in nats; trains if `model.training`.

    `data` yields binary images `[batch, 1, 28, 28]`.
    """
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
        axes.plot(epochs, curve, label=label, marker=".", ms=2)
    # The first training value would squeeze the rest into a line at the top.
    axes.set_ylim(bottom=min(*val_curve, train_curve[-1]) - 2)
    axes.set(xlabel="epoch", ylabel="ELBO (nats)")
    axes.legend(frameon=False, loc="lower right")
    runs.save_figure(figure, filename)


def save_samples(model, filename, n_samples=25):
    """Saves samples on the left and the Bernoulli means they were drawn from on the right."""
    figure, axes = plt.subplots(1, 2, figsize=(3.6, 1.8), layout="constrained")
    for ax, images in zip(axes, model.sample(n_samples), strict=True):
        grid = make_grid(images.cpu(), nrow=5, padding=1, pad_value=0.5)[0]
        ax.imshow(grid.numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
        ax.axis("off")
    runs.save_figure(figure, filename)


@torch.no_grad()
def save_manifold(model, filename, n_side=20):
    """Saves the decoded 2-d latent plane as a grid of Bernoulli means (paper, Figure 4b).

    The grid's latents are the prior's quantiles (i + 1/2) / `n_side` in each dimension, given by
    the percent point function: each stands for a cell of equal prior mass (Question 1.15).
    """
    quantiles = scipy.stats.norm.ppf((np.arange(n_side) + 0.5) / n_side)
    z_1, z_2 = np.meshgrid(quantiles, quantiles[::-1])  # z_2 grows upwards, as on paper
    z = torch.from_numpy(np.stack([z_1.ravel(), z_2.ravel()], axis=1))
    z = z.to(model.decoder.output.weight)  # of its type, on its device
    means = model.decoder(z).view(-1, 1, 28, 28)
    figure, axes = plt.subplots(figsize=(4.5, 4.5), layout="constrained")
    grid = make_grid(means.cpu(), nrow=n_side, padding=0)[0]
    axes.imshow(grid.numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    ticks = np.linspace(0, n_side - 1, 6).round().astype(int)  # the first and the last, too
    axes.set_xticks(28 * ticks + 14, [f"${quantiles[i]:.2f}$" for i in ticks])
    axes.set_yticks(28 * ticks + 14, [f"${quantiles[::-1][i]:.2f}$" for i in ticks])
    axes.set(xlabel="$z_1$", ylabel="$z_2$")
    runs.save_figure(figure, filename)


def main():
    # Faster matrix products where PyTorch has them: TF32 on GPUs, bfloat16 on CPUs with AMX.
    torch.set_float32_matmul_precision("medium")
    # Each part of a run sets its seed anew, so that a resumed run draws what an uninterrupted
    # one does.
    torch.manual_seed(ARGS.seed)
    train, val, test = bmnist(batch_size=ARGS.batch_size, binarization=ARGS.binarization,
                              device=ARGS.device)  # fmt: skip
    model = VAE(z_dim=ARGS.zdim).to(ARGS.device)
    # The template has Adam and 1e-3 throughout. Here the rate is higher and falls, and the
    # encoder's first layer has a weight decay: without it validation ends 1.2 nats lower.
    first = model.encoder.hidden.weight
    others = [weight for weight in model.parameters() if weight is not first]
    groups = [{"params": [first], "weight_decay": 0.2}, {"params": others}]
    optimizer = torch.optim.AdamW(groups, lr=ARGS.lr, weight_decay=0, fused=True)

    parts = {"model": model, "optimizer": optimizer}
    train_curve, val_curve, seconds = [], [], []
    if ARGS.resume:
        train_curve, val_curve, seconds = runs.load_checkpoint(ARGS, parts)
    else:
        torch.manual_seed(ARGS.seed)
        save_samples(model, ARGS.results_dir / "samples_before.pdf")
    print(f"training on {ARGS.device}, results in {ARGS.results_dir}", flush=True)

    for epoch in range(len(train_curve) + 1, ARGS.epochs + 1):
        # Other seeds share no epoch's draws.
        torch.manual_seed(ARGS.seed * ARGS.epochs + epoch)
        start = time.perf_counter()
        # Down half a cosine towards zero: the smaller the steps, the less noise of the gradients
        # stays in the weights.
        for group in optimizer.param_groups:
            group["lr"] = ARGS.lr * (1 + math.cos(math.pi * (epoch - 1) / ARGS.epochs)) / 2

        train_elbo, val_elbo = run_epoch(model, (train, val), optimizer)
        train_curve.append(train_elbo)
        val_curve.append(val_elbo)
        seconds.append(time.perf_counter() - start)
        runs.check_finite(epoch, (train_elbo, val_elbo), model)

        # Samples after the first epoch, half-way and at the end (Question 1.14)
        torch.manual_seed(ARGS.seed)  # the same latents each time
        if epoch == 1:
            save_samples(model, ARGS.results_dir / "samples_first.pdf")
        if epoch == (ARGS.epochs + 1) // 2:
            save_samples(model, ARGS.results_dir / "samples_halfway.pdf")
        if epoch == ARGS.epochs:
            save_samples(model, ARGS.results_dir / "samples_after.pdf")
        runs.save_checkpoint(ARGS, parts, (train_curve, val_curve, seconds))
        print(f"epoch {epoch}/{ARGS.epochs}  train_elbo {train_elbo:.2f}  val_elbo {val_elbo:.2f}"
              f"  {seconds[-1]:.1f} s", flush=True)  # fmt: skip

    torch.manual_seed(ARGS.seed)
    test_elbo = epoch_iter(model.eval(), test, optimizer)
    print(f"test_elbo {test_elbo:.2f}", flush=True)
    if ARGS.zdim == 2:
        save_manifold(model, ARGS.results_dir / "manifold.pdf")
    save_elbo_plot(train_curve, val_curve, ARGS.results_dir / "elbo.pdf")
    columns = {"train_elbo": train_curve, "val_elbo": val_curve, "seconds": seconds}
    final = {"train_elbo": train_curve[-1], "val_elbo": val_curve[-1], "test_elbo": test_elbo}
    runs.save_results(ARGS, model, columns, final)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=40, help="passes over the images")
    parser.add_argument("--zdim", type=int, default=20, help="dimensions of the latent")
    parser.add_argument("--binarization", default="static", choices=["static", "dynamic"],
                        help="training images as published, or drawn anew each epoch")  # fmt: skip
    parser.add_argument("--batch_size", type=int, default=64, help="images in a batch")
    parser.add_argument("--lr", type=float, default=3e-3, help="learning rate of the first epoch")

    ARGS = runs.parse(parser, "vae")
    runs.run(main, ARGS)
