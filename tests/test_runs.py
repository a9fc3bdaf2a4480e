"""Options, errors, files and resuming, for all scripts; some of runs.py on the VAE alone."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NAMES, ROOT, SMALL, defaults, gan, mixture_flow, nf, pictures, read, run, vae

import runs
from datasets.mnist import DataError

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
    """Returns the one line `error: ...` that a call prints to standard error as it exits."""
    with pytest.raises(SystemExit) as end:
        function(*args, **kwargs)
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (2, "")
    assert re.fullmatch(r"error: .+\n", err), err
    return err


def contents(folder):
    """Returns each file's content, without seconds; of checkpoint.pt only the random state."""
    content = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    rows, summary = read(folder)
    for row in (*rows, summary["final"]):
        del row["seconds"]
    random = torch.load(folder / "checkpoint.pt")["random"].tolist()
    return content | {"metrics.csv": rows, "summary.json": summary, "checkpoint.pt": random}


# ------------------------ Options ------------------------
@all_scripts
def test_defaults_are_those_of_the_committed_run_and_help_lists_them(script, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folder = ROOT / "results" / NAMES[script]
    assert vars(parse(script, "")) == defaults(script) | {"results_dir": folder}
    with pytest.raises(SystemExit, match="0"):
        parse(script, "--help")
    shown = " ".join(capsys.readouterr().out.split())
    for name, value in defaults(script).items():
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
    "--device meta": "cannot", "--latent_dim 1": "from 2 ", "--batch_size 1": "from 2 ",
}  # fmt: skip


@pytest.mark.parametrize("option", BAD)
def test_a_bad_option_is_one_line_with_its_value_and_what_is_allowed(option, capsys):
    script = gan if BAD[option] == "from 2 " else vae
    line = error_of(capsys, parse, script, option)
    assert all(text in line for text in (*option.split(), BAD[option])), line


