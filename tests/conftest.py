"""What the tests of the scripts share: small runs of a script, here or in a process.

`python tests/conftest.py EPOCH OPTIONS...` runs the VAE's script on two batches of each split, and
sleeps in the middle of EPOCH, until it is ended.
"""

import contextlib
import csv
import dataclasses
import functools
import importlib
import io
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch
from matplotlib.figure import Figure
from torch.utils import _pytree as pytree

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
matplotlib.use("Agg")
# The same sums in the same order, here and in the processes started from here.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("PYTHONUNBUFFERED", None)  # as at a user's

import a3_nf_template as nf
import runs
from datasets import bmnist as bmnist_module
from datasets import mnist as mnist_module

save_figure = runs.save_figure


def small(loaders, n_batches=2.5, epoch=0, batch=2, act=None):
    """Keep few images, and let `act` change a training batch, given by epoch and number from 1.

    Of the training images `n_batches`, of the others more: no split has as many as another one.
    """
    for loader, more in zip(loaders, (0, 1.2, 2.3), strict=False):
        n = int((n_batches + more) * loader.batch_size)
        loader.images, loader.labels = loader.images[:n], loader.labels[:n]
        watch(loader, epoch if loader is loaders[0] else 0, batch, act)


def watch(loader, epoch, batch, act):
    """Let the loader yield numbers of PyTorch's default type, and `act` change that batch."""
    kind, epochs = type(loader), itertools.count(1)

    def typed(x):
        return x.to(torch.get_default_dtype()) if x.is_floating_point() else x

    def iterate(self):
        this_epoch = next(epochs)
        for number, item in enumerate(kind.__iter__(self), 1):
            item = pytree.tree_map(typed, item)
            yield act(item) if (this_epoch, number) == (epoch, batch) else item

    loader.__class__ = type(kind.__name__, (kind,), {"__iter__": iterate})


def interrupt(*_):
    raise KeyboardInterrupt


def stop_in(epoch):
    """Make the loaders small, and press Ctrl-C in the middle of that epoch."""
    return functools.partial(small, epoch=epoch, act=interrupt)


def save_pictures(figure, file, **_):
    """Take the place of the slow Figure.savefig: save the arrays of the figure's pictures alone.

    All are black on white.
    """
    images = [image for axes in figure.axes for image in axes.get_images()]
    assert all((x.get_cmap().name, x.get_clim()) == ("gray_r", (0, 1)) for x in images)
    assert matplotlib.rcParams["font.family"] == ["STIXGeneral"]  # the report's
    lines = {f"{line.get_label()} of {axes.get_ylabel()}": line.get_ydata()
             for axes in figure.axes for line in axes.get_lines()}  # fmt: skip
    np.savez(file, *(image.get_array() for image in images), **lines)


def way_off(start, expected, found):
    """Return how far weights are from the expected ones, as a share of the way from the start."""
    parts = (start, expected, found)
    start, expected, found = (torch.cat([x.detach().flatten() for x in part]) for part in parts)
    return ((found - expected).norm() / (start - expected).norm()).item()


def train_plainly(log_px, weights, optimizers, rate, seed, n_epochs, max_norm):
    """Train the weights of a flow on `log_px(images)` by the plainest loop.

    `rate` is a function of epoch and batch, from 0. Return what Results.numbers is to be.
    """
    data = train, val, test = mnist_module.mnist(batch_size=20)
    small(data)
    numbers, unit = [], 784 * math.log(2)

    def bits(loader):
        sums = [log_px(images).sum().item() for images, _ in loader]
        return -sum(sums) / unit / len(loader.images)

    for epoch in range(n_epochs):
        torch.manual_seed(seed * n_epochs + epoch + 1)
        train_bpd = 0
        for batch, (images, _) in enumerate(train):
            for weight in weights:
                weight.grad = None
            loss = -log_px(images).mean() / unit
            loss.backward()
            norm = sum(weight.grad.square().sum() for weight in weights).sqrt()
            for weight in weights:
                weight.grad *= min(1, max_norm / (norm + 1e-6))  # as PyTorch does
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = rate(epoch, batch)
                optimizer.step()
            train_bpd += loss.item() * len(images) / len(train.images)
        numbers += [train_bpd, bits(val)]
    torch.manual_seed(seed)
    return [*numbers, bits(test)]


