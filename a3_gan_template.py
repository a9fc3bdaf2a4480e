"""A generative adversarial network on MNIST (Goodfellow et al., 2014, arXiv:1406.2661).

In the order of the assignment's template: the two networks, the value function of their game
(written by hand), the training, the figures, `main`, the options. Run

    python a3_gan_template.py

and look into results/gan. `--help` lists the options. `runs.py` holds options, files and resuming.
"""

import argparse
import math
import time

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from torch.optim.swa_utils import AveragedModel
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
        self.layers = nn.Sequential(
            nn.Linear(latent_dim, 128), nn.LeakyReLU(0.2),
            nn.Linear(128, 256), nn.BatchNorm1d(256), nn.LeakyReLU(0.2),
            nn.Linear(256, 512), nn.BatchNorm1d(512), nn.LeakyReLU(0.2),
            nn.Linear(512, 1024), nn.BatchNorm1d(1024), nn.LeakyReLU(0.2),
            nn.Linear(1024, N_PIXELS), nn.Tanh(),
        )  # fmt: skip

    def forward(self, z):
        """Maps latents `[batch, latent_dim]` to images `[batch, 784]` in [-1, 1]."""
        return self.layers(z)


class Discriminator(nn.Module):
    """Tells images of the data from images of the generator.

    Dropout keeps it from memorizing the training images.
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

    With D = sigmoid(l), 1 - D = sigmoid(-l). Both logarithms stay finite where D rounds to 0 or 1.
    """
    return F.logsigmoid(real_logits).mean() + F.logsigmoid(-fake_logits).mean()


def generator_loss(fake_logits):
    """Returns the non-saturating loss -E[log D(G(z))] in nats (paper, end of section 3).

    Early on D(G(z)) = sigmoid(l) may be near 0. There the minimax loss log(1 - D) saturates: its
    gradient with respect to l is -D, near 0, so G hardly learns. That of -log D is D - 1, near -1.
    """
    return -F.logsigmoid(fake_logits).mean()


# ------------------------------------ Training ------------------------------------
def average_weights(mean, weight, n):
    """Returns the average of n + 1 states of a weight, given the `mean` of the first n.

    Late states count more: two thirds of the average are from the last fifth (Shamir & Zhang,
    2013, eta = 4).
    """
    return mean + (weight - mean) * 5 / (5 + n)


