"""What the three scripts share: their form, command line, errors, files, Ctrl-C and resume.

What the shared block does is tested on the VAE alone, the fastest: the block is the same in all.
"""

import ast
import functools
import inspect
import json
import math
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import (
    GAN,
    NF,
    ROOT,
    SCRIPTS,
    VAE,
    Results,
    end_of,
    poison,
    save_pictures,
    small,
    stop_in,
)

from datasets.bmnist import bmnist
from datasets.mnist import ShiftedLoader, mnist

BEGIN = "# >>> shared block: the same characters in all three scripts >>>\n"
END = "# <<< shared block <<<\n"
ALLOWED_IMPORTS = {"torch", "torchvision", "numpy", "matplotlib", "scipy", "tqdm", "datasets"}


def error_line(end, status=2):
    """Return the one line `error: ...` with which a run must have ended."""
    assert end.status == status
    assert re.fullmatch(r"error: .+\n", end.err), end.err
    return end.err


def assert_same(a, b, where="checkpoint"):
    """Assert that two nested structures are equal, tensors bit for bit, but for the seconds."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a.keys() - {"seconds", "sample_ms"}:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def assert_same_results(one, other):
    """Assert that two runs have the same curves, state, weights, numbers and samples."""
    assert one.metrics == other.metrics
    assert_same(one.checkpoint, other.checkpoint)
    assert_same(one.weights, other.weights, "weights")
    assert_same(one.summary["final"], other.summary["final"], "final")
    for name in ("samples_before", "samples_halfway", "samples_after"):
        assert_same([p.tolist() for p in one.pictures(name)],
                    [p.tolist() for p in other.pictures(name)], name)  # fmt: skip


# ---------------------------------------------------------------------------------------
# Form
# ---------------------------------------------------------------------------------------
def test_the_shared_block_is_the_same_in_the_three_scripts():
    sources = [script.file.read_text() for script in SCRIPTS]
    for source in sources:
        assert (source.count(BEGIN), source.count(END)) == (1, 1)
    (block,) = {source.split(BEGIN)[1].split(END)[0] for source in sources}
    assert "def fail(" in block


def imports(tree):
    """Yield the full names that a syntax tree imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_nothing_uses_torch_distributions(script):
    """Nor has it any other use for the word."""
    for path in (script.file, *ROOT.glob("datasets/*.py")):
        assert not re.search(r"\bdistributions\b", path.read_text())


def test_scripts_import_only_what_requirements_and_the_repository_have(script):
    packages = {name.split(".")[0] for name in imports(ast.parse(script.file.read_text()))}
    assert packages <= ALLOWED_IMPORTS | sys.stdlib_module_names


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
    for name, wanted in re.findall(r"(\S+?)\((.*?)\)", SIGNATURES[script]):
        thing = script.module
        for part in name.split("."):
            thing = getattr(thing, part)
        parameters = list(inspect.signature(thing).parameters.values())
        n = len(wanted.split(", ")) if wanted else 0
        assert ", ".join(map(str, parameters[:n])) == wanted, name
        # What we added must not be asked of those who call it as the template does.
        assert all(parameter.default is not parameter.empty for parameter in parameters[n:]), name


# ---------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------
DEFAULTS = {
    VAE: {"epochs": 40, "zdim": 20, "binarization": "static", "iw_samples": 1000},
    NF: {"epochs": 40},
    GAN: {"n_epochs": 200, "batch_size": 64, "lr": 2e-4, "latent_dim": 100, "save_interval": 500},
}


def test_defaults_are_those_of_the_template(script):
    """And --help shows them."""
    options = vars(script.arguments())
    shown = script.run_well("--help").out
    assert all(f"--{name}" in shown for name in options)
    assert DEFAULTS[script].items() <= options.items()
    assert (options["precision"], options["seed"]) == ("auto", 0)
    assert (options["resume"], options["fast_dev_run"]) == (False, False)


