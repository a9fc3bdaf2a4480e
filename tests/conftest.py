"""What the tests share: small runs of the scripts, above all."""

import contextlib
import copy
import csv
import functools
import io
import json
import math
import os
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.image import imread

import a3_gan_template as gan
import a3_nf_template as nf
import a3_vae_template as vae
import runs
from extension import mixture_flow

# The same sums in the same order, here and in the processes that tests start.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

ROOT = Path(__file__).resolve().parent.parent
NAMES = {vae: "vae", gan: "gan", nf: "nf", mixture_flow: "nf_mixture"}
SMALL = {
    vae: {"epochs": 5, "batch_size": 20},
    gan: {"n_epochs": 5, "batch_size": 4, "save_interval": 15},
    nf: {"epochs": 5, "batch_size": 20},
    mixture_flow: {"epochs": 5, "batch_size": 20, "n_mix": 2},
}


def read(folder):
    """Returns the rows of metrics.csv, by column, as text, and what is in summary.json."""
    rows = csv.DictReader((folder / "metrics.csv").read_text().splitlines())
    return list(rows), json.loads((folder / "summary.json").read_text())


def defaults(script):
    """Returns the default options of a script, with which its committed run was made."""
    summary = read(ROOT / "results" / NAMES[script])[1]
    return summary["options"] | {"device": "cpu", "resume": False}


def few(make):
    """Returns a function like `mnist` or `bmnist` whose loaders have 50, 73 and 114 images."""

    def make_few(*args, **kwargs):
        loaders = make(*args, **kwargs)
        for loader, size in zip(loaders, (50, 73, 114), strict=True):
            # From all over the split: Larochelle's test file is sorted and begins with zeros.
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
        options = defaults(script) | SMALL[script] | options
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
    each epoch (`models`; of the GAN the averaged generator), and the names of the files in the
    order in which they were `written`, each with the precision of matrix products at that time.
    """

    @functools.cache
    def finish(script):
        folder = tmp_path_factory.mktemp("finished") / "new" / "run"
        of = SimpleNamespace(folder=folder, models=[], written={})
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
            of.out = run(script, folder)
        of.duration = time.perf_counter() - start
        return of

    return finish


def pictures(path):
    """Returns the images of a saved grid, `[n, 784]` in [0, 1], where 1 is ink, shown in black."""
    dots = imread(path)[..., 0]
    pixels = 1 - dots[::4, ::4]
    assert np.array_equal(1 - dots, np.kron(pixels, np.ones((4, 4))))
    rows, columns = len(pixels) // 29, len(pixels[0]) // 29
    cells = pixels[1:, 1:].reshape(rows, 29, columns, 29)[:, :28, :, :28]  # without the lines
    return torch.from_numpy(cells).transpose(1, 2).reshape(-1, 784)


def assert_trained_plainly(folder, model, optimizers, rates, data):
    """Asserts that a run's bits/dim and weights are those of a plain loop with a rate per batch."""
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
            assert all(weight.grad is not None for weight in model.parameters())
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            rate = rates.pop(0)
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = rate
                optimizer.step()
            train_bpd += loss.item() * len(images) / len(train.images)
        train_curve.append(train_bpd)
        val_curve.append(bits(val))
    checkpoint = torch.load(folder / "checkpoint.pt")
    assert checkpoint["history"]["train_bpd"] == pytest.approx(train_curve, rel=1e-9)
    assert checkpoint["history"]["val_bpd"] == pytest.approx(val_curve, rel=1e-9)
    assert read(folder)[1]["final"]["test_bpd"] == pytest.approx(bits(test), rel=1e-9)
    torch.testing.assert_close(checkpoint["parts"]["model"], dict(model.state_dict()))


def zeros(z):
    """Returns the log-determinants, `[batch]`, with which a flow starts."""
    return z.new_zeros(len(z))


def jacobian(function, z):
    """Returns the Jacobian of a coupling or flow at one image `[1, pixels]`, by autograd."""
    return torch.autograd.functional.jacobian(lambda x: function(x[None], zeros(z))[0][0], z[0])


@pytest.fixture(autouse=True)
def seed():
    """Starts each test with the same random numbers, and with full float32 products."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def float64():
    """Computes in float64, in which networks of the same weights agree on any machine."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
