"""What the tests of the three scripts share: small runs of a script, here or in a process.

`python tests/conftest.py NAME EPOCH OPTIONS...` runs the script NAME on two batches of each split,
and sleeps in the middle of EPOCH, until it is ended.
"""

import contextlib
import csv
import dataclasses
import functools
import importlib
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
matplotlib.use("Agg")
# The same sums in the same order, here and in the processes started from here.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("PYTHONUNBUFFERED", None)  # as at a user's

from datasets import bmnist as bmnist_module

# The static bits are always the same, and take half a second.
drawn_bits = functools.cache(bmnist_module.binarize)


def small(loaders, n_batches=2, epoch=0, batch=2, act=None):
    """Keep `n_batches` of each loader; let `act` change that training batch (counted from 1)."""
    for loader in loaders:
        n = n_batches * loader.batch_size
        loader.images = loader.images[:n]
        loader.labels = None if loader.labels is None else loader.labels[:n]
    kind, epochs = type(loaders[0]), itertools.count(1)

    def iterate(self):
        this_epoch = next(epochs)
        for number, item in enumerate(kind.__iter__(self), 1):
            yield act(item) if (this_epoch, number) == (epoch, batch) else item

    loaders[0].__class__ = type(kind.__name__, (kind,), {"__iter__": iterate})


def stop_in(epoch):
    """Make the loaders small, and press Ctrl-C in the middle of that epoch."""
    return functools.partial(small, epoch=epoch, act=interrupt)


def interrupt(*_):
    raise KeyboardInterrupt


def sleep(batch):
    print("sleeping", flush=True)
    time.sleep(100)
    return batch


def poison(batch):
    """Return the batch with images that are not a number."""
    return (batch[0] * torch.nan, batch[1]) if isinstance(batch, tuple) else batch * torch.nan


def save_pictures(figure, file, **_):
    """Take the place of the slow Figure.savefig: save the arrays of the figure's pictures alone."""
    np.savez(file, *(image.get_array() for axes in figure.axes for image in axes.get_images()))


def way_off(start, expected, found):
    """Return how far weights are from the expected ones, as a share of the way from the start."""
    parts = (start, expected, found)
    start, expected, found = (torch.cat([x.detach().flatten() for x in part]) for part in parts)
    return ((found - expected).norm() / (start - expected).norm()).item()


def mean_and_stderr(samples):
    samples = samples.double()
    return samples.mean().item(), samples.std().item() / len(samples) ** 0.5


def briefly_trained_vae(images):
    """Return a small VAE with a 1-d latent, over which quadrature can integrate."""
    model = VAE.module.VAE(hidden_dim=20, z_dim=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        model(images).backward()
        optimizer.step()
    return model


@dataclasses.dataclass
class Ended:
    """How a run of a script ended, and the names that it had defined by then."""

    status: int
    out: str
    err: str
    names: dict = None


@dataclasses.dataclass(frozen=True)
class Script:
    """One of the three scripts, and what it takes to run it in a moment."""

    name: str
    epochs: str  # its option for the number of epochs
    small: tuple  # options of a small run
    narrow: tuple  # replacements in the source that make its networks small
    metrics: tuple
    final: tuple  # what `final` in summary.json has, besides the metrics
    figures: tuple

    def __str__(self):
        return self.name

    @property
    def file(self):
        return ROOT / f"a3_{self.name}_template.py"

    @property
    def module(self):
        return importlib.import_module(f"a3_{self.name}_template")

    def options(self, folder, n_epochs=3, *more):
        return [self.epochs, n_epochs, *self.small, "--results_dir", folder, *more]

    def execute(self, *options, loaders=small, replace=(), names=None):
        """Do what `python a3_NAME_template.py OPTIONS...` does, in this process.

        `loaders` may change the loaders that the script makes; `replace` are pairs of a piece of
        the source and what takes its place; `names` takes the names that the script defines.
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
            loaders(made)
            return made

        names = {} if names is None else names
        names |= {"__name__": "__main__", "__file__": str(self.file)}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [self.file.name, *map(str, options)])
            patch.setenv("MPLBACKEND", "agg")  # which the script sets, too
            patch.setattr(bmnist_module, "binarize", drawn_bits)
            patch.setattr(module, function, make_loaders)
            exec(compile(source, self.file, "exec"), names)

    def run(self, *options, savefig=save_pictures, **kwargs):
        """Execute the script; return how it ended. `savefig` takes the place of the figures'."""
        names, status = {}, 0
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(io.StringIO()) as out,
            contextlib.redirect_stderr(io.StringIO()) as err,
        ):
            patch.setattr(Figure, "savefig", savefig)
            try:
                self.execute(*options, names=names, **kwargs)
            except SystemExit as end:
                status = end.code
        return Ended(status, out.getvalue(), err.getvalue(), names)

    def run_well(self, *options, **kwargs):
        """Execute the script, which must end without an error."""
        end = self.run(*options, **kwargs)
        assert (end.status, end.err) == (0, "")
        return end

    def arguments(self, *options):
        """Return the parsed options, without running `main`."""
        replace = [("    run(main, ARGS)\n", "")]
        return self.run_well(*options, replace=replace).names["ARGS"]

    def start_napping(self, nap, *options):
        """Start it on two batches a split, to sleep in the middle of epoch `nap`."""
        return start(__file__, self.name, nap, *options)


