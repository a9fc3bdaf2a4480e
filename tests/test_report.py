"""The report: its form, its numbers, its build and the archive."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from report import macros

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "report"
QUESTIONS = [f"{s}.{n}" for s, count in enumerate((15, 7, 8, 1), 1) for n in range(1, count + 1)]
LINE_LIMITS = {"1.12": 10, "2.5": 10, "4.1": 15}  # of the assignment
FORMULAS = ["0.1", "0.005", "543.4", "9.75", "1.96", "1.386", "3.2", "0.575", "0.255", "0.05"]
METHOD = ["0.2", "0.5", "0.01", "1.85"]  # and the assignment
PUBLISHED = ["1.558", "0.576", "1.06"]  # in papers and in the table of choices
README = {  # the rows of its tables that have numbers of our runs
    "| VAE, 20-d, static": "Vae", "| VAE, 20-d, dynamic": "VaeDynamic", "| VAE, 2-d": "VaeTwo",
    "| GAN |": "Gan", "| RealNVP |": "Nf", "| Flow++": "NfMixture", "| our VAE": "Vae",
    "| our GAN": "Gan", "| VAE, 40": "Vae", "| GAN, 200": "Gan", "| RealNVP, 40": "Nf",
    "| with mixtures, 40": "NfMixture",
}  # fmt: skip
GPU = ["1.2", "13.7", "2.5"]  # minutes in these rows
MACRO = r"\\((?:Vae|Gan|Nf)[A-Z]\w*)"


def tools(*names):
    """Returns a mark that skips a test where one of these programs is missing."""
    missing = [name for name in names if not shutil.which(name)]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed")


def run(*command, folder, **environment):
    """Runs a program without what an outer make has left in the environment."""
    drop = ("AUTHOR", "LASTNAME", "MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "PYTHON")
    environment = {k: v for k, v in os.environ.items() if k not in drop} | environment
    options = {"cwd": folder, "env": environment, "capture_output": True, "errors": "replace"}
    return subprocess.run(command, **options)


def macros_of(results, folder, author=""):
    """Returns the macros of results by name; numbers.tex goes into the folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(macros, "RESULTS", results)
        patch.chdir(folder)
        macros.main(author)
    text = (folder / "numbers.tex").read_text(encoding="utf-8")
    return dict(re.findall(r"\\newcommand\{\\(\w+)\}\{(.*)\}", text))


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """The macros of the committed results."""
    return macros_of(ROOT / "results", tmp_path_factory.mktemp("numbers"))


@pytest.fixture(scope="module")
def body():
    """The document's source without comments, any white space made one blank."""
    tex = re.sub(r"(?<!\\)%.*", "", (REPORT / "report.tex").read_text(encoding="utf-8"))
    tex = re.sub(r"\s+", " ", tex)
    return re.search(r"\\begin\{document\}(.*)\\end\{document\}", tex)[1]


