"""Make numbers.tex, the macros of all numbers in report.tex, of the runs' results.

    python3 macros.py ../results

A macro is named by its run and its number, \\VaeTestElbo; how it is rounded stands in DECIMALS.
"""

import csv
import hashlib
import json
import math
import os
import re
import statistics
import sys
from decimal import ROUND_HALF_UP, Decimal
from itertools import takewhile
from pathlib import Path

RUNS = {  # a folder of the results, the beginning of its macros, the script that makes it
    "vae": ("Vae", "a3_vae_template.py"),
    "vae_dynamic": ("VaeDynamic", "a3_vae_template.py --binarization dynamic"),
    "vae_zdim2": ("VaeTwo", "a3_vae_template.py --zdim 2"),
    "gan": ("Gan", "a3_gan_template.py"),
    "nf": ("Nf", "a3_nf_template.py"),
    "nf_mixture": ("NfMixture", "extension/mixture_flow.py"),
    "nf_mixture_n_mix1": ("NfMixtureOne", "extension/mixture_flow.py --n_mix 1"),
}
EXTENSION = ["nf_mixture", "nf_mixture_n_mix1"]  # may be missing, or the second alone
KINDS = ("background", "beside", "rim", "ink")  # of pixels, see measure.py
FULL = {"gan": 200}  # epochs of a run at full length; of all others 40
TARGET = 1.85  # bits/dim on validation that the assignment asks for
DECIMALS = {
    0: "sample_ms weights_mb agreement test_agreement",
    1: "train_elbo val_elbo test_elbo initial_elbo initial_kl initial_logit_cost gap "
    "first_train_elbo first_val_elbo test_reconstruction test_kl test_log_px few_log_px iw_bias "
    "prior_last prior_short parzen parzen_stderr parzen_train parzen_train_stderr elbo_ahead "
    "share_min share_max share_difference share_outside share_zeros share_ones "
    "test_share_zeros test_share_ones prior_ahead rim_part vote_accuracy epoch_seconds "
    "training_minutes background_share beside_share ink_share rim_share",
    2: "nearest test_nearest nearest_min test_nearest_min first_train_bpd value_max "
    "test_elbo_stderr test_reconstruction_stderr test_kl_stderr test_log_px_stderr variance_min "
    "variance_max background_bits beside_bits ink_bits rim_bits",
    3: "train_bpd val_bpd test_bpd test_ahead test_bpd_stderr test_bpd_iw "
    "test_bpd_iw_single iw_gain end_train_bpd end_shifted_bpd end_val_bpd end_gap shift_cost "
    "bits_sum background_bpd beside_bpd ink_bpd rim_bpd network_gain mixture_gain "
    "background_gain beside_gain rim_gain ink_gain "
    "value_above d_real d_fake d_fake_min loss_g digit_entropy test_digit_entropy parzen_sigma",
    4: "value value_min",
}
PLACES = {name: places for places, names in DECIMALS.items() for name in names.split()}


def rounded(name, number):
    """Returns a number as the report prints it, halves rounded up."""
    number = Decimal(str(round(number, 9)))  # 11.35, which in binary lies below
    return number.quantize(Decimal(10) ** -PLACES[name], ROUND_HALF_UP)


def derived(numbers, history):
    """Returns the numbers that follow from those of a run and from its columns by epoch."""
    epochs = len(history["epoch"])
    seconds = statistics.median(history["seconds"])  # the machine does other work at times
    new = {
        "epochs": epochs, "epoch_seconds": seconds, "training_minutes": seconds * epochs / 60,
        "weights_mb": 4 * numbers["parameters"] / 1e6,  # a float32 takes four bytes
        "agreement": 100 * numbers["agreement"], "shares_row": shares_row(numbers["digit_shares"]),
        "share_min": 100 * min(numbers["digit_shares"]),
        "share_max": 100 * max(numbers["digit_shares"]),
    } | some_shares("share", numbers["digit_shares"])  # fmt: skip
    if "val_elbo" in numbers:
        new |= of_vae(numbers, history)
    if "val_bpd" in numbers:
        new |= of_flow(numbers, history)
    if "value" in numbers:
        new |= of_gan(numbers, history)
    return new


def some_shares(name, shares):
    """Returns the per cents of the digits that the text speaks of."""
    return {f"{name}_zeros": 100 * shares[0], f"{name}_ones": 100 * shares[1]}


def shares_row(shares):
    """Returns shares as a row of a table, in per cent."""
    return " & ".join(str(rounded("share_difference", 100 * share)) for share in shares)


def of_vae(numbers, history):
    """Returns what follows from the numbers of a VAE."""
    prior, draws = numbers["prior_log_px"], numbers["prior_draws"]
    new = {
        "gap": numbers["train_elbo"] - numbers["val_elbo"],
        "elbo_ahead": numbers["test_elbo"] - numbers["val_elbo"],
        "first_train_elbo": history["train_elbo"][0], "first_val_elbo": history["val_elbo"][0],
        "test_kl_samples": f"{math.exp(numbers['test_kl']):.0e}".replace("e+", r"\times10^{") + "}",
        "variance_min": min(numbers["aggregate_variance"]),
        "variance_max": max(numbers["aggregate_variance"]),
        "prior_last": prior[-1],
        "prior_short": numbers["few_log_px"] - prior[-1],
        # than as many draws as log p(x) is estimated with
        "prior_ahead": prior[-1] - (numbers["few_log_px"] - numbers["iw_bias"]),
        "prior_last_tens": round(math.log10(draws[-1])),
    }  # fmt: skip
    if "share_outside" in numbers:
        new["share_outside"] = 100 * numbers["share_outside"]
    return new


