"""Make numbers.tex, the macros of all numbers in report.tex, from the runs in ../results.

    python3 macros.py

A macro is named by its run and its number, \\VaeTestElbo, and rounded by its unit, as in DECIMALS.
"""

import csv
import hashlib
import json
import math
import os
import re
import statistics
import sys
from pathlib import Path

RESULTS = Path("../results")
RUNS = {  # a folder of the results, the beginning of its macros, the script that makes it
    "vae": ("Vae", "a3_vae_template.py"),
    "vae_dynamic": ("VaeDynamic", "a3_vae_template.py --binarization dynamic"),
    "vae_zdim2": ("VaeTwo", "a3_vae_template.py --zdim 2"),
    "gan": ("Gan", "a3_gan_template.py"),
    "nf": ("Nf", "a3_nf_template.py"),
    "nf_mixture": ("NfMixture", "extension/mixture_flow.py"),
}
KINDS = ("background", "beside", "rim", "ink")  # of pixels, see measure.py
TARGET = 1.85  # bits/dim on validation that the assignment asks for
DECIMALS = {  # by the unit, which a name tells; nats, per cent, seconds and minutes have one
    "agreement$|_ms$": 0,
    "_bits$|nearest": 2,
    "bpd|bits_sum|iw_gain|end_gap|test_ahead": 3,  # bits/dim
    "value|^d_|sigma": 3,
}
PER_CENT = "agreement|accuracy|share"  # names of measures that are shares of one


def rounded(name, number):
    """Returns a number as the report prints it."""
    places = [places for pattern, places in DECIMALS.items() if re.search(pattern, name)]
    return f"{number:,.{places[0] if places else 1}f}"


def of_all(numbers, history):
    """Returns the numbers that follow from those of any run and from its columns by epoch."""
    seconds = statistics.median(history["seconds"])  # the machine does other work at times
    epochs = len(history["epoch"])
    new = {
        "epochs": epochs, "epoch_seconds": seconds, "training_minutes": seconds * epochs / 60,
        "share_zeros": numbers["digit_shares"][0],
    }  # fmt: skip
    for name, values in numbers.items():
        if name.endswith("shares"):  # a row of a table
            row = " & ".join(rounded("share", value) for value in values)
            new[name.replace("digit_", "") + "_row"] = row
    return new


def of_vae(numbers, history):
    """Returns what follows from the numbers of a VAE."""
    prior, few_log_px = numbers["prior_log_px"][-1], numbers["few_log_px"]
    return {
        "gap": numbers["train_elbo"] - numbers["val_elbo"],
        "elbo_ahead": numbers["test_elbo"] - numbers["val_elbo"],
        "first_train_elbo": history["train_elbo"][0],
        "test_kl_samples": f"{math.exp(numbers['test_kl']):.0e}".replace("e+", r"\times10^{") + "}",
        "prior_last_tens": round(math.log10(numbers["prior_draws"][-1])),
        "prior_short": few_log_px - prior,
        # than as many draws as log p(x) is estimated with
        "prior_ahead": prior - (few_log_px - numbers["iw_bias"]),
    }  # fmt: skip


def of_gan(numbers, history):
    """Returns what follows from the numbers of a GAN."""
    values = history["value"]
    return {
        "value_min": min(values), "value_min_epoch": values.index(min(values)) + 1,
        "value_max": max(values), "value_above": numbers["value"] + math.log(4),
        "parzen_spread": max(numbers["parzen_draws"]) - min(numbers["parzen_draws"]),
        "test_share_zeros": numbers["test_digit_shares"][0],
    }  # fmt: skip


