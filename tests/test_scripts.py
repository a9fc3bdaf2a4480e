"""What the three scripts share: their form, command line, errors, files, Ctrl-C and resume."""

import ast
import csv
import inspect
import itertools
import json
import math
import re
import shutil
import signal
import sys
from decimal import Decimal

import pytest
import torch
from conftest import GAN, NF, ROOT, SCRIPTS, VAE, Results, end_of, interrupt, poison, small

BEGIN = "# >>> shared block: the same characters in all three scripts >>>\n"
END = "# <<< shared block <<<\n"
ALLOWED_IMPORTS = {"torch", "torchvision", "numpy", "matplotlib", "scipy", "tqdm", "datasets"}


def error_line(end, status=2):
    """Return the one line `error: ...` with which a run must have ended."""
    assert end.status == status
    assert re.fullmatch(r"error: .+\n", end.err), end.err
    return end.err


def assert_same(a, b, where="checkpoint"):
    """Assert that two nested structures are equal, tensors bit for bit."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
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
    """Assert that two runs have the same curve, weights and final numbers, bit for bit."""
    assert one.metrics == other.metrics
    for part in ("parts", "rng", "kept"):
        assert_same(one.checkpoint[part], other.checkpoint[part], part)
    assert one.summary["final"] == other.summary["final"]


# ---------------------------------------------------------------------------------------
# Form
# ---------------------------------------------------------------------------------------
def test_the_shared_block_is_the_same_in_the_three_scripts():
    sources = [script.file.read_text() for script in SCRIPTS]
    for source in sources:
        assert (source.count(BEGIN), source.count(END)) == (1, 1)
    blocks = {source.split(BEGIN)[1].split(END)[0] for source in sources}
    assert len(blocks) == 1
    assert "def fail(" in blocks.pop()


def imports(tree):
    """Yield the full names that a syntax tree imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def uses_distributions(source):
    tree = ast.parse(source)
    names = [
        ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute | ast.Name)
    ]
    return any(
        re.match(r"(torch\.)?distributions\b", name) for name in [*imports(tree), *names]
    )  # a bare name too: an alias of the module


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributions as d",
        "from torch.distributions import Normal",
        "from torch.distributions.normal import Normal",
        "from torch import nn, distributions as d",
        "import torch\nx = torch.distributions.Normal(0, 1)",
    ],
)
def test_every_way_to_torch_distributions_is_seen(source):
    assert uses_distributions(source)
    assert not uses_distributions(source.replace("distributions", "distribution_of_mine"))


def test_nothing_uses_torch_distributions():
    files = [path for path in ROOT.rglob("*.py") if ".venv" not in path.relative_to(ROOT).parts]
    assert {script.file for script in SCRIPTS} < set(files)
    assert [path for path in files if uses_distributions(path.read_text())] == []


def test_scripts_import_only_what_requirements_and_the_repository_have(script):
    packages = {name.split(".")[0] for name in imports(ast.parse(script.file.read_text()))}
    assert packages <= ALLOWED_IMPORTS | sys.stdlib_module_names


SIGNATURES = """
vae Encoder(hidden_dim=500, z_dim=20)
vae Encoder.forward(self, input)
vae Decoder(hidden_dim=500, z_dim=20)
vae Decoder.forward(self, input)
vae VAE(hidden_dim=500, z_dim=20)
vae VAE.forward(self, input)
vae VAE.sample(self, n_samples)
vae epoch_iter(model, data, optimizer)
vae run_epoch(model, data, optimizer)
vae save_elbo_plot(train_curve, val_curve, filename)
vae main()
gan Generator()
gan Generator.forward(self, z)
gan Discriminator()
gan Discriminator.forward(self, img)
gan train(dataloader, discriminator, generator, optimizer_G, optimizer_D)
gan main()
nf log_prior(x)
nf sample_prior(size)
nf get_mask()
nf Coupling(c_in, mask, n_hidden=1024)
nf Coupling.forward(self, z, ldj, reverse=False)
nf Flow(shape, n_flows=4)
nf Flow.forward(self, z, logdet, reverse=False)
nf Model(shape)
nf Model.dequantize(self, z)
nf Model.logit_normalize(self, z, logdet, reverse=False)
nf Model.forward(self, input)
nf Model.sample(self, n_samples)
nf epoch_iter(model, data, optimizer)
nf run_epoch(model, data, optimizer)
nf save_bpd_plot(train_curve, val_curve, filename)
nf main()
"""


