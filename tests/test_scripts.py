"""What the scripts share: their form, command line, errors, files, Ctrl-C and resume.

What runs.py does for all of them is tested on the VAE alone, the fastest.
"""

import errno
import functools
import inspect
import io
import itertools
import json
import operator
import os
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GAN, MIXTURE, NF, ROOT, VAE, Results, small, stop_in
from matplotlib.figure import Figure
from torch.utils import _pytree as pytree

import runs
from datasets.mnist import mnist

NAPPING = ROOT / "tests" / "conftest.py"  # the VAE's script, asleep in the middle of an epoch
PACKAGES = {"torch", "torchvision", "numpy", "matplotlib", "scipy", "tqdm", "datasets", "runs"}
LAST = ("metrics.csv", "weights.pt", "summary.json")  # written together, at the end


def error_line(end, status=2):
    """Return the one line `error: ...` with which a run must have ended."""
    assert end.status == status
    assert re.fullmatch(r"error: .+\n", end.err), end.err
    return end.err


def state(run):
    """Return a run's checkpoint without the history, which has seconds; of tensors the hashes."""
    checkpoint = run.checkpoint
    del checkpoint["history"]
    return pytree.tree_map_only(torch.Tensor, lambda x: hash(x.numpy().tobytes()), checkpoint)


def assert_same_results(one, other):
    """Assert that two runs have the same curves, state, weights, numbers and samples."""
    assert one.metrics == other.metrics
    assert state(one) == state(other)
    assert one.bytes["weights.pt"] == other.bytes["weights.pt"]
    assert one.summary["final"] == other.summary["final"]
    assert not list(one.folder.glob(".*"))
    for path in other.folder.glob("*.pdf"):
        assert all(map(np.array_equal, one.pictures(path.stem), other.pictures(path.stem)))


# ------------------------ Form ------------------------
@pytest.mark.parametrize("folder", [".", "datasets", "extension"])
def test_code_uses_only_what_requirements_and_the_repository_have(folder):
    """And no script another one, but the extension the flow's; no torch.distributions."""
    for path in (ROOT / folder).glob("*.py"):
        source = path.read_text()
        packages = set(re.findall(r"^(?:import|from) (\w+)", source, re.MULTILINE))
        allowed = {"a3_nf_template"} if folder == "extension" else set()
        assert packages <= PACKAGES | allowed | sys.stdlib_module_names, path
        assert not re.search(r"\bdistributions\b", source), path


SIGNATURES = {
    VAE: """Encoder(hidden_dim=500, z_dim=20) Encoder.forward(self, input)
        Decoder(hidden_dim=500, z_dim=20) Decoder.forward(self, input)
        VAE(hidden_dim=500, z_dim=20) VAE.forward(self, input) VAE.sample(self, n_samples)
        epoch_iter(model, data, optimizer) run_epoch(model, data, optimizer)
        save_elbo_plot(train_curve, val_curve, filename)""",
    GAN: """Generator() Generator.forward(self, z) Discriminator() Discriminator.forward(self, img)
        train(dataloader, discriminator, generator, optimizer_G, optimizer_D)""",
    NF: """log_prior(x) sample_prior(size) get_mask() Coupling(c_in, mask, n_hidden=1024)
        Coupling.forward(self, z, ldj, reverse=False) Flow(shape, n_flows=4)
        Flow.forward(self, z, logdet, reverse=False) Model(shape) Model.dequantize(self, z)
        Model.logit_normalize(self, z, logdet, reverse=False) Model.forward(self, input)
        Model.sample(self, n_samples) epoch_iter(model, data, optimizer)
        run_epoch(model, data, optimizer) save_bpd_plot(train_curve, val_curve, filename)""",
}


@pytest.mark.parametrize("script", SIGNATURES, ids=str)
def test_names_and_signatures_of_the_template_are_kept(script):
    """What we added to them must not be asked of the template's callers."""
    for name, wanted in re.findall(r"(\S+?)\((.*?)\)", SIGNATURES[script]):
        signature = inspect.signature(operator.attrgetter(name)(script.module))
        found = [str(parameter) for parameter in signature.parameters.values()]
        n = len(re.findall(r"[^, ]+", wanted))
        assert ", ".join(found[:n]) == wanted, name
        assert all("=" in added for added in found[n:]), name


