"""Make numbers.tex, the macros of all numbers in report.tex, of the runs' results.

    python3 macros.py ../results

A macro is named by its run and its number, \\VaeTestElbo; how it is rounded stands in DECIMALS.
"""

import csv
import json
import math
import os
import re
import statistics
import sys
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

RUNS = {  # a folder of the results, the beginning of its macros, the script that makes it
    "vae": ("Vae", "a3_vae_template.py"),
    "vae_dynamic": ("VaeDynamic", "a3_vae_template.py --binarization dynamic"),
    "vae_zdim2": ("VaeTwo", "a3_vae_template.py --zdim 2"),
    "gan": ("Gan", "a3_gan_template.py"),
    "nf": ("Nf", "a3_nf_template.py"),
    "nf_mixture": ("NfMixture", "a3_nf_template.py --coupling mixture"),
}
EXTENSION = "nf_mixture"  # the report does without it
FULL = {"gan": 200}  # epochs of a run at full length; of all others 40
TARGET = 1.85  # bits/dim on validation that the assignment asks for
DECIMALS = {
    0: "sample_ms test_kl_tens",
    1: "train_elbo val_elbo test_elbo initial_elbo initial_kl first_train_elbo first_val_elbo gap "
    "test_reconstruction test_kl test_log_px parzen parzen_stderr parzen_train "
    "parzen_train_stderr share_min share_max test_share_min test_share_max share_difference "
    "share_outside epoch_seconds training_minutes",
    2: "nearest_sample nearest_test nearest_sample_min nearest_test_min first_train_bpd "
    "value_max test_elbo_stderr "
    "test_reconstruction_stderr test_kl_stderr test_log_px_stderr variance_min variance_max",
    3: "train_bpd val_bpd test_bpd bpd_gap test_ahead test_bpd_stderr test_bpd_iw "
    "test_bpd_iw_single value value_min value_above d_real d_fake loss_g digit_entropy "
    "test_digit_entropy parzen_sigma",
}
PLACES = {name: places for places, names in DECIMALS.items() for name in names.split()}


def rounded(name, number):
    """Returns a number as the report prints it, halves rounded up."""
    number = Decimal(str(round(number, 9)))  # 11.35, which in binary lies below
    return number.quantize(Decimal(10) ** -PLACES[name], ROUND_HALF_UP)


def difference(one, other, numbers):
    """Returns the difference of two numbers as printed, so that a reader finds the same."""
    return rounded(one, numbers[one]) - rounded(other, numbers[other])


def derived(numbers, history):
    """Returns the numbers that follow from those of a run and from its columns by epoch."""
    epochs = len(history["epoch"])
    seconds = statistics.median(history["seconds"])  # the machine does other work at times
    new = {
        "epochs": epochs,
        "epoch_seconds": seconds,
        "training_minutes": float(rounded("epoch_seconds", seconds)) * epochs / 60,
    }
    if "val_elbo" in numbers:
        new["gap"] = difference("train_elbo", "val_elbo", numbers)
        new["first_train_elbo"] = history["train_elbo"][0]
        new["first_val_elbo"] = history["val_elbo"][0]
    if "test_kl" in numbers:
        new["test_kl_tens"] = numbers["test_kl"] / math.log(10)
    if "aggregate_variance" in numbers:
        new["variance_min"], new["variance_max"] = sorted(numbers["aggregate_variance"])
        new["share_outside"] = 100 * numbers["share_outside"]
    if "val_bpd" in numbers:
        train, val = history["train_bpd"], history["val_bpd"]
        new["first_train_bpd"] = train[0]
        new["epoch_below"] = next((n for n, bpd in enumerate(val, 1) if bpd < TARGET), None)
        curves = enumerate(zip(train, val, strict=True), 1)
        new["train_below"] = next((n for n, (one, other) in curves if one < other), None)
        new["best_epoch"] = val.index(min(val)) + 1
        new["bpd_gap"] = difference("val_bpd", "train_bpd", numbers)
        new["test_ahead"] = difference("val_bpd", "test_bpd", numbers)
    if "value" in numbers:
        values = history["value"]
        new["value_min"], new["value_max"] = min(values), max(values)
        new["value_min_epoch"] = values.index(min(values)) + 1
        new["value_above"] = float(rounded("value", numbers["value"])) + math.log(4)
        both = numbers["digit_shares"], numbers["test_digit_shares"]
        shares, test_shares = ([rounded("share_min", 100 * s) for s in column] for column in both)
        new["share_min"], new["share_max"] = min(shares), max(shares)
        new["test_share_min"], new["test_share_max"] = min(test_shares), max(test_shares)
        pairs = zip(shares, test_shares, strict=True)
        new["share_difference"] = max(abs(share - test) for share, test in pairs)
        new["shares_row"] = " & ".join(map(str, shares))
        new["test_shares_row"] = " & ".join(map(str, test_shares))
        new["test_digit_entropy"] = -sum(p * math.log(p) for p in both[1] if p)
    return new