# ------------------------------------ The numbers ------------------------------------
def make_results(folder):
    """Writes results of the form that scripts and measure.py leave; no two runs have the same.

    Each has the numbers of all kinds of runs, of which macros.py takes those of its own.
    """
    for i, name in enumerate(macros.RUNS):
        history = {
            "epoch": [1, 2, 3, 4], "seconds": [40, 45.04, 50, 90],
            "train_elbo": [-130 - i, -90, -91, -93.24 - i], "val_elbo": [-99, -95, -94, -96.67],
            "value": [-1.3, -1.39, -1.25, -1.3747], "d_real": [0, 0, 0, 0.50573],
            "train_bpd": [2 + i, 1, 1, 1], "val_bpd": [1.85, 1.84, 1.19, 1.2018 + i],
        }  # fmt: skip
        measures = {
            "weights_sha256": hashlib.sha256(name.encode()).hexdigest(),
            "parameters": 815_824 + i, "sample_ms": 12.8 + i, "agreement": 0.617 + i / 100,
            "digit_shares": [0.111, 0.123, *[0.1] * 6, 0.05 + i / 1000, 0.09], "nearest_min": 1.006,
            "test_elbo": -96.01 + i, "test_kl": 26.9, "few_log_px": -90, "iw_bias": 0.5,
            "prior_draws": [100, 10**5], "prior_log_px": [-215.6, -125.26 - i],
            "vote_accuracy": 0.965, "test_digit_shares": [0.105, 0.095, *[0.1] * 6, 0.09, 0.11],
            "parzen_draws": [240, 239, 242.5], "end_train_bpd": 1.1, "end_val_bpd": 1.2 + i,
        }  # fmt: skip
        for k, kind in enumerate(macros.KINDS, 1):
            measures |= {f"{kind}_share": k / 10, f"{kind}_bpd": 0.1 * k * k}
        if name.startswith("nf"):
            measures["shifted_digit_shares"] = [0.1] * 7 + [0.05 * i] * 3
        final = {column: values[-1] for column, values in history.items()}
        final |= {"test_elbo": 99, "test_bpd": 1.67}  # measures count before these
        summary = {"options": {"lr": 0.0005, "batch_size": 64 + i}, "threads": i, "final": final}
        table = [history, *zip(*history.values(), strict=True)]
        files = {"weights.pt": name, "measures.json": json.dumps(measures),
                 "metrics.csv": "\n".join(",".join(map(str, row)) for row in table),
                 "summary.json": json.dumps(summary)}  # fmt: skip
        (folder / name).mkdir(parents=True)
        for file, text in files.items():
            (folder / name / file).write_text(text)


def test_numbers_are_named_by_their_run_and_rounded_by_their_unit(tmp_path):
    """Differences are rounded, not their parts."""
    make_results(tmp_path / "results")
    found = macros_of(tmp_path / "results", tmp_path, author="J. O'Doe & Sons_1")
    expected = {
        "VaeParameters": "815,824", "GanParameters": "815,827", "VaeLr": "0.0005",
        "VaeDynamicBatchSize": "65", "GanThreads": "3", "NfSampleMs": "17", "VaeAgreement": "62",
        "GanVoteAccuracy": "96.5", "GanNearestMin": "1.01", "GanDReal": "0.506",
        "VaeEpochs": "4", "VaeEpochSeconds": "47.5", "VaeTrainingMinutes": "3.2",
        "VaeTestElbo": r"\ensuremath{-96.0}", "VaeTwoGap": "1.4", "VaeElboAhead": "0.7",
        "VaeFirstTrainElbo": r"\ensuremath{-130.0}", "VaeTestKlSamples": r"5\times10^{11}",
        "VaePriorLastTens": "5", "VaePriorShort": "35.3", "VaePriorAhead": r"\ensuremath{-34.8}",
        "GanShareZeros": "11.1", "GanTestShareZeros": "10.5", "GanShareDifference": "3.7",
        "GanSharesRow": "11.1 & 12.3 & 10.0 & 10.0 & 10.0 & 10.0 & 10.0 & 10.0 & 5.3 & 9.0",
        "GanValueMin": r"\ensuremath{-1.390}", "GanValueMax": r"\ensuremath{-1.250}",
        "GanValueMinEpoch": "2", "GanValueAbove": "0.012", "GanParzenSpread": "3.5",
        "NfShareDifference": "14.6", "NfTestBpd": "1.670", "NfMixtureFirstTrainBpd": "7.000",
        "NfEpochBelow": "2", "NfBestEpoch": "3", "NfTestAhead": "3.532", "NfEndGap": "4.100",
        "NfMixtureRimBits": "3.00", "NfMixtureInkShare": "40.0", "NfMixtureBitsSum": "3.000",
        "NfMixtureRimPart": "30.0", "reportauthor": r"J. O'Doe \& Sons\_1",
    }  # fmt: skip
    assert {name: found.get(name) for name in expected} == expected
    assert r"vae\_zdim2 4 of 40, gan 4 of 200" in found["tooshort"]
    assert all(name.isalpha() for name in found)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("vae/weights.pt", "new", "others); python report/measure.py results/vae makes it anew"),
        ("gan/weights.pt", "", "weights.pt is missing; python a3_gan_template.py makes it"),
        ("nf/metrics.csv", "epoch\n", "python a3_nf_template.py makes it anew"),
    ],
)
def test_other_weights_and_a_missing_or_damaged_file_are_one_line(tmp_path, file, text, message):
    make_results(tmp_path)
    (tmp_path / file).write_text(text) if text else (tmp_path / file).unlink()
    with pytest.raises(SystemExit, match=re.escape(message)) as end:
        macros_of(tmp_path, tmp_path)
    assert "\n" not in end.value.code