WHOLE, POSITIVE = "whole number above 0", "a number above 0"
BAD_OPTIONS = {
    (VAE, WHOLE): ("--epochs 0", "--epochs 1.5", "--epochs x", "--batch_size -3", "--zdim 0",
                   "--iw_samples 0"),
    (VAE, POSITIVE): ("--lr 0", "--lr nan", "--lr inf"),
    (VAE, "whole number above -1"): ("--seed -1",),
    (VAE, "cpu"): ("--device tpu", "--device cuda"),
    (VAE, "bfloat16"): ("--precision float16",),
    (VAE, "larochelle"): ("--binarization nonsense",),
    (VAE, "unrecognized"): ("--nonsense 3", "--epoch 3"),  # no name is guessed
    (NF, WHOLE): ("--epochs 0",),
    (NF, POSITIVE): ("--lr 0",),
    (NF, "mixture"): ("--coupling additive",),
    (GAN, WHOLE): ("--n_epochs 0", "--latent_dim 0", "--save_interval 0"),
    (GAN, POSITIVE): ("--lr 0",),
    (GAN, "whole number above 1"): ("--eval_samples 1",),
    (GAN, "at least 2"): ("--batch_size 1",),
}  # fmt: skip


@pytest.mark.parametrize(
    ("script", "option", "allowed"),
    [(script, option, allowed) for (script, allowed), options in BAD_OPTIONS.items()
     for option in options],
    ids=str,
)  # fmt: skip
def test_bad_option_is_one_line_with_the_value_and_what_is_allowed(
    script, option, allowed, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    end = script.run("--results_dir", tmp_path / "new", *option.split())
    line = error_line(end)
    assert all(word in line for word in [*option.split(), allowed])
    assert end.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("data_dir", ["/etc/passwd", "no such folder", "."])
def test_a_data_folder_without_data_is_one_line(script, data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    end = script.run("--results_dir", "new", "--data_dir", data_dir)
    assert str(Path(data_dir, "mnist.npz")) in error_line(end)
    assert list(tmp_path.iterdir()) == []


def test_damaged_or_missing_files_of_data_are_one_line(tmp_path):
    (tmp_path / "mnist.npz").write_bytes(b"nonsense")
    options = ("--results_dir", tmp_path / "new", "--data_dir", tmp_path)
    assert str(tmp_path / "mnist.npz") in error_line(VAE.run(*options))
    end = VAE.run(*options, "--binarization", "larochelle")
    assert str(tmp_path / "binarized_mnist_train.amat") in error_line(end)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("below", ["", "results"])
def test_a_results_folder_that_cannot_be_written_is_one_line(script, below, tmp_path):
    (tmp_path / "file").write_text("mine")
    end = script.run(*script.options(tmp_path / "file" / below))
    assert str(tmp_path / "file" / below) in error_line(end)
    assert end.out == ""
    assert (tmp_path / "file").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("script", "options", "folder"),
    [
        (VAE, "", "vae"),
        (VAE, "--zdim 2", "vae_zdim2"),
        (VAE, "--binarization dynamic", "vae_dynamic"),
        (VAE, "--epochs 10", "vae_epochs10"),
        (VAE, "--epochs 40 --seed 0 --zdim 20", "vae"),  # what does not differ from the defaults
        (VAE, "--resume --iw_samples 5 --data_dir x", "vae"),  # what does not shape the training
        (VAE, "--precision bfloat16", "vae_bfloat16"),
        (VAE, "--fast_dev_run", "vae_fast_dev_run"),
        (VAE, "--zdim 2 --lr 0.01", "vae_zdim2_lr0.01"),
        (GAN, "", "gan"),
        (GAN, "--n_epochs 40 --seed 1", "gan_n_epochs40_seed1"),
        (GAN, "--eval_samples 9 --save_interval 7", "gan"),
        (NF, "", "nf"),
        (NF, "--coupling mixture", "nf_mixture"),
    ],
    ids=str,
)
def test_results_folder_is_named_by_the_options_that_shape_the_training(script, options, folder):
    assert script.arguments(*options.split()).results_dir == ROOT / "results" / folder


def test_a_process_trains_briefly_in_any_folder(tmp_path):
    """With whole figures. No terminal, so just the lines."""
    options = VAE.options("here", 3, "--fast_dev_run", "--zdim", 2, "--precision", "auto")
    end = end_of(VAE.start(*options, cwd=tmp_path))
    assert (end.status, end.err) == (0, "")
    first, *_, last = end.out.splitlines()
    assert re.fullmatch(r"training on cpu in b?float(16|32), results in here", first)
    assert "test_elbo" in last
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    results = Results(tmp_path / "here")
    assert [row["epoch"] for row in results.metrics] == ["1"]
    for name in (*VAE.figures, "manifold", "latent_space"):
        for suffix, start in ((".pdf", b"%PDF"), (".png", b"\x89PNG")):
            assert (results.folder / f"{name}{suffix}").read_bytes().startswith(start)


def test_fast_dev_run_is_one_epoch_of_two_batches(script, tmp_path):
    made = []
    script.run_well(*script.options(tmp_path, 3, "--fast_dev_run"), loaders=made.extend)
    assert [len(loader) for loader in made] == [2, 2, 2]
    assert [row["epoch"] for row in Results(tmp_path).metrics] == ["1"]


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (VAE, lambda size: bmnist(batch_size=size)),
        (NF, lambda size: mnist(batch_size=size)),
        (GAN, lambda size: mnist(batch_size=size, n_train=50_000, shift=False, drop_last=True)),
    ],
    ids=str,
)
def test_scripts_train_on_all_images_of_the_split(script, expected, tmp_path):
    """And only the flow shifts them, the training images alone."""
    seen = []

    def loaders(made):
        for loader, other in zip(made, expected(20), strict=True):
            assert type(loader) is type(other)
            assert (loader.shuffle, loader.drop_last) == (other.shuffle, other.drop_last)
            assert torch.equal(loader.images, other.images)
            seen.append(isinstance(loader, ShiftedLoader))
        small(made)

    script.run_well(*script.options(tmp_path, 1), loaders=loaders)
    assert seen == [script is NF, False, False]


