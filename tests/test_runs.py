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
from conftest import OPTIONS, ROOT, gan, mixture_flow, nf, run, vae
from matplotlib.image import imread
from torch import nn

import runs
from datasets.mnist import DataError

SCRIPTS = {"vae": vae, "gan": gan, "nf": nf, "nf_mixture": mixture_flow}
all_scripts = pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)


def parse(script, words):
    """Returns the options that a script makes of the words behind its name, without training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script.__file__, *words.split()])
        patch.setattr(runs, "run", lambda main: None)
        return runpy.run_path(script.__file__, run_name="__main__")["ARGS"]


def error_of(capsys, function, *args, **kwargs):
    """Returns the one line `error: ...` on standard error with which a call ends the program."""
    with pytest.raises(SystemExit) as end:
        function(*args, **kwargs)
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (2, "")
    assert re.fullmatch(r"error: .+\n", err), err
    return err


def python(*words, **environment):
    """Starts a Python of its own; returns the process, whose output is to be read."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = os.environ | {"PYTHONPATH": paths} | environment
    command, pipe = [sys.executable, *map(str, words)], subprocess.PIPE
    return subprocess.Popen(command, text=True, stdout=pipe, stderr=pipe, env=environment)


def rows(folder):
    """Returns the rows of metrics.csv, by column, as text."""
    return list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))


def contents(folder):
    """Returns each file's content by name, without the seconds, and of a checkpoint the rest."""
    files = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    content = {name: path.read_bytes() for name, path in files.items()}
    content[Path("metrics.csv")] = [row | {"seconds": None} for row in rows(folder)]
    summary = json.loads((folder / "summary.json").read_text())
    content[Path("summary.json")] = summary | {"final": summary["final"] | {"seconds": None}}
    checkpoint = torch.load(folder / "checkpoint.pt")
    content[Path("checkpoint.pt")] = checkpoint["options"], checkpoint["random"].tolist()
    return content


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


SIGNATURES = {
    vae: """Encoder(hidden_dim=500, z_dim=20) Encoder.forward(self, input)
        Decoder(hidden_dim=500, z_dim=20) Decoder.forward(self, input)
        VAE(hidden_dim=500, z_dim=20) VAE.forward(self, input) VAE.sample(self, n_samples)
        epoch_iter(model, data, optimizer) run_epoch(model, data, optimizer)
        save_elbo_plot(train_curve, val_curve, filename)""",
    gan: """Generator() Generator.forward(self, z) Discriminator() Discriminator.forward(self, img)
        train(dataloader, discriminator, generator, optimizer_G, optimizer_D)""",
    nf: """log_prior(x) sample_prior(size) get_mask() Coupling(c_in, mask, n_hidden=1024)
        Coupling.forward(self, z, ldj, reverse=False) Flow(shape, n_flows=4)
        Flow.forward(self, z, logdet, reverse=False) Model(shape) Model.dequantize(self, z)
        Model.logit_normalize(self, z, logdet, reverse=False) Model.forward(self, input)
        Model.sample(self, n_samples) epoch_iter(model, data, optimizer)
        run_epoch(model, data, optimizer) save_bpd_plot(train_curve, val_curve, filename)""",
}


@pytest.mark.parametrize("script", SIGNATURES, ids=["vae", "gan", "nf"])
def test_names_and_signatures_of_the_template_are_kept(script):
    """A parameter that we added has a default, so that the template's callers need not know it."""
    for name, wanted in re.findall(r"(\S+?)\((.*?)\)", SIGNATURES[script]):
        signature = inspect.signature(operator.attrgetter(name)(script))
        found = [str(parameter) for parameter in signature.parameters.values()]
        n = len(re.findall(r"[^, ]+", wanted))
        assert ", ".join(found[:n]) == wanted, name
        assert all("=" in added for added in found[n:]), name


# ------------------------ Options ------------------------
DEFAULTS = {
    vae: {"epochs": 40, "zdim": 20, "binarization": "static", "batch_size": 64, "lr": 3e-3,
          "weight_decay": 0.2},
    gan: {"n_epochs": 200, "batch_size": 64, "lr": 2e-4, "latent_dim": 100, "save_interval": 500,
          "dropout": 0.3},
    nf: {"epochs": 40, "batch_size": 128, "lr": 1e-3, "weight_decay": 0.3},
    mixture_flow: {"epochs": 40, "n_mix": 16, "batch_size": 64, "lr": 8e-3},
}  # fmt: skip


