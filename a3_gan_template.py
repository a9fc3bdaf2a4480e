"""A generative adversarial network on MNIST (Goodfellow et al., 2014, arXiv:1406.2661).

Read from top to bottom, as the assignment's template: the two networks, the value function of their
game (written by hand), the training, the figures, `main`, the options. Run

    python a3_gan_template.py

and look into results/gan. `--help` lists the options. `runs.py` has what is not the lesson.
"""

import argparse
import copy
import math
import os
import time

if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"  # figures go to files, also if started from a notebook

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.utils import make_grid
from tqdm import tqdm

import runs
from datasets.mnist import mnist

N_PIXELS = 28 * 28


# ------------------------------------ Networks ------------------------------------
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
        return self.layers(z)


class Discriminator(nn.Module):
    """Tells images of the data from images of the generator.

    Dropout is against learning the training images by heart.
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
        return self.layers(img).squeeze(1)

    def forward(self, img):
        """Maps images `[batch, 784]` to the probability D(img) of being real, `[batch]`."""
        return torch.sigmoid(self.logits(img))


# ------------------------------------ Losses ------------------------------------
def value_function(real_logits, fake_logits):
    """Returns V(D, G) = E[log D(x)] + E[log(1 - D(G(z)))] in nats (paper, equation 1).

    With D = sigmoid(l), 1 - D = sigmoid(-l): both logarithms are exact where D rounds to 0 or 1.
    """
    return F.logsigmoid(real_logits).mean() + F.logsigmoid(-fake_logits).mean()


def generator_loss(fake_logits):
    """Returns the non-saturating loss -E[log D(G(z))] in nats (paper, end of section 3).

    Early on D(G(z)) = sigmoid(l) is near 0. There log(1 - D) has the slope -D in l, near 0, and
    G learns nothing; -log D has the slope D - 1, near -1.
    """
    return -F.logsigmoid(fake_logits).mean()


# ------------------------------------ Training ------------------------------------
def train(dataloader, discriminator, generator, optimizer_G, optimizer_D):
    """Trains both networks by turns (paper, Algorithm 1, k = 1), with the options in ARGS.

    Unlike the template: D before G, the same noise for both, and an average of G's weights.

    Returns the generator with averaged weights and, by name, each epoch's means of V, the
    generator's loss, D(x) and D(G(z)), all as in training, with D's dropout. Raises
    FloatingPointError if one of these, or a weight, is not a finite number.
    """
    # Two adversaries circle more than they settle; averaging the weights evens this out (Yazici et
    # al., 2019, arXiv:1806.04498). Samples come from the average, and training never sees it.
    average = copy.deepcopy(generator).eval()
    # state_dict() has the tensors themselves, no copies: these two stay up to date.
    weights, averages = generator.state_dict().values(), average.state_dict().values()
    z = torch.randn(25, generator.latent_dim, device=ARGS.device)  # of all the sample grids
    parts = {"generator": generator, "discriminator": discriminator, "average": average,
             "optimizer_G": optimizer_G, "optimizer_D": optimizer_D}  # fmt: skip
    history = {"epoch": [], "value": [], "loss_g": [], "d_real": [], "d_fake": [], "seconds": []}
    if ARGS.resume:
        history = runs.load_checkpoint(ARGS, parts)
    else:
        save_images(generate(average, z), ARGS.results_dir / "samples_before.pdf")

    for epoch in range(len(history["epoch"]) + 1, ARGS.n_epochs + 1):
        # A seed of its own for each epoch, so that a resumed run draws what an uninterrupted one
        # does. Other seeds share no epoch's draws.
        torch.manual_seed(ARGS.seed * ARGS.n_epochs + epoch)
        start, metrics = time.perf_counter(), []
        # The full learning rate for half of the epochs, then on a line towards zero, so that both
        # players settle.
        for group in optimizer_G.param_groups + optimizer_D.param_groups:
            group["lr"] = ARGS.lr * min(1, 2 - 2 * (epoch - 1) / ARGS.n_epochs)
        for i, (pixels, _) in enumerate(tqdm(dataloader, leave=False, disable=None), 1):
            real = pixels / 127.5 - 1  # grey values 0..255 to the generator's range
            fake = generator(torch.randn(len(real), generator.latent_dim, device=real.device))

            # Train Discriminator: max over D of E[log D(x)] + E[log(1 - D(G(z)))]
            # -------------------
            # Before G, as in Algorithm 1. Real and fake images go in one pass, since D has no batch
            # normalization, which would mix them.
            logits = discriminator.logits(torch.cat([real, fake.detach()]))
            real_logits, fake_logits = logits.chunk(2)
            value = value_function(real_logits, fake_logits)
            optimizer_D.zero_grad()
            (-value).backward()
            optimizer_D.step()

            # Train Generator: max over G of E[log D(G(z))], D being the improved one
            # ---------------
            loss_g = generator_loss(discriminator.logits(fake))
            optimizer_G.zero_grad()
            # For G alone: nothing needs the gradients of D's weights.
            loss_g.backward(inputs=list(generator.parameters()))
            optimizer_G.step()

            # Average Generator: mean += (weight - mean) * 5 / (4 + batches_done)
            # -----------------
            # Two thirds of it come from the last fifth of batches (Shamir & Zhang, 2013, eta = 4).
            batches_done = (epoch - 1) * len(dataloader) + i
            for mean, weight in zip(averages, weights, strict=True):
                if weight.is_floating_point():  # all but the counts of batches
                    mean.lerp_(weight, 5 / (4 + batches_done))

            # Save Images (of the average, from the same latents each time)
            # -----------
            if batches_done % ARGS.save_interval == 0:
                filename = ARGS.results_dir / "progress" / f"{batches_done:06d}.png"
                save_images(generate(average, z), filename)

            d_real, d_fake = real_logits.sigmoid().mean(), fake_logits.sigmoid().mean()
            metrics.append(torch.stack([value, loss_g, d_real, d_fake]).detach())

        value, loss_g, d_real, d_fake = torch.stack(metrics).mean(dim=0).tolist()
        runs.check_finite(epoch, (value, loss_g, d_real, d_fake), generator, discriminator)
        row = {"epoch": epoch, "value": value, "loss_g": loss_g, "d_real": d_real,
               "d_fake": d_fake, "seconds": time.perf_counter() - start}  # fmt: skip
        for name, entry in row.items():
            history[name].append(entry)
        if epoch == (ARGS.n_epochs + 1) // 2:
            save_images(generate(average, z), ARGS.results_dir / "samples_halfway.pdf")
        if epoch == ARGS.n_epochs:
            save_images(generate(average, z), ARGS.results_dir / "samples_after.pdf")
        runs.save_checkpoint(ARGS, parts, history)
        print(f"epoch {epoch}/{ARGS.n_epochs}  value {value:.4f}  loss_g {loss_g:.4f}  "
              f"d_real {d_real:.4f}  d_fake {d_fake:.4f}  {row['seconds']:.1f} s",
              flush=True)  # fmt: skip
    return average, history


# ------------------------------------ Samples and figures ------------------------------------
@torch.no_grad()
def generate(generator, z):
    """Returns the images `[n, 784]` of latents `[n, latent_dim]`, with pixels in [0, 1]."""
    return (generator(z) + 1) / 2


def two_digits(generator, dataset, n_samples=100):
    """Returns the latents `[2, latent_dim]` of two samples of different digits, and the digits.

    A sample's digit is that of the nearest training image.
    """
    z = torch.randn(n_samples, generator.latent_dim, device=dataset.images.device)
    distances = torch.cdist(generate(generator, z), dataset.images / 255)
    digits = dataset.labels[distances.argmin(dim=1)]
    others = (digits != digits[0]).nonzero().flatten().tolist()
    rows = [0, others[0] if others else 1]  # a generator that has collapsed draws one digit only
    return z[rows], digits[rows].tolist()


def interpolate(z_from, z_to, n_images=9):
    """Returns `n_images` latents on the arc between two latents `[latent_dim]`, ends included.

    Spherical (White, 2016, arXiv:1609.04468): normal latents of d dimensions lie near a sphere of
    radius sqrt(d), and the generator was not trained inside of it.
    """
    t = torch.linspace(0, 1, n_images, device=z_from.device)[:, None]
    angle = torch.acos(torch.cosine_similarity(z_from, z_to, dim=0))
    return (torch.sin((1 - t) * angle) * z_from + torch.sin(t * angle) * z_to) / torch.sin(angle)


def save_images(images, filename, nrow=5):
    """Saves images `[n, 784]` in [0, 1] as one grid, black on white, `nrow` to a row."""
    grid = make_grid(images.view(-1, 1, 28, 28).cpu(), nrow=nrow, padding=1, pad_value=0.5)[0]
    figure, axes = plt.subplots(figsize=(0.6 * nrow, 0.6 * math.ceil(len(images) / nrow)))
    axes.imshow(grid.numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    axes.axis("off")
    runs.save_figure(figure, filename)


def save_training_plot(history, filename):
    """Plots V and D's mean outputs by epoch, without the first 5%; dashed: at the equilibrium."""
    history = {name: column[len(column) // 20 :] for name, column in history.items()}
    size = {"figsize": (5.5, 2), "layout": "constrained", "gridspec_kw": {"wspace": 0.1}}
    figure, (left, right) = plt.subplots(1, 2, **size)
    left.plot(history["epoch"], history["value"], marker=".", ms=2)
    left.axhline(-math.log(4), color="0.5", ls="--")
    left.set(xlabel="epoch", ylabel="$V(D, G)$ (nats)")
    for name, label in (("d_real", r"$D(\mathbf{x})$"), ("d_fake", r"$D(G(\mathbf{z}))$")):
        right.plot(history["epoch"], history[name], marker=".", ms=2, label=label)
    right.axhline(0.5, color="0.5", ls="--")
    right.set(xlabel="epoch", ylabel="mean output of $D$")
    right.legend(frameon=False)
    runs.save_figure(figure, filename)


def main():
    # Faster matrix products where PyTorch has them: TF32 on GPUs, bfloat16 on CPUs with AMX.
    torch.set_float32_matmul_precision("medium")
    torch.manual_seed(ARGS.seed)
    # 50,000 images; the report needs the others. Full batches: batch normalization fails on one
    # image.
    dataset, _, _ = mnist(batch_size=ARGS.batch_size, n_train=50_000, shift=False, drop_last=True,
                          device=ARGS.device)  # fmt: skip
    generator = Generator(ARGS.latent_dim).to(ARGS.device)
    discriminator = Discriminator().to(ARGS.device)
    # A beta of 0.5, not 0.9 (Radford et al., 2016, arXiv:1511.06434): older gradients were against
    # an opponent that has changed since.
    adam = {"lr": ARGS.lr, "betas": (0.5, 0.999), "fused": True}
    optimizer_G = torch.optim.Adam(generator.parameters(), **adam)
    optimizer_D = torch.optim.Adam(discriminator.parameters(), **adam)
    print(f"training on {ARGS.device}, results in {ARGS.results_dir}", flush=True)
    average, history = train(dataset, discriminator, generator, optimizer_G, optimizer_D)

    torch.manual_seed(ARGS.seed)
    ends, digits = two_digits(average, dataset)
    steps = generate(average, interpolate(*ends))
    save_images(steps, ARGS.results_dir / "interpolation.pdf", nrow=9)
    save_training_plot(history, ARGS.results_dir / "training.pdf")
    final = {name: column[-1] for name, column in history.items() if name != "seconds"}
    final |= {"digit_from": digits[0], "digit_to": digits[1]}
    runs.save_results(ARGS, average, history, final)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--n_epochs", type=int, default=200, help="passes over the images")
    parser.add_argument("--batch_size", type=int, default=64, help="images in a batch")
    parser.add_argument("--lr", type=float, default=2e-4, help="learning rate of the first half")
    parser.add_argument("--latent_dim", type=int, default=100, help="dimensions of the latent")
    parser.add_argument("--save_interval", type=int, default=500, help="batches between grids")

    ARGS = runs.parse(parser, "gan")
    # Batch normalization needs two images, an arc between latents two dimensions.
    for option in ("batch_size", "latent_dim"):
        if getattr(ARGS, option) == 1:
            runs.fail(f"--{option} 1 is not allowed; give at least 2")
    runs.run(main, ARGS)