def zeros(z):
    return z.new_zeros(len(z))


def jacobian(function, z):
    """The Jacobian of a coupling or flow at one image `[1, pixels]`, by autograd."""
    return torch.autograd.functional.jacobian(lambda x: function(x[None], zeros(z))[0][0], z[0])


@dataclasses.dataclass(frozen=True)
class Script:
    """One of the scripts, and what it takes to run it in a moment."""

    name: str
    path: str
    epochs: str  # its option for the number of epochs
    small: tuple  # options of a small run
    metrics: tuple
    final: tuple  # what `final` in summary.json has, besides the metrics
    figures: tuple
    narrow: tuple = ()  # replacements in the source that make its networks small

    def __str__(self):
        return self.name

    @property
    def file(self):
        return ROOT / self.path

    @property
    def module(self):
        return importlib.import_module(self.path.removesuffix(".py").replace("/", "."))

    def options(self, folder, n_epochs=3, *more):
        return [self.epochs, n_epochs, *self.small, "--results_dir", folder, *more]

    def execute(self, *options, loaders=small, replace=()):
        """Do what `python a3_NAME_template.py OPTIONS...` does; return the names that it defines.

        `loaders` may change the loaders that the script makes; `replace` are pairs of a piece of
        the source and what takes its place.
        """
        source = self.file.read_text()
        for old, new in (*self.narrow, *replace):
            assert old in source, old
            source = source.replace(old, new)
        function = "bmnist" if self.name == "vae" else "mnist"
        module = importlib.import_module(f"datasets.{function}")
        make = getattr(module, function)

        def make_loaders(*args, **kwargs):
            made = make(*args, **kwargs)
            n_train = 40_000 if self in (NF, MIXTURE) else 50_000
            assert [len(loader.images) for loader in made] == [n_train, 10_000, 10_000]
            loaders(made)
            return made

        names = {"__name__": "__main__", "__file__": str(self.file)}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [self.file.name, *map(str, options)])
            # What is computed anew here agrees to the last digits also where there is bfloat16.
            patch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
            patch.setenv("MPLBACKEND", "agg")  # which the script sets, too
            patch.setattr(module, function, make_loaders)
            patch.setattr(nf, "Coupling", functools.partial(nf.Coupling, n_hidden=8))  # MIXTURE's
            exec(compile(source, self.file, "exec"), names)
        return names

    def run(self, *options, **kwargs):
        """Execute the script; return its status, out, err, and the names that it has defined."""
        names, status = None, 0
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(io.StringIO()) as out,
            contextlib.redirect_stderr(io.StringIO()) as err,
        ):
            patch.setattr(Figure, "savefig", save_pictures)
            try:
                names = self.execute(*options, **kwargs)
            except SystemExit as end:
                status = end.code
        return SimpleNamespace(status=status, out=out.getvalue(), err=err.getvalue(), names=names)

    def run_well(self, *options, **kwargs):
        """Execute the script, which must end without an error."""
        end = self.run(*options, **kwargs)
        assert (end.status, end.err) == (0, "")
        return end

    def arguments(self, *options):
        """Return the parsed options, without running `main`."""
        replace = [("    runs.run(main, ARGS)\n", "")]
        return self.run_well(*options, replace=replace).names["ARGS"]


SMALL = ("--batch_size", 20, "--device", "cpu")
SAMPLES = ("samples_before", "samples_halfway", "samples_after")
FLOW = (("train_bpd", "val_bpd"), ("test_bpd", "digit_from", "digit_to"),
        ("bpd", "interpolation", *SAMPLES))  # fmt: skip
VAE = Script(
    "vae", "a3_vae_template.py", "--epochs", SMALL, ("train_elbo", "val_elbo"), ("test_elbo",),
    ("elbo", "samples_first", *SAMPLES),
)  # fmt: skip
GAN = Script(
    "gan", "a3_gan_template.py", "--n_epochs", SMALL, ("value", "loss_g", "d_real", "d_fake"),
    ("epoch", "digit_from", "digit_to"), ("training", "interpolation", *SAMPLES),
)  # fmt: skip
NF = Script(
    "nf", "a3_nf_template.py", "--epochs", SMALL, *FLOW, (("n_hidden=1024", "n_hidden=32"),)
)
MIXTURE = Script(
    "mixture", "extension/mixture_flow.py", "--epochs", (*SMALL, "--n_mix", 2), *FLOW,
    (("c_hidden=64", "c_hidden=4"),),
)  # fmt: skip