@pytest.mark.parametrize("script", [VAE, NF], ids=str)
def test_the_templates_own_code_may_call_them(script):
    """With any iterable of batches, and plain Adam."""
    module, images = script.module, torch.randint(0, 2, (3, 10, 784)).float()
    model = module.VAE(z_dim=5) if script is VAE else module.Model([784])
    before = [weight.clone() for weight in model.parameters()]
    optimizer = torch.optim.Adam(model.parameters())
    data = list(images) if script is VAE else [(x, None) for x in images]
    train, val = module.run_epoch(model, (data, data[1:]), optimizer)
    assert train != val
    assert any(not torch.equal(x, y) for x, y in zip(before, model.parameters(), strict=True))
    assert type(module.epoch_iter(model.eval(), data, optimizer)) is float


# ------------------------ Command line ------------------------
def test_help_lists_the_options_and_their_defaults(script):
    shown = " ".join(script.run_well("--help").out.split())
    for name, default in vars(script.arguments()).items():
        assert f"--{name} " in shown
        assert name == "results_dir" or f"(default: {default})" in shown


BAD_OPTIONS = [
    (VAE, "above 0", "--epochs 0", "--epochs -1", "--zdim 0", "--batch_size -3", "--lr nan"),
    (VAE, "above -1", "--seed -1"),
    (VAE, "below 2^31", "--batch_size 1000000000000", "--lr inf"),
    (VAE, "memory", "--zdim 2000000000"),
    (VAE, "int", "--epochs 1.5", "--epochs x"),
    (VAE, "cpu", "--device tpu", "--device cuda"),
    (VAE, "dynamic", "--binarization nonsense"),
    (VAE, "unrecognized", "--nonsense 3"),
    (VAE, "a folder", "--results_dir ''"),
    (NF, "above 0", "--epochs 0", "--lr 0"),
    (MIXTURE, "above 0", "--n_mix 0"),
    (GAN, "above 0", "--n_epochs 0", "--latent_dim 0", "--save_interval 0"),
    (GAN, "at least 2", "--batch_size 1", "--latent_dim 1"),
    (GAN, "no batch", "--batch_size 50001"),
]


@pytest.mark.parametrize("case", BAD_OPTIONS, ids=lambda case: f"{case[0]}, {case[1]}")
def test_bad_option_is_one_line_with_its_value_and_what_is_allowed(case, tmp_path, monkeypatch):
    script, allowed, *options = case
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for option in options:
        end = script.run("--results_dir", tmp_path / "new", *shlex.split(option))
        line = error_line(end)
        assert all(word in line for word in (option.split()[1], allowed)), line
        assert end.out == ""
        assert list(tmp_path.iterdir()) == []


def test_damaged_or_missing_data_are_one_line(script, file, tmp_path):
    file.write_bytes(b"nonsense")
    options = ("--results_dir", tmp_path / "new")
    assert str(file) in error_line(script.run(*options))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("below", ["", "results"])
def test_a_results_folder_that_cannot_be_written_is_one_line(script, below, tmp_path):
    (tmp_path / "file").write_text("mine")
    end = script.run(*script.options(tmp_path / "file" / below))
    assert str(tmp_path / "file" / below) in error_line(end)
    assert "epoch" not in end.out
    assert (tmp_path / "file").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


FOLDERS = [  # what does not differ from the defaults has no part in the name
    (VAE, "--epochs 40 --zdim 20 --batch_size 64 --lr 3e-3 --seed 0 --resume", "vae"),
    (GAN, "--n_epochs 200 --batch_size 64 --lr 2e-4 --latent_dim 100 --save_interval 500", "gan"),
    (NF, "--epochs 40 --batch_size 128 --lr 1e-3 --seed 0", "nf"),
    (MIXTURE, "--epochs 40 --n_mix 16 --batch_size 64 --lr 8e-3", "nf_mixture"),
    (MIXTURE, "--n_mix 1", "nf_mixture_n_mix1"),
    (VAE, "--zdim 2 --binarization dynamic --lr 0.01", "vae_zdim2_dynamic_lr0.01"),
    (GAN, "--save_interval 7 --seed 1", "gan_save_interval7_seed1"),
]


@pytest.mark.parametrize(("script", "options", "folder"), FOLDERS, ids=str)
def test_results_folder_is_named_by_the_options(script, options, folder):
    assert script.arguments(*options.split()).results_dir == ROOT / "results" / folder