def train(dataloader, discriminator, generator, optimizer_G, optimizer_D):
    """Trains both networks in turn (paper, Algorithm 1, k = 1), with the options in ARGS.

    Unlike the template, D learns first; unlike the paper, both use the same noise, and an average
    of G's weights makes the samples.

    Returns the generator with averaged weights and, by name, each epoch's means of V, the
    generator's loss, D(x) and D(G(z)), all as in training, with D's dropout.
    """
    # The two networks tend to circle around the equilibrium; averaging G's weights smooths this out
    # (Yazici et al., 2019, arXiv:1806.04498). Samples come from the average, and training never
    # sees it.
    average = AveragedModel(generator, avg_fn=average_weights, use_buffers=True).eval()
    fixed_z = torch.randn(25, ARGS.latent_dim, device=ARGS.device)  # for all sample grids
    history = {"value": [], "loss_g": [], "d_real": [], "d_fake": [], "seconds": []}
    parts = {"generator": generator, "discriminator": discriminator, "average": average,
             "optimizer_G": optimizer_G, "optimizer_D": optimizer_D}  # fmt: skip
    if ARGS.resume:
        runs.load_checkpoint(ARGS, parts, history)
    else:
        runs.save_images(generate(average, fixed_z), ARGS.results_dir / "samples_before.png")

    start = time.perf_counter()
    for epoch in range(len(history["value"]) + 1, ARGS.n_epochs + 1):
        metrics = []
        # The full learning rate for half of the epochs, then on a line towards zero, so that both
        # players converge.
        for group in optimizer_G.param_groups + optimizer_D.param_groups:
            group["lr"] = ARGS.lr * min(1, 2 - 2 * (epoch - 1) / ARGS.n_epochs)
        for i, (pixels, _) in enumerate(tqdm(dataloader, leave=False, disable=None), 1):
            batches_done = (epoch - 1) * len(dataloader) + i
            real = pixels / 127.5 - 1  # grey values 0..255 to the generator's range
            fake = generator(torch.randn(len(real), ARGS.latent_dim, device=ARGS.device))

            # Train Discriminator: max over D of E[log D(x)] + E[log(1 - D(G(z)))]
            # -------------------
            # One pass for both: D has no batch normalization, which would mix them.
            logits = discriminator.logits(torch.cat([real, fake.detach()]))
            real_logits, fake_logits = logits.chunk(2)
            value = value_function(real_logits, fake_logits)
            optimizer_D.zero_grad()
            (-value).backward()
            optimizer_D.step()

            # Train Generator: max over G of E[log D(G(z))], against the D just updated
            # ---------------
            loss_g = generator_loss(discriminator.logits(fake))
            optimizer_G.zero_grad()
            loss_g.backward()
            optimizer_G.step()

            # Average Generator, every tenth batch to save time
            # -----------------
            if batches_done % 10 == 0:
                average.update_parameters(generator)

            # Save Images: samples of the averaged generator, always from the same noise
            # -----------
            if batches_done % ARGS.save_interval == 0:
                filename = ARGS.results_dir / "progress" / f"{batches_done:06d}.png"
                runs.save_images(generate(average, fixed_z), filename)

            d_real, d_fake = logits.detach().sigmoid().view(2, -1).mean(dim=1)
            metrics.append(torch.stack([value.detach(), loss_g.detach(), d_real, d_fake]))

        value, loss_g, d_real, d_fake = torch.stack(metrics).mean(dim=0).tolist()
        runs.check_finite(epoch, value, loss_g)
        if epoch == (ARGS.n_epochs + 1) // 2:
            runs.save_images(generate(average, fixed_z), ARGS.results_dir / "samples_halfway.png")
        if epoch == ARGS.n_epochs:
            runs.save_images(generate(average, fixed_z), ARGS.results_dir / "samples_after.png")

        row = (value, loss_g, d_real, d_fake, time.perf_counter() - start)
        start = time.perf_counter()  # the next epoch's time includes this checkpoint
        for name, number in zip(history, row, strict=True):
            history[name].append(number)
        runs.save_checkpoint(ARGS, parts, history)
        print(f"epoch {epoch}/{ARGS.n_epochs}  value {value:.4f}  loss_g {loss_g:.4f}  "
              f"d_real {d_real:.4f}  d_fake {d_fake:.4f}  {row[-1]:.1f} s", flush=True)  # fmt: skip
    return average.module, history


# ------------------------------------ Samples and figures ------------------------------------
@torch.no_grad()
def generate(generator, z):
    """Returns the images `[n, 784]` of latents `[n, latent_dim]`, with pixels in [0, 1]."""
    return (generator(z) + 1) / 2


def two_digits(generator, dataset, n_samples=100):
    """Returns the latents `[2, latent_dim]` of two samples of different digits, and the digits.

    A sample's digit is that of the nearest training image. The samples are the clearest: those
    whose ten nearest training images agree best on it (Question 2.7).
    """
    z = torch.randn(n_samples, generator.latent_dim, device=dataset.images.device)
    distances = torch.cdist(generate(generator, z), dataset.images / 255)
    digits = dataset.labels[distances.topk(10, largest=False).indices]
    agreement = (digits == digits[:, :1]).sum(dim=1)
    order = agreement.argsort(descending=True, stable=True)
    z, digits = z[order], digits[order, 0]
    others = (digits != digits[0]).nonzero().flatten().tolist()
    rows = [0, others[0] if others else 1]  # in a mode collapse there may be one digit only
    return z[rows], digits[rows].tolist()


