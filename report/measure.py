"""Measure trained models for the report: what no training needs, and takes minutes.

    python report/measure.py results/gan [results/vae ...]

reads weights.pt and the options in summary.json of each folder, which any of the three scripts has
left, and writes measures.json beside them; of a VAE with two dimensions latent_space.pdf and .png,
too. It runs on the CPU, and gives the same numbers again but for the time.
"""

import argparse
import json
import math
import os
import sys
import textwrap
import time
import timeit
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"  # figures go to files
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import scipy.stats
import torch
from tqdm import tqdm

import a3_gan_template as gan
import a3_nf_template as nf
import a3_vae_template as vae
from datasets.bmnist import bmnist
from datasets.mnist import DataError, mnist

VAE_DRAWS = 1000  # latents for log p(x) of an image
GAN_SAMPLES = 10_000
N_NEIGHBOURS = 10
FLOW_DRAWS, FLOW_IMAGES = 16, 1000  # noise for the tighter bound of so many images


def stderr(values):
    """Returns the standard error of the mean of values `[n]`."""
    return (values.double().std() / len(values) ** 0.5).item()


def n_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def sample_ms(draw):
    """Returns the best of five processor times that `draw` takes on one thread, in ms."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = timeit.repeat(draw, number=1, timer=time.process_time)
    torch.set_num_threads(n_threads)
    return 1000 * min(seconds)


# ------------------------------------ VAE ------------------------------------
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
    log_likelihood = vae.bernoulli_log_likelihood(model.decoder.logits(z), images.flatten(1))
    return (log_likelihood + log_prior_ratio).logsumexp(dim=0) - math.log(n_samples)


def log_likelihoods(model, images, n_samples):
    """Returns the importance-sampled log p(x) of images `[n, 784]`, `[n]` in nats."""
    parts = images.split(max(1, 4000 // n_samples))  # about 4,000 latents at once
    parts = tqdm(parts, desc="log p(x)", leave=False, disable=None)
    return torch.cat([importance_log_likelihood(model, x.float(), n_samples) for x in parts])


def latent_plane(mean, std):
    """Compares the mixture of the posteriors, means and stds `[n, 2]`, with the prior N(0, I).

    Returns its variance in either dimension, and the share of the means that lie outside of the
    manifold's square, whose last quantile is 39/40.
    """
    variance = mean.var(dim=0) + (std**2).mean(dim=0)
    outside = (mean.abs() > scipy.stats.norm.ppf(39 / 40)).any(dim=1)
    return {"aggregate_variance": variance.tolist(),
            "share_outside": outside.double().mean().item()}  # fmt: skip


def save_latent_space(mean, labels, filename):
    """Saves posterior means `[n, 2]` in the latent plane, coloured by digit."""
    figure, axes = vae.plt.subplots(figsize=(4, 3), layout="constrained")
    colours = {"c": labels.numpy(), "cmap": "tab10", "vmin": -0.5, "vmax": 9.5}
    points = axes.scatter(*mean.T.numpy(), s=2, lw=0, **colours)
    figure.colorbar(points, ticks=range(10), label="digit")
    axes.set(xlabel="$z_1$ (posterior mean)", ylabel="$z_2$ (posterior mean)", aspect="equal")
    vae.save_figure(figure, filename)


def measure_vae(model, options, folder):
    """Measures both parts of the ELBO and log p(x) on the test images, in nats."""
    _, val, test = bmnist(batch_size=options["batch_size"], binarization=options["binarization"])
    # In the batches and with the noise of the script, so that the parts add up to its test ELBO.
    reconstruction, kl = torch.cat([torch.stack(model.losses(x)) for x in test], dim=1)
    log_px = log_likelihoods(model, test.images, VAE_DRAWS)
    measures = {
        "test_elbo_stderr": stderr(reconstruction + kl),
        "test_reconstruction": reconstruction.mean().item(),
        "test_reconstruction_stderr": stderr(reconstruction),
        "test_kl": kl.mean().item(), "test_kl_stderr": stderr(kl),
        "test_log_px": log_px.mean().item(), "test_log_px_stderr": stderr(log_px),
        "iw_samples": VAE_DRAWS,
        "parameters": n_parameters(model), "sample_ms": sample_ms(lambda: model.sample(1000)),
    }  # fmt: skip
    if model.z_dim == 2:
        mean, std = model.encoder(test.images.float())
        measures |= latent_plane(mean, std)
        if test.labels is not None:  # Larochelle's files have none
            save_latent_space(mean, test.labels, folder / "latent_space.pdf")
    torch.manual_seed(options["seed"])  # the random weights that the training began with
    untrained = vae.VAE(z_dim=model.z_dim).eval()
    measures["initial_elbo"] = vae.epoch_iter(untrained, val, optimizer=None)
    measures["initial_kl"] = torch.cat([untrained.losses(x)[1] for x in val]).mean().item()
    return measures


# ------------------------------------ GAN ------------------------------------
def squared_distances(a, b):
    """Yields the squared distances of the rows of `a` to those of `b` in blocks `[500, len(b)]`.

    A block takes 100 MB for 50,000 rows in `b`, where all rows at once would take gigabytes.
    """
    b_norms = b.square().sum(dim=1)
    for block in tqdm(a.split(500), desc="distances", leave=False, disable=None):
        norms = block.square().sum(dim=1, keepdim=True) + b_norms
        # Rounding can push the distance of two equal rows below zero.
        yield torch.addmm(norms, block, b.T, alpha=-2).clamp_(min=0)


def nearest_neighbours(images, train_images, train_labels, k=N_NEIGHBOURS):
    """Finds each image's k nearest training images by Euclidean distance in pixel space.

    Returns the distance to the nearest one `[n]` and the labels of all `[n, k]`.
    """
    distances, labels = [], []
    for block in squared_distances(images, train_images):
        nearest, index = block.topk(k, dim=1, largest=False)
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
    return log_px.mean().item(), stderr(log_px), sigmas[best]


def judge(generator, train_set, val_set, test_set, n_samples):
    """Measures the quality of `n_samples` images; returns the measures by name.

    A sample's digit is the most frequent one of its ten nearest training images.
    """
    splits = [data.images.float() / 255 for data in (train_set, val_set, test_set)]
    train_images, val_images, test_images = splits
    samples = gan.sample_images(generator, torch.randn(n_samples, generator.latent_dim))
    nearest, labels = nearest_neighbours(samples, train_images, train_set.labels)
    nearest_test, _ = nearest_neighbours(test_images, train_images, train_set.labels)
    shares = labels.mode(dim=1).values.bincount(minlength=10).double() / n_samples
    test_shares = test_set.labels.bincount(minlength=10).double() / len(test_set.labels)
    parzen, parzen_stderr, sigma = parzen_estimate(samples, val_images, test_images)
    # As many training images in the samples' place: what perfect samples would reach.
    real = parzen_estimate(train_images[:n_samples], val_images, test_images)
    return {
        "parzen": parzen, "parzen_stderr": parzen_stderr, "parzen_sigma": sigma,
        "parzen_train": real[0], "parzen_train_stderr": real[1],
        "digit_shares": shares.tolist(), "test_digit_shares": test_shares.tolist(),
        "digit_entropy": -torch.xlogy(shares, shares).sum().item(),
        "digits_present": (shares > 0).sum().item(),
        # A mean would hide a few copies of training images; the smallest distances would not.
        "nearest_sample": nearest.mean().item(), "nearest_test": nearest_test.mean().item(),
        "nearest_sample_min": nearest.min().item(), "nearest_test_min": nearest_test.min().item(),
        "eval_samples": n_samples,
    }  # fmt: skip


def measure_gan(generator, options, folder):
    """Measures the samples; the discriminator, which is not kept, only counts as parameters."""
    sizes = n_parameters(generator), n_parameters(gan.Discriminator())

    def draw():
        return gan.sample_images(generator, torch.randn(1000, generator.latent_dim))

    return judge(generator, *mnist(n_train=50_000, shift=False), GAN_SAMPLES) | {
        "generator_parameters": sizes[0], "discriminator_parameters": sizes[1],
        "parameters": sum(sizes), "sample_ms": sample_ms(draw),
    }  # fmt: skip


# ------------------------------------ Flow ------------------------------------
def draws_of_bits(model, images, n_draws):
    """Returns bits/dim of images `[n, 784]`, `[n_draws, n]`, each with noise of its own."""
    parts = tqdm(images.split(250), desc="bits", leave=False, disable=None)
    draws = [torch.stack([model(x.float()) for _ in range(n_draws)]) for x in parts]
    return nf.bits_per_dim(torch.cat(draws, dim=1))


def tighter_bits(bits):
    """Returns the bits/dim `[n]` of the mean of the draws' densities, given `[n_draws, n]`.

    -log2 1/K sum_k p(x + u_k), a bound on the discrete image's bits that tightens with K: the
    importance-weighted one (Burda et al., 2016) for noise u from its prior.
    """
    log_px = -bits * nf.N_PIXELS * math.log(2)
    return nf.bits_per_dim(log_px.logsumexp(dim=0) - math.log(len(bits)))


def measure_flow(model, options, folder):
    """Measures what the test images' bits/dim depend on: the images, and the noise on them."""
    images = mnist()[2].images
    (bits,) = draws_of_bits(model, images, 1)
    draws = draws_of_bits(model, images[:FLOW_IMAGES], FLOW_DRAWS).double()
    return {
        "test_bpd_stderr": stderr(bits),
        "test_bpd_iw": tighter_bits(draws).mean().item(),
        "test_bpd_iw_single": draws.mean().item(),  # of a single draw, averaged over all of them
        "iw_samples": FLOW_DRAWS, "iw_images": FLOW_IMAGES,
        "parameters": n_parameters(model), "sample_ms": sample_ms(lambda: model.sample(1000)),
    }  # fmt: skip


