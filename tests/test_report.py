"""The report: its form, and that no measured number in it was typed by hand."""

import math
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
PDF = REPORT / "report.pdf"

QUESTIONS = [
    f"{section}.{number}"
    for section, count in ((1, 15), (2, 7), (3, 8), (4, 1))
    for number in range(1, count + 1)
]
LINE_LIMITS = {"1.12": 10, "2.5": 10, "4.1": 15}
# The beginning of a macro's name -> the folder that defines it; longer beginnings first.
RUNS = {
    "VaeZTwoZeroDynamic": "vae_z20_dynamic",
    "VaeZTwoZero": "vae_z20",
    "VaeZTwo": "vae_z2",
    "Gan": "gan",
    "Nf": "nf",
}

# Numbers that may stand in the source: literal pieces of it, by what lets them stand.
ALLOWED = {
    "the size of an MNIST image and of its grey scale": [
        "784 pixels",
        "784 dimensions",
        r"$-784\ln 2\approx-543.4$",
        r"(784\ln2)",
        "$m=784$",
        "256 grey",
    ],
    "the layers that the assignment suggests": [
        "784--500",
        "$D$--500--784",
        "100--128--256--512--1024--784",
        "784--512--256--1",
        "from 256 on",
        "slope 0.2",
        "1024 hidden units",
        "8 affine couplings",
        "8 couplings",
    ],
    "fixed parts of our method that no script reports": [
        "dropout of 0.3",
        r"$\beta_1=0.5$",
        "norm clipped at 0.01",
        "float32",
        "float64",
    ],
    "the dimension of a latent space, which names the model": [
        "$D=20$",
        "20-dimensional",
        "Latent dimensions & 20 & 100 & 784",
        r"\vI_{100}",
        r"$\sqrt{100}$",
    ],
    "the split of MNIST, and how many images a measurement takes": [
        "first 50,000",
        "last 10,000",
        "10,000 samples",
        "10,000 test images",
        "1,000 images",
    ],
    "what the assignment asks for": ["25 samples", "7 steps", "required 1.85 in epoch"],
    "constants of a formula": [
        r"\alpha=10^{-5}",
        r"\vz/10",
        "(x+u)/256",
        r"\log256",
        r"5\times10^8",
        r"-\log4\approx-1.386",
        r"\ln10\approx2.303",
    ],
    "the worked example of question 1.5, which a test works again": [
        r"(\mu,\sigma^2)=(0.1,\,1)",
        "$0.005$",
        r"$(100,\,1)$",
        "$5000$",
    ],
    "cited from Goodfellow et al. (2014), Table 1": [r"$225\pm2$"],
    "references by number": ["Figure~1 of", "Question~1.4"],
}

NUMBER = r"\d+(?:(?:,|\{,\})\d{3})*(?:\.\d+)?"


@pytest.fixture(scope="module")
def source():
    """The report's source without comments, any white space made one blank."""
    tex = (REPORT / "report.tex").read_text(encoding="utf-8")
    return re.sub(r"\s+", " ", re.sub(r"(?<!\\)%.*", "", tex))


@pytest.fixture(scope="module")
def body(source):
    return re.search(r"\\begin\{document\}(.*)\\end\{document\}", source)[1]


def hand_typed_numbers(tex):
    """Return the numbers in a piece of source that are neither structure, formula nor ALLOWED."""
    for pieces in ALLOWED.values():
        for piece in pieces:
            tex = re.sub(rf"(?<![\d.]){re.escape(piece)}(?!\d)", " ", tex)
    # structure: references, headings, part marks, pictures, lengths, shapes of tables
    tex = re.sub(r"\\(eqref|ref|label|cite\w*|question|qpart|step|raisebox)\{[^}]*\}", " ", tex)
    tex = re.sub(r"\\includegraphics(\[[^]]*\])?\{[^}]*\}", " ", tex)
    tex = re.sub(r"\\setlength\{[^}]*\}\{[^}]*\}|\\\\\[[^]]*\]", " ", tex)
    tex = re.sub(r"\\begin\{minipage\}(\[c\])?\{[^}]*\}", " ", tex)

    def formula(match):
        """Drop a formula's constants of one digit, unless a lone number is all there is."""
        inside = match[0].strip("$")
        if re.fullmatch(rf"[\s+-]*{NUMBER}\s*", inside):
            return inside
        inside = re.sub(r"frac\d\d", " ", inside)
        return re.sub(NUMBER, lambda number: number[0] if len(number[0]) > 1 else " ", inside)

    environment = r"\\begin\{(equation|align|gather)\}.*?\\end\{\1\}"
    tex = re.sub(rf"{environment}|(?<!\\)\$[^$]*\$", formula, tex)
    return re.findall(NUMBER, tex)


