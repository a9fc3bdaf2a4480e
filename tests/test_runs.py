"""What all scripts share: their form, options, one-line errors, files, and resuming.

What runs.py does for all of them is tested on the VAE alone, the fastest.
"""

import csv
import inspect
import json
import operator
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DEFAULTS, ROOT, SMALL, gan, mixture_flow, nf, pictures, run, vae
from matplotlib.image import imread

import runs
from datasets.mnist import DataError

NAMES = {vae: "vae", gan: "gan", nf: "nf", mixture_flow: "nf_mixture"}
all_scripts = pytest.mark.parametrize("script", NAMES, ids=NAMES.values())


def parse(script, words):
    """Returns the options that a script makes of the words behind its name, without training."""
    started = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script.__file__, *words.split()])
        patch.setattr(runs, "run", started.append)
        names = runpy.run_path(script.__file__, run_name="__main__")
    assert started == [names["main"]]
    return names["ARGS"]


def error_of(capsys, function, *args, **kwargs):
    """Returns the one line `error: ...` on standard error with which a call ends the program."""
    with pytest.raises(SystemExit) as end:
        function(*args, **kwargs)
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (2, "")
    assert re.fullmatch(r"error: .+\n", err), err
    return err


def results(folder):
    """Returns the rows of metrics.csv, by column, as text, and what is in summary.json."""
    rows = csv.DictReader((folder / "metrics.csv").read_text().splitlines())
    return list(rows), json.loads((folder / "summary.json").read_text())


def contents(folder):
    """Returns the content of each file, without the seconds, and of the checkpoint its numbers."""
    content = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    rows, summary = results(folder)
    for row in (*rows, summary["final"]):
        del row["seconds"]
    random = torch.load(folder / "checkpoint.pt")["random"].tolist()
    return content | {"metrics.csv": rows, "summary.json": summary, "checkpoint.pt": random}


# ------------------------ Form ------------------------
@pytest.mark.parametrize("folder", [".", "datasets", "extension"])
def test_code_imports_only_what_requirements_and_the_repository_have(folder):
    packages = {"torch", "torchvision", "numpy", "matplotlib", "scipy", "tqdm", "datasets", "runs"}
    allowed = packages | ({"a3_nf_template"} if folder == "extension" else set())
    for path in (ROOT / folder).glob("*.py"):
        source = path.read_text(encoding="utf-8")
        imported = set(re.findall(r"^\s*(?:import|from) (\w+)", source, re.MULTILINE))
        assert imported <= allowed | sys.stdlib_module_names, path
        assert not re.search(r"\bdistributions\b", source), path


SIGNATURES = {  # the template's; dropout and latent_dim are ours
    vae: """Encoder(hidden_dim=500, z_dim=20) Decoder(hidden_dim=500, z_dim=20)
        VAE(hidden_dim=500, z_dim=20) VAE.sample(self, n_samples) main()
        epoch_iter(model, data, optimizer) run_epoch(model, data, optimizer)
        save_elbo_plot(train_curve, val_curve, filename)""",
    gan: """Generator(latent_dim=100) Discriminator(dropout=0.3) main()
        train(dataloader, discriminator, generator, optimizer_G, optimizer_D)""",
    nf: """log_prior(x) sample_prior(size) get_mask() Coupling(c_in, mask, n_hidden=1024) main()
        Coupling.forward(self, z, ldj, reverse=False) Flow(shape, n_flows=4) Model(shape)
        Flow.forward(self, z, logdet, reverse=False) Model.dequantize(self, z)
        Model.logit_normalize(self, z, logdet, reverse=False) Model.sample(self, n_samples)
        epoch_iter(model, data, optimizer) run_epoch(model, data, optimizer)
        save_bpd_plot(train_curve, val_curve, filename)""",
}


@pytest.mark.parametrize("script", SIGNATURES, ids=["vae", "gan", "nf"])
def test_names_and_signatures_of_the_template_are_kept(script):
    for name, parameters in re.findall(r"(\S+?)(\(.*?\))", SIGNATURES[script]):
        assert str(inspect.signature(operator.attrgetter(name)(script))) == parameters, name


