"""What the three scripts share: their form, command line, errors, files, Ctrl-C and resume.

What the shared block does is tested on the VAE alone, the fastest: the block is the same in all.
"""

import errno
import functools
import inspect
import itertools
import json
import math
import os
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    GAN,
    NF,
    ROOT,
    SAMPLES,
    SCRIPTS,
    VAE,
    Results,
    end_of,
    poison,
    save_pictures,
    small,
    start,
    stop_in,
)
from torch.utils import _pytree as pytree

from datasets import bmnist as bmnist_module
from datasets import mnist as mnist_module
from datasets.bmnist import bmnist
from datasets.mnist import ShiftedLoader, mnist

BEGIN, END = "# >>> shared block", "# <<< shared block <<<\n"
PACKAGES = {"torch", "torchvision", "numpy", "matplotlib", "scipy", "tqdm", "datasets"}
LAST = ("metrics.csv", "weights.pt", "summary.json")  # written together, at the end


def error_line(end, status=2):
    """Return the one line `error: ...` with which a run must have ended."""
    assert end.status == status
    assert re.fullmatch(r"error: .+\n", end.err), end.err
    return end.err


def assert_same(one, other):
    """Assert that two nested structures are equal, tensors bit for bit."""
    (leaves, structure), (others, its_structure) = map(pytree.tree_flatten, (one, other))
    assert structure == its_structure
    for a, b in zip(leaves, others, strict=True):
        assert type(a) is type(b)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def without_seconds(checkpoint):
    """Return a checkpoint without the seconds of its history, the last or the third column."""
    history = checkpoint.pop("history")
    columns = list(history.items()) if isinstance(history, dict) else list(enumerate(history))
    return checkpoint, [column for column in columns if column[0] not in ("seconds", 2)]


def assert_same_results(one, other):
    """Assert that two runs have the same curves, state, weights, numbers and samples."""
    assert one.metrics == other.metrics
    assert_same(without_seconds(one.checkpoint), without_seconds(other.checkpoint))
    assert one.bytes["weights.pt"] == other.bytes["weights.pt"]
    assert one.summary["final"] == other.summary["final"]
    assert not list(one.folder.glob(".*"))
    for name in SAMPLES:
        assert all(map(np.array_equal, one.pictures(name), other.pictures(name)))


# ------------------------ Form ------------------------
def test_scripts_are_short_with_the_same_short_block_behind_main():
    blocks = set()
    for script, n_lines in ((VAE, 400), (GAN, 400), (NF, 620)):
        source = script.file.read_text()
        assert source.count("\n") <= n_lines
        assert (source.count(BEGIN), source.count(END)) == (1, 1)
        assert source.index("\ndef main():") < source.index(BEGIN)
        blocks.add(source[source.index(BEGIN) : source.index(END) + len(END)])
    (block,) = blocks
    assert "def fail(" in block
    assert block.count("\n") <= 115
    names = r"vae|gan|nf|flow|elbo|bpd|zdim|latent|coupling|precision|discriminator|(n_)?epochs"
    assert not re.search(rf"\b({names})\b", block.split("\n", 1)[1], re.IGNORECASE)


def test_scripts_use_only_what_requirements_and_the_repository_have(script):
    """And no torch.distributions, nor the word."""
    found = re.findall(r"^(?:import|from) (\w+)", script.file.read_text(), re.MULTILINE)
    assert set(found) <= PACKAGES | sys.stdlib_module_names
    for path in (script.file, *ROOT.glob("datasets/*.py")):
        assert not re.search(r"\bdistributions\b", path.read_text())


SIGNATURES = {
    VAE: """Encoder(hidden_dim=500, z_dim=20) Encoder.forward(self, input)
        Decoder(hidden_dim=500, z_dim=20) Decoder.forward(self, input)
        VAE(hidden_dim=500, z_dim=20) VAE.forward(self, input) VAE.sample(self, n_samples)
        epoch_iter(model, data, optimizer) run_epoch(model, data, optimizer)
        save_elbo_plot(train_curve, val_curve, filename) main()""",
    GAN: """Generator() Generator.forward(self, z) Discriminator() Discriminator.forward(self, img)
        train(dataloader, discriminator, generator, optimizer_G, optimizer_D) main()""",
    NF: """log_prior(x) sample_prior(size) get_mask() Coupling(c_in, mask, n_hidden=1024)
        Coupling.forward(self, z, ldj, reverse=False) Flow(shape, n_flows=4)
        Flow.forward(self, z, logdet, reverse=False) Model(shape) Model.dequantize(self, z)
        Model.logit_normalize(self, z, logdet, reverse=False) Model.forward(self, input)
        Model.sample(self, n_samples) epoch_iter(model, data, optimizer)
        run_epoch(model, data, optimizer) save_bpd_plot(train_curve, val_curve, filename)
        main()""",
}


