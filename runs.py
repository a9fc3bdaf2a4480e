"""Options, files and resuming, the same for all scripts; the lessons are the scripts."""

import argparse
import json
import math
import os
import sys
from functools import partial
from pathlib import Path

import matplotlib.style
import torch
from torchvision.utils import make_grid, save_image

from datasets.mnist import DataError

STYLE = {"font.family": "STIXGeneral", "mathtext.fontset": "stix", "font.size": 9,
         "savefig.dpi": 200, "pdf.fonttype": 42}  # the report's font, as TrueType  # fmt: skip


def fail(message):
    """Ends the program with the line `error: message` on standard error and status 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def parse(parser, name, **least):
    """Adds the options that all scripts have and returns the parsed ones; a bad one ends the run.

    Whole numbers must be at least 1 (the seed 0), or what `least` names for an option; fractions
    lie in 0..1. Without --results_dir the results go to results/`name`, and each option that
    differs from its default is added to that name: a run only overwrites one with the same options.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers")
    parser.add_argument("--device", default=device, help="cpu, cuda, cuda:1, mps, ...")
    parser.add_argument("--results_dir", type=Path, help="if not the one named by the options")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.error = fail  # one line, where argparse would print its usage, too
    args = parser.parse_args()

    for option, value in options(args).items():
        low = least.get(option, 0 if option == "seed" else 1)
        if type(value) is int and not low <= value < 2**31:
            fail(f"--{option} {value} is not allowed; give a whole number from {low} to 2^31 - 1")
        if type(value) is float and not 0 <= value <= 1:
            fail(f"--{option} {value} is not allowed; give a number from 0 to 1")
        if value != parser.get_default(option):
            name += f"_{value}" if isinstance(value, str) else f"_{option}{value}"
    try:
        torch.ones(1, device=args.device).item()
    except Exception as error:  # each kind of device fails in its own way
        fail(f"--device {args.device} cannot be used: {str(error).splitlines()[0]}")
    name = name.replace(":", "")  # Windows has no files named cuda:1
    args.results_dir = args.results_dir or Path(__file__).resolve().parent / "results" / name
    return args


def options(args):
    """Returns all options but --results_dir and --resume, by name."""
    return {k: v for k, v in vars(args).items() if k not in ("results_dir", "resume")}


def write(path, save):
    """Writes by `save(file)` to a temporary name, then renames: a kill leaves the old file."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            save(file)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # the second one is torch.save's on a full disk
        fail(f"{path} cannot be written: {error}")


def save_images(images, path, nrow=5, padding=1):
    """Saves images with pixels in [0, 1], `[n, 784]` or `[n, 1, 28, 28]`, as a grid, ink in black.

    Each pixel takes 4 x 4 in the file, so that viewers do not blur it.
    """
    grid = make_grid(1 - images.view(-1, 1, 28, 28), nrow=nrow, padding=padding, pad_value=0.5)
    grid = grid.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)
    write(path, partial(save_image, grid, format="png"))


def save_figure(figure, path):
    """Saves a figure as .png and as .pdf, without a date: equal figures are equal files."""
    for kind in ("png", "pdf"):
        save = partial(figure.savefig, format=kind, metadata={"CreationDate": None})
        write(Path(path).with_suffix(f".{kind}"), save)


def check_finite(epoch, *losses):
    """Ends the run if a loss is not finite, before this epoch's checkpoint."""
    if not all(map(math.isfinite, losses)):
        fail(f"epoch {epoch} ends with losses {losses}; no new checkpoint is written")


def save_checkpoint(args, parts, history):
    """Writes checkpoint.pt: the options, the states of the `parts`, the history, random states."""
    checkpoint = {"options": options(args), "history": history, "random": torch.get_rng_state(),
                  "parts": {name: part.state_dict() for name, part in parts.items()}}  # fmt: skip
    if torch.device(args.device).type != "cpu":
        module = torch.get_device_module(args.device)
        checkpoint["random_of_device"] = module.get_rng_state(args.device)
    write(args.results_dir / "checkpoint.pt", partial(torch.save, checkpoint))


def load_checkpoint(args, parts, history):
    """Restores the `parts`, the history and the random states from checkpoint.pt."""
    path = args.results_dir / "checkpoint.pt"
    if not path.is_file():
        fail(f"--resume finds no {path}; leave it out to start")
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    here, there = options(args), checkpoint["options"]
    for option in here | there:
        if here.get(option) != there.get(option):
            fail(f"--{option} is {here.get(option)}, but {there.get(option)} in {path}")
    for name, part in parts.items():
        part.load_state_dict(checkpoint["parts"][name])
    for name, column in checkpoint["history"].items():
        history[name].extend(column)
    torch.set_rng_state(checkpoint["random"])
    if torch.device(args.device).type != "cpu":
        module = torch.get_device_module(args.device)
        module.set_rng_state(checkpoint["random_of_device"], args.device)


def save_results(args, weights, history, **more):
    """Writes weights.pt; metrics.csv, a row per epoch; summary.json: options, last row, `more`."""
    columns = {"epoch": range(1, len(history["seconds"]) + 1)} | history
    rows = [list(columns), *zip(*columns.values(), strict=True)]
    table = "".join(",".join(map(str, row)) + "\n" for row in rows)
    final = {name: column[-1] for name, column in columns.items()} | more
    summary = {"options": options(args), "threads": torch.get_num_threads(),
               "torch": str(torch.__version__), "final": final}  # fmt: skip
    text = json.dumps(summary, indent=2) + "\n"
    write(args.results_dir / "weights.pt", partial(torch.save, weights))
    write(args.results_dir / "metrics.csv", lambda file: file.write(table.encode()))
    write(args.results_dir / "summary.json", lambda file: file.write(text.encode()))


def run(main):
    """Runs `main` with the report's style for figures; bad data and Ctrl-C end in one line."""
    try:
        with matplotlib.style.context(["default", STYLE]):  # whatever a user's matplotlibrc says
            main()
    except DataError as error:
        fail(error)
    except KeyboardInterrupt:
        fail("interrupted; with --resume, training goes on after the last finished epoch")