# ------------------------ Options ------------------------
@all_scripts
def test_options_have_these_defaults_and_help_lists_them(script, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folder = ROOT / "results" / NAMES[script]
    assert vars(parse(script, "")) == DEFAULTS[script] | {"results_dir": folder}
    with pytest.raises(SystemExit) as end:
        parse(script, "--help")
    assert end.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name, value in DEFAULTS[script].items():
        assert f"--{name} " in shown
        assert f"(default: {value})" in shown


def test_options_that_differ_from_the_defaults_name_the_folder(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "ones", lambda n, device: torch.zeros(n))  # any device can be used
    for script, words, name in (
        (vae, "--epochs 40 --lr 3e-3 --seed 0 --resume --device cpu", "vae"),
        (vae, "--zdim 2 --binarization dynamic --lr 0.01", "vae_zdim2_dynamic_lr0.01"),
        (gan, "--seed 1 --save_interval 7", "gan_save_interval7_seed1"),
        (nf, "--device cuda:1", "nf_cuda1"),
    ):
        assert parse(script, words).results_dir == ROOT / "results" / name
    assert parse(vae, "--results_dir mine").results_dir == Path("mine")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # then it is the default
    assert (parse(vae, "").device, parse(vae, "").results_dir.name) == ("cuda", "vae")


BAD = {  # a bad option: what its error line says, besides the option and the value
    "--zdim 0": "from 1 ", "--seed -1": "from 0 ", "--batch_size 2147483648": "2^31",
    "--epochs 1.5": "int", "--lr nan": "from 0 to 1", "--weight_decay -0.1": "from 0 to 1",
    "--lr 1.5": "from 0 to 1", "--binarization grey": "dynamic", "--nonsense 3": "unrecognized",
    "--device tpu": "cannot", "--device meta": "cannot", "--latent_dim 1": "from 2 ",
    "--batch_size 1": "from 2 ",
}  # fmt: skip


@pytest.mark.parametrize("option", BAD)
def test_a_bad_option_is_one_line_with_its_value_and_what_is_allowed(option, capsys):
    script = gan if BAD[option] == "from 2 " else vae
    line = error_of(capsys, parse, script, option)
    assert all(text in line for text in (*option.split(), BAD[option])), line


@all_scripts
def test_bad_data_and_an_unwritable_folder_are_one_line(script, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("mine")
    folder = tmp_path / "file" / "results"
    assert str(folder) in error_of(capsys, run, script, folder)

    def damaged(**options):
        raise DataError("mnist.npz is damaged")

    monkeypatch.setattr(script, "bmnist" if script is vae else "mnist", damaged)
    line = error_of(capsys, run, script, tmp_path / "new")
    assert line == "error: mnist.npz is damaged\n"
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "mine")]


# ------------------------ Files ------------------------
FIGURES = {  # other files than all scripts have: while they train, and at the end
    vae: ("samples_first means_before means_first means_halfway means_after", "elbo.png elbo.pdf"),
    gan: ("000015 000030 000045 000060", "interpolation.png training.png training.pdf"),
    nf: ("", "bpd.png bpd.pdf interpolation.png"),
    mixture_flow: ("", "bpd.png bpd.pdf interpolation.png"),
}


@all_scripts
def test_every_file_is_written_whole_and_the_results_before_the_last_figures(script, finished):
    of, (images, figures) = finished(script), FIGURES[script]
    last = ["weights.pt", "metrics.csv", "summary.json", *figures.split()]
    assert list(of.written)[-len(last) :] == last
    images = ["samples_before", "samples_halfway", "samples_after", *images.split()]
    assert set(of.written) == {"checkpoint.pt", *last, *(f"{name}.png" for name in images)}
    assert set(of.written) == {path.name for path in of.folder.rglob("*.*")}
    for path in of.folder.glob("*.pdf"):  # has the report's letters, as TrueType
        content = path.read_bytes()
        assert b"+STIXGeneral-Regular" in content
        assert b"/Type3" not in content


METRICS = {vae: ["train_elbo", "val_elbo"], gan: ["value", "loss_g", "d_real", "d_fake"],
           nf: ["train_bpd", "val_bpd"], mixture_flow: ["train_bpd", "val_bpd"]}  # fmt: skip


