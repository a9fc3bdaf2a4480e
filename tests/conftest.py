"""What the tests share: small runs of the scripts, and an image's bound by quadrature."""

import contextlib
import copy
import functools
import io
import math
import os
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch
from matplotlib.image import imread

import a3_gan_template as gan
import a3_nf_template as nf
import a3_vae_template as vae
import runs
from datasets.bmnist import bmnist
from extension import mixture_flow

# The same sums in the same order, here and in the processes that tests start.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

ROOT = Path(__file__).resolve().parent.parent
COMMON = {"seed": 0, "device": "cpu", "resume": False}
DEFAULTS = {
    vae: COMMON | {"epochs": 40, "zdim": 20, "binarization": "static", "batch_size": 64,
                   "lr": 3e-3, "weight_decay": 0.2},
    gan: COMMON | {"n_epochs": 200, "batch_size": 64, "lr": 2e-4, "latent_dim": 100,
                   "save_interval": 500, "dropout": 0.3},
    nf: COMMON | {"epochs": 40, "batch_size": 128, "lr": 1e-3, "weight_decay": 0.3},
    mixture_flow: COMMON | {"epochs": 40, "n_mix": 16, "batch_size": 64, "lr": 8e-3},
}  # fmt: skip
SMALL = {
    vae: {"epochs": 5, "batch_size": 20},
    gan: {"n_epochs": 5, "batch_size": 4, "save_interval": 15},
    nf: {"epochs": 5, "batch_size": 20},
    mixture_flow: {"epochs": 5, "batch_size": 20, "n_mix": 2},
}


def few(make):
    """Returns a function that makes loaders as `mnist` or `bmnist` does, of 50, 73 and 114 images.

    They come from all over each split: Larochelle's test file is sorted and begins with zeros.
    """

    def make_few(*args, **kwargs):
        loaders = make(*args, **kwargs)
        for loader, size in zip(loaders, (50, 73, 114), strict=True):
            rows = torch.linspace(0, len(loader.images) - 1, size).long()
            loader.images, loader.labels = loader.images[rows], loader.labels[rows]
        return loaders

    return make_few


def narrow(patch):
    """Makes the networks of the flows narrow, to save time; `patch` is a MonkeyPatch."""
    patch.setattr(nf, "Coupling", functools.partial(nf.Coupling, n_hidden=32))
    patch.setattr(mixture_flow, "ConvNet", functools.partial(mixture_flow.ConvNet, c_hidden=4))


def run(script, folder, **options):
    """Runs the `main` of an imported script on few images; returns what it prints."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        options = DEFAULTS[script] | SMALL[script] | options
        patch.setattr(script, "ARGS", SimpleNamespace(**options, results_dir=folder), raising=False)
        data = "bmnist" if script is vae else "mnist"
        patch.setattr(script, data, few(getattr(script, data)))
        narrow(patch)
        runs.run(script.main)
    return out.getvalue()


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """`finished(script)` is a small run of five epochs in one go, made once.

    It has the `folder`, all that was printed (`out`), the `duration` in seconds, the model after
    each epoch (`models`; of the GAN the averaged generator), and in the order in which they were
    `written` the names of the files, each with the precision of matrix products at that time.
    """

    @functools.cache
    def finish(script):
        of = SimpleNamespace(folder=tmp_path_factory.mktemp("finished") / "new")
        of.models, of.written = [], {}
        save, replace, start = runs.save_checkpoint, os.replace, time.perf_counter()

        def save_and_keep(args, parts, history):
            save(args, parts, history)
            of.models.append(copy.deepcopy(parts["average" if script is gan else "model"]))

        def replace_and_note(temporary, path):
            replace(temporary, path)
            of.written[path.name] = torch.get_float32_matmul_precision()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runs, "save_checkpoint", save_and_keep)
            patch.setattr(os, "replace", replace_and_note)
            of.out = run(script, of.folder)
        of.duration = time.perf_counter() - start
        return of

    return finish


def pictures(path):
    """Returns the images of a saved grid, `[n, 784]` in [0, 1]; 1 is ink, which is black there."""
    dots = 1 - imread(path)[::4, ::4, 0]  # a pixel takes 4 x 4 dots
    rows, columns = len(dots) // 29, len(dots[0]) // 29  # with a line of grey between two images
    cells = dots[1:, 1:].reshape(rows, 29, columns, 29)[:, :28, :, :28]
    return torch.from_numpy(cells).transpose(1, 2).reshape(-1, 784)


def train_plainly(model, optimizers, rates, data):
    """Trains a flow by the plainest loop, with a learning rate for each batch.

    Returns the bits/dim of training and of validation by epoch, and those of the test images.
    """
    train_curve, val_curve, rates, unit = [], [], list(rates), 784 * math.log(2)
    train, val, test = data

    def bits(loader):
        return -sum(model(x).sum().item() for x, _ in loader) / unit / len(loader.images)

    while rates:
        train_bpd = 0
        for images, _ in train:
            loss = -model(images).mean() / unit
            model.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            rate = rates.pop(0)
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = rate
                optimizer.step()
            train_bpd += loss.item() * len(images) / len(train.images)
        train_curve.append(train_bpd)
        val_curve.append(bits(val))
    return train_curve, val_curve, bits(test)


def zeros(z):
    """Returns the log-determinants, `[batch]`, with which a flow starts."""
    return z.new_zeros(len(z))


def jacobian(function, z):
    """Returns the Jacobian of a coupling or flow at one image `[1, pixels]`, by autograd."""
    return torch.autograd.functional.jacobian(lambda x: function(x[None], zeros(z))[0][0], z[0])


@pytest.fixture(autouse=True)
def seed():
    """Draws the same numbers in any order of the tests."""
    torch.manual_seed(0)


@pytest.fixture
def float64():
    """Computes in float64, in which networks of the same weights agree on any machine."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def one_dimensional():
    """A VAE with a 1-d latent, an image, and what quadrature over the latent gives for it.

    These are both terms of the negative ELBO, and log p(x).
    """
    torch.manual_seed(1)
    model = vae.VAE(hidden_dim=20, z_dim=1).requires_grad_(False)
    x, z = bmnist()[2].images[5000].float(), np.linspace(-8, 8, 4001)
    logits = model.decoder.logits(torch.from_numpy(z).float()[:, None]).double().numpy()
    log_likelihood = scipy.special.log_expit((2 * x.numpy() - 1) * logits).sum(axis=1)
    q = scipy.stats.norm(*(number.item() for number in model.encoder(x[None])))
    log_prior = scipy.stats.norm.logpdf(z)
    integral = functools.partial(scipy.integrate.simpson, x=z)
    reconstruction = -integral(q.pdf(z) * log_likelihood)
    kl = integral(q.pdf(z) * (q.logpdf(z) - log_prior))
    top = log_likelihood.max()
    log_px = top + np.log(integral(np.exp(log_likelihood + log_prior - top)))
    return model, x, (reconstruction, kl), log_px
