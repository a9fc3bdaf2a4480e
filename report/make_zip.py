"""Make LASTNAME_assignment3.zip of the report's PDF and all that git tracks, without weights."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
name = os.environ.get("LASTNAME", "")
if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
    sys.exit(f"zip: {name!r} is no name of letters, digits, - and _; make zip LASTNAME=doe")
listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
if listing.returncode:
    sys.exit("zip: the list of files comes from git, and this is no git checkout")
paths = {"report/report.pdf", *listing.stdout.split("\0")} - {""}
paths = sorted(path for path in paths if not path.endswith("weights.pt"))
for path in paths:
    if not (ROOT / path).is_file():
        sys.exit(f"zip: {path} is missing; `make report` and git bring what is to be packed")
target = ROOT / "report" / f"{name}_assignment3.zip"
partial = target.with_suffix(".part")
with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
    for path in paths:
        archive.write(ROOT / path, path)
partial.replace(target)
print(f"report/{target.name}: the report, the code and its data, {len(paths)} files")