def macros(start, numbers):
    """Yields the macros of a run."""
    for name, number in numbers.items():
        if isinstance(number, (bool, list)):
            continue
        if number is None:  # no epoch is below 1.85
            text = "(none)"
        elif name in PLACES:
            text = f"{rounded(name, number):,}"
        elif isinstance(number, int):
            text = f"{number:,}"
        else:  # a text, or a number that somebody has typed, which says how it is rounded
            text = str(number)
        text = rf"\ensuremath{{{text}}}" if text.startswith("-") else text
        macro = start + "".join(word.capitalize() for word in name.split("_"))
        yield rf"\newcommand{{\{macro}}}{{{text}}}"


def too_short(runs):
    """Returns what the report says on top of runs that are not at full length, if any."""
    epochs = {run: (numbers["epochs"], FULL.get(run, 40)) for run, numbers in runs.items()}
    short = [f"{run} {n} of {full}" for run, (n, full) in epochs.items() if n != full]
    return escape(f"Runs not at full length, in epochs: {', '.join(short)}." if short else "")


def escape(text):
    """Returns a text as LaTeX that prints it."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return re.sub(r"[\\~^{}$&#%_]", lambda match: special.get(match[0], "\\" + match[0]), text)


def check_author(author):
    """Ends the program if the name has a character that the report's fonts lack."""
    pages = ("cp1250", "cp1252", "cp1254")  # Europe's Latin letters, which T1 fonts have, too
    for letter in author:
        if not (letter.isprintable() and any(letter.encode(page, "ignore") for page in pages)):
            sys.exit(f"report: AUTHOR has {letter!r}, which these fonts lack; use Latin letters")


def load(folder, script):
    """Returns the numbers of a run by name."""
    name = "summary.json"
    try:
        summary = json.loads((folder / name).read_text(encoding="utf-8"))
        numbers = summary["options"] | summary["final"]
        numbers |= {key: summary[key] for key in ("device", "threads")}
        name = "metrics.csv"
        with (folder / name).open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        history = {column: [float(row[column]) for row in rows] for column in rows[0]}
        name, script = "measures.json", f"report/measure.py results/{folder.name}"
        numbers |= json.loads((folder / name).read_text(encoding="utf-8"))
        return numbers | derived(numbers, history)
    except FileNotFoundError as error:
        sys.exit(f"report: {error.filename} is missing; python {script} makes it")
    except (LookupError, TypeError, ValueError) as error:
        what = f"{type(error).__name__} {str(error).splitlines()[0]}"
        sys.exit(f"report: {folder / name} is damaged ({what}); python {script} makes it anew")


def main(results, author):
    check_author(author)
    lines = [rf"\newcommand{{\results}}{{{results}}}"]
    if author:
        lines.append(rf"\newcommand{{\reportauthor}}{{{escape(author)}}}")
    runs = {}
    for run, (start, script) in RUNS.items():
        if run != EXTENSION or (results / run / "summary.json").is_file():
            runs[run] = load(results / run, script)
            lines += macros(start, runs[run])
    # \mixture{...} is there only with the extension
    lines.append(r"\newcommand{\mixture}[1]{%s}" % ("#1" * (EXTENSION in runs)))
    lines.append(rf"\newcommand{{\tooshort}}{{{too_short(runs)}}}")
    Path("numbers.tex").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), os.environ.get("AUTHOR", "").strip())
