"""Make LASTNAME_assignment3.zip: the report with its code, its data and its trained models."""

import os
import re
import sys
import zipfile
from pathlib import Path

from macros import present

ROOT = Path(__file__).resolve().parent.parent
# Named here and not asked of git: so it is the same in a clone, in a folder without git, and in
# the unpacked archive, wherever that lies. A test compares it with what git tracks.
FILES = [
    ".ci/run", ".gitignore", "LICENSE", "Makefile", "README.md", "pytest.ini", "requirements.txt",
    "ruff.toml", "*.py", "benchmarks/*.md", "benchmarks/*.py", "datasets/*.md", "datasets/*.py",
    "datasets/mnist.npz", "datasets/binarized_mnist.npz", "extension/*.py", "report/.gitignore",
    "report/Makefile", "report/*.py", "report/dgm_report.sty", "report/page.png",
    "report/references.bib", "report/report.pdf", "report/report.tex", "tests/*.py", "tests/*.txt",
]  # fmt: skip
runs = present(ROOT / "results")
FILES += [f"results/{run}/*.{kind}" for run in runs for kind in ("csv", "json", "pdf", "png")]
FILES += [f"results/{run}/weights.pt" for run in runs if run != "nf"]  # 72 MB, not in git either

name = os.environ.get("LASTNAME", "")
if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
    sys.exit(f"zip: {name!r} is no name of letters, digits, - and _; make zip LASTNAME=doe")
paths = set()
for pattern in FILES:
    found = set(ROOT.glob(pattern))
    if not found:
        sys.exit(f"zip: {pattern} is missing; a fresh clone has all that is to be packed")
    paths |= found
target = ROOT / "report" / f"{name}_assignment3.zip"
partial = target.with_suffix(".part")
with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
    for path in sorted(paths):
        archive.write(path, path.relative_to(ROOT))
partial.replace(target)
print(f"report/{target.name}: the report, its code, data and models, {len(paths)} files")