def of_flow(numbers, history):
    """Returns what follows from the numbers of a flow."""
    train, val = history["train_bpd"], history["val_bpd"]
    new = {
        "iw_gain": numbers["test_bpd_iw_single"] - numbers["test_bpd_iw"],
        "shift_cost": numbers["end_shifted_bpd"] - numbers["end_train_bpd"],
        "end_gap": numbers["end_val_bpd"] - numbers["end_train_bpd"],
        "first_train_bpd": train[0],
        "epoch_below": next((n for n, bpd in enumerate(val, 1) if bpd < TARGET), None),
        "best_epoch": val.index(min(val)) + 1,
        "test_ahead": numbers["val_bpd"] - numbers["test_bpd"],
    }
    for kind in KINDS:
        if f"{kind}_share" in numbers:
            share = numbers[f"{kind}_share"]
            new[f"{kind}_share"] = 100 * share
            new[f"{kind}_bits"] = numbers[f"{kind}_bpd"] / share  # of a pixel of this kind
    if "rim_bpd" in numbers:
        new["bits_sum"] = sum(numbers[f"{kind}_bpd"] for kind in KINDS)
        new["rim_part"] = 100 * numbers["rim_bpd"] / new["bits_sum"]
    return new


def of_gan(numbers, history):
    """Returns what follows from the numbers of a GAN."""
    values = history["value"]
    return {
        "value_min": min(values), "value_max": max(values),
        "value_min_epoch": values.index(min(values)) + 1,
        "value_above": numbers["value"] + math.log(4),
        "test_agreement": 100 * numbers["test_agreement"],
        "test_shares_row": shares_row(numbers["test_digit_shares"]),
        "label_shares_row": shares_row(numbers["label_shares"]),
        "vote_accuracy": 100 * numbers["vote_accuracy"],
        "d_fake_min": min(history["d_fake"]),
    } | some_shares("test_share", numbers["test_digit_shares"])  # fmt: skip


def coverage(column, test_column):
    """Returns by how many per cent, and at which digit, shares differ most from the test images'.

    Both are voted in the same way.
    """
    apart = [100 * abs(share - test) for share, test in zip(column, test_column, strict=True)]
    return {"share_difference": max(apart), "share_difference_digit": apart.index(max(apart))}


def steps(runs):
    """Returns what each step from RealNVP to the mixtures gains, the last one by kind of pixel."""
    realnvp, single, mixture = (runs[run] for run in ("nf", "nf_mixture_n_mix1", "nf_mixture"))
    return {
        "network_gain": realnvp["test_bpd"] - single["test_bpd"],
        "mixture_gain": single["test_bpd"] - mixture["test_bpd"],
        **{f"{kind}_gain": single[f"{kind}_bpd"] - mixture[f"{kind}_bpd"] for kind in KINDS},
    }


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


def check_weights(folder, sha256):
    """Ends the program if the weights beside the measures are not those of this SHA-256."""
    weights = folder / "weights.pt"
    # A clone lacks the largest weights.
    if weights.is_file() and hashlib.sha256(weights.read_bytes()).hexdigest() != sha256:
        sys.exit(f"report: {folder}/measures.json is of other weights than those beside it; "
                 f"python report/measure.py results/{folder.name} makes it anew")  # fmt: skip


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
        measures = json.loads((folder / name).read_text(encoding="utf-8"))
        check_weights(folder, measures.pop("weights_sha256", None))
        numbers |= measures
        return numbers | derived(numbers, history)
    except FileNotFoundError as error:
        sys.exit(f"report: {error.filename} is missing; python {script} makes it")
    except (LookupError, TypeError, ValueError) as error:
        what = f"{type(error).__name__} {str(error).splitlines()[0]}"
        sys.exit(f"report: {folder / name} is damaged ({what}); python {script} makes it anew")


def present(results):
    """Returns the runs that are to be reported: all but what is missing of the extension."""
    extra = takewhile(lambda run: (results / run / "summary.json").is_file(), EXTENSION)
    return [run for run in RUNS if run not in EXTENSION] + list(extra)


def main(results, author):
    check_author(author)
    lines = [rf"\newcommand{{\results}}{{{results}}}"]
    if author:
        lines.append(rf"\newcommand{{\reportauthor}}{{{escape(author)}}}")
    runs = {run: load(results / run, RUNS[run][1]) for run in present(results)}
    if "nf_mixture_n_mix1" in runs:
        runs["nf_mixture"] |= steps(runs)
    for run, numbers in runs.items():
        numbers |= coverage(numbers["digit_shares"], runs["gan"]["test_digit_shares"])
        lines += macros(RUNS[run][0], numbers)
    # \mixture{...} is there only with the extension, \ablation{...} only with both of its runs
    lines.append(r"\newcommand{\mixture}[1]{%s}" % ("#1" * ("nf_mixture" in runs)))
    lines.append(r"\newcommand{\ablation}[1]{%s}" % ("#1" * ("nf_mixture_n_mix1" in runs)))
    lines.append(rf"\newcommand{{\tooshort}}{{{too_short(runs)}}}")
    Path("numbers.tex").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), os.environ.get("AUTHOR", "").strip())
