"""What a run is, for all scripts: its options, its folder, its files and how it ends.

Nothing here is about a model; the lessons are the scripts that import this.
"""

import argparse
import errno
import fcntl
import functools
import io
import json
import os
import re
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from datasets.mnist import DataError

FONT = {"font.family": "STIXGeneral", "mathtext.fontset": "stix", "font.size": 9}  # the report's


def fail(message, status=2):
    """Ends the program with the line `error: message` on standard error."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


def parse(parser, name):
    """Adds the options that all scripts have and returns the parsed ones.

    Without --results_dir the folder is results/`name`, extended by each option that differs from
    its default, so that no run takes the place of one with others. A bad option ends the program.
    """
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--seed", type=int, default=0, help="of every random draw")
    parser.add_argument("--device", default=devices[-1], choices=devices, help="where to run")
    parser.add_argument("--results_dir", help="if not one named by the options")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.error = fail  # one line, where argparse would print its usage, too
    args = parser.parse_args()

    for option, value in vars(args).items():
        least = -1 if option == "seed" else 0
        if type(value) in (int, float) and not least < value < 2**31:  # not a number fails, too
            fail(f"--{option} {value} is not allowed; give a number above {least} and below 2^31")
        if option not in ("results_dir", "resume") and value != parser.get_default(option):
            name += f"_{value}" if isinstance(value, str) else f"_{option}{value}"
    if args.results_dir == "":
        fail("--results_dir '' is not allowed; give the name of a folder")
    args.results_dir = Path(args.results_dir or Path(__file__).resolve().parent / "results" / name)
    return args


def shown(args):
    """Returns the options by name, but for where the results go and whether to resume."""
    return {k: v for k, v in vars(args).items() if k not in ("results_dir", "resume")}


@functools.cache  # once a folder: the lock lasts until the process ends, however it ends
def lock(folder):
    """Ends the program if another run is writing into the folder, else keeps others out of it."""
    try:
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno == errno.EWOULDBLOCK:  # not a file system without locks
            fail(f"another run is writing into {folder}; wait for it, or give another folder")


def write(path, content):
    """Writes bytes to a file, whole or not at all: what was there stays until all is written."""
    # Always the same temporary name: what a killed run has left of it is written over.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock(path.parent)
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def save_figure(figure, filename):
    """Saves a figure as PDF and as PNG, without a date: equal figures are equal files."""
    name = str(filename).removesuffix(".pdf").removesuffix(".png")
    for kind in ("pdf", "png"):
        buffer = io.BytesIO()
        metadata = {"CreationDate": None}
        figure.savefig(buffer, format=kind, dpi=200, bbox_inches="tight", metadata=metadata)
        write(Path(f"{name}.{kind}"), buffer.getvalue())
    plt.close(figure)


def save_torch(path, state):
    """Writes a state as `torch.save` does."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write(path, buffer.getvalue())


def check_finite(epoch, losses, *networks):
    """Raises FloatingPointError if a loss of this epoch, or a weight, is not a finite number."""
    weights = [weight for network in networks for weight in network.state_dict().values()]
    if not all(torch.as_tensor(x).isfinite().all() for x in (*losses, *weights)):
        raise FloatingPointError(f"epoch {epoch} ends with a loss or weights that are not finite")


def save_checkpoint(args, parts, history):
    """Writes checkpoint.pt: the options, the states of the `parts` by name, and the `history`."""
    states = {name: part.state_dict() for name, part in parts.items()}
    state = {"options": shown(args), "parts": states, "history": history,
             "threads": torch.get_num_threads()}  # fmt: skip
    save_torch(args.results_dir / "checkpoint.pt", state)


def load_checkpoint(args, parts):
    """Restores the `parts` from checkpoint.pt, and the number of threads; returns the history."""
    path = args.results_dir / "checkpoint.pt"
    if not path.is_file():
        fail(f"--resume found no {path}; leave it out to start")
    lock(args.results_dir)
    here = shown(args)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        options, history = state["options"], state["history"]
        if options == here:
            for name, part in parts.items():
                part.load_state_dict(state["parts"][name])
            torch.set_num_threads(state["threads"])  # their number changes how sums round
    except Exception:  # a damaged file makes the unpickler raise almost anything
        fail(f"{path} is no checkpoint that this script can read; move it away to start afresh")
    for option in options | here:
        if options.get(option) != here.get(option):
            fail(f"--{option} is {here.get(option)}, but {options.get(option)} in {path}")
    return history


def save_results(args, model, columns, final):
    """Writes weights.pt, a plain state_dict, metrics.csv with a row an epoch, and summary.json."""
    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    summary = {"options": shown(args), "device": device, "threads": torch.get_num_threads(),
               "torch": str(torch.__version__), "final": final}  # fmt: skip
    columns = {"epoch": range(1, len(columns["seconds"]) + 1)} | columns
    rows = [columns, *zip(*columns.values(), strict=True)]
    table = "".join(",".join(map(str, row)) + "\n" for row in rows)
    save_torch(args.results_dir / "weights.pt", model.state_dict())
    write(args.results_dir / "metrics.csv", table.encode())
    write(args.results_dir / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())


def run(main, args):
    """Runs `main`; bad data, too little memory or disk, and Ctrl-C end it in one line."""
    sys.stderr = sys.stderr or io.StringIO()  # 2>&- closes it, yet tqdm writes there
    if isinstance(sys.stdout, io.TextIOWrapper):  # paths may have letters that it lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with plt.rc_context(FONT):
            main()
    except DataError as error:
        fail(error)
    except BrokenPipeError:  # nobody reads on, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # as the signal would
    except OSError as error:
        fail(f"{error.filename or '-'}: {error.strerror}", 1 if error.errno == errno.ENOSPC else 2)
    except (KeyboardInterrupt, FloatingPointError) as error:
        path = args.results_dir / "checkpoint.pt"
        kept = f"{path} is the last one" if path.is_file() else "there is no checkpoint"
        fail(f"{str(error) or 'interrupted'}; {kept}", 1 if str(error) else 130)
    except (MemoryError, RuntimeError) as error:
        # PyTorch has no class of its own for a processor's memory, nor has its oneDNN.
        signs = r"MemoryError|(out of|enough|allocate) memory|could not create a primitive"
        if not re.search(signs, repr(error)):
            raise
        fail(f"there is not enough memory for {shown(args)}")
