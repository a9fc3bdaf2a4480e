"""What the tests share: small runs of the scripts, and an image's bound by quadrature.

A small run has few images, a batch that is not full, and narrow networks where that saves time.
"""

import contextlib
import copy
import functools
import io
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch

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
COMMON = {"batch_size": 20, "seed": 0, "device": "cpu", "resume": False}
OPTIONS = {  # of a small run
    vae: COMMON | {"epochs": 5, "zdim": 20, "binarization": "static", "lr": 3e-3,
                   "weight_decay": 0.2},
    gan: COMMON | {"n_epochs": 5, "batch_size": 4, "lr": 2e-4, "latent_dim": 100,
                   "save_interval": 15, "dropout": 0.3},
    nf: COMMON | {"epochs": 5, "lr": 1e-3, "weight_decay": 0.3},
    mixture_flow: COMMON | {"epochs": 5, "n_mix": 2, "lr": 8e-3},
}  # fmt: skip


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


def run(script, folder, **options):
    """Runs the `main` of an imported script on few images; returns what it prints."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        args = SimpleNamespace(**OPTIONS[script] | options, results_dir=folder)
        patch.setattr(script, "ARGS", args, raising=False)
        data = "bmnist" if script is vae else "mnist"
        patch.setattr(script, data, few(getattr(script, data)))
        patch.setattr(nf, "Coupling", functools.partial(nf.Coupling, n_hidden=32))
        narrow = functools.partial(mixture_flow.ConvNet, c_hidden=4)
        patch.setattr(mixture_flow, "ConvNet", narrow)
        runs.run(script.main)
    return out.getvalue()


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """`finished(script)` is a small run of five epochs in one go, made once.

    It has the `folder`, all that was printed (`out`), of each epoch the model (of the GAN the
    averaged generator), the checkpoint and the checked losses, of each grid the `images` by the
    file's name, and the files' names as they were `written`. On its clock an epoch takes 1 s, a
    checkpoint 10 s.
    """

    @functools.cache
    def finish(script):
        of = SimpleNamespace(models=[], checkpoints=[], losses=[], images={}, written=[])
        of.folder, now = tmp_path_factory.mktemp("finished") / "new", [1000]
        save_checkpoint, save_images, replace = runs.save_checkpoint, runs.save_images, os.replace

        def check_finite(epoch, *losses):
            of.losses.append((epoch, *losses))
            now[0] += 1

        def keep_checkpoint(args, parts, history):
            save_checkpoint(args, parts, history)
            of.models.append(copy.deepcopy(parts["average" if script is gan else "model"]))
            of.checkpoints.append(torch.load(of.folder / "checkpoint.pt"))
            now[0] += 10
            print("saved")

        def keep_images(images, path, **layout):
            of.images[path.name] = images
            save_images(images, path, **layout)

        def keep_name(temporary, path):
            of.written.append(path.name)
            replace(temporary, path)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(script, "time", SimpleNamespace(perf_counter=lambda: now[0]))
            patch.setattr(runs, "check_finite", check_finite)
            patch.setattr(runs, "save_checkpoint", keep_checkpoint)
            patch.setattr(runs, "save_images", keep_images)
            patch.setattr(os, "replace", keep_name)
            of.out = run(script, of.folder)
        return of

    return finish


def way_off(start, expected, found):
    """Returns how far weights are from the expected ones, as a share of the way from the start."""
    parts = (start, expected, found)
    start, expected, found = (torch.cat([x.detach().flatten() for x in part]) for part in parts)
    return ((found - expected).norm() / (start - expected).norm()).item()


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