def test_the_report_prints_no_number_that_is_not_made(body, committed):
    assert set(re.findall(MACRO, body)) - set(committed) == set()


def test_the_report_prints_every_number_that_macros_py_derives(body):
    names = re.findall(r'"([a-z_]+)": ', (REPORT / "macros.py").read_text(encoding="utf-8"))
    ends = {name.title().replace("_", "") for name in names if name not in macros.RUNS}
    assert len(ends) > 15
    assert {end for end in ends if not re.search(rf"{MACRO[:-4]}\w*{end}\b", body)} == set()


def test_no_measured_number_is_typed_by_hand(body):
    """They have decimals, which else only lengths, formulas and published results have."""
    body = re.sub(r"\\(question|plot|grid|begin)\b\S*|Question~[\d.]+|[\d.]+(pt|em)", "", body)
    assert set(re.findall(r"(?<![\d.])\d+\.\d+", body)) == {*FORMULAS, *METHOD, *PUBLISHED}


def test_the_tables_of_the_readme_show_the_numbers_of_the_results(committed):
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\N{MINUS SIGN}", "-")
    for start, run in README.items():
        (row,) = [line for line in text.splitlines() if line.startswith(start)]
        values = " ".join(x for name, x in committed.items() if re.match(f"{run}[A-Z]", name))
        stale = set(re.findall(r"-?\d+\.\d+", row)) - set(re.findall(r"-?\d+\.\d+", values))
        assert stale - {"1.85", *GPU} == set(), row


# ------------------------------------ The document ------------------------------------
def test_every_question_has_its_heading_once_and_in_order(body):
    assert re.findall(r"\\question\{([^}]*)\}", body) == QUESTIONS


def test_no_word_sticks_to_a_macro(body):
    assert re.findall(MACRO + r" [^&\\$]", re.sub(r"\$[^$]*\$", "", body)) == []


def test_the_pictures_are_there_and_the_text_refers_to_each(body):
    pictures = [f"{x}.png" for x in re.findall(r"\\grid\{[\d.]+\}\{([^}]*)\}", body)]
    plots = re.findall(r"\\plot(?:\[[\d.]+\]|panel\{.*?\})?\{([\w/]*)\}", body)
    pictures += [f"{x}.pdf" for x in plots]
    runs_shown = re.findall(r"\\threegrids\{(\w+)\}", body)
    pictures += [f"{x}/samples_{y}.png" for x in runs_shown for y in ("before", "halfway", "after")]
    assert len(pictures) > 20
    assert [x for x in pictures if not (ROOT / "results" / x).is_file()] == []
    labels = re.findall(r"\\label\{((?:fig|tab):[^}]*)\}", body)
    assert set(labels) == set(re.findall(r"\\ref\{([^}]*)\}", body))
    assert len(re.findall(r"\\caption\{.{20,}?\\label", body)) == body.count(r"\caption")


def test_the_references_are_those_that_are_cited_and_can_be_found(body):
    cited = re.findall(r"\\cite\w*(?:\[[^]]*\])*\{([^}]*)\}", body)
    bib = (REPORT / "references.bib").read_text(encoding="utf-8")
    entries = dict(re.findall(r"^@\w+\{(\w+),(.*?)^\}", bib, flags=re.M | re.S))
    assert sorted(entries) == sorted({key for keys in cited for key in keys.split(",")})
    assert all(re.search(r"arXiv|pages|github\.io", entry) for entry in entries.values())


def text_of(pdf):
    """Returns the lines of a PDF without page numbers."""
    lines = run("pdftotext", "-layout", pdf, "-", folder=ROOT).stdout.replace("\f", "\n")
    return [line.strip() for line in lines.splitlines() if not re.fullmatch(r"\s*\d*\s*", line)]