def interpolate(z_from, z_to, n_images=9):
    """Returns `n_images` latents on the arc between two latents `[latent_dim]`, ends included.

    Spherical (White, 2016, arXiv:1609.04468): normal latents of d dimensions lie near a sphere of
    radius sqrt(d), and the generator never saw latents far inside it.
    """
    t = torch.linspace(0, 1, n_images, device=z_from.device)[:, None]
    angle = torch.acos(torch.cosine_similarity(z_from, z_to, dim=0))
    return (torch.sin((1 - t) * angle) * z_from + torch.sin(t * angle) * z_to) / torch.sin(angle)


def save_training_plot(history, filename):
    """Plots V, and the mean outputs of D, by epoch without the first 5%; dashed: equilibrium."""
    n_epochs = len(history["value"])
    first = n_epochs // 20
    figure = Figure(figsize=(5.5, 2), layout="constrained")
    left, right = figure.subplots(1, 2, gridspec_kw={"wspace": 0.1})
    epochs = range(first + 1, n_epochs + 1)
    left.plot(epochs, history["value"][first:], marker=".", ms=2)
    left.axhline(-math.log(4), color="0.5", ls="--")
    left.set(xlabel="epoch", ylabel="$V(D, G)$ (nats)")
    right.plot(epochs, history["d_real"][first:], marker=".", ms=2, label=r"$D(\mathbf{x})$")
    right.plot(epochs, history["d_fake"][first:], marker=".", ms=2, label=r"$D(G(\mathbf{z}))$")
    right.axhline(0.5, color="0.5", ls="--")
    right.set(xlabel="epoch", ylabel="mean output of $D$")
    right.legend(frameon=False, loc="upper right")
    runs.save_figure(figure, filename)


def main():
    torch.manual_seed(ARGS.seed)
    # Faster matrix products where PyTorch has them: TF32 on GPUs, bfloat16 on CPUs with AMX.
    torch.set_float32_matmul_precision("medium")
    # The report needs the other 10,000. Full batches only: batch normalization fails on one image.
    dataset, _, _ = mnist(batch_size=ARGS.batch_size, n_train=50_000, shift=False, drop_last=True,
                          device=ARGS.device)  # fmt: skip
    generator = Generator(ARGS.latent_dim).to(ARGS.device)
    discriminator = Discriminator(ARGS.dropout).to(ARGS.device)
    # A beta of 0.5, not 0.9 (Radford et al., 2016, arXiv:1511.06434): old gradients refer to an
    # opponent that has since changed.
    adam = {"lr": ARGS.lr, "betas": (0.5, 0.999), "fused": True}
    optimizer_G = torch.optim.Adam(generator.parameters(), **adam)
    optimizer_D = torch.optim.Adam(discriminator.parameters(), **adam)
    print(f"training on {ARGS.device}, results in {ARGS.results_dir}", flush=True)
    average, history = train(dataset, discriminator, generator, optimizer_G, optimizer_D)

    torch.set_float32_matmul_precision("highest")  # full float32 for the numbers below
    ends, (digit_from, digit_to) = two_digits(average, dataset)
    runs.save_results(ARGS, average.state_dict(), history, digit_from=digit_from, digit_to=digit_to)
    steps = generate(average, interpolate(*ends))
    runs.save_images(steps, ARGS.results_dir / "interpolation.png", nrow=9)
    save_training_plot(history, ARGS.results_dir / "training.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--n_epochs", type=int, default=200, help="passes over the images")
    parser.add_argument("--batch_size", type=int, default=64, help="images in a batch")
    parser.add_argument("--lr", type=float, default=2e-4, help="learning rate of the first half")
    parser.add_argument("--latent_dim", type=int, default=100, help="dimensions of the latent")
    parser.add_argument("--save_interval", type=int, default=500, help="batches between grids")
    parser.add_argument("--dropout", type=float, default=0.3, help="of D, while it trains")

    # Batch normalization needs two images, an arc between latents two dimensions.
    ARGS = runs.parse(parser, "gan", batch_size=2, latent_dim=2)
    runs.run(main)