def start(file, *arguments, **kwargs):
    """Start a process of Python, which hears Ctrl-C even if the tests run in the background."""
    command = [str(word) for word in (sys.executable, file, *arguments)]
    kwargs |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    kwargs["preexec_fn"] = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, **kwargs)


def end_of(process):
    """Wait for the process; return how it ended."""
    out, err = process.communicate(timeout=300)
    return Ended(process.returncode, out, err)


SMALL = ("--batch_size", 20, "--device", "cpu")
# So that what is computed anew here agrees to the last digits also where there is bfloat16.
EXACT = ('set_float32_matmul_precision("medium")', 'set_float32_matmul_precision("highest")')
SAMPLES = ("samples_before", "samples_halfway", "samples_after")
VAE = Script(
    "vae", "--epochs", SMALL, (EXACT,), ("train_elbo", "val_elbo"), ("test_elbo",),
    ("elbo", "samples_first", *SAMPLES),
)  # fmt: skip
NF = Script(
    "nf", "--epochs", (*SMALL, "--precision", "float32"),
    (("n_hidden=1024", "n_hidden=32"), ("c_hidden = 64 if", "c_hidden = 4 if")),
    ("train_bpd", "val_bpd"), ("test_bpd", "precision", "digit_from", "digit_to"),
    ("bpd", "interpolation", *SAMPLES),
)  # fmt: skip
GAN = Script(
    "gan", "--n_epochs", SMALL, (EXACT,), ("value", "loss_g", "d_real", "d_fake"),
    ("epoch", "digit_from", "digit_to"), ("training", "interpolation", *SAMPLES),
)  # fmt: skip
SCRIPTS = (VAE, NF, GAN)


@dataclasses.dataclass
class Results:
    """What a run left in its folder."""

    folder: Path
    end: Ended = None

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
    def summary(self):
        return json.loads((self.folder / "summary.json").read_text())

    @property
    def bytes(self):
        """Every file but the figures, as it is on the disk."""
        files = [path for path in self.folder.rglob("*.*") if path.suffix not in (".pdf", ".png")]
        return {path.name: path.read_bytes() for path in files}

    def pictures(self, name):
        """The pictures of a figure that `save_pictures` saved."""
        with np.load(self.folder / f"{name}.pdf") as archive:
            return [archive[key] for key in archive.files]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=SCRIPTS, ids=str)
def script(request):
    return request.param


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """`finished(script)` are the results of a small uninterrupted run of 3 epochs.

    Made once, so not to be written to; `finished.copy(script, folder)` is for changes.
    """

    @functools.cache
    def run(script):
        folder = tmp_path_factory.mktemp(script.name) / "finished"
        return Results(folder, script.run_well(*script.options(folder)))

    def copy(script, folder):
        shutil.copytree(run(script).folder, folder, dirs_exist_ok=True)
        return Results(folder)

    run.copy = copy
    return run


def committed(name):
    """Return the options, the final and measured numbers, and the weights of a committed run."""
    run = Results(ROOT / "results" / name)
    for file in ("weights.pt", "measures.json"):
        if not (run.folder / file).exists():
            pytest.skip(f"results/{name} has no {file}")
    measures = json.loads((run.folder / "measures.json").read_text())
    return run.summary["options"], {**run.summary["final"], **measures}, run.weights


def main():
    name, nap, *options = sys.argv[1:]
    script = next(script for script in SCRIPTS if script.name == name)
    loaders = functools.partial(small, epoch=int(nap), act=sleep)
    Figure.savefig = save_pictures
    script.execute(*options, loaders=loaders)


if __name__ == "__main__":
    main()
