"""The report: its form, its numbers, its build; that no measured number was typed by hand."""

import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
REPORT = ROOT / "report"
QUESTIONS = [f"{s}.{n}" for s, count in enumerate((15, 7, 8, 1), 1) for n in range(1, count + 1)]
LINE_LIMITS = {"1.12": 10, "2.5": 10, "4.1": 15}
EXTENSION = ["nf_mixture", "nf_mixture_n_mix1"]  # these may be missing
RUNS = ["vae", "vae_dynamic", "vae_zdim2", "gan", "nf", *EXTENSION]

# Constants of the method, which no summary reports: as the report and as a script has them.
VAE, GAN, NF = (f"a3_{name}_template.py" for name in ("vae", "gan", "nf"))
MIXTURE, MEASURE = "extension/mixture_flow.py", "report/measure.py"
CHOICES = "benchmarks/README.md"
METHOD = {
    "weight decay of 0.2": (VAE, '"weight_decay": 0.2'),
    "slope 0.2": (GAN, "nn.LeakyReLU(0.2)"),
    "dropout of 0.3": (GAN, "dropout=0.3"),
    r"$\beta_1=0.5$": (GAN, '"betas": (0.5, '),
    "by $5/(4+t)$ of the way": (GAN, "5 / (4 + batches_done)"),
    "the first epoch has half of it": (NF, "lr / 2 if epoch == 1"),
    "weight decay of 0.3": (NF, "weight_decay=0.3"),
    r"t_i=8\tanh(r_i/8)": (NF, "8 * torch.tanh(raw_t / 8)"),
    "clipped at 0.01": (NF, "MAX_GRAD_NORM = 0.01"),
    r"$\alpha=10^{-5}$": (NF, "alpha = 1e-5"),
    "1024 hidden units": (NF, "n_hidden=1024"),
    "$K=16$": (MIXTURE, "n_mix=16"),
    "300 warm-up steps": (MIXTURE, "(step + 1) / 300"),
    "64 channels": (MIXTURE, "c_hidden=64"),
    "reads the logits divided by four": (MIXTURE, "self.nn(kept / 4)"),
    "between $-6$ and $6$": (MIXTURE, "torch.linspace(-6, 6, n_mix)"),
    r"$\kappa=2\tanh(\cdot)$": (MIXTURE, "2 * torch.tanh(a"),
    "three Newton--Schulz steps": (MIXTURE, "ns_steps=3"),
    "88 per cent of the samples": (CHOICES, "240.6; 88 %"),
    "gives 240.6 nats": (CHOICES, "240.6; 88 %"),
    "91 per cent, but": (CHOICES, "250; 91 %, 4.1 to 18.8 %"),
    "from 4.1 to 18.8 per cent": (CHOICES, "250; 91 %, 4.1 to 18.8 %"),
    "values from 252 on": (MEASURE, "INK = 252"),
    "if at least eight of the ten agree": (MEASURE, "N_NEIGHBOURS, N_AGREEING = 10, 8"),
}
# Other decimals that may stand there: of the assignment and of formulas.
DECIMALS = {"543.4", "9.75", "0.57", "0.1", "0.005", "1.96", "1.386", "1.85"}
# The rows of the README's tables with numbers of the runs, and the macros of these.
README = {
    "| VAE, 20-d, static": ("Vae", "TestElbo TestLogPx ValElbo TrainElbo"),
    "| VAE, 20-d, dynamic": ("VaeDynamic", "TestElbo TestLogPx ValElbo TrainElbo"),
    "| VAE, 2-d": ("VaeTwo", "TestElbo TestLogPx ValElbo"),
    "| GAN |": ("Gan", "Parzen ParzenStderr ShareMin ShareMax ParzenTrain ParzenTrainStderr"),
    "| RealNVP |": ("Nf", "TestBpd TestBpdStderr ValBpd TrainBpd EpochBelow Epochs"),
    "| Flow++": ("NfMixture", "TestBpd TestBpdStderr ValBpd TrainBpd EpochBelow Epochs"),
    "| the same networks": ("NfMixtureOne", "TestBpd ValBpd"),
    "| our VAE": ("Vae", "TestLogPx"),
    "| our GAN": ("Gan", "Parzen ParzenStderr"),
    "| our flows": ("Nf", "TestBpd MixtureTestBpd MixtureEpochs"),
    "| VAE, 40": ("Vae", "EpochSeconds TrainingMinutes Threads"),
    "| GAN, 200": ("Gan", "EpochSeconds TrainingMinutes Threads"),
    "| RealNVP, 40": ("Nf", "EpochSeconds TrainingMinutes Threads"),
    "| with mixtures, 40": ("NfMixture", "EpochSeconds TrainingMinutes Threads"),
}
PICTURE = r"\{(\\results/[^}]*)\}"
MACRO = r"\\((?:Vae|Gan|Nf)[A-Z]\w*)"