# ---------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------
def test_every_file_is_there_and_no_temporary_one(script, finished):
    names = {path.name for path in finished(script).folder.iterdir() if path.is_file()}
    figures = {f"{name}.{kind}" for name in script.figures for kind in ("pdf", "png")}
    assert names == {"metrics.csv", "summary.json", "checkpoint.pt", "weights.pt"} | figures


def test_an_epoch_is_a_row_of_metrics_and_a_line(script, finished):
    run = finished(script)
    assert list(run.metrics[0]) == ["epoch", *script.metrics]
    assert [row["epoch"] for row in run.metrics] == ["1", "2", "3"]
    lines = re.findall(r"^epoch [1-9].*$", run.end.out, re.MULTILINE)
    for row, line in zip(run.metrics, lines, strict=True):
        shown = dict(re.findall(r"(\w+) ([-\d.e+]+)", line))
        for name in script.metrics:
            assert math.isfinite(float(row[name]))
            assert float(shown[name]) == pytest.approx(float(row[name]), rel=1e-3)


def test_summary_has_what_it_takes_to_do_the_run_again(script, finished):
    text = (finished(script).folder / "summary.json").read_text()
    summary = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    options, final = summary["options"], summary["final"]
    expected = {script.epochs[2:]: 3, "batch_size": 20, "precision": "float32", "seed": 0}
    assert expected.items() <= options.items()
    assert (summary["device"], summary["threads"]) == ("CPU", 1)
    assert summary["versions"]["torch"] == torch.__version__
    seconds = finished(script).checkpoint["history"]["seconds"]
    assert summary["training_seconds"] == pytest.approx(sum(seconds))
    assert summary["epoch_seconds"] == pytest.approx(sorted(seconds)[1])
    assert set(script.final) <= final.keys()
    assert all(math.isfinite(v) for v in final.values() if isinstance(v, int | float))
    for name in final.keys() & set(script.metrics):
        assert str(final[name]) == finished(script).metrics[-1][name]  # not rounded


def test_weights_are_those_of_the_last_checkpoint(script, finished):
    """Of the GAN those of the averaged generator."""
    parts = finished(script).checkpoint["parts"]
    assert_same(finished(script).weights, parts["average" if script is GAN else "model"])