def test_names_and_signatures_of_the_template_are_kept(script):
    """Of the VAE exactly. What we added elsewhere must not be asked of the template's callers."""
    for name, wanted in re.findall(r"(\S+?)\((.*?)\)", SIGNATURES[script]):
        thing = script.module
        for part in name.split("."):
            thing = getattr(thing, part)
        parameters = list(inspect.signature(thing).parameters.values())
        n = len(wanted.split(", ")) if wanted else 0
        assert ", ".join(map(str, parameters[:n])) == wanted, name
        added = parameters[n:]
        assert all(parameter.default is not parameter.empty for parameter in added), name
        assert script is not VAE or not added, name


# ------------------------ Command line ------------------------
DEFAULTS = {
    VAE: {"epochs": 40, "zdim": 20, "binarization": "static"},
    NF: {"epochs": 40, "precision": "auto"},
    GAN: {"n_epochs": 200, "batch_size": 64, "lr": 2e-4, "latent_dim": 100, "save_interval": 500},
}


def test_defaults_are_those_of_the_template(script):
    """And --help shows them."""
    options = vars(script.arguments())
    shown = script.run_well("--help").out
    assert all(f"--{name}" in shown for name in options)
    assert (DEFAULTS[script] | {"seed": 0, "resume": False}).items() <= options.items()
    assert ("precision" in options) == (script is NF)


BAD_OPTIONS = {
    (VAE, "above 0"): ("--epochs 0", "--epochs -1", "--zdim 0", "--batch_size -3", "--lr 0",
                       "--lr nan", "--lr inf"),
    (VAE, "above -1"): ("--seed -1",),
    (VAE, "below 2^31"): ("--batch_size 1000000000000",),
    (VAE, "int"): ("--epochs 1.5", "--epochs x"),
    (VAE, "cpu"): ("--device tpu", "--device cuda"),
    (VAE, "larochelle"): ("--binarization nonsense",),
    (VAE, "unrecognized"): ("--nonsense 3",),
    (NF, "above 0"): ("--epochs 0", "--lr 0"),
    (NF, "mixture"): ("--coupling additive",),
    (NF, "bfloat16"): ("--precision float16",),
    (GAN, "above 0"): ("--n_epochs 0", "--latent_dim 0", "--save_interval 0"),
    (GAN, "at least 2"): ("--batch_size 1",),
    (GAN, "no batch"): ("--batch_size 50001",),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_OPTIONS, ids=str)
def test_bad_option_is_one_line_with_its_value_and_what_is_allowed(case, tmp_path, monkeypatch):
    (script, allowed), options = case, BAD_OPTIONS[case]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for option in options:
        end = script.run("--results_dir", tmp_path / "new", *option.split())
        line = error_line(end)
        assert all(word in line for word in (option.split()[1], allowed)), line
        assert end.out == ""
        assert list(tmp_path.iterdir()) == []


def test_damaged_or_missing_data_are_one_line(tmp_path, monkeypatch):
    (tmp_path / "mnist.npz").write_bytes(b"nonsense")
    read = mnist_module.load.__wrapped__  # not from its cache
    for module in (mnist_module, bmnist_module):
        monkeypatch.setattr(module, "FILE", tmp_path / "mnist.npz")
        monkeypatch.setattr(module, "load", read)
    options = ("--results_dir", tmp_path / "new")
    for script in SCRIPTS:
        assert str(tmp_path / "mnist.npz") in error_line(script.run(*options))
    end = VAE.run(*options, "--binarization", "larochelle")
    assert str(tmp_path / "binarized_mnist_train.amat") in error_line(end)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("below", ["", "results"])
def test_a_results_folder_that_cannot_be_written_is_one_line(script, below, tmp_path):
    (tmp_path / "file").write_text("mine")
    end = script.run(*script.options(tmp_path / "file" / below))
    assert str(tmp_path / "file" / below) in error_line(end)
    assert "epoch" not in end.out
    assert (tmp_path / "file").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