@pytest.mark.parametrize("line", SIGNATURES.split("\n")[1:-1])
def test_names_and_signatures_of_the_template_are_kept(line):
    name, wanted = line.split(" ", 1)
    function, wanted = wanted[:-1].split("(")
    thing = next(script for script in SCRIPTS if script.name == name).module
    for part in function.split("."):
        thing = getattr(thing, part)
    parameters = list(inspect.signature(thing).parameters.values())
    n = len(wanted.split(", ")) if wanted else 0
    assert ", ".join(map(str, parameters[:n])) == wanted
    # What we added must not be asked of those who call it as the template does.
    assert all(parameter.default is not parameter.empty for parameter in parameters[n:])


# ---------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("script", "defaults"),
    [
        (VAE, {"epochs": 40, "zdim": 20, "binarization": "static", "iw_samples": 1000}),
        (NF, {"epochs": 40}),
        (
            GAN,
            {
                "n_epochs": 200,
                "batch_size": 64,
                "lr": 0.0002,
                "latent_dim": 100,
                "save_interval": 500,
            },
        ),
    ],
    ids=str,
)
def test_defaults_are_those_of_the_template(script, defaults, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script.file.name])
    options = vars(script.module.parse_options())
    assert {name: options[name] for name in defaults} == defaults
    assert not options["resume"]
    assert not options["fast_dev_run"]
    assert (options["device"], options["precision"]) == ("auto", "auto")