@tools("pdftotext")
@pytest.mark.parametrize(("question", "limit"), LINE_LIMITS.items())
def test_the_answers_that_have_a_limit_of_lines(body, question, limit):
    """Counted to the next heading or caption, superscripts on a line of their own included."""
    lines = text_of(REPORT / "report.pdf")
    lines = lines[lines.index(f"Question {question}") + 1 :]
    end = re.compile(r"Question \d\.\d+$|\d\s+[A-Z][a-z ]+$|References$|(Figure|Table) \d+: ")
    lines = lines[: next(i for i, line in enumerate(lines) if end.match(line))]
    assert len(lines) <= limit, "\n".join(lines)
    # all of it: a figure may not have cut it short
    tex = re.split(r"\\(?:question|begin)\b", body.split(rf"\question{{{question}}}")[1])[0]
    assert lines[-1].endswith(tex.split()[-1])


# ------------------------------------ make ------------------------------------
@pytest.fixture
def folder(tmp_path):
    """A folder report/ with the Makefile alone."""
    (tmp_path / "report").mkdir()
    shutil.copy(REPORT / "Makefile", tmp_path / "report")
    return tmp_path / "report"


@tools("make", "latexmk", "pdflatex", "bibtex", "pdftotext")
def test_the_pdf_has_the_numbers_of_the_results(folder):
    """Built anew it has the same text, also with a user's own settings of latexmk."""
    (folder.parent / "results").symlink_to(ROOT / "results")
    for name in ("macros.py", "report.tex", "dgm_report.sty", "references.bib"):
        shutil.copy(REPORT / name, folder)
    settings = "$aux_dir = 'aux'; $bibtex_use = 0; $preview_continuous_mode = 1;"
    (folder / ".latexmkrc").write_text(settings)
    done = run("make", folder=folder, HOME=str(folder))
    assert done.returncode == 0, done.stderr
    assert text_of(folder / "report.pdf") == text_of(REPORT / "report.pdf"), "run `make report`"


@tools("make", "latexmk", "pdflatex", "bibtex")
@pytest.mark.parametrize(
    ("tex", "message"),
    [
        (r"\ref{x}", "Reference `x' on page 1 undefined"),
        (r"\char200", "Missing character: There is no "),
        (r"\hbox to 9pt{\rule{14.2pt}{1pt}}", r"Overfull \hbox (5.2pt too wide)"),
        (r"\hbox to 9pt{\rule{13.8pt}{1pt}}", None),
    ],
)
def test_a_fault_in_the_log_is_shown_and_makes_no_pdf(folder, tex, message):
    document = f"\\documentclass{{article}}\\begin{{document}}\n{tex}\n\\end{{document}}"
    (folder / "report.tex").write_text(document)
    done = run("make", "PYTHON=true", folder=folder)
    assert (done.returncode == 0) == (message is None) == (folder / "report.pdf").exists()
    assert message is None or message in done.stderr


@tools("make", "git")
def test_the_archive_is_what_git_tracks_as_it_lies_on_the_disk(folder):
    """Without what it does not track; nobody needs to have told git a name."""
    for name in ("kept", "changed", "deleted"):
        (folder.parent / name).write_text("old")
    git = ("git", "-c", "user.name=x", "-c", "user.email=x")
    for command in ("init", "add .", "commit -m x"):
        assert run(*git, *command.split(), folder=folder.parent).returncode == 0
    (folder.parent / "changed").write_text("new")
    (folder.parent / "deleted").unlink()
    (folder.parent / "untracked").write_text("x")
    assert "make zip LASTNAME=doe" in run("make", "zip", "LASTNAME=../$(x)", folder=folder).stderr
    done = run("make", "zip", "LASTNAME=doe", folder=folder, HOME=str(folder))
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(folder / "doe_assignment3.zip") as archive:
        files = {name: archive.read(name) for name in archive.namelist() if name[-1] != "/"}
    makefile = (folder / "Makefile").read_bytes()
    assert files == {"kept": b"old", "changed": b"new", "report/Makefile": makefile}