FOLDERS = [
    (VAE, "--resume", "vae"),
    (VAE, "--epochs 40 --seed 0 --zdim 20", "vae"),  # what does not differ from the defaults
    (VAE, "--zdim 2 --binarization dynamic --lr 0.01", "vae_zdim2_dynamic_lr0.01"),
    (GAN, "--save_interval 7 --seed 1", "gan_save_interval7_seed1"),
    (NF, "--coupling mixture", "nf_mixture"),
    (NF, "--coupling mixture --lr 0.002", "nf_mixture_lr0.002"),
]


@pytest.mark.parametrize(("script", "options", "folder"), FOLDERS, ids=str)
def test_results_folder_is_named_by_the_options(script, options, folder):
    assert script.arguments(*options.split()).results_dir == ROOT / "results" / folder


def test_a_process_trains_in_any_folder(tmp_path):
    """With whole figures, and no date in them. No terminal, so just the lines."""
    options = VAE.options("here", 1, "--batch_size", 10_000, "--zdim", 2)
    end = end_of(start(VAE.file, *options, cwd=tmp_path))
    assert (end.status, end.err) == (0, "")
    first, epoch, last = end.out.splitlines()
    assert first == "training on cpu, results in here"
    assert epoch.startswith("epoch 1/1 ")
    assert re.fullmatch(r"test_elbo -\d+\.\d\d", last)
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    for name in (*VAE.figures, "manifold"):
        pdf, png = (tmp_path / "here" / f"{name}.{kind}" for kind in ("pdf", "png"))
        assert pdf.read_bytes().startswith(b"%PDF")
        assert b"CreationDate" not in pdf.read_bytes()
        assert png.read_bytes().startswith(b"\x89PNG")


def test_a_reader_that_goes_away_ends_the_run_quietly(tmp_path):
    """As `| head -1`, and behind the last epoch."""
    processes = [VAE.start_napping(99, *VAE.options(tmp_path / name, 1)) for name in "ab"]
    for n_lines, process in enumerate(processes, 1):
        assert all(process.stdout.readline() for _ in range(n_lines))
        process.stdout.close()
    for process in processes:
        with process:  # until it ends
            assert process.stderr.read() == ""


def test_matplotlibs_backend_is_the_scripts_own_but_not_that_of_its_importers():
    """A notebook's is set for its processes, where it does not work."""
    inline, svg = (os.environ | {"MPLBACKEND": name}
                   for name in ("module://matplotlib_inline.backend_inline", "svg"))  # fmt: skip
    code = "import a3_gan_template, matplotlib; print(matplotlib.get_backend())"
    one, other = start(VAE.file, "--help", env=inline), start("-c", code, cwd=ROOT, env=svg)
    one, other = end_of(one), end_of(other)
    assert (one.status, one.err) == (0, "")
    assert (other.status, other.out, other.err) == (0, "svg\n", "")


def test_scripts_train_on_all_images_of_the_split(script, tmp_path):
    """And only the flow shifts them, the training images alone."""
    expected = {
        VAE: bmnist(batch_size=20),
        NF: mnist(batch_size=20),
        GAN: mnist(batch_size=20, n_train=50_000, shift=False, drop_last=True),
    }[script]
    seen = []

    def loaders(made):
        for loader, other in zip(made, expected, strict=True):
            assert type(loader) is type(other)
            assert (loader.shuffle, loader.drop_last) == (other.shuffle, other.drop_last)
            assert torch.equal(loader.images, other.images)
            seen.append(isinstance(loader, ShiftedLoader))
        small(made)

    script.run_well(*script.options(tmp_path, 1), loaders=loaders)
    assert seen == [script is NF, False, False]


# ------------------------ Files ------------------------
def test_an_epoch_is_a_row_of_metrics_and_a_line(script, finished):
    """And the files are all there, no temporary one among them."""
    run = finished(script)
    names = {path.name for path in run.folder.iterdir() if path.is_file()}
    figures = {f"{name}.{kind}" for name in script.figures for kind in ("pdf", "png")}
    assert names == {"checkpoint.pt", *LAST} | figures
    assert list(run.metrics[0]) == ["epoch", *script.metrics]
    assert [row["epoch"] for row in run.metrics] == ["1", "2", "3"]
    lines = re.findall(r"^epoch [1-9].*$", run.end.out, re.MULTILINE)
    for row, line in zip(run.metrics, lines, strict=True):
        shown = dict(re.findall(r"(\w+) ([-\d.e+]+)", line))
        for name in script.metrics:
            assert math.isfinite(float(row[name]))
            assert float(shown[name]) == pytest.approx(float(row[name]), rel=1e-3)