@dataclasses.dataclass
class Results:
    """What a run left in its folder."""

    folder: Path
    end: SimpleNamespace = None  # how the run ended

    @property
    def checkpoint(self):
        return torch.load(self.folder / "checkpoint.pt", weights_only=True)

    @property
    def weights(self):
        return torch.load(self.folder / "weights.pt", weights_only=True)

    @property
    def metrics(self):
        """The rows of metrics.csv as text, without their seconds."""
        rows = csv.DictReader((self.folder / "metrics.csv").read_text().splitlines())
        return [{key: row[key] for key in row if key != "seconds"} for row in rows]

    @property
    def numbers(self):
        """The metrics, epoch by epoch, and the number of the test images, if there is one."""
        final = self.summary["final"].items()
        test = [number for name, number in final if name.startswith("test_")]
        return [float(x) for row in self.metrics for x in list(row.values())[1:]] + test

    @property
    def summary(self):
        return json.loads((self.folder / "summary.json").read_text())

    @property
    def bytes(self):
        """Every file but the figures, as it is on the disk."""
        files = [path for path in self.folder.rglob("*.*") if path.suffix not in (".pdf", ".png")]
        return {path.name: path.read_bytes() for path in files}

    def copy(self, folder):
        """Copy all into a folder, and return these results."""
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        return Results(folder)

    def pictures(self, name):
        """The pictures of a figure that `save_pictures` saved."""
        with np.load(self.folder / f"{name}.pdf") as archive:
            return [archive[key] for key in archive.files if key.startswith("arr_")]

    def lines(self, name):
        """The lines of a figure that `save_pictures` saved, by label and axis."""
        with np.load(self.folder / f"{name}.pdf") as archive:
            return {key: archive[key].tolist() for key in archive.files}


@pytest.fixture(autouse=True)
def alone():
    """Draw the same numbers in any order of the tests."""
    torch.manual_seed(0)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def start():
    """`start(file, *arguments)` is a process of Python that ends with the test."""
    with contextlib.ExitStack() as stack:

        def start(*words):
            command, pipe = [sys.executable, *map(str, words)], subprocess.PIPE
            process = subprocess.Popen(command, text=True, stdout=pipe, stderr=pipe)
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Let datasets/ find its file at this path, where there is none yet."""
    path, read = tmp_path / "mnist.npz", mnist_module.load.__wrapped__  # not from its cache
    monkeypatch.setattr(mnist_module, "FILE", path)
    monkeypatch.setattr(mnist_module, "load", read)
    return path


@pytest.fixture
def float64():
    """Let all be computed in float64, where networks of the same weights agree on any machine."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=(VAE, GAN, NF, MIXTURE), ids=str)
def script(request):
    return request.param


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """`finished(script)` are the results of a small uninterrupted run of 3 epochs.

    Made once, so not to be written to, but in a copy.
    """

    @functools.cache
    def run(script):
        folder = tmp_path_factory.mktemp(script.name) / "finished"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runs, "save_figure", save_figure)  # whatever the test has in its place
            save = runs.save_checkpoint
            patch.setattr(runs, "save_checkpoint", lambda *args: (save(*args), print("saved")))
            return Results(folder, script.run_well(*script.options(folder)))

    return run


@pytest.fixture(scope="session")
def one_dimensional():
    """A VAE with a 1-d latent, and of an image what quadrature over it gives.

    These are both terms of the negative ELBO, and log p(x).
    """
    torch.manual_seed(1)
    model = VAE.module.VAE(hidden_dim=20, z_dim=1).requires_grad_(False)
    x, z = bmnist_module.bmnist()[2].images[0].float(), np.linspace(-8, 8, 4001)
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


if __name__ == "__main__":

    def sleep(batch):
        print("sleeping", flush=True)
        time.sleep(100)
        return batch

    Figure.savefig = save_pictures
    napping = functools.partial(small, epoch=int(sys.argv[1]), act=sleep)
    VAE.execute(*sys.argv[2:], loaders=napping)
