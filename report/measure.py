"""Measure trained models for the report: what no training needs, and takes minutes.

    python report/measure.py results/gan [results/vae ...]

reads weights.pt and the options in summary.json of each folder, which any of the scripts has left,
and writes measures.json beside them; of a VAE prior_estimate.pdf and .png, too, and if it has two
dimensions latent_space.pdf and .png. All is computed in float32 on one thread of the CPU, and gives
the same numbers again but for the time. A VAE takes five minutes, the mixtures take a quarter of an
hour, and the others two minutes.
"""

import argparse
import hashlib
import json
import math
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import numpy as np
import scipy.stats
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import a3_gan_template as gan
import a3_nf_template as nf
import a3_vae_template as vae
import runs
from datasets.bmnist import bmnist
from datasets.mnist import ShiftedLoader, mnist
from extension import mixture_flow

DRAWS, SAMPLES, AT_ONCE = 3, 10_000, 1000  # so many times so many samples, a thousand at once
N_NEIGHBOURS, N_AGREEING = 10, 8
ELBO_DRAWS, VAE_DRAWS = 10, 1000  # latents of each test image, for the bound and for log p(x)
FEW_IMAGES, MANY = 100, 50  # on so many test images also so many times VAE_DRAWS latents
PRIOR_DRAWS = [100, 1000, 10_000, 100_000]
FLOW_DRAWS, FLOW_IMAGES = 16, 1000  # noise for the tighter bound of so many images
END_IMAGES = 10_000  # training images on which a flow is measured at the end
INK = 252  # grey values from here on are a stroke's inside, each far more frequent than 1 to 251


def stderr(values):
    """Returns the standard error of the mean of values `[n]`."""
    return (values.double().std() / len(values) ** 0.5).item()


def share(mask):
    """Returns the share of the true among truth values."""
    return mask.double().mean().item()


def numbers(images):
    """Returns images of bytes as floating-point numbers of PyTorch's default type."""
    return images.to(torch.get_default_dtype())