def test_a_new_start_keeps_the_old_results_until_its_first_epoch_is_complete(finished, tmp_path):
    run = finished.copy(VAE, tmp_path)
    other = VAE.options(tmp_path, 3, "--seed", 1)
    assert VAE.run(*other, loaders=stop_in(1)).status == 130
    assert run.bytes == finished(VAE).bytes
    assert VAE.run(*other, loaders=stop_in(2)).status == 130
    assert run.checkpoint["options"]["seed"] == 1
    assert run.metrics[0]["train_elbo"] != finished(VAE).metrics[0]["train_elbo"]
    assert run.bytes.keys() == {"checkpoint.pt", "metrics.csv"}  # no numbers of the old run


# ---------------------------------------------------------------------------------------
# Ctrl-C and --resume
# ---------------------------------------------------------------------------------------
def test_ctrl_c_and_resume_end_as_an_uninterrupted_run(script, finished, tmp_path):
    end = script.run(*script.options(tmp_path), loaders=stop_in(2))
    assert str(tmp_path / "checkpoint.pt") in error_line(end, status=130)
    assert len(Results(tmp_path).metrics) == 1
    assert not (tmp_path / "summary.json").exists()
    end = script.run_well(*script.options(tmp_path), "--resume")
    assert re.findall(r"^epoch (\d)", end.out, re.MULTILINE) == ["2", "3"]
    assert_same_results(Results(tmp_path), finished(script))


def test_ctrl_c_in_the_first_epoch_leaves_nothing_to_resume(script, tmp_path):
    end = script.run(*script.options(tmp_path), loaders=stop_in(1))
    assert "no epoch was saved" in error_line(end, status=130)
    assert Results(tmp_path).bytes == {}


def test_ctrl_c_as_a_signal_and_resume_end_as_an_uninterrupted_run(finished, tmp_path):
    process = VAE.start_napping(3, *VAE.options(tmp_path))
    while (line := process.stdout.readline()) and not line.startswith("epoch 2"):
        pass
    process.send_signal(signal.SIGINT)
    error_line(end_of(process), status=130)
    VAE.run_well(*VAE.options(tmp_path), "--resume")
    run, whole = Results(tmp_path), finished(VAE)
    assert_same(run.checkpoint, whole.checkpoint)
    assert_same(run.summary["final"], whole.summary["final"])


def test_ctrl_c_while_an_epoch_is_saved_loses_at_most_that_epoch(finished, tmp_path, monkeypatch):
    """The checkpoint of epoch 3 is cut off."""
    saved, save = [], torch.save

    def cut_off(state, path):
        save(state, path)
        saved.append(path)
        if len(saved) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", cut_off)
    error_line(VAE.run(*VAE.options(tmp_path)), status=130)
    assert len(Results(tmp_path).checkpoint["history"]["val_elbo"]) == 2
    assert not list(tmp_path.glob(".*"))
    VAE.run_well(*VAE.options(tmp_path), "--resume")
    assert_same_results(Results(tmp_path), finished(VAE))


def no_training(loaders):
    """Make the loaders small, and let none of them give a training batch."""
    small(loaders, epoch=1, batch=1, act=lambda _: pytest.fail("trained"))


def test_ctrl_c_in_the_evaluation_and_resume(script, finished, tmp_path):
    """In the first figure after the training; resumed, nothing is trained again."""

    def savefig(figure, path, **_):
        if path.name.split(".")[2] in ("elbo", "bpd", "training"):
            raise KeyboardInterrupt
        save_pictures(figure, path)

    error_line(script.run(*script.options(tmp_path), savefig=savefig), status=130)
    assert not (tmp_path / "summary.json").exists()
    end = script.run_well(*script.options(tmp_path), "--resume", loaders=no_training)
    assert not re.search(r"^epoch \d", end.out, re.MULTILINE)
    assert_same_results(Results(tmp_path), finished(script))


def test_another_seed_is_another_run(script, finished, tmp_path):
    script.run_well(*script.options(tmp_path, 1, "--seed", 1))
    one, other = Results(tmp_path).metrics[0], finished(script).metrics[0]
    assert all(one[name] != other[name] for name in script.metrics)


