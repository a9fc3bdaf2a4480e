"""The report: its form, its numbers, its build and the archive."""

import json
import math
import os
import re
import shutil
import statistics
import subprocess
import zipfile

import numpy as np
import pytest
from conftest import ROOT, read

from report import macros

REPORT = ROOT / "report"
QUESTIONS = [f"{s}.{n}" for s, count in enumerate((15, 7, 8, 1), 1) for n in range(1, count + 1)]
TYPED = {  # decimals of formulas, of the assignment and our method, and of benchmarks/README.md
    "0.1", "0.2", "0.005", "543.4", "9.75", "1.96", "1.386", "3.2", "0.575", "0.255", "0.05", "0.5",
    "0.01", "1.85", "1.558", "0.576", "0.38", "0.61", "1.06", "244.0", "0.29",
}  # fmt: skip
README = {  # the rows of its tables that have numbers of our runs
    "| VAE, 20-d, static": "Vae", "| VAE, 20-d, dynamic": "VaeDynamic", "| VAE, 2-d": "VaeTwo",
    "| GAN |": "Gan", "| RealNVP |": "Nf", "| Flow++": "NfMixture", "| our VAE": "Vae",
    "| our GAN": "Gan", "| VAE, 40": "Vae", "| GAN, 200": "Gan", "| RealNVP, 40": "Nf",
    "| with mixtures, 40": "NfMixture",
}  # fmt: skip
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