def macros_used(body):
    return sorted(set(re.findall(rf"\\((?:{'|'.join(RUNS)})[A-Z][A-Za-z]*)", body)))


def run_of(macro):
    return next(run for start, run in RUNS.items() if re.match(rf"{start}[A-Z]", macro))


def numbers_of(run):
    path = ROOT / "results" / run / "numbers.tex"
    if not path.is_file():
        pytest.skip(f"results/{run} is not there yet")
    return dict(re.findall(r"\\newcommand\{\\(\w+)\}\{(.*)\}", path.read_text(encoding="utf-8")))


# ----------------------------------------------------------------------- the source


def test_every_question_has_its_heading_once_and_in_order(source, body):
    assert len(QUESTIONS) == 31
    assert re.findall(r"\\question\{([^}]*)\}", body) == QUESTIONS
    assert r"\newcommand{\question}[1]{\subsection*{Question #1}" in source


def test_no_number_is_typed_by_hand(body):
    assert hand_typed_numbers(body) == []


def test_no_macro_of_the_preamble_hides_a_number(source):
    preamble = source.split(r"\begin{document}")[0]
    assert not re.search(r"\\((re)?newcommand|def)\*?\{?\\\w+\}? ?\{[ $+-]*\d", preamble)


@pytest.mark.parametrize(
    "text",
    [
        "The bound is -97.6 nats.",
        "The bound is $-97.6$ nats.",
        "after 40 epochs",
        "$V=-1.24$",
        r"with 81\% of them",
        "in 1{,}024 steps",
        "$1{,}024$",
        "12 minutes",
        "all of the 9 digits",
        r"$1.70\pm0.02$",
        "class 3",
        "$9$ of the digits",
        r"\num{-97.6}",
        "& 7.1 & 14 &",
        r"\begin{equation} V=-1.2 \end{equation}",
        "and 784.5 nats",
        "1784 dimensions",
    ],
)
def test_a_hand_typed_number_is_found(text):
    assert hand_typed_numbers(text)


@pytest.mark.parametrize(
    "text",
    [
        r"The bound is \num{\VaeZTwoZeroValElbo} nats.",
        r"Figure~\ref{fig:elbo2}",
        r"\qpart{1} Yes",
        r"$x^2+1=\tfrac12$",
        r"$u\in[0,1)^m$",
        r"\question{1.13}",
        r"\includegraphics[width=0.5\linewidth]{\results/vae_z20/elbo.pdf}",
    ],
)
def test_what_is_no_result_is_left_alone(text):
    assert hand_typed_numbers(text) == []


def test_the_allowed_numbers_have_no_dead_entry(body):
    assert [piece for pieces in ALLOWED.values() for piece in pieces if piece not in body] == []


@pytest.mark.parametrize(("mu", "variance", "divergence"), [(0.1, 1, 0.005), (100, 1, 5000)])
def test_the_example_of_question_1_5(mu, variance, divergence):
    closed_form = (variance + mu**2 - 1 - math.log(variance)) / 2
    assert closed_form == pytest.approx(divergence)


@pytest.mark.parametrize("run", RUNS.values())
def test_the_macros_of_a_run_are_defined(source, body, run):
    assert rf"\input{{\results/{run}/numbers.tex}}" in source
    used = [macro for macro in macros_used(body) if run_of(macro) == run]
    assert used
    assert [macro for macro in used if macro not in numbers_of(run)] == []


def pictures_in(tex):
    return re.findall(r"\\includegraphics(?:\[[^]]*\])?\{([^}]*)\}", tex)


@pytest.mark.parametrize("run", ["vae_z20", "vae_z2", "gan", "nf"])
def test_the_pictures_of_a_run_are_there(body, run):
    ours = [name for name in pictures_in(body) if name.startswith(rf"\results/{run}/")]
    assert ours
    numbers_of(run)
    files = [name.replace(r"\results", "../results") for name in ours]
    assert [name for name in files if not (REPORT / name).is_file()] == []


