"""A variational autoencoder on Binary MNIST (Kingma & Welling, 2014, arXiv:1312.6114).

In the order of the assignment's template: encoder and decoder, the loss (the evidence lower bound,
written by hand), the training, the figures, `main`, the options. Run

    python a3_vae_template.py                # 20-d latent: curves and samples
    python a3_vae_template.py --zdim 2       # 2-d latent: the manifold as well

and look into results/vae and results/vae_zdim2. `--help` lists the options. `runs.py` holds
options, files and resuming.
"""

import argparse
import math
import time

import numpy as np
import scipy.stats
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
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
        # With ReLU the validation ELBO ends 2.5 nats lower.
        hidden = F.gelu(self.hidden(input.flatten(1)))
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

    With p = sigmoid(l): x log p + (1 - x) log(1 - p) = x l - softplus(l), where softplus(l) is
    log(1 + e^l). Computed from the logit l it stays finite where p rounds to 0 or 1.
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
        # The reparametrization trick (paper, section 2.4; Question 1.11): the noise does not depend
        # on the weights, so the gradient passes through mean and std.
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
        z = torch.randn(n_samples, self.z_dim).to(self.decoder.output.weight.device)
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

        # Weighted by size: the last batch may be smaller. .item() here would make a GPU wait.
        losses.append(loss.detach() * len(images))
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
    figure = Figure(figsize=(4, 2), layout="constrained")
    axes = figure.subplots()
    epochs = range(1, len(train_curve) + 1)
    axes.plot(epochs, train_curve, label="training", marker=".", ms=2)
    axes.plot(epochs, val_curve, label="validation", marker=".", ms=2)
    # The first training value would flatten the curves.
    axes.set_ylim(bottom=min(*val_curve, train_curve[-1]) - 2)
    axes.set(xlabel="epoch", ylabel="ELBO (nats)")
    axes.legend(frameon=False, loc="lower right")
    runs.save_figure(figure, filename)


def save_samples(model, folder, moment):
    """Saves 25 samples, and the Bernoulli means they were drawn from (Question 1.14)."""
    # The same latents each time, without reseeding what training draws from.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        samples, im_means = model.sample(25)
    runs.save_images(samples, folder / f"samples_{moment}.png")
    runs.save_images(im_means, folder / f"means_{moment}.png")


@torch.no_grad()
def save_manifold(model, filename, n_side=20):
    """Saves the decoded 2-d latent plane as a grid of Bernoulli means (paper, Figure 4b).

    The grid's latents are the prior's quantiles (i + 1/2) / `n_side` in each dimension, given by
    the percent point function: each stands for a cell of equal prior mass (Question 1.15).
    """
    quantiles = scipy.stats.norm.ppf((np.arange(n_side) + 0.5) / n_side)
    z_1, z_2 = np.meshgrid(quantiles, quantiles[::-1])  # z_1 grows to the right, z_2 upwards
    z = torch.from_numpy(np.stack([z_1.ravel(), z_2.ravel()], axis=1))
    im_means = model.decoder(z.to(model.decoder.output.weight))  # of the same dtype and device
    runs.save_images(im_means, filename, nrow=n_side, padding=0)


def main():
    torch.manual_seed(ARGS.seed)
    # Faster matrix products where PyTorch has them: TF32 on GPUs, bfloat16 on CPUs with AMX.
    torch.set_float32_matmul_precision("medium")
    train, val, test = bmnist(batch_size=ARGS.batch_size, binarization=ARGS.binarization,
                              device=ARGS.device)  # fmt: skip
    model = VAE(z_dim=ARGS.zdim).to(ARGS.device)
    # Unlike the template's Adam at 1e-3: a higher, falling rate, and a weight decay on the first
    # layer of the encoder, which may otherwise fit the noise of single images. Without the decay
    # validation ends 1.2 nats lower.
    first = model.encoder.hidden.weight
    others = [weight for weight in model.parameters() if weight is not first]
    groups = [{"params": [first], "weight_decay": ARGS.weight_decay}, {"params": others}]
    optimizer = torch.optim.AdamW(groups, lr=ARGS.lr, weight_decay=0, fused=True)

    train_curve, val_curve, seconds = [], [], []
    history = {"train_elbo": train_curve, "val_elbo": val_curve, "seconds": seconds}
    parts = {"model": model, "optimizer": optimizer}  # what a checkpoint keeps, with the history
    if ARGS.resume:
        runs.load_checkpoint(ARGS, parts, history)
    else:
        save_samples(model, ARGS.results_dir, "before")
    print(f"training on {ARGS.device}, results in {ARGS.results_dir}", flush=True)

    start = time.perf_counter()
    for epoch in range(len(train_curve) + 1, ARGS.epochs + 1):
        # The learning rate follows half a cosine to zero: smaller steps leave less gradient noise
        # in the weights.
        for group in optimizer.param_groups:
            group["lr"] = ARGS.lr * (1 + math.cos(math.pi * (epoch - 1) / ARGS.epochs)) / 2

        train_elbo, val_elbo = run_epoch(model, (train, val), optimizer)
        runs.check_finite(epoch, train_elbo, val_elbo)
        train_curve.append(train_elbo)
        val_curve.append(val_elbo)

        # Samples after the first epoch, half-way and at the end (Question 1.14)
        if epoch == 1:
            save_samples(model, ARGS.results_dir, "first")
        if epoch == (ARGS.epochs + 1) // 2:
            save_samples(model, ARGS.results_dir, "halfway")
        if epoch == ARGS.epochs:
            save_samples(model, ARGS.results_dir, "after")

        seconds.append(time.perf_counter() - start)
        start = time.perf_counter()  # the next epoch's time includes this checkpoint
        runs.save_checkpoint(ARGS, parts, history)
        print(f"epoch {epoch}/{ARGS.epochs}  train_elbo {train_elbo:.2f}  val_elbo {val_elbo:.2f}"
              f"  {seconds[-1]:.1f} s", flush=True)  # fmt: skip

    torch.set_float32_matmul_precision("highest")  # full float32 for the numbers below
    test_elbo = epoch_iter(model.eval(), test, optimizer)
    print(f"test_elbo {test_elbo:.2f}", flush=True)
    runs.save_results(ARGS, model.state_dict(), history, test_elbo=test_elbo)
    save_elbo_plot(train_curve, val_curve, ARGS.results_dir / "elbo.png")
    if ARGS.zdim == 2:
        save_manifold(model, ARGS.results_dir / "manifold.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=40, help="passes over the images")
    parser.add_argument("--zdim", type=int, default=20, help="dimensions of the latent")
    parser.add_argument("--binarization", default="static", choices=["static", "dynamic"],
                        help="training images as published, or drawn anew each epoch")  # fmt: skip
    parser.add_argument("--batch_size", type=int, default=64, help="images in a batch")
    parser.add_argument("--lr", type=float, default=3e-3, help="learning rate of the first epoch")
    parser.add_argument("--weight_decay", type=float, default=0.2, help="of the first layer")

    ARGS = runs.parse(parser, "vae")
    runs.run(main)