def macros_of(runs, folder):
    """Returns the macros of a folder of runs by name; numbers.tex goes into the folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(macros, "RESULTS", runs)
        patch.chdir(folder)
        macros.main("Doe & Sons_1")
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
def test_numbers_are_those_of_their_run_rounded_by_their_unit(committed):
    """Differences are rounded, not their parts."""

    def load(run):
        folder = ROOT / "results" / run
        rows, summary = read(folder)
        history = {name: [float(row[name]) for row in rows] for name in rows[0]}
        return summary["final"] | json.loads((folder / "measures.json").read_text()), history

    (vae, curves), (two, _), (gan, game), (nf, bits), (mixture, _) = map(
        load, ("vae", "vae_zdim2", "gan", "nf", "nf_mixture")
    )
    real, shifted = np.array(gan["test_digit_shares"]), np.array(nf["shifted_digit_shares"])
    seconds = statistics.median(bits["seconds"])
    expected = {
        "VaeTestElbo": f"{vae['test_elbo']:.1f}", "VaeParameters": f"{vae['parameters']:,}",
        "VaeGap": f"{vae['train_elbo'] - vae['val_elbo']:.1f}", "VaeLr": "0.003",
        "VaeFirstTrainElbo": f"{curves['train_elbo'][0]:.1f}",
        "VaeTwoPriorAhead": f"{two['prior_log_px'][-1] - two['few_log_px'] + two['iw_bias']:.1f}",
        "VaeTwoPriorShort": f"{two['few_log_px'] - two['prior_log_px'][-1]:.1f}",
        "VaeTwoShareZeros": f"{100 * two['digit_shares'][0]:.1f}",
        "VaeShareDifference": f"{100 * abs(vae['digit_shares'] - real).max():.1f}",
        "GanValueMin": f"{min(game['value']):.3f}",
        "GanValueAbove": f"{game['value'][-1] + math.log(4):.3f}",
        "GanParzenSpread": f"{max(gan['parzen_draws']) - min(gan['parzen_draws']):.1f}",
        "GanTestSharesRow": " & ".join(f"{100 * share:.1f}" for share in real),
        "GanAgreement": f"{100 * gan['agreement']:.0f}",
        "GanNearestMin": f"{gan['nearest_min']:.2f}",
        "NfEpochSeconds": f"{seconds:.1f}", "NfTrainingMinutes": f"{seconds * 40 / 60:.1f}",
        "NfEpochBelow": str(1 + sum(value >= 1.85 for value in bits["val_bpd"])),
        "NfEndGap": f"{nf['end_val_bpd'] - nf['end_train_bpd']:.3f}",
        "NfTestAhead": f"{nf['val_bpd'] - nf['test_bpd']:.3f}",
        "NfShareDifference": f"{100 * abs(nf['digit_shares'] - shifted).max():.1f}",
        "NfMixtureRimBits": f"{mixture['rim_bpd'] / mixture['rim_share']:.2f}",
    }  # fmt: skip
    found = {name: re.sub(r"\\ensuremath\{(.*)\}", r"\1", text) for name, text in committed.items()}
    assert {name: found.get(name) for name in expected} == expected
    assert all(name.isalpha() for name in found)
    assert (found["reportauthor"], found["tooshort"]) == (r"Doe \& Sons\_1", "")


def test_a_damaged_or_missing_file_and_other_weights_are_one_line(tmp_path):
    runs = shutil.copytree(ROOT / "results", tmp_path / "results")
    for file, text, message in (
        ("nf/metrics.csv", "epoch\n", "python a3_nf_template.py makes it anew"),
        ("gan/weights.pt", None, "weights.pt is missing; python a3_gan_template.py makes it"),
        ("vae/weights.pt", "new", "others); python report/measure.py results/vae makes it anew"),
    ):  # the later ones are read first
        (runs / file).write_text(text) if text else (runs / file).unlink()
        with pytest.raises(SystemExit, match=rf"^report: .*{re.escape(message)}\Z"):
            macros_of(runs, tmp_path)


def test_the_report_prints_each_number_that_macros_py_derives_and_no_other(body, committed):
    used = re.findall(MACRO, body)
    assert set(used) <= set(committed)
    derived = re.findall(r'"([a-z_]+)": [^(]', (REPORT / "macros.py").read_text(encoding="utf-8"))
    ends = [name.title().replace("_", "") for name in derived]
    assert [end for end in ends if not any(macro.endswith(end) for macro in used)] == []
    # LaTeX drops a blank behind a macro: the word behind it would stick to the number.
    assert re.findall(MACRO + r" [^&\\$]", re.sub(r"\$[^$]*\$", "", body)) == []


def test_no_measured_number_is_typed_by_hand(body):
    """They have decimals, which else only lengths and those of TYPED have."""
    body = re.sub(r"\\(question|plot|grid|begin)\b\S*|Question~[\d.]+|[\d.]+(pt|em)", "", body)
    assert set(re.findall(r"(?<![\d.])\d+\.\d+", body)) == TYPED


def test_the_tables_of_the_readme_show_the_numbers_of_the_results(committed):
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\N{MINUS SIGN}", "-")
    for start, run in README.items():
        (row,) = [line for line in text.splitlines() if line.startswith(start)]
        values = " ".join(x for name, x in committed.items() if re.match(f"{run}[A-Z]", name))
        stale = set(re.findall(r"-?\d+\.\d+", row)) - set(re.findall(r"-?\d+\.\d+", values))
        assert stale - {"1.85", "1.2", "13.7", "2.5"} == set(), row  # the target; minutes on a GPU


# ------------------------------------ The document ------------------------------------
def test_every_question_has_its_heading_once_and_in_order(body):
    assert re.findall(r"\\question\{([^}]*)\}", body) == QUESTIONS


def test_the_text_refers_to_each_figure_and_table_and_each_has_a_caption(body):
    labels = re.findall(r"\\caption\{.{20,}?\\label\{((?:fig|tab):[^}]*)\}", body)
    assert set(labels) == set(re.findall(r"\\ref\{([^}]*)\}", body))
    assert len(labels) == body.count(r"\caption")


def text_of(pdf):
    """Returns the lines of a PDF without page numbers."""
    lines = run("pdftotext", "-layout", pdf, "-", folder=ROOT).stdout.replace("\f", "\n")
    return [line.strip() for line in lines.splitlines() if not re.fullmatch(r"\s*\d*\s*", line)]


@tools("pdftotext")
@pytest.mark.parametrize(("question", "limit"), [("1.12", 10), ("2.5", 10), ("4.1", 15)])
def test_the_answers_that_have_a_limit_of_lines(body, question, limit):
    """Counted to the next heading or caption, superscripts on a line of their own included."""
    lines = text_of(REPORT / "report.pdf")
    lines = lines[lines.index(f"Question {question}") + 1 :]
    end = re.compile(r"Question \d\.\d+$|\d\s+[A-Z][a-z ]+$|References$|(Figure|Table) \d+: ")
    lines = lines[: next(i for i, line in enumerate(lines) if end.match(line))]
    assert len(lines) <= limit, "\n".join(lines)
    # The last plain word is there: no figure has cut the answer short.
    tex = re.split(r"\\(?:question|begin)\b", body.split(rf"\question{{{question}}}")[1])[0]
    assert re.findall(r" ([a-z]+)\b", tex)[-1] in " ".join(lines[-2:])


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
def test_a_fault_in_the_log_is_shown_and_makes_no_pdf(folder):
    for fault, message in (
        (r"\ref{x}", "Reference `x' on page 1 undefined"),
        (r"\char200", "Missing character: There is no "),
        (r"\hbox to 9pt{\rule{14.2pt}{1pt}}", r"Overfull \hbox (5.2pt too wide)"),
    ):
        document = f"\\documentclass{{article}}\\begin{{document}}\n{fault}\n\\end{{document}}"
        (folder / "report.tex").write_text(document)
        done = run("make", "PYTHON=true", folder=folder)
        assert done.returncode != 0
        assert message in done.stderr
        assert not (folder / "report.pdf").exists()


@tools("make", "git")
def test_the_archive_is_what_git_tracks_as_it_lies_on_the_disk(folder):
    git = ("git", "-c", "user.name=x", "-c", "user.email=x")
    for command in ("init", "add .", "commit -m x"):
        assert run(*git, *command.split(), folder=folder.parent).returncode == 0
    (folder / "Makefile").write_text((folder / "Makefile").read_text() + "# changed\n")
    (folder / "untracked").write_text("x")
    assert "make zip LASTNAME=doe" in run("make", "zip", "LASTNAME=../$(x)", folder=folder).stderr
    assert run("make", "zip", "LASTNAME=doe", folder=folder, HOME=str(folder)).returncode == 0
    with zipfile.ZipFile(folder / "doe_assignment3.zip") as archive:
        assert archive.namelist() == ["report/", "report/Makefile"]
        assert archive.read("report/Makefile").endswith(b"# changed\n")