def of_flow(numbers, history):
    """Returns what follows from the numbers of a flow."""
    val = history["val_bpd"]
    new = {
        "end_gap": numbers["end_val_bpd"] - numbers["end_train_bpd"],
        "first_train_bpd": history["train_bpd"][0],
        "epoch_below": next((n for n, bpd in enumerate(val, 1) if bpd < TARGET), "(none)"),
        "best_epoch": val.index(min(val)) + 1,
        "test_ahead": numbers["val_bpd"] - numbers["test_bpd"],
    }
    if "rim_bpd" in numbers:
        for kind in KINDS:  # bits of a pixel of this kind
            new[f"{kind}_bits"] = 100 * numbers[f"{kind}_bpd"] / numbers[f"{kind}_share"]
        new["bits_sum"] = sum(numbers[f"{kind}_bpd"] for kind in KINDS)
        new["rim_part"] = 100 * numbers["rim_bpd"] / new["bits_sum"]
    return new


def in_per_cent(name, value):
    """Returns a measure, or a list of them, in per cent if it is a share of one."""
    if not re.search(PER_CENT, name):
        return value
    return [100 * x for x in value] if isinstance(value, list) else 100 * value


def load(run):
    """Returns the numbers of a run by name."""
    folder, script = RESULTS / run, RUNS[run][1]
    name = "summary.json"
    try:
        summary = json.loads((folder / name).read_text(encoding="utf-8"))
        numbers = {option: str(x) if isinstance(x, float) else x  # as somebody has typed it
                   for option, x in summary["options"].items()}  # fmt: skip
        numbers |= summary["final"] | {"threads": summary["threads"]}
        name = "metrics.csv"
        with (folder / name).open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        history = {column: [float(row[column]) for row in rows] for column in rows[0]}
        sha256 = hashlib.sha256((folder / "weights.pt").read_bytes()).hexdigest()
        name, script = "measures.json", f"report/measure.py results/{run}"
        measures = json.loads((folder / name).read_text(encoding="utf-8"))
        if measures.pop("weights_sha256") != sha256:
            raise ValueError("the weights beside it are others")
        numbers |= {x: in_per_cent(x, value) for x, value in measures.items()}
        follow = of_vae if run.startswith("vae") else of_gan if run == "gan" else of_flow
        return numbers | of_all(numbers, history) | follow(numbers, history)
    except FileNotFoundError as error:
        sys.exit(f"report: {error.filename} is missing; python {script} makes it")
    except (LookupError, TypeError, ValueError) as error:
        what = f"{type(error).__name__} {str(error).splitlines()[0]}"
        sys.exit(f"report: {folder / name} cannot be used ({what}); python {script} makes it anew")


def macro(start, name, number):
    """Returns the line that defines the macro of a run's number."""
    if isinstance(number, float):
        number = rounded(name, number)
    elif isinstance(number, int):
        number = f"{number:,}"
    number = rf"\ensuremath{{{number}}}" if number.startswith("-") else number
    return rf"\newcommand{{\{start}{name.title().replace('_', '')}}}{{{number}}}"


def escape(text):
    """Returns a text as LaTeX that prints it."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return re.sub(r"[\\~^{}$&#%_]", lambda match: special.get(match[0], "\\" + match[0]), text)


def main(author):
    lines = [rf"\newcommand{{\results}}{{{RESULTS.as_posix()}}}"]
    if author:
        lines.append(rf"\newcommand{{\reportauthor}}{{{escape(author)}}}")
    runs, short = {run: load(run) for run in RUNS}, []
    for run, numbers in runs.items():
        # The flows learn shifted images, all others images as they are.
        real = numbers.get("shifted_digit_shares", runs["gan"]["test_digit_shares"])
        apart = [abs(share - real[digit]) for digit, share in enumerate(numbers["digit_shares"])]
        numbers["share_difference"] = max(apart)
        lines += [macro(RUNS[run][0], name, number) for name, number in numbers.items()
                  if not isinstance(number, list)]  # fmt: skip
        full = 200 if run == "gan" else 40
        if numbers["epochs"] != full:
            short.append(f"{run} {numbers['epochs']} of {full}")
    note = f"Runs not at full length, in epochs: {', '.join(short)}." if short else ""
    lines.append(rf"\newcommand{{\tooshort}}{{{escape(note)}}}")
    Path("numbers.tex").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(os.environ.get("AUTHOR", "").strip())
