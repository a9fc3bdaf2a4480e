"""Print what is wrong in a LaTeX log and exit with status 1 if there is anything.

Wrong are errors, undefined or doubly defined references and citations, missing files
and characters, and boxes that stick out by more than 5 pt.
"""

import re
import sys

MAX_OVERFULL = 5.0  # points

ERROR = re.compile(r"^(!|\S+\.(tex|sty|aux|bbl):\d+:) ")
WARNING = re.compile(r"undefined|multiply[ -]defined|No file .*\.bbl|Missing character")
OVERFULL = re.compile(r"^Overfull \\[hv]box \(([\d.]+)pt")


def problems(log):
    """Return the lines of the log that a finished report must not have."""
    found = []
    in_error = False
    for line in log.splitlines():
        if in_error and re.match(r"l\.\d", line):  # the line of source, up to the error
            found[-1] += f" {line}"
            in_error = False
        box = OVERFULL.match(line)
        if box:
            bad = float(box[1]) > MAX_OVERFULL
        else:
            bad = ERROR.match(line) or (WARNING.search(line) and "Font" not in line)
        if bad:
            found.append(line)
            in_error = bool(ERROR.match(line))
    return found


if __name__ == "__main__":
    with open(sys.argv[1], encoding="latin-1") as file:
        lines = problems(file.read())
    for line in lines:
        print(f"report: {line}", file=sys.stderr)
    sys.exit(1 if lines else 0)
