"""Make numbers.tex, the macros of all numbers in report.tex, of the runs' results.

    python3 numbers.py ../results

A macro is named by its run and its number, \\VaeTestElbo; how it is rounded stands in DECIMALS.
"""

import csv
import json
import math
import os
import re
import sys
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
DECIMALS = {
    0: "sample_ms worst_train_bpd",
    1: "train_elbo val_elbo test_elbo initial_elbo first_train_elbo gap test_reconstruction "
    "test_kl test_log_px parzen parzen_stderr parzen_train parzen_train_stderr share_min "
    "share_max test_share_min test_share_max share_difference epoch_seconds training_minutes",
    2: "nearest_sample nearest_test nearest_sample_min nearest_test_min first_train_bpd "
    "first_val_bpd halfway_val_bpd",
    3: "train_bpd val_bpd test_bpd test_bpd_stderr value value_min value_first value_above d_real "
    "d_fake digit_entropy test_digit_entropy parzen_sigma",
}
PLACES = {name: places for places, names in DECIMALS.items() for name in names.split()}


def derived(final, history, summary):
    """Returns the numbers that follow from those of a run."""
    numbers = {
        "epochs": len(history["epoch"]),
        "halfway_epoch": (len(history["epoch"]) + 1) // 2,
        "training_minutes": summary["training_seconds"] / 60,
    }
    if "val_elbo" in final:
        numbers["gap"] = final["train_elbo"] - final["val_elbo"]
        numbers["first_train_elbo"] = history["train_elbo"][0]
    if "val_bpd" in final:
        numbers["first_train_bpd"] = history["train_bpd"][0]
        numbers["first_val_bpd"] = history["val_bpd"][0]
        numbers["halfway_val_bpd"] = history["val_bpd"][numbers["halfway_epoch"] - 1]
        numbers["worst_train_bpd"] = worst = max(history["train_bpd"])
        numbers["worst_train_epoch"] = history["train_bpd"].index(worst) + 1
    if "value" in final:
        lowest = min(history["value"])
        numbers["value_min"], numbers["value_first"] = lowest, history["value"][0]
        numbers["value_min_epoch"] = history["value"].index(lowest) + 1
        numbers["value_above"] = final["value"] + math.log(4)
        numbers["parameters"] = final["generator_parameters"] + final["discriminator_parameters"]
        shares = [100 * share for share in final["digit_shares"]]
        test_shares = [100 * share for share in final["test_digit_shares"]]
        numbers["share_min"], numbers["share_max"] = min(shares), max(shares)
        numbers["test_share_min"], numbers["test_share_max"] = min(test_shares), max(test_shares)
        both = zip(shares, test_shares, strict=True)
        numbers["share_difference"] = max(abs(share - test) for share, test in both)
        numbers["shares_row"] = " & ".join(f"{share:.1f}" for share in shares)
        numbers["test_shares_row"] = " & ".join(f"{share:.1f}" for share in test_shares)
        numbers["test_digit_entropy"] = -sum(p * math.log(p / 100) for p in test_shares if p) / 100
    return numbers


def macros(start, summary, history):
    """Yields the macros of a run."""
    numbers = {**summary["options"], **summary["final"], "epoch_seconds": summary["epoch_seconds"]}
    numbers |= derived(summary["final"], history, summary)
    for name, number in numbers.items():
        if isinstance(number, (bool, list)) or number is None:
            continue
        if name in PLACES:
            text = f"{number:,.{PLACES[name]}f}"
        elif isinstance(number, int):
            text = f"{number:,}"
        else:  # a text, or a number that somebody has typed, which says how it is rounded
            text = str(number)
        text = rf"\ensuremath{{{text}}}" if text.startswith("-") else text
        macro = start + "".join(word.capitalize() for word in name.split("_"))
        yield rf"\newcommand{{\{macro}}}{{{text}}}"


def settings(summaries):
    """Returns in words where the models of the table were trained: once if all alike."""
    models = {"vae": "VAE", "gan": "GAN", "nf": "flow", EXTENSION: "flow with mixtures"}
    where = {}
    for run in filter(summaries.get, models):
        summary = summaries[run]
        threads = f" with {summary['threads']} thread{'s' * (summary['threads'] > 1)}"
        device = f"{summary['device']}{threads if summary['device'] == 'CPU' else ''}"
        text = f"a {device}, with matrix products in {summary['options']['precision']}"
        where.setdefault(text, []).append(f"the {models[run]}")
    if len(where) == 1:
        return f"All were trained on {next(iter(where))}"
    lists = (f"on {text}: {', '.join(names)}" for text, names in where.items())
    return f"Trained {'; '.join(lists)}"


def escape(text):
    """Returns a text as LaTeX that prints it."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return re.sub(r"[\\~^{}$&#%_]", lambda match: special.get(match[0], "\\" + match[0]), text)


def main(results, author):
    lines = [rf"\newcommand{{\results}}{{{results}}}"]
    if author:
        lines.append(rf"\newcommand{{\reportauthor}}{{{escape(author)}}}")
    summaries = {}
    for run, (start, script) in RUNS.items():
        if run == EXTENSION and not (results / run / "summary.json").is_file():
            continue
        try:
            text = (results / run / "summary.json").read_text(encoding="utf-8")
            with (results / run / "metrics.csv").open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
        except FileNotFoundError as error:
            sys.exit(f"report: {error.filename} is missing; python {script} makes it")
        summaries[run] = json.loads(text)
        history = {name: [float(row[name]) for row in rows] for name in rows[0]}
        lines += macros(start, summaries[run], history)
    # \mixture{...} is there only with the extension
    lines.append(r"\newcommand{\mixture}[1]{%s}" % ("#1" * (EXTENSION in summaries)))
    lines.append(rf"\newcommand{{\trainedon}}{{{settings(summaries)}}}")
    Path("numbers.tex").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), os.environ.get("AUTHOR", "").strip())