def test_resume_goes_on_in_the_precision_of_the_checkpoint(tmp_path):
    whole, broken = Results(tmp_path / "whole"), Results(tmp_path / "broken")
    bfloat16 = ("--precision", "bfloat16")
    VAE.run_well(*VAE.options(whole.folder, 2, *bfloat16))
    options = VAE.options(broken.folder, 2)
    assert VAE.run(*options, *bfloat16, loaders=stop_in(2)).status == 130
    VAE.run_well(*options, "--precision", "auto", "--resume")
    assert_same_results(broken, whole)


def test_resume_with_nothing_to_resume_is_one_line(tmp_path):
    end = VAE.run(*VAE.options(tmp_path / "new"), "--resume")
    assert str(tmp_path / "new") in error_line(end)
    assert list(tmp_path.iterdir()) == []


def without_weights(path):
    state = torch.load(path, weights_only=True)
    torch.save({key: state[key] for key in state if key != "parts"}, path)


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    "garbage": lambda path: path.write_bytes(b"garbage" * 1000),
    "empty": lambda path: path.write_bytes(b""),
    "module": lambda path: torch.save(torch.nn.Linear(2, 2), path),
    "numbers": lambda path: torch.save({"options": 3, "rng": 4}, path),
    "without weights": without_weights,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_checkpoint_is_one_line(damage, finished, tmp_path):
    run = finished.copy(VAE, tmp_path)
    damage(tmp_path / "checkpoint.pt")
    before = run.bytes
    end = VAE.run(*VAE.options(tmp_path), "--resume", loaders=no_training)
    assert str(tmp_path / "checkpoint.pt") in error_line(end)
    assert end.out == ""
    assert run.bytes == before


def test_checkpoint_of_another_script_is_one_line(finished, tmp_path):
    run = finished.copy(NF, tmp_path)
    end = VAE.run(*VAE.options(tmp_path), "--resume", loaders=no_training)
    assert str(tmp_path / "checkpoint.pt") in error_line(end)
    assert run.bytes == finished(NF).bytes


@pytest.mark.parametrize(
    "option",
    ["--epochs 4", "--lr 0.5", "--seed 7", "--batch_size 10", "--precision bfloat16", "--zdim 3",
     "--binarization dynamic"],
)  # fmt: skip
def test_checkpoint_of_other_options_is_refused_by_name(option, finished, tmp_path):
    run = finished.copy(VAE, tmp_path)
    name, value = option.split()
    end = VAE.run(*VAE.options(tmp_path, 3, name, value, "--resume"), loaders=no_training)
    line = error_line(end)
    assert f"{name} is {value}" in line
    assert str(run.checkpoint["options"][name[2:]]) in line
    assert run.bytes == finished(VAE).bytes


# ---------------------------------------------------------------------------------------
# Losses and weights that are not finite
# ---------------------------------------------------------------------------------------
def all_finite(state):
    return all(
        tensor.isfinite().all()
        for part in state["parts"].values()
        for tensor in part.values()
        if isinstance(tensor, torch.Tensor)
    )


def test_nonfinite_loss_names_its_batch_and_keeps_the_checkpoint(script, finished, tmp_path):
    loaders = functools.partial(small, epoch=2, batch=2, act=poison)
    line = error_line(script.run(*script.options(tmp_path), loaders=loaders), status=1)
    assert all(text in line for text in ("batch 2", "nan", str(tmp_path / "checkpoint.pt")))
    run = Results(tmp_path)
    assert len(run.metrics) == 1
    assert not (tmp_path / "summary.json").exists()
    script.run_well(*script.options(tmp_path), "--resume")
    assert_same_results(run, finished(script))


@pytest.mark.parametrize(("n_batches", "n_epochs"), [(1, 2), (2, 3)])
def test_absurd_learning_rate_ends_without_bad_weights_on_disk(
    script, n_batches, n_epochs, tmp_path
):
    """The GAN has no loss of the weights that its last step makes: they are looked at as such."""
    loaders = functools.partial(small, n_batches=n_batches)
    end = script.run(*script.options(tmp_path, n_epochs, "--lr", "1e8"), loaders=loaders)
    line = error_line(end, status=1)
    assert not (tmp_path / "weights.pt").exists()
    saved = (tmp_path / "checkpoint.pt").exists()
    assert ("no epoch was saved" in line) == (not saved)
    assert not saved or all_finite(Results(tmp_path).checkpoint)