def test_every_picture_comes_from_results(body):
    assert all(re.fullmatch(r"\\results/\w+/\w+\.pdf", name) for name in pictures_in(body))
    assert body.count(r"\includegraphics") == len(pictures_in(body))


def test_every_picture_has_a_caption_and_none_is_stretched(body):
    figures = re.findall(r"\\begin\{figure\}.*?\\end\{figure\}", body)
    tables = re.findall(r"\\begin\{table\}.*?\\end\{table\}", body)
    assert sum(len(pictures_in(figure)) for figure in figures) == len(pictures_in(body))
    for float_ in figures + tables:
        assert re.search(r"\\caption\{.{20,}", float_), float_
        label = re.search(r"\\label\{([^}]*)\}", float_)[1]
        assert rf"\ref{{{label}}}" in body
    for options in re.findall(r"\\includegraphics\[([^]]*)\]", body):
        assert "height" not in options or "keepaspectratio" in options


def test_the_references_are_those_that_are_cited(body):
    cited = {
        key.strip()
        for keys in re.findall(r"\\cite\w*(?:\[[^]]*\])*\{([^}]*)\}", body)
        for key in keys.split(",")
    }
    bibliography = (REPORT / "references.bib").read_text(encoding="utf-8")
    assert sorted(cited) == sorted(re.findall(r"^@\w+\{(\w+),", bibliography, flags=re.M))
    assert cited >= {
        "kingma2014",
        "rezende2015",
        "goodfellow2014",
        "dinh2017",
        "ho2019",
        "doersch2016",
        "burda2016",
    }


# ----------------------------------------------------------------------- the build


@pytest.mark.parametrize(
    ("line", "bad"),
    [
        (r"Overfull \hbox (5.1pt too wide) in paragraph at lines 3--4", True),
        (r"Overfull \vbox (12.0pt too high) has occurred while \output is active", True),
        (r"Overfull \hbox (4.9pt too wide) in paragraph at lines 3--4", False),
        (r"Underfull \hbox (badness 10000) in paragraph at lines 3--4", False),
        ("LaTeX Warning: Reference `fig:x' on page 1 undefined on input line 9.", True),
        ("Package natbib Warning: Citation `x' on page 1 undefined on input line 9.", True),
        ("LaTeX Warning: Label `fig:x' multiply defined.", True),
        ("report.tex:99: Undefined control sequence.", True),
        ("./report.tex:99: LaTeX Error: File `../results/nf/bpd.pdf' not found.", True),
        ("! Emergency stop.", True),
        ("Output written on build/report.pdf (10 pages, 1 bytes).", False),
    ],
)
def test_the_check_of_the_log(tmp_path, line, bad):
    log = tmp_path / "report.log"
    log.write_text(f"This is pdfTeX\n{line}\n")
    done = subprocess.run(
        [sys.executable, str(REPORT / "check_log.py"), str(log)], capture_output=True, text=True
    )
    assert (done.returncode, line in done.stderr) == ((1, True) if bad else (0, False))


needs_make = pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")