def test_help_explains_each_option_in_one_line_with_its_default(script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    end = script.main("--help")
    assert (end.status, end.err) == (0, "")
    lines = re.findall(r"^  (--\w+)(?: \S.*?)?(?:  +|\n {10,})(\S.*)$", end.out, re.MULTILINE)
    explained = dict(lines)
    shared = "seed device batch_size lr results_dir resume precision fast_dev_run"
    assert {f"--{name}" for name in shared.split()} | {script.epochs} <= explained.keys()
    assert end.out.count("\n  -") == len(lines) + 1  # -h is the other
    for option, text in explained.items():
        if option not in ("--resume", "--fast_dev_run", "--results_dir"):
            assert re.search(r"\w.* \(default: \S+\)$", text), option


WHOLE, POSITIVE = "whole number from 1", "number above 0"
BAD_OPTIONS = [
    ("{epochs} 0", WHOLE),
    ("{epochs} -1", WHOLE),
    ("{epochs} x", WHOLE),
    ("{epochs} 1.5", WHOLE),
    ("--batch_size 0", WHOLE),
    ("--batch_size -3", WHOLE),
    ("--lr 0", POSITIVE),
    ("--lr -1", POSITIVE),
    ("--lr nan", POSITIVE),
    ("--lr inf", POSITIVE),
    ("--lr x", POSITIVE),
    ("--seed -1", "whole number from 0"),
    ("--device tpu", "cpu"),
    ("--device cuda", "cpu"),
    ("--precision float16", "bfloat16"),
    ("--nonsense 3", ""),
]


@pytest.mark.parametrize(
    ("script", "option", "allowed"),
    [
        *((script, *bad) for script in SCRIPTS for bad in BAD_OPTIONS),
        (VAE, "--zdim 0", WHOLE),
        (VAE, "--zdim -2", WHOLE),
        (VAE, "--iw_samples 0", WHOLE),
        (VAE, "--binarization nonsense", "larochelle"),
        (GAN, "--latent_dim 0", WHOLE),
        (GAN, "--save_interval 0", WHOLE),
        (GAN, "--eval_samples 1", "whole number from 2"),
        (GAN, "--batch_size 1", "at least 2"),
    ],
    ids=str,
)
def test_bad_option_is_one_line_with_the_value_and_what_is_allowed(
    script, option, allowed, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    name, value = option.format(epochs=script.epochs).split()
    end = script.main("--results_dir", tmp_path / "new", name, value)
    line = error_line(end)
    assert name in line
    assert value in line
    assert allowed in line
    assert end.out == ""
    assert list(tmp_path.iterdir()) == []


def test_bad_option_ends_the_process_with_status_2(tmp_path):
    end = end_of(VAE.start("--epochs", "0", "--results_dir", "new", cwd=tmp_path))
    assert WHOLE in error_line(end)
    assert end.out == ""
    assert list(tmp_path.iterdir()) == []


def test_missing_larochelle_files_are_one_line(tmp_path):
    options = ("--binarization", "larochelle", "--data_dir", tmp_path)
    end = VAE.main("--results_dir", tmp_path / "new", *options)
    assert str(tmp_path / "binarized_mnist_train.amat") in error_line(end)
    assert list(tmp_path.iterdir()) == []


def test_damaged_data_are_one_line(script, tmp_path):
    (tmp_path / "mnist.npz").write_bytes(b"nonsense")
    end = script.main("--results_dir", tmp_path / "new", "--data_dir", tmp_path)
    assert str(tmp_path / "mnist.npz") in error_line(end)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("below", ["", "results"])
def test_results_folder_that_cannot_be_written_is_one_line(script, below, tmp_path):
    (tmp_path / "file").write_text("mine")
    folder = tmp_path / "file" / below
    end = script.main(*script.options(folder))
    assert str(folder) in error_line(end)
    assert end.out == ""
    assert (tmp_path / "file").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_default_results_folder_is_beside_the_script(script):
    assert script.module.REPOSITORY == ROOT


@pytest.mark.parametrize(
    ("script", "options", "folder"),
    [
        (VAE, "", "vae_z20"),
        (VAE, "--binarization dynamic", "vae_z20_dynamic"),
        (VAE, "--zdim 2", "vae_z2"),
        (GAN, "", "gan"),
        (NF, "", "nf"),
    ],
    ids=str,
)
def test_results_folder_is_named_after_the_options(script, options, folder, tmp_path):
    def patch(monkeypatch, module):
        monkeypatch.setattr(module, "REPOSITORY", tmp_path)

    end = script.main(script.epochs, 1, *script.small, *options.split(), patch=patch)
    assert (end.status, end.err) == (0, "")
    assert [path.name for path in (tmp_path / "results").iterdir()] == [folder]
    assert (tmp_path / "results" / folder / "summary.json").is_file()


def test_fast_dev_run_is_one_epoch_of_two_batches(script, tmp_path):
    made = []

    def full(make):
        def loaders(*args, **kwargs):
            made.extend(make(*args, **kwargs))
            return tuple(made)

        return loaders

    end = script.main(*script.options(tmp_path), "--fast_dev_run", loaders=full)
    assert (end.status, end.err) == (0, "")
    assert [len(loader) for loader in made] == [2, 2, 2]
    assert [row["epoch"] for row in Results(tmp_path).metrics] == ["1"]


@pytest.mark.parametrize("batch_size", [2, 4])
def test_fast_dev_run_works_with_tiny_batches(script, batch_size, tmp_path):
    options = (*script.options(tmp_path), "--fast_dev_run", "--batch_size", batch_size)
    end = script.main(*options)
    assert (end.status, end.err) == (0, "")


def test_scripts_run_as_processes_in_any_folder(tmp_path):
    """Relative results lie in the working directory; no terminal, so just the lines."""
    more = ("--fast_dev_run", "--seed", "1")
    processes = [
        (script, script.start(*script.options(script.name), *more, cwd=tmp_path))
        for script in SCRIPTS
    ]
    for script, process in processes:
        end = end_of(process)
        assert (end.status, end.err) == (0, "")
        first, *_, last = end.out.splitlines()
        shown = "  ".join(f"{name} \\S+" for name in script.metrics)
        assert re.match(f"epoch 1/1  {shown}  ", first)
        assert last.endswith(f" {script.name}")
        assert Results(tmp_path / script.name).summary["seed"] == 1
    assert len(list(tmp_path.iterdir())) == 3


# ---------------------------------------------------------------------------------------
# Compiled networks
# ---------------------------------------------------------------------------------------
def test_graphs_of_the_networks_compute_the_same(script, tmp_path):
    """As --compile traces them, the code that it makes of them left out, which takes long."""

    def patch(monkeypatch, module):
        compiled = torch.compile

        def trace(function, **_):
            return compiled(function, backend="aot_eager")

        monkeypatch.setattr(torch, "compile", trace)

    for name, more, patches in (("eager", (), None), ("traced", ("--compile",), patch)):
        end = script.main(*script.options(tmp_path / name, 1), *more, patch=patches)
        assert (end.status, end.err) == (0, "")
    eager, traced = (Results(tmp_path / name).metrics[0] for name in ("eager", "traced"))
    for name in script.metrics:
        assert float(traced[name]) == pytest.approx(float(eager[name]), rel=1e-4)
    assert Results(tmp_path / "traced").summary["options"]["compile"] is True


@pytest.mark.skipif(not shutil.which("c++"), reason="compiling needs a C++ compiler")
def test_compiled_networks_train(tmp_path, finished):
    end = VAE.main(*VAE.options(tmp_path), "--compile")
    assert end.status == 0  # it may have warned that there is no GPU
    for row, eager in zip(Results(tmp_path).metrics, finished(VAE).metrics, strict=True):
        # Compiled code draws the noise in an order of its own.
        for name in VAE.metrics:
            assert float(row[name]) == pytest.approx(float(eager[name]), rel=0.05)


def test_compile_without_a_compiler_is_one_line(tmp_path, monkeypatch):
    for variable in ("PATH", "CXX", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "cache"))
    end = end_of(VAE.start(*VAE.options(tmp_path / "new"), "--compile"))
    assert "C++ compiler" in error_line(end)
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------
def test_every_file_is_there_and_no_temporary_one(script, finished):
    names = {path.name for path in finished(script).folder.iterdir() if path.is_file()}
    figures = {f"{name}.{kind}" for name in script.figures for kind in ("pdf", "png")}
    assert names == {"metrics.csv", "summary.json", "numbers.tex", "checkpoint.pt"} | figures
    for figure in figures:
        start = (finished(script).folder / figure).read_bytes()[:4]
        assert start == (b"%PDF" if figure.endswith("pdf") else b"\x89PNG")


def test_an_epoch_is_a_row_of_metrics_and_a_line(script, finished):
    run = finished(script)
    with (run.folder / "metrics.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == ["epoch", *script.metrics, "seconds"]
    assert [row["epoch"] for row in table] == ["1", "2", "3"]
    assert all(math.isfinite(float(value)) for row in table for value in row.values())
    lines = [line for line in run.end.out.splitlines() if line.startswith("epoch ")]
    for row, line in zip(table, lines, strict=True):
        shown = r"\s+".join(rf"{name} (\S+)" for name in script.metrics)
        match = re.fullmatch(rf"epoch {row['epoch']}/3\s+{shown}\s+\S+ s, \S+ left", line)
        values = [float(row[name]) for name in script.metrics]
        assert [float(text) for text in match.groups()] == pytest.approx(values, rel=1e-3)


def test_summary_has_what_it_takes_to_do_the_run_again(script, finished):
    summary = finished(script).summary
    options = summary["options"]
    assert options[script.epochs[2:]] == 3
    assert (options["batch_size"], options["precision"], options["device"]) == (
        20,
        "float32",
        "cpu",
    )
    assert (summary["seed"], summary["precision"]) == (0, "float32")
    assert summary["versions"]["torch"] == torch.__version__
    assert summary["device"]
    with (finished(script).folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert summary["wall_time"] == pytest.approx(sum(float(r["seconds"]) for r in rows), abs=0.06)
    final = summary["final"]
    assert set(script.final) <= final.keys()
    assert all(math.isfinite(v) for v in final.values() if isinstance(v, int | float))
    for name in final.keys() & set(script.metrics):
        assert str(final[name]) == rows[-1][name]


def test_summary_is_strict_json(script, finished):
    text = (finished(script).folder / "summary.json").read_text()
    json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} in summary.json"))


def test_summary_counts_the_parameters(script, finished):
    summary, parts = finished(script).summary, finished(script).checkpoint["parts"]
    model = parts[script.weights]
    buffers = ("mask", "running_mean", "running_var", "num_batches_tracked")
    weights = [tensor for name, tensor in model.items() if not name.endswith(buffers)]
    assert summary["parameters"] == sum(tensor.numel() for tensor in weights)


def macros(run):
    """Return the macros of numbers.tex, whose every line must define one, by name."""
    lines = (run.folder / "numbers.tex").read_text().splitlines()
    found = [re.fullmatch(r"\\newcommand\{\\([A-Za-z]+)\}\{([^{}\\]+)\}", line) for line in lines]
    assert None not in found, lines[found.index(None)]
    names = [match[1] for match in found]
    assert len(set(names)) == len(names)
    return {match[1]: match[2] for match in found}


def test_numbers_agree_with_the_summary(script, finished):
    run = finished(script)
    numbers, summary = macros(run), run.summary
    start = {VAE: "VaeZTwoZero", NF: "Nf", GAN: "Gan"}[script]
    assert all(name.startswith(start) for name in numbers)
    for name, value in summary["final"].items():
        if not isinstance(value, list):
            macro = start + "".join(word.capitalize() for word in name.split("_"))
            text = Decimal(numbers[macro])
            unit = 10.0 ** text.as_tuple().exponent
            assert float(text) == pytest.approx(value, abs=0.501 * unit), name
    assert numbers[start + "Epochs"] == "3"
    assert numbers[start + "BatchSize"] == "20"
    assert float(numbers[start + "Lr"]) == summary["options"]["lr"]
    assert int(numbers[start + "Parameters"]) == summary["parameters"]


@pytest.mark.parametrize(
    ("name", "key", "macro"),
    [
        ("vae_z20", "val_elbo", "VaeZTwoZeroValElbo"),
        ("vae_z2", "val_elbo", "VaeZTwoValElbo"),
        ("vae_z20_dynamic", "test_log_px", "VaeZTwoZeroDynamicTestLogPx"),
        ("nf", "epoch_below_1", "NfEpochBelowOne"),
    ],
)
def test_macro_names_have_letters_only(script, name, key, macro):
    run = script.module.Run.__new__(script.module.Run)
    run.name = name
    assert run.macro(key) == macro


def test_a_failure_while_writing_leaves_the_old_file_alone(script, tmp_path):
    path, replacing = tmp_path / "metrics.csv", script.module.replacing
    with replacing(path) as temporary:
        temporary.write_text("old")
        assert not path.exists()
    for error in (OSError, KeyboardInterrupt):
        with pytest.raises(error), replacing(path) as temporary:  # noqa: PT012
            temporary.write_text("half")
            raise error
        assert [p.name for p in tmp_path.iterdir()] == ["metrics.csv"]
        assert path.read_text() == "old"
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.csv"]
    assert path.read_text() == "new"


# ---------------------------------------------------------------------------------------
# Ctrl-C and --resume
# ---------------------------------------------------------------------------------------
def stop_in(epoch, act=interrupt):
    """Return loaders whose second training batch of that epoch is Ctrl-C."""
    return lambda make: small(make, epoch=epoch, batch=2, act=act)


def no_training(make):
    """Return loaders that do not give a training batch."""

    def act(_):
        pytest.fail("trained")

    return small(make, epoch=1, batch=1, act=act)


def test_ctrl_c_and_resume_end_as_an_uninterrupted_run(script, finished, tmp_path):
    end = script.main(*script.options(tmp_path), loaders=stop_in(2))
    assert end.status == 130
    assert re.fullmatch(r".*epoch 1 .*--resume.*\n", end.err)
    assert len(Results(tmp_path).metrics) == 1
    assert Results(tmp_path).checkpoint
    assert not (tmp_path / "summary.json").exists()
    end = script.main(*script.options(tmp_path), "--resume")
    assert (end.status, end.err) == (0, "")
    assert re.findall(r"^epoch (\d)/3", end.out, re.MULTILINE) == ["2", "3"]
    assert_same_results(Results(tmp_path), finished(script))


def test_ctrl_c_as_a_signal_and_resume_end_as_an_uninterrupted_run(script, finished, tmp_path):
    process = script.start_napping(3, *script.options(tmp_path))
    while (line := process.stdout.readline()) and not line.startswith("epoch 2/3"):
        pass
    process.send_signal(signal.SIGINT)
    end = end_of(process)
    assert end.status == 130
    assert re.fullmatch(r".*epoch 2 .*--resume.*\n", end.err)
    assert script.main(*script.options(tmp_path), "--resume").status == 0
    assert_same_results(Results(tmp_path), finished(script))


def test_another_seed_is_another_run(script, finished, tmp_path):
    assert script.main(*script.options(tmp_path), "--seed", 1).status == 0
    for one, other in zip(Results(tmp_path).metrics, finished(script).metrics, strict=True):
        assert all(one[name] != other[name] for name in script.metrics)


def test_resume_goes_on_in_the_precision_of_the_checkpoint(script, tmp_path):
    whole, broken = Results(tmp_path / "whole"), Results(tmp_path / "broken")
    bfloat16 = ("--precision", "bfloat16")
    assert script.main(*script.options(whole.folder, 2), *bfloat16).status == 0
    assert whole.summary["precision"] == "bfloat16"
    options = script.options(broken.folder, 2)
    assert script.main(*options, *bfloat16, loaders=stop_in(2)).status == 130
    assert script.main(*options, "--precision", "auto", "--resume").status == 0
    assert_same_results(broken, whole)


def test_ctrl_c_in_the_first_epoch_leaves_nothing_to_resume(script, tmp_path):
    end = script.main(*script.options(tmp_path), loaders=stop_in(1))
    assert end.status == 130
    assert len(end.err.splitlines()) == 1
    assert "--resume" not in end.err
    assert Results(tmp_path).bytes == {}


def interrupted_loaders(make):
    def loaders(*args, **kwargs):
        raise KeyboardInterrupt

    return loaders


def test_ctrl_c_before_the_training_is_no_traceback(script, tmp_path):
    end = script.main(*script.options(tmp_path / "new"), loaders=interrupted_loaders)
    assert end.status == 130
    assert "Traceback" not in end.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", ["checkpoint", "metrics"])
def test_ctrl_c_while_an_epoch_is_saved_loses_at_most_that_epoch(script, file, finished, tmp_path):
    def patch(monkeypatch, module):
        """Let the last of the three writings be cut off."""
        calls = iter(range(1, 10))
        owner, name = (torch, "save") if file == "checkpoint" else (csv.DictWriter, "writerows")
        write = getattr(owner, name)

        def cut_off(*args):
            write(*args)
            if next(calls) == 3:
                raise KeyboardInterrupt

        monkeypatch.setattr(owner, name, cut_off)

    end = script.main(*script.options(tmp_path), patch=patch)
    assert end.status == 130
    n_saved = len(Results(tmp_path).checkpoint["history"])
    assert n_saved >= 2
    assert 2 <= int(re.search(r"epoch (\d) .*--resume", end.err)[1]) <= n_saved
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert script.main(*script.options(tmp_path), "--resume").status == 0
    assert_same_results(Results(tmp_path), finished(script))


def test_ctrl_c_in_the_evaluation_and_resume(script, finished, tmp_path):
    def patch(monkeypatch, module):
        monkeypatch.setattr(module, "save_figure", interrupt_figure)

    def interrupt_figure(figure, filename):
        raise KeyboardInterrupt

    end = script.main(*script.options(tmp_path), patch=patch)
    assert end.status == 130
    assert re.fullmatch(r".*epoch 3 .*--resume.*\n", end.err)
    end = script.main(*script.options(tmp_path), "--resume", loaders=no_training)
    assert (end.status, end.err) == (0, "")
    assert_same_results(Results(tmp_path), finished(script))


def test_resume_of_a_finished_run_makes_only_evaluation_and_figures_again(
    script, finished, tmp_path
):
    run = finished.copy(script, tmp_path)
    for path in tmp_path.iterdir():
        if path.is_file() and path.name not in ("checkpoint.pt", "metrics.csv"):
            path.unlink()
    options = script.options(tmp_path)
    end = script.main(*options, "--resume", loaders=no_training, figures=True)
    assert (end.status, end.err) == (0, "")
    assert "epoch " not in end.out
    assert_same_results(run, finished(script))
    assert run.bytes["checkpoint.pt"] == finished(script).bytes["checkpoint.pt"]
    names = {path.name for path in finished(script).folder.iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == names
    old, new = macros(finished(script)), macros(run)
    assert {k: v for k, v in new.items() if "SampleMs" not in k} == {
        k: v for k, v in old.items() if "SampleMs" not in k
    }


def test_a_new_start_keeps_the_old_results_until_its_first_epoch_is_complete(
    script, finished, tmp_path
):
    run = finished.copy(script, tmp_path)
    other = (*script.options(tmp_path), "--seed", 1)
    assert script.main(*other, loaders=stop_in(1)).status == 130
    assert run.bytes == finished(script).bytes
    assert script.main(*other, loaders=stop_in(2)).status == 130
    assert run.checkpoint["options"]["seed"] == 1
    assert [row["epoch"] for row in run.metrics] == ["1"]
    assert run.bytes.keys() == {"checkpoint.pt", "metrics.csv"}  # no numbers of the old run


def test_resume_with_nothing_to_resume_is_one_line(script, tmp_path):
    end = script.main(*script.options(tmp_path / "new"), "--resume")
    assert str(tmp_path / "new") in error_line(end)
    assert list(tmp_path.iterdir()) == []


def truncated(path):
    path.write_bytes(path.read_bytes()[:-1000])


def without_weights(path):
    state = torch.load(path, weights_only=True)
    torch.save({key: state[key] for key in state if key != "parts"}, path)


DAMAGES = [
    truncated,
    lambda path: path.write_bytes(b"garbage" * 1000),
    lambda path: path.write_bytes(b""),
    lambda path: torch.save({"weights": torch.zeros(3)}, path),
    lambda path: torch.save(torch.zeros(3), path),
    lambda path: torch.save(torch.nn.Linear(2, 2), path),
    lambda path: torch.save({"options": 3, "rng": 4}, path),
    without_weights,
]
DAMAGE_IDS = ["truncated", "garbage", "empty", "dict", "tensor", "module", "numbers", "no weights"]


@pytest.mark.parametrize("damage", DAMAGES, ids=DAMAGE_IDS)
def test_damaged_checkpoint_is_one_line(script, damage, finished, tmp_path):
    run = finished.copy(script, tmp_path)
    damage(tmp_path / "checkpoint.pt")
    before = run.bytes
    end = script.main(*script.options(tmp_path), "--resume", loaders=no_training)
    assert str(tmp_path / "checkpoint.pt") in error_line(end)
    assert end.out == ""
    assert run.bytes == before


@pytest.mark.parametrize(
    ("script", "other"), list(itertools.permutations(SCRIPTS, 2)), ids=lambda script: script.name
)
def test_checkpoint_of_another_script_is_one_line(script, other, finished, tmp_path):
    run = finished.copy(other, tmp_path)
    before = run.bytes
    end = script.main(*script.options(tmp_path), "--resume", loaders=no_training)
    assert str(tmp_path / "checkpoint.pt") in error_line(end)
    assert end.out == ""
    assert run.bytes == before


OTHER_OPTIONS = ["{epochs} 4", "--lr 0.5", "--seed 7", "--batch_size 10", "--precision bfloat16"]


@pytest.mark.parametrize(
    ("script", "option"),
    [
        *((script, option) for script in SCRIPTS for option in OTHER_OPTIONS),
        (VAE, "--zdim 3"),
        (VAE, "--binarization dynamic"),
        (GAN, "--latent_dim 3"),
    ],
    ids=str,
)
def test_checkpoint_of_other_options_is_refused_by_name(script, option, finished, tmp_path):
    run = finished.copy(script, tmp_path)
    name, value = option.format(epochs=script.epochs).split()
    end = script.main(*script.options(tmp_path), name, value, "--resume", loaders=no_training)
    line = error_line(end)
    assert f"{name} is {value}" in line
    assert str(run.checkpoint["options"][name[2:]]) in line
    assert run.bytes == finished(script).bytes


# ---------------------------------------------------------------------------------------
# A loss that is not finite
# ---------------------------------------------------------------------------------------
def test_nonfinite_loss_names_epoch_and_batch_and_keeps_the_checkpoint(script, finished, tmp_path):
    end = script.main(*script.options(tmp_path), loaders=stop_in(2, poison))
    line = error_line(end, status=1)
    assert "epoch 2" in line
    assert "batch 2" in line
    assert "nan" in line
    run = Results(tmp_path)
    assert len(run.checkpoint["history"]) == len(run.metrics) == 1
    assert not (tmp_path / "summary.json").exists()
    assert script.main(*script.options(tmp_path), "--resume").status == 0
    assert_same_results(run, finished(script))


def test_absurd_learning_rate_is_a_nonfinite_loss(script, tmp_path):
    end = script.main(*script.options(tmp_path), "--lr", "1e30")
    assert re.search(r"epoch \d.* batch \d", error_line(end, status=1))
    if (tmp_path / "checkpoint.pt").exists():
        weights = Results(tmp_path).checkpoint["parts"][script.weights]
        assert all(tensor.isfinite().all() for tensor in weights.values())