def test_a_run_in_any_folder_leaves_whole_figures(monkeypatch, tmp_path):
    """With no date in them; without standard error, as behind `2>&-`, locks, and all letters.

    There is no terminal, so no progress bars, just lines.
    """
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")

    def flock(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    with monkeypatch.context() as patch:
        patch.setattr(runs.fcntl, "flock", flock)
        patch.chdir(tmp_path)
        patch.setattr(sys, "stderr", None)
        patch.setattr(sys, "stdout", out)
        VAE.execute(*VAE.options("数据", 1, "--zdim", 2))
    lines = r"training on cpu, results in \\u6570\\u636e\nepoch 1/1 .*\ntest_elbo -\d+\.\d\d\n"
    out.seek(0)
    assert re.fullmatch(lines, out.read())
    assert [path.name for path in tmp_path.iterdir()] == ["数据"]
    for name in (*VAE.figures, "manifold"):
        pdf, png = (tmp_path / "数据" / f"{name}.{kind}" for kind in ("pdf", "png"))
        assert pdf.read_bytes().startswith(b"%PDF")
        assert b"CreationDate" not in pdf.read_bytes()
        assert png.read_bytes().startswith(b"\x89PNG")


def test_a_figure_keeps_the_whole_name(tmp_path):
    runs.save_figure(Figure(), tmp_path / "elbo_lr0.01")
    assert {path.name for path in tmp_path.iterdir()} == {"elbo_lr0.01.pdf", "elbo_lr0.01.png"}


def test_too_little_memory_is_one_line_but_no_other_error(tmp_path):
    def run(error):
        def act(_):
            raise error

        loaders = functools.partial(small, epoch=1, act=act)
        return VAE.run(*VAE.options(tmp_path), loaders=loaders)

    for error in (MemoryError(), RuntimeError("could not create a primitive")):
        assert "memory" in error_line(run(error))
    with pytest.raises(RuntimeError, match="shapes"):
        run(RuntimeError("shapes cannot be multiplied"))


def test_a_reader_that_goes_away_ends_the_run_quietly(start, tmp_path):
    """As `| head -1`."""
    process = start(NAPPING, 99, *VAE.options(tmp_path, 1))
    assert process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=120) == 141
    assert process.stderr.read() == ""


def test_matplotlibs_backend_is_the_scripts_own(script, start, monkeypatch):
    """But not that of its importers: a notebook's is set for its processes, too."""
    inline = "module://matplotlib_inline.backend_inline"
    monkeypatch.setenv("MPLBACKEND", inline)
    exec(script.file.read_text(), {"__name__": "imported", "__file__": str(script.file)})
    assert os.environ["MPLBACKEND"] == inline
    assert script is not VAE or start(VAE.file, "--help").communicate(timeout=120)[1] == ""


CURVES = [(VAE, "ELBO (nats)", [-130.0, -93.0, -95.0], [-99.0, -96.0, -97.0]),
          (NF, "bits per dimension", [2.5, 2.0, 1.8], [2.3, 1.7, 1.9])]  # fmt: skip


@pytest.mark.parametrize(("script", "label", "train", "val"), CURVES, ids=str)
def test_curves_are_shown_without_the_first_training_value(script, label, train, val, monkeypatch):
    """Which is far off; but of one epoch both points."""
    save = script.module.save_elbo_plot if script is VAE else script.module.save_bpd_plot
    monkeypatch.setattr(runs, "save_figure", lambda figure, _: saved.append(figure))
    for n, shown in ((1, train[:1] + val[:1]), (3, train[1:] + val)):
        saved = []
        save(train[:n], val[:n], "curves.pdf")
        (axes,) = saved[0].axes
        low, high = axes.get_ylim()
        assert low < min(shown) < max(shown) < high
        assert (low < train[0] < high) == (n == 1)
        _, curve, *target = axes.get_lines()
        assert list(curve.get_xdata()) == [1, 2, 3][:n]
        assert [line.get_ydata()[0] for line in target] == ([] if script is VAE else [1.85])
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", label)
        script.module.plt.close("all")
    if script is NF:  # without the target that all values are below
        save([1.8], [1.7], "curves.pdf")
        assert len(saved[-1].axes[0].get_lines()) == 2


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
            assert float(shown[name]) == pytest.approx(float(row[name]), rel=1e-3)
    # What is printed is saved.
    assert re.findall(r"^(saved|epoch)\b", run.end.out, re.MULTILINE) == 3 * ["saved", "epoch"]
    if script is not GAN:
        lines = run.lines(script.figures[0])
        for label, name in zip(("training", "validation"), script.metrics, strict=True):
            (curve,) = (lines[key] for key in lines if key.startswith(label))
            assert curve == [float(row[name]) for row in run.metrics]