@needs_make
def test_without_latex_the_build_says_what_to_install(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("make", "sh"):
        (tools / tool).symlink_to(shutil.which(tool))
    work = tmp_path / "report"
    shutil.copytree(REPORT, work, ignore=shutil.ignore_patterns("build", "*.zip"))
    done = subprocess.run(
        [str(tools / "make"), f"SHELL={tools}/sh"],
        cwd=work,
        env={"PATH": str(tools)},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    first, *others = done.stderr.splitlines()
    packages = "latexmk texlive-latex-recommended texlive-fonts-recommended"
    assert f"apt-get install {packages}" in first
    assert all(line.startswith("make") for line in others)


@pytest.fixture
def checkout(tmp_path):
    """A small git checkout: the report's Makefile, and much that is not for the archive."""
    root = tmp_path / "work"
    tracked = [
        "a3_one.py",
        "datasets/two.py",
        "tests/test_three.py",
        "README.md",
        "results/gan/numbers.tex",
    ]
    for name in [*tracked, "untracked.py", ".venv/lib/four.py", "results/gan/checkpoint.pt"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "report").mkdir()
    for name in ("Makefile", "make_zip.py"):
        shutil.copy(REPORT / name, root / "report")
    (root / "report/report.pdf").write_bytes(b"%PDF")
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    subprocess.run(["git", "add", *tracked, "report"], cwd=root, check=True)
    return root


def make_zip(root, *arguments):
    drop = ("LASTNAME", "MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES")
    environment = {key: value for key, value in os.environ.items() if key not in drop}
    return subprocess.run(
        ["make", "-s", "-C", str(root / "report"), "zip", *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )


@needs_make
def test_the_archive_holds_the_pdf_and_the_code_and_nothing_else(checkout):
    done = make_zip(checkout, "LASTNAME=doe")
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(checkout / "report/doe_assignment3.zip") as archive:
        assert sorted(archive.namelist()) == [
            "a3_one.py",
            "datasets/two.py",
            "report/make_zip.py",
            "report/report.pdf",
            "tests/test_three.py",
        ]
        assert archive.read("datasets/two.py") == b"datasets/two.py"


@needs_make
@pytest.mark.parametrize(
    "name",
    [None, "", " ", "a b", "../x", "a/b", ".doe", "-doe", "d;oe", "o'doe", "doe\n", "*", "$(x)"],
)
def test_an_empty_or_odd_name_is_refused(checkout, name):
    done = make_zip(checkout, *([] if name is None else [f"LASTNAME={name}"]))
    assert done.returncode != 0
    assert "make zip LASTNAME=doe" in done.stderr
    assert list(checkout.parent.rglob("*.zip")) == []


@needs_make
def test_no_archive_without_the_pdf(checkout):
    (checkout / "report/report.pdf").unlink()
    done = make_zip(checkout, "LASTNAME=doe")
    assert done.returncode != 0
    assert "report.pdf is missing" in done.stderr
    assert list(checkout.parent.rglob("*.zip")) == []


# ----------------------------------------------------------------------- the PDF


@pytest.fixture(scope="module")
def pdf_lines():
    """The lines of the committed PDF, without page numbers."""
    if not PDF.is_file():
        pytest.skip("report/report.pdf is not there yet")
    if not shutil.which("pdftotext"):
        pytest.skip("pdftotext (poppler-utils) is not installed")
    done = subprocess.run(
        ["pdftotext", "-layout", str(PDF), "-"], capture_output=True, text=True, check=True
    )
    lines = [line.strip() for line in done.stdout.replace("\f", "\n").splitlines()]
    return [line for line in lines if line and not line.isdigit()]


def answer(lines, question):
    """The lines from a question's heading to the next heading or caption.

    Superscripts that pdftotext sets on a line of their own count too.
    """
    following = lines[lines.index(f"Question {question}") + 1 :]
    end = re.compile(r"Question \d\.\d+$|\d\s+[A-Z][a-z ]+$|References$|(Figure|Table) \d+: ")
    return following[: next(i for i, line in enumerate(following) if end.match(line))]


def test_the_headings_of_the_pdf(pdf_lines):
    found = [line for line in pdf_lines if re.fullmatch(r"Question \d\.\d+", line)]
    assert found == [f"Question {question}" for question in QUESTIONS]
    assert not any("??" in line for line in pdf_lines)


@pytest.mark.parametrize(("question", "limit"), LINE_LIMITS.items())
def test_the_answers_that_have_a_limit_of_lines(body, pdf_lines, question, limit):
    lines = answer(pdf_lines, question)
    assert len(lines) <= limit, "\n".join(lines)
    # all of it: a figure may not have cut it short
    tex = body.split(rf"\question{{{question}}}")[1]
    tex = re.split(r"\\(?:question|section|begin)\b", tex)[0]
    assert lines[-1].endswith(tex.split()[-1])


def test_the_pdf_shows_the_numbers_of_the_results(body, pdf_lines):
    text = "\n".join(pdf_lines).replace("\N{MINUS SIGN}", "-")
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text)
    stale = []
    for macro in macros_used(body):
        value = numbers_of(run_of(macro))[macro]
        shown = re.search(rf"(?<![\d.]){re.escape(value)}(?!\.?\d)", text)
        if re.fullmatch(r"-?\d+(\.\d+)?", value) and not shown:
            stale.append((macro, value))
    assert not stale, f"report.pdf does not show these, run `make report`: {stale}"