def test_summary_has_what_it_takes_to_do_the_run_again(script, finished):
    """And the weights are those of the last checkpoint, of the GAN its averaged generator's."""
    parts = finished(script).checkpoint["parts"]
    assert_same(finished(script).weights, parts["average" if script is GAN else "model"])
    text = (finished(script).folder / "summary.json").read_text()
    summary = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    options, final = summary["options"], summary["final"]
    assert {script.epochs[2:]: 3, "batch_size": 20, "seed": 0}.items() <= options.items()
    assert options == finished(script).checkpoint["options"]
    assert (summary["device"], summary["threads"]) == ("CPU", 1)
    assert torch.__version__ in text
    assert final.keys() == {*script.metrics, *script.final}
    assert all(math.isfinite(v) for v in final.values() if isinstance(v, int | float))
    for name in script.metrics:
        assert str(final[name]) == finished(script).metrics[-1][name]  # not rounded


def test_initial_weights_depend_on_the_seed(script, tmp_path):
    """A learning rate this small leaves them as they were drawn."""
    weights = []
    for seed in (0, 1):
        options = ("--lr", 1e-30, "--seed", seed)
        script.run_well(*script.options(tmp_path / str(seed), 1, *options))
        weights.append(Results(tmp_path / str(seed)).weights)
    drawn = [name for name, tensor in weights[0].items()
             if name.endswith("weight") and tensor.std() > 1e-3]  # fmt: skip
    assert len(drawn) >= 4
    assert not any(torch.equal(weights[0][name], weights[1][name]) for name in drawn)


# ------------------------ Ctrl-C and --resume ------------------------
def no_training(loaders):
    """Make the loaders small, and let none of them give a training batch."""
    small(loaders, epoch=1, batch=1, act=lambda _: pytest.fail("trained"))


def test_ctrl_c_and_resume_end_as_an_uninterrupted_run(script, finished, tmp_path):
    """In the first epoch there is nothing to resume."""
    end = script.run(*script.options(tmp_path), loaders=stop_in(1))
    assert "checkpoint.pt" not in error_line(end, status=130)
    assert Results(tmp_path).bytes == {}
    error_line(script.run(*script.options(tmp_path), "--resume"))
    end = script.run(*script.options(tmp_path), loaders=stop_in(2))
    assert str(tmp_path / "checkpoint.pt") in error_line(end, status=130)
    assert Results(tmp_path).bytes.keys() == {"checkpoint.pt"}
    end = script.run_well(*script.options(tmp_path), "--resume")
    assert re.findall(r"^epoch (\d)", end.out, re.MULTILINE) == ["2", "3"]
    assert_same_results(Results(tmp_path), finished(script))


def test_until_its_end_a_new_run_keeps_the_results_of_the_last_complete_one(finished, tmp_path):
    run = finished.copy(VAE, tmp_path)
    other = VAE.options(tmp_path, 3, "--seed", 1)
    assert VAE.run(*other, loaders=stop_in(1)).status == 130
    assert run.bytes == finished(VAE).bytes
    assert VAE.run(*other, loaders=stop_in(2)).status == 130
    assert run.checkpoint["options"]["seed"] == 1
    assert all(run.bytes[name] == finished(VAE).bytes[name] for name in LAST)
    VAE.run_well(*other, "--resume")
    assert all(run.bytes[name] != finished(VAE).bytes[name] for name in LAST)