def test_summary_has_what_it_takes_to_do_the_run_again(script, finished, tmp_path):
    text = (finished(script).folder / "summary.json").read_text()
    summary = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    options, final = summary["options"], summary["final"]
    assert {script.epochs[2:]: 3, "batch_size": 20, "seed": 0}.items() <= options.items()
    assert options == finished(script).checkpoint["options"]
    assert (summary["device"], summary["threads"]) == ("CPU", 1)
    assert torch.__version__ in text
    assert final.keys() == {*script.metrics, *script.final}
    for name in script.metrics:
        assert str(final[name]) == finished(script).metrics[-1][name]  # not rounded

    run = finished(script).copy(tmp_path)  # with curves that end at their other end
    checkpoint = run.checkpoint
    history = checkpoint["history"]
    for column in history.values() if script is GAN else history:
        column.reverse()
    checkpoint["threads"] = threads = 2 if script is VAE else 1  # others take long with two
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    script.run_well(*script.options(tmp_path), "--resume")
    assert run.summary["threads"] == threads
    for name in script.metrics:
        assert str(run.summary["final"][name]) == run.metrics[-1][name]
        assert run.metrics[-1][name] == finished(script).metrics[0][name]


def first_model(script, names):
    """Return the model that the script makes first, with a seed of 0, by the names it defines."""
    torch.manual_seed(0)
    if script is NF:
        return names["Model"]([784]).eval()
    if script is MIXTURE:
        return names["mixture_model"](2).eval()
    return names["VAE" if script is VAE else "Generator"]().eval()


def test_samples_are_drawn_from_the_weights_of_their_epoch(script, finished, tmp_path):
    """From the same latents each time. The VAE's pictures are samples and their means."""
    model = first_model(script, finished(script).end.names)
    if script is GAN:
        finished(GAN).end.names["Discriminator"]()  # draws its weights before the latents
        z = torch.randn(25, 100)
    moments = {"before": 0, **({"first": 1} if script is VAE else {}), "halfway": 3, "after": 5}
    shown = []
    for moment, epoch in moments.items():
        run = Results(tmp_path / moment)
        script.run(*script.options(run.folder, 5), loaders=stop_in(epoch + 1))
        if epoch:
            parts = run.checkpoint["parts"]
            model.load_state_dict(parts["average" if script is GAN else "model"])
        torch.manual_seed(0)
        grids = [(model(z).detach() + 1) / 2] if script is GAN else model.sample(25)
        grids = [grids / 256] if script in (NF, MIXTURE) else grids
        pictures = run.pictures(f"samples_{moment}")
        for picture, images in zip(pictures, grids, strict=True):
            tiles = picture[1:, 1:].reshape(5, 29, 5, 29).swapaxes(1, 2)[:, :, :28, :28]
            np.testing.assert_allclose(tiles, images.view(5, 5, 28, 28), atol=1e-6)
        shown.append(pictures[-1])
    for one, other in itertools.combinations(shown, 2):
        assert abs(one - other).max() > 1e-5


@pytest.mark.parametrize("script", [NF, MIXTURE], ids=str)
def test_interpolation_is_between_the_first_test_images_of_two_digits(script, finished):
    """Decoded as they were encoded, with the noise of dequantization."""
    data, final = mnist(batch_size=20), finished(script).summary["final"]
    small(data)
    labels = data[2].labels.tolist()
    other = next(i for i, label in enumerate(labels) if label != labels[0])
    assert (final["digit_from"], final["digit_to"]) == (labels[0], labels[other])
    (picture,) = finished(script).pictures("interpolation")
    for i, row in ((0, 0), (8, other)):
        image = data[2].images[row].view(28, 28).numpy()
        noise = 256 * picture[1:29, 29 * i + 1 : 29 * i + 29] - image
        assert noise.min() > -0.1
        assert noise.max() < 1.1


# ------------------------ Ctrl-C and --resume ------------------------
no_training = functools.partial(small, epoch=1, batch=1, act=lambda _: pytest.fail("trained"))


def test_ctrl_c_and_resume_end_as_an_uninterrupted_run(script, finished, tmp_path):
    """In the first epoch there is nothing to resume, and behind the last one nothing to train."""
    end = script.run(*script.options(tmp_path), loaders=stop_in(1))
    assert "checkpoint.pt" not in error_line(end, status=130)
    assert Results(tmp_path).bytes == {}
    error_line(script.run(*script.options(tmp_path), "--resume"))
    end = script.run(*script.options(tmp_path), loaders=stop_in(2))
    assert str(tmp_path / "checkpoint.pt") in error_line(end, status=130)
    assert Results(tmp_path).bytes.keys() == {"checkpoint.pt"}
    torch.set_num_threads(2)  # other ones than the run was begun with, whose sums round otherwise
    end = script.run_well(*script.options(tmp_path), "--resume")
    assert torch.get_num_threads() == 1
    assert re.findall(r"^epoch (\d)", end.out, re.MULTILINE) == ["2", "3"]
    assert_same_results(Results(tmp_path), finished(script))
    script.run_well(*script.options(tmp_path), "--resume", loaders=no_training)
    assert_same_results(Results(tmp_path), finished(script))