# ------------------------------------ All ------------------------------------
def load(folder):
    """Returns the trained model of a folder, the options of its run, and what measures it."""
    options = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["options"]
    if "zdim" in options:
        model, measure = vae.VAE(z_dim=options["zdim"]), measure_vae
    elif "n_epochs" in options:
        model, measure = gan.Generator(options["latent_dim"]), measure_gan
    else:
        model, measure = nf.Model([nf.N_PIXELS], options["coupling"]), measure_flow
    weights = torch.load(folder / "weights.pt", map_location="cpu", weights_only=True)
    model.load_state_dict(weights)
    return model.eval(), options, measure


@torch.no_grad()
def main(folders):
    for folder in folders:
        try:
            model, options, measure = load(folder)
        except Exception as error:  # a damaged file fails in a dozen ways
            what = textwrap.shorten(f"{type(error).__name__}: {error}", 200)
            vae.fail(f"{folder} has no weights.pt and summary.json that can be read: {what}")
        torch.manual_seed(0)
        measures = measure(model, options, folder)
        text = json.dumps(measures, indent=2) + "\n"
        vae.write(folder / "measures.json", text.encode())
        print(f"{folder}/measures.json\n{text}", end="", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.error = vae.fail
    parser.add_argument("folders", nargs="+", type=Path, help="a run's results, as results/vae")
    font = {"font.family": "STIXGeneral", "mathtext.fontset": "stix", "font.size": 9}
    try:
        with vae.plt.rc_context(font):  # the report's
            main(parser.parse_args().folders)
    except DataError as error:
        vae.fail(error)
    except OSError as error:
        vae.fail(f"{error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        vae.fail("interrupted", 130)