@all_scripts
def test_numbers_are_the_same_in_the_table_the_summary_and_the_printed_lines(script, finished):
    of = finished(script)
    rows, summary = results(of.folder)
    printed = re.findall(r"^epoch (\d)/5  (.*)$", of.out, re.MULTILINE)
    for row, (epoch, line) in zip(rows, printed, strict=True):
        assert list(row) == ["epoch", *METRICS[script], "seconds"]
        assert row["epoch"] == epoch
        shown = dict(re.findall(r"(\w+) ([-\d.]+)", line))
        for name in METRICS[script]:
            assert float(shown[name]) == pytest.approx(float(row[name]), abs=5.1e-3)
    seconds = [float(row["seconds"]) for row in rows]
    assert min(seconds) > 0
    assert sum(seconds) < of.duration

    options, final = DEFAULTS[script] | SMALL[script], summary.pop("final")
    del options["resume"]
    threads, version = torch.get_num_threads(), torch.__version__
    assert summary == {"options": options, "threads": threads, "torch": version}
    assert {name: str(final.pop(name)) for name in rows[-1]} == rows[-1]  # not rounded
    if script is gan:
        assert list(final) == ["digit_from", "digit_to"]
    else:
        ((name, value),) = final.items()
        assert name == METRICS[script][0].replace("train", "test")
        assert f"\n{name} {value:.{2 if script is vae else 3}f}\n" in of.out


@all_scripts
def test_samples_are_those_of_the_weights_of_their_epoch(script, finished):
    """The latents are the same each time; the VAE also shows the means it drew the samples from."""
    of = finished(script)
    torch.manual_seed(0)
    gan.Generator(), gan.Discriminator()  # draw their weights before the GAN draws its latents
    z = torch.randn(25, 100)
    # Fast matrix products are for training alone.
    fast, full = of.written["checkpoint.pt"], of.written["weights.pt"]
    assert (fast, full) == ("highest" if script is mixture_flow else "medium", "highest")
    torch.set_float32_matmul_precision(fast)
    moments = (
        {"first": 1, "halfway": 3, "after": 5} if script is vae else {"halfway": 3, "after": 5}
    )
    for moment, epoch in moments.items():
        model = of.models[epoch - 1]
        torch.manual_seed(0)
        if script is vae:
            images = dict(zip(("samples", "means"), model.sample(25), strict=True))
        elif script is gan:
            images = {"samples": (model(z).detach() + 1) / 2}
        else:
            images = {"samples": model.sample(25) / 256}
        for name, expected in images.items():
            shown = pictures(of.folder / f"{name}_{moment}.png")
            np.testing.assert_allclose(shown, expected.flatten(1), atol=0.51 / 255)
            assert not torch.equal(shown, pictures(of.folder / f"{name}_before.png"))
    torch.set_float32_matmul_precision(full)


@pytest.mark.parametrize("padding", [0, 1])
def test_grids_have_ink_in_black_and_4_by_4_dots_for_a_pixel(padding, tmp_path):
    images, size = torch.rand(9, 28, 28), 28 + padding
    runs.save_images(images.flatten(1), tmp_path / "x.png", nrow=3, padding=padding)
    grid = np.full((3 * size + padding, 3 * size + padding), 0.5)
    for i, image in enumerate(images):
        top, left = size * (i // 3) + padding, size * (i % 3) + padding
        grid[top : top + 28, left : left + 28] = 1 - image
    shown = imread(tmp_path / "x.png")[..., 0]
    np.testing.assert_allclose(shown, np.kron(grid, np.ones((4, 4))), atol=0.51 / 255)


CURVES = {  # plot, label, curves of training and of validation
    vae: (vae.save_elbo_plot, "ELBO (nats)", [-250, -200, -180], [-230, -170, -190]),
    nf: (nf.save_bpd_plot, "bits per dimension", [2.5, 2.0, 1.8], [2.3, 1.7, 1.9]),
}


@pytest.mark.parametrize("script", CURVES, ids=["vae", "nf"])
def test_curves_are_shown_without_the_first_training_value(script, monkeypatch):
    """It is far off. A third line shows the flow's target."""
    saved, (save, label, *curves) = [], CURVES[script]
    monkeypatch.setattr(runs, "save_figure", lambda figure, path: saved.append(figure))
    save(*curves, "curves.png")
    (axes,) = saved[0].axes
    *lines, target = [*axes.get_lines(), None][:3]
    assert [line.get_label() for line in lines] == ["training", "validation"]
    for line, curve in zip(lines, curves, strict=True):
        np.testing.assert_array_equal(line.get_data(), ([1, 2, 3], curve))
    assert target is None if script is vae else target.get_ydata()[0] == 1.85
    (far, *train), val = curves
    low, high = axes.get_ylim()
    assert low < min(train + val) < max(train + val) < high
    assert not low < far < high
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", label)
    assert axes.get_legend()


def test_a_file_that_cannot_be_written_whole_leaves_the_last_one(tmp_path, capsys):
    path = tmp_path / "weights.pt"
    runs.write(path, lambda file: file.write(b"before"))
    for error in (OSError("No space left on device"), RuntimeError("unexpected pos 64 vs 0")):

        def save(file, error=error):
            file.write(b"half")
            raise error

        assert f"{path} cannot be written: {error}" in error_of(capsys, runs.write, path, save)
        assert path.read_bytes() == b"before"


def test_a_loss_that_is_not_finite_ends_the_run(capsys):
    runs.check_finite(7, 1.0, -1e30)
    for losses in ((float("nan"), 1.0), (1.0, -float("inf"))):
        assert "epoch 7 " in error_of(capsys, runs.check_finite, 7, *losses)


# ------------------------ Ctrl-C and --resume ------------------------
@all_scripts
def test_interrupted_and_resumed_ends_as_in_one_go(script, finished, tmp_path, monkeypatch, capsys):
    """The files have the same bytes, but for the seconds."""
    expected = contents(finished(script).folder)

    def press_ctrl_c(epoch, *losses):
        if epoch == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs, "check_finite", press_ctrl_c)
        assert "--resume" in error_of(capsys, run, script, tmp_path)
    out = run(script, tmp_path, resume=True)
    assert re.findall(r"^epoch (\d)", out, re.MULTILINE) == ["2", "3", "4", "5"]
    assert contents(tmp_path) == expected
    if script is vae:
        assert "epoch" not in run(script, tmp_path, resume=True)  # nothing is left to train
        assert contents(tmp_path) == expected