def test_a_process_killed_in_the_middle_of_an_epoch_and_resumed(finished, start, tmp_path):
    """By a kill that it cannot see coming. Until then no other run may write into its folder."""
    process = start(NAPPING, 3, *VAE.options(tmp_path))
    assert "sleeping\n" in iter(process.stdout.readline, "")
    before = Results(tmp_path).bytes
    for more in ((), ("--resume",)):
        end = VAE.run(*VAE.options(tmp_path, 3, *more), loaders=no_training)
        assert str(tmp_path) in error_line(end)
    assert Results(tmp_path).bytes == before
    process.kill()
    assert process.communicate(timeout=120)[1] == ""
    VAE.run_well(*VAE.options(tmp_path), "--resume")
    assert_same_results(Results(tmp_path), finished(VAE))


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

    run = finished(VAE).copy(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", cut_off)
        end = VAE.run(*VAE.options(tmp_path))
    line = error_line(end, 1 if error is FULL else 130)
    assert "epoch 2" in end.out
    assert ("epoch 3" in end.out) == (name != "checkpoint.pt")  # printed is what is saved
    assert error is not FULL or f"{tmp_path / name}: {FULL.strerror}" in line
    assert all(run.bytes[name] == finished(VAE).bytes[name] for name in LAST)
    assert len(run.checkpoint["history"][0]) == (2 if name == "checkpoint.pt" else 3)
    VAE.run_well(*VAE.options(tmp_path), "--resume")
    assert_same_results(run, finished(VAE))


def add_option(path):
    state = torch.load(path, weights_only=True)
    torch.save(state | {"options": state["options"] | {"more": 3}}, path)


OTHERS = {  # what was done to checkpoint.pt, or the options that differ from those in it
    "of more options": add_option,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    "numbers": lambda path: torch.save({"options": 3, "parts": 4}, path),
    "another script's": lambda path: NF.run_well(*NF.options(path.parent, 1)),
    **dict.fromkeys(("--epochs 4", "--zdim 30", "--binarization dynamic")),
}


@pytest.mark.parametrize(("option", "damage"), OTHERS.items(), ids=OTHERS)
def test_a_checkpoint_that_is_another_or_none_is_one_line(option, damage, finished, tmp_path):
    run, words = finished(VAE).copy(tmp_path), [] if damage else option.split()
    if damage:
        damage(tmp_path / "checkpoint.pt")
    before = run.bytes
    end = VAE.run(*VAE.options(tmp_path, 3, "--resume", *words), loaders=no_training)
    line = error_line(end)
    assert str(tmp_path / "checkpoint.pt") in line
    if words:
        assert f"{' is '.join(words)}, but {run.checkpoint['options'][words[0][2:]]} in " in line
    assert (end.out, run.bytes) == ("", before)


# ------------------------ Losses and weights that are not finite ------------------------
NETWORKS = [(VAE, 0), (GAN, 0), (GAN, 1), (NF, 0), (MIXTURE, 0)]


@pytest.mark.parametrize(("script", "number"), NETWORKS, ids=str)
def test_a_weight_that_is_not_finite_does_not_reach_the_disk(script, number, tmp_path, monkeypatch):
    """In any network: put there behind the last step of epoch 2, which no loss has seen."""
    check_finite = runs.check_finite

    def spoil(epoch, losses, *networks):
        assert len(losses) == len(script.metrics)
        if epoch == 2:
            list(networks[number].parameters())[-1].data[0] = torch.inf
        check_finite(epoch, losses, *networks)

    monkeypatch.setattr(runs, "check_finite", spoil)
    line = error_line(script.run(*script.options(tmp_path)), status=1)
    assert all(text in line for text in ("epoch 2", str(tmp_path / "checkpoint.pt")))
    history = Results(tmp_path).checkpoint["history"]
    assert len(history["epoch"] if script is GAN else history[0]) == 1
    assert not (tmp_path / "samples_halfway.pdf").exists()
    for losses in ((torch.nan, 1.0), (1.0, -torch.inf)):
        with pytest.raises(FloatingPointError, match="epoch 7"):
            check_finite(7, losses)