def test_a_process_ended_in_the_middle_of_an_epoch_and_resumed(finished, tmp_path):
    """By Ctrl-C, and by a kill that it cannot see coming."""
    runs = {signum: Results(tmp_path / signum.name) for signum in (signal.SIGINT, signal.SIGKILL)}
    processes = {signum: VAE.start_napping(3, *VAE.options(runs[signum].folder)) for signum in runs}
    for signum, process in processes.items():
        assert "sleeping\n" in iter(process.stdout.readline, "")
        process.send_signal(signum)
    error_line(end_of(processes[signal.SIGINT]), status=130)
    killed = end_of(processes[signal.SIGKILL])
    assert (killed.status, killed.err) == (-signal.SIGKILL, "")
    for run in runs.values():
        VAE.run_well(*VAE.options(run.folder), "--resume")
        assert_same_results(run, finished(VAE))


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), FULL], ids=repr)
@pytest.mark.parametrize(("name", "number"), [("checkpoint.pt", 3), ("metrics.csv", 1)])
def test_a_file_cut_off_leaves_the_last_one(name, number, error, finished, tmp_path, monkeypatch):
    """By Ctrl-C or a full disk, the `number`-th time that this file is written."""
    write, count = Path.write_bytes, itertools.count(1)

    def cut_off(path, content):
        if name in path.name and next(count) == number:
            write(path, content[:100])
            raise error
        return write(path, content)

    run = finished.copy(VAE, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", cut_off)
        line = error_line(VAE.run(*VAE.options(tmp_path)), 1 if error is FULL else 130)
    assert error is not FULL or f"{tmp_path / name}: {FULL.strerror}" in line
    assert run.bytes["metrics.csv"] == finished(VAE).bytes["metrics.csv"]
    assert len(run.checkpoint["history"][0]) == (2 if name == "checkpoint.pt" else 3)
    VAE.run_well(*VAE.options(tmp_path), "--resume")
    assert_same_results(run, finished(VAE))


def test_ctrl_c_in_the_evaluation_and_resume(script, finished, tmp_path):
    """In the figure after the training; resumed, nothing is trained again."""

    def savefig(figure, file, **_):
        if figure.axes[0].get_xlabel() == "epoch":
            raise KeyboardInterrupt
        save_pictures(figure, file)

    error_line(script.run(*script.options(tmp_path), savefig=savefig), status=130)
    assert Results(tmp_path).bytes.keys() == {"checkpoint.pt"}
    end = script.run_well(*script.options(tmp_path), "--resume", loaders=no_training)
    assert not re.search(r"^epoch \d", end.out, re.MULTILINE)
    assert_same_results(Results(tmp_path), finished(script))


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    "module": lambda path: torch.save(torch.nn.Linear(2, 2), path),
    "numbers": lambda path: torch.save({"options": 3, "parts": 4}, path),
    "another script's": lambda path: NF.run_well(*NF.options(path.parent, 1)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_checkpoint_that_is_none_is_one_line(damage, finished, tmp_path):
    run = finished.copy(VAE, tmp_path)
    damage(tmp_path / "checkpoint.pt")
    before = run.bytes
    end = VAE.run(*VAE.options(tmp_path), "--resume", loaders=no_training)
    assert str(tmp_path / "checkpoint.pt") in error_line(end)
    assert end.out == ""
    assert run.bytes == before


@pytest.mark.parametrize("option", ["--epochs 4", "--lr 0.5", "--zdim 3", "--binarization dynamic"])
def test_checkpoint_of_other_options_is_refused_by_name(option, finished, tmp_path):
    run = finished.copy(VAE, tmp_path)
    name, value = option.split()
    end = VAE.run(*VAE.options(tmp_path, 3, name, value, "--resume"), loaders=no_training)
    line = error_line(end)
    assert f"{name} is {value}" in line
    assert str(run.checkpoint["options"][name[2:]]) in line
    assert run.bytes == finished(VAE).bytes


# ------------------------ Losses and weights that are not finite ------------------------
def test_nonfinite_loss_is_one_line_and_keeps_the_checkpoint(script, finished, tmp_path):
    loaders = functools.partial(small, epoch=2, batch=2, act=poison)
    line = error_line(script.run(*script.options(tmp_path), loaders=loaders), status=1)
    assert all(text in line for text in ("epoch 2", str(tmp_path / "checkpoint.pt")))
    assert Results(tmp_path).bytes.keys() == {"checkpoint.pt"}
    script.run_well(*script.options(tmp_path), "--resume")
    assert_same_results(Results(tmp_path), finished(script))


@pytest.mark.parametrize("n_batches", [1, 2])
def test_absurd_learning_rate_ends_without_bad_weights_on_disk(script, n_batches, tmp_path):
    """The GAN has no loss of the weights that its last step makes: they are looked at as such."""
    loaders = functools.partial(small, n_batches=n_batches)
    options = script.options(tmp_path, n_batches + 1, "--lr", "1e8")
    line = error_line(script.run(*options, loaders=loaders), status=1)
    saved = (tmp_path / "checkpoint.pt").exists()
    assert (str(tmp_path / "checkpoint.pt") in line) == saved
    assert Results(tmp_path).bytes.keys() == ({"checkpoint.pt"} if saved else set())
    for name, part in (Results(tmp_path).checkpoint["parts"] if saved else {}).items():
        assert "optim" in name or "sched" in name or all(x.isfinite().all() for x in part.values())