ELSEWHERE = """
import signal, sys
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None  # Windows lacks them
from pathlib import Path
import conftest, runs

def wait(epoch, *losses):
    if epoch == 3:
        print("waiting", file=sys.__stdout__, flush=True)
        input()

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what runs in background
runs.check_finite = wait
conftest.run(conftest.vae, Path(sys.argv[1]))
assert "matplotlib.pyplot" not in sys.modules  # which chooses a backend
"""
posix = pytest.mark.skipif(sys.platform == "win32", reason="sends a POSIX signal")


@pytest.mark.parametrize("end", ["its own", pytest.param("ctrl-c", marks=posix), "kill"])
def test_a_run_elsewhere_or_ended_there_and_resumed_here_is_as_in_one_go(end, finished, tmp_path):
    """Elsewhere is a process without POSIX's modules, of a user with own settings of matplotlib."""
    folder, settings = tmp_path / "new", tmp_path / "matplotlibrc"
    settings.write_text("text.usetex: True\nimage.origin: lower\nsavefig.pad_inches: 1\n"
                        "savefig.bbox: tight\nfont.size: 20\nlines.linewidth: 5\n")  # fmt: skip
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = os.environ | {"PYTHONPATH": path, "MATPLOTLIBRC": str(settings)}
    command, pipe = [sys.executable, "-c", ELSEWHERE, str(folder)], subprocess.PIPE
    process = subprocess.Popen(command, env=environment, text=True,
                               stdin=pipe, stdout=pipe, stderr=pipe)  # fmt: skip
    assert process.stdout.readline() == "waiting\n"
    if end == "ctrl-c":
        process.send_signal(signal.SIGINT)
    if end == "kill":
        process.kill()
    line = "error: interrupted; --resume goes on after the last finished epoch\n"
    assert process.communicate("\n") == ("", line if end == "ctrl-c" else "")
    if end != "its own":
        run(vae, folder, resume=True)
    assert contents(folder) == contents(finished(vae).folder)


def test_a_missing_checkpoint_or_one_of_other_options_is_one_line(finished, tmp_path, capsys):
    path = tmp_path / "copy" / "checkpoint.pt"
    assert str(path) in error_of(capsys, run, vae, path.parent, resume=True)
    shutil.copytree(finished(vae).folder, path.parent)
    line = error_of(capsys, run, vae, path.parent, resume=True, zdim=30)
    assert line == f"error: --zdim is 30, but 20 in {path}\n"
    line = error_of(capsys, run, nf, path.parent, resume=True, lr=3e-3, weight_decay=0.2)
    assert line == f"error: --zdim is None, but 20 in {path}\n"
    assert contents(path.parent) == contents(finished(vae).folder)
