"""Make LASTNAME_assignment3.zip: the report's PDF and all Python code that git tracks.

The last name comes from the environment variable LASTNAME (`make zip LASTNAME=doe`).
"""

import os
import pathlib
import re
import subprocess
import sys
import zipfile

REPORT = pathlib.Path(__file__).resolve().parent
ROOT = REPORT.parent


def main():
    name = os.environ.get("LASTNAME", "")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        sys.exit(
            f"zip: LASTNAME must be of letters, digits, - and _, the first a letter or digit, "
            f"and not {name!r}; for example: make zip LASTNAME=doe"
        )
    if not (REPORT / "report.pdf").is_file():
        sys.exit("zip: report/report.pdf is missing; run `make` in report/ first")
    listing = subprocess.run(
        ["git", "ls-files", "-z", "*.py"], cwd=ROOT, capture_output=True, text=True
    )
    if listing.returncode:
        sys.exit("zip: the list of Python files comes from git, and this is no git checkout")
    code = [path for path in listing.stdout.split("\0") if path and (ROOT / path).is_file()]

    target = REPORT / f"{name}_assignment3.zip"
    partial = target.with_suffix(".part")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in ["report/report.pdf", *code]:
            archive.write(ROOT / path, path)
    partial.replace(target)
    print(f"{target.name}: report.pdf and {len(code)} Python files")


if __name__ == "__main__":
    main()