@all_scripts
def test_bad_data_and_an_unwritable_folder_are_one_line(script, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("mine")
    assert "results" in error_of(capsys, run, script, tmp_path / "file" / "results")

    def damaged(**options):
        raise DataError("mnist.npz is damaged")

    monkeypatch.setattr(script, "bmnist" if script is vae else "mnist", damaged)
    assert "mnist.npz is damaged" in error_of(capsys, run, script, tmp_path / "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "mine")]


# ------------------------ Files ------------------------
RESULTS = "weights.pt metrics.csv summary.json"
FILES = {  # in the order in which they are first written
    vae: f"""samples_before.png means_before.png samples_first.png means_first.png checkpoint.pt
        samples_halfway.png means_halfway.png samples_after.png means_after.png
        {RESULTS} elbo.png elbo.pdf""",
    gan: f"""samples_before.png checkpoint.pt 000015.png 000030.png samples_halfway.png 000045.png
        000060.png samples_after.png {RESULTS} interpolation.png training.png training.pdf""",
    nf: f"""samples_before.png checkpoint.pt samples_halfway.png samples_after.png
        {RESULTS} bpd.png bpd.pdf interpolation.png""",
}


@all_scripts
def test_every_file_is_written_whole_and_the_results_before_the_last_figures(script, finished):
    of = finished(script)
    assert list(of.written) == FILES[nf if script is mixture_flow else script].split()
    assert set(of.written) == {path.name for path in of.folder.rglob("*.*")}
    for path in of.folder.glob("*.pdf"):  # has the report's letters, as TrueType
        content = path.read_bytes()
        assert b"+STIXGeneral-Regular" in content
        assert b"/Type3" not in content


@all_scripts
def test_numbers_are_the_same_in_the_table_the_summary_and_the_printed_lines(script, finished):
    of = finished(script)
    rows, summary = read(of.folder)
    printed = re.findall(r"^epoch (\d)/5  (.*)  [\d.]+ s$", of.out, re.MULTILINE)
    for row, (epoch, line) in zip(rows, printed, strict=True):
        shown = dict(re.findall(r"(\w+) ([-\d.]+)", line))
        assert list(row) == ["epoch", *shown, "seconds"]
        assert row["epoch"] == epoch
        for name, number in shown.items():
            assert number == f"{float(row[name]):.{2 if script is vae else 4}f}"
    seconds = [float(row["seconds"]) for row in rows]
    assert 0 < min(seconds) < sum(seconds) < of.duration

    options, final = defaults(script) | SMALL[script], summary.pop("final")
    del options["resume"]
    assert summary == {"options": options, "threads": 1, "torch": torch.__version__}
    assert {name: str(final.pop(name)) for name in rows[-1]} == rows[-1]  # not rounded
    if script is not gan:  # which has no test result
        ((name, value),) = final.items()
        assert f"\n{name} {value:.{2 if script is vae else 3}f}\n" in of.out


@all_scripts
def test_samples_are_those_of_the_weights_of_their_epoch(script, finished):
    """The latents are the same each time; the VAE also shows the means it drew the samples from."""
    of = finished(script)
    models = dict(zip(("first", "halfway", "after"), of.models[::2], strict=True))
    torch.manual_seed(0)
    gan.Generator(), gan.Discriminator()  # draw their weights before the GAN draws its latents
    z = torch.randn(25, 100)
    fast = "highest" if script is mixture_flow else "medium"  # matrix products of the training
    assert (of.written["checkpoint.pt"], of.written["weights.pt"]) == (fast, "highest")
    torch.set_float32_matmul_precision(fast)
    for path in set(of.folder.glob("*_*.png")) - set(of.folder.glob("*_before.png")):
        kind, moment = path.stem.split("_")
        torch.manual_seed(0)
        if script is gan:
            images = (models[moment](z).detach() + 1) / 2
        elif script is vae:
            images = models[moment].sample(25)[kind == "means"].flatten(1)
        else:
            images = models[moment].sample(25) / 256
        np.testing.assert_allclose(pictures(path), images, atol=0.51 / 255)
        assert not torch.equal(pictures(path), pictures(of.folder / f"{kind}_before.png"))


@pytest.mark.parametrize("script", [vae, nf], ids=["vae", "nf"])
def test_curves_are_shown_without_the_first_training_value(script, monkeypatch):
    """It is far off. A third line shows the flow's target."""
    saved, train, val = [], [-25, -19, -18], [-21, -17, -20]
    monkeypatch.setattr(runs, "save_figure", lambda figure, path: saved.append(figure))
    if script is vae:
        vae.save_elbo_plot(train, val, "curves.png")
    else:
        train, val = [25, 19, 18], [21, 17, 20]
        nf.save_bpd_plot(train, val, "curves.png")
    (axes,) = saved[0].axes
    (training, validation), names = axes.get_legend_handles_labels()
    assert names == ["training", "validation"]
    np.testing.assert_array_equal(training.get_data(), ([1, 2, 3], train))
    np.testing.assert_array_equal(validation.get_data(), ([1, 2, 3], val))
    assert [line.get_ydata()[0] for line in axes.get_lines()[2:]] == [1.85] * (script is nf)
    label = "ELBO (nats)" if script is vae else "bits per dimension"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", label)
    assert axes.get_legend()
    low, high = axes.get_ylim()
    assert [low < value < high for value in train + val] == [False] + 5 * [True]


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

    def press_ctrl_c(epoch, loss, other_loss):
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
import sys
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None  # Windows lacks them
from pathlib import Path
import conftest, runs

def wait(epoch, *losses):
    if epoch == 3:
        print("waiting", file=sys.__stdout__, flush=True)
        input()

runs.check_finite = wait
conftest.run(conftest.vae, Path(sys.argv[1]))
"""


@pytest.mark.parametrize("killed", [False, True])
def test_a_run_elsewhere_or_killed_and_resumed_here_is_as_in_one_go(killed, finished, tmp_path):
    """Elsewhere is a process without POSIX's modules, of a user with own settings of matplotlib."""
    folder, settings = tmp_path / "new", tmp_path / "matplotlibrc"
    settings.write_text("text.usetex: True\nimage.origin: lower\nfont.size: 20")
    places = os.pathsep.join(["tests", os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": places, "MATPLOTLIBRC": str(settings)}
    command = [sys.executable, "-c", ELSEWHERE, str(folder)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)
    assert process.stdout.readline() == "waiting\n"
    if killed:
        process.kill()
    assert process.communicate("\n") == ("", "")
    if killed:
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