@pytest.fixture(scope="module")
def body():
    """The document's source without comments, any white space made one blank."""
    tex = (REPORT / "report.tex").read_text(encoding="utf-8")
    tex = re.sub(r"\s+", " ", re.sub(r"(?<!\\)%.*", "", tex))
    return re.search(r"\\begin\{document\}(.*)\\end\{document\}", tex)[1]


def run(*command, folder=ROOT, **environment):
    """Run a program without what an outer make has left in the environment."""
    drop = ("AUTHOR", "LASTNAME", "RESULTS", "MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES")
    environment |= {key: value for key, value in os.environ.items() if key not in drop}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def make_numbers(results, folder, **environment):
    return run(sys.executable, REPORT / "macros.py", results, folder=folder, **environment)


def macros_in(folder):
    text = (folder / "numbers.tex").read_text(encoding="utf-8")
    return dict(re.findall(r"\\newcommand\{\\(\w+)\}(?:\[1\])?\{(.*)\}", text))


@pytest.fixture(scope="module")
def macros(tmp_path_factory):
    """The macros of the committed results."""
    for name in RUNS[:-2]:
        if not (ROOT / "results" / name / "measures.json").is_file():
            pytest.skip(f"results/{name} is not measured yet")
    folder = tmp_path_factory.mktemp("numbers")
    done = make_numbers(ROOT / "results", folder)
    assert done.returncode == 0, done.stderr
    return macros_in(folder)


def test_every_question_has_its_heading_once_and_in_order(body):
    assert re.findall(r"\\question\{([^}]*)\}", body) == QUESTIONS


def test_no_measured_number_is_typed_by_hand(body):
    """They have decimals, which else only references, lengths and the method have."""
    for piece in METHOD:
        body = body.replace(piece, "")
    body = re.sub(r"\\(question|grid|plot)\b[{[][^]}]*|Question~[\d.]+|[\d.]+pt", "", body)
    assert set(re.findall(r"\d+\.\d+", body)) == DECIMALS


def test_the_method_is_that_of_the_scripts():
    for piece, (script, code) in METHOD.items():
        assert code in (ROOT / script).read_text(encoding="utf-8"), piece


def test_no_word_sticks_to_a_macro(body):
    assert re.findall(MACRO + r" [^&\\$]", re.sub(r"\$[^$]*\$", "", body)) == []


def test_the_pictures_are_there_with_caption_and_reference(body, macros):
    floats = re.findall(r"\\begin\{(?:figure|table)\}.*?\\end\{(?:figure|table)\}", body)
    assert re.findall(PICTURE, "".join(floats)) == re.findall(PICTURE, body)
    for piece in floats:
        assert re.search(r"\\caption\{.{20,}", piece)
        assert rf"\ref{{{re.search(r'label{([^}]*)}', piece)[1]}}}" in body
    for name in re.findall(PICTURE, body):
        if macros["mixture"] or "nf_mixture" not in name:
            assert (ROOT / name.lstrip("\\")).is_file(), name


def test_the_references_are_those_that_are_cited_and_can_be_found(body):
    cited = re.findall(r"\\cite\w*(?:\[[^]]*\])*\{([^}]*)\}", body)
    bib = (REPORT / "references.bib").read_text(encoding="utf-8")
    entries = dict(re.findall(r"^@\w+\{(\w+),(.*?)^\}", bib, flags=re.M | re.S))
    assert sorted(entries) == sorted({key for keys in cited for key in keys.split(",")})
    assert all(re.search(r"arXiv|pages|github\.io", entry) for entry in entries.values())


