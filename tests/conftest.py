"""What the tests of the three scripts share: small runs of a script, here or in a process.

`python tests/conftest.py NAME EPOCH OPTIONS...` runs the script NAME on two batches of each split,
and sleeps in the middle of EPOCH until the Ctrl-C comes.
"""

import contextlib
import csv
import dataclasses
import functools
import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# The same sums in the same order, here and in the processes started from here.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


def at_batch(loader, epoch, batch, act):
    """Let `act(batch)` take the place of that batch (both count from 1) of a loader."""
    original, epochs = type(loader).__iter__, iter(range(1, 1000))

    def iterate(self):
        this_epoch = next(epochs)
        for number, item in enumerate(original(self), 1):
            yield act(item) if (this_epoch, number) == (epoch, batch) else item

    loader.__class__ = type(type(loader).__name__, (type(loader),), {"__iter__": iterate})


def small(make_loaders, n_batches=2, **at_train_batch):
    """Wrap `mnist` or `bmnist`: loaders of `n_batches`, and `at_batch` for the training one."""

    def make(*args, **kwargs):
        loaders = make_loaders(*args, **kwargs)
        for loader in loaders:
            loader.limit(n_batches)
        if at_train_batch:
            at_batch(loaders[0], **at_train_batch)
        return loaders

    return make


def interrupt(_):
    raise KeyboardInterrupt


def sleep(batch):
    time.sleep(100)
    return batch


def poison(batch):
    """Return the batch with images that are not a number."""
    if isinstance(batch, tuple):
        return batch[0] * torch.nan, batch[1]
    return batch * torch.nan


@dataclasses.dataclass
class Ended:
    """How a run of a script ended."""

    status: int
    out: str
    err: str


@dataclasses.dataclass(frozen=True)
class Script:
    """One of the three scripts, and what it takes to run it in a moment."""

    name: str
    epochs: str  # its option for the number of epochs
    small: tuple  # options of a small run
    metrics: tuple
    final: tuple  # what `final` in summary.json has at least
    figures: tuple

    def __str__(self):
        return self.name

    @property
    def file(self):
        return ROOT / f"a3_{self.name}_template.py"

    @property
    def module(self):
        return importlib.import_module(f"a3_{self.name}_template")

    @property
    def loaders(self):
        """The name of the function that makes its loaders."""
        return "bmnist" if self.name == "vae" else "mnist"

    @property
    def weights(self):
        """The name of its model in a checkpoint's `parts`."""
        return "generator" if self.name == "gan" else "model"

    def options(self, folder, n_epochs=3, *more):
        return [self.epochs, str(n_epochs), *self.small, "--results_dir", str(folder), *more]

    def shrink(self, monkeypatch):
        """Give the flow's networks 32 hidden units for their 1024, in this process."""
        if self.name == "nf":
            narrow = functools.partial(self.module.Coupling, n_hidden=32)
            monkeypatch.setattr(self.module, "Coupling", narrow)

    def main(self, *options, loaders=None, figures=False, patch=None):
        """Run the script in this process, as the command line would; return how it ended.

        Its loaders are made by `loaders(mnist or bmnist)`, two batches a split if left out.
        `patch(monkeypatch, module)` may change more.
        """
        with (
            pytest.MonkeyPatch.context() as monkeypatch,
            contextlib.redirect_stdout(io.StringIO()) as out,
            contextlib.redirect_stderr(io.StringIO()) as err,
        ):
            module, make = self.module, getattr(self.module, self.loaders)
            monkeypatch.setattr(sys, "argv", [self.file.name, *map(str, options)])
            monkeypatch.setattr(module, self.loaders, (loaders or small)(make))
            monkeypatch.setattr(module, "ARGS", None, raising=False)
            self.shrink(monkeypatch)
            if not figures:  # they take most of a small run's time
                monkeypatch.setattr(module, "save_figure", lambda figure, _: plt.close(figure))
            if patch:
                patch(monkeypatch, module)
            status = 0
            try:
                module.ARGS = module.parse_options()
                module.guard(module.main)
            except SystemExit as end:
                status = end.code
        return Ended(status, out.getvalue(), err.getvalue())

    def start(self, *options, cwd=None):
        """Start the script as a user does; return the process."""
        return start(self.file, *options, cwd=cwd)

    def start_napping(self, nap, *options):
        """Start it on two batches a split, to sleep in the middle of epoch `nap`."""
        return start(__file__, self.name, nap, *options)


def hear_ctrl_c():
    """Undo what a shell does to a background job, and so to the tests in one."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(file, *arguments, cwd=None):
    command = [str(word) for word in (sys.executable, file, *arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, cwd=cwd, preexec_fn=hear_ctrl_c, **pipes)


def end_of(process):
    """Wait for the process; return how it ended."""
    out, err = process.communicate(timeout=300)
    return Ended(process.returncode, out, err)


VAE = Script(
    "vae",
    "--epochs",
    ("--batch_size", "20", "--iw_samples", "3", "--precision", "float32"),
    ("train_elbo", "val_elbo"),
    ("val_elbo", "test_elbo", "test_log_px"),
    ("elbo", "samples_before", "samples_halfway", "samples_after", "reconstructions"),
)
NF = Script(
    "nf",
    "--epochs",
    ("--batch_size", "20", "--precision", "float32"),
    ("train_bpd", "val_bpd"),
    ("val_bpd", "test_bpd", "test_bpd_stderr"),
    ("bpd", "samples_before", "samples_halfway", "samples_after", "interpolation"),
)
GAN = Script(
    "gan",
    "--n_epochs",
    ("--batch_size", "20", "--eval_samples", "30", "--precision", "float32"),
    ("value", "loss_d", "loss_g", "d_real", "d_fake"),
    ("parzen", "parzen_stderr", "parzen_train", "digit_shares"),
    ("training", "samples_before", "samples_halfway", "samples_after", "interpolation"),
)
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
    def metrics(self):
        """The rows of metrics.csv as text, without their seconds."""
        with (self.folder / "metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        return [{key: row[key] for key in row if key != "seconds"} for row in rows]

    @property
    def summary(self):
        return json.loads((self.folder / "summary.json").read_text())

    @property
    def bytes(self):
        """Every file but the figures, as it is on the disk."""
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        kinds = (".pdf", ".png")
        return {path.name: path.read_bytes() for path in files if path.suffix not in kinds}


@pytest.fixture(params=SCRIPTS, ids=str)
def script(request):
    """Each of the three scripts."""
    return request.param


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """`finished(script)` are the results of a small uninterrupted run of 3 epochs.

    Made once, so not to be written to; `finished.copy(script, folder)` is for changes.
    """

    @functools.cache
    def run(script):
        folder = tmp_path_factory.mktemp(script.name) / "finished"
        end = script.main(*script.options(folder), figures=True)
        assert (end.status, end.err) == (0, "")
        return Results(folder, end)

    def copy(script, folder):
        shutil.copytree(run(script).folder, folder, dirs_exist_ok=True)
        return Results(folder)

    run.copy = copy
    return run


def main():
    name, nap, *sys.argv[1:] = sys.argv[1:]
    script = next(script for script in SCRIPTS if script.name == name)
    make = small(getattr(script.module, script.loaders), epoch=int(nap), batch=2, act=sleep)
    setattr(script.module, script.loaders, make)
    script.shrink(pytest.MonkeyPatch())
    script.module.ARGS = script.module.parse_options()
    script.module.guard(script.module.main)


if __name__ == "__main__":
    main()
