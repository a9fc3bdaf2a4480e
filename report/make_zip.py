"""Make LASTNAME_assignment3.zip: the report's PDF, the code, and all that it needs to run.

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
# Of what git tracks: all Python, the data, and what the README's commands take.
WANTED = ["*.py", "datasets", "requirements.txt", "tests/requirements-dev.txt", "README.md",
          "LICENSE", "Makefile"]  # fmt: skip
NEEDED = ["report/report.pdf", "datasets/mnist.npz", "requirements.txt"]


def main():
    name = os.environ.get("LASTNAME", "")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        sys.exit(
            f"zip: LASTNAME must be of letters, digits, - and _, the first a letter or digit, "
            f"and not {name!r}; for example: make zip LASTNAME=doe"
        )
    command = ["git", "ls-files", "-z", *WANTED]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        sys.exit("zip: the list of files comes from git, and this is no git checkout")
    paths = [path for path in listing.stdout.split("\0") if path and (ROOT / path).is_file()]
    paths = sorted({"report/report.pdf", *paths})
    for path in NEEDED:
        if path not in paths or not (ROOT / path).is_file():
            sys.exit(f"zip: {path} is missing; `make report` and git bring what is to be packed")

    target = REPORT / f"{name}_assignment3.zip"
    partial = target.with_suffix(".part")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in paths:
            archive.write(ROOT / path, path)
    partial.replace(target)
    print(f"report/{target.name}: the report, the code and its data, {len(paths)} files")


if __name__ == "__main__":
    main()