def make_results(folder):
    """Write results of the form that the scripts and measure.py leave, of a few epochs."""
    judged = {"agreement": 0.6149, "digit_shares": [0.1135, 0.8865], "parameters": 815824,
              "sample_ms": 12.8}  # fmt: skip
    vae = {"train_elbo": -93.24, "val_elbo": -96.65}, {
        "test_elbo": -96.01, "test_kl": 26.9, "aggregate_variance": [1.5, 1.25], "few_log_px": -90,
        "iw_bias": 0.5,
        "prior_log_px": [-215.6, -179.9, -125.26], "prior_draws": [100, 1000, 10**5],
    }  # fmt: skip
    gan = {"value": -1.3747}, {"test_agreement": 0.94, "test_digit_shares": [0.5, 0.5],
                               "label_shares": [0.25, 0.75], "vote_accuracy": 0.965}  # fmt: skip
    flow = {"train_bpd": 1.2004, "val_bpd": 1.2018, "test_bpd": 1.67}, {
        "test_bpd_stderr": 0.0027, "test_bpd_iw_single": 1.5, "test_bpd_iw": 1.4,
        "end_train_bpd": 1.1, "end_shifted_bpd": 1.1026, "end_val_bpd": 1.2,
    }  # fmt: skip
    pixels = {f"{kind}_{x}": 0.25 for kind in ("background", "beside", "rim", "ink")
              for x in ("share", "bpd")}  # fmt: skip
    curve = "epoch,seconds,train_elbo,val_elbo,value,train_bpd,val_bpd,d_fake\n"
    curve += "1,40,-130,-99,-1.3,2,1.85,0.3\n2,45.04,-90,-95,-1.39,1.05,1.84,0.2\n"
    curve += "3,50,-91,-94,-1.25,1.1,1.19,0.4\n4,90,-93.24,-96.65,-1.3747,1.2004,1.2018,0.5\n"
    for run in RUNS:
        (folder / run).mkdir(parents=True)
        final, measures = {"vae": vae, "gan": gan}.get(run[:3], flow)
        measures = judged | measures
        if run == "vae_zdim2":
            measures["share_outside"] = 0.123
        if run in EXTENSION:
            measures |= pixels | {"test_bpd": 1.5}
        if run == "nf_mixture":
            measures |= {"test_bpd": 1.25, "rim_bpd": 0.2}
        options = {"lr": 0.003, "device": "cpu", **dict.fromkeys(final, 0)}  # the results count
        final = {**final, "sample_ms": 99, "test_elbo": 99}  # and measures even more
        summary = {"options": options, "device": "CPU", "final": final,
                   "threads": 2 if run == "gan" else 1}  # fmt: skip
        (folder / run / "summary.json").write_text(json.dumps(summary))
        (folder / run / "measures.json").write_text(json.dumps(measures))
        (folder / run / "metrics.csv").write_text(curve)