@all_scripts
def test_options_have_these_defaults_and_help_lists_them(script, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    common = {"seed": 0, "device": "cpu", "resume": False}
    found = vars(parse(script, ""))
    folder = found.pop("results_dir")
    assert found == DEFAULTS[script] | common
    assert SCRIPTS[folder.name] is script
    assert folder.parent == ROOT / "results"
    with pytest.raises(SystemExit) as end:
        parse(script, "--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    assert all(f"--{name} " in shown and f"(default: {found[name]})" in shown for name in found)


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
    "--epochs 0": "from 1 ", "--epochs -1": "from 1 ", "--zdim 0": "from 1 ",
    "--batch_size 2147483648": "2^31", "--seed -1": "from 0 ", "--epochs 1.5": "int",
    "--lr nan": "from 0 to 1", "--lr 1.5": "from 0 to 1", "--weight_decay -0.1": "from 0 to 1",
    "--binarization grey": "dynamic", "--nonsense 3": "unrecognized", "--device tpu": "cannot",
    "--device meta": "cannot", "--n_mix 0": "from 1 ", "--save_interval 0": "from 1 ",
    "--latent_dim 1": "from 2 ", "--batch_size 1": "from 2 ",
}  # fmt: skip


@pytest.mark.parametrize("option", BAD)
def test_a_bad_option_is_one_line_with_its_value_and_what_is_allowed(option, capsys):
    of_gan = option in ("--save_interval 0", "--latent_dim 1", "--batch_size 1")
    script = gan if of_gan else mixture_flow if option == "--n_mix 0" else vae
    line = error_of(capsys, parse, script, option)
    assert all(text in line for text in (*option.split(), BAD[option])), line


def test_a_script_ends_with_status_2_on_a_bad_option_and_writes_nothing(tmp_path):
    process = python(vae.__file__, "--epochs", 0, "--results_dir", tmp_path / "new")
    out, err = process.communicate()
    line = "error: --epochs 0 is not allowed; give a whole number from 1 to 2^31 - 1\n"
    assert (process.returncode, out, err) == (2, "", line)
    assert not list(tmp_path.iterdir())


@all_scripts
def test_bad_data_and_an_unwritable_folder_are_one_line(script, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("mine")
    folder = tmp_path / "file" / "results"
    assert str(folder) in error_of(capsys, run, script, folder)
    assert "batch size 50001 " in error_of(capsys, run, gan, tmp_path / "new", batch_size=50_001)

    def damaged(**options):
        raise DataError("mnist.npz is damaged")

    monkeypatch.setattr(script, "bmnist" if script is vae else "mnist", damaged)
    line = error_of(capsys, run, script, tmp_path / "new")
    assert line == "error: mnist.npz is damaged\n"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


# ------------------------ Files ------------------------
METRICS = {vae: ["train_elbo", "val_elbo"], gan: ["value", "loss_g", "d_real", "d_fake"],
           nf: ["train_bpd", "val_bpd"], mixture_flow: ["train_bpd", "val_bpd"]}  # fmt: skip
SAMPLES = {"samples_before.png", "samples_halfway.png", "samples_after.png"}
FLOW = SAMPLES | {"bpd.png", "bpd.pdf", "interpolation.png"}
FIGURES = {
    vae: {"elbo.png", "elbo.pdf", *SAMPLES, "samples_first.png", "means_before.png",
          "means_first.png", "means_halfway.png", "means_after.png"},
    gan: SAMPLES | {"training.png", "training.pdf", "interpolation.png", "000015.png",
                    "000030.png", "000045.png", "000060.png"},
    nf: FLOW, mixture_flow: FLOW,
}  # fmt: skip


@all_scripts
def test_every_file_is_written_whole_and_the_results_before_the_last_figures(script, finished):
    of = finished(script)
    results = ["weights.pt", "metrics.csv", "summary.json"]
    names = [path.name for path in of.folder.rglob("*") if path.is_file()]
    assert sorted(names) == sorted(FIGURES[script] | {"checkpoint.pt", *results})
    assert sorted(set(of.written)) == sorted(names)
    first = of.written.index("weights.pt")
    assert of.written[first : first + 3] == results
    curves = [name for name in names if name.endswith(".pdf")]
    assert {*curves, *(name for name in names if "interpol" in name)} <= set(of.written[first:])


@all_scripts
def test_each_epoch_is_a_row_and_a_line_printed_once_it_is_saved(script, finished):
    of = finished(script)
    assert list(rows(of.folder)[0]) == ["epoch", *METRICS[script], "seconds"]
    assert [row["epoch"] for row in rows(of.folder)] == ["1", "2", "3", "4", "5"]
    assert re.findall(r"^(saved|epoch)\b", of.out, re.MULTILINE) == 5 * ["saved", "epoch"]
    lines = re.findall(r"^epoch (\d)/5  (.*)$", of.out, re.MULTILINE)
    for row, (epoch, line), checked in zip(rows(of.folder), lines, of.losses, strict=True):
        shown = dict(re.findall(r"(\w+) ([-\d.]+)", line))
        assert epoch == row["epoch"]
        for name in METRICS[script]:
            assert float(shown[name]) == pytest.approx(float(row[name]), abs=5.1e-3)
        assert list(map(str, checked)) == [row["epoch"], *(row[x] for x in METRICS[script][:2])]
    # On the clock of `finished` an epoch takes 1 s, and the checkpoint before it 10 s.
    assert [float(row["seconds"]) for row in rows(of.folder)] == [1, 11, 11, 11, 11]


@all_scripts
def test_summary_has_the_options_the_threads_and_the_last_row(script, finished):
    of = finished(script)
    summary = json.loads((of.folder / "summary.json").read_text())
    options = {name: value for name, value in OPTIONS[script].items() if name != "resume"}
    assert summary.pop("options") == of.checkpoints[-1]["options"] == options
    final = summary.pop("final")
    assert summary == {"threads": torch.get_num_threads(), "torch": torch.__version__}
    more = list(final)[len(METRICS[script]) + 2 :]
    assert {name: str(final[name]) for name in final if name not in more} == rows(of.folder)[-1]
    test = {vae: "test_elbo", nf: "test_bpd", mixture_flow: "test_bpd"}.get(script)
    assert more == ([test] if test else ["digit_from", "digit_to"])
    if test:
        digits = 2 if script is vae else 3
        assert f"\n{test} {final[test]:.{digits}f}\n" in of.out


@all_scripts
def test_samples_are_those_of_the_weights_of_their_epoch(script, finished):
    """The latents are the same each time; the VAE also shows the means it drew the samples from."""
    of = finished(script)
    torch.set_float32_matmul_precision("highest" if script is mixture_flow else "medium")
    gan.Generator(), gan.Discriminator()  # take their numbers before the GAN draws its latents
    z = torch.randn(25, 100)
    for moment, epoch in {"first": 1, "halfway": 3, "after": 5}.items():
        if moment == "first" and script is not vae:
            continue
        model = of.models[epoch - 1]
        torch.manual_seed(0)
        images = (model(z) + 1) / 2 if script is gan else model.sample(25)
        if script is vae:
            images, means = images
            assert torch.equal(of.images[f"means_{moment}.png"], means)
        images = images / 256 if script in (nf, mixture_flow) else images
        assert torch.equal(of.images[f"samples_{moment}.png"], images)
        assert not torch.equal(of.images["samples_before.png"], images)
    torch.set_float32_matmul_precision("highest")


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


@pytest.mark.parametrize("error", [OSError("disk full"), RuntimeError("pos"), KeyboardInterrupt()])
def test_a_file_that_cannot_be_written_whole_leaves_the_last_one(error, tmp_path, capsys):
    def save(file):
        file.write(b"half")
        raise error

    path = tmp_path / "weights.pt"
    runs.write(path, lambda file: file.write(b"before"))
    if isinstance(error, KeyboardInterrupt):
        pytest.raises(KeyboardInterrupt, runs.write, path, save)
    else:
        assert f"{path} cannot be written: {error}" in error_of(capsys, runs.write, path, save)
    assert path.read_bytes() == b"before"


def test_a_loss_that_is_not_finite_ends_the_run(capsys):
    runs.check_finite(7, 1.0, -1e30)
    for losses in ((float("nan"), 1.0), (1.0, -float("inf"))):
        assert "epoch 7 " in error_of(capsys, runs.check_finite, 7, *losses)


ELSEWHERE = """
import sys
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
from pathlib import Path
import conftest
conftest.run(conftest.vae, Path(sys.argv[1]), epochs=1)
assert "matplotlib.pyplot" not in sys.modules
"""


def test_a_run_is_the_same_without_posix_and_with_a_users_matplotlibrc(tmp_path):
    """No script may import what Windows lacks, or pyplot, which chooses a backend."""
    settings = tmp_path / "matplotlibrc"
    settings.write_text("text.usetex: True\nimage.origin: lower\nsavefig.pad_inches: 1\n"
                        "savefig.bbox: tight\nfont.size: 20\nlines.linewidth: 5\n")  # fmt: skip
    process = python("-c", ELSEWHERE, tmp_path / "there", MATPLOTLIBRC=str(settings))
    assert process.communicate() == ("", "")
    run(vae, tmp_path / "here", epochs=1)
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


def test_figures_have_no_date_and_the_reports_letters_as_truetype(finished):
    content = (finished(vae).folder / "elbo.pdf").read_bytes()
    assert b"/Subtype /CIDFontType2" in content
    assert b"+STIXGeneral-Regular" in content
    assert not any(text in content for text in (b"/Type3", b"CreationDate", b"DejaVu"))


# ------------------------ Ctrl-C and --resume ------------------------
@all_scripts
def test_interrupted_and_resumed_ends_as_in_one_go(script, finished, tmp_path, monkeypatch, capsys):
    """Files have the same bytes, but for the seconds."""
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


NAPPING = """
import signal, sys, time
from pathlib import Path
import conftest, runs

def sleep(epoch, *losses):
    if epoch == 3:
        print("sleeping", file=sys.__stdout__, flush=True)
        time.sleep(100)

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what runs in background
runs.check_finite = sleep
conftest.run(conftest.vae, Path(sys.argv[1]))
"""
posix = pytest.mark.skipif(sys.platform == "win32", reason="sends a POSIX signal")


@pytest.mark.parametrize("end", [pytest.param("ctrl-c", marks=posix), "kill"])
def test_a_process_ended_at_any_time_and_resumed_ends_as_in_one_go(end, finished, tmp_path):
    process = python("-c", NAPPING, tmp_path)
    assert process.stdout.readline() == "sleeping\n"
    process.kill() if end == "kill" else process.send_signal(signal.SIGINT)
    line = "error: interrupted; a training goes on with --resume\n"
    assert process.communicate() == ("", "" if end == "kill" else line)
    assert end == "kill" or process.returncode == 2
    run(vae, tmp_path, resume=True)
    assert contents(tmp_path) == contents(finished(vae).folder)


def test_a_missing_checkpoint_or_one_of_other_options_is_one_line(finished, tmp_path, capsys):
    folder = finished(vae).folder
    assert str(tmp_path / "new") in error_of(capsys, run, vae, tmp_path / "new", resume=True)
    shutil.copytree(folder, tmp_path / "copy")
    for script, options, text in ((vae, {"zdim": 30}, "--zdim is 30, but 20 in"),
                                  (vae, {"epochs": 9}, "--epochs is 9, but 5 in"),
                                  (nf, {"lr": 3e-3, "weight_decay": 0.2}, "--zdim is None, but 20 in")):  # fmt: skip
        line = error_of(capsys, run, script, tmp_path / "copy", resume=True, **options)
        assert f"{text} {tmp_path / 'copy' / 'checkpoint.pt'}" in line
    assert contents(tmp_path / "copy") == contents(folder)


def test_the_random_state_of_a_gpu_is_kept_and_restored(tmp_path, monkeypatch):
    """A stand-in takes the place of PyTorch's module of the device."""
    state, seen = torch.arange(3, dtype=torch.uint8), []
    gpu = type("gpu", (), {"get_rng_state": lambda device: state,
                           "set_rng_state": lambda *args: seen.append(args)})  # fmt: skip
    monkeypatch.setattr(torch, "get_device_module", {"cuda:1": gpu}.__getitem__)
    args = parse(vae, f"--results_dir {tmp_path}")
    args.device = "cuda:1"
    runs.save_checkpoint(args, {"model": nn.Linear(2, 2)}, {"seconds": [1.0]})
    runs.load_checkpoint(args, {"model": nn.Linear(2, 2)}, {"seconds": []})
    assert [(x.tolist(), device) for x, device in seen] == [([0, 1, 2], "cuda:1")]