def spread(images, n):
    """Returns `n` of the images `[N, 784]` at equal distances: their files may be sorted."""
    return images[:: len(images) // n][:n]


def in_parts(function, images, size, name):
    """Returns the joined results, along their last dimension, for parts of `size` images."""
    parts = tqdm(images.split(size), desc=name, leave=False, disable=None)
    return torch.cat([function(numbers(x)) for x in parts], dim=-1)


def n_parameters(model):
    """Returns the number of a model's parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


# ------------------------------------ The yardstick ------------------------------------
def squared_distances(a, b):
    """Yields the squared distances of the rows of `a` to those of `b` in blocks `[500, len(b)]`.

    A block takes 100 MB for 50,000 rows in `b`, where all rows at once would take gigabytes.
    """
    b_norms = b.square().sum(dim=1)
    for block in tqdm(a.split(500), desc="distances", leave=False, disable=None):
        norms = block.square().sum(dim=1, keepdim=True) + b_norms
        # Rounding can push the distance of two equal rows below zero.
        yield torch.addmm(norms, block, b.T, alpha=-2).clamp_(min=0)


def yardstick(images):
    """Judges images `[n, 784]` in [0, 1] by their ten nearest of MNIST's first 50,000 images.

    Returns, `[n]` each, the digit, which is the most frequent one of the ten, whether at least
    eight of the ten are of that digit, and the distance to the nearest one (Euclidean, in pixels).
    """
    train, _, _ = mnist(n_train=50_000, shift=False)
    nearest, labels = [], []
    for block in squared_distances(images, numbers(train.images) / 255):
        squares, rows = block.topk(N_NEIGHBOURS, dim=1, largest=False)
        nearest.append(squares[:, 0].sqrt())
        labels.append(train.labels[rows])
    labels = torch.cat(labels)
    digits = labels.mode(dim=1).values
    clear = (labels == digits[:, None]).sum(dim=1) >= N_AGREEING
    return digits, clear, torch.cat(nearest)


def shares(digits):
    """Returns the ten digits' shares of digits `[n]`, as a list."""
    return (digits.bincount(minlength=10).double() / len(digits)).tolist()


def judge_samples(draw):
    """Returns measures of DRAWS times SAMPLES samples, which `draw(n)` makes, `[n, 784]` in [0, 1].

    The agreement is the share of samples that look clearly like one digit. The time is the least
    that drawing AT_ONCE of them has taken a processor, in ms.
    """
    images, seconds = [], []
    for _ in tqdm(range(DRAWS * SAMPLES // AT_ONCE), desc="samples", leave=False, disable=None):
        start = time.process_time()
        images.append(draw(AT_ONCE))
        seconds.append(time.process_time() - start)
    digits, clear, nearest = yardstick(torch.cat(images))
    return {
        "draws": DRAWS, "samples": SAMPLES, "sample_ms": 1000 * min(seconds),
        "agreement": share(clear),
        "agreement_draws": [share(draw) for draw in clear.split(SAMPLES)],
        "digit_shares": shares(digits),
        "nearest_min": nearest.min().item(),  # a mean would hide a few copies of training images
    }  # fmt: skip


# ------------------------------------ VAE ------------------------------------
def vae_images(model, n):
    """Draws `n` Bernoulli means, `[n, 784]` in [0, 1]."""
    return model.sample(n)[1].flatten(1)


def vae_losses(model, images, n_draws):
    """Returns both terms of the negative ELBO, `[2, n]` in nats, as means over draws of noise."""

    def average(x):
        return torch.stack([torch.stack(model.losses(x)) for _ in range(n_draws)]).mean(dim=0)

    return in_parts(average, images, 1000, "ELBO")


def importance_log_likelihood(model, images, n_samples):
    """Estimates log p(x) of each image, `[batch]` in nats, with `n_samples` latents from q(z|x).

    log 1/K sum_k p(x|z_k) p(z_k) / q(z_k|x) (Burda et al., 2016, equation 8): a lower bound in
    expectation that rises to log p(x) with K.
    """
    mean, std = model.encoder(images)
    noise = torch.randn(n_samples, *mean.shape)
    z = mean + std * noise
    # log p(z) - log q(z|x): the normalizers cancel, and (z - mean) / std is the noise.
    log_prior_ratio = (0.5 * (noise**2 - z**2) + std.log()).sum(dim=-1)
    log_likelihood = vae.bernoulli_log_likelihood(model.decoder.logits(z), images)
    return (log_likelihood + log_prior_ratio).logsumexp(dim=0) - math.log(n_samples)


def log_likelihoods(model, images, n_samples):
    """Returns the importance-sampled log p(x) of images `[n, 784]`, `[n]` in nats."""
    estimate = partial(importance_log_likelihood, model, n_samples=n_samples)
    return in_parts(estimate, images, max(1, 1000 // n_samples), "log p(x)")  # 1,000 latents each


def prior_log_likelihoods(model, images, counts):
    """Estimates log p(x) of images `[n, 784]` with S latents from the prior, for S in `counts`.

    Returns the means over the images of log 1/S sum_s p(x|z_s), in nats (Question 1.4). Each is an
    average over as many groups of S as the greatest count has.
    """

    def log_likelihood(z):
        logits = model.decoder.logits(z)
        # The sum over the pixels of x l - softplus(l), for all images and latents.
        return numbers(images) @ logits.T - F.softplus(logits).sum(dim=1)

    latents = torch.randn(max(counts), model.z_dim)
    log_px = in_parts(log_likelihood, latents, 1000, "prior")  # [n, latents]
    groups = [log_px.view(len(images), -1, count) for count in counts]
    return [(x.logsumexp(dim=2) - math.log(x.shape[2])).mean().item() for x in groups]


def save_prior_estimate(counts, estimates, log_px, filename):
    """Plots the estimates of log p(x) from S latents of the prior against S, beside log p(x)."""
    figure = Figure(figsize=(2.7, 1.8), layout="constrained")
    axes = figure.subplots()
    axes.semilogx(counts, estimates, marker="o", ms=3, label="$S$ samples of the prior")
    axes.axhline(log_px, color="0.5", ls="--", label="importance sampling")
    axes.set(xlabel="number of samples $S$", ylabel=r"$\log\,p(\mathbf{x})$ (nats)")
    axes.set_ylim(-240, -80)  # the same of all runs
    axes.legend(frameon=False, loc="lower right", fontsize=8, handlelength=1.2, borderpad=0)
    runs.save_figure(figure, filename)


def save_latent_space(mean, labels, filename):
    """Saves posterior means `[n, 2]` in the latent plane, coloured by digit, in random order.

    In that of the file, which is sorted, the last digits would hide the others. Each digit stands
    at the median of its means.
    """
    order = torch.randperm(len(mean), generator=torch.Generator().manual_seed(0))
    figure = Figure(figsize=(2.5, 2.6), layout="constrained")
    axes = figure.subplots()
    colours = {"c": labels[order].numpy(), "cmap": "tab10", "vmin": -0.5, "vmax": 9.5}
    axes.scatter(*mean[order].T.numpy(), s=2, lw=0, **colours)
    outline = [withStroke(linewidth=2, foreground="white")]
    for digit in range(10):
        place = mean[labels == digit].median(dim=0).values.tolist()
        axes.annotate(digit, place, size=8, ha="center", va="center", path_effects=outline)
    axes.set(xlabel="$z_1$ (posterior mean)", ylabel="$z_2$ (posterior mean)", aspect="equal")
    runs.save_figure(figure, filename)


def measure_vae(model, options, folder):
    """Measures both parts of the ELBO and log p(x) on the test images, in nats.

    And how far the estimates of log p(x) fall short, on a few of them.
    """
    _, val, test = bmnist()  # these are the same for both binarizations
    reconstruction, kl = vae_losses(model, test.images, ELBO_DRAWS)
    log_px = log_likelihoods(model, test.images, VAE_DRAWS)
    few = spread(test.images, FEW_IMAGES)
    bounds = torch.stack([log_likelihoods(model, few, VAE_DRAWS) for _ in range(MANY)])
    few_log_px = (bounds.logsumexp(dim=0) - math.log(MANY)).mean().item()  # of all draws together
    prior = prior_log_likelihoods(model, few, PRIOR_DRAWS)
    save_prior_estimate(PRIOR_DRAWS, prior, few_log_px, folder / "prior_estimate.pdf")
    torch.manual_seed(options["seed"])  # the random weights that the training began with
    untrained = vae.VAE(z_dim=model.z_dim)
    initial = vae_losses(untrained, val.images, 1)
    logits = untrained.decoder.logits(torch.randn(1000, model.z_dim))
    measures = {
        "elbo_draws": ELBO_DRAWS, "test_elbo": -(reconstruction + kl).mean().item(),
        "test_elbo_stderr": stderr(reconstruction + kl),
        "test_reconstruction": reconstruction.mean().item(), "test_kl": kl.mean().item(),
        "test_log_px": log_px.mean().item(), "test_log_px_stderr": stderr(log_px),
        "iw_samples": VAE_DRAWS,
        "few_images": FEW_IMAGES, "many_draws": MANY * VAE_DRAWS, "few_log_px": few_log_px,
        "iw_bias": few_log_px - bounds.mean().item(),  # by which the bound of VAE_DRAWS is lower
        "prior_draws": PRIOR_DRAWS, "prior_log_px": prior,
        "initial_elbo": -initial.sum(dim=0).mean().item(),
        "initial_kl": initial[1].mean().item(),
        # What logits l at random cost of the bound: log 2 + l^2 / 8 a pixel, not log 2.
        "initial_logit_cost": logits.square().sum(dim=1).mean().item() / 8,
    }  # fmt: skip
    if model.z_dim == 2:
        mean, _ = model.encoder(numbers(test.images))
        save_latent_space(mean, test.labels, folder / "latent_space.pdf")
        edge = scipy.stats.norm.ppf(39 / 40)  # of the manifold's square
        measures["share_outside"] = share((mean.abs() > edge).any(dim=1))
    return measures


# ------------------------------------ GAN ------------------------------------
def gan_images(generator, n):
    """Draws `n` images, `[n, 784]` in [0, 1]."""
    return gan.generate(generator, torch.randn(n, generator.latent_dim))


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


def parzen_estimate(draws, val_images, test_images):
    """Returns log p(x) of the test images, `[n_draws, n]` in nats, and the bandwidth.

    The windows are those of each draw of samples. The bandwidth is the one that is best for the
    validation images under the first.
    """
    sigmas = np.geomspace(0.1, 0.4, 21).tolist()
    best = parzen_log_likelihoods(val_images, draws[0], sigmas).mean(dim=1).argmax().item()
    log_px = [parzen_log_likelihoods(test_images, centres, [sigmas[best]]) for centres in draws]
    return torch.cat(log_px).double(), sigmas[best]


def measure_gan(generator, options, folder):
    """Measures the Parzen windows, and the test images by the yardstick of the samples."""
    train, val, test = mnist(n_train=50_000, shift=False)
    train_images, val_images, test_images = (numbers(x.images) / 255 for x in (train, val, test))
    samples = gan_images(generator, DRAWS * SAMPLES).split(SAMPLES)
    log_px, sigma = parzen_estimate(samples, val_images, test_images)
    # As many training images instead of samples: what perfect samples would reach.
    real = train_images.split(SAMPLES)[:DRAWS]
    real_log_px, _ = parzen_estimate(real, val_images, test_images)
    digits, clear, nearest = yardstick(test_images)
    return {
        "parzen": log_px.mean().item(), "parzen_stderr": stderr(log_px.mean(dim=0)),
        "parzen_draws": log_px.mean(dim=1).tolist(), "parzen_sigma": sigma,
        "parzen_train": real_log_px.mean().item(),
        "parzen_train_stderr": stderr(real_log_px.mean(dim=0)),
        "test_agreement": share(clear), "test_digit_shares": shares(digits),
        "test_nearest_min": nearest.min().item(), "vote_accuracy": share(digits == test.labels),
        "label_shares": shares(test.labels), "generator_parameters": n_parameters(generator),
        "discriminator_parameters": n_parameters(gan.Discriminator()),
    }  # fmt: skip


# ------------------------------------ Flow ------------------------------------
def flow_images(model, n):
    """Draws `n` images, `[n, 784]` in [0, 1]."""
    return model.sample(n) / 256


def shifted(images, labels):
    """Returns images `[n, 784]` of bytes as numbers, shifted as in training, and their labels."""
    (batch,) = ShiftedLoader(images, labels, batch_size=len(images))
    return batch


def draws_of_bits(model, images, n_draws):
    """Returns bits/dim of images `[n, 784]`, `[n_draws, n]`, each with noise of its own."""

    def draw(x):
        return torch.stack([nf.bits_per_dim(model(x)) for _ in range(n_draws)])

    return in_parts(draw, images, 250, "bits")


def tighter_bits(bits):
    """Returns the bits/dim `[n]` of the mean of the draws' densities, given `[n_draws, n]`.

    -log2 1/K sum_k p(x + u_k), a bound on the discrete image's bits that tightens with K: the
    importance-weighted one (Burda et al., 2016) for noise u from its prior.
    """
    log_px = -bits * nf.N_PIXELS * math.log(2)
    return nf.bits_per_dim(log_px.logsumexp(dim=0) - math.log(len(bits)))


def pixel_bits(model, images):
    """Returns the bits `[n, 784]` of each pixel of images `[n, 784]` under a mixture flow.

    A pixel's bits are the sum of -log2 of its latent's prior and of the slopes of its own maps, the
    logit and the couplings that change it. By the chain rule that is its density given the pixels
    that its coupling reads, if only one changes it: so with all but the last grid's, whose 49
    pixels have such bits in their sum alone.
    """
    noisy = model.dequantize(images)
    z, log_slopes = model.logit_normalize(noisy.view(-1, 1), noisy.new_zeros(noisy.numel()))
    z, log_slopes = z.view_as(noisy), log_slopes.view_as(noisy)
    for layer in model.flow.layers:
        *mixture, a, _ = layer.predict(z)
        _, log_slope = layer.logit_cdf(z[:, layer.changed], *mixture)
        log_slopes = log_slopes.index_add(1, layer.changed, log_slope + a)
        z, _ = layer(z, z.new_zeros(len(z)))
    return -(nf.log_prior(z) + log_slopes) / math.log(2)


def kinds_of_pixels(images):
    """Returns masks of images `[n, 784]` of bytes by name; each pixel is in one of the four."""
    strokes = F.max_pool2d(numbers(images > 0).view(-1, 1, 28, 28), 3, stride=1, padding=1)
    near = strokes.flatten(1) > 0  # itself or one of the eight around it
    return {"background": ~near, "beside": near & (images == 0),
            "rim": (images > 0) & (images < INK), "ink": images >= INK}  # fmt: skip


def where_the_bits_go(model, images):
    """Returns the share of each kind of pixel, and its part of the bits/dim, by name."""
    bits = in_parts(lambda x: pixel_bits(model, x).T, images, 250, "pixels").T
    measures = {}
    for kind, mask in kinds_of_pixels(images).items():
        measures[f"{kind}_share"] = share(mask)
        measures[f"{kind}_bpd"] = (bits * mask).double().mean().item()
    return measures


def measure_flow(model, options, folder):
    """Measures what a flow's bits/dim depend on, and the test images, shifted, by the yardstick.

    A flow learns shifted images, so these are what perfect samples would look like.
    """
    train, val, test = mnist(shift=False)
    images, labels = shifted(test.images, test.labels)
    digits, clear, _ = yardstick(images / 255)
    few = spread(test.images, FLOW_IMAGES)
    draws = draws_of_bits(model, few, FLOW_DRAWS).double()
    end = {"train": train.images[:END_IMAGES], "val": val.images,
           "shifted": shifted(train.images[:END_IMAGES], train.labels[:END_IMAGES])[0]}  # fmt: skip
    pixels = where_the_bits_go(model, few) if "n_mix" in options else {}
    return {
        "shifted_agreement": share(clear), "shifted_digit_shares": shares(digits),
        "shifted_vote_accuracy": share(digits == labels),
        "test_bpd_stderr": stderr(draws_of_bits(model, test.images, 1)[0]),
        # By so much the bound of FLOW_DRAWS draws of the noise is tighter than that of one.
        "iw_gain": (draws.mean() - tighter_bits(draws).mean()).item(),
        "iw_samples": FLOW_DRAWS, "iw_images": FLOW_IMAGES, "end_images": END_IMAGES,
        **{f"end_{x}_bpd": draws_of_bits(model, end[x], 1).mean().item() for x in end}, **pixels,
    }  # fmt: skip


# ------------------------------------ All ------------------------------------
def load(folder):
    """Returns a folder's trained model, its run's options, what draws images and what measures."""
    options = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["options"]
    draw, measure = flow_images, measure_flow
    if "zdim" in options:
        model, draw, measure = vae.VAE(z_dim=options["zdim"]), vae_images, measure_vae
    elif "n_epochs" in options:
        model, draw, measure = gan.Generator(options["latent_dim"]), gan_images, measure_gan
    elif "n_mix" in options:
        model = mixture_flow.mixture_model(options["n_mix"])
    else:
        model = nf.Model([nf.N_PIXELS])
    weights = torch.load(folder / "weights.pt", map_location="cpu", weights_only=True)
    model.load_state_dict(weights)
    return model.eval(), options, draw, measure


def all_measures(folder, model, options, draw, measure):
    """Returns what measures.json has, by name: of which weights it is, and what they can do."""
    torch.manual_seed(0)
    measures = measure(model, options, folder)
    return {
        "weights_sha256": hashlib.sha256((folder / "weights.pt").read_bytes()).hexdigest(),
        "parameters": n_parameters(model) + measures.get("discriminator_parameters", 0),
        **measures, **judge_samples(partial(draw, model)),
    }  # fmt: skip


@torch.no_grad()
def main():
    torch.set_num_threads(1)
    for folder in ARGS.folders:
        try:
            run = load(folder)
        except Exception as error:  # a damaged file fails in a dozen ways
            what = textwrap.shorten(f"{type(error).__name__}: {error}", 200)
            runs.fail(f"{folder} has no weights.pt and summary.json that can be read: {what}")
        text = json.dumps(all_measures(folder, *run), indent=2) + "\n"
        runs.write(folder / "measures.json", lambda file, text=text: file.write(text.encode()))
        print(f"{folder}/measures.json\n{text}", end="", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.error = runs.fail
    parser.add_argument("folders", nargs="+", type=Path, help="a run's results, as results/vae")

    ARGS = parser.parse_args()
    runs.run(main)