def test_numbers_are_rounded_and_named(tmp_path):
    """Differences are rounded, not their parts."""
    make_results(tmp_path / "results")
    done = make_numbers(tmp_path / "results", tmp_path, AUTHOR=" J. O'Doe & Sons_1 ")
    assert (done.returncode, done.stderr) == (0, "")
    found = macros_in(tmp_path)
    expected = {
        "VaeTrainElbo": r"\ensuremath{-93.2}", "VaeTwoGap": "3.4", "VaeDynamicEpochs": "4",
        "VaeValElbo": r"\ensuremath{-96.7}", "VaeTestElbo": r"\ensuremath{-96.0}",
        "VaeElboAhead": "0.6", "VaeFirstTrainElbo": r"\ensuremath{-130.0}",
        "VaeFirstValElbo": r"\ensuremath{-99.0}", "VaeParameters": "815,824", "VaeLr": "0.003",
        "VaeSampleMs": "13", "VaeTrainingMinutes": "3.2", "VaeEpochSeconds": "47.5",
        "VaeTwoVarianceMax": "1.50", "VaeTwoVarianceMin": "1.25", "VaeTwoShareOutside": "12.3",
        "VaePriorLast": r"\ensuremath{-125.3}", "VaePriorShort": "35.3", "VaePriorLastTens": "5",
        "VaeAgreement": "61", "GanTestAgreement": "94", "GanVoteAccuracy": "96.5",
        "GanSharesRow": "11.4 & 88.7", "GanLabelSharesRow": "25.0 & 75.0", "GanThreads": "2",
        "GanTestSharesRow": "50.0 & 50.0", "GanShareMax": "88.7", "GanShareMin": "11.4",
        "NfShareDifference": "38.7", "NfShareDifferenceDigit": "0", "GanValueAbove": "0.012",
        "GanValueMinEpoch": "2", "GanDFakeMin": "0.200", "VaePriorAhead": r"\ensuremath{-34.8}",
        "VaeShareZeros": "11.4", "NfMixtureBitsSum": "0.950", "NfMixtureRimPart": "21.1",
        "GanValueMin": r"\ensuremath{-1.3900}", "GanValueMax": r"\ensuremath{-1.25}",
        "VaeTestKlSamples": r"5\times10^{11}",
        "NfTestBpd": "1.670", "NfEpochBelow": "2", "NfMixtureTestBpdStderr": "0.003",
        "NfBestEpoch": "3", "NfTestAhead": r"\ensuremath{-0.468}",
        "NfFirstTrainBpd": "2.00", "NfIwGain": "0.100", "NfShiftCost": "0.003", "NfEndGap": "0.100",
        "NfMixtureRimBits": "0.80", "NfMixtureRimGain": "0.050", "NfMixtureInkGain": "0.000",
        "NfMixtureNetworkGain": "0.170", "NfMixtureMixtureGain": "0.250", "NfWeightsMb": "3",
        "mixture": "#1", "ablation": "#1", "reportauthor": r"J. O'Doe \& Sons\_1",
    }  # fmt: skip
    assert {name: found.get(name) for name in expected} == expected
    assert r"vae\_zdim2 4 of 40, gan 4 of 200" in found["tooshort"]
    assert all(name.isalpha() for name in found)


@pytest.mark.parametrize("run", EXTENSION)
def test_the_extension_may_be_missing(tmp_path, run):
    make_results(results := tmp_path / "results")
    shutil.rmtree(results / run)
    assert make_numbers(results, tmp_path).returncode == 0
    found = macros_in(tmp_path)
    mixture = "" if run == "nf_mixture" else "#1"  # the second says nothing without the first
    assert (found["mixture"], found["ablation"]) == (mixture, "")
    assert ("NfMixtureTestBpd" in found) == bool(mixture)
    assert not any(name.startswith("NfMixtureOne") for name in found)


def test_a_missing_or_damaged_file_and_a_strange_name_are_one_line(tmp_path):
    """So are measures of other weights than those beside them; a clone may lack the weights."""
    make_results(results := tmp_path / "results")

    def error(**environment):
        done = make_numbers(results, tmp_path, **environment)
        assert done.returncode == done.stderr.count("\n")
        return done.stderr

    assert "AUTHOR has '张'" in error(AUTHOR="张伟")
    file = results / "vae/measures.json"
    measures = json.loads(file.read_text())
    (results / "vae/weights.pt").write_bytes(b"new")
    for sha256, right in ((None, False), ("0", False), (hashlib.sha256(b"new").hexdigest(), True)):
        file.write_text(json.dumps(measures | {"weights_sha256": sha256}))
        expected = "other weights than those beside it; python report/measure.py results/vae"
        assert (error() == "", expected in error()) == (right, not right)
    (results / "gan/measures.json").unlink()
    assert "is missing; python report/measure.py results/gan makes it" in error()
    for damage in ("{", "[]", "{}"):
        (results / "vae_zdim2/summary.json").write_text(damage)
        assert "python a3_vae_template.py --zdim 2 makes it anew" in error()


def test_the_check_of_the_log(tmp_path):
    log = "This is pdfTeX\nOverfull \\hbox (4.9pt too wide) in paragraph at lines 3--4\n"
    for line in (
        "",
        r"Overfull \hbox (5.1pt too wide) in paragraph at lines 3--4",
        "LaTeX Warning: Reference `fig:x' on page 1 undefined on input line 9.",
        "./report.tex:99: LaTeX Error: File `../results/nf/bpd.pdf' not found.",
    ):
        (tmp_path / "report.log").write_text(log + line)
        done = run(sys.executable, REPORT / "check_log.py", tmp_path / "report.log")
        assert done.returncode == done.stderr.count("\n") == bool(line)


