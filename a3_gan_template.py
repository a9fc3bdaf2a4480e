"""A generative adversarial network on MNIST (Goodfellow et al., 2014).

Read from top to bottom: the two networks, the value function of their game (written by hand), the
training, the figures, and `main`; the machinery and the options come last. Run

    python a3_gan_template.py

and look into results/gan. `--help` lists the options.
"""

import argparse
import copy
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
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from datasets.mnist import DataError, mnist

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

    Without dropout it learns the training images by heart, and takes all others for fakes.
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

    Where D sees through the generator, D(G(z)) = sigmoid(l) near 0, the derivative of
    log(1 - D(G(z))) in l is -D(G(z)) and vanishes; that of -log D(G(z)) is D(G(z)) - 1.
    """
    return -F.logsigmoid(fake_logits).mean()


# ------------------------------------ Training ------------------------------------
def train(dataloader, discriminator, generator, optimizer_G, optimizer_D):
    """Trains both networks by turns (paper, Algorithm 1, k = 1, with the same noise for both).

    Returns the generator with averaged weights and, by name, each epoch's means of V, the
    generator's loss, D(x) and D(G(z)). Raises FloatingPointError where they or weights explode.
    """
    # Two adversaries circle around the solution more than they approach it; the average of the
    # last part of the way lies closer. Samples come from it, and training never sees it.
    average = copy.deepcopy(generator).eval()
    weights, averaged = generator.state_dict().values(), average.state_dict().values()
    z = torch.randn(25, generator.latent_dim, device=ARGS.device)  # of all the sample grids
    parts = {"generator": generator, "discriminator": discriminator, "average": average,
             "optimizer_G": optimizer_G, "optimizer_D": optimizer_D}  # fmt: skip
    history = {"epoch": [], "value": [], "loss_g": [], "d_real": [], "d_fake": [], "seconds": []}
    if ARGS.resume:
        history = load_checkpoint(ARGS, parts)
    else:
        save_images(sample_images(average, z), ARGS.results_dir / "samples_before.pdf", nrow=5)

    for epoch in range(len(history["epoch"]) + 1, ARGS.n_epochs + 1):
        torch.manual_seed(ARGS.seed * ARGS.n_epochs + epoch)  # its own draws, also if resumed
        start, metrics = time.perf_counter(), []
        # The full learning rate half of the way, then on a line towards zero: there they settle.
        for group in optimizer_G.param_groups + optimizer_D.param_groups:
            group["lr"] = ARGS.lr * min(1, 2 - 2 * (epoch - 1) / ARGS.n_epochs)
        generator.train()
        discriminator.train()
        for i, (pixels, _) in enumerate(tqdm(dataloader, leave=False, disable=None), 1):
            real = pixels / 127.5 - 1  # grey values 0..255 to the generator's range

            # Train Discriminator (before the generator, as in Algorithm 1)
            # -------------------
            # It ascends V; the fake images are constants to it.
            fake = generator(torch.randn(len(real), generator.latent_dim, device=real.device))
            logits = discriminator.logits(torch.cat([real, fake.detach()]))
            real_logits, fake_logits = logits.chunk(2)
            value = value_function(real_logits, fake_logits)
            optimizer_D.zero_grad()
            (-value).backward()
            optimizer_D.step()

            # Train Generator
            # ---------------
            # The improved discriminator judges the same images; its own weights get no gradient.
            loss_g = generator_loss(discriminator.logits(fake))
            optimizer_G.zero_grad()
            loss_g.backward(inputs=list(generator.parameters()))
            optimizer_G.step()

            # Average Generator (over about the last fifth of the batches so far)
            # -----------------
            # Polynomial-decay averaging (Shamir & Zhang, 2013, with eta = 4), of batch
            # normalization's statistics, too. PyTorch's AveragedModel takes 30 times as long.
            batches_done = (epoch - 1) * len(dataloader) + i
            for mean, new in zip(averaged, weights, strict=True):
                if new.is_floating_point():  # all but batch normalization's counters
                    mean.lerp_(new, 5 / (4 + batches_done))

            # Save Images
            # -----------
            if batches_done % ARGS.save_interval == 0:
                images = sample_images(average, z).view(-1, 1, 28, 28)
                buffer = io.BytesIO()
                save_image(1 - images, buffer, nrow=5, format="png")  # black on white
                write(ARGS.results_dir / "progress" / f"{batches_done:06d}.png", buffer.getvalue())

            d_real, d_fake = real_logits.sigmoid().mean(), fake_logits.sigmoid().mean()
            metrics.append(torch.stack([value, loss_g, d_real, d_fake]).detach())

        means = torch.stack(metrics).mean(dim=0)
        if not all(x.isfinite().all() for x in (means, *weights, *discriminator.parameters())):
            raise FloatingPointError(f"epoch {epoch} ends with values or weights not finite")
        row = [epoch, *means.tolist(), time.perf_counter() - start]
        for column, entry in zip(history.values(), row, strict=True):
            column.append(entry)
        if epoch == (ARGS.n_epochs + 1) // 2:
            save_images(sample_images(average, z), ARGS.results_dir / "samples_halfway.pdf", nrow=5)
        if epoch == ARGS.n_epochs:
            save_images(sample_images(average, z), ARGS.results_dir / "samples_after.pdf", nrow=5)
        save_checkpoint(ARGS, parts, history)
        shown = "  ".join(f"{name} {history[name][-1]:.4f}" for name in list(history)[1:-1])
        print(f"epoch {epoch}/{ARGS.n_epochs}  {shown}  {row[-1]:.1f} s", flush=True)
    return average, history


# ------------------------------------ Samples and figures ------------------------------------
@torch.no_grad()
def sample_images(generator, z):
    """Returns the images `[n, 784]` of latents `[n, latent_dim]`, with pixels in [0, 1]."""
    return (generator(z) + 1) / 2


def two_digits(generator, dataset, n_samples=100):
    """Returns the latents `[2, latent_dim]` of two samples of different digits, and the digits.

    A sample's digit is that of the nearest training image. If all have the same one, so have they.
    """
    z = torch.randn(n_samples, generator.latent_dim, device=dataset.images.device)
    distances = torch.cdist(sample_images(generator, z), dataset.images / 255)
    digits = dataset.labels[distances.argmin(dim=1)]
    rows = [0, 1 + (digits[1:] != digits[0]).int().argmax().item()]
    return z[rows], digits[rows].tolist()


def interpolate(z_from, z_to, n_images=9):
    """Returns `n_images` latents on the arc between two latents `[latent_dim]`, ends included.

    Spherical (White, 2016): normal latents of d dimensions lie near a sphere of radius sqrt(d),
    and the generator was not trained inside of it. Parallel latents get the straight line.
    """
    t = torch.linspace(0, 1, n_images, device=z_from.device)[:, None]
    angle = torch.acos(torch.cosine_similarity(z_from, z_to, dim=0).clamp(-1, 1))
    if angle.sin() < 1e-3:
        return torch.lerp(z_from, z_to, t)
    return (torch.sin((1 - t) * angle) * z_from + torch.sin(t * angle) * z_to) / torch.sin(angle)


def save_images(images, filename, nrow):
    """Saves images `[n, 784]` in [0, 1] as one grid, black on white, `nrow` to a row."""
    grid = make_grid(images.view(-1, 1, 28, 28).cpu(), nrow=nrow, padding=1, pad_value=0.5)[0]
    figure, axes = plt.subplots(figsize=(0.6 * nrow, 0.6 * math.ceil(len(images) / nrow)))
    axes.imshow(grid.numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    axes.axis("off")
    save_figure(figure, filename)


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
    save_figure(figure, filename)


def main():
    # Matrix products may run in bfloat16 where the processor has it; all else stays float32.
    torch.set_float32_matmul_precision("medium")
    torch.manual_seed(ARGS.seed)
    # Only full batches: batch normalization fails on one image. (The report uses the other splits.)
    dataset, _, _ = mnist(batch_size=ARGS.batch_size, n_train=50_000, shift=False, drop_last=True,
                          device=ARGS.device)  # fmt: skip
    generator = Generator(ARGS.latent_dim).to(ARGS.device)
    discriminator = Discriminator().to(ARGS.device)
    # Betas of 0.5 forget faster than 0.9 (Radford et al., 2016): the other player has moved since.
    adam = {"lr": ARGS.lr, "betas": (0.5, 0.999), "fused": True}
    optimizer_G = torch.optim.Adam(generator.parameters(), **adam)
    optimizer_D = torch.optim.Adam(discriminator.parameters(), **adam)
    print(f"training on {ARGS.device}, results in {ARGS.results_dir}", flush=True)
    average, history = train(dataset, discriminator, generator, optimizer_G, optimizer_D)

    torch.manual_seed(ARGS.seed)
    ends, digits = two_digits(average, dataset)
    steps = sample_images(average, interpolate(*ends))
    save_images(steps, ARGS.results_dir / "interpolation.pdf", nrow=9)
    save_training_plot(history, ARGS.results_dir / "training.pdf")
    final = {name: column[-1] for name, column in history.items() if name != "seconds"}
    final |= {"digit_from": digits[0], "digit_to": digits[1]}
    save_results(ARGS, average, history, final)


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
    parser.add_argument("--n_epochs", type=int, default=200, help="passes over the images")
    parser.add_argument("--batch_size", type=int, default=64, help="images in a batch")
    parser.add_argument("--lr", type=float, default=2e-4, help="learning rates of Adam")
    parser.add_argument("--latent_dim", type=int, default=100, help="of the latent space")
    parser.add_argument("--save_interval", type=int, default=500, help="batches between grids")
    parser.add_argument("--seed", type=int, default=0, help="of every random draw")
    parser.add_argument("--device", default=devices[-1], choices=devices, help="where to run")
    parser.add_argument("--results_dir", type=Path, help="if not one named by the options")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")

    ARGS = parser.parse_args()
    check_numbers(ARGS)
    if ARGS.batch_size == 1:
        fail("--batch_size 1 is not allowed: batch normalization needs at least 2 images")
    ARGS.results_dir = ARGS.results_dir or results_folder("gan", parser, ARGS)
    run(main, ARGS)