def test_the_archive_is_what_git_tracks(tmp_path):
    """And nothing that a run or a build leaves beside it; an odd name or a missing file makes none.

    The archive is made of stand-ins in a folder without git.
    """
    tracked = run("git", "ls-files").stdout.splitlines() if shutil.which("git") else []
    if not tracked:
        pytest.skip("git does not say what it tracks: this is no clone")
    left = ["results/nf/weights.pt", "results/vae/checkpoint.pt", "results/vae/.elbo.png.tmp",
            "results/gan/progress/000500.png", "results/tour/vae/elbo.png", "report/build/x.tex",
            "results/vae_epochs2/weights.pt", "report/numbers.tex", ".venv/x.py", "x"]  # fmt: skip
    for name in tracked + left:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    for name in ("Makefile", "make_zip.py", "macros.py"):
        shutil.copy(REPORT / name, tmp_path / "report")

    def error(name="doe"):
        return run("make", "zip", f"LASTNAME={name}", folder=tmp_path / "report").stderr

    assert "make zip LASTNAME=doe" in error("../$(x)")
    for path in ("report/report.pdf", "datasets/mnist.npz", "results/gan/weights.pt"):
        (tmp_path / path).rename(tmp_path / "away")
        assert f"{path} is missing" in error()
        (tmp_path / "away").rename(tmp_path / path)
    assert list(tmp_path.rglob("*.zip")) == []
    assert error() == ""
    with zipfile.ZipFile(tmp_path / "report/doe_assignment3.zip") as archive:
        assert sorted(archive.namelist()) == sorted(tracked)


@pytest.fixture(scope="module")
def pdf_lines():
    """The lines of the committed PDF, without page numbers."""
    if not shutil.which("pdftotext"):
        pytest.skip("pdftotext (poppler-utils) is not installed")
    text = run("pdftotext", "-layout", REPORT / "report.pdf", "-").stdout
    lines = [line.strip() for line in text.replace("\f", "\n").splitlines()]
    return [line for line in lines if line and not line.isdigit()]


@pytest.mark.parametrize(("question", "limit"), LINE_LIMITS.items())
def test_the_answers_that_have_a_limit_of_lines(body, pdf_lines, question, limit):
    """Counted to the next heading or caption, superscripts on a line of their own included."""
    lines = pdf_lines[pdf_lines.index(f"Question {question}") + 1 :]
    end = re.compile(r"Question \d\.\d+$|\d\s+[A-Z][a-z ]+$|References$|(Figure|Table) \d+: ")
    lines = lines[: next(i for i, line in enumerate(lines) if end.match(line))]
    assert len(lines) <= limit, "\n".join(lines)
    # all of it: a figure may not have cut it short
    tex = re.split(r"\\(?:question|begin)\b", body.split(rf"\question{{{question}}}")[1])[0]
    assert lines[-1].endswith(tex.split()[-1])


def test_the_pdf_shows_the_numbers_of_the_results(body, macros, pdf_lines):
    """All that there are: the build fails at a macro that is missing."""
    assert not any("??" in line for line in pdf_lines)
    text = "\n".join(pdf_lines).replace("\N{MINUS SIGN}", "-")
    stale = []
    for name in set(re.findall(MACRO, body)) & set(macros):
        for value in re.findall(r"-?\d[\d,.]*", macros[name]):
            if not re.search(rf"(?<![\d.]){re.escape(value)}(?!\.?\d)", text):
                stale.append((name, value))
    assert not stale, f"report.pdf does not show these, run `make report`: {stale}"


@pytest.mark.parametrize("start", README)
def test_the_tables_of_the_readme_show_the_numbers_of_the_results(macros, start):
    run, numbers = README[start]
    names = [run + number for number in numbers.split()]
    if not set(names) <= set(macros):
        pytest.skip("the extension is missing")
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\N{MINUS SIGN}", "-")
    (row,) = [line for line in text.splitlines() if line.startswith(start)]
    shown = re.findall(r"-?\d[\d.]*\b", row)
    values = {name: re.search(r"-?\d[\d.]*", macros[name])[0] for name in names}
    assert {name: value for name, value in values.items() if value not in shown} == {}
